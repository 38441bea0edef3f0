"""An answer while it arrives, for a thread that waits and for coroutines. What replies mean is in `asks`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, Self

from ..formats.messages import TERMINAL, Finished, Progress
from ..formats.values import ModelSummary
from .asks import Ask, Piece, Reader, Result
from .channel import Channel
from .exchange import Reply, Sink
from .loop import loop_sink


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


class _Answer(Generic[Piece, Result]):
    """What both have in common: everything but waiting."""

    def __init__(self, channel: Channel, ask: Ask[Piece, Result], sink: Sink) -> None:
        self._reader = Reader(ask)
        self._channel = channel
        self._id = channel.open(ask.request, sink)

    def __del__(self) -> None:
        if hasattr(self, "_id"):
            self._give_up()

    def cancel(self) -> None:
        """Ask for the end and keep reading: iteration then raises `Cancelled`, unless the answer was complete."""
        self._channel.cancel(self._id)

    def _give_up(self) -> None:
        if not self._reader.ended:
            self._reader.ended = True
            self.cancel()


class _Text(_Answer[str, Finished]):
    """What is known of generated text beside its pieces."""

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
        """How generation ended; `None` before that, and after an error or one's own end."""
        return self._reader.result


class Stream(_Answer[Piece, Result]):
    """Pieces of one answer, in order; iterating raises the typed error with which the request ended, if it did.

    Leaving its `with` block, `close()` and being forgotten cancel a request that has not ended.
    """

    def __init__(self, channel: Channel, ask: Ask[Piece, Result]) -> None:
        self._replies = _Replies()
        super().__init__(channel, ask, self._replies.put)

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

    def cancel(self) -> None:
        """Ask for the end and keep reading: iteration then raises `Cancelled`, unless the answer was complete."""
        super().cancel()
        self._replies.repeat_last()

    def close(self) -> None:
        """Cancel what has not ended, and iterate no further. Idempotent."""
        self._give_up()

    def wait(self) -> Result:
        """Read to the end and return the result. Raises like iterating; `Cancelled` after `close()`."""
        with self:
            for _ in self:
                pass
        return self._reader.outcome()


class TextStream(Stream[str, Finished], _Text):
    """Pieces of generated text."""

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


class AsyncStream(_Answer[Piece, Result]):
    """Pieces of one answer, in order; iterating raises the typed error with which the request ended, if it did.

    Leaving its `async with` block, `aclose()` and being forgotten cancel a request that has not ended.
    """

    def __init__(self, channel: Channel, ask: Ask[Piece, Result]) -> None:
        self._replies: asyncio.Queue[Reply] = asyncio.Queue()
        super().__init__(channel, ask, loop_sink(self._replies))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        while not self._reader.ended:
            piece = self._reader.read(await self._replies.get())
            if piece is not None:
                return piece
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_up()

    async def aclose(self) -> None:
        """Cancel what has not ended, and iterate no further. Idempotent."""
        self._give_up()

    async def wait(self) -> Result:
        """Read to the end and return the result. Raises like iterating; `Cancelled` after `aclose()`."""
        async with self:
            async for _ in self:
                pass
        return self._reader.outcome()


class AsyncTextStream(AsyncStream[str, Finished], _Text):
    """Pieces of generated text."""

    async def text(self) -> str:
        """All the text that has not been read yet. Raises like iterating."""
        async with self:
            return "".join([piece async for piece in self])


class AsyncProgressStream(AsyncStream[Progress, ModelSummary]):
    """How far an `add` is."""

    async def result(self) -> ModelSummary:
        """Wait for the end and return the new model. Raises like iterating; `Cancelled` after `aclose()`."""
        return await self.wait()
