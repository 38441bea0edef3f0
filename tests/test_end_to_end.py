"""The real daemon, worker and job as processes, asked by real clients."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebbflow.client import Client, errors
from ebbflow.daemon.supervisor.silence import HUNG_SECONDS

from support.real_daemon import PATIENCE_SECONDS, RealDaemon, real_daemon, until
from support.stacks import write_signs_model
from support.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def daemon() -> Iterator[RealDaemon]:
    with real_daemon() as running:
        write_signs_model(running.paths.library / "signs", levels=12)
        yield running


@pytest.fixture
def client(daemon: RealDaemon) -> Iterator[Client]:
    with daemon.client() as connected:
        yield connected


def test_the_main_job(daemon: RealDaemon, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "tiny", "llama")
    added = daemon.ebb("add", str(source), "--levels", "3")
    assert added.stdout == "" or "tiny" in added.stdout
    assert [model["name"] for model in json.loads(daemon.ebb("list", "--json").stdout)] == ["signs", "tiny"]
    shown = json.loads(daemon.ebb("show", "tiny", "--json").stdout)
    assert len(shown["curve"]) >= 2
    first = daemon.ebb("run", "tiny", "hello", "--max-tokens", "8").stdout
    assert first == daemon.ebb("run", "tiny", "hello", "--max-tokens", "8").stdout
    resized = json.loads(daemon.ebb("resize", "tiny", "80%", "--json").stdout)
    assert resized["residency"]["nbytes"] <= 0.8 * resized["residency"]["total_nbytes"]
    assert "tiny" in daemon.ebb("ps").stdout
    daemon.ebb("rm", "tiny")
    assert daemon.ebb("show", "tiny", check=False).returncode == errors.UnknownModel.exit_code


def test_a_resize_under_streams_fails_none_and_a_later_request_equals_a_fresh_load(client: Client) -> None:
    client.resize("signs", "100%")
    with client.generate("signs", "warm", max_tokens=1) as stream:
        full = stream.text()
    texts: list[str] = []

    def ask() -> None:
        with client.generate("signs", "abc", max_tokens=60) as stream:
            texts.append(stream.text())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for percent in (90, 60, 80, 55, 100, 70):
        resized = client.resize("signs", f"{percent}%")
        assert resized.residency is not None
        assert resized.residency.nbytes <= resized.residency.total_nbytes * percent / 100
    for thread in threads:
        thread.join()
    assert len(texts) == 4
    client.resize("signs", "100%")
    with client.generate("signs", "warm", max_tokens=1) as stream:
        assert stream.text() == full


def test_kill_9_of_the_worker_ends_every_stream_and_the_next_request_works(daemon: RealDaemon) -> None:
    with daemon.client() as one, daemon.client() as two:
        streams = [c.generate("signs", "x", max_tokens=400) for c in (one, two, two)]
        for stream in streams:
            next(stream)
        killed = time.monotonic()
        os.kill(daemon.worker_pid(), signal.SIGKILL)
        for stream in streams:
            with pytest.raises(errors.WorkerDied):
                stream.text()
        assert time.monotonic() - killed < HUNG_SECONDS / 3  # seen to end, not waited for
        with two.generate("signs", "x", max_tokens=3) as stream:
            stream.text()
            assert stream.result.tokens == 3


def test_kill_9_of_a_job_leaves_the_library_as_it_was(daemon: RealDaemon, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "doomed", "llama")
    before = sorted(daemon.paths.library.iterdir())
    with daemon.client() as client:
        adding = client.add(source)
        next(adding)
        jobs: list[int] = []  # told of progress first, it may have to wait for memory before its process starts

        def started() -> bool:
            jobs[:] = [process.pid for process in client.status().processes if process.role == "job"]
            return bool(jobs)

        until(started)
        os.kill(jobs[0], signal.SIGKILL)
        with pytest.raises(errors.JobDied):
            adding.result()
        until(lambda: sorted(daemon.paths.library.iterdir()) == before)  # deleted behind the loop's back


def test_the_supervisor_is_small(daemon: RealDaemon, client: Client) -> None:
    memory = {process.role: process for process in client.status().processes}
    assert memory["supervisor"].private_nbytes < 30_000_000
    mapped = Path(f"/proc/{memory['supervisor'].pid}/maps").read_text()
    assert not any(name in mapped for name in ("numpy", "llvmlite", "libtorch"))


def test_errors_are_typed_and_short(daemon: RealDaemon, client: Client) -> None:
    with pytest.raises(errors.UnknownModel):
        client.generate("nobody", "x").text()
    with pytest.raises(errors.PromptTooLong):
        client.generate("signs", "x" * 600).text()
    with pytest.raises(errors.InvalidSize):
        client.resize("signs", "1kB")
    failed = daemon.ebb("add", "/nowhere/at/all", check=False)
    assert failed.returncode not in (0, 70)
    assert failed.stderr.startswith("ebb: ")


def test_a_second_daemon_refuses_and_sigterm_takes_the_children_along(tmp_path: Path) -> None:
    with real_daemon() as daemon:
        write_signs_model(daemon.paths.library / "signs")
        with daemon.client() as client:
            client.generate("signs", "x", max_tokens=1).text()
        second = daemon.ebb("serve", check=False)
        assert second.returncode == errors.AlreadyRunning.exit_code
        worker = daemon.worker_pid()
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(PATIENCE_SECONDS) == 0
        assert not Path(f"/proc/{worker}").exists()


def test_a_worker_gets_its_settings() -> None:
    with real_daemon("--kv=i8", "--exact", "--threads=1", "--kv-limit=1GB", "--kv-cached=0") as daemon:
        write_signs_model(daemon.paths.library / "signs")
        with daemon.client() as client:
            assert client.generate("signs", "x", max_tokens=3).text()
        given = Path(f"/proc/{daemon.worker_pid()}/cmdline").read_text().split("\0")[:-1]
        assert given[-5:] == ["--kv=i8", "--exact", "--threads=1", "--kv-limit=1000000000", "--kv-cached=0"]


def test_a_wrong_choice_of_instructions_is_said_to_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EBBFLOW_INSTRUCTIONS", "sse9")
    with real_daemon() as daemon:
        write_signs_model(daemon.paths.library / "signs")
        kernels = set((daemon.home / "cache").iterdir())
        asked = daemon.ebb("run", "signs", "x", check=False)
        assert asked.returncode == errors.WorkerDied.exit_code
        assert "EBBFLOW_INSTRUCTIONS is 'sse9'; this processor can run" in asked.stderr
        assert set((daemon.home / "cache").iterdir()) >= kernels
