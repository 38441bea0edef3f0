"""The client's end of ZeroMQ; the only importer of zmq in `client`.

One thread owns the socket and the `Exchange`; callers in any thread hand it commands through a queue and a socket
pair that wakes it. A fresh socket is made for each connection the exchange wants, and its monitor tells at once when
nobody listens or the daemon goes, so that leases are only needed for a daemon that hangs.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Final, TypeAlias

import zmq
from zmq.utils.monitor import recv_monitor_message

from ..formats.errors import Cancelled, InvalidRequest
from ..formats.keys import KeyPair
from ..formats.messages import Request, failure
from ..formats.wire import MAX_MESSAGE
from .exchange import Exchange, Frames, Lease, Sink, Watch

LINGER_MS: Final = 500
RECONNECT_MS: Final = 25
MAX_FRAMES: Final = 4
BATCH: Final = 256  # messages read before callers' commands are looked at again
_HEARD: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED
_REFUSED: Final = zmq.EVENT_CONNECT_RETRIED
_LOST: Final = zmq.EVENT_DISCONNECTED
_BARRED: Final = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_HUNG_UP: Final = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_WATCHED: Final = _HEARD | _REFUSED | _LOST | _BARRED | _HUNG_UP

_Socket: TypeAlias = "zmq.Socket[bytes]"
_Command = Callable[[float], None]


@dataclass(frozen=True)
class Curve:
    """An encrypted line: the daemon's public key, and who we are."""

    server: str
    pair: KeyPair


