"""The sequences that wait, and which of them is next. Pure.

Next is: higher priority, then whoever was overtaken `OVERTAKEN_MOST` times (by a group that shares a prefix, once: else
no group could stay together), then clients with fewer running sequences, earlier deadlines, longer prefixes that are
there already, earlier arrival. One whose next block is about to be computed by a running one (its leader) waits for
that; and while more siblings of a leader wait than can run, no other prefix is begun, so that memory holds few prefixes
and each is computed once.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from .prefixes import Node, Prefixes
from .sequences import Sequence

OVERTAKEN_MOST: Final = 16  # times, where SIBLINGS that reuse what is computed count as one
SIBLINGS: Final = 16

_Group = tuple[int, int]  # priority and owner
_Key = tuple[float, ...]  # how early a sequence stands in the line of its group; the last number is its arrival
K = TypeVar("K")


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
    """Waiting sequences, by arrival; `changes` counts what came and went.

    They are kept in the order in which they would start, so that thousands of them cost little: all are looked at anew
    only when something happened to a block that one of them wants (`Prefixes.news`).
    """

    def __init__(self, prefixes: Prefixes, policy: Policy) -> None:
        self.sequences: dict[int, Sequence] = {}
        self.changes = 0
        self._prefixes, self._policy = prefixes, policy
        self._band, self._depth = 0, 0
        self._priorities: Counter[int] = Counter()
        self._arrivals: list[int] = []  # in order, as all lists here
        self._news = -1  # up to which all that follows is true
        self._lines: dict[_Group, list[_Key]] = {}  # who may start; some may have to wait for a leader by now
        self._overdue: dict[int, list[_Key]] = {}  # by priority: those who were overtaken often enough
        self._before: dict[Node, Counter[_Group]] = {}  # those whose next block it is

    @property
    def highest(self) -> int:
        """The highest priority of those that wait; there must be one."""
        return max(self._priorities)

    def set_quality(self, band: int, depth: int) -> None:
        """Blocks of a lower band, or for some of another depth, are as if they were not there."""
        self._band, self._depth = band, depth
        self._prefixes.news += 1

    def add(self, sequence: Sequence) -> int:
        """Put it among those that wait; how many of its blocks somebody has, computes or waits for already."""
        sequence.path, known = self._prefixes.want(sequence.namespace, sequence.tokens)
        sequence.matched = 0
        self.sequences[sequence.arrival] = sequence
        insort(self._arrivals, sequence.arrival)
        self.changes += 1
        self._priorities[sequence.priority] += 1
        self._enter(sequence, insort)
        return known

    def remove(self, sequence: Sequence) -> None:
        """It is over."""
        self._leave(sequence)
        self._forget(sequence)

    def start(self, sequence: Sequence) -> None:
        """It runs from now on, and is about to compute what of its prompt nobody has or is about to."""
        self._leave(sequence)
        self._prefixes.lead(sequence.path[sequence.matched :], sequence)
        self._forget(sequence)
        self._overtake(sequence)

    def next(self, free: int, owners: Mapping[int, int]) -> Sequence | None:
        """Who is to be admitted next, if somebody is; `free` places are left, and `owners` says whose sequences run."""
        if self._news != self._prefixes.news:
            self._look_again()
        for priority in sorted(self._priorities, reverse=True):
            if overdue := self._overdue.get(priority):
                first = self.sequences[int(overdue[0][-1])]
                return None if self._is_held_back(first) else first
            heads = [
                (owners.get(owner, 0), *line[0])
                for (its, owner), line in self._lines.items()
                if its == priority and self._has_head(line)
            ]
            if heads:
                best = self.sequences[int(min(heads)[-1])]
                leads = best.matched < len(best.path) and best.path[best.matched].wanted > 1
                # those that wait for a leader will fill what is free
                return None if leads and self._held_back((priority, best.owner)) >= max(free, 1) else best
        return None

    def _look_again(self) -> None:
        """Something happened to blocks: put all where they belong now."""
        for kept in (self._lines, self._overdue, self._before):
            kept.clear()
        for sequence in self.sequences.values():
            self._enter(sequence, list.append)
        for line in (*self._lines.values(), *self._overdue.values()):
            line.sort()
        self._news = self._prefixes.news

    def _enter(self, sequence: Sequence, put: Callable[[list[_Key], _Key], None]) -> None:
        """Put it where it belongs."""
        self._match(sequence)
        group = sequence.priority, sequence.owner
        if sequence.matched < len(sequence.path):
            self._before.setdefault(sequence.path[sequence.matched], Counter())[group] += 1
        if _is_overdue(sequence):
            put(self._overdue.setdefault(sequence.priority, []), (sequence.arrival,))
        elif not self._is_held_back(sequence):
            line, key = self._place(sequence)
            put(self._lines.setdefault(line, []), key)

    def _leave(self, sequence: Sequence) -> None:
        """Take it from there."""
        group = sequence.priority, sequence.owner
        if sequence.matched < len(sequence.path):
            node = sequence.path[sequence.matched]
            counts = self._before[node]
            counts[group] -= 1
            if not any(counts.values()):
                del self._before[node]
        if _is_overdue(sequence):
            _take(self._overdue, sequence.priority, (sequence.arrival,))
        else:
            _take(self._lines, *self._place(sequence))

    def _place(self, sequence: Sequence) -> tuple[_Group, _Key]:
        """Its line, and where it stands in it."""
        if not self._policy.longest_first:
            return (sequence.priority, 0), (sequence.arrival,)
        return (sequence.priority, sequence.owner), (sequence.deadline, -sequence.matched, sequence.arrival)

    def _has_head(self, line: list[_Key]) -> bool:
        """Whether somebody in a line may start; its first does then."""
        held_back = 0
        while held_back < len(line) and self._is_held_back(self.sequences[int(line[held_back][-1])]):
            held_back += 1
        del line[:held_back]  # until there is news of their leader
        return bool(line)

    def _match(self, sequence: Sequence) -> None:
        """Count the blocks that are there."""
        path, at = sequence.path, 0 if sequence.exact else sequence.matched
        while at and not self._usable(path[at - 1], sequence):  # none is better than those above it
            at -= 1
        while at < len(path) and self._usable(path[at], sequence):
            at += 1
        sequence.matched = at

    def _usable(self, node: Node, sequence: Sequence) -> bool:
        if node.block < 0:
            return False
        return node.depth == self._depth if sequence.exact else node.band >= self._band

    def _held_back(self, group: _Group) -> int:
        """How many of a group wait for a leader."""
        led = (counts for node, counts in self._before.items() if self._policy.gate and node.leader is not None)
        return sum(counts[group] for counts in led)

    def _is_held_back(self, sequence: Sequence) -> bool:
        """Whether somebody is about to compute its next block."""
        path, at = sequence.path, sequence.matched
        return self._policy.gate and at < len(path) and path[at].leader is not None

    def _forget(self, sequence: Sequence) -> None:
        self._prefixes.unwant(sequence.path)
        del self.sequences[sequence.arrival]
        del self._arrivals[bisect_left(self._arrivals, sequence.arrival)]
        self.changes += 1
        self._priorities[sequence.priority] -= 1
        if not self._priorities[sequence.priority]:
            del self._priorities[sequence.priority]

    def _overtake(self, sequence: Sequence) -> None:
        """It starts: others that came before it were overtaken."""
        parts = 1 if sequence.matched else SIBLINGS
        for arrival in self._arrivals[: bisect_left(self._arrivals, sequence.arrival)]:
            other = self.sequences[arrival]
            if other.priority >= sequence.priority:
                before = _is_overdue(other)
                other.overtaken += parts
                if not before and _is_overdue(other):
                    _take(self._lines, *self._place(other))
                    insort(self._overdue.setdefault(other.priority, []), (arrival,))

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
        assert self._arrivals == sorted(self.sequences)
        if self._news == self._prefixes.news:
            waiting = self.sequences.values()
            overdue, held_back = [s for s in waiting if _is_overdue(s)], [s for s in waiting if self._is_held_back(s)]
            assert {key[-1] for line in self._overdue.values() for key in line} == {s.arrival for s in overdue}
            groups = Counter((s.priority, s.owner) for s in held_back)
            assert all(self._held_back(group) == groups[group] for group in {(s.priority, s.owner) for s in waiting})
            standing = {key[-1] for line in self._lines.values() for key in line}
            assert standing >= {s.arrival for s in waiting} - {s.arrival for s in (*overdue, *held_back)}
            next_blocks = Counter(s.path[s.matched] for s in waiting if s.matched < len(s.path))
            assert next_blocks == {node: sum(counts.values()) for node, counts in self._before.items()}


def _is_overdue(sequence: Sequence) -> bool:
    return sequence.overtaken >= OVERTAKEN_MOST * SIBLINGS


def _take(lines: dict[K, list[_Key]], line: K, key: _Key) -> None:
    """Take an entry from a line, if it is there, and the line if it was the last."""
    entries = lines.get(line, [])
    at = bisect_left(entries, key)
    if at < len(entries) and entries[at] == key:
        del entries[at]
    if not entries:
        lines.pop(line, None)
