from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ebbflow.client import Client, ensure_daemon, errors
from ebbflow.client.launch import LOG_NBYTES

from support.fake_daemon import FakeDaemon

# What a daemon does as far as its starter can tell: take the lock or say that it is taken, then answer.
DAEMON = """
import fcntl, os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from ebbflow.formats.messages import Status
from support.fake_daemon import FakeDaemon
run = Path(os.environ["EBBFLOW_HOME"]) / "run"
run.mkdir(exist_ok=True)
lock = (run / "daemon.lock").open("w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(73)
def status(request):
    yield Status(
        id=request.id, version="0", pid=os.getpid(), uptime_seconds=0, available_nbytes=0, available_source="",
        reserve_nbytes=0,
    )
daemon = FakeDaemon(f"ipc://{{run}}/ebbflow.sock", status)
with daemon:
    daemon.wait_until_stopped()
"""


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ebb") as folder:  # pytest's own folders may be too long for a socket
        monkeypatch.setenv("EBBFLOW_HOME", folder)
        yield Path(folder)


def command() -> list[str]:
    return [sys.executable, "-c", DAEMON.format(tests=str(Path(__file__).parents[1]))]


def fails(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_daemon_that_answers_is_left_alone(home: Path):
    (home / "run").mkdir()
    with FakeDaemon(f"ipc://{home}/run/ebbflow.sock"):
        assert not ensure_daemon(command=["/does/not/exist"])
    assert not (home / "logs").exists()


def test_one_is_started_and_any_number_of_clients_at_once_succeed(home: Path):
    with ThreadPoolExecutor(3) as pool:
        started = list(pool.map(lambda _: ensure_daemon(command=command()), range(3)))
    assert started.count(True) == 1
    with Client() as client:
        client.ping()
        client.shutdown()
        with pytest.raises(errors.NotRunning):
            client.ping()


def test_one_that_fails_is_an_error_with_its_last_words(home: Path):
    with pytest.raises(errors.DaemonFailed, match=r"(?s)code 3 .*daemon\.log ends with:\n    line 5\n.*    line 14$"):
        ensure_daemon(command=fails("for i in range(15): print('line', i)\nraise SystemExit(3)"))
    with pytest.raises(errors.DaemonFailed, match="says nothing"):  # the earlier one's words are not this one's
        ensure_daemon(command=fails("raise SystemExit(3)"))


def test_a_large_log_is_set_aside(home: Path):
    (home / "logs").mkdir()
    (home / "logs" / "daemon.log").write_bytes(b"x" * (LOG_NBYTES + 1))
    with pytest.raises(errors.DaemonFailed, match="says nothing"):
        ensure_daemon(command=fails("raise SystemExit(3)"))
    assert (home / "logs" / "daemon.log").stat().st_size == 0
    assert (home / "logs" / "daemon.log.1").stat().st_size == LOG_NBYTES + 1


def test_one_that_never_answers_is_not_waited_for_for_ever(home: Path):
    with pytest.raises(errors.DaemonFailed, match="has not answered within"):
        ensure_daemon(seconds=0.2, command=fails("import time; time.sleep(0.5)"))


def test_a_command_that_cannot_be_run(home: Path):
    with pytest.raises(errors.DaemonFailed, match="cannot be started"):
        ensure_daemon(command=["/does/not/exist"])


@pytest.mark.parametrize(
    ("setting", "variable", "where"),
    [
        ("", "", "logs/daemon.log"),
        ('log_file = "mine.log"', "", "mine.log"),
        ('log_file = "mine.log"', "here.log", "stood/here.log"),
        ("", "~/here.log", "here.log"),
    ],
)
def test_a_daemon_in_the_background_logs_where_its_settings_say(home, monkeypatch, setting, variable, where):
    (home / "stood").mkdir()
    monkeypatch.chdir(home / "stood")
    monkeypatch.setenv("EBBFLOW_LOG_FILE", variable)
    monkeypatch.setenv("HOME", str(home))
    (home / "config.toml").write_text(setting)
    assert ensure_daemon()
    with Client() as client:
        client.shutdown()
    logs = [path for path in home.rglob("*.log") if "serving on" in path.read_text()]
    assert logs == [home / where]


def test_the_usual_log_is_rotated_by_the_daemon(home, monkeypatch):
    monkeypatch.setenv("EBBFLOW_LOG_LEVEL", "info")
    (home / "logs").mkdir()
    log = home / "logs" / "daemon.log"
    log.write_bytes(b"x" * (LOG_NBYTES - 1))  # too little for whoever starts it
    assert ensure_daemon()
    with Client() as client:
        client.shutdown()
    assert "serving on" in log.read_text()
    assert (home / "logs" / "daemon.log.1").stat().st_size == LOG_NBYTES - 1