def new_pair() -> KeyPair:
    """A pair of keys that nobody had before."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


class Line:
    """One socket with its monitor, for one connection."""

    def __init__(self, context: zmq.Context[_Socket], address: str, number: int, curve: Curve | None = None) -> None:
        self.number = number
        self.socket: _Socket = context.socket(zmq.DEALER)
        self.monitor: _Socket = self.socket.get_monitor_socket(_WATCHED)
        self.socket.linger = 0
        self.socket.maxmsgsize = MAX_MESSAGE
        self.socket.sndhwm = 0  # bounded by what callers ask; the thread must never wait
        self.socket.reconnect_ivl = RECONNECT_MS
        if curve:
            self.socket.curve_serverkey = curve.server.encode()
            self.socket.curve_publickey = curve.pair.public.encode()
            self.socket.curve_secretkey = curve.pair.secret.encode()
        try:
            self.socket.connect(address)
        except zmq.ZMQError:
            self.close()
            raise

    def read(self) -> tuple[list[int], list[Frames]]:
        """What the monitor saw, and the messages that had arrived by then (at most `BATCH`)."""
        events: list[int] = []
        messages: list[Frames] = []
        while self.monitor.poll(0):
            events.append(recv_monitor_message(self.monitor)["event"])
        with contextlib.suppress(zmq.Again):
            # The last words of a daemon that went must be read before its going is told, all of them.
            while len(messages) < BATCH or _LOST in events:
                messages.append(self._receive())
        return events, messages

    def _receive(self) -> Frames:
        frames = [self.socket.recv(zmq.NOBLOCK)]
        while self.socket.rcvmore:
            frame = self.socket.recv(zmq.NOBLOCK)
            if len(frames) < MAX_FRAMES:
                frames.append(frame)
        return frames

    def close(self, linger_ms: int = 0) -> None:
        """Close; what was queued is sent if that takes no longer than `linger_ms`."""
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(linger_ms)


class Channel:
    """A conversation with the daemon at `address`, from any thread. Raises `InvalidRequest` for a bad address."""

    def __init__(self, address: str, lease: Lease, curve: Curve | None = None) -> None:
        if not address.startswith(("ipc://", "tcp://")):
            raise InvalidRequest(f"{address!r} is not an address; it begins with ipc:// or tcp://")
        self._address = address
        self._curve = curve
        self._exchange = Exchange(address, lease)
        self._commands: SimpleQueue[_Command] = SimpleQueue()
        self._asleep, self._alarm = socket.socketpair()
        self._asleep.setblocking(False)
        self._alarm.setblocking(False)
        self._gate = threading.Lock()  # between "open one more" and "that was the last"; never around zmq
        self._closing = False
        self._closed = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="ebbflow-client", daemon=True)
        self._thread.start()

    def open(self, request: Callable[[int], Request | Watch], sink: Sink) -> int:
        """Begin the request that `request(id)` makes and return its id.

        `sink` is called, by the channel's thread, for each reply; the last one is terminal and always comes.
        """
        if os.getpid() != self._pid:
            raise InvalidRequest("this client was made before a fork; make another one in this process")
        id_ = self._exchange.allocate()
        message = request(id_)
        with self._gate:
            if not self._closed:
                self._post(lambda now: self._exchange.open(id_, message, sink, now))
                return id_
        sink(failure(id_, Cancelled("this client is closed; make another one")))
        return id_

    def cancel(self, id: int) -> None:  # noqa: A002
        """Ask for a request's end; idempotent, never blocks, safe in finalizers."""
        self._post(lambda _now: self._exchange.cancel(id))

    def close(self) -> None:
        """End every open request and the thread. Idempotent."""
        self._closing = True
        if os.getpid() != self._pid:
            return
        self._wake()
        if self._thread is not threading.current_thread():
            self._thread.join(2 + LINGER_MS / 1000)

    # -- any thread -----------------------------------------------------------------------------------------------

    def _post(self, command: _Command) -> None:
        self._commands.put(command)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: awake already; closed: nobody to wake
            self._alarm.send(b"\0")

    # -- the channel's own thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        context: zmq.Context[_Socket] = zmq.Context()
        line: Line | None = None
        try:
            while not self._closing:
                line = self._step(context, line)
        finally:
            with self._gate:
                self._closed = True
            self._obey(time.monotonic())
            self._exchange.close()
            if line is not None:
                self._send(line)
                line.close(LINGER_MS)
            context.term()
            self._asleep.close()
            self._alarm.close()

    def _step(self, context: zmq.Context[_Socket], line: Line | None) -> Line | None:
        """Sleep until something happens, do all of it, and return the line that is right now."""
        self._sleep(line)
        if line is not None:
            self._listen(line)
        now = time.monotonic()
        self._exchange.tick(now)
        self._obey(now)
        wanted = self._exchange.connection
        if line is not None and line.number != wanted:
            line.close()
            line = None
        if line is None and wanted is not None:
            line = self._connect(context, wanted)
        if line is not None:
            self._send(line)
        return line

    def _connect(self, context: zmq.Context[_Socket], number: int) -> Line | None:
        try:
            return Line(context, self._address, number, self._curve)
        except zmq.ZMQError as error:  # not an address that ZeroMQ takes, or no file descriptor left
            self._exchange.unreachable(str(error))
            return None

    def _sleep(self, line: Line | None) -> None:
        deadline = self._exchange.deadline()
        timeout = None if deadline is None else max(0, round((deadline - time.monotonic()) * 1000) + 1)
        poller = zmq.Poller()
        poller.register(self._asleep, zmq.POLLIN)
        if line is not None:
            poller.register(line.socket, zmq.POLLIN)
            poller.register(line.monitor, zmq.POLLIN)
        poller.poll(timeout)
        with contextlib.suppress(BlockingIOError):
            self._asleep.recv(4096)

    def _listen(self, line: Line) -> None:
        events, messages = line.read()
        now = time.monotonic()
        for frames in messages:
            self._exchange.receive(frames, now)
        for event in events:
            if event == _LOST:
                self._exchange.lost()
                return
            if event & _BARRED:
                self._exchange.barred()
                return
            if event == _HUNG_UP:
                self._exchange.unreachable("it hung up on us; another user's daemon, a wrong key, or it is ending")
                return
            if event == _REFUSED:
                self._exchange.refused()
            else:
                self._exchange.connected(now)

    def _obey(self, now: float) -> None:
        with contextlib.suppress(Empty):
            while True:
                self._commands.get_nowait()(now)

    def _send(self, line: Line) -> None:
        for frames in self._exchange.take_outgoing():
            line.socket.send_multipart(frames, zmq.NOBLOCK)
