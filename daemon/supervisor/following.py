"""Following the memory there is: reads the sensor when it is due, and hands on what the budget says.

How large what shall be is decided in `budget`; how the worker and the job are told, in `worker` and `adding`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from .adding import Adding
from .budget import Budget
from .reading import Reading
from .worker import Worker

JOB_FIRST_SECONDS: Final = 1.0  # a job stands still for so long before an idle model goes because of it


class Following:
    """The sensor rests while there is nothing that could be given back or stopped."""

    def __init__(self, budget: Budget, read: Callable[[], Reading], worker: Worker, adding: Adding) -> None:
        self._budget, self._read = budget, read
        self._worker, self._adding = worker, adding
        self._due = float("-inf")

    def tick(self, now: float) -> None:
        """Look, if it is time, and act on what is seen."""
        if not self._active or now < self._due:
            return
        targets = self._budget.update(now, self._read(), self._worker.holdings(), self._worker.cache_nbytes(now))
        if self._budget.missing:
            self._worker.trim(now, self._budget.missing)
        self._worker.tell(targets)
        self._restrain_job(now)
        if not self._job_goes_first(now):
            self._evict()
            self._squeeze(now)
        self._due = now + self._budget.look_seconds()

    def wait_seconds(self, now: float) -> float | None:
        """Until the next look; nothing while there is none to come."""
        return max(0.001, self._due - now) if self._active else None

    @property
    def _active(self) -> bool:
        return self._worker.holds_models or self._adding.running

    def _restrain_job(self, now: float) -> None:
        if self._budget.strangled:
            self._adding.hold(now)
        elif self._budget.eased:
            self._adding.go_on(now)

    def _job_goes_first(self, now: float) -> bool:
        """Whether it has to stand still, or has only just begun to, before anything else is taken."""
        return self._adding.running and self._adding.held_for(now) < JOB_FIRST_SECONDS and not self._budget.paused

    def _evict(self) -> None:
        victim = self._budget.evict(self._worker.idle())
        if victim is not None:
            self._worker.evict(victim)

    def _squeeze(self, now: float) -> None:
        room, last_resort = self._budget.outlook.room, self._budget.last_resort(self._worker.idle())
        limit = self._budget.squeeze.update(now, room, self._worker.kv_nbytes(), last_resort)
        if limit is not None:
            self._worker.limit_kv(limit)
