"""The table of open requests: which client asked what, and under which number we know it.

Clients choose their own ids, so two may use the same; the worker and the jobs only ever see ours. Every request opened
here is closed by exactly one terminal event, or by `forget` when there is nobody left to hear it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Final

import msgspec

from ...formats.errors import EbbflowError, InvalidRequest, TooBusy
from ...formats.messages import (
    LEASE_SECONDS,
    OPEN_PER_CLIENT,
    TERMINAL,
    Added,
    AddModel,
    Chunk,
    Done,
    ExportModel,
    Failed,
    Finished,
    Generate,
    ImportModel,
    JobRequest,
    ListPins,
    Pin,
    Pinned,
    Pins,
    Progress,
    Resize,
    Resized,
    Shutdown,
    Started,
    Unpin,
    failure,
)
from ...formats.wire import Message
from .kept import Kept
from .owners import Owners

HELD_PER_CLIENT: Final = 16_000_000  # bytes of text, as they lie in memory; one alone may have more
HELD_BY_ALL: Final = 64_000_000
ID_NBYTES: Final = 8  # of a token's id: its place in a tuple; the numbers themselves are few, or shared

PinRequest = Pin | Unpin | ListPins
Lasting = Generate | PinRequest | JobRequest | Resize | Shutdown
Answer = Started | Chunk | Progress | Finished | Failed | Pinned | Pins | Added | Resized | Done


@dataclass
class OpenRequest:
    """A request that lasts; `id` is ours, `message.id` the client's.

    `forwarded`: a child knows of it. `cancelled`: that child was told to end it. `kept`: what survives the child.
    `owner` is the client's number, `opened` when it came.
    """

    id: int
    client: bytes
    message: Lasting
    forwarded: bool = False
    cancelled: bool = False
    kept: Kept | None = None
    owner: int = 0
    opened: float = 0.0

    @property
    def model(self) -> str:
        """The model it is about, or nothing."""
        match self.message:
            case Generate() | Pin() | Unpin() | ListPins() | Resize():
                return self.message.model
            case AddModel() | ImportModel() | ExportModel():
                return self.message.name
            case Shutdown():
                return ""

    def left(self, now: float) -> float:
        """Seconds until its deadline; without one, for ever."""
        limit = self.message.deadline_seconds if isinstance(self.message, Generate) else 0.0
        return self.opened + limit - now if limit else math.inf


def _text_nbytes(message: Lasting) -> int:
    """Bytes of all the text in a request, and of token ids, as they lie in memory."""
    texts = [value for value in msgspec.structs.astuple(message) if isinstance(value, str)]
    if isinstance(message, Generate):
        texts += message.sampling.stop
    if isinstance(message, Generate | Pin):
        texts += [text for turn in message.chat or () for text in (turn.role, turn.content)]
    ids = len(message.ids or ()) if isinstance(message, Generate | Pin) else 0
    return sum(map(sys.getsizeof, texts)) + ID_NBYTES * ids


@dataclass
class _Client:
    heard: float
    nbytes: int = 0  # of text in its requests
    requests: dict[int, OpenRequest] = field(default_factory=dict)


class Requests:
    """All open requests of all clients. `send` brings a message to a client; it may fail only by `EbbflowError`."""

    def __init__(self, send: Callable[[bytes, Message], None]) -> None:
        self._send = send
        self._ids = count(1)
        self._open: dict[int, OpenRequest] = {}
        self._clients: dict[bytes, _Client] = {}
        self._owners = Owners()
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[OpenRequest]:
        """Every open request, oldest first; requests may be closed meanwhile."""
        return iter(list(self._open.values()))

    def hear(self, client: bytes, now: float) -> None:
        """The client is there: renew its lease."""
        if client in self._clients:
            self._clients[client].heard = now

    def open(self, client: bytes, message: Lasting, now: float) -> OpenRequest:
        """Enter a request. Raises `TooBusy`, or `InvalidRequest` when the client's id is in use."""
        entry = self._clients.get(client) or _Client(now)
        if message.id in entry.requests:
            raise InvalidRequest(f"request {message.id} is still open; ids must be unique among open requests")
        if len(entry.requests) >= OPEN_PER_CLIENT:
            raise TooBusy(f"{OPEN_PER_CLIENT} requests of this client are open; wait for one to end")
        nbytes = _text_nbytes(message)
        self._check_room(entry, nbytes)
        entry.nbytes += nbytes
        self._nbytes += nbytes
        kept = Kept(now) if isinstance(message, Generate) and message.resume else None
        owner = self._owners.number(client)
        request = OpenRequest(next(self._ids), client, message, kept=kept, owner=owner, opened=now)
        self._clients[client] = entry
        entry.requests[message.id] = self._open[request.id] = request
        return request

    def _check_room(self, entry: _Client, nbytes: int) -> None:
        """Raises `TooBusy` when so much more text is more than this process may hold."""
        for held, most, whose in (
            (entry.nbytes, HELD_PER_CLIENT, "this client's open requests"),
            (self._nbytes, HELD_BY_ALL, "all open requests"),
        ):
            if held and held + nbytes > most:
                raise TooBusy(f"{whose} hold {held} bytes of text, and {nbytes} more are too many; wait for one to end")

    def find(self, client: bytes, client_id: int) -> OpenRequest | None:
        """A client's request by the client's own id."""
        entry = self._clients.get(client)
        return entry.requests.get(client_id) if entry else None

    def get(self, id: int) -> OpenRequest | None:  # noqa: A002 - the wire's own word
        """An open request by our id."""
        return self._open.get(id)

    def is_open(self, request: OpenRequest) -> bool:
        """Whether it still waits for its terminal event."""
        return request.id in self._open

    def of_client(self, client: bytes) -> list[OpenRequest]:
        """What that client waits for."""
        entry = self._clients.get(client)
        return list(entry.requests.values()) if entry else []

    def of_model(self, model: str) -> list[OpenRequest]:
        """What waits for that model."""
        return [request for request in self if request.model == model]

    def answer(self, event: Answer) -> None:
        """Bring an event (with our id) to whoever asked; a terminal one closes the request. Unknown ids are ignored."""
        request = self._open.get(event.id)
        if request is None:
            return
        if isinstance(event, TERMINAL):
            self.forget(request)
        self._send(request.client, msgspec.structs.replace(event, id=request.message.id))

    def fail(self, request: OpenRequest, error: EbbflowError) -> None:
        """Close a request with an error."""
        self.answer(failure(request.id, error))

    def forget(self, request: OpenRequest) -> None:
        """Close a request without a word; a closed one stays closed."""
        if self._open.pop(request.id, None) is None:
            return
        entry = self._clients[request.client]
        entry.requests.pop(request.message.id, None)
        nbytes = _text_nbytes(request.message)
        entry.nbytes -= nbytes
        self._nbytes -= nbytes
        if not entry.requests:
            del self._clients[request.client]

    def expired(self, now: float) -> list[bytes]:
        """Clients with open requests that were not heard of for a whole lease."""
        return [client for client, entry in self._clients.items() if now - entry.heard > LEASE_SECONDS]

    def check_integrity(self) -> None:
        """Raises `AssertionError` when the two views of the table differ: a bug of ours."""
        held = {r.id: r for entry in self._clients.values() for r in entry.requests.values()}
        assert held == self._open
        assert self._nbytes == sum(_text_nbytes(request.message) for request in self._open.values())
        assert all(entry.requests for entry in self._clients.values())
