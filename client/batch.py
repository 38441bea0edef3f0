"""What of a batch to ask for next, and what its replies mean. Pure: who sends and waits is in `batch_stream`.

Sorted, texts with a common beginning are neighbours: the order in which a trie of them is walked, depth first. The
engine's queue knows of all that is open, so a window of neighbours is enough for it to compute each prefix once, and
what was computed can be forgotten when the window has moved on.

What may succeed later is tried again. One text may be what kills each worker that meets it; so that its neighbours do
not fail with it, the window closes with each failure, and a text's last attempt is made alone.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from ..formats.errors import (
    DaemonGone,
    DeadlineExceeded,
    EbbflowError,
    InternalError,
    InvalidRequest,
    NotAllowed,
    UnsupportedVersion,
    from_wire,
)
from ..formats.messages import OPEN_PER_CLIENT, Chunk, Failed, Finished, Generate, Progress, Started
from .exchange import Reply
from .prompts import GenerateOptions, Text, contents, request

WINDOW: Final = 256
WINDOW_MOST: Final = OPEN_PER_CLIENT - 64  # the rest is for what else this client asks
WINDOW_NBYTES: Final = 8_000_000  # of text; the daemon takes 16 MB from one client
ID_NBYTES: Final = 40  # of a token's id, as the daemon counts it
PRIORITY: Final = -1
ATTEMPTS: Final = 6
FIRST_WAIT_SECONDS: Final = 0.5  # doubled with each failure in a row
LONGEST_WAIT_SECONDS: Final = 8.0

_COUNTED: Final = ("ended", "failures", "retries", "tokens", "prompt_tokens", "reused", "shareable")
_FOR_ALL: Final = (DaemonGone, NotAllowed, UnsupportedVersion)  # what befalls one befalls those not sent yet, too


@dataclass(frozen=True)
class BatchText:
    """A text with options of its own, which win over those of its batch."""

    text: Text
    options: GenerateOptions = field(default_factory=GenerateOptions)


@dataclass(frozen=True)
class BatchResult:
    """What became of the text with that number (from 0): its answer and how it ended, or an error, never both."""

    index: int
    text: str | None = None
    finished: Finished | None = None
    error: EbbflowError | None = None
    attempts: int = 1


@dataclass(frozen=True)
class BatchSummary:
    """A batch so far. Of `prompt_tokens`, `reused` had been computed before, and `shareable` could have been at best.

    `ended` texts have their result, `failures` of them an error; `retries` were needed.
    """

    prompts: int
    ended: int = 0
    failures: int = 0
    retries: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    reused: int = 0
    shareable: int = 0
    seconds: float = 0.0


class Plan:
    """All texts of a batch. Raises `InvalidRequest`, with the text's number, for one that cannot be asked for."""

    def __init__(
        self,
        model: str,
        texts: Iterable[Text | BatchText],
        options: GenerateOptions,
        window: int = WINDOW,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 1 <= window <= WINDOW_MOST:
            raise InvalidRequest(f"a window is 1 to {WINDOW_MOST} requests, not {window!r}")
        self._requests = [_request(model, index, text, options) for index, text in enumerate(texts)]
        self._order = sorted(range(len(self._requests)), key=lambda index: _key(self._requests[index]))
        self._line = list(range(len(self._order)))  # places in that order: a heap, so that what is repeated goes first
        self._place = {index: place for place, index in enumerate(self._order)}
        self._attempts = [0] * len(self._requests)
        self._open: dict[int, int] = {}  # which, and in what round it was sent
        self._nbytes = 0
        self._window = self._room = window
        self._round = self._in_a_row = 0
        self._failed_now = False
        self._pause_ends: float | None = None
        self._parts: dict[int, list[str]] = {}
        self._clock = clock
        self._began: float | None = None
        self._ended_at: float | None = None
        self._sums = dict.fromkeys(_COUNTED, 0)

    @property
    def ended(self) -> bool:
        """Whether every text has its result."""
        return not self._line and not self._open

    @property
    def summary(self) -> BatchSummary:
        """The batch so far; after its end, all of it."""
        seconds = 0.0 if self._began is None else (self._ended_at or self._clock()) - self._began
        return BatchSummary(len(self._requests), **self._sums, seconds=seconds)

    def pause(self) -> float:
        """Seconds until more may be sent, because something failed that may succeed later; what is open goes on."""
        if self._failed_now:
            self._failed_now = False
            self._round += 1
            self._room = max(1, self._room // 4)
            seconds = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0**self._in_a_row)
            self._in_a_row += 1
            self._pause_ends = self._clock() + seconds
            return seconds
        if self._pause_ends is None:
            return 0.0
        seconds = max(0.0, self._pause_ends - self._clock())
        self._pause_ends = self._pause_ends if seconds else None
        return seconds

    def take(self) -> Iterator[tuple[int, Generate]]:
        """What to send now: the texts' numbers, and requests without ids. At least one, where nothing is open."""
        if self._began is None:
            self._began = self._clock()
        while self._line and self._has_room(self._order[self._line[0]]):
            index = self._order[heapq.heappop(self._line)]
            self._attempts[index] += 1
            self._open[index] = self._round
            self._nbytes += _nbytes(self._requests[index])
            self._parts[index] = []
            yield index, self._requests[index]

    def hear(self, index: int, reply: Reply) -> list[BatchResult]:
        """Take a reply; the results that it is: none, one, or with a daemon that is gone one for all that is left."""
        match reply:
            case Chunk():
                self._parts[index].append(reply.text)
                return []
            case Started() | Progress():
                return []
            case Finished():
                text, _ = self._close(index)
                self._room, self._in_a_row = min(self._window, self._room + 1), 0
                return [self._result(index, text=text, finished=reply)]
            case Failed():
                _, sent = self._close(index)
                return self._failed(index, sent, from_wire(reply.code, reply.message))
            case _:
                self._close(index)
                return [self._result(index, error=InternalError(f"the daemon answered {type(reply).__name__}"))]

    def give_up(self) -> None:
        """Send nothing more and hear of nothing more."""
        self._line.clear()
        self._open.clear()
        self._ended_at = self._ended_at or self._clock()

    def _has_room(self, index: int) -> bool:
        if not self._open:
            return True
        if self._attempts[index] == ATTEMPTS - 1 or any(self._attempts[other] == ATTEMPTS for other in self._open):
            return False  # the last attempt is made alone
        return len(self._open) < self._room and self._nbytes + _nbytes(self._requests[index]) <= WINDOW_NBYTES

    def _close(self, index: int) -> tuple[str, int]:
        """What came of it, and in what round it was sent."""
        self._nbytes -= _nbytes(self._requests[index])
        return "".join(self._parts.pop(index)), self._open.pop(index)

    def _failed(self, index: int, sent: int, error: EbbflowError) -> list[BatchResult]:
        if isinstance(error, _FOR_ALL):
            left = [self._order[place] for place in sorted(self._line)]
            self._line.clear()
            return [self._result(other, error=error) for other in (index, *left)]
        hopeless = not error.retryable or isinstance(error, DeadlineExceeded)
        if hopeless or self._attempts[index] == ATTEMPTS:
            return [self._result(index, error=error)]
        heapq.heappush(self._line, self._place[index])
        self._sums["retries"] += 1
        self._failed_now = self._failed_now or sent == self._round
        return []

    def _result(
        self, index: int, text: str | None = None, finished: Finished | None = None, error: EbbflowError | None = None
    ) -> BatchResult:
        self._sums["ended"] += 1
        self._sums["failures"] += error is not None
        if finished:
            self._sums["tokens"] += finished.tokens
            self._sums["prompt_tokens"] += finished.prompt_tokens
            self._sums["reused"] += finished.reused_tokens
            self._sums["shareable"] += finished.shareable_tokens
        if self._sums["ended"] == len(self._requests):
            self._ended_at = self._clock()
        return BatchResult(index, text, finished, error, self._attempts[index])


def _request(model: str, index: int, text: Text | BatchText, options: GenerateOptions) -> Generate:
    given = text if isinstance(text, BatchText) else BatchText(text)
    try:
        return request(model, contents(given.text), {"priority": PRIORITY, **options, **given.options})
    except InvalidRequest as error:
        raise type(error)(f"text {index}: {error}") from error


def _key(message: Generate) -> tuple[Any, ...]:
    """Sorted by this, requests with a common beginning are neighbours, if they may share it at all."""
    turns = tuple((turn.role, turn.content) for turn in message.chat or ())
    return message.namespace, message.prompt or "", message.ids or (), turns


def _nbytes(message: Generate) -> int:
    """Of text, as the daemon will count it; not less."""
    texts = [message.prompt or "", *message.sampling.stop]
    texts += [text for turn in message.chat or () for text in (turn.role, turn.content)]
    return sum(len(text) * (1 if text.isascii() else 4) + 80 for text in texts) + ID_NBYTES * len(message.ids or ())
