"""The supervisor's side of its worker: started on first need, fed, watched, sent home when idle, mourned when dead.

What a worker does is in `daemon/worker`. Here is only what holds whatever it does: every request that was given to it
ends, also when it crashes, hangs at its start or is killed.
"""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, Literal, assert_never

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
from .budget import Budget, Holding
from .caches import Caches
from .children import LEAVE_SECONDS, Launcher, Ward, fresh_identity
from .kept import Word
from .library import Library
from .reading import Reading
from .requests import OpenRequest, Requests
from .silence import Silence
from .terms import Terms

log = logging.getLogger(__name__)

READY_SECONDS: Final = 120.0
COMPILING_SECONDS: Final = 1800.0  # instead, when it says that this time it takes longer
START_ATTEMPTS: Final = 3  # in a row without `Ready`; after that every new request gets one attempt
RESTARTING: Final = "the worker died; going on in a new one"
RUNTIME_NBYTES: Final = 110_000_000  # what a worker holds before it loads anything
WAITING_FOR_MEMORY: Final = "waiting for memory to go on"
ROOM_LOOK_SECONDS: Final = 1.0  # between two looks whether there is some
DEADLINE_LOOK_SECONDS: Final = 0.1  # between two looks whether one has passed
LATE_SECONDS: Final = 3.0  # after a deadline, by which the worker that knows of it must have said so

