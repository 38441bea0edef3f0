"""The worker as a process: started, waited for, sent home, killed when it hangs, and how it ended.

What it is told and what it says is `worker`'s affair, and so is what becomes of the requests when it ends.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from .children import LEAVE_SECONDS, Launcher, Ward, fresh_identity
from .silence import Silence

log = logging.getLogger(__name__)

READY_SECONDS: Final = 120.0
COMPILING_SECONDS: Final = 1800.0  # instead, when it says that this time it takes longer
START_ATTEMPTS: Final = 3  # in a row without `Ready`; after that every new request gets one attempt

Phase = Literal["absent", "starting", "ready", "leaving"]


@dataclass(frozen=True)
class End:
    """How a worker ended: in the middle of what, and in words. `again`: another one may do better at once."""

    phase: Phase
    words: str
    out_of_memory: bool
    again: bool


class WorkerProcess:
    """At most one at a time. `oom_kills` is the kernel's counter of that name."""

    def __init__(self, launcher: Launcher, oom_kills: Callable[[], int]) -> None:
        self._launcher = launcher
        self._oom_kills = oom_kills
        self._phase: Phase = "absent"
        self._ward: Ward | None = None
        self._failed_starts = 0
        self._oom_kills_before = 0
        self._patience = READY_SECONDS
        self._silence = Silence()
        self._hung = False

    @property
    def phase(self) -> Phase:
        """Where in its life it is."""
        return self._phase

    @property
    def ward(self) -> Ward | None:
        """The process, while there is one."""
        return self._ward

    @property
    def at_work(self) -> bool:
        """Whether it is ready, and nobody has ended it yet."""
        return self._phase == "ready" and self._ward is not None and not self._ward.ending

    def start(self, now: float, spare_nbytes: int) -> None:
        """Begin one where there is none. Raises `OSError`."""
        identity = fresh_identity("worker")
        process = self._launcher.start_worker(identity, spare_nbytes)
        log.info("worker %s started", process.pid)
        self._ward = Ward(process, identity, now)
        self._patience = READY_SECONDS
        self._ward.kill_at(now + self._patience)
        self._phase = "starting"
        self._hung = False
        self._oom_kills_before = self._oom_kills()

    def heard(self, now: float) -> None:
        """It said something."""
        self._silence.broken(now)

    def compiles(self) -> None:
        """It said that it takes longer to get ready this time."""
        if self._phase == "starting" and self._ward:
            self._patience = COMPILING_SECONDS
            self._ward.spare()
            self._ward.kill_at(self._ward.started + self._patience)

    def get_ready(self) -> bool:
        """It said that it is; whether that was awaited."""
        if self._phase != "starting" or self._ward is None:
            return False
        self._ward.spare()
        self._phase = "ready"
        self._failed_starts = 0
        return True

    def leave(self, now: float) -> None:
        """It was told to; it is gone within `LEAVE_SECONDS`, one that is not ready yet at once."""
        if self._ward:
            self._ward.kill_at(now + LEAVE_SECONDS if self._phase == "ready" else now)
            self._phase = "leaving"

    def kill(self, now: float, why: str) -> None:
        """It cannot be helped."""
        if self._ward:
            log.warning("the worker %s %s; killing it", self._ward.process.pid, why)
            self._ward.kill_at(now)

    def kill_if_hung(self, now: float, *, owing: bool, loading: bool) -> None:
        """See whether it has been silent for too long, while it owes an answer or is loading a model."""
        if self._silence.too_long(now, owing=owing, loading=loading) and not self._hung:
            self._hung = True
            self.kill(now, "has said nothing for too long")

    def end(self, now: float) -> End | None:
        """How it ended, once, if it has; then there is none any more."""
        ward, phase = self._ward, self._phase
        if ward is None or not ward.gone(now):
            return None
        self._phase, self._ward = "absent", None
        end = ward.describe_end()
        log.log(logging.INFO if phase == "leaving" else logging.WARNING, "worker %s %s", ward.process.pid, end)
        late = phase == "starting" and now - ward.started >= self._patience
        killed = ward.process.exit_code() == -signal.SIGKILL and not (late or self._hung)  # and not by us
        out_of_memory = killed and self._oom_kills() > self._oom_kills_before and phase != "leaving"
        self._failed_starts += phase == "starting"
        again = phase != "starting" or (self._failed_starts < START_ATTEMPTS and not late)
        hint = f"it was not ready after {self._patience:.0f} s and " if late else ""
        hint = "it hung and " if self._hung else hint
        hint = "the kernel killed it, for memory, and " if out_of_memory else hint
        return End(phase, f"{hint}{end}", out_of_memory, again)
