"""What the integer product wants of a token where W is a sum of blocks (`signs`): bytes, not rotated, finely scaled.

Of 512 columns, the 32 whose products meet in one of the 16 integer sums share a scale: the largest of them becomes 127,
and all are rounded (half to even). Every step is one float32 operation, so vector and plain code give the same bits.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from .planes import COLUMNS, SUMS, VECTORS, column_order
from .quantize import LARGEST, LEAST
from .rows import JIT_OFF
from .vectors import constant, f32, i8, i32, load, number, shuffle, store, vector

_ROUND: Final = np.float32(12582912.0)  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits
_ROUND_BITS: Final = int(_ROUND.view(np.int32))
_INFINITY: Final = 0x7F800000
_WIDE: Final = 64  # floats handled together: COLUMNS / VECTORS
_NARROW: Final = _WIDE // 4

F32 = NDArray[np.float32]


def _typed_round(typing: Any, row: Any, at: Any, q: Any, t: Any, scales: Any, corrections: Any) -> Any:
    """COLUMNS floats of `row` from `at`: into token t's bytes, scales and corrections."""
    signature = types.void(row, types.int64, q, types.int64, scales, corrections)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        b = builder
        row, at, q, t, scales, corrections = args
        rows, bytes_, factors, sums = (
            context.make_array(sig.args[k])(context, b, value)
            for k, value in ((0, row), (2, q), (4, scales), (5, corrections))
        )
        floats, integers = vector(f32, _WIDE), vector(i32, _WIDE)
        values = [load(b, floats, b.gep(rows.data, [b.add(at, number(_WIDE * v))]), 4) for v in range(VECTORS)]

        def everywhere(value: int) -> Any:
            return constant(i32, [value] * _WIDE)

        def larger(x: Any, y: Any) -> Any:
            return b.select(b.icmp_signed(">", x, y), x, y)

        def first_of_four(x: Any) -> Any:
            return shuffle(b, x, x, range(0, _WIDE, 4))

        top = everywhere(0)
        for value in values:
            top = larger(top, b.and_(b.bitcast(value, integers), everywhere(0x7FFFFFFF)))
        for step in (1, 2):
            top = larger(top, shuffle(b, top, top, [j ^ step for j in range(_WIDE)]))
        bad = b.icmp_signed(">=", top, everywhere(_INFINITY))
        narrow = first_of_four(top)
        largest = b.bitcast(narrow, vector(f32, _NARROW))
        nothing = b.fcmp_ordered("<", largest, constant(f32, [LEAST] * _NARROW))
        wrong = b.icmp_signed(">=", narrow, constant(i32, [_INFINITY] * _NARROW))
        most, zeros = (constant(f32, [value] * _NARROW) for value in (LARGEST, 0.0))
        scale = b.select(nothing, zeros, b.fdiv(largest, most))
        scale = b.select(wrong, constant(f32, [float("nan")] * _NARROW), scale)
        factor = b.select(b.or_(nothing, wrong), zeros, b.fdiv(most, largest))
        by = shuffle(b, factor, factor, [j // 4 for j in range(_WIDE)])
        magic, total = constant(f32, [float(_ROUND)] * _WIDE), everywhere(0)
        target = b.add(b.mul(t, b.extract_value(bytes_.shape, 1)), at)
        for v, value in enumerate(values):
            good = b.select(bad, constant(f32, [0.0] * _WIDE), value)
            moved = b.fadd(b.fmul(good, by), magic)
            whole = b.sub(b.bitcast(moved, integers), everywhere(_ROUND_BITS))
            total = b.add(total, whole)
            store(b, b.trunc(whole, vector(i8, _WIDE)), b.gep(bytes_.data, [b.add(target, number(_WIDE * v))]))
        for step in (1, 2):
            total = b.add(total, shuffle(b, total, total, [j ^ step for j in range(_WIDE)]))
        place = b.sdiv(target, number(COLUMNS // SUMS))
        store(b, scale, b.gep(factors.data, [place]), 4)
        less = b.mul(first_of_four(total), constant(i32, [-128] * _NARROW))
        store(b, less, b.gep(sums.data, [place]), 4)
        return context.get_dummy_value()

    return signature, codegen


def _plain_round(row: F32, at: int, q: NDArray[np.int8], t: int, scales: F32, corrections: NDArray[np.int32]) -> None:
    values = row[at : at + COLUMNS].reshape(VECTORS, SUMS, 4)
    largest = np.abs(values).max((0, 2))
    bad, nothing = ~np.isfinite(largest), largest < np.float32(LEAST)
    safe = np.where(bad | nothing, np.float32(1), largest)
    factor = np.where(bad | nothing, np.float32(0), np.float32(LARGEST) / safe)
    good = np.where(bad[:, None], np.float32(0), values)
    whole = np.rint(good * factor[:, None])
    q[t, at : at + COLUMNS] = whole.reshape(-1).astype(np.int8)
    places = slice(at // (COLUMNS // SUMS), (at + COLUMNS) // (COLUMNS // SUMS))
    scales[t, places] = np.where(bad, np.float32(np.nan), np.where(nothing, np.float32(0), safe / np.float32(LARGEST)))
    corrections[t, places] = -128 * whole.sum((0, 2)).astype(np.int32)


_round: Any = _plain_round if JIT_OFF else intrinsic(_typed_round)


@njit(nogil=True)
def round_row(
    x: F32, c: F32, row: F32, t: int, q: NDArray[np.int8], scales: F32, corrections: NDArray[np.int32]
) -> None:
    """Token t of what `round_inputs` documents, from `x [n]`; `row [padded(n)]` is scratch."""
    n = x.shape[0]
    if c.shape[0]:
        for start in range(0, q.shape[1], 8):
            lane, rest = start // 16 % 4, start % 16 // 8
            v = start % COLUMNS // 64
            first = start // COLUMNS * COLUMNS + 128 * lane + 32 * (v // 2) + 16 * rest + 8 * (v % 2)
            for k in range(8):
                row[start + k] = x[first + k] * c[first + k] if first + k < n else np.float32(0)
    else:
        row[:n] = x
        row[n:] = 0
    for at in range(0, q.shape[1], COLUMNS):
        _round(row, at, q, t, scales, corrections)


@njit("void(f4[:,::1],f4[::1],i1[:,::1],f4[:,::1],i4[:,::1])", nogil=True, cache=True)
def round_inputs(x: F32, c: F32, q: NDArray[np.int8], scales: F32, corrections: NDArray[np.int32]) -> None:
    """`x [T, n]` in bytes `q [T, planes.padded(n)]`, columns in their order; or times `c [n]`, if that is not empty,
    and in `planes.column_order`.

    `scale * q` is the value. `scales` and `corrections` `[T, padded(n) / 32]` are as in `quantize.quantize_inputs`, but
    each sum of 512 bytes has its own scale, of its 32 bytes `64 v + 4 s + (0 to 3)`.
    """
    row = np.zeros(q.shape[1], np.float32)
    for t in range(x.shape[0]):
        round_row(x[t], c, row, t, q, scales, corrections)


def reference_round_inputs(x: F32, c: F32, q: NDArray[np.int8], scales: F32, corrections: NDArray[np.int32]) -> None:
    """By the columns of each sum."""
    tokens, p = q.shape
    wide = np.zeros((tokens, p), np.float32)
    wide[:, : x.shape[1]] = x * c if len(c) else x
    order = column_order() if len(c) else np.arange(COLUMNS)
    sums = wide.reshape(tokens, -1, COLUMNS)[:, :, order].reshape(tokens, -1, VECTORS, SUMS, 4)
    largest = np.abs(sums).max((2, 4), keepdims=True)
    scale = np.where(largest < LEAST, 0, largest / LARGEST)
    whole = np.rint(sums / np.where(scale > 0, scale, 1) * (scale > 0))
    q[:], scales[:] = whole.reshape(q.shape), scale.reshape(scales.shape)
    corrections[:] = -128 * whole.sum((2, 4)).reshape(corrections.shape)
