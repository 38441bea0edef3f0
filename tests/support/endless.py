"""Somebody who speaks ZeroMQ's protocol (ZMTP 3.1, RFC 37) by hand, and begins a message that has no end."""

from __future__ import annotations

import socket
from pathlib import Path

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
PART_NBYTES = 1_000_000


class Endless:
    """Connected to the socket at `path`, and let in."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(path))
        self.socket.sendall(GREETING)
        self._read(len(GREETING))
        self.socket.sendall(bytes([4, len(READY)]) + READY)
        self._read(self._read(2)[1])

    def go_on(self, parts: int) -> None:
        """So many frames more, each of a megabyte and with the promise of another."""
        for _ in range(parts):
            self.socket.sendall(b"\x03" + PART_NBYTES.to_bytes(8, "big") + bytes(PART_NBYTES))

    def cut_off(self) -> bool:
        """Wait until the other side ends the connection."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.socket.close()

    def _read(self, count: int) -> bytes:
        read = b""
        while len(read) < count:
            read += self.socket.recv(count - len(read))
        return read
