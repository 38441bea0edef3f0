"""Telling systemd how we are: sd_notify(3), which is a datagram to `$NOTIFY_SOCKET`. Elsewhere nothing happens.

The one package that does this (`sdnotify`) has not been touched since 2017 and lacks what a reload needs.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from typing import Final

SOCKET: Final = "NOTIFY_SOCKET"
WATCHDOG: Final = ("WATCHDOG_USEC", "WATCHDOG_PID")


class Notifier:
    """Speaks for the process `pid`. No method raises or blocks: what cannot be told is not told."""

    def __init__(self, environment: Mapping[str, str] = os.environ, pid: int | None = None) -> None:
        name = environment.get(SOCKET, "")
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self._every = _period(environment, os.getpid() if pid is None else pid)
        self._fed = float("-inf")

    @property
    def watchdog_seconds(self) -> float | None:
        """How often the watchdog wants to be fed at least; nothing without one."""
        return self._every

    def ready(self, status: str) -> None:
        """It serves (again)."""
        self._tell(f"READY=1\nSTATUS={_line(status)}")

    def status(self, status: str) -> None:
        """What `systemctl status` shows."""
        self._tell(f"STATUS={_line(status)}")

    def reloading(self, monotonic_seconds: float) -> None:
        """It reads its configuration again; `ready` follows."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={round(monotonic_seconds * 1e6)}")

    def stopping(self, seconds: float) -> None:
        """It ends, and will need up to so long for that."""
        self._tell(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def feed(self, now: float) -> None:
        """The loop turned; told at most as often as the watchdog wants to hear it."""
        if self._every is not None and now - self._fed >= self._every / 2:
            self._fed = now
            self._tell("WATCHDOG=1")

    def _tell(self, message: str) -> None:
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
            line.setblocking(False)
            line.sendto(message.encode(), self._address)


def forget() -> None:
    """Take the variables out of the environment, so that no child speaks for us."""
    for name in (SOCKET, *WATCHDOG):
        os.environ.pop(name, None)


def _period(environment: Mapping[str, str], pid: int) -> float | None:
    """Half of the time after which systemd loses patience."""
    usec, whose = (environment.get(name, "") for name in WATCHDOG)
    if not usec.isdecimal() or int(usec) == 0 or whose not in ("", str(pid)):
        return None
    return int(usec) / 1e6 / 2


def _line(text: str) -> str:
    return " ".join(text.split())
