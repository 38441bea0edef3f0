"""How far a job is, as `Progress` messages: at most ten a second, but every change of stage is told.

The clock is given, so that tests need no waiting. Who receives the messages is the job's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ...formats.messages import Progress

INTERVAL_SECONDS: Final = 0.1

Send = Callable[[Progress], None]
Clock = Callable[[], float]


class Reporter:
    """Counts bytes of source weights, `total` in all, through the stages of one job and says so."""

    def __init__(self, id: int, total: int, send: Send, clock: Clock) -> None:  # noqa: A002 - the wire's own word
        self._id, self._total, self._send, self._clock = id, total, send, clock
        self._stage, self._tensor, self._done, self._skipped = "", "", 0, 0
        self._begun = self._told = clock()

    def begin(self, stage: str) -> None:
        """Enter a stage of which nothing is done; its time is counted from now."""
        self._begun, self._done, self._skipped = self._clock(), 0, 0
        self.enter(stage)

    def enter(self, stage: str) -> None:
        """Change the stage's name only: stages that alternate share one count and one estimate of time."""
        self._stage, self._tensor = stage, ""
        self._tell()

    def fraction(self, done: int, total: int, tensor: str = "") -> None:
        """`done` of `total` (of whatever the stage counts) is through, last of it a piece of `tensor`."""
        self._done, self._tensor = self._total * done // max(total, 1), tensor
        self.tick()

    def skip(self, done: int, total: int) -> None:
        """`done` of `total` was through before the stage began, and says nothing about its speed."""
        self._done = self._skipped = self._total * done // max(total, 1)

    def tick(self) -> None:
        """Still alive; nothing more is done."""
        if self._clock() - self._told >= INTERVAL_SECONDS:
            self._tell()

    def _tell(self) -> None:
        self._told = self._clock()
        spent, rest, ours = self._told - self._begun, self._total - self._done, self._done - self._skipped
        self._send(
            Progress(
                id=self._id,
                stage=self._stage,
                tensor=self._tensor,
                done=self._done,
                total=self._total,
                eta_seconds=spent * rest / ours if ours > 0 else None,
            )
        )
