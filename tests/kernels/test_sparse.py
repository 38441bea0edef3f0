"""Tiers of masks and values: one result, bit for bit, whatever computes it, which is that of the same weight stored
densely.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ebbflow.kernels import bits, rows
from ebbflow.kernels.instructions import NAMES, available
from ebbflow.kernels.matmul import matmul, row_stride, take_rows
from ebbflow.kernels.reference import reference_levels
from ebbflow.kernels.rows import JIT_OFF
from ebbflow.kernels.signs import multiply_sum
from ebbflow.kernels.sparse import expand_rows, expansion_nbytes
from ebbflow.kernels.table import Draw, multiply_sum_arguments, store_levels

TIERS = (
    ("mask:50", "values:f16"),
    ("mask:50", "values:i8"),
    ("mask:50", "values:i4"),
    ("mask:30", "values:f16", "mask:20", "values:f16"),
    ("mask:30", "values:i8", "mask:1", "values:i8", "mask:40", "values:i8"),
    ("mask:1", "values:i4", "mask:33", "values:i4", "mask:100", "values:i4", "mask:1"),
)
COLUMNS = (65,) if JIT_OFF else (1, 7, 64, 65, 300, 576, 1024)
WORDS = st.integers(0, 2**64 - 1)


def result(arguments: list[Any]) -> NDArray[np.uint32]:
    arguments[-1][:] = np.nan
    multiply_sum(*arguments)
    assert not np.isnan(arguments[-1]).any()
    return arguments[-1].view(np.uint32).copy()


@pytest.mark.parametrize("n", COLUMNS)
@pytest.mark.parametrize("levels", TIERS, ids="+".join)
def test_every_instruction_set_gives_the_same_bits(levels: tuple[str, ...], n: int) -> None:
    found = [
        result(multiply_sum_arguments(Draw(n), m=9, n=n, tokens=6, levels=levels, instructions=name))
        for name in available()
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


@pytest.mark.parametrize("levels", TIERS[2:5], ids="+".join)
@pytest.mark.parametrize("name", available())
def test_tokens_rows_chunks_and_threads_do_not_show(name: str, levels: tuple[str, ...]) -> None:
    n = 65 if JIT_OFF else 600
    whole = multiply_sum_arguments(Draw(3), m=11, n=n, tokens=9, levels=levels, instructions=name, chunks=1)
    want = result(whole)
    before = numba.get_num_threads()
    try:
        for threads, chunks in product(range(1, min(2, numba.config.NUMBA_NUM_THREADS) + 1), (1, 2, 5)):
            numba.set_num_threads(threads)
            scratch = [np.zeros((chunks, *array.shape[1:]), array.dtype) for array in whole[8:10]]
            for start, stop in ((0, 9), (0, 1), (3, 8), (8, 9)):
                part = [np.ascontiguousarray(value[start:stop]) for value in whole[5:8]]
                y = np.empty((stop - start, 11), np.float32)
                np.testing.assert_array_equal(result([*whole[:5], *part, *scratch, y]), want[start:stop])
    finally:
        numba.set_num_threads(before)


def dense(stored: Any, table: Any, m: int, n: int) -> tuple[Any, Any]:
    """The same weight as one block of all columns: int8 with its scales, or fp16."""
    weight, kind = reference_levels(stored, table, m, n)[0], table[1, 0]
    if kind == rows.VALUES_F16:
        payload, code = weight.astype("<f2").tobytes(), rows.F16
    else:
        scales = stored[table[1, 1] // 2 :][: 2 * m].view(np.float32)
        numbers = weight / np.where(scales != 0, scales, np.float32(1)).astype(np.float64)[:, None]
        payload, code = scales.tobytes() + np.rint(numbers).astype(np.int8).tobytes(), rows.I8
    padded = payload.ljust(-(-len(payload) // 64) * 64, b"\xff")
    return np.frombuffer(padded, np.uint16).copy(), np.array([[code, 0, 0]], np.int64)


@pytest.mark.parametrize("n", COLUMNS)
@pytest.mark.parametrize("levels", TIERS, ids="+".join)
def test_the_product_is_that_of_the_weight_stored_densely(levels: tuple[str, ...], n: int) -> None:
    m = 9
    for name in available():
        arguments = multiply_sum_arguments(Draw(n), m=m, n=n, tokens=3, levels=levels, instructions=name)
        got = result(arguments)
        stored, table = dense(arguments[1].view(np.uint16), arguments[2], m, n)
        np.testing.assert_array_equal(got, result([arguments[0], stored.view(np.uint8), table, *arguments[3:]]))


@pytest.mark.parametrize("n", COLUMNS)
@pytest.mark.parametrize("levels", TIERS, ids="+".join)
def test_rows_in_floats_are_those_of_the_weight_stored_densely(levels: tuple[str, ...], n: int) -> None:
    m, stored, table = 9, *store_levels(Draw(n), levels, 9, n)
    width = -(-n // 64) * 64
    x = np.zeros((3, width), np.float32)
    x[:, :n] = Draw(1).singles(3, n)
    found = []
    for memory, blocks in ((stored, table), dense(stored, table, m, n)):
        scratch = np.zeros((2, rows.ROWS, row_stride(width)), np.float32)
        y, taken = np.empty((3, m), np.float32), np.empty((m, n), np.float32)
        matmul(memory, blocks, n, x, scratch, y)
        take_rows(memory, blocks, m, np.arange(m), taken)
        found.append((y, taken))
        np.testing.assert_array_equal(taken, reference_levels(stored, table, m, n)[0].astype(np.float32))
    np.testing.assert_array_equal(found[0][0], found[1][0])


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("levels", TIERS, ids="+".join)
def test_nothing_but_the_rows_is_written(name: str, levels: tuple[str, ...]) -> None:
    m, n = 9, 65 if JIT_OFF else 300
    stored, table = store_levels(Draw(5), levels, m, n)
    words = -(-n // 64)
    w, scales = np.full((4, 64 * words + 64), 7, np.uint8), np.full(5, np.nan, np.float32)
    around = np.full(expansion_nbytes(n) + 128, 7, np.uint8)
    code, scratch = NAMES[name], around[64:-64]
    flip = np.uint8(0x80 if name == "avx512" else 0)
    expand_rows(code, stored.view(np.uint8), table, m, n, 6, 3, flip, scratch, w, scales)
    assert (w[:3, 64 * words :] == 7).all()
    assert (w[3] == 7).all()
    assert (w[:3, n : 64 * words] == flip).all()
    assert np.isnan(scales[3:]).all()
    assert (around[:64] == 7).all()
    assert (around[-64:] == 7).all()


@settings(deadline=None)
@given(bit=WORDS, where=WORDS)
def test_words(bit: int, where: int) -> None:
    places = [j for j in range(64) if where >> j & 1]
    want = sum(1 << j for k, j in enumerate(places) if bit >> k & 1)
    for deposit in (bits.deposit, bits.portable_deposit):
        assert deposit_of(deposit, bit, where) == want
    assert counts_of(where) == (len(places), places[0] if places else 64)


if JIT_OFF:

    def deposit_of(deposit: Any, bit: int, where: int) -> int:
        return int(deposit(np.uint64(bit), np.uint64(where)))

    def counts_of(word: int) -> tuple[int, int]:
        return bits.count(np.uint64(word)), bits.lowest(np.uint64(word))

else:

    @numba.njit
    def _fast(bit: Any, where: Any) -> Any:
        return bits.deposit(bit, where)

    @numba.njit
    def _counts(word: Any) -> Any:
        return bits.count(word), bits.lowest(word)

    def deposit_of(deposit: Any, bit: int, where: int) -> int:
        chosen = bits.portable_deposit if deposit is bits.portable_deposit else _fast
        return int(chosen(np.uint64(bit), np.uint64(where)))

    def counts_of(word: int) -> tuple[int, int]:
        return _counts(np.uint64(word))


@pytest.mark.parametrize("at", [0, 1, 63, 64, 65, 127, 128, 190, 192])
def test_bits_taken_from_anywhere_in_a_stream(at: int) -> None:
    stream = np.random.default_rng(0).integers(0, 2**64, 3, np.uint64)
    whole = sum(int(word) << 64 * k for k, word in enumerate(stream))
    known = max(0, min(64, 192 - at))
    assert int(bits.taken(stream, at)) % (1 << known) == (whole >> at) % (1 << known)
