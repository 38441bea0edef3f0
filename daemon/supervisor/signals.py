"""Signals as something the loop can wait for. What they mean is decided in `main`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Final

HEARD: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Inbox:
    """The signals that came since the last look; `descriptor` is readable when there are any."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def take(self) -> list[int]:
        """Their numbers, in order."""
        with contextlib.suppress(BlockingIOError):
            return [number for number in os.read(self.descriptor, 4096) if number in HEARD]
        return []


@contextlib.contextmanager
def caught() -> Iterator[Inbox]:
    """Until the end, the signals in `HEARD` do nothing but arrive in the inbox."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *_: None) for number in HEARD}
    try:
        yield Inbox(reader)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(reader)
        os.close(writer)


def hangup_means_reload(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether SIGHUP asks to reload (a service, or in the background) or says that our terminal was closed."""
    managed = "NOTIFY_SOCKET" in environment or "INVOCATION_ID" in environment
    return managed or sys.stdin is None or not sys.stdin.isatty()
