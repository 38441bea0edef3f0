"""Block payloads: numpy arrays to the bytes laid out in `kinds`, and back. Needs numpy; the container does not.

Unpacking here is the slow, obvious reading of the specification; serving computes from the packed bytes (`kernels`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BadBlock
from .kinds import dense_nbytes, signs_nbytes, words_per_row
from .stack import BlockEntry

F32 = NDArray[np.float32]
F16 = NDArray[np.float16]


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


def block_weight(entry: BlockEntry, payload: bytes | memoryview) -> F32:
    """What one block adds to its tensor, in float32."""
    if entry.kind == "dense":
        return unpack_dense(payload, entry.shape, entry.dtype)
    positive, u, v = unpack_signs(payload, entry.shape[0], entry.shape[1], entry.rank)
    magnitude = u.astype(np.float32) @ v.astype(np.float32)
    return np.where(positive, magnitude, -magnitude)


def sum_blocks(blocks: Iterable[tuple[BlockEntry, bytes]]) -> dict[str, F32]:
    """Every tensor's weights, in float32, as these blocks of a stack approximate them."""
    weights: dict[str, F32] = {}
    for entry, payload in blocks:
        part = block_weight(entry, payload)
        weights[entry.tensor] = weights[entry.tensor] + part if entry.tensor in weights else part
    return weights


def check_finite(entry: BlockEntry, payload: NDArray[np.uint8]) -> None:
    """Raises `BadBlock` when a number stored in the block (scale, factor, raw value) is NaN or infinite.

    `payload` holds at least the entry's bytes, aligned to 64.
    """
    numbers: NDArray[Any]
    if entry.kind == "signs":
        m, n = entry.shape
        numbers = payload[8 * m * words_per_row(n) : entry.nbytes].view(np.uint16)
        bad = bool(np.any((numbers & 0x7C00) == 0x7C00))
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
