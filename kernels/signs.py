"""`y[T, m] = x[T, n] @ W^T` in integers for weights that are a sum of blocks: signs of rank 1, or anything else but
planes.

Four rows of W at a time become bytes, which are multiplied with all tokens of the step by `planes.dot`.

Method, for `signs` blocks of rank 1: row i of W is `sum_l S_l[i, j] U_l[i] V_l[j]`. The V's belong to the whole matrix.
`prepare` makes them bytes, once for a resident prefix: `V_l[j] = v_l c[j] size_l[j] / 127`, where `c[j]` is the largest
of column j over the levels, each by its median. So rows need only their own factors `U_l[i] v_l` in bytes, whose sum is
at most 254: two levels at a time, `+-factor * size` is one multiply-add of bytes, and the sum over levels is 16 bits of
which the upper 8 are kept. The signs of four levels are interleaved as planes are (`vectors`), and an index looks up
`+-factor`. A token is multiplied with c before it is made bytes.

Other blocks go the plain way: rows of W are decoded to floats (`rows`), and rounded to bytes with a scale for each row.
A lone block of int8 is just copied, and the values of tiers go to their columns as bytes (`sparse`), which gives the
same. Columns keep their order then.

Inputs come from `rounding`. Determinism is that of `planes`. Layouts are those of `formats/kinds`.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit, prange, types
from numba.core.cgutils import alloca_once
from numba.extending import intrinsic, register_jitable
from numpy.typing import NDArray

from .instructions import PORTABLE
from .later import loaded_later
from .planes import (
    COLUMNS,
    FLOATS,
    INTEGERS,
    MOST_TOKENS,
    SETS,
    SUMS,
    TILES,
    USABLE,
    VECTORS,
    column_order,
    dot,
    padded,
    portable_dot,
)
from .quantize import LARGEST, LEAST
from .rows import I8, JIT_OFF, ROWS, SIGNS, WORD, decode_rows, half_to_float, largest_rank
from .sparse import expand_rows, expansion_nbytes
from .tiers import sparse
from .vectors import (
    AHEAD,
    LANE,
    Bytes,
    cases,
    constant,
    i16,
    load,
    loop,
    number,
    plain,
    pointer,
    prefetch,
    store,
    vector,
    width,
)

GROUPED: Final = 4  # levels decoded together
MOST_LEVELS: Final = 100  # of which the factors' roundings cannot overflow
_LARGEST_SUM: Final = 254  # of a row's factors: 254 * 127 are 15 bits
_EACH: Final = np.uint64(0x0101010101010101)
# of the bytes of an index's table, those where a level's bit is set, as two 64-bit words: [level, half]
_POSITIVE: Final = np.array(
    [[0xFF * ((index >> (GROUPED - 1 - level)) & 1) for index in range(16)] for level in range(GROUPED)], np.uint8
).view("<u8")
_FLIPS: Final = np.array([SETS[code].flip if code in SETS else 0 for code in range(len(TILES))], np.uint8)
_ROUND: Final = np.float32(12582912.0)  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits
_ROUND_BITS: Final = int(_ROUND.view(np.int32))

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]


@register_jitable
def integral(blocks: I64) -> bool:
    """Whether `prepare` is wanted for these blocks."""
    for level in range(blocks.shape[0]):
        if blocks[level, 0] != SIGNS or blocks[level, 2] != 1:
            return False
    return bool(0 < blocks.shape[0] <= MOST_LEVELS)


@register_jitable
def groups_of(levels: int) -> int:
    """Groups of GROUPED levels, the last filled up with levels of nothing."""
    return -(-levels // GROUPED)


@register_jitable
def table_nbytes(blocks: I64, n: int) -> int:
    """Scratch for the factors of ROWS rows, or for `expand_rows`; a multiple of 64."""
    if sparse(blocks):
        return expansion_nbytes(n)
    return max(_line(4 * ROWS * largest_rank(blocks)), _line(GROUPED * groups_of(blocks.shape[0]) * (8 + 16 * ROWS)))


@register_jitable
def made_places(levels: int, n: int) -> tuple[int, int, int, int]:
    """Where units, flips and magnitudes begin in what `prepare` makes, and its end; multiples of 64."""
    units = _line(4 * n)
    flips = units + _line(4 * levels)
    magnitudes = flips + _line(8 * -(-n // WORD) * GROUPED * groups_of(levels))
    return units, flips, magnitudes, magnitudes + GROUPED * groups_of(levels) * padded(n)


@register_jitable
def _line(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def prepare(stored: NDArray[np.uint16], blocks: I64, m: int, n: int) -> U8:
    """What a weight `[m, n]` of `integral` blocks needs beside them, in one array of bytes.

    First c `[n]`, then the units v `[levels]`, both float32; flips `[levels, words]`, 64-bit words with a bit wherever
    V is negative; and magnitudes `[groups, blocks of 512 columns, 2 pairs of levels, 8 vectors, 2 halves, 4 lanes, 8
    columns, 2 levels]`: bytes up to 127, columns in `planes.column_order`.
    """
    levels, words = len(blocks), -(-n // WORD)
    starts = [int(at) // 2 + m * words * (WORD // 16) + m for _, at, _ in blocks]
    v = np.stack([stored[start : start + n].view(np.float16) for start in starts]).astype(np.float32)
    size = np.abs(v)
    unit = np.median(size, axis=1)  # not the mean, which one large column moves
    unit = np.where(unit > 0, unit, np.maximum(size.max(axis=1), np.float32(LEAST)))
    relative = size / unit[:, None]
    c = relative.max(axis=0)
    full = GROUPED * groups_of(levels)
    bytes_ = np.zeros((full, padded(n)), np.uint8)
    bytes_[:levels, :n] = np.rint(relative / np.where(c > 0, c, np.float32(1)) * np.float32(LARGEST))
    bits = np.zeros((full, words * WORD), np.uint8)
    bits[:levels, :n] = v < 0
    # [groups, pairs, levels, blocks, vectors, lanes, halves, columns]
    ordered = bytes_.reshape(full, -1, COLUMNS)[:, :, column_order()].reshape(
        -1, 2, 2, padded(n) // COLUMNS, 8, 4, 2, 8
    )
    places = made_places(levels, n)
    made = np.zeros(places[-1], np.uint8)
    parts = (c, unit, np.packbits(bits, axis=1, bitorder="little"), ordered.transpose(0, 3, 1, 4, 6, 5, 7, 2))
    for start, part in zip((0, *places), parts, strict=False):
        raw = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        made[start : start + len(raw)] = raw
    return made


def emit_decode_signs(
    of: Bytes, base: Any, places: Any, sizes: tuple[Any, Any, Any], made: tuple[Any, Any, Any], out: Any, out_step: Any
) -> None:
    """Code that decodes rows of signs into bytes; `sizes` are rows, words of a row and groups of levels.

    `places [4 groups]` are offsets from `base` of the first row's words, `made` points to the tables of the rows, and
    to the flips and magnitudes that `prepare` documents.
    """
    b = of.builder
    rows, words, groups = sizes
    tables, flips, magnitudes = made
    halves = vector(i16, of.nbytes // 2)
    first = constant(i16, [128 + (of.flip << 8)] * (of.nbytes // 2))
    row_nbytes, block_nbytes = b.mul(words, number(8)), 2 * 2 * COLUMNS
    row, next_row, end_row = loop(b, rows)
    here, there = b.gep(base, [b.mul(row, row_nbytes)]), b.gep(out, [b.mul(row, out_step)])
    own = b.gep(tables, [b.mul(row, b.mul(groups, number(64)))])
    word, next_word, end_word = loop(b, words, VECTORS)
    for start in range(0, 4, of.lanes):
        sums = [[alloca_once(b, halves) for _ in range(2)] for _ in range(VECTORS)]
        for total in (total for halved in sums for total in halved):
            b.store(first, total)
        group, next_group, end_group = loop(b, groups, unroll=False)
        at, left = b.add(b.mul(word, number(8)), number(LANE * start)), b.sub(words, b.add(word, number(2 * start)))
        planes = []
        for level in range(GROUPED):
            which = b.add(b.mul(group, number(GROUPED)), number(level))
            stored = b.gep(here, [b.add(b.load(b.gep(places, [which])), at)])
            if start == 0:
                prefetch(b, b.gep(stored, [number(AHEAD)]))
            flip = of.masked(b.gep(flips, [b.add(b.mul(which, row_nbytes), at)]), left)
            planes.append(b.xor(of.masked(stored, left), flip))
        table = b.gep(own, [b.mul(group, number(64))])
        signed = [of.repeated(table, LANE * level, LANE) for level in range(GROUPED)]
        blocks = b.sdiv(b.add(words, number(VECTORS - 1)), number(VECTORS))
        block = b.add(b.mul(group, blocks), b.sdiv(word, number(VECTORS)))
        sizes_at = b.gep(magnitudes, [b.add(b.mul(block, number(block_nbytes)), number(LANE * start))])
        for v, index in enumerate(of.indices(planes)):
            factors = [of.look_up(part, index) for part in signed]
            for pair in range(2):
                for half in range(2):
                    size = load(b, of.kind, b.gep(sizes_at, [number(64 * (2 * (8 * pair + v) + half))]))
                    both = of.unpack(factors[2 * pair], factors[2 * pair + 1], 1, bool(half))
                    total = sums[v][half]
                    b.store(b.add(b.load(total), of.multiply_pairs(size, both)), total)
        next_group()
        end_group()
        for v, (low, high) in enumerate(sums):
            found = of.high_bytes(b.load(low), b.load(high))
            store(b, found, b.gep(there, [b.add(b.mul(word, number(64)), number(64 * v + LANE * start))]))
    next_word()
    end_word()
    next_row()
    end_row()


def _typed_decode(
    typing: Any,
    instructions: Any,
    stored: Any,
    places: Any,
    groups: Any,
    words: Any,
    rows: Any,
    tables: Any,
    made: Any,
    flips: Any,
    magnitudes: Any,
    w: Any,
) -> Any:
    """`rows` rows of signs into `w [ROWS, stride]`; flips and magnitudes begin at these bytes of `made`."""
    signature = types.void(types.int64, stored, places, *[types.int64] * 3, tables, made, types.int64, types.int64, w)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        instructions, stored, places, groups, words, rows, tables, made, flips, magnitudes, w = args
        base, table, prepared, out = (
            pointer(context, builder, sig.args[k], value) for k, value in ((1, stored), (6, tables), (7, made), (10, w))
        )
        offsets = context.make_array(sig.args[2])(context, builder, places).data
        step = width(context, builder, sig.args[10], w)
        parts = (table, builder.gep(prepared, [flips]), builder.gep(prepared, [magnitudes]))

        def for_set(code: int) -> None:
            emit_decode_signs(SETS[code](builder), base, offsets, (rows, words, groups), parts, out, step)

        cases(builder, instructions, {code: lambda code=code: for_set(code) for code in USABLE})
        return context.get_dummy_value()

    return signature, codegen


_decode: Any = plain if JIT_OFF else intrinsic(_typed_decode)


@njit(nogil=True)
def _factor_rows(
    halves: NDArray[np.uint16], blocks: I64, at: int, first: int, rows: int, units: F32, tables: U8, scales: F32
) -> None:
    """Of each row and level, 16 bytes: the factor in bytes, minus it where the level's bit of the index is not set.

    U begins `at` uint16 after its block does. `tables [>= ROWS * groups * 64]`; what a row's bytes stand for, without
    c, is `scales` times them.
    """
    levels, groups, words = blocks.shape[0], groups_of(blocks.shape[0]), tables.view(np.uint64)
    for i in range(rows):
        total, largest = np.float32(0), np.float32(0)
        for level in range(levels):
            size = abs(half_to_float(halves[blocks[level, 1] // 2 + at + first + i]) * units[level])
            total, largest = np.float32(total + size), max(largest, size)
        unit = max(total / np.float32(_LARGEST_SUM - levels), largest / np.float32(LARGEST))
        by = np.float32(1) / unit if unit > np.float32(LEAST) else np.float32(0)
        scales[i] = unit * np.float32(256 / LARGEST) if unit > np.float32(LEAST) else np.float32(0)
        for level in range(GROUPED * groups):
            factor = np.int32(0)
            if level < levels:
                value = half_to_float(halves[blocks[level, 1] // 2 + at + first + i]) * units[level]
                factor = np.float32(value * by + _ROUND).view(np.int32) - np.int32(_ROUND_BITS)
            plus, minus = np.uint64(factor & 0xFF) * _EACH, np.uint64(-factor & 0xFF) * _EACH
            for half in range(2):
                positive = _POSITIVE[level % GROUPED, half]
                words[2 * (i * groups * GROUPED + level) + half] = plus & positive | minus & ~positive


@njit(nogil=True)
def _portable_decode(
    stored: U8, places: I64, levels: int, words: int, rows: int, tables: U8, made: U8, flips: int, sizes: int, w: U8
) -> None:
    """What `_typed_decode` documents, signed, one weight at a time."""
    groups, blocks = groups_of(levels), -(-words // VECTORS)
    factors = tables.view(np.int8)
    for i in range(rows):
        for place in range(blocks * COLUMNS):
            block, v, lane = place // COLUMNS, place // 64 % 8, place // 16 % 4
            half, k = place // 8 % 2, place % 8
            column = block * COLUMNS + 128 * lane + 32 * (v // 2) + 16 * half + 8 * (v % 2) + k
            total = 128
            if column < words * WORD:
                for level in range(levels):
                    byte = level * words * 8 + column // 8
                    bits = stored[places[level] + i * words * 8 + column // 8] ^ made[flips + byte]
                    group, pair = level // GROUPED, level // 2 % 2
                    at = ((group * blocks + block) * 2 + pair) * 1024 + 64 * (2 * v + half) + 16 * lane
                    factor = int(factors[16 * (i * groups * GROUPED + level) + 15])
                    total += int(made[sizes + at + 2 * k + level % 2]) * (
                        factor if bits >> (column % 8) & 1 else -factor
                    )
            w[i, place] = (total >> 8) & 0xFF


@njit(nogil=True)
def _round_rows(singles: F32, n: int, rows: int, flip: np.uint8, w: U8, scales: F32) -> None:
    """Rows of floats -> bytes, and a scale for each row."""
    for i in range(rows):
        bits = singles[i, :n].view(np.int32)
        top = np.int32(0)
        for j in range(n):
            top = max(top, bits[j] & np.int32(0x7FFFFFFF))
        largest = np.int32(top).view(np.float32)
        scale, factor = largest / np.float32(LARGEST), np.float32(0)
        if largest >= np.float32(LEAST):
            factor = np.float32(LARGEST) / largest
        else:
            scale = np.float32(0)
        scales[i] = scale
        for j in range(n):
            moved = np.float32(singles[i, j] * factor + _ROUND)
            w[i, j] = np.uint8(np.uint8(moved.view(np.int32) & np.int32(0xFF)) ^ flip)


@njit(nogil=True)
def _decode_bytes(
    instructions: int,
    stored: U8,
    blocks: I64,
    m: int,
    n: int,
    first: int,
    rows: int,
    flip: np.uint8,
    tables: U8,
    singles: F32,
    w: U8,
    scales: F32,
) -> None:
    """Rows of any blocks that add up, or of tiers -> bytes, and a scale for each row."""
    if sparse(blocks):
        expand_rows(instructions, stored, blocks, m, n, first, rows, flip, tables, w, scales)
        return
    if blocks.shape[0] == 1 and blocks[0, 0] == I8:
        at = blocks[0, 1]
        numbers = stored[at : at + 4 * m].view(np.float32)
        for i in range(rows):
            scales[i] = numbers[first + i]
            start = at + 4 * m + (first + i) * n
            own, row = stored[start : start + n], w[i, :n]  # indices from 0 become vectors, others do not
            for j in range(n):
                row[j] = own[j] ^ flip
        return
    factors = tables[: tables.shape[0] // 16 * 16].view(np.float32).reshape(ROWS, -1)
    decode_rows(stored.view(np.uint16), blocks, m, n, first, rows, factors, singles)
    _round_rows(singles, n, rows, flip, w, scales)


@njit(nogil=True)
def multiply_sum_rows(
    instructions: int,
    stored: U8,
    blocks: I64,
    made: U8,
    m: int,
    n: int,
    first: int,
    stop: int,
    x: NDArray[np.int8],
    scales: F32,
    corrections: NDArray[np.int32],
    w: U8,
    singles: F32,
    tables: U8,
    floats: F32,
    integers: I64,
    bias: F32,
    y: F32,
    at: int,
    add: bool,
) -> None:
    """Rows `[first, stop)` of what `multiply_sum` documents, W `[m, n]`, into `y [T, at + row]`, or added to it.

    `bias` is `[m]` or empty. Scratch is as in `planes.multiply_rows`, and `singles [ROWS, >= n]`, `tables [>=
    table_nbytes]`. Nothing is allocated.
    """
    words, tile, whole, flip = -(-n // WORD), TILES[instructions], integral(blocks), _FLIPS[instructions]
    levels, halves, after = blocks.shape[0], stored.view(np.uint16), m * -(-n // WORD) * (WORD // 16)
    out, partials = floats[: MOST_TOKENS * ROWS], floats[FLOATS - SUMS :]
    by, sums = floats[MOST_TOKENS * ROWS :], integers[16:].view(np.int32)
    at_units, at_flips, at_sizes, _ = made_places(levels, n)
    most = GROUPED * groups_of(levels)
    places, patterns = tables[: 8 * most].view(np.int64), tables[8 * most :]
    for begin in range(first, stop, ROWS):
        rows = min(ROWS, stop - begin)
        if whole:
            units = made[at_units : at_units + 4 * levels].view(np.float32)
            _factor_rows(halves, blocks, after, begin, rows, units, patterns, by)
            for level in range(most):
                places[level] = blocks[level if level < levels else 0, 1] + 8 * words * begin
            if instructions == PORTABLE:
                _portable_decode(stored, places, levels, words, rows, patterns, made, at_flips, at_sizes, w)
            else:
                _decode(
                    instructions, stored, places, groups_of(levels), words, rows, patterns, made, at_flips, at_sizes, w
                )
        else:
            _decode_bytes(instructions, stored, blocks, m, n, begin, rows, flip, tables, singles, w, by)
        t = 0
        while t < x.shape[0]:
            count = tile if t + tile <= x.shape[0] else 1
            if instructions == PORTABLE:
                portable_dot(w, x, t, scales, sums, partials, out)
            else:
                dot(instructions, count, w, x, t, scales, corrections, out)
            for i in range(rows):
                for s in range(count):
                    value = out[s * ROWS + i] * by[i]
                    if bias.shape[0]:
                        value += bias[begin + i]
                    y[t + s, at + begin + i] = y[t + s, at + begin + i] + value if add else value
            t += count


@loaded_later("void(i8,u1[::1],i8[:,::1],u1[::1],i8,i1[:,::1],f4[:,::1],i4[:,::1],u1[:,:,::1],f4[:,:,::1],f4[:,::1])")
def multiply_sum(
    instructions: int,
    stored: U8,
    blocks: I64,
    made: U8,
    n: int,
    x: NDArray[np.int8],
    scales: F32,
    corrections: NDArray[np.int32],
    scratch: U8,
    singles: F32,
    y: F32,
) -> None:
    """`y [T, m] = x @ W^T`, W `[m, n]` being the sum of `blocks [levels, 3]`, which are as in `rows.decode_rows`.

    `instructions` is the code of a set that `instructions.compiled` names. If the blocks are `integral`, `made` is what
    `prepare` gives, and its c was used in `rounding.round_inputs`, which gives `x`, `scales` and `corrections`; else
    `made` is not looked at. `scratch [chunks, ROWS, level_stride(n)]` and `singles [chunks, ROWS, >= n]` are
    overwritten; rows are shared out over their chunks.
    """
    m, chunks = y.shape[1], scratch.shape[0]
    share = -(-m // (chunks * ROWS)) * ROWS
    none = np.empty(0, np.float32)
    tables = np.empty((chunks, table_nbytes(blocks, n)), np.uint8)
    floats, integers = np.empty((chunks, FLOATS), np.float32), np.empty((chunks, INTEGERS), np.int64)
    for chunk in prange(chunks):
        multiply_sum_rows(
            instructions,
            stored,
            blocks,
            made,
            m,
            n,
            chunk * share,
            min(m, (chunk + 1) * share),
            x,
            scales,
            corrections,
            scratch[chunk],
            singles[chunk],
            tables[chunk],
            floats[chunk],
            integers[chunk],
            none,
            y,
            0,
            False,
        )
