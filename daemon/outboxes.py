"""What waits for peers that read slowly, bounded for each of them and for all together. Pure; `channel` sends it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

MESSAGE_NBYTES: Final = 150  # what a message takes besides its bytes

Frames = list[bytes]


@dataclass(frozen=True)
class Limits:
    """How much may wait for one peer that does not read, or for all; and how much of what it says, while we do not."""

    nbytes: int = 4_000_000
    messages: int = 4_000
    unheard: int = 32  # messages that ZeroMQ takes from one peer before we have heard them; then the peer waits
    total: int = 64_000_000


@dataclass
class _Outbox:
    messages: deque[Frames] = field(default_factory=deque)
    nbytes: int = 0


class Outboxes:
    """One for each peer that something waits for, in order."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._outboxes: dict[bytes, _Outbox] = {}
        self._nbytes = 0

    def __contains__(self, peer: bytes) -> bool:
        return peer in self._outboxes

    def __iter__(self) -> Iterator[bytes]:
        """The peers, who may be dropped meanwhile."""
        return iter(tuple(self._outboxes))

    def __len__(self) -> int:
        return len(self._outboxes)

    @property
    def nbytes(self) -> int:
        """What waits for all of them together."""
        return self._nbytes

    def push(self, peer: bytes, frames: Frames) -> list[bytes]:
        """Have a message wait. The peers who read too slowly for that, for whom nothing waits any more.

        That is this one, if it is beyond its own limit; beyond that of all, those for whom most waits.
        """
        outbox = self._outboxes.setdefault(peer, _Outbox())
        outbox.messages.append(frames)
        outbox.nbytes += _nbytes(frames)
        self._nbytes += _nbytes(frames)
        slow = []
        if outbox.nbytes > self._limits.nbytes or len(outbox.messages) > self._limits.messages:
            slow.append(peer)
            self.drop(peer)
        while self._nbytes > self._limits.total:
            slow.append(max(self._outboxes, key=lambda other: self._outboxes[other].nbytes))
            self.drop(slow[-1])
        return slow

    def first(self, peer: bytes) -> Frames | None:
        """What is to be sent to this peer now, if anything."""
        outbox = self._outboxes.get(peer)
        return outbox.messages[0] if outbox else None

    def pop(self, peer: bytes) -> None:
        """The first message is sent."""
        outbox = self._outboxes[peer]
        nbytes = _nbytes(outbox.messages.popleft())
        outbox.nbytes -= nbytes
        self._nbytes -= nbytes
        if not outbox.messages:
            del self._outboxes[peer]

    def drop(self, peer: bytes) -> None:
        """Forget what waits for this peer, if anything does."""
        outbox = self._outboxes.pop(peer, None)
        if outbox:
            self._nbytes -= outbox.nbytes

    def check_integrity(self) -> None:
        """Raises `AssertionError` when the sums are wrong: a bug of ours."""
        for outbox in self._outboxes.values():
            assert outbox.messages
            assert outbox.nbytes == sum(map(_nbytes, outbox.messages))
        assert self._nbytes == sum(outbox.nbytes for outbox in self._outboxes.values())


def _nbytes(frames: Frames) -> int:
    return MESSAGE_NBYTES + sum(map(len, frames))
