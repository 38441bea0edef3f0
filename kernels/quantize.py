"""What the integer product wants of a token: rotated, in bytes, in the order in which planes are decoded.

Method: 256 columns at a time, because no block of the rotation (`formats/kinds`) is larger. Their fast Walsh-Hadamard
transform happens in sixteen vector registers; then the largest of them becomes 127, and all are rounded (half to even).
Every step is one float32 operation, so vector and plain code give the same bits.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from .hadamard import reference_rotate_inputs, rotate_row
from .planes import COLUMNS, GROUP, SUMS, VECTORS, column_order
from .rows import JIT_OFF
from .vectors import constant, f32, i8, i32, load, number, shuffle, splat, store, vector

LANES: Final = 16
_COUNT: Final = GROUP // LANES
_ROUND: Final = 12582912.0  # 1.5 * 2^23: adding it to a small number leaves the nearest integer in the low bits
_INFINITY: Final = 0x7F800000
LEAST: Final = 1e-30  # below it a group counts as zero, lest its inverse overflow
LARGEST: Final = 127.0

F32 = NDArray[np.float32]
_floats, _ints = vector(f32, LANES), vector(i32, LANES)


def _typed_round(typing: Any, row: Any, at: Any, factor: Any, q: Any, t: Any, corrections: Any) -> Any:
    """GROUP floats of `row` from `at`, times `factor`, rounded: into token t's bytes and corrections."""
    signature = types.void(row, types.int64, types.float32, q, types.int64, corrections)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        row, at, factor, q, t, corrections = args
        rows, bytes_, sums = (
            context.make_array(sig.args[k])(context, builder, value)
            for k, value in ((0, row), (3, q), (5, corrections))
        )
        width = builder.extract_value(bytes_.shape, 1)
        block = builder.sdiv(at, number(COLUMNS))
        lane = builder.mul(builder.sdiv(builder.srem(at, number(COLUMNS)), number(GROUP)), number(2))
        target = builder.gep(
            bytes_.data,
            [
                builder.add(
                    builder.mul(t, width),
                    builder.add(builder.mul(block, number(COLUMNS)), builder.mul(lane, number(16))),
                )
            ],
        )
        by, magic = splat(builder, factor, LANES), constant(f32, [_ROUND] * LANES)
        base = constant(i32, [int(np.float32(_ROUND).view(np.int32))] * LANES)
        found: dict[tuple[int, int], list[Any]] = {}
        for k in range(_COUNT):
            value = load(builder, _floats, builder.gep(rows.data, [builder.add(at, number(LANES * k))]), 4)
            moved = builder.fadd(builder.fmul(value, by), magic)
            whole = builder.sub(builder.bitcast(moved, _ints), base)
            found.setdefault((k // 8, k % 2), []).append(whole)
            small = builder.trunc(whole, vector(i8, LANES))
            for half in range(2):
                place = number(64 * (2 * (k // 2 % 4) + half) + 16 * (k // 8) + 8 * (k % 2))
                part = shuffle(builder, small, small, range(8 * half, 8 * half + 8))
                store(builder, part, builder.gep(target, [place]))
        index = builder.add(builder.mul(block, number(SUMS)), builder.mul(lane, number(4)))
        index = builder.add(builder.mul(t, builder.extract_value(sums.shape, 1)), index)
        for (own, half), wholes in found.items():
            total = wholes[0]
            for whole in wholes[1:]:
                total = builder.add(total, whole)
            for size in (8, 4):  # neighbours add up: 4 columns make a sum
                even, odd = (shuffle(builder, total, total, range(first, 2 * size, 2)) for first in (0, 1))
                total = builder.add(even, odd)
            low, high = (shuffle(builder, total, total, pair) for pair in ((0, 1), (2, 3)))
            total = builder.mul(builder.add(low, high), constant(i32, [-128] * 2))
            store(builder, total, builder.gep(sums.data, [builder.add(index, number(4 * own + 2 * half))]), 4)
        return context.get_dummy_value()

    return signature, codegen


def _plain_round(row: F32, at: int, factor: float, q: NDArray[np.int8], t: int, corrections: NDArray[np.int32]) -> None:
    order, block, group = column_order(), at // COLUMNS, at % COLUMNS // GROUP
    mine = np.flatnonzero(order // GROUP == group)
    whole = np.rint(row[at : at + GROUP] * np.float32(factor)).astype(np.int8)
    q[t, block * COLUMNS + mine] = whole[order[mine] - group * GROUP]
    sums = q[t, block * COLUMNS : (block + 1) * COLUMNS].reshape(8, SUMS, 4).astype(np.int32).sum((0, 2))
    wanted = slice(group * SUMS // 2, (group + 1) * SUMS // 2)
    corrections[t, block * SUMS : (block + 1) * SUMS][wanted] = -128 * sums[wanted]


_round_group: Any = _plain_round if JIT_OFF else intrinsic(_typed_round)


@njit(nogil=True)
def quantize_row(
    x: F32,
    signs: F32,
    sizes: NDArray[np.int64],
    row: F32,
    t: int,
    q: NDArray[np.int8],
    scales: F32,
    corrections: NDArray[np.int32],
) -> None:
    """Token t of what `quantize_inputs` documents, from `x [n]`; `row [padded(n)]` is scratch, zero past n."""
    rotate_row(x, signs, sizes, row)
    for at in range(0, q.shape[1], GROUP):
        bits = row[at : at + GROUP].view(np.int32)
        top = np.int32(0)
        for j in range(GROUP):
            top = max(top, bits[j] & np.int32(0x7FFFFFFF))
        scale, factor = np.float32(np.nan), np.float32(0)
        if top >= np.int32(_INFINITY):
            row[at : at + GROUP] = 0
        else:
            largest = np.int32(top).view(np.float32)  # positive floats are in the order of their bits
            scale = largest / np.float32(LARGEST)
            if largest < np.float32(LEAST):
                scale = np.float32(0)
            else:
                factor = np.float32(LARGEST) / largest
        first = at // GROUP * (SUMS // 2)
        scales[t, first : first + SUMS // 2] = scale
        _round_group(row, at, factor, q, t, corrections)


@njit("void(f4[:,::1],f4[::1],i8[::1],i1[:,::1],f4[:,::1],i4[:,::1])", nogil=True, cache=True)
def quantize_inputs(
    x: F32, signs: F32, sizes: NDArray[np.int64], q: NDArray[np.int8], scales: F32, corrections: NDArray[np.int32]
) -> None:
    """`x [T, n]` rotated (`signs [n]`, `sizes` of the blocks) and rounded to bytes `q [T, planes.padded(n)]`.

    Of the bytes of each group of 256 columns, `scale * q` is the rotated value. `scales` and `corrections` `[T,
    padded(n) / 32]` hold, for each of the 16 sums of 512 columns, the scale of its group, and -128 times the sum of its
    bytes (what is too much when levels are raised by 128). A group that holds NaN or infinity has NaN for its scale.
    """
    row = np.zeros(q.shape[1], np.float32)
    for t in range(x.shape[0]):
        quantize_row(x[t], signs, sizes, row, t, q, scales, corrections)


def reference_quantize_inputs(
    x: F32, signs: F32, sizes: NDArray[np.int64], q: NDArray[np.int8], scales: F32, corrections: NDArray[np.int32]
) -> None:
    """Group by group, from the rotation's definition; `q` is what follows, `scales` differ by roundings."""
    tokens, p = q.shape
    rotated = np.zeros((tokens, p), np.float32)
    reference_rotate_inputs(x, signs, sizes, rotated)
    groups = rotated.reshape(tokens, p // GROUP, GROUP)
    largest = np.abs(groups).max(2, keepdims=True)
    scale = np.where(largest < LEAST, 0, largest / LARGEST)
    whole = np.rint(groups / np.where(scale > 0, scale, 1) * (scale > 0)).reshape(tokens, p // COLUMNS, COLUMNS)
    q[:] = whole[:, :, column_order()].reshape(q.shape)
    scales[:] = np.repeat(scale[:, :, 0], SUMS // 2, axis=1)
    sums = q.reshape(tokens, p // COLUMNS, VECTORS, SUMS, 4).astype(np.int32).sum((2, 4))
    corrections[:] = -128 * sums.reshape(corrections.shape)
