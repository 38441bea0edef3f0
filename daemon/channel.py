"""The daemon's ends of ZeroMQ; the only importer of zmq in `daemon`.

`Child` is what the worker and the jobs hold; `Hub` is the supervisor's end, towards clients and towards children.
"""

from __future__ import annotations

from typing import Final

import zmq

from ..formats.messages import MAX_MESSAGE, Message, ToWorker, decode, encode, to_worker_decoder

LINGER_MS: Final = 500


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
