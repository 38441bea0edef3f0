"""The slow, obvious reading of stored weights: whole matrices, in numpy, in float64. What `matmul` and `take_rows` are
compared with; the other kernels have their references beside them.

It follows the specification in `formats/kinds` and shares no line with the kernels, nor with `formats/blocks`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .planes import COLUMNS, GROUP, SUMS, column_order
from .rows import BF16, F16, F32, I8, MASK, PLANE, SHARED_PLANE, SIGNS, VALUES_F16, VALUES_I8

F64 = NDArray[np.float64]


def reference_levels(stored: NDArray[np.uint16], blocks: NDArray[np.int64], m: int, n: int) -> list[F64]:
    """What each of `blocks [levels, 3]` adds to the weight `[m, n]`; tiers as one, planes as one, rotated."""
    raw = stored.tobytes()
    if len(blocks) and blocks[0, 0] == MASK:
        return [_tiers(raw, blocks, m, n)]
    if len(blocks) and blocks[0, 0] >= PLANE:
        return [_planes(raw, blocks, m, n)]
    return [_level(raw[at:], int(kind), m, n, int(rank)) for kind, at, rank in blocks]


def reference_matmul(
    stored: NDArray[np.uint16],
    blocks: NDArray[np.int64],
    n: int,
    x: NDArray[np.float32],
    scratch: NDArray[np.float32],
    y: NDArray[np.float32],
) -> None:
    """Add up the levels, multiply."""
    weight = sum(reference_levels(stored, blocks, y.shape[1], n), np.zeros((y.shape[1], n)))
    y[:] = x[:, :n].astype(np.float64) @ weight.T


def reference_take_rows(
    stored: NDArray[np.uint16], blocks: NDArray[np.int64], m: int, tokens: NDArray[np.int64], y: NDArray[np.float32]
) -> None:
    """Add up the levels, pick rows."""
    weight = sum(reference_levels(stored, blocks, m, y.shape[1]), np.zeros((m, y.shape[1])))
    y[:] = weight[tokens]


def reference_multiply_planes(
    instructions: int,
    stored: NDArray[np.uint8],
    blocks: NDArray[np.int64],
    n: int,
    x: NDArray[np.int8],
    scales: NDArray[np.float32],
    corrections: NDArray[np.int32],
    scratch: NDArray[np.uint8],
    y: NDArray[np.float32],
) -> None:
    """Put the tokens' columns in their order, scale them, multiply."""
    weight = reference_levels(stored.view(np.uint16), blocks, y.shape[1], n)[0]
    y[:] = reference_inputs(x, scales)[:, :n] @ weight.T


def reference_multiply_sum(
    instructions: int,
    stored: NDArray[np.uint8],
    blocks: NDArray[np.int64],
    made: NDArray[np.uint8],
    n: int,
    x: NDArray[np.int8],
    scales: NDArray[np.float32],
    corrections: NDArray[np.int32],
    scratch: NDArray[np.uint8],
    singles: NDArray[np.float32],
    y: NDArray[np.float32],
) -> None:
    """What the bytes stand for, times the weight that is stored: nothing of it is rounded."""
    weight = sum(reference_levels(stored.view(np.uint16), blocks, y.shape[1], n), np.zeros((y.shape[1], n)))
    y[:] = reference_sum_inputs(blocks, made, n, x, scales) @ weight.T


def reference_multiply_sparse(
    kind: int,
    stored: NDArray[np.uint8],
    blocks: NDArray[np.int64],
    n: int,
    x: NDArray[np.float32],
    y: NDArray[np.float32],
) -> None:
    """Put the weight together, multiply."""
    weight = reference_levels(stored.view(np.uint16), blocks, y.shape[1], n)[0]
    y[:] = x.astype(np.float64) @ weight.T


