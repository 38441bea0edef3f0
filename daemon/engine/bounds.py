"""Running what came with a model, and may be hostile, for a bounded time and in bounded memory.

Used for chat templates, which are programs. Their sandbox keeps them from reaching out, not from looping or growing.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

AGAIN_SECONDS: Final = 0.05  # should something swallow the interruption
_STATM: Final = Path("/proc/self/statm")


class TookTooLong(BaseException):
    """Not an `Exception`, so that nothing inside that goes on after any error goes on after this one."""


@contextlib.contextmanager
def bounded(seconds: float, nbytes: int) -> Iterator[None]:
    """Raises `TookTooLong` in the block after so much processor time, and `MemoryError` beyond so many more bytes.

    The time is kept in the main thread only, the only one that Python can interrupt; the memory where /proc is.
    """
    with _memory(nbytes), _time(seconds):
        yield


@contextlib.contextmanager
def _time(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGPROF, _interrupt)
    try:
        try:
            signal.setitimer(signal.ITIMER_PROF, seconds, AGAIN_SECONDS)
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    finally:  # twice: the last interruption may have come just before the timer was stopped
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _memory(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        limit = int(_STATM.read_text().split()[0]) * resource.getpagesize() + nbytes
    except OSError:
        yield
        return
    known = [given for given in (soft, hard) if given != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([limit, *known]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _interrupt(_number: int, _frame: object) -> None:
    raise TookTooLong
