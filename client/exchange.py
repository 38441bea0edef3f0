"""The rules of talking to a daemon, without a socket or a clock: calls and events in, frames and replies out.

Covers: which requests are open, what goes on the wire, the lease, and the promise of the wire: every request ends with
EXACTLY ONE terminal reply, whatever the daemon, the network or the caller do. Not covered: the socket and the thread
(`channel`), what a reply means to the caller (`asks`).

A *connection* is one daemon's lifetime as we see it. When it ends (refused, lost, silent for too long) every open
request ends with `daemon_gone`, what was not sent yet is forgotten, and the next request asks for a new connection:
nothing that has ended here can surface in another daemon. Each ping names the requests that are open here, and the
daemon ends those that it does not have: it gave them up when this process was stopped for longer than its lease.

Times are seconds of any steadily growing clock.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from ..formats.errors import (
    Cancelled,
    DaemonGone,
    EbbflowError,
    InvalidRequest,
    NotAllowed,
    NotRunning,
    UnsupportedVersion,
)
from ..formats.messages import (
    LEASE_SECONDS,
    PING_SECONDS,
    TERMINAL,
    Cancel,
    Chunk,
    Done,
    Ping,
    Pong,
    Progress,
    Request,
    Started,
    Terminal,
    event_decoder,
    failure,
    request_decoder,
)
from ..formats.wire import decode, encode

CONNECT_SECONDS: Final = 2.0
REFUSALS: Final = 2  # one may be a full backlog

Frames = list[bytes]
Reply = Started | Chunk | Progress | Terminal
Sink = Callable[[Reply], None]  # called once for each reply, the last one being terminal; must not raise


class Watch(msgspec.Struct, frozen=True):
    """Opened like a request but never sent: it ends, with `daemon_gone`, when the connection does."""


@dataclass(frozen=True)
class Lease:
    """How often to ping while something is open, and how long silence is suffered before and after connecting."""

    ping_seconds: float = PING_SECONDS
    silence_seconds: float = LEASE_SECONDS
    connect_seconds: float = CONNECT_SECONDS


@dataclass
class _Open:
    request: Request | Watch
    sink: Sink
    cancelled: bool = False


class Exchange:
    """One client's side of the conversation. Not thread-safe, except `allocate`."""

    def __init__(self, address: str, lease: Lease) -> None:
        self._address = address
        self._lease = lease
        self._ids = itertools.count(1)
        self._open: dict[int, _Open] = {}
        self._outgoing: list[Frames] = []
        self._connections = itertools.count(1)
        self._connection: int | None = None
        self._connected = False
        self._refusals = 0
        self._since = 0.0  # last word of the daemon, or when we began to wait for one
        self._pinged = 0.0
        self._ticked = 0.0
        self._closed = False

    # -- what the channel asks ------------------------------------------------------------------------------------

    def allocate(self) -> int:
        """An id that no other request of this client has. Safe from any thread."""
        return next(self._ids)

    @property
    def open_ids(self) -> frozenset[int]:
        """The requests that have not ended."""
        return frozenset(self._open)

    @property
    def connection(self) -> int | None:
        """The number of the connection that is wanted; another number than before means a fresh socket."""
        return self._connection

    def take_outgoing(self) -> list[Frames]:
        """What to send now, in order."""
        taken, self._outgoing = self._outgoing, []
        return taken

    def deadline(self) -> float | None:
        """When `tick` has something to do, if nothing happens before; `None`: never."""
        if not self._open:
            return None
        return min(self._pinged + self._lease.ping_seconds, self._since + self._patience())

    # -- what the caller does -------------------------------------------------------------------------------------

    def open(self, id: int, request: Request | Watch, sink: Sink, now: float) -> None:  # noqa: A002
        """Begin a request; `sink` hears everything about it. One that cannot be sent ends at once."""
        if self._closed:
            sink(failure(id, Cancelled("this client is closed; make another one")))
            return
        try:
            frames = [] if isinstance(request, Watch | Ping) else _checked(request)
        except EbbflowError as error:
            sink(failure(id, error))
            return
        if not self._open:
            self._begin(now)
        self._open[id] = _Open(request, sink)
        if isinstance(request, Ping):
            self._ping(now)
        elif frames:
            self._outgoing.append(frames)

    def cancel(self, id: int) -> None:  # noqa: A002
        """Ask for a request's end; its terminal reply still comes. Ended, unknown and cancelled ids do nothing."""
        entry = self._open.get(id)
        if entry is None or entry.cancelled:
            return
        entry.cancelled = True
        if isinstance(entry.request, Watch | Ping):
            self._end(id, failure(id, Cancelled("cancelled")))
        else:
            self._outgoing.append(encode(Cancel(id=id)))

    def close(self) -> None:
        """End everything; the daemon is told to stop what it does for us. Idempotent."""
        self._closed = True
        for id_ in self.open_ids:
            self.cancel(id_)
        self._end_all(Cancelled("the client was closed"))

    # -- what the socket says -------------------------------------------------------------------------------------

    def connected(self, now: float) -> None:
        """Somebody speaks ZeroMQ at the other end."""
        self._connected = True
        self._since = now

    def barred(self) -> None:
        """Somebody is there and does not let us in."""
        self._gone(
            NotAllowed(
                f"the daemon at {self._address} does not let us in: by tcp it wants its own key (EBBFLOW_SERVER_KEY) "
                "and yours allowed (`ebb keys`)"
            )
        )

    def unreachable(self, reason: str) -> None:
        """No attempt to connect can be made."""
        self._gone(DaemonGone(f"cannot connect to {self._address}: {reason}"))

    def refused(self) -> None:
        """An attempt to connect failed."""
        self._refusals += 1
        if not self._connected and self._refusals >= REFUSALS:
            self._gone(NotRunning(f"the daemon is not running (nobody listens at {self._address}); try `ebb serve`"))

    def lost(self) -> None:
        """The connection ended."""
        self._gone(DaemonGone("the daemon went away; the same request may be sent again"))

    def receive(self, frames: Frames, now: float) -> None:
        """What arrived. Garbage and events for requests that are not open are dropped."""
        try:
            event = decode(event_decoder, frames)
        except UnsupportedVersion as error:
            self._end_all(UnsupportedVersion(f"the daemon is another version of ebbflow: {error}; restart it"))
            return
        except InvalidRequest:
            return
        self._connected = True
        self._since = now
        if isinstance(event, Pong):
            self._answer_pings()
        elif isinstance(event, TERMINAL):
            self._end(event.id, event)
        elif isinstance(event, Started | Chunk | Progress) and event.id in self._open:
            self._open[event.id].sink(event)

    def tick(self, now: float) -> None:
        """Ping when it is time to; end everything when the daemon has been silent for too long."""
        slept = now - self._ticked > self._lease.ping_seconds + self._patience() / 2
        self._ticked = now
        if not self._open:
            return
        if slept:  # this process was stopped: silence that nobody could hear does not count
            self._since = now
        if now - self._since >= self._patience():
            self._gone(DaemonGone(f"the daemon at {self._address} has said nothing for {self._patience():g} s"))
        elif now - self._pinged >= self._lease.ping_seconds:
            self._ping(now)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _patience(self) -> float:
        return self._lease.silence_seconds if self._connected else self._lease.connect_seconds

    def _begin(self, now: float) -> None:
        if self._connection is None:
            self._connection = next(self._connections)
        self._since = self._ticked = now
        self._ping(now)

    def _ping(self, now: float) -> None:
        """Say what is waited for: a daemon that has given some of it up, while we were stopped, then says so."""
        self._pinged = now
        waiting = (id_ for id_, entry in self._open.items() if not isinstance(entry.request, Watch | Ping))
        self._outgoing.append(encode(Ping(open=tuple(waiting))))

    def _answer_pings(self) -> None:
        for id_, entry in list(self._open.items()):
            if isinstance(entry.request, Ping):
                self._end(id_, Done(id=id_))

    def _gone(self, error: DaemonGone | NotAllowed) -> None:
        self._connection = None
        self._connected = False
        self._refusals = 0
        self._outgoing.clear()
        self._end_all(error)

    def _end_all(self, error: EbbflowError) -> None:
        for id_ in self.open_ids:
            self._end(id_, failure(id_, error))

    def _end(self, id: int, terminal: Terminal) -> None:  # noqa: A002
        entry = self._open.pop(id, None)
        if entry is not None:
            entry.sink(terminal)


def _checked(request: Request) -> Frames:
    """The frames of `request`, if the daemon will understand them. Raises `InvalidRequest`."""
    try:
        frames = encode(request)
    except (TypeError, ValueError, OverflowError) as error:  # not a type, text or number that msgpack has
        raise InvalidRequest(f"the request cannot be sent: {error}") from error
    decode(request_decoder, frames)
    return frames
