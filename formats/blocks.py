"""Block payloads: numpy arrays to the bytes laid out in `kinds`, and back. Needs numpy; the container does not.

Unpacking here is the slow, obvious reading of the specification; serving computes from the packed bytes (`kernels`).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BadBlock
from .index import BlockEntry
from .kinds import (
    SHARED_LEVELS,
    VALUES_LIMIT,
    dense_nbytes,
    mask_nbytes,
    planes_nbytes,
    rotation_blocks,
    rotation_sign,
    signs_nbytes,
    values_nbytes,
    values_row_nbytes,
    words_per_row,
)

F32 = NDArray[np.float32]
F16 = NDArray[np.float16]
I8 = NDArray[np.int8]
Mask = NDArray[np.bool_]


def pack_dense(weight: F32, dtype: str) -> bytes:
    """`weight` of any shape -> a dense payload. Raises `BadBlock` when a value is NaN or does not fit `dtype`."""
    if not np.isfinite(weight).all():
        raise BadBlock("NaN or infinity among the weights")
    match dtype:
        case "f32":
            data = weight.astype("<f4").tobytes()
        case "f16":
            if np.abs(weight).max() > np.finfo(np.float16).max:
                raise BadBlock("a weight is too large for f16")
            data = weight.astype("<f2").tobytes()
        case "bf16":
            rounded = _round_to_bf16(weight)
            if np.any((rounded & 0x7F80) == 0x7F80):
                raise BadBlock("a weight is too large for bf16")
            data = rounded.tobytes()
        case _:
            data = _pack_int8(weight)
    assert len(data) == dense_nbytes(weight.shape, dtype)
    return data


def unpack_dense(payload: bytes | memoryview, shape: tuple[int, ...], dtype: str) -> F32:
    """A dense payload -> float32 weights of `shape`."""
    if dtype == "i8":
        rows = shape[0] if len(shape) > 1 else 1
        scale = np.frombuffer(payload, "<f4", rows)
        values = np.frombuffer(payload, np.int8, offset=4 * rows).reshape(rows, -1)
        return (scale[:, None] * values).reshape(shape).astype(np.float32)
    if dtype == "bf16":
        return (np.frombuffer(payload, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(payload, {"f32": "<f4", "f16": "<f2"}[dtype]).reshape(shape).astype(np.float32)


def pack_signs(positive: NDArray[np.bool_], u: F16, v: F16) -> bytes:
    """Signs `positive [m, n]` (true is plus) and factors `u [m, k]`, `v [k, n]` -> a signs payload.

    Raises `BadBlock` for factors that are not finite.
    """
    m, n = positive.shape
    if not (np.isfinite(u).all() and np.isfinite(v).all()):
        raise BadBlock("NaN or infinity among the factors")
    bits = np.zeros((m, words_per_row(n) * 64), np.uint8)
    bits[:, :n] = positive
    data = (
        np.packbits(bits, axis=1, bitorder="little").tobytes() + u.astype("<f2").tobytes() + v.astype("<f2").tobytes()
    )
    assert len(data) == signs_nbytes(m, n, u.shape[1])
    return data


def unpack_signs(payload: bytes | memoryview, m: int, n: int, rank: int) -> tuple[NDArray[np.bool_], F16, F16]:
    """The inverse of `pack_signs`."""
    width = words_per_row(n) * 8
    bits = np.frombuffer(payload, np.uint8, m * width).reshape(m, width)
    positive = np.unpackbits(bits, axis=1, count=n, bitorder="little").astype(np.bool_)
    factors = np.frombuffer(payload, "<f2", rank * (m + n), m * width)
    return positive, factors[: m * rank].reshape(m, rank), factors[m * rank :].reshape(rank, n)


def pack_plane(planes: NDArray[np.bool_], scale: F32, levels: I8) -> bytes:
    """Planes `[p, m, n]`, row scales `[m]` that bf16 holds exactly, and levels `[m, 2^d]`, or `[2^d]` for all rows.

    Raises `BadBlock` for scales that are not finite, or a level of -128.
    """
    if not np.isfinite(scale).all():
        raise BadBlock("NaN or infinity among the scales")
    if np.any(levels == -128):
        raise BadBlock("a level of -128")
    count, m, n = planes.shape
    bits = np.zeros((count, m, words_per_row(n) * 64), np.uint8)
    bits[:, :, :n] = planes
    packed = np.packbits(bits, axis=2, bitorder="little").tobytes()
    stored = (np.ascontiguousarray(scale, "<f4").view("<u4") >> 16).astype("<u2")
    return packed + stored.tobytes() + levels.tobytes()


def unpack_plane(entry: BlockEntry, payload: bytes | memoryview) -> tuple[NDArray[np.bool_], F32, I8]:
    """The inverse of `pack_plane`."""
    m, n = entry.shape
    width, size = words_per_row(n) * 8, planes_nbytes(m, n, entry.level)
    bits = np.frombuffer(payload, np.uint8, size).reshape(-1, m, width)
    planes = np.unpackbits(bits, axis=2, count=n, bitorder="little").astype(np.bool_)
    scale = (np.frombuffer(payload, "<u2", m, size).astype(np.uint32) << 16).view(np.float32)
    levels = np.frombuffer(payload, np.int8, entry.nbytes - size - 2 * m, size + 2 * m)
    return planes, scale, levels if entry.dtype == SHARED_LEVELS else levels.reshape(m, -1)


def pack_mask(tier: Mask, before: Mask) -> bytes:
    """Where a tier has its values, `tier [m, n]`; `before [m, n]` says which columns earlier tiers have filled.

    Raises `BadBlock` when rows differ in how many there are of either, or a column is in both.
    """
    (m, n), filled, count = tier.shape, before.sum(axis=1), tier.sum(axis=1)
    if np.any(filled != filled[0]) or np.any(count != count[0]) or not count[0]:
        raise BadBlock("rows of a tier have different numbers of values, or none")
    if np.any(tier & before):
        raise BadBlock("a column of a tier is in an earlier one")
    left = n - int(filled[0])
    bits = np.zeros((m, words_per_row(left) * 64), np.uint8)
    bits[:, :left] = tier[~before].reshape(m, left)
    data = np.packbits(bits, axis=1, bitorder="little").tobytes()
    assert len(data) == mask_nbytes(m, n, int(filled[0]))
    return data


def unpack_mask(payload: bytes | memoryview, m: int, n: int, before: Mask) -> Mask:
    """The inverse of `pack_mask`: `[m, n]`."""
    left = n - int(before[0].sum())
    width = words_per_row(left) * 8
    bits = np.frombuffer(payload, np.uint8, m * width).reshape(m, width)
    tier = np.zeros((m, n), np.bool_)
    tier[~before] = np.unpackbits(bits, axis=1, count=left, bitorder="little").astype(np.bool_).reshape(-1)
    return tier


def pack_values(values: F32, dtype: str, scale: F32 | None, first: bool) -> bytes:
    """A tier's `values [m, c]`, in the order of columns; `first`: of tier 0, which holds the scales.

    `scale [m]`, for integers, is that of all tiers; what is beyond its largest multiple is cut off. Raises `BadBlock`
    for values or scales that are not finite or, as f16, too large.
    """
    if not np.isfinite(values).all() or (scale is not None and not np.isfinite(scale).all()):
        raise BadBlock("NaN or infinity among the values")
    if dtype == "f16":
        if np.abs(values).max() > np.finfo(np.float16).max:
            raise BadBlock("a value is too large for f16")
        return values.astype("<f2").tobytes()
    assert scale is not None
    limit = VALUES_LIMIT[dtype]
    numbers = np.rint(values / np.where(scale != 0, scale, 1)[:, None]).clip(-limit, limit).astype(np.int8)
    if dtype == "i4":
        halves = np.zeros((len(values), values_row_nbytes(dtype, values.shape[1]) * 2), np.uint8)
        halves[:, : values.shape[1]] = numbers.view(np.uint8) & 15
        stored = (halves[:, ::2] | halves[:, 1::2] << 4).tobytes()
    else:
        stored = numbers.tobytes()
    data: bytes = (scale.astype("<f4").tobytes() if first else b"") + stored
    assert len(data) == values_nbytes(len(values), 0 if first else 1, dtype, values.shape[1])
    return data


def unpack_values(entry: BlockEntry, payload: bytes | memoryview, scale: F32 | None = None) -> tuple[F32, F32 | None]:
    """The inverse of `pack_values`: a tier's values `[m, c]` and the rows' scales `[m]`, if there are any.

    `scale` is what tier 0 gave, for the tiers after it.
    """
    m, rank = entry.shape[0], entry.rank
    if entry.dtype == "f16":
        return np.frombuffer(payload, "<f2", m * rank).reshape(m, rank).astype(np.float32), None
    start = 0
    if entry.level == 0:
        scale, start = np.frombuffer(payload, "<f4", m).astype(np.float32), 4 * m
    assert scale is not None
    stored = np.frombuffer(payload, np.int8, m * values_row_nbytes(entry.dtype, rank), start).reshape(m, -1)
    if entry.dtype == "i4":
        low, high = stored << 4 >> 4, stored >> 4
        stored = np.stack([low, high], axis=2).reshape(m, -1)[:, :rank]
    return scale[:, None] * stored.astype(np.float32), scale


def rotation_signs(n: int) -> F32:
    """The signs of a rotation's columns, `[n]`."""
    return np.array([rotation_sign(j) for j in range(n)], np.float32)


