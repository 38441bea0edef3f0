"""An answer while it arrives, for a thread that waits. `aio` has the same for coroutines."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, Self

from ..formats.messages import TERMINAL, Finished, Progress
from ..formats.values import ModelSummary
from .asks import Ask, Piece, Reader, Result
from .channel import Channel
from .exchange import Reply


class _Replies:
    """What has arrived, in order. Apart from `Stream`, so that a forgotten stream is not kept alive by its channel."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Reply] = SimpleQueue()
        self._last: Reply | None = None
        self.get = self._queue.get

    def put(self, reply: Reply) -> None:
        if isinstance(reply, TERMINAL):
            self._last = reply
        self._queue.put(reply)

    def repeat_last(self) -> None:
        """Ctrl-C may take a reply out of the reader's hands: the one that it would wait for then comes again."""
        if self._last is not None:
            self._queue.put(self._last)


class Stream(Generic[Piece, Result]):
    """Pieces of one answer, in order; iterating raises the typed error with which the request ended, if it did.

    Leaving its `with` block, `close()` and being forgotten cancel a request that has not ended.
    """

    def __init__(self, channel: Channel, ask: Ask[Piece, Result]) -> None:
        self._replies = _Replies()
        self._reader = Reader(ask)
        self._channel = channel
        self._id = channel.open(ask.request, self._replies.put)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        while not self._reader.ended:
            piece = self._reader.read(self._replies.get())
            if piece is not None:
                return piece
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_id"):
            self.close()

    def cancel(self) -> None:
        """Ask for the end and keep reading: iteration then raises `Cancelled`, unless the answer was complete."""
        self._channel.cancel(self._id)
        self._replies.repeat_last()

    def close(self) -> None:
        """Cancel what has not ended, and iterate no further. Idempotent."""
        if not self._reader.ended:
            self._reader.ended = True
            self.cancel()

    def wait(self) -> Result:
        """Read to the end and return the result. Raises like iterating; `Cancelled` after `close()`."""
        with self:
            for _ in self:
                pass
        return self._reader.outcome()


class TextStream(Stream[str, Finished]):
    """Pieces of generated text."""

    def on_progress(self, notify: Callable[[Progress], None]) -> None:
        """Have `notify` called, while this is iterated, when the answer has to wait for something out of the ordinary:
        kernels that are compiled at the first start, a worker that died. `stage` says what.
        """
        self._reader.notify = notify

    @property
    def prompt_tokens(self) -> int | None:
        """Tokens of the prompt, once the request was admitted."""
        return self._reader.started.prompt_tokens if self._reader.started else None

    @property
    def result(self) -> Finished | None:
        """How generation ended; `None` before that, and after an error or `close()`."""
        return self._reader.result

    def text(self) -> str:
        """All the text that has not been read yet. Raises like iterating."""
        with self:
            return "".join(self)


class ProgressStream(Stream[Progress, ModelSummary]):
    """How far an `add` is."""

    def result(self) -> ModelSummary:
        """Wait for the end and return the new model. Raises like iterating; `Cancelled` after `close()`."""
        return self.wait()


def answer(channel: Channel, ask: Ask[Piece, Result]) -> Result:
    """Ask, wait and return the result. Raises the typed error with which the request ended."""
    return Stream(channel, ask).wait()