Phase = Literal["absent", "starting", "ready", "leaving"]
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
        self._launcher = launcher
        self._send = send
        self._requests = requests
        self._library = library
        self._budget = budget
        self._read = read
        self._oom_kills = oom_kills
        self.idle_seconds = idle_seconds
        self._phase: Phase = "absent"
        self._ward: Ward | None = None
        self._loaded: dict[str, Residency | None] = {}  # models it was told to load, as it last reported them
        self._failed_starts = 0
        self._oom_kills_before = 0
        self._busy_at = 0.0
        self._caches = Caches()
        self._deadlines_seen = float("-inf")
        self.runtime_nbytes = 0  # what the worker held before it loaded anything
        self._silence = Silence()
        self._hung = False
        self._patience = READY_SECONDS
        self._stage = ""  # what a worker that is not ready yet is at, if that takes long
        self._resumed_at = float("-inf")  # when answers that wait for memory were tried last

    @property
    def phase(self) -> Phase:
        """Where in its life the worker is."""
        return self._phase

    @property
    def ward(self) -> Ward | None:
        """The process, while there is one."""
        return self._ward

    # -- what clients want ------------------------------------------------------------------------------------------

    def serve(self, request: OpenRequest, now: float) -> None:
        """Have a request answered, by a worker started for it if need be. `check_room` was called."""
        self._budget.demand.use(request.model, now)
        if self._phase == "absent":
            self._start(now)
        elif self._phase == "starting" and self._stage:
            self._requests.answer(Progress(id=request.id, stage=self._stage))
        if self._phase == "ready":
            self._forward(request, now)

    def check_room(self, model: str, now: float, *, needs_more: bool) -> None:
        """Raises `OutOfMemory` when memory is too short for the model, or for a request that `needs_more` of it."""
        if model in self._loaded:
            refusal = self._budget.refusal() if needs_more else None
            if refusal:
                raise refusal
        else:
            needed = self._library.get(model).base_nbytes + (0 if self._phase == "ready" else RUNTIME_NBYTES)
            reading = self._read()
            reading = replace(reading, available=reading.available + self._caches.left(now))
            self._budget.make_room(model, needed, reading, self.idle())

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
        if self._loaded.pop(model, None) is not None or self._budget.target(model) is not None:
            self._say(UnloadModel(model=model))
        self._budget.forget(model)

    def residencies(self) -> tuple[Residency, ...]:
        """What the worker last reported, with the wish and the reason that it does not know."""
        return tuple(self._explain(residency) for residency in self._loaded.values() if residency)

    def damage(self, model: str) -> str:
        """What the worker found to be wrong with a model, if it is loaded and something is."""
        residency = self._loaded.get(model)
        return residency.damage if residency else ""

    # -- what the worker says ---------------------------------------------------------------------------------------

    def hear(self, message: FromWorker | FromJob, now: float) -> None:
        """Take one message of the present worker."""
        self._silence.broken(now)
        match message:
            case Ready():
                self.runtime_nbytes = message.private_nbytes
                self._become_ready(now)
            case Report():
                self._note(message.models)
                self._caches.note(message.models)
            case LoadFailed():
                self._give_up(message)
            case Resized():
                if message.residency:
                    self._note((message.residency,))
                    message = msgspec.structs.replace(message, residency=self._explain(message.residency))
                self._requests.answer(message)
            case Started() | Chunk() | Finished() | Failed():
                self._pass_on(message, now)
            case Pinned() | Pins():
                self._requests.answer(message)
            case Progress():
                self._stage = message.stage
                if self._phase == "starting" and self._ward:
                    self._patience = COMPILING_SECONDS
                    self._ward.spare()
                    self._ward.kill_at(self._ward.started + self._patience)
                self._tell_all_that_wait(self._stage)
            case Added():
                log.warning("the worker sent %s, which only jobs send", type(message).__name__)
            case _:
                assert_never(message)

    def unreachable(self, now: float) -> None:
        """It does not read what we send: it cannot be helped."""
        if self._ward:
            log.warning("the worker %s does not read its messages; killing it", self._ward.process.pid)
            self._ward.kill_at(now)

    # -- time -------------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """See to whatever is due."""
        self._end_late(now)
        if self._ward is None:
            return
        if self._ward.gone(now):
            self._bury(self._ward, now)
        elif self._phase == "ready" and not self._ward.ending:
            self._kill_if_hung(self._ward, now)
            self._resume_waiting(now)
            self._go_home_if_idle(now)

    def stop(self, now: float) -> None:
        """Send the worker home for good; it is gone within `LEAVE_SECONDS`. Its requests are closed already."""
        if self._phase == "ready":
            self._leave(now)
        elif self._phase == "starting" and self._ward:
            self._phase = "leaving"
            self._ward.kill_at(now)

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
        identity = fresh_identity("worker")
        try:
            process = self._launcher.start_worker(identity, self._budget.spare(self._read()))
        except OSError as error:
            self._fail_all(WorkerDied(f"the worker could not be started: {error}"))
            return
        log.info("worker %s started", process.pid)
        self._ward = Ward(process, identity, now)
        self._patience = READY_SECONDS
        self._ward.kill_at(now + self._patience)
        self._phase = "starting"
        self._stage = ""
        self._hung = False
        self._oom_kills_before = self._oom_kills()

    def _become_ready(self, now: float) -> None:
        if self._phase != "starting" or self._ward is None:
            return
        self._ward.spare()
        self._phase = "ready"
        self._failed_starts = 0
        self._busy_at = now
        self._resumed_at = now
        for request in self._served():
            self._forward(request, now)

    def _leave(self, now: float) -> None:
        self._say(Exit())
        if self._ward:
            self._ward.kill_at(now + LEAVE_SECONDS)
        self._phase = "leaving"
        self._forget_models(now, out_of_memory=False)

    def _bury(self, ward: Ward, now: float) -> None:
        phase, self._phase, self._ward = self._phase, "absent", None
        end = ward.describe_end()
        log.log(logging.INFO if phase == "leaving" else logging.WARNING, "worker %s %s", ward.process.pid, end)
        late = phase == "starting" and now - ward.started >= self._patience
        killed = ward.process.exit_code() == -signal.SIGKILL and not (late or self._hung)  # and not by us
        out_of_memory = killed and self._oom_kills() > self._oom_kills_before
        self._forget_models(now, out_of_memory and phase != "leaving")
        self._failed_starts += phase == "starting"
        again = phase == "leaving" or (phase == "starting" and self._failed_starts < START_ATTEMPTS and not late)
        hint = f"it was not ready after {self._patience:.0f} s and " if late else ""
        hint = "it hung and " if self._hung else hint
        hint = "the kernel killed it, for memory, and " if out_of_memory else hint
        if phase == "ready":
            self._part(WorkerDied(f"the worker is gone: {hint}{end}"), now)
            again = True
        if not again:
            self._fail_all(WorkerDied(f"the worker is gone: {hint}{end}"))
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

    def _kill_if_hung(self, ward: Ward, now: float) -> None:
        owing = any(request.forwarded for request in self._served())
        loading = None in self._loaded.values()
        if self._silence.too_long(now, owing=owing, loading=loading) and not self._hung:
            log.warning("the worker %s has said nothing for too long; killing it", ward.process.pid)
            self._hung = True
            ward.kill_at(now)

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
        if self._ward and self._phase == "ready":
            self._send(self._ward.identity, message)

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
        missing = min(manifest.base_nbytes - self._budget.spare(reading), self._caches.left(now))
        if missing > 0:  # what is kept for later goes before models do, and before this one is refused
            self.trim(now, missing)
            reading = replace(reading, available=reading.available + missing)
        for victim in self._budget.make_room(model, manifest.base_nbytes, reading, self.idle()):
            reading = replace(reading, available=reading.available + self.evict(victim))
        targets = self._budget.load(model, manifest.base_nbytes, manifest.nbytes, reading, manifest.curve)
        self.tell(targets, but=model)
        folder = str(self._library.folder(model))
        spare = self._budget.spare(reading)
        self._say(LoadModel(model=model, folder=folder, target_nbytes=targets[model], pins_nbytes=spare))
        self._loaded[model] = None

    def _give_up(self, message: LoadFailed) -> None:
        self._loaded.pop(message.model, None)
        self._budget.unload(message.model)
        for request in self._served():
            if request.model == message.model:
                self._requests.fail(request, from_wire(message.code, message.message))

    def _note(self, residencies: tuple[Residency, ...]) -> None:
        for residency in residencies:
            if residency.model in self._loaded:
                self._loaded[residency.model] = residency

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
        return self._phase == "ready" and bool(self._loaded)

    def cache_nbytes(self, now: float) -> int:
        """Bytes that the worker could give back without making anything worse, less those it was just asked for."""
        return self._caches.left(now)

    def kv_nbytes(self) -> list[int]:
        """Keys and values of each model that has any, as last reported."""
        return [residency.kv_nbytes for residency in self._loaded.values() if residency and residency.kv_nbytes]

    def holdings(self) -> dict[str, Holding]:
        """What the worker last reported of each model."""
        return {
            r.model: Holding(r.nbytes, r.target_nbytes, r.shared_nbytes, r.shared_base_nbytes)
            for r in self._loaded.values()
            if r
        }

    def idle(self) -> set[str]:
        """Loaded models that nobody waits for."""
        return set(self._loaded) - {request.model for request in self._served()}

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
        self._loaded.pop(model, None)
        self._say(UnloadModel(model=model))
        return self._budget.unload(model)

    def _go_home_if_idle(self, now: float) -> None:
        if self._served():
            self._busy_at = now
        elif now - self._busy_at >= self.idle_seconds or (self._useless and not self._loaded):
            self._leave(now)

    @property
    def _useless(self) -> bool:
        """Whether a worker without models only takes memory that somebody wants."""
        return self._budget.paused or self._budget.short


def _late(request: OpenRequest, now: float) -> DeadlineExceeded:
    waited = format_seconds(now - request.opened)
    why = "and its worker did not say so" if request.forwarded else "before a worker could begin"
    return DeadlineExceeded(f"the deadline passed after {waited}, {why}; try again, or allow more")
