"""The real daemon as a process, in a folder of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ebbflow.client import Client, Lease
from ebbflow.client.launch import answers
from ebbflow.formats.paths import Paths, home_paths

# Compiled once for all daemons of the suite; another checkout's kernels would push these out.
PATIENCE_SECONDS = 60  # for what is only slow on a busy machine; a test that waits so long has failed
KERNELS = Path(tempfile.gettempdir()) / f"ebbflow-test-kernels-{zlib.crc32(__file__.encode()):08x}"


def share_encoding_kernels(cache: Path) -> None:
    """Give a job's cache folder, which does not exist yet, the kernels that the suite's other jobs have compiled."""
    shared = KERNELS / "encoding"
    shared.mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True)
    (cache / "encoding").symlink_to(shared)


@dataclass
class RealDaemon:
    """A running supervisor and how to reach it."""

    home: Path
    process: subprocess.Popen[bytes]

    @property
    def paths(self) -> Paths:
        return home_paths(self.home)

    def client(self) -> Client:
        return Client(self.paths.clients, lease=Lease())

    def ebb(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command line as a user would."""
        command = [sys.executable, "-P", "-m", "ebbflow.client.cli.main", *arguments]
        environment = os.environ | {"EBBFLOW_HOME": str(self.home)}
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert not check or result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr, result.stderr
        return result

    def worker_pid(self) -> int:
        with self.client() as client:
            return next(process.pid for process in client.status().processes if process.role == "worker")

    def log(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.paths.logs.glob("*.log")))


@contextmanager
def real_daemon(*flags: str, prefix: tuple[str, ...] = ()) -> Iterator[RealDaemon]:
    """Start a supervisor with these flags (behind the command `prefix`, if any) and stop it at the end."""
    home = Path(tempfile.mkdtemp(prefix="ebb"))
    KERNELS.mkdir(exist_ok=True)
    (home / "cache").symlink_to(KERNELS)
    paths = home_paths(home)
    paths.logs.mkdir(parents=True)
    paths.library.mkdir()
    with (paths.logs / "daemon.log").open("ab") as log:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-P", "-m", "ebbflow.daemon.supervisor", *flags],
            env=os.environ | {"EBBFLOW_HOME": str(home)},
            stdout=log,
            stderr=log,
        )
    daemon = RealDaemon(home, process)
    try:
        with daemon.client() as client:
            while not answers(client):
                assert process.poll() is None, daemon.log()
        yield daemon
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE_SECONDS)
        finally:
            process.kill()
            shutil.rmtree(home, ignore_errors=True)


def until(condition: Callable[[], bool]) -> None:
    """Ask again and again until it is so, for questions that cost a round trip or a look at the disk."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
