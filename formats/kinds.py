"""Block kinds: the bytes of each, as arithmetic. No numpy here; `blocks` packs and unpacks the same layouts.

Numbers are little-endian. `words = ceil(n / 64)`.

    dense   raw values, row by row: bf16, f16 or f32. With i8: one f32 scale per row `[m]`, then int8 `[m, n]`;
            value = scale * int8 (a vector counts as one row).
    signs   packed signs `[m, words]` u64 (bit j of word w is column 64 w + j; 1 means plus; bits past n are 0),
            then U `[m, k]` f16, then V `[k, n]` f16. Adds  S * (U V)  to the weight, S = +-1.
            Source: BitStack, arXiv 2410.23918, section 3.
    plane   one more bit of every weight's index, and the levels that the index then chooses from.
            Level 0 of a tensor holds the two top bits, as two planes, and each later level one plane more: level l
            reaches depth d = l + 2, at most 8. A plane is `[m, words]` u64, packed like signs, the top bit first.
            Then scales `[m]` bf16, one a row, then levels, by dtype:
                i8          `[m, 2^d]` int8: index c of row r means  scale[r] * level[r, c].
                i8-shared   `[2^d]` int8, the same for all rows: index c of row r means  scale[r] * level[c].
            Levels lie in [-127, 127], so that integer kernels may negate them; -128 makes a block bad. Nothing is
            padded: planes end at a multiple of 8 bytes, scales at one of 2.
            All blocks of such a tensor are planes, and the levels of the deepest replace those before. The values make
            the *rotated* weight  W Q^T,  which wants its input rotated too:  y = (W Q^T) (Q x).
    mask    where a tier has its values. Tier t of a tensor (the level) has the same number of values in every row: the
            index's `rank`, c_t. A row is one bit for each of its columns that no earlier tier has filled,
            p = n - (c_0 + ... + c_(t-1)) of them, in the order of columns, packed like signs: `[m, ceil(p / 64)]` u64.
            1 means that the column has a value in this tier; every row has exactly c_t ones, 1 <= c_t <= p.
    values  a tier's numbers, row by row in the order of columns, c_t in each (`rank` again); where the original has
            fewer in a row, it is filled up with zeros. By dtype, which is one for all tiers of a tensor:
                f16     `[m, c_t]` f16.
                i8      with tier 0 one f32 scale per row `[m]`, which holds for all tiers; then int8 `[m, c_t]` in
                        [-127, 127]; value = scale * int8.
                i4      the same in [-7, 7], two to a byte, the low half first; a row is ceil(c_t / 2) bytes, the last
                        half is 0 if it is of no column.
            -128 or -8 makes a block bad. All blocks of such a tensor are masks and values in turn, values being of the
            level of the mask before. A mask whose values are not there yet counts for nothing; columns that no tier
            has filled are 0. Inputs are not rotated.

Rotation Q, n x n: column j's sign is minus where `splitmix64(j)` has its top bit set; then Hadamard blocks of the sizes
`rotation_blocks(n)`: `y[i] = sum_j (-1)^popcount(i & j) x[j] / sqrt(size)`. It spreads outliers of weights and
activations over a block. It depends on n alone, so nothing of it is stored, and all tensors that read the same input
share it; signs that differ from file to file would protect only against weights made to fit these. A row that is looked
up (an embedding) is rotated back.
"""

from __future__ import annotations

from math import prod
from typing import Final, Literal

from .errors import BadBlock, UnknownKind

Dtype = Literal["bf16", "f16", "f32", "i8"]
Kind = Literal["dense", "signs", "plane", "mask", "values"]

ITEM_NBYTES: Final[dict[str, int]] = {"bf16": 2, "f16": 2, "f32": 4, "i8": 1}
ROW_LEVELS: Final = "i8"  # dtypes of plane blocks: a table for each row, or one for all
SHARED_LEVELS: Final = "i8-shared"
VALUES_LIMIT: Final[dict[str, int]] = {"i8": 127, "i4": 7}  # the largest of values stored as integers
VALUES_DTYPES: Final = ("f16", *VALUES_LIMIT)
BASE_PLANES: Final = 2
MAX_DEPTH: Final = 8
LARGEST_ROTATION: Final = 256


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


