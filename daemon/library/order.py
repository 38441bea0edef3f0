"""Which block comes where in the stack. Pure: numbers in, positions out.

A prefix of the stack is what a machine can afford, so blocks are sorted by what a byte of them is worth. The base comes
first, in network order: level 0 of every tensor, without any of which the model is noise. Then, by rule:

    gain    most gain per byte first. Where a later level of a tensor is worth more per byte than an earlier one, which
            must precede it, the two are merged and weighed together (the upper convex hull of the tensor's
            bytes-to-gain curve); after that the greedy choice is the best prefix at every edge between groups.
    paper   all tensors at level b before any at b + 1 (BitStack, arXiv 2410.23918, section 3.3), and within a level
            most gain per byte first.

What a gain is, and how it is estimated, is in `gain`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from ...formats.architecture import Architecture, weight_shapes
from ...formats.container import padded
from ...formats.errors import Unsupported
from ...formats.index import BlockEntry, StackIndex

RULES: Final = ("gain", "paper")


@dataclass(frozen=True)
class Candidate:
    """A block to be placed: what it costs in the file, and the drop in expected KL (may be negative) it brings."""

    tensor: str
    level: int
    nbytes: int
    gain: float


@dataclass(frozen=True)
class Order:
    """`positions[i]` is the candidate that becomes block i; the first `base` blocks are the base."""

    base: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class _Group:
    positions: tuple[int, ...]
    level: int
    nbytes: int
    gain: float

    @property
    def worth(self) -> float:
        return self.gain / self.nbytes

    def followed_by(self, other: _Group) -> _Group:
        return _Group(self.positions + other.positions, self.level, self.nbytes + other.nbytes, self.gain + other.gain)


def check_rule(rule: str) -> None:
    """Raises `Unsupported` for an unknown order."""
    if rule not in RULES:
        raise Unsupported(f"order {rule!r}; this version knows {' and '.join(RULES)}")


def stack_order(candidates: Sequence[Candidate], rule: str = "gain") -> Order:
    """Place all candidates, which come in network order and each tensor's levels as 0, 1, ... . Ties keep that order.
    Blocks of one tensor that have the same level, a mask and its values, stay together.

    Raises `Unsupported` for an unknown rule.
    """
    check_rule(rule)
    base = [i for i, candidate in enumerate(candidates) if candidate.level == 0]
    groups = [group for tensor in _later_levels(candidates) for group in (merge(tensor) if rule == "gain" else tensor)]
    groups.sort(key=lambda group: -group.worth if rule == "gain" else (group.level, -group.worth))
    return Order(len(base), tuple(base) + tuple(i for group in groups for i in group.positions))


def order_entries(a: Architecture, entries: list[BlockEntry], rule: str) -> tuple[StackIndex, tuple[int, ...]]:
    """The index of the stack, and for each of its blocks the position in `entries`, which come in any order."""
    network = {name: i for i, name in enumerate(weight_shapes(a))}
    ids = sorted(range(len(entries)), key=lambda i: (network[entries[i].tensor], entries[i].level))
    candidates = [Candidate(e.tensor, e.level, padded(e.nbytes), e.gain) for e in (entries[i] for i in ids)]
    order = stack_order(candidates, rule)
    positions = tuple(ids[i] for i in order.positions)
    return StackIndex(order.base, tuple(entries[i] for i in positions)), positions


def merge(levels: Iterable[_Group]) -> list[_Group]:
    """Join consecutive levels of one tensor until gain per byte falls strictly from each group to the next."""
    groups: list[_Group] = []
    for group in levels:
        while groups and group.worth >= groups[-1].worth:
            group = groups.pop().followed_by(group)
        groups.append(group)
    return groups


def _later_levels(candidates: Sequence[Candidate]) -> list[list[_Group]]:
    tensors: dict[str, list[_Group]] = {}
    for i, candidate in enumerate(candidates):
        if candidate.level > 0:
            group = _Group((i,), candidate.level, candidate.nbytes, candidate.gain)
            levels = tensors.setdefault(candidate.tensor, [])
            if levels and levels[-1].level == candidate.level:
                group = levels.pop().followed_by(group)
            levels.append(group)
    return list(tensors.values())
