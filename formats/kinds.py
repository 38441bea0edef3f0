"""Block kinds: the bytes of each, as arithmetic. No numpy here; `blocks` packs and unpacks the same layouts.

Numbers are little-endian. `words = ceil(n / 64)`.

    dense   raw values, row by row: bf16, f16 or f32. With i8: one f32 scale per row `[m]`, then int8 `[m, n]`;
            value = scale * int8 (a vector counts as one row).
    signs   packed signs `[m, words]` u64 (bit j of word w is column 64 w + j; 1 means plus; bits past n are 0),
            then U `[m, k]` f16, then V `[k, n]` f16. Adds  S * (U V)  to the weight, S = +-1.
            Source: BitStack, arXiv 2410.23918, section 3.
"""

from __future__ import annotations

from math import prod
from typing import Final, Literal

from .errors import BadBlock, UnknownKind

Dtype = Literal["bf16", "f16", "f32", "i8"]
Kind = Literal["dense", "signs"]

ITEM_NBYTES: Final[dict[str, int]] = {"bf16": 2, "f16": 2, "f32": 4, "i8": 1}


def words_per_row(n: int) -> int:
    """64-bit words that hold `n` bits."""
    return -(-n // 64)


def dense_nbytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a dense block. Raises `BadBlock` for an unknown dtype."""
    if dtype not in ITEM_NBYTES:
        raise BadBlock(f"dense block of dtype {dtype!r}; known: {', '.join(ITEM_NBYTES)}")
    scales = 4 * (shape[0] if len(shape) > 1 else 1) if dtype == "i8" else 0
    return scales + prod(shape) * ITEM_NBYTES[dtype]


def signs_nbytes(m: int, n: int, rank: int) -> int:
    """Bytes of a signs block of rank `rank`."""
    return 8 * m * words_per_row(n) + 2 * rank * (m + n)


def payload_nbytes(kind: str, shape: tuple[int, ...], *, dtype: str = "", rank: int = 0) -> int:
    """Bytes of a block before padding. Raises `UnknownKind`, or `BadBlock` for parameters that make no sense."""
    if not shape or min(shape) < 1:
        raise BadBlock(f"shape {list(shape)} has no elements")
    match kind:
        case "dense":
            if rank:
                raise BadBlock(f"dense block of rank {rank}; only signs blocks have one")
            return dense_nbytes(shape, dtype)
        case "signs":
            if len(shape) != 2 or rank < 1 or rank > min(shape) or dtype:
                raise BadBlock(
                    f"signs block of shape {list(shape)}, rank {rank}; want a matrix and 1 <= rank <= min(m, n)"
                )
            return signs_nbytes(shape[0], shape[1], rank)
        case _:
            raise UnknownKind(
                f"block kind {kind!r}; this version knows dense and signs, a newer one may read this file"
            )
