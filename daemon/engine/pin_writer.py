"""The thread that writes pins' files, one after the other. Nobody waits for it, not even the process's end.

What it has in hand then stays behind as a partial file, which goes when the model is loaded again (`pins`). An executor
of the standard library would be joined at the end, however slow the disk is.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue

_Work = tuple[Future[None], Callable[[], None]]


class PinWriter:
    """Calls what is submitted, in that order, in a thread that begins with the first of it."""

    def __init__(self) -> None:
        self._work: SimpleQueue[_Work | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, write: Callable[[], None]) -> Future[None]:
        """Have that called. Raises `RuntimeError` when the system gives no thread; it will then not be called."""
        if self._thread is None:
            thread = threading.Thread(target=_run, args=(self._work,), name="pins", daemon=True)
            thread.start()
            self._thread = thread
        written: Future[None] = Future()
        self._work.put((written, write))
        return written

    def close(self) -> None:
        """Cancel what has not begun; the thread ends after what it has in hand."""
        with contextlib.suppress(Empty):
            while work := self._work.get_nowait():
                work[0].cancel()
        self._work.put(None)

    def join(self) -> None:
        """Wait for the end of a closed one."""
        if self._thread is not None:
            self._thread.join()


def _run(queue: SimpleQueue[_Work | None]) -> None:
    while work := queue.get():
        written, write = work
        if written.set_running_or_notify_cancel():
            try:
                write()
            except BaseException as error:  # noqa: BLE001 - whoever holds the future is told
                written.set_exception(error)
            else:
                written.set_result(None)
        del work, written, write  # and with them the blocks, which would stay until the next comes
