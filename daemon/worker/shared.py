"""Blocks that loaded models have in common: in memory once, whoever comes and goes.

Masks of two prunings that agree, an embedding that both left as it was; also what one model has twice. A block stays
where it was first read, in the memory of the model that read it, and every other model that wants these bytes points
there. When the first one lets go of it (its edge moves down, it is unloaded), those pages stay for as long as anybody
uses them and go with the last user. So nothing is ever copied or moved: shrinking needs no memory, takes no longer than
without sharing, and cannot fail. Of a model that was unloaded nothing else is left than address space.

Trust. That two headers name the same hash proves nothing: one of them may lie, or its file have rotted. So bytes are
compared with their hash before anybody but their own model uses them, once. If they do not match, their model keeps
them for itself, and the next one reads its own.

Books. Each block is counted with one of its users, of those that have it in their base if there are any: then what is
shared by bases is shared however far the edges move.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...formats.container import content_hash
from ...formats.index import BlockEntry
from ..mapping import Mapping

LEAST_NBYTES: Final = 65536  # smaller ones are not worth the pages that stay at both ends


class Key(NamedTuple):
    """What blocks must agree in to be the same: bytes, and all that says how they are read and checked."""

    hash: str
    nbytes: int
    kind: str
    shape: tuple[int, ...]
    level: int
    rank: int
    dtype: str
    filled: int


def key_of(entry: BlockEntry, filled: int) -> Key:
    """`filled`: columns of each row with values in earlier tiers."""
    return Key(entry.hash, entry.nbytes, entry.kind, entry.shape, entry.level, entry.rank, entry.dtype, filled)


class Arena:
    """Where one stack's blocks lie: a mapping, of which bytes before `edge` are its model's prefix.

    Beyond the edge there are only blocks that other models use.
    """

    def __init__(self, nbytes: int) -> None:
        self.mapping = Mapping(nbytes)
        self.nbytes = nbytes
        self.address = self.mapping.address()
        self.edge = 0
        self._blocks: list[Block] = []  # in use by anybody, in order

    def move(self, edge: int) -> None:
        """Set the edge, and give back all pages beyond it that nobody uses."""
        self.edge = edge
        for block in self._blocks[bisect_left(self._blocks, edge, key=_start) :]:
            self.mapping.release(edge, block.start)
            edge = block.stop
        # To the very end: the page in which an edge lay is whole again only when the edge has moved on.
        self.mapping.release(edge, self.nbytes)

    def add(self, block: Block) -> None:
        """Remember a block that is used."""
        insort(self._blocks, block, key=_start)

    def remove(self, block: Block) -> None:
        """Nobody uses it any more. Within the prefix its pages stay: they go when the edge moves."""
        place = bisect_left(self._blocks, block.start, key=_start)
        del self._blocks[place]
        if block.start >= self.edge:
            before = max(self.edge, self._blocks[place - 1].stop if place else 0)
            after = self._blocks[place].start if place < len(self._blocks) else self.nbytes
            self.mapping.release(before, after)


@dataclass(eq=False)
class Block:
    """Bytes `[start, stop)` of an arena, padding included."""

    key: Key
    arena: Arena
    start: int
    stop: int
    verified: bool = False
    uses: list[Use] = field(default_factory=list)

    @property
    def bytes(self) -> NDArray[np.uint8]:
        """What is there."""
        return self.arena.mapping.bytes[self.start : self.stop]


@dataclass(eq=False)
class Use:
    """One place of one model's prefix where a block is used; `base`: it is in the model's base."""

    block: Block
    base: bool

    @property
    def address(self) -> int:
        """Where the block begins."""
        return self.block.arena.address + self.block.start

    @property
    def counted_elsewhere(self) -> int:
        """Bytes that another use is charged with."""
        return 0 if self.block.uses[0] is self else self.block.stop - self.block.start


class SharedBlocks:
    """All blocks of at least `least_nbytes` that any model of this process has in memory."""

    def __init__(self, least_nbytes: int = LEAST_NBYTES) -> None:
        self.least_nbytes = least_nbytes
        self._blocks: dict[Key, Block] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, key: Key) -> Block | None:
        """The block, if it is there and its bytes are what the key says; the first time, they are hashed."""
        block = self._blocks.get(key)
        if block is not None and not block.verified:
            if content_hash(block.bytes[: key.nbytes].data) != key.hash:
                del self._blocks[key]  # and whoever reads it next is asked instead
                return None
            block.verified = True
        return block

    def use(self, block: Block, base: bool) -> Use:
        """One user more."""
        use = Use(block, base)
        block.uses.insert(sum(other.base for other in block.uses) if base else len(block.uses), use)
        return use

    def add(self, key: Key, arena: Arena, start: int, stop: int, base: bool) -> Use:
        """A block that was read into `arena` by its own model, the first user."""
        block = Block(key, arena, start, stop)
        self._blocks.setdefault(key, block)
        arena.add(block)
        return self.use(block, base)

    def leave(self, use: Use) -> None:
        """One user less; with the last one the block is gone."""
        block = use.block
        block.uses.remove(use)
        if not block.uses:
            if self._blocks.get(block.key) is block:
                del self._blocks[block.key]
            block.arena.remove(block)


class Span:
    """Memory from the first of some arenas to the end of the last, with whatever lies between, as one array.

    Kernels address blocks by their distance from one beginning. What is between must not be touched.
    """

    def __init__(self, arenas: set[Arena]) -> None:
        self._arenas = arenas  # as long as the array lives
        self.start = min(arena.address for arena in arenas)
        stop = max(arena.address + arena.nbytes for arena in arenas)
        self.__array_interface__ = {
            "version": 3,
            "typestr": "<u2",
            "shape": ((stop - self.start) // 2,),
            "data": (self.start, False),
        }


def _start(block: Block) -> int:
    return block.start