def rotate_rows(rows: F32) -> F32:
    """`x [T, n] -> Q x` of every row, by whole Hadamard matrices (`kinds` has the definition)."""
    return _by_blocks(rows * rotation_signs(rows.shape[1]))


def unrotate_rows(rows: F32) -> F32:
    """`y [T, n] -> Q^T y` of every row, the inverse of `rotate_rows`."""
    return _by_blocks(rows) * rotation_signs(rows.shape[1])


class GrowingWeight:
    """One tensor's weight as the blocks given so far, in the order of their levels, approximate it.

    Dense and signs blocks add up; planes lengthen every index, and the deepest levels replace those before; a tier's
    values fill the columns that its mask names.
    """

    def __init__(self) -> None:
        self._sum: F32 | None = None
        self._index: NDArray[np.uint8] | None = None
        self._levels: F32 | None = None
        self._filled: Mask | None = None
        self._tier: Mask | None = None
        self._scale: F32 | None = None

    def add(self, entry: BlockEntry, payload: bytes | memoryview) -> None:
        """Take the tensor's next block."""
        if entry.kind == "plane":
            self._add_plane(entry, payload)
            return
        if entry.kind == "mask":
            before = np.zeros(entry.shape, np.bool_) if self._filled is None else self._filled
            self._tier = unpack_mask(payload, entry.shape[0], entry.shape[1], before)
            return
        if entry.kind == "values":
            self._add_values(entry, payload)
            return
        part = _additive_part(entry, payload)
        self._sum = part if self._sum is None else self._sum + part

    def value(self) -> F32:
        """The weight, not rotated; at least one block must have been given."""
        if self._index is not None:
            assert self._levels is not None
            return unrotate_rows(np.take_along_axis(self._levels, self._index.astype(np.intp), axis=1))
        assert self._sum is not None
        return self._sum

    def _add_plane(self, entry: BlockEntry, payload: bytes | memoryview) -> None:
        planes, scale, stored = unpack_plane(entry, payload)
        index = np.zeros(entry.shape, np.uint8) if self._index is None else self._index
        for plane in planes:
            index = index << 1 | plane
        self._index, self._levels = index, scale[:, None] * stored.astype(np.float32)

    def _add_values(self, entry: BlockEntry, payload: bytes | memoryview) -> None:
        assert self._tier is not None
        values, self._scale = unpack_values(entry, payload, self._scale)
        self._sum = np.zeros(entry.shape, np.float32) if self._sum is None else self._sum.copy()
        self._sum[self._tier] = values.reshape(-1)
        self._filled = self._tier if self._filled is None else self._filled | self._tier
        self._tier = None


