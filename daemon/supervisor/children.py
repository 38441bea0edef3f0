"""Child processes: starting a worker or a job, and seeing each of them to its end.

What children say is heard in `worker` and `adding`. Children get no terminal signals (a session of their own), so that
Ctrl-C reaches only the supervisor, which then lets them go in order; that they die with it when it is killed, they ask
of the kernel themselves (`daemon/process`).
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Protocol

import msgspec

from ...formats.messages import JobRequest
from ...formats.paths import Paths
from ..process import MEMORY_VARIABLE, PARENT_VARIABLE, SPARE_VARIABLE
from ..settings import DEFAULTS, WorkerSettings

LEAVE_SECONDS: Final = 5.0  # between being asked to leave and being killed
LAST_WORDS_SECONDS: Final = 0.1  # what a child sent just before its end may still be on its way
LOG_NBYTES: Final = 1_000_000  # a log larger than this is set aside when the next child starts
TAIL_NBYTES: Final = 2_000

WORKER: Final = (sys.executable, "-P", "-m", "ebbflow.daemon.worker")
JOB: Final = (sys.executable, "-P", "-m", "ebbflow.daemon.library.job")


class Process(Protocol):
    """A child process as the operating system knows it; the seam where tests put fakes."""

    pid: int

    @property
    def descriptor(self) -> int | None:
        """Becomes readable when the process ends, where the system has such a thing."""
        ...

    def exit_code(self) -> int | None:
        """The exit code (minus the signal that killed it), or nothing while it runs."""
        ...

    def terminate(self) -> None:
        """Ask it to end."""
        ...

    def kill(self) -> None:
        """End it."""
        ...

    def suspend(self) -> None:
        """Have it stand still; it can be killed all the same."""
        ...

    def go_on(self) -> None:
        """End `suspend`."""
        ...

    def last_words(self) -> str:
        """The last line that it wrote to its log, and where that is; nothing when that cannot be read."""
        ...

    def close(self) -> None:
        """Release the descriptor; the process has ended."""
        ...


class Launcher(Protocol):
    """Starts children. `identity` is the name under which they connect. Raises `OSError`."""

    def start_worker(self, identity: str, spare_nbytes: int) -> Process:
        """A process that will say `Ready`; there is so much memory to spare, which decides how it compiles."""
        ...

    def start_job(self, identity: str, request: JobRequest, memory_nbytes: int) -> Process:
        """A process that adds or copies one model and ends; it fails by itself beyond so much memory."""
        ...


@dataclass(frozen=True)
class CommandLauncher:
    """Starts the real commands; others can be given, to test what happens around them."""

    paths: Paths
    worker: tuple[str, ...] = WORKER
    job: tuple[str, ...] = JOB
    settings: WorkerSettings = DEFAULTS

    def start_worker(self, identity: str, spare_nbytes: int) -> Process:
        """A process that will say `Ready`; there is so much memory to spare, which decides how it compiles."""
        command = [*self.worker, self.paths.children, identity, *self.settings.flags()]
        return _Subprocess(command, self.paths.logs / "worker.log", {SPARE_VARIABLE: str(spare_nbytes)})

    def start_job(self, identity: str, request: JobRequest, memory_nbytes: int) -> Process:
        """A process that adds or copies one model and ends; it fails by itself beyond so much memory."""
        places = [str(self.paths.library), str(self.paths.cache), msgspec.json.encode(request).decode()]
        command = [*self.job, self.paths.children, identity, *places]
        return _Subprocess(command, self.paths.logs / "job.log", {MEMORY_VARIABLE: str(memory_nbytes)})


class _Subprocess:
    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str] = MappingProxyType({})) -> None:
        self._log = log
        if log.exists() and log.stat().st_size > LOG_NBYTES:
            log.replace(log.with_suffix(".log.1"))
        with log.open("ab") as output:
            self._log_start = output.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, PARENT_VARIABLE: str(os.getpid()), **environment},
            )
        self.pid = self._process.pid
        self._descriptor = _pidfd(self.pid)

    @property
    def descriptor(self) -> int | None:
        return self._descriptor

    def exit_code(self) -> int | None:
        return self._process.poll()

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def suspend(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def last_words(self) -> str:
        try:
            with self._log.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(self._log_start, end - TAIL_NBYTES))
                text = file.read().decode(errors="replace")
        except OSError:  # somebody tidied up
            return ""
        lines = text.split("\n")
        return next((f"{line.strip()} (see {self._log})" for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _pidfd(pid: int) -> int | None:
    if sys.platform != "linux":
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:  # without one, its end is noticed at the loop's next tick instead of at once
        return None


class Ward:
    """One child in our care, from its start until its end is known and its last words are heard."""

    def __init__(self, process: Process, identity: str, now: float) -> None:
        self.process = process
        self.identity = identity.encode()
        self.started = now
        self._kill_at = float("inf")
        self._ended: float | None = None

    @property
    def descriptor(self) -> int | None:
        """What to wake up for; nothing once the end was seen."""
        return self.process.descriptor if self._ended is None else None

    @property
    def ending(self) -> bool:
        """Whether the process has ended and only its last words are waited for."""
        return self._ended is not None

    def kill_at(self, when: float) -> None:
        """Kill the process at that time, or at an earlier one set before."""
        self._kill_at = min(self._kill_at, when)

    def spare(self) -> None:
        """Kill it no more."""
        self._kill_at = float("inf")

    def gone(self, now: float) -> bool:
        """Whether everything is over; kills the process if its time is up."""
        if self._ended is None:
            if self.process.exit_code() is None:
                if now >= self._kill_at:
                    self.process.kill()
                return False
            self._ended = now
        if now - self._ended < LAST_WORDS_SECONDS:
            return False
        self.process.close()
        return True

    def describe_end(self) -> str:
        """`ended with exit code 3`, `was killed by signal 9`; what it wrote last."""
        code = self.process.exit_code() or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        words = self.process.last_words()
        return f"{how}: {words}" if words else how


def fresh_identity(role: str) -> str:
    """A name that no child had before, so that a dead one's late messages are told apart."""
    return f"{role}-{secrets.token_hex(8)}"
