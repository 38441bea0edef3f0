"""`y[T, m] = x[T, n] @ W^T` in integers, straight from stored planes, for any number of resident planes and tokens.

Method: the levels of four rows of W are decoded into bytes, then multiplied with the tokens' bytes (`quantize`) and
added up exactly. So decoding is paid once for all tokens, and no dense copy of W exists beyond those rows.

Decoding takes 512 columns of one row at a time, 64 bytes of each plane, and columns come out in an order that
`column_order` gives and the tokens' bytes follow; it is the same for any number of planes. How it is done is up to the
instruction set (`vectors`). With AVX-512 the planes' bytes are interleaved until every 64 bits hold 8 x 8 bits, columns
by planes; transposed, each byte is an index, and a table look-up makes it a level. Without its instructions for both,
bits of four planes change places until every half of a byte is an index, and one vector holds those of one bit of the
planes' bytes; further planes choose among the levels that several tables give for it.

There, putting columns in order is a good part of the work, so a single token is multiplied with levels where they are
(`emit_single`): its own bytes are put in their order instead, once for all rows.

Determinism: the products of 4 neighbouring bytes, in all 8 vectors of 512 columns, make one of 16 exact integer sums;
each is turned into a float, multiplied with the scale of its 256 columns and added to one of 16 partials, in the order
of the columns; the partials are added up in a fixed tree. Nothing is fused. Tokens, rows, chunks, threads and the
instruction set do not enter, so all of these give the same bits.

Layouts are those of `formats/kinds`. Levels are in [-127, 127].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core.cgutils import alloca_once
from numba.extending import intrinsic, register_jitable
from numpy.typing import NDArray

from .instructions import AVX2, AVX512, NAMES, NEON, PORTABLE, compiled
from .later import loaded_later
from .rows import BASE_PLANES, JIT_OFF, PLANE, ROWS, bf16_to_float
from .vectors import (
    AHEAD,
    LANE,
    Avx2,
    Avx512,
    Bytes,
    Neon,
    cases,
    f32,
    i32,
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

COLUMNS: Final = 512  # decoded at a time
GROUP: Final = 256  # columns of a token that share a scale
SUMS: Final = 16  # integer sums, and float partials, of one row and token
WORDS: Final = COLUMNS // 64
VECTORS: Final = COLUMNS // 64  # of 64 bytes, from the 64 bytes of each plane
DEPTHS: Final = tuple(range(BASE_PLANES, 9))

SETS: Final[dict[int, type[Bytes]]] = {AVX512: Avx512, AVX2: Avx2, NEON: Neon}
TILE_SIZES: Final = {AVX512: 4, AVX2: 2, NEON: 2, PORTABLE: 1}  # tokens multiplied together with ROWS rows
USABLE: Final = tuple(NAMES[name] for name in compiled() if NAMES[name] in SETS)
SINGLE: Final = tuple(code for code in USABLE if SETS[code].single)
_IS_SINGLE: Final = np.array([code in SINGLE for code in range(len(TILE_SIZES))])
# Of a lane's bytes, whose places are numbered by bits 6 to 3 of a column: in the order of bits 4, 6, 5, 3.
_SINGLE: Final = tuple(2 * (k // 8) + 8 * (k // 4 % 2) + 4 * (k // 2 % 2) + k % 2 for k in range(LANE))
_TURNED: Final = tuple(8 * (k % 2) + k // 2 for k in range(LANE))  # bits 2, 1, 0, 4 of a column, from 4, 2, 1, 0
MOST_TOKENS: Final = max(TILE_SIZES.values())
FLOATS: Final = 2 * MOST_TOKENS * ROWS + SUMS  # scratch of one thread: results of a tile twice, partials
INTEGERS: Final = 16 + SUMS // 2  # places of planes or rows, sums
TILES: Final = np.array([TILE_SIZES[code] for code in range(len(TILE_SIZES))])

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]


@register_jitable
def padded(n: int) -> int:
    """Bytes of one token of n columns."""
    return -(-n // COLUMNS) * COLUMNS


@register_jitable
def level_stride(n: int) -> int:
    """Bytes from one decoded row to the next: not a multiple of 4096, or stores and loads would look alike."""
    return padded(n) + 64


@cache
def column_order() -> I64:
    """Which of COLUMNS columns each byte belongs to, `[COLUMNS]`."""
    place = np.arange(COLUMNS)
    v, lane, half, bit = place // 64, place // 16 % 4, place // 8 % 2, place % 8
    return np.asarray(128 * lane + 32 * (v // 2) + 16 * half + 8 * (v % 2) + bit)


def emit_decode(
    of: Bytes, base: Any, planes: Any, depth: int, rows: Any, strides: tuple[Any, Any, Any], levels: Any, out: Any
) -> None:
    """Code that decodes `rows` rows; `strides` in bytes of planes, levels and `out`, whose start they are given.

    `planes` is an array of i64 offsets from `base`, of the first row's words.
    """
    b = of.builder
    words, level_step, out_step = strides
    offsets = [b.load(b.gep(planes, [number(p)])) for p in range(depth)]
    row, next_row, end_row = loop(b, rows)
    table = of.table(b.gep(levels, [b.mul(row, level_step)]), depth)
    here = b.gep(base, [b.mul(b.mul(row, words), number(8))])
    there = b.gep(out, [b.mul(row, out_step)])
    word, next_word, end_word = loop(b, words, WORDS)
    for start in range(0, 4, of.lanes):
        found = []
        for offset in offsets:
            at = b.gep(here, [b.add(offset, b.add(b.mul(word, number(8)), number(LANE * start)))])
            if start == 0:
                prefetch(b, b.gep(at, [number(AHEAD)]))
            found.append(of.masked(at, b.sub(words, b.add(word, number(2 * start)))))
        for v, found_levels in enumerate(of.levels(table, found)):
            place = b.add(b.mul(word, number(64)), number(64 * v + LANE * start))
            store(b, found_levels, b.gep(there, [place]))
    next_word()
    end_word()
    next_row()
    end_row()


Fetch = Callable[[int, int], Any]


def stored_bytes(of: Bytes, w: Any, w_step: Any) -> Callable[[Any], Fetch]:
    """What `emit_dot` wants of rows whose bytes lie `w_step` apart."""
    b = of.builder

    def block(j: Any) -> Fetch:
        starts = [b.gep(w, [b.add(b.mul(w_step, number(i)), j)]) for i in range(ROWS)]
        return lambda i, offset: load(b, of.kind, b.gep(starts[i], [number(offset)]))

    return block


def emit_dot(
    of: Bytes,
    rows: Callable[[Any], Fetch],
    x: Any,
    x_step: Any,
    scales: Any,
    corrections: Any,
    tokens: int,
    out: Any,
) -> None:
    """Code that multiplies ROWS rows with `tokens` tokens, into `out [tokens * ROWS]` floats.

    `rows(j)(i, offset)` is the vector of row i at column `j + offset`, j being a multiple of COLUMNS.
    """
    b, width = of.builder, 4 * of.lanes
    sums, partial = vector(i32, width), vector(f32, width)
    group_step = b.sdiv(x_step, number(COLUMNS // SUMS))

    def block(j: Any) -> Products:
        fetch = rows(j)

        def products(part: int) -> list[tuple[Any, Any]]:
            group = b.add(b.sdiv(j, number(COLUMNS // SUMS)), number(width * part))
            places = [b.add(b.mul(group_step, number(t)), group) for t in range(tokens)]
            first = [
                load(b, sums, b.gep(corrections, [place]), 4) if of.flip else ir.Constant(sums, [0] * width)
                for place in places
            ]
            found = [first[t] for t in range(tokens) for _ in range(ROWS)]
            for v in range(VECTORS):
                offset = 64 * v + of.nbytes * part
                at = b.add(j, number(offset))
                xs = [load(b, of.kind, b.gep(x, [b.add(b.mul(x_step, number(t)), at)])) for t in range(tokens)]
                ws = [fetch(i, offset) for i in range(ROWS)]
                found = [of.dot(found[t * ROWS + i], ws[i], xs[t]) for t in range(tokens) for i in range(ROWS)]
            scale = [load(b, partial, b.gep(scales, [place]), 4) for place in places]
            return [(whole, scale[k // ROWS]) for k, whole in enumerate(found)]

        return products

    _emit_totals(of, x_step, tokens * ROWS, block, out)


Products = Callable[[int], list[tuple[Any, Any]]]


def _emit_totals(of: Bytes, columns: Any, count: int, block: Callable[[Any], Products], out: Any) -> None:
    """Code that adds up `count` results over all columns, into `out [count]` floats.

    `block(j)(part)` gives, for each, the integer sums of a part of the COLUMNS columns from j, and their scales.
    """
    b, parts, width = of.builder, 4 // of.lanes, 4 * of.lanes
    partial = vector(f32, width)
    totals = [alloca_once(b, partial) for _ in range(count * parts)]
    for total in totals:
        b.store(ir.Constant(partial, [0.0] * width), total)
    j, following, end = loop(b, columns, COLUMNS)
    products = block(j)
    for part in range(parts):
        for k, (whole, scale) in enumerate(products(part)):
            total = totals[k * parts + part]
            b.store(b.fadd(b.load(total), b.fmul(b.sitofp(whole, partial), scale)), total)
    following()
    end()
    for k in range(count):
        vectors = [b.load(totals[k * parts + part]) for part in range(parts)]
        while len(vectors) > 1:
            half = len(vectors) // 2
            vectors = [b.fadd(vectors[i], vectors[half + i]) for i in range(half)]
        (left,) = vectors
        size = width
        while size > 1:
            size //= 2
            low, high = (b.shuffle_vector(left, left, ir.Constant(vector(i32, size), list(r))) for r in _halves(size))
            left = b.fadd(low, high)
        b.store(b.extract_element(left, ir.Constant(i32, 0)), b.gep(out, [number(k)]))


def _halves(size: int) -> tuple[range, range]:
    return range(size), range(size, 2 * size)


def emit_turn(of: Bytes, x: Any, columns: Any, out: Any, sizes: Any) -> None:
    """Code that puts a token's bytes, and their absolute values, in the order that `emit_single` wants."""
    b = of.builder
    j, following, end = loop(b, columns, COLUMNS)
    for part in range(4 // of.lanes):
        found = [load(b, of.kind, b.gep(x, [b.add(j, number(64 * v + of.nbytes * part))])) for v in range(VECTORS)]
        for bit, turned in enumerate(of.rotate([of.arrange(value, _TURNED) for value in found])):
            place = b.add(j, number(of.nbytes * (VECTORS * part + bit)))
            store(b, turned, b.gep(out, [place]))
            store(b, of.size(turned), b.gep(sizes, [place]))
    following()
    end()


def emit_single(
    of: Bytes,
    base: Any,
    planes: Any,
    depth: int,
    rows: Any,
    strides: tuple[Any, Any],
    levels: Any,
    token: tuple[Any, Any, Any, Any],
    out: Any,
) -> None:
    """Code that multiplies `rows` rows with one token as they are decoded, into `out [rows]` floats.

    `strides` are words of a row and bytes of its levels, `token` its bytes and sizes by `emit_turn`, their number and
    its scales. Levels stay where their bits were, one vector for each bit of a byte; four of these meet in one sum of
    products, of which neighbours are added up, to the same sums as elsewhere.
    """
    b, width = of.builder, 4 * of.lanes
    sums, partial = vector(i32, width), vector(f32, width)
    words, level_step = strides
    x, sizes, columns, scales = token
    offsets = [b.load(b.gep(planes, [number(p)])) for p in range(depth)]
    row, next_row, end_row = loop(b, rows, unroll=False)
    table = of.table(b.gep(levels, [b.mul(row, level_step)]), depth)
    here = b.gep(base, [b.mul(b.mul(row, words), number(8))])

    def block(j: Any) -> Products:
        starts = [b.gep(here, [b.add(offset, b.sdiv(j, number(8)))]) for offset in offsets]
        left = b.sub(words, b.sdiv(j, number(64)))
        for start in starts:
            prefetch(b, b.gep(start, [number(AHEAD)]))

        def products(part: int) -> list[tuple[Any, Any]]:
            found = [
                of.arrange(
                    of.masked(b.gep(start, [number(of.nbytes * part)]), b.sub(left, number(of.nbytes // 8 * part))),
                    _SINGLE,
                )
                for start in starts
            ]
            wholes = [ir.Constant(sums, [0] * width) for _ in range(2)]
            for bit, level in enumerate(of.levels_by_bit(table, found)):
                place = b.add(j, number(of.nbytes * (VECTORS * part + bit)))
                bytes_, size = (load(b, of.kind, b.gep(some, [place])) for some in (x, sizes))
                wholes[bit // 4] = of.dot_sized(wholes[bit // 4], level, bytes_, size)
            low, high = (
                b.bitcast(of.pick(wholes[0], wholes[1], order), sums) for order in ((0, 4, 2, 6), (1, 5, 3, 7))
            )
            group = b.add(b.sdiv(j, number(COLUMNS // SUMS)), number(width * part))
            return [(b.add(low, high), load(b, partial, b.gep(scales, [group]), 4))]

        return products

    _emit_totals(of, columns, 1, block, b.gep(out, [row]))
    next_row()
    end_row()


def _typed_decode(
    typing: Any,
    instructions: Any,
    stored: Any,
    planes: Any,
    depth: Any,
    words: Any,
    levels: Any,
    step: Any,
    rows: Any,
    w: Any,
) -> Any:
    """`rows` rows of levels into `w [ROWS, stride]`.

    `planes [depth]` are byte offsets of the first row's words, `levels` that of its levels, the next row's `step` on.
    """
    signature = types.void(types.int64, stored, planes, *[types.int64] * 5, w)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        instructions, stored, planes, depth, words, levels, step, rows, w = args
        base, out = (pointer(context, builder, sig.args[k], value) for k, value in ((1, stored), (8, w)))
        offsets = context.make_array(sig.args[2])(context, builder, planes).data
        strides = (words, step, width(context, builder, sig.args[8], w))

        def for_set(kind: type[Bytes]) -> None:
            of = kind(builder)
            at = builder.gep(base, [levels])
            cases(
                builder,
                depth,
                {d: lambda d=d: emit_decode(of, base, offsets, d, rows, strides, at, out) for d in DEPTHS},
            )

        cases(builder, instructions, {code: lambda code=code: for_set(SETS[code]) for code in USABLE})
        return context.get_dummy_value()

    return signature, codegen


def emit_dots(
    context: Any,
    builder: Any,
    instructions: Any,
    tokens: Any,
    arrays: tuple[tuple[Any, Any], ...],
    rows: Callable[[Bytes], Callable[[Any], Fetch]],
) -> None:
    """`emit_dot` for every instruction set and number of tokens; `arrays` are the types and values of `x`, the first of
    the tokens, `scales`, `corrections` and `out`.
    """
    (x_kind, x), (_, first), scale_kind, correction_kind, (out_kind, out) = arrays
    x_step = width(context, builder, x_kind, x)
    inputs = builder.gep(pointer(context, builder, x_kind, x), [builder.mul(first, x_step)])
    group = builder.mul(first, builder.sdiv(x_step, number(COLUMNS // SUMS)))
    scale, correction = (
        builder.gep(context.make_array(kind)(context, builder, value).data, [group])
        for kind, value in (scale_kind, correction_kind)
    )
    results = context.make_array(out_kind)(context, builder, out).data

    def for_set(code: int) -> None:
        of = SETS[code](builder)
        cases(
            builder,
            tokens,
            {
                count: lambda count=count: emit_dot(of, rows(of), inputs, x_step, scale, correction, count, results)
                for count in (1, TILE_SIZES[code])
            },
        )

    cases(builder, instructions, {code: lambda code=code: for_set(code) for code in USABLE})


def _typed_dot(
    typing: Any, instructions: Any, tokens: Any, w: Any, x: Any, first: Any, scales: Any, corrections: Any, out: Any
) -> Any:
    """Of ROWS rows of levels `w` with `tokens` tokens of `x` from `first`, into `out [tokens * ROWS]`."""
    signature = types.void(types.int64, types.int64, w, x, types.int64, scales, corrections, out)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        instructions, tokens, w, x, first, scales, corrections, out = args
        step = width(context, builder, sig.args[2], w)
        w_data = pointer(context, builder, sig.args[2], w)
        arrays = tuple(zip(sig.args[3:], (x, first, scales, corrections, out), strict=True))
        emit_dots(context, builder, instructions, tokens, arrays, lambda of: stored_bytes(of, w_data, step))
        return context.get_dummy_value()

    return signature, codegen


def _typed_turn(typing: Any, instructions: Any, x: Any, w: Any) -> Any:
    """The first token of `x` as `_typed_single` wants it, into the first two rows of `w`."""
    signature = types.void(types.int64, x, w)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        instructions, x, w = args
        source, out = (pointer(context, builder, sig.args[k], value) for k, value in ((1, x), (2, w)))
        columns, sizes = (
            width(context, builder, sig.args[1], x),
            builder.gep(out, [width(context, builder, sig.args[2], w)]),
        )

        def for_set(kind: type[Bytes]) -> None:
            emit_turn(kind(builder), source, columns, out, sizes)

        cases(builder, instructions, {code: lambda code=code: for_set(SETS[code]) for code in SINGLE})
        return context.get_dummy_value()

    return signature, codegen


def _typed_single(
    typing: Any,
    instructions: Any,
    stored: Any,
    planes: Any,
    depth: Any,
    words: Any,
    levels: Any,
    step: Any,
    rows: Any,
    w: Any,
    scales: Any,
    out: Any,
) -> Any:
    """`rows` rows times the token that `_typed_turn` put into `w`, into `out [rows]`; else as `_typed_decode`."""
    signature = types.void(types.int64, stored, planes, *[types.int64] * 5, w, scales, out)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        instructions, stored, planes, depth, words, levels, step, rows, w, scales, out = args
        base, x = (pointer(context, builder, sig.args[k], value) for k, value in ((1, stored), (8, w)))
        offsets, scale, results = (
            context.make_array(sig.args[k])(context, builder, value).data
            for k, value in ((2, planes), (9, scales), (10, out))
        )
        columns = builder.mul(width(context, builder, sig.args[9], scales), number(COLUMNS // SUMS))

        def for_set(kind: type[Bytes]) -> None:
            of, at = kind(builder), builder.gep(base, [levels])
            token = (x, builder.gep(x, [width(context, builder, sig.args[8], w)]), columns, scale)
            cases(
                builder,
                depth,
                {
                    d: lambda d=d: emit_single(of, base, offsets, d, rows, (words, step), at, token, results)
                    for d in DEPTHS
                },
            )

        cases(builder, instructions, {code: lambda code=code: for_set(SETS[code]) for code in SINGLE})
        return context.get_dummy_value()

    return signature, codegen


_turn: Any = plain if JIT_OFF else intrinsic(_typed_turn)
_single: Any = plain if JIT_OFF else intrinsic(_typed_single)
_decode: Any = plain if JIT_OFF else intrinsic(_typed_decode)
dot: Any = plain if JIT_OFF else intrinsic(_typed_dot)


@njit(nogil=True)
def _portable_decode(stored: U8, planes: I64, words: int, levels: int, step: int, rows: int, w: U8, bits: U8) -> None:
    """What `_typed_decode` documents, signed, one weight at a time; `bits [>= depth]` is scratch."""
    depth = planes.shape[0]
    for i in range(rows):
        table = levels + i * step
        for byte in range(-(-words // WORDS) * 64):
            for p in range(depth):
                bits[p] = stored[planes[p] + i * words * 8 + byte] if byte < words * 8 else 0
            lane, rest = byte // 16 % 4, byte % 16
            start = byte // 64 * COLUMNS + 64 * (2 * (rest // 4) + rest % 2) + 16 * lane + 8 * (rest // 2 % 2)
            for bit in range(8):
                index = 0
                for p in range(depth):
                    index = 2 * index + ((bits[p] >> bit) & 1)
                w[i, start + bit] = stored[table + index]


@njit(nogil=True)
def portable_dot(
    w: U8,
    x: NDArray[np.int8],
    token: int,
    scales: F32,
    sums: NDArray[np.int32],
    partials: F32,
    out: F32,
) -> None:
    """What `_typed_dot` documents, for one token; `w` is signed. `sums` and `partials` `[SUMS]` are scratch."""
    signed = w.view(np.int8)
    for i in range(ROWS):
        partials[:] = 0
        for block in range(x.shape[1] // COLUMNS):
            sums[:] = 0
            for v in range(VECTORS):
                at = block * COLUMNS + 64 * v
                for k in range(SUMS):
                    for c in range(at + 4 * k, at + 4 * k + 4):
                        sums[k] += np.int32(signed[i, c]) * np.int32(x[token, c])
            for k in range(SUMS):
                partials[k] += np.float32(sums[k]) * scales[token, block * SUMS + k]
        for half in (8, 4, 2, 1):
            for k in range(half):
                partials[k] += partials[k + half]
        out[i] = partials[0]


@njit(nogil=True)
def multiply_rows(
    instructions: int,
    stored: U8,
    blocks: I64,
    m: int,
    n: int,
    first: int,
    stop: int,
    x: NDArray[np.int8],
    scales: F32,
    corrections: NDArray[np.int32],
    w: U8,
    floats: F32,
    integers: I64,
    bias: F32,
    y: F32,
    at: int,
    add: bool,
) -> None:
    """Rows `[first, stop)` of what `multiply_planes` documents, W `[m, n]`, into `y [T, at + row]`, or added to it.

    `bias` is `[m]` or empty; `w [ROWS, level_stride(n)]`, `floats [FLOATS]` and `integers [INTEGERS]` are scratch.
    Nothing is allocated, for a thread that fails would leave the others of its team waiting.
    """
    words, depth = -(-n // 64), blocks.shape[0] + BASE_PLANES - 1
    tile = TILES[instructions]
    kind, last = blocks[-1, 0], blocks[-1, 1] + 8 * m * words * (BASE_PLANES if blocks.shape[0] == 1 else 1)
    halves = stored.view(np.uint16)
    step = (1 << depth) if kind == PLANE else 0
    out, partials = floats[: MOST_TOKENS * ROWS], floats[FLOATS - SUMS :]
    planes, sums, bits = integers[:depth], integers[16:].view(np.int32), integers[8:9].view(np.uint8)
    single = x.shape[0] == 1 and _IS_SINGLE[instructions]
    if single:
        _turn(instructions, x, w)
    for begin in range(first, stop, ROWS):
        rows = min(ROWS, stop - begin)
        for p in range(depth):
            planes[p] = blocks[max(0, p - 1), 1] + 8 * words * (begin + (m if p == 1 else 0))
        levels = last + 2 * m + begin * step
        if single:
            _single(instructions, stored, planes, depth, words, levels, step, rows, w, scales, out)
        elif instructions == PORTABLE:
            _portable_decode(stored, planes, words, levels, step, rows, w, bits)
        else:
            _decode(instructions, stored, planes, depth, words, levels, step, rows, w)
        t = 0
        while t < x.shape[0]:
            count = tile if t + tile <= x.shape[0] else 1
            if instructions == PORTABLE:
                portable_dot(w, x, t, scales, sums, partials, out)
            elif not single:
                dot(instructions, count, w, x, t, scales, corrections, out)
            for i in range(rows):
                scale = bf16_to_float(halves[last // 2 + begin + i])
                for s in range(count):
                    value = out[s * ROWS + i] * scale
                    if bias.shape[0]:
                        value += bias[begin + i]
                    y[t + s, at + begin + i] = y[t + s, at + begin + i] + value if add else value
            t += count


@loaded_later("void(i8,u1[::1],i8[:,::1],i8,i1[:,::1],f4[:,::1],i4[:,::1],u1[:,:,::1],f4[:,::1])")
def multiply_planes(
    instructions: int,
    stored: U8,
    blocks: I64,
    n: int,
    x: NDArray[np.int8],
    scales: F32,
    corrections: NDArray[np.int32],
    scratch: U8,
    y: F32,
) -> None:
    """`y [T, m] = x @ W^T`, W `[m, n]` being planes: `blocks [levels, 3]` as in `rows.decode_rows`.

    `instructions` is the code of a set that `instructions.compiled` names. `x [T, padded(n)]`, `scales` and
    `corrections` `[T, padded(n) / 32]` are what `quantize_inputs` writes. `scratch [chunks, ROWS, level_stride(n)]` is
    overwritten; rows are shared out over its chunks. Scratch and `x` are fastest where each row of 64 bytes is a cache
    line.
    """
    m, chunks = y.shape[1], scratch.shape[0]
    share = -(-m // (chunks * ROWS)) * ROWS
    none = np.empty(0, np.float32)
    floats, integers = np.empty((chunks, FLOATS), np.float32), np.empty((chunks, INTEGERS), np.int64)
    for chunk in prange(chunks):
        multiply_rows(
            instructions,
            stored,
            blocks,
            m,
            n,
            chunk * share,
            min(m, (chunk + 1) * share),
            x,
            scales,
            corrections,
            scratch[chunk],
            floats[chunk],
            integers[chunk],
            none,
            y,
            0,
            False,
        )
