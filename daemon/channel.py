"""The daemon's ends of ZeroMQ; the only importer of zmq in `daemon`.

`Child` is what the worker and the jobs hold; `Hub` is the supervisor's end, towards clients and towards children;
`wait` sleeps until one of them, or a plain file descriptor, has something to say.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, TypeVar

import msgspec
import zmq
from zmq.utils import z85

from ..formats.child_messages import ToWorker, to_worker_decoder
from ..formats.errors import DaemonFailed, InvalidRequest, Unsupported
from ..formats.keys import KeyPair
from ..formats.messages import failure
from ..formats.wire import MAX_MESSAGE, Message, decode, encode
from .outboxes import Limits, Outboxes
from .socket_path import SocketPath

log = logging.getLogger(__name__)

LINGER_MS: Final = 500
FRAMES: Final = 3  # sender, header, body; what a longer message has more is read and dropped
PIPE_MESSAGES: Final = 100  # what ZeroMQ itself may hold for one peer; the rest waits in an outbox that we can count
RETRY_SECONDS: Final = 0.02
HEARD_NBYTES: Final = 4 * MAX_MESSAGE  # after which `receive` has heard enough: what it gives, its caller holds
ZAP: Final = "inproc://zeromq.zap.01"  # where ZeroMQ asks who may enter (RFC 27)
ASKED_AT_ONCE: Final = 100  # strangers who may knock in one turn; the others wait for the next
USUAL: Final = Limits()
BACKLOG: Final = 1024  # connections that may wait to be accepted; ZeroMQ's own 100 refuses a crowd

M = TypeVar("M")


class Child:
    """A child process's line to the supervisor that started it. One thread only."""

    def __init__(self, address: str, identity: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.identity = identity.encode()
        self._socket.linger = LINGER_MS
        self._socket.maxmsgsize = MAX_MESSAGE
        self._socket.sndhwm = 0  # the supervisor always reads; a worker must never wait for it
        self._socket.connect(address)

    def send(self, message: Message) -> None:
        """Queue a message; never blocks."""
        self._socket.send_multipart(encode(message), flags=zmq.NOBLOCK)

    def receive(self, timeout_seconds: float) -> list[ToWorker]:
        """Everything that has arrived, waiting up to `timeout_seconds` for the first message."""
        messages: list[ToWorker] = []
        if self._socket.poll(round(timeout_seconds * 1000)):
            while self._socket.poll(0):
                messages.append(decode(to_worker_decoder, self._socket.recv_multipart()))
        return messages

    def close(self) -> None:
        """Send what is queued (at most `LINGER_MS`) and close."""
        self._socket.close()
        self._context.term()


@dataclass(frozen=True)
class Curve:
    """An encrypted door: who we are, and whether the owner of a public key may enter."""

    pair: KeyPair
    may_enter: Callable[[str], bool]


def new_pair() -> KeyPair:
    """A pair of keys that nobody had before."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


class _Gate:
    """Answers ZeroMQ's question whether a connection may come in; without an answer none does."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], may_enter: Callable[[str], bool]) -> None:
        self._may_enter = may_enter
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(ZAP)

    def answer(self) -> None:
        for _ in range(ASKED_AT_ONCE):
            if not self.socket.poll(0):
                return
            version, number, _domain, _address, _identity, mechanism, *credentials = self.socket.recv_multipart()
            allowed = mechanism == b"CURVE" and self._may_enter(z85.encode(credentials[0]).decode())
            if not allowed:
                log.warning("a client with another key than those allowed was turned away")
            self.socket.send_multipart([version, number, b"200" if allowed else b"400", b"", b"", b""])


@dataclass(frozen=True)
class Lost:
    """A peer that cannot be told what it should be told; everything queued for it is gone."""

    peer: bytes
    reason: Literal["vanished", "overflowed"]


class Hub(Generic[M]):
    """One bound address and the peers behind it, each known by the identity that ZeroMQ gives. One thread only.

    Nothing here blocks, and nothing that a peer sends or fails to read makes it raise. A peer that reads slowly gets
    a bounded outbox, tried again on each `flush`; `lost` names the peers for which that was not enough. `explain`:
    whether who sends nonsense is told so; towards children it is not, as they know no such message. Raises
    `DaemonFailed` when the address cannot be bound.
    """

    def __init__(
        self,
        address: str,
        decoder: msgspec.msgpack.Decoder[M],
        limits: Limits = USUAL,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        explain: bool = True,
    ) -> None:
        self._address = address
        self._decoder = decoder
        self._limits = limits
        self._given = context
        self._explain = explain
        self._addresses: list[tuple[str, Curve | None]] = [(address, None)]
        self._unbound: list[tuple[str, Curve | None]] = []
        self._open()
        self._bind_or_close(address, None)

    def listen(self, address: str, curve: Curve | None) -> None:
        """Serve another address too, once; with `curve` only to those who may enter, and encrypted.

        Raises `DaemonFailed` when it cannot be bound.
        """
        self._addresses.append((address, curve))
        self._bind_or_close(address, curve)

    def start_over(self) -> None:
        """Cut everybody off, and be there for whoever comes anew: what ZeroMQ holds for them is free then.

        The only way to be rid of a message whose frames never end: nobody is told of it before its last one, or who
        sends it. Takes some 50 ms. An address that somebody took in between is left to `bind_missing`.
        """
        self._socket.linger = 0
        self.close()
        self._open()
        self._unbound = list(self._addresses)
        self.bind_missing()

    def bind_missing(self) -> None:
        """Try to bind what is not bound since all were cut off; what still cannot be is logged."""
        for address, curve in tuple(self._unbound):
            try:
                self._bind(address, curve)
            except zmq.ZMQError as error:
                log.error("%s cannot be bound again, it is tried on: %s", address, error.strerror)
            else:
                self._unbound.remove((address, curve))
                log.info("serving on %s again", address)

    def _open(self) -> None:
        self._own_context = None if self._given else zmq.Context()
        self._context = self._given or self._own_context or zmq.Context.instance()
        self._gate: _Gate | None = None
        self._path: SocketPath | None = None
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.router_mandatory = True
        self._socket.linger = LINGER_MS
        self._socket.maxmsgsize = MAX_MESSAGE
        self._socket.sndhwm = PIPE_MESSAGES
        self._socket.backlog = BACKLOG
        self._socket.rcvhwm = self._limits.unheard
        self._outboxes = Outboxes(self._limits)
        self._lost: dict[bytes, Lost] = {}
        if self._address.startswith("ipc://"):
            # The kernel says who is at the other end; anybody else is cut off before a word is read.
            self._socket.setsockopt(zmq.IPC_FILTER_UID, os.geteuid())

    def _bind(self, address: str, curve: Curve | None = None) -> None:
        if curve:
            self._gate = self._gate or _Gate(self._context, curve.may_enter)
            self._socket.curve_server = True
            self._socket.curve_publickey = curve.pair.public.encode()
            self._socket.curve_secretkey = curve.pair.secret.encode()
            # No `zap_domain`: it cannot be taken back, and what is bound later would ask the gate too. It would only
            # matter without a gate, which is there as long as the socket is.
        try:
            self._socket.bind(address)
        finally:
            if curve:  # an address keeps what held when it was bound; what is bound later is plain again
                self._socket.curve_server = False
        if address == self._address and address.startswith("ipc://"):
            self._path = SocketPath(address)

    def _bind_or_close(self, address: str, curve: Curve | None) -> None:
        try:
            self._bind(address, curve)
        except zmq.ZMQError as error:
            self.close()
            raise DaemonFailed(f"{address} cannot be bound: {error.strerror}") from error

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """For `wait`."""
        return [self._socket, self._gate.socket] if self._gate else [self._socket]

    @property
    def pending(self) -> bool:
        """Whether some outbox waits for a `flush`."""
        return len(self._outboxes) > 0

    def receive(self, limit: int = 500) -> list[tuple[bytes, M]]:
        """What has arrived, at most `limit` messages (fewer, if they are large), each with its sender.

        A sender whose message cannot be understood gets `Failed` with id 0 instead, if this hub explains.
        """
        if self._gate:
            self._gate.answer()
        messages: list[tuple[bytes, M]] = []
        nbytes = 0
        for _ in range(limit):
            frames = self._read() if nbytes < HEARD_NBYTES else None
            if frames is None:
                break
            nbytes += sum(map(len, frames))
            peer, *rest = frames
            try:
                messages.append((peer, decode(self._decoder, rest)))
            except (InvalidRequest, Unsupported) as error:
                if self._explain:
                    self.send(peer, failure(0, error))
                else:
                    log.warning("from %r: %s", peer, error)
        return messages

    def send(self, peer: bytes, message: Message) -> None:
        """Queue a message for `peer`. Raises `InvalidRequest` when it is too large for the wire, and nothing else."""
        frames = [peer, *encode(message)]
        if peer not in self._outboxes and self._write(frames):
            return
        for slow in self._outboxes.push(peer, frames):
            self._lose(slow, "overflowed")

    def flush(self) -> None:
        """Try every outbox again."""
        for peer in self._outboxes:
            while (frames := self._outboxes.first(peer)) and self._write(frames):
                if peer in self._outboxes:  # or it has vanished
                    self._outboxes.pop(peer)

    def lost(self) -> list[Lost]:
        """The peers lost since the last call."""
        lost = list(self._lost.values())
        self._lost.clear()
        return lost

    def forget(self, peer: bytes) -> None:
        """Drop what waits for `peer`."""
        self._outboxes.drop(peer)

    def keep_path(self) -> None:
        """See that the socket's file is there and ours; if not, say so in the log and put a new one there.

        Who is connected notices nothing. The old listener stays, out of reach: closing it would delete the new file.
        """
        if self._path is None or self._path.ours():
            return
        try:
            self._path.take_back(self._socket.bind)
            log.warning("somebody removed or replaced the socket %s; it is there again", self._path)
        except (OSError, zmq.ZMQError) as error:
            log.error("somebody took the socket %s, and it cannot be made again: %s", self._path, error)

    def close(self) -> None:
        """Send what ZeroMQ holds (at most `LINGER_MS`) and close."""
        self._socket.close()
        if self._gate:
            self._gate.socket.close()
        if self._own_context:
            self._own_context.term()

    def _read(self) -> list[bytes] | None:
        try:
            frames = [self._socket.recv(zmq.NOBLOCK)]
        except zmq.Again:
            return None
        while self._socket.getsockopt(zmq.RCVMORE):
            frame = self._socket.recv()
            if len(frames) <= FRAMES:  # one too many is kept, so that the message is seen to be wrong
                frames.append(frame)
        return frames

    def _write(self, frames: list[bytes]) -> bool:
        """Whether the message is off our hands: sent, or its peer gone."""
        try:
            self._socket.send_multipart(frames, flags=zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._lose(frames[0], "vanished")
        return True

    def _lose(self, peer: bytes, reason: Literal["vanished", "overflowed"]) -> None:
        self._lost[peer] = Lost(peer, reason)
        self.forget(peer)


def wait(hubs: Iterable[Hub[Any]], descriptors: Iterable[int], timeout_seconds: float | None) -> None:
    """Sleep until a hub has a message, a descriptor is readable, an outbox is due again, or the time is over."""
    poller = zmq.Poller()
    for hub in hubs:
        for socket in hub.sockets:
            poller.register(socket, zmq.POLLIN)
        if hub.pending:
            timeout_seconds = RETRY_SECONDS if timeout_seconds is None else min(timeout_seconds, RETRY_SECONDS)
    for descriptor in descriptors:
        poller.register(descriptor, zmq.POLLIN)
    poller.poll(None if timeout_seconds is None else max(0, round(timeout_seconds * 1000)))
