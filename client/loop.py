"""From the channel's thread into an event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def loop_sink(queue: asyncio.Queue[T]) -> Callable[[T], None]:
    """What puts something into a queue of the running loop, from any thread."""
    loop = asyncio.get_running_loop()

    def put(item: T) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to read
            loop.call_soon_threadsafe(queue.put_nowait, item)

    return put
