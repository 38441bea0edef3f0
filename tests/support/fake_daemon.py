"""A small ROUTER server that speaks `formats.messages` to clients under test, from a script.

`script(request)` gives, for each request but pings and cancels, the items of its answer, in order: an event (sent),
`Raw(frames)` (sent as it is), `VANISH` (the daemon is gone, without a word), or a callable (called). Items are sent
as they are made. A request left without a terminal event stays open, and a `Cancel` for it is answered as the real
daemon does. `Shutdown` is answered with `Done` and the end of the daemon.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import TypeVar

import zmq

from ebbflow.formats.errors import Cancelled
from ebbflow.formats.messages import (
    TERMINAL,
    Cancel,
    Done,
    Event,
    Ping,
    Pong,
    Request,
    Shutdown,
    failure,
    request_decoder,
)
from ebbflow.formats.wire import decode, encode


@dataclass(frozen=True)
class Raw:
    """Frames sent as they are."""

    frames: tuple[bytes, ...]


class Vanish:
    """The daemon dies."""


VANISH = Vanish()
Item = Event | Raw | Vanish | Callable[[], object]
Script = Callable[[Request], Iterable[Item]]
R = TypeVar("R", bound=Request)
PATIENCE = 20.0


def silent(_request: Request) -> Iterator[Item]:
    """A script that answers nothing."""
    return iter(())


class FakeDaemon:
    """Serves `address` from its own thread inside a `with` block."""

    def __init__(self, address: str, script: Script = silent, *, pong: bool = True) -> None:
        self.script = script
        self.pong = pong
        self._seen: SimpleQueue[Request] = SimpleQueue()
        self._open: set[tuple[bytes, int]] = set()
        self._address = address
        self._bound = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> FakeDaemon:
        self._thread.start()
        assert self._bound.wait(PATIENCE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.vanish()

    def vanish(self) -> None:
        """Die without a word; returns when dead."""
        self._stop.set()
        self._thread.join(PATIENCE)

    def wait_until_stopped(self) -> None:
        """Returns after a `Shutdown`."""
        self._thread.join()

    def wait_for(self, kind: type[R]) -> R:
        """The next request of that type that a client sends, or has sent since the last call."""
        while True:
            request = self._seen.get(timeout=PATIENCE)
            if isinstance(request, kind):
                return request

    def _serve(self) -> None:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
            router.linger = 200
            router.sndhwm = 0  # or it drops what a client is too slow for
            router.bind(self._address)
            self._bound.set()
            while not self._stop.is_set():
                if router.poll(10):
                    client, *frames = router.recv_multipart()
                    self._handle(router, client, decode(request_decoder, frames))

    def _handle(self, router: zmq.Socket[bytes], client: bytes, request: Request) -> None:
        if not isinstance(request, Ping):
            self._seen.put(request)
        match request:
            case Ping():
                if self.pong:
                    router.send_multipart([client, *encode(Pong())])
            case Cancel():
                if (client, request.id) in self._open:
                    self._send(router, client, failure(request.id, Cancelled("cancelled by the client")))
            case Shutdown():
                self._send(router, client, Done(id=request.id))
                self._stop.set()
            case _:
                self._open.add((client, request.id))
                for item in self.script(request):
                    self._send(router, client, item)

    def _send(self, router: zmq.Socket[bytes], client: bytes, item: Item) -> None:
        if isinstance(item, Vanish):
            self._stop.set()
        elif isinstance(item, Raw):
            router.send_multipart([client, *item.frames])
        elif isinstance(item, Event):
            if isinstance(item, TERMINAL):
                self._open.discard((client, item.id))
            router.send_multipart([client, *encode(item)])
        else:
            item()
