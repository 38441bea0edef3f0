"""The prefix of one stack that is in memory, and the edge where it ends.

One private mapping as long as the stack's data, addressed by stack offset. Growing reads the next blocks of the file
into place, but for those that another model has in memory already (`shared`): their place stays empty, and the tables
point there. Shrinking gives the tail's pages back. Only the step loop calls this, between steps, so a step sees one
edge. Which edge is right is the supervisor's business (`supervisor/budget`).

While the stack's file is still arriving (`formats/stack`), the edge goes as far as its blocks are there and match their
hashes; `look` sees whether there are more.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...formats.blocks import check_finite
from ...formats.container import content_hash, padded
from ...formats.errors import BadBlock, CorruptStack, NotArrived, TruncatedStack
from ...formats.files import open_plain
from ...formats.index import BlockEntry, filled_before
from ...formats.kinds import SHARED_LEVELS
from ...formats.stack import Place, Stack, mark_of
from ...kernels.rows import CODES, MASK, PLANE, SHARED_PLANE, SIGNS, VALUES_CODES
from .shared import Arena, Block, SharedBlocks, Span, Use, key_of

READ_NBYTES: Final = 8_000_000  # read at once: a shrink that arrives meanwhile waits for one such read, a few ms
_EMPTY: Final = np.zeros((0, 3), np.int64)


@dataclass(frozen=True)
class ResidentStatistics:
    """Blocks and bytes that are in memory, and in all; bytes of those in memory that are another model's too and are
    counted there, and of these the part in the base.
    """

    blocks: int
    total_blocks: int
    nbytes: int
    total_nbytes: int
    shared_nbytes: int = 0
    shared_base_nbytes: int = 0


class Resident:
    """The resident prefix of `stack`; empty at first. Blocks that are in `shared` are not read."""

    def __init__(self, stack: Stack, shared: SharedBlocks | None = None) -> None:
        self.stack = stack
        self.blocks = 0
        self.version = 0
        self.arriving = stack.arriving
        self._unverified = set(range(len(stack.blocks))) if stack.arriving else set()  # nobody has checked their hashes
        self._doubtful: int | None = None  # a block that did not match, which may be a hole that will be filled
        self._filled = filled_before(stack.blocks)
        self._shared = SharedBlocks() if shared is None else shared
        self._uses: dict[int, Use] = {}  # by position; of blocks that others may have in common with this model
        self._arena = Arena(stack.nbytes)
        self._mapping = self._arena.mapping
        self._arenas: set[Arena] = set()  # where the blocks are, the own one among them
        self._start, self._stored = 0, np.zeros(0, np.uint16)
        self._tables: dict[str, NDArray[np.int64]] = {}
        self._rows: dict[str, list[tuple[int, int, int]]] = {}  # with addresses
        self._span()
        self._files = _opened(stack)

    @property
    def nbytes(self) -> int:
        """Bytes of the resident prefix."""
        return self.stack.edges[self.blocks]

    @property
    def stored(self) -> NDArray[np.uint16]:
        """The memory in which the blocks are, as the kernels read it: what no table points to must not be touched.

        The whole mapping, as long as no block is another model's.
        """
        return self._stored

    def table(self, tensor: str) -> NDArray[np.int64]:
        """The resident blocks of a tensor, `[levels, 3]`: kind code, byte offset in `stored`, rank."""
        found = self._tables.get(tensor)
        if found is None:
            rows = self._rows.get(tensor)
            found = np.array(rows, np.int64) - (0, self._start, 0) if rows else _EMPTY
            self._tables[tensor] = found
        return found

    def payload(self, tensor: str) -> tuple[BlockEntry, NDArray[np.uint8]]:
        """The first block of a tensor and its bytes; for the vectors, which have no other."""
        position = next(i for i in range(self.blocks) if self.stack.blocks[i].tensor == tensor)
        use = self._uses.get(position)
        return self.stack.blocks[position], self._slice(position) if use is None else use.block.bytes

    @property
    def present(self) -> int:
        """The blocks to which the edge may move: all, or those that have arrived."""
        if not self.arriving:
            return len(self.stack.blocks)
        size = os.fstat(self._files[self.stack.path]).st_size
        here = bisect_right(self.stack.file_edges, size - self.stack.data_start) - 1
        return max(self.blocks, here if self._doubtful is None else min(here, self._doubtful))

    def look(self) -> None:
        """See whether the file has arrived, and give doubtful blocks another try."""
        self._doubtful = None
        self.arriving = self.arriving and mark_of(self.stack.path).exists()

    def grow(self, blocks: int, nbytes: int = READ_NBYTES) -> None:
        """Move the edge towards `blocks` by about `nbytes`; at least one block.

        Raises `TruncatedStack`, `BadBlock`, `CorruptStack`, or `NotArrived` when the next block is not there yet; the
        edge is then before the block that is damaged, or where it was.
        """
        if self.blocks < blocks and self.present == self.blocks:
            raise NotArrived(
                f"of {self.stack.path}, {self.nbytes} bytes have arrived; {self.stack.base_nbytes} make the least model"
            )
        blocks = min(blocks, self.present)
        stop = self.blocks
        while stop < blocks and (stop == self.blocks or self.stack.edges[stop + 1] - self.nbytes <= nbytes):
            stop += 1
        if stop == self.blocks:
            return
        try:
            self._extend(stop)
        except CorruptStack:
            if stop == self.blocks + 1:
                raise
            for position in range(self.blocks, stop):  # as far as they are whole
                self._extend(position + 1)

    def _extend(self, stop: int) -> None:
        """Have the blocks up to `stop` in memory, or none of them, as `grow` says."""
        found = self._find(self.blocks, stop)
        own = [position for position in range(self.blocks, stop) if position not in found]
        try:
            for start, end in _runs(own):
                self._read(start, end)
            self._verify(own)
            for position in own:
                check_finite(self.stack.blocks[position], self._slice(position), self._filled[position])
        except BaseException:
            self._arena.move(self.nbytes)
            raise
        for position in range(self.blocks, stop):
            self._admit(position, found.get(position))
        self.blocks = stop
        self._arena.edge = self.nbytes
        self.version += 1
        if found:
            self._span()

    def shrink(self, blocks: int) -> None:
        """Move the edge down to `blocks` and give the tail back; never below the base, never fails."""
        blocks = max(blocks, self.stack.base)
        if blocks >= self.blocks:
            return
        for position in range(self.blocks - 1, blocks - 1, -1):
            tensor = self.stack.blocks[position].tensor
            self._rows[tensor].pop()
            self._tables.pop(tensor, None)
            self._leave(position)
        self.blocks = blocks
        self._arena.move(self.nbytes)
        self.version += 1
        self._span()

    def statistics(self) -> ResidentStatistics:
        """How much is in memory."""
        shared = [(use.base, use.counted_elsewhere) for use in self._uses.values()]
        return ResidentStatistics(
            self.blocks,
            len(self.stack.blocks),
            self.nbytes,
            self.stack.nbytes,
            sum(nbytes for _, nbytes in shared),
            sum(nbytes for base, nbytes in shared if base),
        )

    def tail(self) -> tuple[int, int]:
        """Address and length of the whole pages beyond the edge, for tests that forbid touching them."""
        start = -(-self.nbytes // 4096) * 4096
        return self._mapping.address() + start, max(0, -(-self.stack.nbytes // 4096) * 4096 - start)

    def check_integrity(self) -> None:
        """Raises `AssertionError` when the tables and the edge disagree."""
        assert sum(len(rows) for rows in self._rows.values()) == self.blocks
        for rows in self._rows.values():
            assert all(self._is_held(address) for _, address, _ in rows)
        assert all(position < self.blocks and use in use.block.uses for position, use in self._uses.items())

    def close(self) -> None:
        """Give everything back that no other model uses. The object must not be used afterwards."""
        _close(self._files)
        for position in list(self._uses):
            self._leave(position)
        self._arena.move(0)

    def _is_held(self, address: int) -> bool:
        own = self._arena.address <= address < self._arena.address + self.nbytes
        return own or any(use.address == address for use in self._uses.values())

    def _find(self, start: int, stop: int) -> dict[int, Block]:
        """Blocks among these that are in memory already, by position."""
        found = {}
        for position in range(start, stop):
            if self._may_share(position):
                block = self._shared.find(key_of(self.stack.blocks[position], self._filled[position]))
                if block is not None:
                    found[position] = block
        return found

    def _may_share(self, position: int) -> bool:
        return self.stack.blocks[position].nbytes >= self._shared.least_nbytes

    def _verify(self, positions: Iterable[int]) -> None:
        """Check hashes that nobody has checked, as is the rule for a stack that was arriving when it was opened.

        Raises `BadBlock`, or `NotArrived` for a block that may be a hole; those before it stay verified.
        """
        for position in sorted(self._unverified.intersection(positions)):
            entry = self.stack.blocks[position]
            if content_hash(self._slice(position)[: entry.nbytes].data) != entry.hash:
                if self.arriving:
                    self._doubtful = position
                    raise NotArrived(f"block {position} of {self.stack.path} has not arrived yet")
                raise BadBlock(f"block {position} of {self.stack.path} ({entry.tensor}) does not match its hash")
            self._unverified.discard(position)

    def _slice(self, position: int) -> NDArray[np.uint8]:
        return self._mapping.bytes[self.stack.edges[position] : self.stack.edges[position + 1]]

    def _admit(self, position: int, found: Block | None) -> None:
        entry, start, stop = self.stack.blocks[position], self.stack.edges[position], self.stack.edges[position + 1]
        address, base = self._arena.address + start, position < self.stack.base
        if found is not None:
            use = self._uses[position] = self._shared.use(found, base)
            address = use.address
        elif self._may_share(position):
            key = key_of(entry, self._filled[position])
            self._uses[position] = self._shared.add(key, self._arena, start, stop, base)
        self._rows.setdefault(entry.tensor, []).append((_code(entry), address, entry.rank))
        self._tables.pop(entry.tensor, None)

    def _leave(self, position: int) -> None:
        use = self._uses.pop(position, None)
        if use is not None:
            self._shared.leave(use)

    def _span(self) -> None:
        """Let `stored` reach from the first to the last of the mappings in which the blocks are."""
        arenas = {self._arena, *(use.block.arena for use in self._uses.values())}
        if arenas != self._arenas:
            self._arenas, span = arenas, Span(arenas)
            self._start, self._stored = span.start, np.asarray(span)
            self._tables.clear()

    def _read(self, start: int, stop: int) -> None:
        """Read blocks into their places, those that lie next to each other in a file at once."""
        places, edges, ends = self.stack.places, self.stack.edges, dict[Path, int]()
        while start < stop:
            first, end = start, start + 1
            while end < stop and places[end] == _after(self.stack, end - 1):
                end += 1
            self._read_run(places[first], edges[first], edges[end])
            path = places[first].path
            ends[path] = max(ends.get(path, 0), _after(self.stack, end - 1).offset)
            start = end
        # The copy in the page cache is of no more use, and would look like memory that somebody needs.
        # From the file's beginning: what a page cache folio shares with the slice before goes only as a whole.
        for path, offset in ends.items():
            os.posix_fadvise(self._files[path], 0, offset, os.POSIX_FADV_DONTNEED)

    def _read_run(self, place: Place, start: int, stop: int) -> None:
        """Read `[start, stop)` of the mapping from that place of a file on."""
        view, file = self._mapping.bytes.data, self._files[place.path]
        at = start
        while at < stop:
            try:
                count = os.preadv(file, [view[at:stop]], place.offset + at - start)
            except OSError as error:
                raise CorruptStack(f"{place.path} cannot be read: {error.strerror}") from error
            if not count:
                raise TruncatedStack(
                    f"{place.path} ends at byte {place.offset + at - start}, "
                    f"before all {self.stack.nbytes} bytes of the model were read"
                )
            at += count


def _after(stack: Stack, position: int) -> Place:
    """Where the file goes on after that block."""
    place = stack.places[position]
    return Place(place.path, place.offset + padded(stack.blocks[position].nbytes))


def _opened(stack: Stack) -> dict[Path, int]:
    """Descriptors of the stack's files. Raises `CorruptStack`."""
    files: dict[Path, int] = {}
    for path in dict.fromkeys([stack.path, *(place.path for place in stack.places)]):
        try:
            files[path] = open_plain(path)
        except OSError as error:
            _close(files)
            raise CorruptStack(f"{path} cannot be opened: {error.strerror}") from error
    return files


def _close(files: dict[Path, int]) -> None:
    for file in files.values():
        os.close(file)


def _runs(positions: list[int]) -> Iterator[tuple[int, int]]:
    """First and past the last of neighbours in an ascending list."""
    start = 0
    for i in range(1, len(positions) + 1):
        if i == len(positions) or positions[i] != positions[i - 1] + 1:
            yield positions[start], positions[i - 1] + 1
            start = i


def _code(entry: BlockEntry) -> int:
    """What the kernels call a block's kind."""
    match entry.kind:
        case "signs":
            return SIGNS
        case "plane":
            return SHARED_PLANE if entry.dtype == SHARED_LEVELS else PLANE
        case "mask":
            return MASK
        case "values":
            return VALUES_CODES[entry.dtype]
        case _:
            return CODES[entry.dtype]
