"""Options, the runtime folder and its lock, and the commands that start children."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import pytest

from ebbflow.daemon.process import SPARE_VARIABLE
from ebbflow.daemon.settings import WorkerSettings, parse_settings
from ebbflow.daemon.supervisor.children import JOB, LOG_NBYTES, WORKER, CommandLauncher
from ebbflow.daemon.supervisor.main import default_reserve, main, suited
from ebbflow.daemon.supervisor.runtime import locked, prepare
from ebbflow.formats.errors import AlreadyRunning, DaemonFailed, InvalidConfig, InvalidSize
from ebbflow.formats.messages import AddModel
from ebbflow.formats.paths import home_paths


@pytest.fixture
def paths(tmp_path):
    return home_paths(tmp_path)


@pytest.mark.parametrize(("total", "reserve"), [(2**30, 256 * 10**6), (10**10, 5 * 10**8), (2**36, 10**9)])
def test_the_default_reserve(total, reserve):
    assert default_reserve(total) == reserve


@pytest.mark.parametrize(
    ("given", "total", "limit"), [(0, 4 * 10**9, 5 * 10**8), (0, 64 * 10**9, 2 * 10**9), (7, 4 * 10**9, 7)]
)
def test_keys_and_values_get_an_eighth_of_memory(given, total, limit):
    settings = WorkerSettings("i8", threads=3, kv_limit=given)
    assert suited(settings, total) == replace(settings, kv_limit=limit)


def test_the_runtime_folder_is_made_for_us_alone(paths):
    prepare(paths)
    prepare(paths)
    assert paths.runtime.stat().st_mode & 0o777 == 0o700
    assert paths.library.is_dir()


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o702])
def test_a_runtime_folder_that_others_can_enter_is_refused(paths, mode):
    paths.runtime.mkdir()
    paths.runtime.chmod(mode)
    with pytest.raises(DaemonFailed, match=f"mode {mode:o}"):
        prepare(paths)


def test_a_runtime_folder_that_is_a_link_is_refused(paths, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    paths.runtime.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DaemonFailed, match="must be a folder"):
        prepare(paths)


def test_a_folder_that_cannot_be_made_is_a_typed_error(paths):
    paths.library.write_text("in the way")
    with pytest.raises(DaemonFailed, match="library cannot be created"):
        prepare(paths)


def test_the_lock_is_held_once_and_names_its_holder(paths):
    prepare(paths)
    with locked(paths.lock), pytest.raises(AlreadyRunning, match=f"process {os.getpid()}"), locked(paths.lock):
        pass
    with locked(paths.lock):
        assert paths.lock.read_text() == f"{os.getpid()}\n"


def test_a_lock_that_cannot_be_opened_is_a_typed_error(paths):
    prepare(paths)
    paths.lock.mkdir()
    with pytest.raises(DaemonFailed, match="cannot be opened: Is a directory"), locked(paths.lock):
        pass


def test_of_a_traceback_only_its_last_line_is_told(paths):
    prepare(paths)
    fail = (sys.executable, "-c", "raise MemoryError('no room\\n\\n')")
    worker = CommandLauncher(paths, fail, fail).start_worker("worker-1", 0)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    assert worker.last_words() == f"MemoryError: no room (see {paths.logs / 'worker.log'})"
    worker.exit_code()
    worker.close()


def test_main_turns_errors_into_exit_codes(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("EBBFLOW_HOME", str(tmp_path / ("x" * 120)))
    assert main([]) == DaemonFailed.exit_code
    assert "EBBFLOW_HOME" in capsys.readouterr().err
    assert main(["--reserve", "?"]) == InvalidSize.exit_code


def test_it_does_not_start_where_strangers_could_come_in(monkeypatch, tmp_path_factory, capsys):
    home = tmp_path_factory.mktemp("m")
    monkeypatch.setenv("EBBFLOW_HOME", str(home))
    for _ in range(2):  # and leaves nothing behind that would keep the next one out
        assert main(["--listen", "tcp://0.0.0.0:5555"]) == InvalidConfig.exit_code
        assert "no key is allowed" in capsys.readouterr().err
    (home / "config.toml").write_text("idel_seconds = 5")
    assert main([]) == InvalidConfig.exit_code
    assert "'idel_seconds' cannot be set" in capsys.readouterr().err
    assert main(["--log-file", str(home / "no" / "log")]) == InvalidConfig.exit_code
    (home / "config.toml").unlink()
    assert main(["--log-file", str(home / "no" / "log")]) == DaemonFailed.exit_code
    assert "cannot be written: No such file" in capsys.readouterr().err


def test_the_real_commands_are_modules_of_ours():
    assert WORKER[1:] == ("-P", "-m", "ebbflow.daemon.worker")
    assert JOB[1:] == ("-P", "-m", "ebbflow.daemon.library.job")


def test_a_worker_is_told_how_much_memory_there_is(paths):
    prepare(paths)
    tell = (sys.executable, "-c", f"import os; print(os.environ[{SPARE_VARIABLE!r}])")
    worker = CommandLauncher(paths, tell, tell).start_worker("worker-1", 1_234)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    assert worker.exit_code() == 0
    assert (paths.logs / "worker.log").read_text() == "1234\n"
    worker.close()


def test_children_get_their_arguments_and_their_last_words_are_kept(paths):
    prepare(paths)
    tell = (sys.executable, "-c", "import sys; print('\\n'.join(sys.argv[1:])); sys.exit(7)")
    settings = WorkerSettings("i8", threads=2)
    launcher = CommandLauncher(paths, tell, tell, settings)
    (paths.logs / "worker.log").write_text("of an earlier one\n" * LOG_NBYTES)
    worker = launcher.start_worker("worker-1", 2_000_000_000)
    job = launcher.start_job("job-1", AddModel(id=3, source="/s", name="n"), 8_000_000_000)
    for process in (worker, job):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process.exit_code() == 7
        process.close()
        process.close()
    log = paths.logs / "worker.log"
    address, identity, *flags = log.read_text().splitlines()
    assert (address, identity, parse_settings(flags)) == (paths.children, "worker-1", settings)
    assert worker.last_words() == f"{flags[-1]} (see {log})"
    address, identity, library, cache, request = (paths.logs / "job.log").read_text().splitlines()
    assert (address, identity, library, cache) == (paths.children, "job-1", str(paths.library), str(paths.cache))
    assert '"source":"/s"' in request
    (paths.logs / "job.log").unlink()
    assert job.last_words() == ""
    assert (paths.logs / "worker.log.1").stat().st_size > LOG_NBYTES
