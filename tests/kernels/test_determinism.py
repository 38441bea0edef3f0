"""Bitwise: a result does not depend on what is computed beside it, how work is cut, or how many threads there are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ebbflow.kernels import attention
from ebbflow.kernels.attention import attend, store_kv
from ebbflow.kernels.elementwise import add, gate_row, gated, rms_norm
from ebbflow.kernels.matmul import matmul, row_stride, take_rows
from ebbflow.kernels.rows import JIT_OFF, ROWS
from ebbflow.kernels.table import TABLE, Draw, store_levels

KINDS = (
    ("f32",),
    ("f16",),
    ("bf16",),
    ("i8",),
    ("signs:1",),
    ("signs:5", "signs:16"),
    ("i8", "signs:3", "f16", "signs:2"),
    ("plane", "plane"),
    ("plane", "plane", "plane", "shared_plane", "shared_plane"),
)
COLUMNS = (1, 65) if JIT_OFF else (1, 64, 65, 172, 576)
TOKENS = 6 if JIT_OFF else 16
EXAMPLES = 3 if JIT_OFF else 40

F32 = NDArray[np.float32]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


class Weight:
    """One random weight `[m, n]` in memory, and an input of TOKENS tokens for it."""

    def __init__(self, levels: tuple[str, ...], m: int, n: int, seed: int = 0) -> None:
        draw = Draw(seed)
        self.m, self.n = m, n
        self.stored, self.table = store_levels(draw, levels, m, n)
        self.width = -(-n // 64) * 64
        self.x = np.zeros((TOKENS, self.width), np.float32)
        self.x[:, :n] = draw.rng.standard_normal((TOKENS, n))

    def times(self, x: F32, chunks: int = 2) -> F32:
        scratch = np.zeros((chunks, ROWS, row_stride(self.width)), np.float32)
        y = np.full((x.shape[0], self.m), np.nan, np.float32)
        matmul(self.stored, self.table, self.n, np.ascontiguousarray(x), scratch, y)
        return y


def same(a: F32, b: F32) -> None:
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("n", COLUMNS)
@pytest.mark.parametrize("levels", KINDS, ids="+".join)
def test_matmul_of_many_tokens_is_each_alone(levels: tuple[str, ...], n: int) -> None:
    weight = Weight(levels, 13, n)
    alone = np.concatenate([weight.times(weight.x[t : t + 1]) for t in range(TOKENS)])
    for tokens in range(1, TOKENS + 1):
        same(weight.times(weight.x[:tokens]), alone[:tokens])


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(st.sets(st.integers(1, TOKENS - 1)), st.sampled_from(KINDS))
def test_matmul_of_any_split_of_the_tokens(cuts: set[int], levels: tuple[str, ...]) -> None:
    weight = Weight(levels, 7, COLUMNS[-1])
    edges = [0, *sorted(cuts), TOKENS]
    parts = [weight.times(weight.x[start:stop]) for start, stop in pairwise(edges)]
    same(np.concatenate(parts), weight.times(weight.x))


@pytest.mark.parametrize("m", (5,) if JIT_OFF else (1, 3, 4, 5, 67))
@pytest.mark.parametrize("levels", KINDS, ids="+".join)
def test_matmul_in_any_number_of_chunks_and_threads(levels: tuple[str, ...], m: int) -> None:
    weight = Weight(levels, m, COLUMNS[-1])
    numba.set_num_threads(1)
    want = weight.times(weight.x, chunks=1)
    for threads in range(1, min(2, numba.config.NUMBA_NUM_THREADS) + 1):
        numba.set_num_threads(threads)
        for chunks in range(1, 6):
            same(weight.times(weight.x, chunks), want)


def test_matmul_leaves_its_scratch_clean_beyond_the_columns() -> None:
    """So one scratch serves all weights of a width, whatever ran before."""
    weight = Weight(("i8", "signs:3"), 9, 65)
    scratch = np.zeros((2, ROWS, row_stride(128)), np.float32)
    y = np.empty((TOKENS, 9), np.float32)
    matmul(weight.stored, weight.table, 65, weight.x, scratch, y)
    assert not scratch[:, :, 65:].any()
    matmul(weight.stored, weight.table, 65, weight.x, scratch, y)
    same(y, weight.times(weight.x))


@pytest.mark.parametrize("n", COLUMNS)
@pytest.mark.parametrize("levels", KINDS, ids="+".join)
def test_a_row_taken_is_the_row_multiplied_with(levels: tuple[str, ...], n: int) -> None:
    """Rows decoded one at a time (scalar code) are the rows decoded four at a time (vectors)."""
    weight = Weight(levels, 7, n)
    rows = np.empty((7, n), np.float32)
    take_rows(weight.stored, weight.table, 7, np.arange(7), rows)
    unit = np.eye(n, weight.width, dtype=np.float32)
    np.testing.assert_array_equal(weight.times(unit).T, rows)  # a zero's sign is lost among the other products


def attention_of(
    dtype: str, cuts: list[int], strangers: bool, window: int, threads: int, chunks: int, per_group: int = 2
) -> F32:
    """One sequence of 70 tokens through `attend`, in pieces; other sequences beside it or not."""
    tokens, groups, width = (40 if JIT_OFF else 70), 2, 20
    rng = np.random.default_rng(1)
    q = rng.standard_normal((tokens, groups * per_group, width)).astype(np.float32)
    k, v = (rng.standard_normal((tokens, groups, width)).astype(np.float32) for _ in "kv")
    numba.set_num_threads(threads)
    kind = attention.KINDS[dtype]
    # NaN wherever nothing is stored
    kv = np.full((8, 2, 2, groups, attention.head_nbytes(kind, width)), 0xFF, np.uint8)
    tables = np.array([[5, 0, 3], [1, 2, 4]])
    outputs = []
    for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True):
        take = [np.arange(start, stop)]
        row = [np.zeros(stop - start, np.int64)]
        if strangers:  # the same positions of another sequence, in front, with other numbers
            take, row = [take[0], *take], [row[0] + 1, *row]
        positions, sequence = np.concatenate(take), np.concatenate(row)
        signs = np.where(sequence == 1, -0.5, 1).astype(np.float32)[:, None, None]
        where = (kind, kv, 1, tables, sequence, positions)
        store_kv(*where, k[positions] * signs, v[positions] * signs)
        scratch = np.full((chunks, attention.unit_floats(per_group, width)), np.nan, np.float32)
        y = np.empty((len(positions), groups * per_group * width), np.float32)
        attend(*where, q[positions] * signs, window, scratch, y)
        outputs.append(y[sequence == 0])
    return np.concatenate(outputs)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    cuts=st.sets(st.integers(1, 39)),
    strangers=st.booleans(),
    window=st.sampled_from([0, 7, 33]),
    threads=st.integers(1, min(2, numba.config.NUMBA_NUM_THREADS)),
    chunks=st.integers(1, 5),
    per_group=st.sampled_from([1, 2, 9]),
    dtype=st.sampled_from(["f16", "i8"]),
)
def test_attention_of_a_prompt_cut_anywhere_beside_anything(
    cuts: set[int], strangers: bool, window: int, threads: int, chunks: int, per_group: int, dtype: str
) -> None:
    alone = attention_of(dtype, [], False, window, 1, 1, per_group)
    same(attention_of(dtype, sorted(cuts), strangers, window, threads, chunks, per_group), alone)


@pytest.mark.parametrize("name", ["rms_norm", "gated", "rotate", "add"])
def test_elementwise_rows_are_each_alone(name: str) -> None:
    entry = next(entry for entry in TABLE if entry.name == name)
    width: dict[str, Any] = {"width": 20} if name == "rotate" else {"n": 65}
    arguments = entry.arguments(Draw(2), tokens=7, **width)
    entry.kernel(*arguments)
    by_token = [isinstance(value, np.ndarray) and len(value) == 7 for value in arguments]
    for t in range(7):
        alone = [value[t : t + 1].copy() if each else value for value, each in zip(arguments, by_token, strict=True)]
        alone[-1][:] = np.nan
        entry.kernel(*alone)
        same(alone[-1], arguments[-1][t : t + 1])


@pytest.mark.parametrize("cuts", [(0, 65), (0, 1, 65), (0, 15, 16, 17, 40, 65), (0, 64, 65)])
def test_gates_of_any_columns_are_those_of_the_row(cuts: tuple[int, ...]) -> None:
    rng = np.random.default_rng(4)
    gate, up = (rng.standard_normal(65).astype(np.float32) * 10 for _ in "gu")
    whole, parts = np.empty((1, 65), np.float32), np.full(65, np.nan, np.float32)
    gated(gate[None], up[None], whole)
    for start, stop in pairwise(cuts):
        gate_row(gate, up, parts, start, stop)
    same(parts, whole[0])


def test_results_may_be_written_over_their_inputs() -> None:
    """The bias is added in place, so `add` must allow it; the others keep to the same promise where shapes match."""
    rng = np.random.default_rng(3)
    x, y = (rng.standard_normal((3, 10)).astype(np.float32) for _ in "xy")
    for kernel, more in ((add, (y,)), (gated, (y,)), (rms_norm, (y[0], 1e-5))):
        z, over = np.empty_like(x), x.copy()
        kernel(x, *more, z)
        kernel(over, *more, over)
        same(over, z)
