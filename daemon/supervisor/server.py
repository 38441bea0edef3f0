"""The supervisor's loop: hears clients and children, lets time pass, and never waits for any of them.

`turn` is one round and takes the time as an argument, so that a test can be the clock. What is decided where: how
requests are numbered in `requests`, the worker's life in `worker`, jobs in `adding`, sizes in `budget`.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, assert_never

from ...formats.child_messages import FromJob, FromWorker
from ...formats.errors import (
    Cancelled,
    DaemonGone,
    EbbflowError,
    InternalError,
    InvalidRequest,
    LeaseLost,
    ModelBusy,
    TooBusy,
    storage_failed,
)
from ...formats.messages import (
    LEASE_SECONDS,
    OPEN_PER_CLIENT,
    AddModel,
    Cancel,
    Done,
    ExportModel,
    Generate,
    GetStatus,
    ImportModel,
    ListModels,
    ListPins,
    ModelList,
    Pause,
    Pin,
    Ping,
    Pong,
    RemoveModel,
    Request,
    Resize,
    Resume,
    ShowModel,
    Shutdown,
    Status,
    Unpin,
    YieldMemory,
    failure,
)
from ...formats.units import format_size
from ...formats.values import ProcessMemory
from ..channel import Hub, wait
from ..process import give_back_freed
from .adding import Adding
from .budget import Budget
from .checks import changed_terms, check_generate, check_pin, check_terms, check_yield
from .children import Launcher, Ward
from .demand import Demand
from .following import Following
from .library import Library
from .outlook import Outlook
from .reading import Reading
from .requests import Lasting, OpenRequest, PinRequest, Requests
from .sensor import Sensor
from .swelling import Swelling
from .terms import TermsFile, read_terms
from .worker import Served, Worker

log = logging.getLogger(__name__)

REST_SECONDS: Final = 1.0  # while nothing is going on: to see that the sockets' files are still there
TICK_SECONDS: Final = 0.2  # while anything is going on
LAST_WORDS_TICK_SECONDS: Final = 0.02  # while a dead child's last messages are waited for
NAMED_PER_PING: Final = 2 * OPEN_PER_CLIENT  # requests that one ping may ask after; a client names the rest in the next


@dataclass(frozen=True)
class Outside:
    """Everything the supervisor touches that is not its own; tests bring their own."""

    clients: Hub[Request]
    children: Hub[FromWorker | FromJob]
    launcher: Launcher
    sensor: Sensor


class Server:
    """One daemon. `reserve` is the memory to leave free, in bytes; on battery `battery_reserve` more."""

    def __init__(
        self,
        outside: Outside,
        library: Library,
        *,
        reserve: int,
        idle_seconds: float,
        now: float,
        battery_reserve: int = 0,
    ) -> None:
        self._clients = outside.clients
        self._children = outside.children
        self._sensor = outside.sensor
        self._library = library
        self._started = self._now = now
        self._version = importlib.metadata.version("ebbflow")
        self._drained_at: float | None = None  # when what still runs is told to end
        self._stopping = False
        self._finished = False
        self._sockets_seen = now
        self._swelling = Swelling()
        self._terms_file = TermsFile(library.root)
        self.requests = Requests(self._clients.send)
        self.budget = Budget(Outlook(reserve, battery_reserve), Demand(read_terms(library.root)))
        most = self._sensor.total() - reserve
        self.adding = Adding(outside.launcher, self.requests, library, self._spare_nbytes, most)
        self.worker = Worker(
            outside.launcher,
            self._children.send,
            self.requests,
            library,
            self.budget,
            self._read_sensor,
            self._sensor.oom_kills,
            idle_seconds,
        )
        self.following = Following(self.budget, self._read_sensor, self.worker, self.adding)
        library.clean()
        library.scan()

    @property
    def finished(self) -> bool:
        """Whether it was told to stop and everything has ended."""
        return self._finished

    def close(self) -> None:
        """Wait for what is still being written. Idempotent."""
        self._terms_file.close()

    def turn(self, now: float) -> None:
        """One round: hear everybody, then see to what is due."""
        self._now = now
        for client, request in self._clients.receive():
            self._hear_client(client, request, now)
        for identity, message in self._children.receive():
            self._hear_child(identity, message, now)
        self._clients.flush()
        self._children.flush()
        self._see_to_clients(now)
        self._see_to_children(now)
        self._see_to_sockets(now)
        if self._drained_at is not None and (now >= self._drained_at or not self._answering()):
            self.stop(now)
        if self._stopping and not self._wards() and self._terms_file.settled:
            self._finish()

    def sleep(self, descriptors: list[int], longest: float | None = None) -> None:
        """Wait until a turn is worth taking, or one of `descriptors` is readable; for `longest` seconds at most."""
        ends = [ward.descriptor for ward in self._wards()]
        timeout = REST_SECONDS if longest is None else min(REST_SECONDS, longest)
        if any(ward.ending for ward in self._wards()):
            timeout = LAST_WORDS_TICK_SECONDS
        elif ends or len(self.requests) or self._stopping:
            timeout = TICK_SECONDS
        look = self.following.wait_seconds(self._now)
        timeout = timeout if look is None else min(timeout, look)
        wait((self._clients, self._children), [*descriptors, *(end for end in ends if end is not None)], timeout)

    def configure(self, *, reserve: int, battery_reserve: int, cap: int | None, idle_seconds: float) -> None:
        """Other limits from now on, and a look at what is in the library."""
        self.budget.keep_free(reserve, battery_reserve)
        self.adding.most_nbytes = self._sensor.total() - reserve
        self._sensor.set_cap(cap)
        self.worker.idle_seconds = idle_seconds
        self._library.scan()

    def drain(self, now: float, seconds: float) -> None:
        """Take nothing new, let what is being answered finish for so long, then `stop`; the second time, stop now."""
        if self._stopping or self._drained_at is not None:
            self.stop(now)
            return
        answering = self._answering()
        log.info("ending: %d requests have %g s to finish; asked again, it stops at once", answering, seconds)
        self._drained_at = now + seconds
        self.adding.stop(now)  # goes on where it was when it is asked for again

    def stop(self, now: float) -> None:
        """End everything and then `finish`; asked for a second time, kill what has not ended."""
        self._drained_at = None
        if self._stopping:
            for ward in self._wards():
                ward.kill_at(now)
            if not self._terms_file.settled:
                log.warning("sizes asked for are still being written; it ends when they are")
            return
        log.info("stopping")
        self._stopping = True
        for request in self.requests:
            if not isinstance(request.message, Shutdown):
                self._end(request, Cancelled("the daemon stops"), now)
        self.adding.stop(now)
        self.worker.stop(now)

    def _answering(self) -> int:
        """How many open requests would end well if they were given time."""
        return sum(isinstance(request.message, Served) for request in self.requests)

    # -- clients ----------------------------------------------------------------------------------------------------

    def _hear_client(self, client: bytes, request: Request, now: float) -> None:
        """Take one request; whatever goes wrong with it is told to the client and harms nobody else."""
        self.requests.hear(client, now)
        asked = 0 if isinstance(request, Ping) else request.id
        try:
            self._handle(client, request, now)
        except EbbflowError as error:
            self._clients.send(client, failure(asked, error))
        except OSError as error:
            log.warning("%r: %s", type(request).__name__, error)
            self._clients.send(client, failure(asked, storage_failed(error, "the daemon's folders")))
        except Exception as error:
            log.exception("a request failed: %r", type(request).__name__)
            self._clients.send(client, failure(asked, InternalError(f"{type(error).__name__}; see the daemon's log")))

    def _handle(self, client: bytes, request: Request, now: float) -> None:
        match request:
            case Ping():
                self._tell_what_was_given_up(client, request)
                self._clients.send(client, Pong())
            case Cancel():
                self._cancel(self.requests.find(client, request.id), now)
            case ListModels():
                self._clients.send(client, ModelList(id=request.id, models=self._library.summaries()))
            case ShowModel():
                damage = self.worker.damage(request.model)
                self._clients.send(client, self._library.detail(request.id, request.model, damage))
            case RemoveModel():
                self._remove(request.model)
                self._clients.send(client, Done(id=request.id))
            case YieldMemory():
                check_yield(request)
                self.budget.concede(request.nbytes, now + request.seconds)
                self._clients.send(client, Done(id=request.id))
            case Pause():
                self.budget.pause()
                self._clients.send(client, Done(id=request.id))
            case Resume():
                self.budget.resume()
                self._clients.send(client, Done(id=request.id))
            case GetStatus():
                self._clients.send(client, self._status(request.id, now))
            case Generate() | Pin() | Unpin() | ListPins() | Resize() | Shutdown():
                self._begin(client, request, now)
            case AddModel() | ImportModel() | ExportModel():
                self._begin(client, request, now)
            case _:
                assert_never(request)

    def _tell_what_was_given_up(self, client: bytes, ping: Ping) -> None:
        """End what the client waits for and nobody here knows, so that it does not wait for ever."""
        for asked in ping.open[:NAMED_PER_PING]:
            if self.requests.find(client, asked) is None:
                why = f"nothing was heard of this client for {LEASE_SECONDS:.0f} s, or it left its end unread"
                gone = LeaseLost(f"the daemon has given this request up: {why}")
                self._clients.send(client, failure(asked, gone))

    def _begin(self, client: bytes, message: Lasting, now: float) -> None:
        """Check a request that lasts, enter it in the table and set it going."""
        if self.requests.find(client, message.id):
            # An answer with this id would be taken for the end of the request that is open.
            self._clients.send(client, failure(0, InvalidRequest(f"request {message.id} is still open")))
            return
        if (self._stopping or self._drained_at is not None) and not isinstance(message, Shutdown):
            raise DaemonGone("the daemon is stopping; the same request may be sent again in a moment")
        match message:
            case Generate():
                check_generate(message)
                self._serve(client, message, now)
            case Pin():
                check_pin(message)
                self._serve(client, message, now)
            case Unpin() | ListPins():
                self._serve(client, message, now)
            case AddModel() | ImportModel() | ExportModel():
                self.adding.check(message)
                self.adding.add(self.requests.open(client, message, now), message, now)
            case Resize():
                terms = changed_terms(self.budget.demand.of(message.model), message)
                check_terms(terms, self._library.get(message.model))
                self.worker.resize(self.requests.open(client, message, now), message, terms)
                self._terms_file.keep(self.budget.demand.terms)
            case Shutdown():
                self.requests.open(client, message, now)
                if not self._stopping:
                    self.stop(now)
            case _:
                assert_never(message)

    def _serve(self, client: bytes, message: Generate | PinRequest, now: float) -> None:
        """Have the worker answer. Raises `UnknownModel`, `OutOfMemory` or `TooBusy`."""
        self._library.get(message.model)
        self.worker.check_room(message.model, now, needs_more=isinstance(message, Generate | Pin))
        self.worker.serve(self.requests.open(client, message, now), now)

    def _cancel(self, request: OpenRequest | None, now: float) -> None:
        """Have whoever works on a request stop; one that is unknown, or over in a moment, is left alone."""
        if request is None:
            return
        match request.message:
            case Generate() | Pin() | Unpin() | ListPins():
                self.worker.cancel(request)
            case AddModel() | ImportModel() | ExportModel():
                self.adding.cancel(request, now)
            case Resize() | Shutdown():
                return
            case _:
                assert_never(request.message)

    def _end(self, request: OpenRequest, error: EbbflowError, now: float) -> None:
        """Close a request here and now, and have whoever works on it stop."""
        self.requests.fail(request, error)
        self._cancel(request, now)

    def _remove(self, model: str) -> None:
        if model in self.adding.names:
            raise ModelBusy(f"{model} is being added or copied; cancel that first")
        self._library.get(model)
        waiting = len(self.requests.of_model(model))
        if waiting:
            raise ModelBusy(f"{waiting} requests use {model}; wait for them or cancel them")
        self._library.remove(model)
        known = model in self.budget.demand.terms
        self.worker.unload(model)
        if known:
            self._terms_file.keep(self.budget.demand.terms)

    def _see_to_clients(self, now: float) -> None:
        """Close what is open for clients that are gone or do not read."""
        for lost in self._clients.lost():
            for request in self.requests.of_client(lost.peer):
                self._end(request, TooBusy("too much was left unread; read events as they come"), now)
        for client in self.requests.expired(now):
            log.info("a client with %d open requests is gone", len(self.requests.of_client(client)))
            self._abandon(self.requests.of_client(client), now)
            self._clients.forget(client)

    def _abandon(self, requests: Iterable[OpenRequest], now: float) -> None:
        """Close requests for which nobody is left to be told anything."""
        for request in requests:
            self.requests.forget(request)
            self._cancel(request, now)

    def _see_to_sockets(self, now: float) -> None:
        if now - self._sockets_seen >= REST_SECONDS / 2:
            self._sockets_seen = now
            self._clients.bind_missing()
            self._clients.keep_path()
            self._children.keep_path()
            self._stay_small(now)

    def _stay_small(self, now: float) -> None:
        """Cut all clients off if this process holds more than they may have it hold; which of them it is, nobody says.

        To them we are a daemon that is gone: they may come again at once.
        """
        own = self._sensor.process("supervisor", os.getpid())
        if own and self._swelling.update(own.private_nbytes):
            log.error("clients fill this process up (%s); all are cut off", format_size(own.private_nbytes))
            self._clients.start_over()
            self._abandon(self.requests, now)
            give_back_freed()

    # -- children ---------------------------------------------------------------------------------------------------

    def _hear_child(self, identity: bytes, message: FromWorker | FromJob, now: float) -> None:
        """Take one message of a child in our care; the late words of others are ignored."""
        try:
            if self.worker.ward and identity == self.worker.ward.identity:
                self.worker.hear(message, now)
            elif self.adding.ward and identity == self.adding.ward.identity:
                self.adding.hear(message, now)
        except Exception:
            log.exception("a child's message failed: %r", type(message).__name__)

    def _see_to_children(self, now: float) -> None:
        for lost in self._children.lost():
            if self.worker.ward and lost.peer == self.worker.ward.identity:
                self.worker.unreachable(now)
        self.worker.tick(now)
        self.following.tick(now)
        self.adding.tick(now)

    def _wards(self) -> list[Ward]:
        return [ward for ward in (self.worker.ward, self.adding.ward) if ward]

    def _finish(self) -> None:
        for request in self.requests:
            self.requests.answer(Done(id=request.id))
        self._finished = True

    # -- memory -----------------------------------------------------------------------------------------------------

    def _read_sensor(self) -> Reading:
        worker = self.worker.ward.process.pid if self.worker.ward else None
        return self._sensor.read([os.getpid(), *(ward.process.pid for ward in self._wards())], worker)

    def _spare_nbytes(self) -> int:
        """What a job may take."""
        return self.budget.spare(self._read_sensor())

    def _processes(self) -> Iterator[ProcessMemory]:
        pids = [("supervisor", os.getpid())]
        pids += [
            (role, ward.process.pid) for role, ward in (("worker", self.worker.ward), ("job", self.adding.ward)) if ward
        ]
        for role, pid in pids:
            memory = self._sensor.process(role, pid)
            if memory:
                yield memory

    def _status(self, id: int, now: float) -> Status:  # noqa: A002 - the wire's own word
        reading, budget = self._read_sensor(), self.budget.statistics(now)
        return Status(
            id=id,
            version=self._version,
            pid=os.getpid(),
            uptime_seconds=now - self._started,
            available_nbytes=reading.available,
            available_source=reading.source,
            reserve_nbytes=budget.reserve,
            models=self.worker.residencies(),
            processes=tuple(self._processes()),
            adding=self.adding.names,
            total_nbytes=self._sensor.total(),
            yielded_nbytes=budget.yielded,
            yield_seconds=budget.yield_seconds,
            paused=self.budget.paused,
            runtime_nbytes=self.worker.runtime_nbytes if self.worker.phase == "ready" else 0,
        )
