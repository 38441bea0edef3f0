"""The worker's one loop: hear, move edges, step, tell. The world is met only here, between steps.

Growing is done in slices between steps, so a step never waits long for the disk; a model nobody is waiting on grows at
full speed, and one that was just loaded grows before its first request starts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Protocol, assert_never

from ...formats.child_messages import (
    Continue,
    Exit,
    LimitKv,
    LoadFailed,
    LoadModel,
    Report,
    SetTarget,
    ToWorker,
    Trim,
    UnloadModel,
)
from ...formats.errors import CorruptStack, EbbflowError, OutOfMemory, UnknownModel
from ...formats.messages import (
    Cancel,
    Failed,
    Finished,
    Generate,
    ListPins,
    Pin,
    Pinned,
    Pins,
    Resized,
    Unpin,
    failure,
    in_short,
)
from ...formats.wire import Message
from ..mapping import private_nbytes
from ..process import give_back_freed
from ..settings import DEFAULTS, WorkerSettings
from .served import LOOK_SECONDS, Served
from .shared import SharedBlocks

log = logging.getLogger(__name__)

GROW_SECONDS: Final = 0.025  # per step while requests run: the step target keeps room for it
GROW_SHARE: Final = 1 / 3  # of a step's time where that is more, up to
GROW_MOST_SECONDS: Final = 0.05  # which a shrink that arrives meanwhile has to wait
IDLE_GROW_SECONDS: Final = 0.1  # while nothing runs: how long a message may have to wait
REPORT_SECONDS: Final = 0.5
IDLE_SECONDS: Final = 5.0
SAVING_SECONDS: Final = 0.02  # between two looks at a file that is being written


class Line(Protocol):
    """The way to the supervisor (`daemon/channel.Child`)."""

    def send(self, message: Message) -> None:
        """Queue a message."""
        ...

    def receive(self, timeout_seconds: float) -> list[ToWorker]:
        """What has arrived, waiting at most so long."""
        ...


class Loop:
    """All models this worker serves."""

    def __init__(
        self, line: Line, threads: int, clock: Callable[[], float], settings: WorkerSettings = DEFAULTS
    ) -> None:
        self._line, self._threads, self._clock, self._settings = line, threads, clock, settings
        self._models: dict[str, Served] = {}
        self._shared = SharedBlocks()
        self._owner: dict[int, str] = {}
        self._running = True
        self._kv_limit = 0  # of each model, also of those that come later
        self._reported = float("-inf")

    @property
    def models(self) -> dict[str, Served]:
        """What is loaded, by name."""
        return self._models

    def turn(self) -> bool:
        """One round; whether there will be another."""
        active = any(served.engine.busy or not served.arrived for served in self._models.values())
        for message in self._line.receive(0.0 if active else self._patience()):
            self._handle(message)
        moved = [name for name, served in self._models.items() if self._move(name, served)]
        if moved:
            self._report()  # before the step, which may take a while: the budget waits for this
        for name in moved:  # after the report: what one model lets go of may be counted with another now
            self._answer_if_arrived(name, self._models[name])
        busy = any(served.engine.busy for served in self._models.values())
        self._step_next()
        for served in self._models.values():
            self._tell(served.engine.settle())
        idle = active and not any(served.engine.busy for served in self._models.values())
        if idle and busy:
            give_back_freed()
        if idle or (active and self._clock() - self._reported >= REPORT_SECONDS):
            self._report()
        return self._running

    def _patience(self) -> float:
        """How long a message may be waited for while there is nothing to compute, in seconds."""
        if any(served.engine.saving for served in self._models.values()):
            return SAVING_SECONDS
        return LOOK_SECONDS if any(served.resident.arriving for served in self._models.values()) else IDLE_SECONDS

    def _handle(self, message: ToWorker) -> None:
        match message:
            case LoadModel():
                self._load(message)
            case UnloadModel():
                self._unload(message.model)
            case SetTarget():
                self._aim(message)
            case Trim():
                self._trim(message.nbytes)
            case LimitKv():
                self._kv_limit = message.nbytes
                for served in self._models.values():
                    served.engine.limit_kv(message.nbytes)
                self._report()
            case Generate():
                self._submit(message)
            case Continue():
                self._submit(message.request, message.ids)
            case Pin():
                self._submit(message)
            case Unpin() | ListPins():
                self._see_to_pins(message)
            case Cancel():
                self._cancel(message.id)
            case Exit():
                for name in list(self._models):
                    self._unload(name)
                self._running = False
            case _:
                assert_never(message)

    def _load(self, message: LoadModel) -> None:
        if message.model in self._models:
            self._models[message.model].aim(message.target_nbytes)
            self._report()
            return
        for name, other in self._models.items():
            if other.target < other.resident.blocks:
                self._move(name, other)  # what others were just told to give is meant for this one
                self._answer_if_arrived(name, other)
        try:
            served = Served(
                Path(message.folder),
                message.target_nbytes,
                self._threads,
                self._clock,
                self._settings,
                message.pins_nbytes,
                self._shared,
            )
        except (EbbflowError, MemoryError) as error:
            if isinstance(error, CorruptStack):
                error = type(error)(f"{error}; add or import {message.model} again")
            known = (
                error if isinstance(error, EbbflowError) else OutOfMemory(f"no room for the base of {message.model}")
            )
            self._line.send(LoadFailed(model=message.model, code=known.code, message=in_short(known)))
            return
        served.engine.limit_kv(self._kv_limit)
        self._models[message.model] = served
        give_back_freed()  # reading a tokenizer takes much more than it leaves
        self._report()

    def _unload(self, name: str) -> None:
        served = self._models.pop(name, None)
        if served is None:
            return
        self._tell(served.engine.close())
        self._answer(name, served)
        served.close()
        del served
        give_back_freed()
        self._report()

    def _trim(self, nbytes: int) -> None:
        for served in self._models.values():
            cached = served.engine.kv_cached_nbytes
            served.engine.trim(min(nbytes, cached))
            nbytes -= min(nbytes, cached)
        give_back_freed()
        self._report()

    def _aim(self, message: SetTarget) -> None:
        served = self._models.get(message.model)
        if served is None:
            if message.id:
                self._line.send(Resized(id=message.id))
            return
        self._answer(message.model, served)
        if message.id:
            served.wait(message.id)
        served.aim(message.target_nbytes)
        self._answer_if_arrived(message.model, served)

    def _submit(self, message: Generate | Pin, ids: tuple[int, ...] = ()) -> None:
        served = self._find(message)
        if served is None:
            return
        self._owner[message.id] = message.model
        engine = served.engine
        self._tell(engine.pin(message) if isinstance(message, Pin) else engine.submit(message, ids))

    def _see_to_pins(self, message: Unpin | ListPins) -> None:
        served = self._find(message)
        if served is None:
            return
        try:
            if isinstance(message, Unpin):
                served.engine.unpin(message.name)
        except EbbflowError as error:
            self._line.send(failure(message.id, error))
            return
        self._line.send(Pins(id=message.id, pins=served.engine.pin_summaries()))

    def _find(self, message: Generate | Pin | Unpin | ListPins) -> Served | None:
        """The model that a request is about; one that is not there is told so."""
        served = self._models.get(message.model)
        if served is None:
            self._line.send(failure(message.id, UnknownModel(f"{message.model!r} is not loaded; try again")))
        return served

    def _cancel(self, key: int) -> None:
        served = self._models.get(self._owner.get(key, ""))
        if served is not None:
            self._tell(served.engine.cancel(key))

    def _move(self, name: str, served: Served) -> bool:
        between = min(max(GROW_SECONDS, GROW_SHARE * served.engine.step_seconds), GROW_MOST_SECONDS)
        idle = not served.engine.scheduler.running
        try:
            return served.move(IDLE_GROW_SECONDS if idle else between)
        except EbbflowError as error:
            log.warning("%s stays at %d bytes: %s", name, served.resident.nbytes, error)
            if served.waiting is not None:
                self._line.send(failure(served.waiting.id, error))
                served.waiting = None
            return True

    def _answer_if_arrived(self, name: str, served: Served) -> None:
        if served.arrived:
            self._answer(name, served)

    def _answer(self, name: str, served: Served) -> None:
        """Tell whoever waits for the edge where it is."""
        waiting, served.waiting = served.waiting, None
        if waiting is None:
            return
        released = waiting.private_nbytes - private_nbytes()
        seconds = self._clock() - waiting.began
        self._line.send(
            Resized(id=waiting.id, residency=served.residency(name), released_nbytes=released, seconds=seconds)
        )

    def _step_next(self) -> None:
        """One step of one model, in turns: however many are busy, a message waits for one step at most."""
        for name in list(self._models):
            served = self._models[name]
            if served.engine.busy and (served.arrived or served.engine.scheduler.running):
                self._models[name] = self._models.pop(name)  # to the end of the line
                self._step(served)
                return

    def _step(self, served: Served) -> None:
        try:
            self._tell(served.engine.step())
        except MemoryError:
            short = OutOfMemory("no memory for the next step; try again, or make the model smaller")
            ended = served.engine.cancel_all()
            self._tell(failure(event.id, short) for event in ended)

    def _tell(self, events: Iterable[Message]) -> None:
        for event in events:
            if isinstance(event, Failed | Finished | Pinned):
                self._owner.pop(event.id, None)
            self._line.send(event)

    def _report(self) -> None:
        self._reported = self._clock()
        self._line.send(Report(models=tuple(served.residency(name) for name, served in self._models.items())))
