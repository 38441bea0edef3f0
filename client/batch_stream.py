"""A batch while its results arrive, for a thread that waits and for coroutines. What is sent when is in `batch`."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self

import msgspec

from ..formats.messages import TERMINAL, Generate
from .batch import BatchResult, BatchSummary, Plan
from .channel import Channel
from .exchange import Reply
from .loop import loop_sink

_Heard = tuple[int, Reply]


class _Batch:
    """What both have in common: everything but waiting."""

    def __init__(
        self,
        channel: Channel,
        plan: Plan,
        on_progress: Callable[[BatchSummary], None] | None,
        put: Callable[[_Heard], None],
    ) -> None:
        self._channel = channel
        self._plan = plan
        self._on_progress = on_progress
        self._put = put
        self._ids: dict[int, int] = {}
        self._results: deque[BatchResult] = deque()

    @property
    def summary(self) -> BatchSummary:
        """The batch so far; after its end, all of it."""
        return self._plan.summary

    def __del__(self) -> None:
        if hasattr(self, "_results"):
            self._give_up()

    def _send(self) -> float:
        """Send what is due; for how many seconds nothing else will be, if it is not until a reply."""
        pause = self._plan.pause()
        if not pause:
            for index, message in self._plan.take():
                self._ids[index] = self._channel.open(_with_id(message), _sink(self._put, index))
        return pause

    def _hear(self, heard: _Heard) -> None:
        index, reply = heard
        if index not in self._ids:  # given up
            return
        if isinstance(reply, TERMINAL):
            del self._ids[index]
        for result in self._plan.hear(index, reply):
            self._results.append(result)
            if self._on_progress:
                self._on_progress(self._plan.summary)

    def _give_up(self) -> None:
        for id_ in self._ids.values():
            self._channel.cancel(id_)
        self._ids.clear()
        self._results.clear()
        self._plan.give_up()


def _with_id(message: Generate) -> Callable[[int], Generate]:
    return lambda id_: msgspec.structs.replace(message, id=id_)


def _sink(put: Callable[[_Heard], None], index: int) -> Callable[[Reply], None]:
    """Apart from the batch, so that one that is forgotten is not kept alive by its channel."""
    return lambda reply: put((index, reply))


class BatchStream(_Batch):
    """Results as they end, in no order; iterating raises nothing that befell one text: that is in its result.

    Leaving its `with` block, `close()`, Ctrl-C and being forgotten cancel what has not ended.
    """

    def __init__(
        self,
        channel: Channel,
        plan: Plan,
        on_progress: Callable[[BatchSummary], None] | None,
    ) -> None:
        self._replies: SimpleQueue[_Heard] = SimpleQueue()
        super().__init__(channel, plan, on_progress, self._replies.put)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> BatchResult:
        try:
            while not self._results and not self._plan.ended:
                self._step()
        except BaseException:  # whoever interrupts may have taken a reply that would be waited for for ever
            self._give_up()
            raise
        if self._results:
            return self._results.popleft()
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_up()

    def close(self) -> None:
        """Cancel what has not ended, and iterate no further. Idempotent."""
        self._give_up()

    def _step(self) -> None:
        pause = self._send()
        try:
            heard = self._replies.get(timeout=pause or None)
        except Empty:
            return
        self._hear(heard)  # outside: what `on_progress` raises is not ours
        while not self._replies.empty():
            self._hear(self._replies.get())


class AsyncBatchStream(_Batch):
    """Results as they end, in no order; iterating raises nothing that befell one text: that is in its result.

    Leaving its `async with` block, `aclose()`, being cancelled and being forgotten cancel what has not ended.
    """

    def __init__(
        self,
        channel: Channel,
        plan: Plan,
        on_progress: Callable[[BatchSummary], None] | None,
    ) -> None:
        self._replies: asyncio.Queue[_Heard] = asyncio.Queue()
        super().__init__(channel, plan, on_progress, loop_sink(self._replies))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> BatchResult:
        try:
            while not self._results and not self._plan.ended:
                await self._step()
        except BaseException:
            self._give_up()
            raise
        if self._results:
            return self._results.popleft()
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

    async def _step(self) -> None:
        pause = self._send()
        try:
            async with asyncio.timeout(pause or None):
                heard = await self._replies.get()
        except TimeoutError:
            return
        self._hear(heard)
        while not self._replies.empty():
            self._hear(self._replies.get_nowait())
