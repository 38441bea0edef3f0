"""The supervisor's side of its worker: started on first need, fed, heard, sent home when idle, replaced when dead.

What a worker does is in `daemon/worker`, how it lives and dies as a process in `worker_process`. Here is what holds
whatever it does: every request that was given to it ends, also when it crashes, hangs at its start or is killed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, assert_never

import msgspec

from ...formats.child_messages import (
    Exit,
    FromJob,
    FromWorker,
    LimitKv,
    LoadFailed,
    LoadModel,
    Ready,
    Report,
    SetTarget,
    Trim,
    UnloadModel,
)
from ...formats.errors import Cancelled, DeadlineExceeded, EbbflowError, OutOfMemory, WorkerDied, from_wire
from ...formats.manifest import Manifest
from ...formats.messages import (
    Added,
    Cancel,
    Chunk,
    Failed,
    Finished,
    Generate,
    ListPins,
    Pin,
    Pinned,
    Pins,
    Progress,
    Resize,
    Resized,
    Started,
    Unpin,
)
from ...formats.units import format_seconds, format_size
from ...formats.values import Residency
from ...formats.wire import Message
from .books import Common, Holding
from .budget import Budget
from .caches import Caches
from .children import Launcher, Ward
from .kept import Word
from .library import Library
from .loaded import Loaded
from .reading import Reading
from .requests import OpenRequest, Requests
from .terms import Terms
from .worker_process import End, Phase, WorkerProcess

log = logging.getLogger(__name__)

RESTARTING: Final = "the worker died; going on in a new one"
RUNTIME_NBYTES: Final = 110_000_000  # what a worker holds before it loads anything
WAITING_FOR_MEMORY: Final = "waiting for memory to go on"
ROOM_LOOK_SECONDS: Final = 1.0  # between two looks whether there is some
DEADLINE_LOOK_SECONDS: Final = 0.1  # between two looks whether one has passed
LATE_SECONDS: Final = 3.0  # after a deadline, by which the worker that knows of it must have said so

Served = Generate | Pin | Unpin | ListPins | Resize


class Worker:
    """At most one worker process, and everything that waits for it.

    `send` brings a message to a child, `read` reads the sensor, `oom_kills` the kernel's counter of that name.
    """

    def __init__(
        self,
        launcher: Launcher,
        send: Callable[[bytes, Message], None],
        requests: Requests,
        library: Library,
        budget: Budget,
        read: Callable[[], Reading],
        oom_kills: Callable[[], int],
        idle_seconds: float,
    ) -> None:
        self._process = WorkerProcess(launcher, oom_kills)
        self._send = send
        self._requests = requests
        self._library = library
        self._budget = budget
        self._read = read
        self.idle_seconds = idle_seconds
        self._loaded = Loaded()
        self._busy_at = 0.0
        self._caches = Caches()
        self._deadlines_seen = float("-inf")
        self.runtime_nbytes = 0  # what the worker held before it loaded anything
        self._stage = ""  # what a worker that is not ready yet is at, if that takes long
        self._resumed_at = float("-inf")  # when answers that wait for memory were tried last

    @property
    def phase(self) -> Phase:
        """Where in its life the worker is."""
        return self._process.phase

    @property
    def ward(self) -> Ward | None:
        """The process, while there is one."""
        return self._process.ward

    # -- what clients want ------------------------------------------------------------------------------------------

    def serve(self, request: OpenRequest, now: float) -> None:
        """Have a request answered, by a worker started for it if need be. `check_room` was called."""
        self._budget.demand.use(request.model, now)
        if self.phase == "absent":
            self._start(now)
        elif self.phase == "starting" and self._stage:
            self._requests.answer(Progress(id=request.id, stage=self._stage))
        if self.phase == "ready":
            self._forward(request, now)

    def check_room(self, model: str, now: float, *, needs_more: bool) -> None:
        """Raises `OutOfMemory` when memory is too short for the model, or for a request that `needs_more` of it."""
        if model in self._loaded:
            refusal = self._budget.refusal() if needs_more else None
            if refusal:
                raise refusal
        else:
            manifest, reading = self._library.get(model), self._read()
            needed = manifest.base_nbytes + (0 if self.phase == "ready" else RUNTIME_NBYTES)
            reading = replace(reading, available=reading.available + self._caches.left(now))
            self._budget.make_room(model, needed, reading, self.idle(), _common(manifest))

    def resize(self, request: OpenRequest, message: Resize, terms: Terms) -> None:
        """Change a model's terms (which were checked); answered by the worker if it holds the model, else here."""
        self._budget.set_terms(message.model, terms)
        target = self._budget.target(message.model)
        if target is None:
            self._requests.answer(Resized(id=request.id))
        else:
            request.forwarded = True
            self._say(SetTarget(model=message.model, target_nbytes=target, id=request.id))

    def cancel(self, request: OpenRequest) -> None:
        """End a request; it gets its terminal event from here, or from the worker that knows of it."""
        if request.forwarded:
            request.cancelled = True
            self._say(Cancel(id=request.id))
        else:
            self._requests.fail(request, Cancelled("cancelled before it began"))

    def unload(self, model: str) -> None:
        """Have a model forgotten."""
        if model in self._loaded:
            self._say(UnloadModel(model=model))
        self._loaded.remove(model)
        self._budget.forget(model)

    def residencies(self) -> tuple[Residency, ...]:
        """What the worker last reported, with the wish and the reason that it does not know."""
        return tuple(self._explain(residency) for residency in self._loaded.residencies)

    def damage(self, model: str) -> str:
        """What the worker found to be wrong with a model, if it is loaded and something is."""
        residency = self._loaded.get(model)
        return residency.damage if residency else ""

    # -- what the worker says ---------------------------------------------------------------------------------------

    def hear(self, message: FromWorker | FromJob, now: float) -> None:
        """Take one message of the present worker."""
        self._process.heard(now)
        match message:
            case Ready():
                self.runtime_nbytes = message.private_nbytes
                self._become_ready(now)
            case Report():
                self._loaded.note(message.models)
                self._caches.note(message.models)
            case LoadFailed():
                self._give_up(message)
            case Resized():
                if message.residency:
                    self._loaded.note((message.residency,))
                    message = msgspec.structs.replace(message, residency=self._explain(message.residency))
                self._requests.answer(message)
            case Started() | Chunk() | Finished() | Failed():
                self._pass_on(message, now)
            case Pinned() | Pins():
                self._requests.answer(message)
            case Progress():
                self._stage = message.stage
                self._process.compiles()
                self._tell_all_that_wait(self._stage)
            case Added():
                log.warning("the worker sent %s, which only jobs send", type(message).__name__)
            case _:
                assert_never(message)

    def unreachable(self, now: float) -> None:
        """It does not read what we send: it cannot be helped."""
        self._process.kill(now, "does not read its messages")

    # -- time -------------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """See to whatever is due."""
        self._end_late(now)
        end = self._process.end(now)
        if end:
            self._bury(end, now)
        elif self._process.at_work:
            owing = any(request.forwarded for request in self._served())
            self._process.kill_if_hung(now, owing=owing, loading=self._loaded.loading)
            self._resume_waiting(now)
            self._go_home_if_idle(now)

    def stop(self, now: float) -> None:
        """Send the worker home for good; it is gone within `LEAVE_SECONDS`. Its requests are closed already."""
        if self.phase in ("ready", "starting"):
            self._leave(now)

    def _pass_on(self, word: Word, now: float) -> None:
        """Bring a worker's word about a generation to its client, without what is ours alone."""
        request = self._requests.get(word.id)
        passed = request.kept.hear(word, now) if request and request.kept else word
        if isinstance(passed, Chunk):
            passed = msgspec.structs.replace(passed, ids=())
        if passed:
            self._requests.answer(passed)

    def _end_late(self, now: float) -> None:
        """Deadlines of what no worker knows of, or that the worker is late with: it may read a model, or hang."""
        if now - self._deadlines_seen >= DEADLINE_LOOK_SECONDS:
            self._deadlines_seen = now
            for request in self._served():
                if request.left(now) <= (-LATE_SECONDS if request.forwarded else 0.0):
                    self._requests.fail(request, _late(request, now))
                    if request.forwarded:
                        self._say(Cancel(id=request.id))

    def _tell_all_that_wait(self, stage: str) -> None:
        for request in self._served():
            if not isinstance(request.message, Resize):
                self._requests.answer(Progress(id=request.id, stage=stage))

    # -- birth and death --------------------------------------------------------------------------------------------

    def _start(self, now: float) -> None:
        try:
            self._process.start(now, self._budget.spare(self._read()))
            self._stage = ""
        except OSError as error:
            self._fail_all(WorkerDied(f"the worker could not be started: {error}"))

    def _become_ready(self, now: float) -> None:
        if self._process.get_ready():
            self._busy_at = now
            self._resumed_at = now
            for request in self._served():
                self._forward(request, now)

    def _leave(self, now: float) -> None:
        self._say(Exit())
        self._process.leave(now)
        self._forget_models(now, out_of_memory=False)

    def _bury(self, end: End, now: float) -> None:
        self._forget_models(now, end.out_of_memory)
        error = WorkerDied(f"the worker is gone: {end.words}")
        if end.phase == "ready":
            self._part(error, now)
        if not end.again:
            self._fail_all(error)
        elif self._served():
            self._start(now)

    def _part(self, error: EbbflowError, now: float) -> None:
        """A worker died at work: what asked to be resumed goes on in the next one, all else ends."""
        for request in self._served():
            if request.cancelled:
                self._requests.fail(request, Cancelled("cancelled while its worker died"))
            elif request.kept and request.kept.may_resume:
                request.kept.resume(now)
                request.forwarded = False
                self._requests.answer(Progress(id=request.id, stage=RESTARTING))
            else:
                self._requests.fail(request, error)

    def _forget_models(self, now: float, out_of_memory: bool) -> None:
        self._loaded.clear()
        self._caches = Caches()
        self._budget.worker_gone(now, out_of_memory)

    def _served(self) -> list[OpenRequest]:
        """Every request that is this worker's to answer."""
        return [request for request in self._requests if isinstance(request.message, Served)]

    def _fail_all(self, error: EbbflowError) -> None:
        for request in self._served():
            self._requests.fail(request, error)

    # -- feeding ----------------------------------------------------------------------------------------------------

    def _say(self, message: Message) -> None:
        if self.ward and self.phase == "ready":
            self._send(self.ward.identity, message)

    def _forward(self, request: OpenRequest, now: float) -> None:
        message = msgspec.structs.replace(request.message, id=request.id)
        if isinstance(message, Generate):
            left = request.left(now)
            if left <= 0:
                self._requests.fail(request, _late(request, now))
                return
            seconds = left if math.isfinite(left) else 0.0
            message = msgspec.structs.replace(message, owner=request.owner, deadline_seconds=seconds)
        try:
            self._load(request.model, now)
            if request.kept and isinstance(message, Generate):
                self._say(request.kept.message(message))
            else:
                self._say(message)
            request.forwarded = True
        except EbbflowError as error:
            kept = request.kept
            if not (isinstance(error, OutOfMemory) and kept and kept.may_wait(now)):
                self._requests.fail(request, error)
            elif not kept.waits:
                kept.waits = True
                self._requests.answer(Progress(id=request.id, stage=WAITING_FOR_MEMORY))

    def _resume_waiting(self, now: float) -> None:
        """Answers that outlived their worker, and for whose model there was no room since."""
        if now - self._resumed_at >= ROOM_LOOK_SECONDS:
            self._resumed_at = now
            for request in self._served():
                if not request.forwarded:
                    self._forward(request, now)

    def _load(self, model: str, now: float) -> None:
        if model in self._loaded:
            return
        manifest, reading = self._library.get(model), self._read()
        base, common = manifest.base_nbytes, _common(manifest)
        missing = min(base - self._budget.there(common) - self._budget.spare(reading), self._caches.left(now))
        if missing > 0:  # what is kept for later goes before models do, and before this one is refused
            self.trim(now, missing)
            reading = replace(reading, available=reading.available + missing)
        for victim in self._budget.make_room(model, base, reading, self.idle(), common):
            reading = replace(reading, available=reading.available + self.evict(victim))
        targets = self._budget.load(model, base, manifest.nbytes, reading, manifest.curve, common)
        self.tell(targets, but=model)
        folder = str(self._library.folder(model))
        spare = self._budget.spare(reading)
        self._say(LoadModel(model=model, folder=folder, target_nbytes=targets[model], pins_nbytes=spare))
        self._loaded.add(model)

    def _give_up(self, message: LoadFailed) -> None:
        self._loaded.remove(message.model)
        self._budget.unload(message.model)
        for request in self._served():
            if request.model == message.model:
                self._requests.fail(request, from_wire(message.code, message.message))

    def _explain(self, residency: Residency) -> Residency:
        if self._budget.target(residency.model) is None:
            return residency
        terms, reason = self._budget.demand.of(residency.model), self._budget.reason(residency.model)
        if residency.arrived_nbytes is not None:
            reason = f"{residency.arrived_nbytes / residency.total_nbytes:.0%} of it has arrived; {reason}"
        if residency.damaged_at_nbytes is not None:
            damage = f"damaged beyond {format_size(residency.damaged_at_nbytes)}: add or import it again"
            reason = damage if residency.nbytes >= residency.damaged_at_nbytes else f"{reason}; {damage}"
        return msgspec.structs.replace(
            residency,
            wish=terms.size,
            reason=reason,
            floor_nbytes=terms.floor,
            cap_nbytes=terms.cap,
            priority=terms.priority,
        )

    # -- memory and idleness ----------------------------------------------------------------------------------------

    @property
    def holds_models(self) -> bool:
        """Whether there is anything to follow memory with."""
        return self.phase == "ready" and len(self._loaded) > 0

    def cache_nbytes(self, now: float) -> int:
        """Bytes that the worker could give back without making anything worse, less those it was just asked for."""
        return self._caches.left(now)

    def kv_nbytes(self) -> list[int]:
        """Keys and values of each model that has any, as last reported."""
        return self._loaded.kv_nbytes

    def holdings(self) -> dict[str, Holding]:
        """What the worker last reported of each model."""
        return self._loaded.holdings

    def idle(self) -> set[str]:
        """Loaded models that nobody waits for."""
        return self._loaded.names - {request.model for request in self._served()}

    def tell(self, targets: Mapping[str, int], but: str = "") -> None:
        """Have edges moved."""
        for model, target in targets.items():
            if model != but:
                self._say(SetTarget(model=model, target_nbytes=target))

    def trim(self, now: float, nbytes: int) -> None:
        """Have what is kept for later given back, of keys and values `nbytes`, unless that was asked just now."""
        if self._caches.ask(now, nbytes):
            self._say(Trim(nbytes=nbytes))

    def limit_kv(self, nbytes: int) -> None:
        """Have at most so many bytes of keys and values held for each model; 0 ends it."""
        log.info("keys and values: %s", f"at most {nbytes} bytes for each model" if nbytes else "as usual again")
        self._say(LimitKv(nbytes=nbytes))

    def evict(self, model: str) -> int:
        """Unload a model that nobody waits for; its bytes that are free when the worker has heard it."""
        log.info("unloading %s: its memory is wanted elsewhere", model)
        self._loaded.remove(model)
        self._say(UnloadModel(model=model))
        return self._budget.unload(model)

    def _go_home_if_idle(self, now: float) -> None:
        if self._served():
            self._busy_at = now
        elif now - self._busy_at >= self.idle_seconds or (self._useless and not len(self._loaded)):
            self._leave(now)

    @property
    def _useless(self) -> bool:
        """Whether a worker without models only takes memory that somebody wants."""
        return self._budget.paused or self._budget.short


def _common(manifest: Manifest) -> Common:
    return Common(manifest.architecture, manifest.masks, manifest.base_masks_nbytes)


def _late(request: OpenRequest, now: float) -> DeadlineExceeded:
    waited = format_seconds(now - request.opened)
    why = "and its worker did not say so" if request.forwarded else "before a worker could begin"
    return DeadlineExceeded(f"the deadline passed after {waited}, {why}; try again, or allow more")