def reference_sum_inputs(
    blocks: NDArray[np.int64], made: NDArray[np.uint8], n: int, x: NDArray[np.int8], scales: NDArray[np.float32]
) -> F64:
    """The values that bytes `x [T, p]` of `rounding.round_inputs` stand for, divided by c again, `[T, n]`."""
    tokens, count = len(x), x.shape[1] // COLUMNS
    scale = scales.astype(np.float64).reshape(tokens, count, 1, SUMS, 1)
    grouped = x.reshape(tokens, count, COLUMNS // SUMS // 4, SUMS, 4) * scale
    columns = grouped.reshape(tokens, count, COLUMNS).copy()
    if not len(made):
        return columns.reshape(x.shape)[:, :n]
    columns[:, :, column_order()] = grouped.reshape(columns.shape)
    c = made[: 4 * n].view("<f4").astype(np.float64)
    return np.divide(columns.reshape(x.shape)[:, :n], c, out=np.zeros((len(x), n)), where=c > 0)


def reference_inputs(x: NDArray[np.int8], scales: NDArray[np.float32]) -> F64:
    """The rotated values that bytes `x [T, p]` and their scales stand for, `[T, p]`."""
    columns = np.empty((len(x), x.shape[1] // COLUMNS, COLUMNS))
    columns[:, :, column_order()] = x.reshape(columns.shape)
    return columns.reshape(x.shape) * np.repeat(scales[:, :: SUMS // 2].astype(np.float64), GROUP, axis=1)


def _level(raw: bytes, kind: int, m: int, n: int, rank: int) -> F64:
    if kind == SIGNS:
        width = -(-n // 64) * 8
        bits = np.unpackbits(np.frombuffer(raw, np.uint8, m * width).reshape(m, width), axis=1, bitorder="little")
        factors = np.frombuffer(raw, "<f2", rank * (m + n), m * width).astype(np.float64)
        u, v = factors[: m * rank].reshape(m, rank), factors[m * rank :].reshape(rank, n)
        return np.where(bits[:, :n] == 1, 1.0, -1.0) * (u @ v)
    if kind == I8:
        scale = np.frombuffer(raw, "<f4", m).astype(np.float64)
        return scale[:, None] * np.frombuffer(raw, np.int8, m * n, 4 * m).reshape(m, n)
    if kind == BF16:
        top = np.frombuffer(raw, "<u2", m * n).astype("<u4") << 16
        return top.view("<f4").reshape(m, n).astype(np.float64)
    return np.frombuffer(raw, {F32: "<f4", F16: "<f2"}[kind], m * n).reshape(m, n).astype(np.float64)


def _tiers(raw: bytes, blocks: NDArray[np.int64], m: int, n: int) -> F64:
    """Row by row: of the columns that are left, the bits say which get the next values."""
    weight = np.zeros((m, n))
    left = [list(range(n)) for _ in range(m)]
    scale = np.ones(m)
    for (_, mask, rank), (kind, at, _) in zip(blocks[::2], blocks[1::2], strict=False):
        if kind != VALUES_F16 and len(left[0]) == n:
            scale = np.frombuffer(raw, "<f4", m, at).astype(np.float64)
            at += 4 * m
        for i, columns in enumerate(left):
            width = -(-len(columns) // 64) * 8
            bits = np.unpackbits(np.frombuffer(raw, np.uint8, width, mask + i * width), bitorder="little")
            chosen = [column for column, bit in zip(columns, bits, strict=False) if bit]
            if kind == VALUES_F16:
                values = np.frombuffer(raw, "<f2", rank, at + 2 * i * rank).astype(np.float64)
            elif kind == VALUES_I8:
                values = np.frombuffer(raw, np.int8, rank, at + i * rank).astype(np.float64)
            else:
                both = np.frombuffer(raw, np.uint8, -(-rank // 2), at + i * -(-rank // 2)).astype(np.int64)
                halves = np.stack([both % 16, both // 16], axis=1).reshape(-1)[:rank]
                values = np.where(halves > 7, halves - 16, halves).astype(np.float64)
            weight[i, chosen] = scale[i] * values
            left[i] = [column for column, bit in zip(columns, bits, strict=False) if not bit]
    return weight


def _planes(raw: bytes, blocks: NDArray[np.int64], m: int, n: int) -> F64:
    width = -(-n // 64) * 8
    index = np.zeros((m, n), np.int64)
    levels = np.zeros((m, 0))
    for level, (kind, at, _) in enumerate(blocks):
        count = 1 if level else 2
        bits = np.frombuffer(raw, np.uint8, count * m * width, at).reshape(count, m, width)
        for plane in np.unpackbits(bits, axis=2, count=n, bitorder="little"):
            index = 2 * index + plane
        at += count * m * width
        scale = (np.frombuffer(raw, "<u2", m, at).astype("<u4") << 16).view("<f4").astype(np.float64)[:, None]
        size = 2 ** (level + 2)
        shared = kind == SHARED_PLANE
        stored = np.frombuffer(raw, np.int8, size if shared else m * size, at + 2 * m)
        levels = scale * stored.astype(np.float64).reshape(-1, size)
    return np.take_along_axis(levels, index, axis=1)