def sum_blocks(blocks: Iterable[tuple[BlockEntry, bytes]]) -> dict[str, F32]:
    """Every tensor's weights, in float32, as these blocks of a stack approximate them."""
    weights: dict[str, GrowingWeight] = {}
    for entry, payload in blocks:
        weights.setdefault(entry.tensor, GrowingWeight()).add(entry, payload)
    return {name: weight.value() for name, weight in weights.items()}


def check_finite(entry: BlockEntry, payload: NDArray[np.uint8], filled: int = 0) -> None:
    """Raises `BadBlock` when a number stored in the block (scale, factor, raw value) is NaN or infinite, a level of a
    plane or a value -128 (of four bits: -8), or a row of a mask has not as many ones as its entry says.

    `payload` holds at least the entry's bytes, aligned to 64. `filled` columns of each row have values in tiers before
    this one (`stack.filled_before`).
    """
    numbers: NDArray[Any]
    bad = False
    if entry.kind == "plane":
        m, n = entry.shape
        start = planes_nbytes(m, n, entry.level)
        levels = start + 2 * m
        bad = bool(np.any((payload[start:levels].view(np.uint16) & 0x7F80) == 0x7F80))
        if np.any(payload[levels : entry.nbytes] == 0x80):
            raise BadBlock(f"{entry.tensor} level {entry.level} holds a level of -128")
    elif entry.kind == "signs":
        m, n = entry.shape
        numbers = payload[8 * m * words_per_row(n) : entry.nbytes].view(np.uint16)
        bad = bool(np.any((numbers & 0x7C00) == 0x7C00))
    elif entry.kind == "mask":
        _check_mask(entry, payload, filled)
    elif entry.kind == "values":
        bad = _check_values(entry, payload)
    elif entry.dtype == "i8":
        bad = not np.isfinite(payload[: 4 * (entry.shape[0] if len(entry.shape) > 1 else 1)].view(np.float32)).all()
    elif entry.dtype == "f32":
        bad = not np.isfinite(payload[: entry.nbytes].view(np.float32)).all()
    else:
        exponent = 0x7F80 if entry.dtype == "bf16" else 0x7C00
        numbers = payload[: entry.nbytes].view(np.uint16)
        bad = bool(np.any((numbers & exponent) == exponent))
    if bad:
        raise BadBlock(f"{entry.tensor} level {entry.level} holds NaN or infinity")


