"""The index of a stack: what every block is, and which may follow which. The file around it is in `stack`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import msgspec

from .container import padded
from .errors import BadBlock
from .kinds import payload_nbytes

_TIERED: Final = ("mask", "values")


class BlockEntry(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One block's line in the index; the fields are those of the specification in `stack`."""

    kind: str
    tensor: str
    level: int
    shape: tuple[int, ...]
    nbytes: int
    gain: float
    hash: str
    uses: tuple[str, ...]
    dtype: str = ""
    rank: int = 0
    beside: bool = False


class StackIndex(msgspec.Struct, frozen=True):
    """The index as stored in the header's metadata."""

    base: int
    blocks: tuple[BlockEntry, ...]


def check_blocks(blocks: Sequence[BlockEntry]) -> None:
    """Raises `BadBlock` when an entry makes no sense by itself or after those before it, `UnknownKind` for a kind that
    this version does not know.
    """
    tensors: dict[str, _Seen] = {}
    for position, entry in enumerate(blocks):
        name = f"block {position} ({entry.tensor} level {entry.level})"
        seen = tensors.setdefault(entry.tensor, _Seen(entry.shape, entry.kind))
        expected = payload_nbytes(
            entry.kind, entry.shape, dtype=entry.dtype, rank=entry.rank, level=entry.level, filled=seen.filled
        )
        if entry.nbytes != expected:
            raise BadBlock(f"{name} says {entry.nbytes} bytes; {entry.kind} {list(entry.shape)} takes {expected}")
        if not entry.uses:
            raise BadBlock(f"{name} is used nowhere")
        if entry.beside and entry.kind != "mask":
            raise BadBlock(f"{name} is {entry.kind}, and says that it lies beside the stack; only masks do")
        seen.add(entry, name)


@dataclass
class _Seen:
    """What blocks of one tensor have been so far, the first being of this shape and kind."""

    shape: tuple[int, ...]
    first: str
    level: int = 0
    filled: int = 0  # columns of every row with values
    mask: BlockEntry | None = None  # whose values come next
    dtype: str = ""  # of values

    def add(self, entry: BlockEntry, name: str) -> None:
        """The next block. Raises `BadBlock` when it cannot follow those before."""
        if entry.level != self.level:
            raise BadBlock(f"{name} comes before level {self.level}")
        if entry.shape != self.shape:
            raise BadBlock(f"{name} has another shape than the tensor's first block")
        if (entry.kind == "plane") != (self.first == "plane"):
            raise BadBlock(f"{name} is {entry.kind}, and blocks before it are not: planes are not added to others")
        if self.first in _TIERED or entry.kind in _TIERED:
            self._add_tiered(entry, name)
        else:
            self.level += 1

    def _add_tiered(self, entry: BlockEntry, name: str) -> None:
        if self.first not in _TIERED or entry.kind not in _TIERED:
            raise BadBlock(f"{name} is {entry.kind}, and the first is {self.first}: tiers are not added to others")
        if (entry.kind == "mask") != (self.mask is None):
            raise BadBlock(f"{name} is {entry.kind}: of every tier there is a mask, and then its values")
        if self.mask is None:
            self.mask = entry
            return
        if entry.rank != self.mask.rank:
            raise BadBlock(f"{name} has {entry.rank} values a row; its mask says {self.mask.rank}")
        if entry.dtype != (self.dtype or entry.dtype):
            raise BadBlock(f"{name} is {entry.dtype}, and tiers before it are {self.dtype}")
        self.level, self.filled, self.mask, self.dtype = self.level + 1, self.filled + entry.rank, None, entry.dtype


def filled_before(entries: Iterable[BlockEntry]) -> tuple[int, ...]:
    """For each block, how many columns of every row have values in earlier tiers of its tensor."""
    filled: dict[str, int] = {}
    found = []
    for entry in entries:
        before = filled.get(entry.tensor, 0)
        found.append(before)
        if entry.kind == "values":
            filled[entry.tensor] = before + entry.rank
    return tuple(found)


def prefix_edges(entries: Iterable[BlockEntry]) -> tuple[int, ...]:
    """Where each block begins, and the last one ends, if all of them lie back to back in this order."""
    return tuple(accumulate((padded(entry.nbytes) for entry in entries), initial=0))
