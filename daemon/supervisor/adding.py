"""Adding and copying models: one job process at a time, the others in line. What a job does is in `daemon/library/job`.

Whatever becomes of the job, its request gets one terminal event. The library keeps nothing half added; what was half
copied serves as far as it goes (`daemon/library/carry`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, assert_never

import msgspec

from ...formats.child_messages import FromJob, FromWorker, LoadFailed, Ready, Report
from ...formats.errors import Cancelled, InvalidRequest, JobDied, ModelBusy, ModelExists, OutOfMemory
from ...formats.messages import (
    Added,
    AddModel,
    Chunk,
    ExportModel,
    Failed,
    Finished,
    ImportModel,
    JobRequest,
    Pinned,
    Pins,
    Progress,
    Resized,
    Started,
)
from ...formats.paths import check_name
from ...formats.units import format_seconds, format_size
from .children import LEAVE_SECONDS, Launcher, Ward, fresh_identity
from .library import Library
from .requests import OpenRequest, Requests

log = logging.getLogger(__name__)

WAITING: Final = "waiting"
WAITING_FOR_MEMORY: Final = "waiting for memory"
# Bytes. Importing torch takes 300 MB, and below that its libraries may abort without a word; the rest is for the model.
JOB_NBYTES: Final = 700_000_000

# Seconds, ascending.
LOOK_SECONDS: Final = 1.0  # between two looks for room
HOLD_LEAST_SECONDS: Final = 2.0  # a job that was stopped stays so
HOLD_MOST_SECONDS: Final = 300.0  # and then ends: what it holds is then worth more to others
WAIT_MOST_SECONDS: Final = 1800.0  # for room to begin


@dataclass
class _Job:
    request: OpenRequest
    message: JobRequest  # the client's, with our id
    ward: Ward
    cancelled: bool = False
    held_since: float | None = None


class Adding:
    """The queue of models to add, and the job that is adding one.

    `spare_nbytes` says what a job may take now, `most_nbytes` is what it could ever have here.
    """

    def __init__(
        self,
        launcher: Launcher,
        requests: Requests,
        library: Library,
        spare_nbytes: Callable[[], int],
        most_nbytes: int,
    ) -> None:
        self._launcher = launcher
        self._requests = requests
        self._library = library
        self._spare_nbytes = spare_nbytes
        self.most_nbytes = most_nbytes
        self._short_since: float | None = None  # since when the first in line waits for room
        self._looked_at = float("-inf")
        self._waiting: list[tuple[OpenRequest, JobRequest]] = []
        self._job: _Job | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The models being added, the present one first; a job that only has to go counts no more."""
        running = (self._job.message.name,) if self._job and self._requests.is_open(self._job.request) else ()
        return running + tuple(message.name for _, message in self._waiting)

    @property
    def ward(self) -> Ward | None:
        """The job's process, while there is one."""
        return self._job.ward if self._job else None

    @property
    def running(self) -> bool:
        """Whether a job that takes memory (a copy does not) is at work, or stopped in the middle of it."""
        job = self._job
        return job is not None and isinstance(job.message, AddModel) and not job.ward.ending

    def held_for(self, now: float) -> float:
        """For how many seconds the job has been stopped."""
        return now - self._job.held_since if self._job and self._job.held_since is not None else 0.0

    def hold(self, now: float) -> None:
        """Stop the job where it stands, because memory is short; it takes no more, and keeps what it has."""
        job = self._job
        if job is None or not self.running or job.held_since is not None:
            return
        if job.cancelled or not self._requests.is_open(job.request):
            return
        log.info("job %s stands still: memory is short", job.ward.process.pid)
        job.held_since = now
        job.ward.process.suspend()
        self._requests.answer(Progress(id=job.request.id, stage=WAITING_FOR_MEMORY))

    def go_on(self, now: float) -> None:
        """Let a job that was stopped go on; not at once, so that it does not stop and go in turns."""
        if self._job and self._job.held_since is not None and self.held_for(now) >= HOLD_LEAST_SECONDS:
            self._let_go(self._job)

    def check(self, message: JobRequest) -> None:
        """Raises `InvalidName`, `InvalidRequest`, `UnknownModel`, `ModelExists` or `ModelBusy` when it cannot be."""
        check_name(message.name)
        if message.name in self.names:
            raise ModelBusy(f"{message.name} is being added or copied already")
        if isinstance(message, ExportModel):
            self._library.get(message.name)
            if not Path(message.target).is_absolute():
                raise InvalidRequest(f"the folder to export to must be an absolute path, not {message.target!r}")
            return
        if not message.source:
            raise InvalidRequest("source must be a folder or a hub id, not empty")
        if isinstance(message, ImportModel) and not Path(message.source).is_absolute():
            raise InvalidRequest(f"the folder to import must be an absolute path, not {message.source!r}")
        if isinstance(message, AddModel) and message.masks_of is not None:
            self._library.get(message.masks_of)
        half = isinstance(message, ImportModel) and self._library.arriving(message.name)
        if self._library.exists(message.name) and not half:
            raise ModelExists(f"{message.name} is in the library; remove it first or choose another name")

    def add(self, request: OpenRequest, message: JobRequest, now: float) -> None:
        """Start a job, or put it in line. `check` was called."""
        self._waiting.append((request, msgspec.structs.replace(message, id=request.id)))
        if self._job:
            self._requests.answer(Progress(id=request.id, stage=WAITING))
        else:
            self._start_next(now)

    def cancel(self, request: OpenRequest, now: float) -> None:
        """Stop adding; the request, if still open, gets `Failed(cancelled)` when nothing is left of it."""
        if self._job and self._job.request is request:
            if not self._job.cancelled:
                self._job.cancelled = True
                self._job.ward.process.terminate()
                self._let_go(self._job)  # or it would not hear it
                self._job.ward.kill_at(now + LEAVE_SECONDS)
        else:
            self._waiting = [entry for entry in self._waiting if entry[0] is not request]
            self._short_since = None if not self._waiting else self._short_since
            self._requests.fail(request, Cancelled("cancelled before it began"))

    def stop(self, now: float) -> None:
        """Let nothing start any more and end what runs."""
        for request, _ in self._waiting:
            self._requests.fail(request, Cancelled("the daemon stops"))
        self._waiting.clear()
        if self._job:
            self.cancel(self._job.request, now)

    def hear(self, message: FromWorker | FromJob, now: float) -> None:
        """Take one message of the present job."""
        if self._job is None:
            return
        match message:
            case Ready():
                pass
            case Progress():
                if not self._job.cancelled:
                    self._requests.answer(self._ours(message))
            case Added():
                self._library.scan()
                self._end(self._ours(message), now)
            case Failed():
                if not self._job.cancelled:
                    self._end(self._ours(message), now)
            case Report() | LoadFailed() | Resized() | Started() | Chunk() | Finished() | Pinned() | Pins():
                log.warning("a job sent %s, which only workers send", type(message).__name__)
            case _:
                assert_never(message)

    def tick(self, now: float) -> None:
        """See to a job that has ended or was stopped for too long, and start the next."""
        if self._job and self.held_for(now) >= HOLD_MOST_SECONDS and self._requests.is_open(self._job.request):
            self._requests.fail(self._job.request, _held_too_long(self._job.message.name))
            self._job.ward.kill_at(now)
        if self._job and self._job.ward.gone(now):
            job, self._job = self._job, None
            self._library.discard(job.message.name, job.ward.process.pid)
            if job.cancelled:
                self._requests.fail(job.request, Cancelled(f"adding {job.message.name} was cancelled"))
            elif self._requests.is_open(job.request):
                log.warning("job %s %s", job.ward.process.pid, job.ward.describe_end())
                self._requests.fail(job.request, JobDied(f"the job {job.ward.describe_end()}"))
            self._start_next(now)
        elif self._short_since is not None and now - self._looked_at >= LOOK_SECONDS:
            self._start_next(now)

    def _start_next(self, now: float) -> None:
        while self._waiting and self._job is None:
            request, message = self._waiting[0]
            spare, identity = self._spare_nbytes(), fresh_identity("job")
            short = isinstance(message, AddModel) and spare < JOB_NBYTES
            if short and self._keeps_waiting(request, spare, now):
                return
            self._short_since = None
            del self._waiting[0]
            if short:
                self._requests.fail(request, _too_little(spare))
                continue
            try:
                process = self._launcher.start_job(identity, message, spare)
            except OSError as error:
                self._requests.fail(request, JobDied(f"the job could not be started: {error}"))
                continue
            log.info("job %s: %s %s", process.pid, type(message).__name__, message.name)
            self._job = _Job(request, message, Ward(process, identity, now))

    def _keeps_waiting(self, request: OpenRequest, spare: int, now: float) -> bool:
        """Whether there may be room one day; whoever waits for it is told how much there is."""
        since = self._short_since = now if self._short_since is None else self._short_since
        self._looked_at = now
        if self.most_nbytes < JOB_NBYTES or now - since >= WAIT_MOST_SECONDS:
            return False
        self._requests.answer(Progress(id=request.id, stage=WAITING_FOR_MEMORY, done=spare, total=JOB_NBYTES))
        return True

    def _let_go(self, job: _Job) -> None:
        if job.held_since is not None:
            job.held_since = None
            job.ward.process.go_on()

    def _ours(self, message: Progress | Added | Failed) -> Progress | Added | Failed:
        assert self._job
        return msgspec.structs.replace(message, id=self._job.request.id)

    def _end(self, event: Progress | Added | Failed, now: float) -> None:
        assert self._job
        self._requests.answer(event)
        self._job.ward.kill_at(now + LEAVE_SECONDS)


def _too_little(spare: int) -> OutOfMemory:
    return OutOfMemory(
        f"adding a model needs at least {format_size(JOB_NBYTES)} of memory, of which {format_size(spare)} can be "
        "spared now; end other programs, or make a model smaller (`ebb resize`)"
    )


def _held_too_long(name: str) -> OutOfMemory:
    return OutOfMemory(
        f"adding {name} stood still for {format_seconds(HOLD_MOST_SECONDS)} because memory was short; the same command "
        "goes on where it was, once other programs need less"
    )