def plane_depth(level: int) -> int:
    """Bits of the index that are known with level `level` of a tensor made of planes."""
    return level + BASE_PLANES


def planes_nbytes(m: int, n: int, level: int) -> int:
    """Bytes of the planes alone, with which a plane block begins."""
    return 8 * m * words_per_row(n) * (1 if level else BASE_PLANES)


def plane_nbytes(m: int, n: int, level: int, dtype: str) -> int:
    """Bytes of a plane block: planes, scales, levels."""
    return planes_nbytes(m, n, level) + 2 * m + ((1 if dtype == SHARED_LEVELS else m) << plane_depth(level))


def mask_nbytes(m: int, n: int, filled: int) -> int:
    """Bytes of a mask block; `filled` columns of every row have values in earlier tiers."""
    return 8 * m * words_per_row(n - filled)


def values_row_nbytes(dtype: str, rank: int) -> int:
    """Bytes of one row of a tier's values, without its scale."""
    return {"f16": 2 * rank, "i8": rank, "i4": -(-rank // 2)}[dtype]


def values_nbytes(m: int, level: int, dtype: str, rank: int) -> int:
    """Bytes of a values block, scales included."""
    return (4 * m if level == 0 and dtype in VALUES_LIMIT else 0) + m * values_row_nbytes(dtype, rank)


def rotation_blocks(n: int) -> tuple[int, ...]:
    """Sizes of the Hadamard blocks: n split greedily into powers of two, at most 256. 576 = 256 + 256 + 64."""
    sizes = [LARGEST_ROTATION] * (n // LARGEST_ROTATION)
    rest = n % LARGEST_ROTATION
    return (*sizes, *(1 << bit for bit in range(rest.bit_length() - 1, -1, -1) if rest >> bit & 1))


def rotation_sign(j: int) -> int:
    """+1 or -1: what column j is multiplied with before its Hadamard block."""
    z = (j + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ z >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return -1 if (z ^ z >> 31) >> 63 else 1


def payload_nbytes(
    kind: str, shape: tuple[int, ...], *, dtype: str = "", rank: int = 0, level: int = 0, filled: int = 0
) -> int:
    """Bytes of a block before padding; `filled` columns of each row have values in tiers before this one.

    Raises `UnknownKind`, or `BadBlock` for parameters that make no sense.
    """
    if not shape or min(shape) < 1:
        raise BadBlock(f"shape {list(shape)} has no elements")
    match kind:
        case "dense":
            if rank:
                raise BadBlock(f"dense block of rank {rank}; only signs, masks and values have one")
            return dense_nbytes(shape, dtype)
        case "signs":
            if len(shape) != 2 or rank < 1 or rank > min(shape) or dtype:
                raise BadBlock(
                    f"signs block of shape {list(shape)}, rank {rank}; want a matrix and 1 <= rank <= min(m, n)"
                )
            return signs_nbytes(shape[0], shape[1], rank)
        case "plane":
            if len(shape) != 2 or not 0 <= level <= MAX_DEPTH - BASE_PLANES or dtype not in (ROW_LEVELS, SHARED_LEVELS):
                raise BadBlock(
                    f"plane block of shape {list(shape)}, level {level}, dtype {dtype!r}; want a matrix, a level of 0 "
                    f"to {MAX_DEPTH - BASE_PLANES} and levels as {ROW_LEVELS} or {SHARED_LEVELS}"
                )
            return plane_nbytes(shape[0], shape[1], level, dtype)
        case "mask" | "values":
            wanted = ("",) if kind == "mask" else VALUES_DTYPES
            if len(shape) != 2 or level < 0 or filled < 0 or not 1 <= rank <= shape[1] - filled or dtype not in wanted:
                raise BadBlock(
                    f"{kind} block of shape {list(shape)}, rank {rank}, dtype {dtype!r}, {filled} columns filled; want "
                    f"a matrix, 1 <= rank <= columns left, and values as {', '.join(VALUES_DTYPES)}"
                )
            if kind == "mask":
                return mask_nbytes(shape[0], shape[1], filled)
            return values_nbytes(shape[0], level, dtype, rank)
        case _:
            raise UnknownKind(
                f"block kind {kind!r}; this version knows dense, signs, plane, mask and values, a newer one may read "
                "this file"
            )