def _check_mask(entry: BlockEntry, payload: NDArray[np.uint8], filled: int) -> None:
    """Kernels trust that rows begin where as many values as the entry says have been before them."""
    m, n = entry.shape
    words = payload[: entry.nbytes].view("<u8").reshape(m, -1)
    rest = (n - filled) % 64
    if np.any(np.bitwise_count(words).sum(axis=1, dtype=np.int64) != entry.rank):
        raise BadBlock(f"{entry.tensor} level {entry.level}: a row of the mask has not {entry.rank} ones")
    if rest and np.any(words[:, -1] >> np.uint64(rest)):
        raise BadBlock(f"{entry.tensor} level {entry.level}: a row of the mask has ones past its last column")


def _check_values(entry: BlockEntry, payload: NDArray[np.uint8]) -> bool:
    """Whether a number is NaN or infinite."""
    if entry.dtype == "f16":
        return bool(np.any((payload[: entry.nbytes].view(np.uint16) & 0x7C00) == 0x7C00))
    start = 4 * entry.shape[0] if entry.level == 0 else 0
    stored = payload[start : entry.nbytes]
    if np.any(stored == 0x80) if entry.dtype == "i8" else np.any((stored & 15) == 8) or np.any(stored >> 4 == 8):
        raise BadBlock(f"{entry.tensor} level {entry.level} holds a value of {-VALUES_LIMIT[entry.dtype] - 1}")
    return not np.isfinite(payload[:start].view(np.float32)).all()


def _additive_part(entry: BlockEntry, payload: bytes | memoryview) -> F32:
    if entry.kind == "dense":
        return unpack_dense(payload, entry.shape, entry.dtype)
    positive, u, v = unpack_signs(payload, entry.shape[0], entry.shape[1], entry.rank)
    magnitude = u.astype(np.float32) @ v.astype(np.float32)
    return np.where(positive, magnitude, -magnitude)


def _by_blocks(rows: F32) -> F32:
    """Each Hadamard block times its columns."""
    result, start = np.empty_like(rows), 0
    for size in rotation_blocks(rows.shape[1]):
        result[:, start : start + size] = rows[:, start : start + size] @ _hadamard(size)
        start += size
    return result


@cache
def _hadamard(size: int) -> F32:
    parity = np.array([[(i & j).bit_count() & 1 for j in range(size)] for i in range(size)])
    matrix: F32 = ((1 - 2 * parity) / size**0.5).astype(np.float32)
    return matrix


def _round_to_bf16(weight: F32) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(weight, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _pack_int8(weight: F32) -> bytes:
    rows = weight.reshape(weight.shape[0] if weight.ndim > 1 else 1, -1)
    scale = (np.abs(rows).max(axis=1) / 127).astype("<f4")
    # Clipped: a scale among the denormals is rounded coarsely, and 190 of its steps would wrap around.
    values = np.rint(rows / np.where(scale > 0, scale, 1)[:, None]).clip(-127, 127).astype(np.int8)
    data: bytes = scale.tobytes() + values.tobytes()
    return data
