"""Which tokens the next step computes. Pure: no clock, no arrays, no sockets.

First version: first come, first served admission by KV blocks (a sequence reserves what it may need at most), then all
decodes and, with what is left of the step's token limit, pieces of prompts. When even the decodes do not fit, they take
turns. The prefix-aware scheduler of a later issue replaces the inside and keeps this interface.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from ...formats.errors import TooBusy
from .kv import MAX_SEQUENCES, blocks_for

MAX_WAITING = 1024


class Blocks(Protocol):
    """Where KV blocks come from."""

    @property
    def available(self) -> int:
        """Blocks that can be allocated now."""
        ...

    def allocate(self, count: int) -> tuple[int, ...]:
        """Take blocks."""
        ...

    def free(self, blocks: tuple[int, ...]) -> None:
        """Give blocks back."""
        ...


@dataclass(eq=False)
class Sequence:
    """One request's tokens: prompt and what was generated. `computed` of them have keys and values."""

    key: int
    tokens: list[int]
    limit: int  # tokens at most, prompt included
    computed: int = 0
    blocks: tuple[int, ...] = ()

    @property
    def pending(self) -> int:
        """Tokens not computed yet; 1 means the sequence is decoding."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True)
class Piece:
    """Compute tokens `[start, start + count)` of a sequence; if that is its end, sample the next."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the piece reaches the end of what is known."""
        return self.start + self.count == len(self.sequence.tokens)


@dataclass
class Scheduler:
    """Waiting and running sequences over one pool of KV blocks."""

    pool: Blocks
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self.waiting or self.running)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises `TooBusy` when the queue is full."""
        if len(self.waiting) >= MAX_WAITING:
            raise TooBusy(f"{MAX_WAITING} requests are waiting already; try again later")
        self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Start waiting sequences, in order, while there is room; returns those started."""
        started: list[Sequence] = []
        while self.waiting and len(self.running) < MAX_SEQUENCES:
            need = blocks_for(self.waiting[0].limit)
            if need > self.pool.available:
                break
            sequence = self.waiting.popleft()
            sequence.blocks = self.pool.allocate(need)
            self.running.append(sequence)
            started.append(sequence)
        return started

    def plan(self, limit: int) -> list[Piece]:
        """The next step's pieces, at most `limit` (>= 1) tokens in all; those left out come first next time."""
        prefilling = [s for s in self.running if s.pending > 1]
        decoding = [s for s in self.running if s.pending == 1]
        share = 0
        if prefilling:
            share = max(1, limit // 4) if limit > 1 else int(self.running[0].pending > 1)
        pieces = [Piece(s, s.computed, 1) for s in decoding[: limit - share]]
        left = limit - len(pieces)
        for sequence in prefilling:
            count = min(left, sequence.pending)
            if count:
                pieces.append(Piece(sequence, sequence.computed, count))
                left -= count
        served = {id(piece.sequence) for piece in pieces}
        self.running.sort(key=lambda s: id(s) in served)  # stable: those left out move to the front
        return pieces

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, waiting or running, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.pool.free(sequence.blocks)
        sequence.blocks = ()

    def check_integrity(self) -> None:
        """Raises `AssertionError` when two sequences hold one block, or a waiting one holds any."""
        held = [block for s in self.running for block in s.blocks]
        assert len(set(held)) == len(held)
        assert not any(s.blocks for s in self.waiting)
