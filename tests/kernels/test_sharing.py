"""Sequences that share blocks: each gets the bits that it gets alone with copies of its own, and blocks are read once.

What a block holds is drawn from its name: a sequence is the list of its blocks' names, and any of them can be shared.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ebbflow.kernels import attention
from ebbflow.kernels.attention import BLOCK_TOKENS, KINDS, attend, cut_units, store_kv
from ebbflow.kernels.rows import JIT_OFF

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
WIDTH = 20
EXAMPLES, PLACES, MOST = (3, 2, 3) if JIT_OFF else (60, 4, 40)
THREADS = min(2, numba.config.NUMBA_NUM_THREADS)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


@dataclass(frozen=True)
class Piece:
    """Tokens `[stop - count, stop)` of a sequence with these blocks."""

    names: tuple[str, ...]
    stop: int
    count: int = 1

    def __post_init__(self) -> None:
        assert self.count <= self.stop <= len(self.names) * BLOCK_TOKENS


def seed(text: str) -> int:
    return zlib.crc32(text.encode())


@cache
def numbers_of(name: str, groups: int) -> tuple[F32, F32]:
    """Keys and values of a whole block, `[BLOCK_TOKENS, groups, WIDTH]` each."""
    rng = np.random.default_rng(seed(name))
    k, v = rng.standard_normal((2, BLOCK_TOKENS, groups, WIDTH)).astype(np.float32)
    return k * 2, v


class Step:
    """A step of some pieces over blocks that are shared by name, in memory that is NaN where nobody wrote."""

    def __init__(self, pieces: list[Piece], dtype: str, groups: int, per_group: int) -> None:
        names = sorted({name for piece in pieces for name in piece.names}, key=seed)  # in no order of tables
        self.kind, self.groups, self.per_group = KINDS[dtype], groups, per_group
        self.blocks = {name: 1 + number for number, name in enumerate(names)}
        nbytes = attention.head_nbytes(self.kind, WIDTH)
        self.kv = np.full((1 + len(names), 2, 2, groups, nbytes), 0xFF, np.uint8)
        self.tables = np.zeros((len(pieces), max(len(piece.names) for piece in pieces)), np.int64)
        for row, piece in enumerate(pieces):
            self.tables[row, : len(piece.names)] = [self.blocks[name] for name in piece.names]
            self._store(row, piece)
        self.sequence = np.repeat(np.arange(len(pieces)), [piece.count for piece in pieces])
        self.positions = np.concatenate([np.arange(piece.stop - piece.count, piece.stop) for piece in pieces])
        self.q = np.concatenate([self._queries(piece) for piece in pieces])

    def _store(self, row: int, piece: Piece) -> None:
        both = [numbers_of(name, self.groups) for name in piece.names]
        k, v = (np.concatenate([pair[which] for pair in both])[: piece.stop] for which in range(2))
        positions = np.arange(piece.stop)
        store_kv(self.kind, self.kv, 1, self.tables, np.full(piece.stop, row), positions, k, v)

    def _queries(self, piece: Piece) -> F32:
        rng = np.random.default_rng(seed(repr(piece)))
        q: F32 = rng.standard_normal((piece.count, self.groups * self.per_group, WIDTH)).astype(np.float32)
        return q

    def attend(self, window: int, chunks: int) -> F32:
        scratch = np.full((chunks, attention.unit_floats(self.per_group, WIDTH)), np.nan, np.float32)
        y = np.full((len(self.q), self.groups * self.per_group * WIDTH), np.nan, np.float32)
        where = (self.kind, self.kv, 1, self.tables, self.sequence, self.positions)
        attend(*where, self.q, window, scratch, y)
        return y

    def units(self, window: int = 0, shares: int = 1) -> list[int]:
        """Tokens of each."""
        where = (self.tables, self.sequence, self.positions)
        return np.diff(cut_units(*where, window, self.groups, self.per_group, shares)).tolist()


def check(pieces: list[Piece], dtype: str, window: int, threads: int, chunks: int, groups: int, per_group: int) -> None:
    """Together as each alone."""
    numba.set_num_threads(1)
    alone = [Step([piece], dtype, groups, per_group).attend(window, 1) for piece in pieces]
    numba.set_num_threads(threads)
    together = Step(pieces, dtype, groups, per_group).attend(window, chunks)
    assert np.isfinite(together).all()
    np.testing.assert_array_equal(together.view(np.uint32), np.concatenate(alone).view(np.uint32))


def tree(tokens: int) -> list[Piece]:
    """A root, two branches, and leaves of different lengths on each; the sequences decode, or have `tokens` to read."""
    a, b = ("root 0", "root 1", "a"), ("root 0", "root 1", "b 0", "b 1")
    return [
        Piece((*a, "a left"), 96 + 5),
        Piece((*a, "a right", "a right end"), 128 + 6, tokens),
        Piece((*a, "a third"), 96 + 1),
        Piece((*b, "b left"), 128 + 17),
        Piece(b, 128),  # all of its blocks are shared
        Piece((*b, "b right"), 128 + 30, tokens),
        Piece(("root 0", "root 1", "c"), 64 + 2, 2),
        Piece(("root 0", "root 1"), 64 - 7),  # ends within a block that others have all of
        Piece(("other 0", "other 1"), 40),
        Piece(("other 0", "other 2"), 50, 3),
    ]


@pytest.mark.parametrize("window", [0, 5, 50])
@pytest.mark.parametrize("threads", range(1, THREADS + 1))
@pytest.mark.parametrize("dtype", KINDS)
def test_a_tree_of_prefixes_is_its_sequences_alone(dtype: str, threads: int, window: int) -> None:
    check(tree(2 if JIT_OFF else 29), dtype, window, threads, 2 * threads, 2, 3)


@pytest.mark.parametrize("shared", [0, 2] if JIT_OFF else range(5))
@pytest.mark.parametrize("dtype", KINDS)
def test_any_part_of_the_blocks_may_be_shared(dtype: str, shared: int) -> None:
    prefix = tuple(f"shared {place}" for place in range(shared))
    pieces = []
    for number in range(3 if JIT_OFF else 9):
        own = tuple(f"own {number} {place}" for place in range(shared, 4))
        pieces.append(Piece((*prefix, *own), 128 - (0 if shared == 4 else number), 1 + number % 2))
    check(pieces, dtype, 0, THREADS, THREADS, 1, 8)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    drawn=st.lists(
        st.tuples(
            st.lists(st.integers(0, 1), min_size=PLACES, max_size=PLACES),
            st.integers(1, PLACES * BLOCK_TOKENS),
            st.integers(1, MOST),
        ),
        min_size=2,
        max_size=3 if JIT_OFF else 7,
    ),
    window=st.sampled_from([0, 1, 7, 33, 70]),
    threads=st.integers(1, THREADS),
    chunks=st.integers(1, 5),
    per_group=st.sampled_from([1, 2, 9]),
    dtype=st.sampled_from(sorted(KINDS)),
)
def test_tables_of_any_kind_may_share_anywhere(
    drawn: list[tuple[list[int], int, int]], window: int, threads: int, chunks: int, per_group: int, dtype: str
) -> None:
    """Also behind blocks that they do not share, and within a block at different positions."""
    pieces = [
        Piece(tuple(f"{place} {choice}" for place, choice in enumerate(choices)), stop, min(stop, count))
        for choices, stop, count in drawn
    ]
    check(pieces, dtype, window, threads, chunks, 2, per_group)


def uses(step: Step, monkeypatch: pytest.MonkeyPatch, window: int = 0) -> list[list[int]]:
    """Blocks in the order in which one group of a step uses them, by units of work.

    The kernel's own loop, without the compiler, and with the work on a block replaced.
    """
    found: list[list[int]] = []
    stride = step.kv[0].nbytes

    def add_block(kind: int, memory: Any, keys: int, *rest: Any) -> None:
        found[-1].append(int(keys) // stride)
        rows, scratch = rest[-2:]
        scratch[rows * BLOCK_TOKENS :][: rows * attention.LANES] = 1  # sums, which results are divided by

    monkeypatch.setattr(attention, "_add_block", add_block)
    monkeypatch.setattr(attention, "_ask", lambda *arguments: None)
    unit = getattr(attention.attend_unit, "py_func", attention.attend_unit)
    scratch = np.ones(attention.unit_floats(step.per_group, WIDTH), np.float32)
    y = np.empty((len(step.q), step.groups * step.per_group * WIDTH), np.float32)
    for t, stop in pairwise(np.cumsum([0, *step.units(window)]).tolist()):
        found.append([])
        those = (step.tables, step.sequence[t:stop], step.positions[t:stop], step.q[t:stop])
        unit(step.kind, step.kv, 1, *those, 0, step.per_group, window, scratch, y[t:stop])
    return found


def reads(units: list[list[int]]) -> list[int]:
    """A unit's uses of a block in a row are one read."""
    return [block for unit in units for block, _ in groupby(unit)]


