"""Requests to keep a prefix, from the asking to the answer; and renewals, for which nobody asks.

A pin is a sequence that is computed like any other (`scheduler`), kept when it is (`pins`), and answered at once or, if
it is saved, when its file is written. A pin that was computed when the model was worse than it is now is computed again
while there is nothing else to do.
"""

from __future__ import annotations

from typing import Final

from ...formats.errors import EbbflowError
from ...formats.messages import Failed, Pin, Pinned, failure
from ...formats.values import PinSummary
from .pins import PinJob, PinStore
from .scheduler import Scheduler
from .sequences import Sequence

RENEWAL_KEY: Final = -1  # of the one sequence that nobody asked for
RENEWAL_PRIORITY: Final = -1000

Answers = list[Pinned | Failed]


class PinRequests:
    """Those of one engine; what they keep is in `store`."""

    def __init__(self, store: PinStore, scheduler: Scheduler) -> None:
        self.store = store
        self._scheduler = scheduler
        self._jobs: dict[int, PinJob] = {}  # that are being computed, by the key of their sequences

    @property
    def keys(self) -> tuple[int, ...]:
        """Of all that are being computed."""
        return tuple(self._jobs)

    @property
    def saving(self) -> bool:
        """Whether any is being written, whose end `settle` will tell."""
        return self.store.saving

    def begin(self, request: Pin, tokens: list[int]) -> None:
        """Have a prefix computed. Raises `InvalidRequest`, and what `Scheduler.submit` raises."""
        job = self.store.begin(request.id, request.name, tokens, request.namespace, request.save)
        self.postpone()
        self._scheduler.submit(job.sequence)
        self._jobs[request.id] = job

    def computed(self, sequence: Sequence, band: int) -> Answers:
        """Keep what was computed, if it is one of these and all of it is; what to tell whom. `band` is the present."""
        if sequence.pending or sequence.key not in self._jobs:
            return []
        job, error = self._jobs.pop(sequence.key), None
        try:
            self.store.keep(job)
        except EbbflowError as found:
            error = found
        self._scheduler.finish(sequence)
        return [] if job.save and error is None else self._answer(job, error, band)

    def settle(self, band: int) -> Answers:
        """What has been written since, to tell whoever asked for it."""
        return [answer for job, error in self.store.settled() for answer in self._answer(job, error, band)]

    def end(self, key: int) -> bool:
        """Forget one that is being computed, if there is one of that key; whether somebody waits for its answer."""
        job = self._jobs.pop(key, None)
        if job is not None:
            self._scheduler.finish(job.sequence)
        return job is not None and job.asked

    def close(self, error: EbbflowError) -> Answers:
        """The model goes: those that were being written end with that error."""
        return [failure(job.sequence.key, error) for job in self.store.close() if job.asked]

    def unpin(self, name: str) -> None:
        """Let a pin go. Raises what `PinStore.remove` raises."""
        self.postpone()  # what would bring it back
        self.store.remove(name)

    def summaries(self, band: int) -> tuple[PinSummary, ...]:
        """The prefixes that are kept."""
        return self.store.summaries(band)

    def stale(self, band: int) -> bool:
        """Whether there is one to compute again, and none is being so."""
        return RENEWAL_KEY not in self._jobs and self.store.stale(band) is not None

    def renew(self, band: int) -> None:
        """Nothing is to do: compute a pin again that was computed when the model was worse than it is."""
        name = self.store.stale(band)
        if RENEWAL_KEY in self._jobs or name is None:
            return
        job = self.store.renew(name, band, RENEWAL_KEY, RENEWAL_PRIORITY)
        try:
            self._scheduler.submit(job.sequence)
        except EbbflowError:
            return  # it stays as good as it is
        self._jobs[RENEWAL_KEY] = job

    def postpone(self) -> None:
        """Somebody asks for something: what is computed again for nobody has time, and keeps what it has done."""
        job = self._jobs.pop(RENEWAL_KEY, None)
        if job is not None:
            self.store.postpone(job.name)
            self._scheduler.finish(job.sequence)

    def _answer(self, job: PinJob, error: EbbflowError | None, band: int) -> Answers:
        """To whoever asked, if anybody did."""
        if not job.asked:
            return []
        if error is not None:
            return [failure(job.sequence.key, error)]
        pin = next(pin for pin in self.summaries(band) if pin.name == job.name)
        return [Pinned(id=job.sequence.key, pin=pin)]
