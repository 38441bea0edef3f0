"""The sequences that wait, and which of them is next. Pure.

Next is: higher priority, then whoever was overtaken `OVERTAKEN_MOST` times (by a group that shares a prefix, once: else
no group could stay together), then clients with fewer running sequences, earlier deadlines, longer prefixes that are
there already, earlier arrival. One whose next block is about to be computed by a running one (its leader) waits for
that; and while more siblings of a leader wait than can run, no other prefix is begun, so that memory holds few prefixes
and each is computed once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from .prefixes import Node, Prefixes
from .sequences import Sequence

OVERTAKEN_MOST: Final = 16  # times, where SIBLINGS that reuse what is computed count as one
SIBLINGS: Final = 16


@dataclass(frozen=True)
class Policy:
    """What is done for prefixes. Without any of it: first come, first served, and the longest unused goes first.

    `longest_first`: order waiting sequences by what of them is there. `gate`: let siblings wait for their leader.
    `wanted`: keep what waiting sequences will read.
    """

    longest_first: bool = True
    gate: bool = True
    wanted: bool = True


class Waiting:
    """Waiting sequences, by arrival; `changes` counts what came and went."""

    def __init__(self, prefixes: Prefixes, policy: Policy) -> None:
        self.sequences: dict[int, Sequence] = {}
        self.changes = 0
        self._prefixes, self._policy = prefixes, policy
        self._band, self._depth = 0, 0
        self._priorities: Counter[int] = Counter()

    @property
    def highest(self) -> int:
        """The highest priority of those that wait; there must be one."""
        return max(self._priorities)

    def set_quality(self, band: int, depth: int) -> None:
        """Blocks of a lower band, or for some of another depth, are as if they were not there."""
        self._band, self._depth = band, depth

    def add(self, sequence: Sequence) -> int:
        """Put it among those that wait; how many of its blocks somebody has, computes or waits for already."""
        sequence.path, known = self._prefixes.want(sequence.namespace, sequence.tokens)
        sequence.matched, sequence.version = 0, -1
        self.sequences[sequence.arrival] = sequence
        self.changes += 1
        self._priorities[sequence.priority] += 1
        return known

    def remove(self, sequence: Sequence) -> None:
        """It starts, or is over."""
        self._prefixes.unwant(sequence.path)
        del self.sequences[sequence.arrival]
        self.changes += 1
        self._priorities[sequence.priority] -= 1
        if not self._priorities[sequence.priority]:
            del self._priorities[sequence.priority]

    def _usable(self, node: Node, sequence: Sequence) -> bool:
        if node.block < 0:
            return False
        return node.depth == self._depth if sequence.exact else node.band >= self._band

    def _match(self, sequence: Sequence) -> bool:
        """Count the blocks that are there; whether somebody is about to compute the next."""
        path, at = sequence.path, sequence.matched
        if sequence.version != self._prefixes.version:
            sequence.version = self._prefixes.version
            if sequence.exact:
                at = 0
            while at and not self._usable(path[at - 1], sequence):  # none is better than those above it
                at -= 1
        while at < len(path) and self._usable(path[at], sequence):
            at += 1
        sequence.matched = at
        return self._policy.gate and at < len(path) and path[at].leader is not None

    def next(self, free: int, owners: Mapping[int, int]) -> Sequence | None:
        """Who is to be admitted next, if somebody is; `free` places are left, and `owners` says whose sequences run."""
        best: Sequence | None = None
        best_key: tuple[float, ...] = ()
        gated: Counter[tuple[int, int]] = Counter()
        for sequence in self.sequences.values():
            held_back = self._match(sequence)
            overtaken = sequence.overtaken >= OVERTAKEN_MOST * SIBLINGS
            if held_back:
                gated[sequence.priority, sequence.owner] += 1
                if not overtaken:
                    continue
            key: tuple[float, ...] = (-sequence.priority, not overtaken, sequence.arrival)
            if self._policy.longest_first and not overtaken:
                here = (owners.get(sequence.owner, 0), sequence.deadline, -sequence.matched)
                key = (-sequence.priority, True, *here, sequence.arrival)
            if best is None or key < best_key:
                best, best_key = sequence, key
        if best is None or best.overtaken >= OVERTAKEN_MOST * SIBLINGS:
            return None if best is None or self._match(best) else best
        leads = best.matched < len(best.path) and best.path[best.matched].wanted > 1
        if leads and gated[best.priority, best.owner] >= max(free, 1):
            return None  # those that wait for a leader will fill what is free
        return best

    def overtake(self, sequence: Sequence) -> None:
        """It starts: others that came before it were overtaken."""
        parts = 1 if sequence.matched else SIBLINGS
        for other in self.sequences.values():
            if other.arrival < sequence.arrival and other.priority >= sequence.priority:
                other.overtaken += parts

    def reason(self, sequence: Sequence, missed: Node | None) -> str:
        """Why not more of a prompt was there."""
        if missed is None:
            return "" if sequence.path else "short"
        if missed.block >= 0:
            return "size" if sequence.exact else "quality"
        return "evicted" if missed.lost else "new"

    def check_integrity(self) -> None:
        """Raises `AssertionError` when what is counted is not so."""
        assert not any(s.blocks or s.nodes for s in self.sequences.values())
        assert self._priorities == Counter(s.priority for s in self.sequences.values())