def test_a_step_reads_every_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(tree(2), "f16", 2, 3)
    assert sorted(reads(uses(step, monkeypatch))) == sorted(step.blocks.values())


def test_within_windows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("0", "1", "2", "3")
    step = Step([Piece((*names, f"own {number}"), 128 + number) for number in range(16)], "f16", 2, 3)
    behind = {step.blocks[name] for name in names[:2]}
    unused = {step.blocks["own 0"]}
    assert sorted(reads(uses(step, monkeypatch, 50))) == sorted(set(step.blocks.values()) - behind - unused)


def test_copies_are_read_one_by_one_and_the_shared_root_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 sequences over 512 tokens in common: 32 reads instead of 272, each for all rows in one go."""
    for copies, want in ((16, 16 * 17), (1, 16 + 16)):
        pieces = []
        for number in range(16):
            before = tuple(f"{number % copies} {place}" for place in range(16))
            pieces.append(Piece((*before, f"own {number}"), 513))
        units = uses(Step(pieces, "f16", 2, 1), monkeypatch)
        assert len(reads(units)) == sum(map(len, units)) == want


def test_work_is_cut_where_nothing_is_shared_or_too_much_and_for_every_thread() -> None:
    def units(pieces: list[Piece], groups: int, per_group: int, shares: int, window: int = 0) -> list[int]:
        return Step(pieces, "f16", groups, per_group).units(window, shares)

    sharers = [Piece(("root", f"own {number}"), 40 + number) for number in range(16)]
    strangers = [Piece((f"other {number}",), 20) for number in range(3)]
    assert units(sharers, 4, 8, 2) == [16]
    assert units(sharers, 4, 9, 2) == [8, 8]  # more rows than a unit takes
    assert units(sharers, 1, 8, 2) == [8, 8]  # else one of two threads would wait
    assert units(sharers, 3, 8, 2) == [8, 8]
    assert units(sharers, 2, 8, 8) == [4] * 4
    assert units(sharers[:1], 1, 8, 2) == [1]
    assert units([*strangers, *sharers], 2, 8, 2) == [1, 1, 1, 16]
    assert units(sharers, 2, 8, 2, window=5) == [1] * 16  # the root is behind all windows
    assert units(sharers, 2, 8, 2, window=9) == [1] * 16  # only the first sees the root
    assert units(sharers, 2, 8, 2, window=10) == [2, *[1] * 14]
    assert units([Piece(("root", "a"), 64, 40), *sharers], 2, 3, 1) == [28, 28]
