"""Causal attention over keys and values that live in fixed blocks, with grouped queries and an optional window.

Layout: a KV block holds BLOCK_TOKENS tokens. For one layer and group its keys lie transposed, `[e, BLOCK_TOKENS]`, its
values as `[BLOCK_TOKENS, padded_head(e)]`, both in `head_nbytes` bytes, as fp16, float32 or int8. So both products of
attention are the same loop: some rows of scratch times 32 columns of memory, without a sum across a vector; a number
in memory is loaded and widened once for all query heads of its group. Behind int8 keys, and values, lie the tokens'
scales, `[BLOCK_TOKENS]` float32: a key's is multiplied with its scores, a value's with its weights.

Method: blocks in order of position, with a running maximum (online softmax): of each block the scores, their
exponentials, then the sum of values so far, rescaled, plus this block's. What a token may not see in a block (beyond
its position or before its window, where memory may hold anything) is replaced before the maximum and left out of the
sum of values.

Sharing: sequences that begin alike hold the same blocks, and a block is read once for all of them. Tokens that lie next
to each other in a step are worked on together where their first block is the same, and at each place of their tables
those that have one block there read it together, whatever they had before or will have after it. Nothing but the tables
says what is shared: any tree of prefixes is found, and none has to be named. So whoever makes a step puts sequences
that share next to each other.

Determinism: every score and every output is a chain of fused multiply-adds in order of columns or positions, the
weights add up in 16 partials in order of positions, and blocks begin at multiples of BLOCK_TOKENS. So a token's result
depends on neither what else is in the step, who shares its blocks, how a prompt was cut, threads, nor how many rows a
processor's registers hold. Tested bitwise.

Not here: the rotary embedding (`elementwise`).
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core.cgutils import alloca_once
from numba.extending import intrinsic
from numpy.typing import NDArray

from .exponential import exponential, fused, plain_exponential
from .halves import LARGEST, cut, narrow, widen
from .instructions import processor_features
from .rows import F16, I8, JIT_OFF
from .rows import F32 as SINGLE
from .vectors import (
    call,
    cases,
    constant,
    f32,
    i8,
    i16,
    i32,
    i64,
    load,
    loop,
    number,
    prefetch,
    shuffle,
    splat,
    store,
    vector,
)

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

BLOCK_TOKENS: Final = 32
KINDS: Final[dict[str, int]] = {"f32": SINGLE, "f16": F16, "i8": I8}  # how keys and values may be stored
LANES: Final = 16
ROWS_TOGETHER: Final = 8  # rows of scratch multiplied with the same loads
TILE_ROWS: Final = 128  # rows that may share a read; 64 to 256 take the same time, and this is 16 tokens of 8 heads
_WIDE: Final = bool(processor_features().get("avx512f"))
_ROWS: Final = ROWS_TOGETHER if _WIDE else 4
_CASES: Final = {  # compiling takes time, and float32 is for comparisons
    SINGLE: (1, 4),
    F16: tuple(range(1, _ROWS + 1)),
    I8: tuple(1 << power for power in range(_ROWS.bit_length())),
}
_VECTORS: Final = 16 if _WIDE else 4  # partial results held in registers

_floats = vector(f32, LANES)
_ELEMENTS: Final = {SINGLE: f32, F16: i16, I8: i8}
_SIZES: Final = {SINGLE: 4, F16: 2, I8: 1}
_SCALE: Final = 4  # bytes
_MOST: Final = 127.0
_LEAST: Final = 1e-30  # a head whose numbers are all smaller counts as zero, lest its inverse overflow
_LEAST_SINGLE: Final = float(np.float32(_LEAST))
_ROUND: Final = 12582912.0  # 1.5 * 2^23: adding it to a small number leaves the nearest integer in the low bits


def padded_head(width: int) -> int:
    """Columns that a token's values of `width` columns take."""
    return -(-width // BLOCK_TOKENS) * BLOCK_TOKENS


def head_nbytes(kind: int, width: int) -> int:
    """Bytes of one block's keys, or values, of one layer and group."""
    return BLOCK_TOKENS * (padded_head(width) * _SIZES[kind] + (_SCALE if kind == I8 else 0))


def unit_rows(per_group: int) -> int:
    """Query rows of one unit of work."""
    return max(TILE_ROWS // per_group, 1) * per_group


def unit_floats(per_group: int, width: int) -> int:
    """Floats of scratch that `attend_unit` wants for `unit_rows(per_group)` rows."""
    rows = unit_rows(per_group)
    return rows * (BLOCK_TOKENS + LANES + 2 * padded_head(width)) + 2 * -(-rows // LANES) * LANES


def _start(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    """Pointer to element `at`."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [at])


def _emit_product(
    builder: Any,
    kind: int,
    rows: int,
    a: Any,
    steps: tuple[Any, Any, Any],
    b: tuple[Any, Any],
    count: Any,
    c: Any,
    factors: Any,
) -> None:
    """Code for `C[r, :32] = factors[r] * C[r, :32] + sum_k A[r, k] B[k, :32]`, k below `count`; `factors` None is 0.

    `steps` are those between rows of A and C in floats and of B in bytes. `b` is B and what will be B after it, for
    which memory is asked ahead of time.
    """
    element, parts = _ELEMENTS[kind], BLOCK_TOKENS // LANES
    groups = [range(parts)] if rows * parts <= _VECTORS else [range(part, part + 1) for part in range(parts)]
    a_step, b_step, c_step = steps
    for group in groups:
        totals = {(r, part): alloca_once(builder, _floats) for r in range(rows) for part in group}
        places = {
            (r, part): builder.gep(c, [builder.add(builder.mul(number(r), c_step), number(LANES * part))])
            for r, part in totals
        }
        for (r, part), total in totals.items():
            first = constant(f32, [0.0] * LANES)
            if factors is not None:
                factor = splat(builder, builder.load(builder.gep(factors, [number(r)])), LANES)
                first = builder.fmul(factor, load(builder, _floats, places[r, part], 4))
            builder.store(first, total)
        k, following, end = loop(builder, count, unroll=False)
        if group[0] == 0:
            prefetch(builder, builder.gep(b[1], [builder.mul(k, b_step)]))
        at = builder.bitcast(builder.gep(b[0], [builder.mul(k, b_step)]), element.as_pointer())
        found = {
            part: load(builder, vector(element, LANES), builder.gep(at, [number(LANES * part)]), _SIZES[kind])
            for part in group
        }
        if kind == F16:
            found = {part: widen(builder, halves) for part, halves in found.items()}
        elif kind == I8:
            found = {part: builder.sitofp(bytes_, _floats) for part, bytes_ in found.items()}
        for r in range(rows):
            one = builder.load(builder.gep(a, [builder.add(builder.mul(number(r), a_step), k)]))
            everywhere = splat(builder, one, LANES)
            for part in group:
                total = totals[r, part]
                builder.store(fused(builder, everywhere, found[part], builder.load(total)), total)
        following()
        end()
        for place, total in totals.items():
            store(builder, builder.load(total), places[place], 4)


def _product(context: Any, builder: Any, kv: Any, at: Any, following: Any, kind: Any, rows: Any, emit: Any) -> Any:
    """`emit(kind, rows, pointers)` for the kind and rows that are asked for at run time."""
    base = builder.gep(kv, [at]), builder.gep(kv, [following])

    def for_kind(code: int) -> None:
        cases(builder, rows, {count: lambda count=count: emit(code, count, base) for count in _CASES[code]})

    cases(builder, kind, {code: lambda code=code: for_kind(code) for code in _ELEMENTS})
    return context.get_dummy_value()


def _typed_scores(
    typing: Any,
    kind: Any,
    rows: Any,
    kv: Any,
    keys: Any,
    ahead: Any,
    width: Any,
    scratch: Any,
    own: Any,
    step: Any,
    out: Any,
) -> Any:
    """Rows of `width` floats from `own`, `step` apart, times the keys at byte `keys`: rows of 32 scores from `out`."""
    signature = types.void(*[types.int64] * 2, kv, *[types.int64] * 3, scratch, *[types.int64] * 3)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind, rows, kv, keys, ahead, width, scratch, own, step, out = args
        memory = _start(context, builder, sig.args[2], kv, number(0))
        a, c = (_start(context, builder, sig.args[6], scratch, at) for at in (own, out))

        def emit(code: int, count: int, base: Any) -> None:
            steps = (step, number(BLOCK_TOKENS * _SIZES[code]), number(BLOCK_TOKENS))
            _emit_product(builder, code, count, a, steps, base, width, c, None)

        return _product(context, builder, memory, keys, ahead, kind, rows, emit)

    return signature, codegen


def _typed_values(
    typing: Any,
    kind: Any,
    rows: Any,
    kv: Any,
    values: Any,
    ahead: Any,
    count: Any,
    scratch: Any,
    weights: Any,
    out: Any,
    step: Any,
    factors: Any,
) -> Any:
    """32 columns of output, from `out` in rows `step` apart, rescaled, plus `count` weights times values."""
    signature = types.void(*[types.int64] * 2, kv, *[types.int64] * 3, scratch, *[types.int64] * 4)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind, rows, kv, values, ahead, tokens, scratch, weights, out, step, factors = args
        memory = _start(context, builder, sig.args[2], kv, number(0))
        a, c, factor = (_start(context, builder, sig.args[6], scratch, at) for at in (weights, out, factors))

        def emit(code: int, count: int, base: Any) -> None:
            bytes_ = builder.mul(step, number(_SIZES[code]))
            _emit_product(builder, code, count, a, (number(BLOCK_TOKENS), bytes_, step), base, tokens, c, factor)

        return _product(context, builder, memory, values, ahead, kind, rows, emit)

    return signature, codegen


def _greater(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _typed_soften(typing: Any, scratch: Any, at: Any, low: Any, high: Any, sums: Any, largest: Any, factor: Any) -> Any:
    """A row of scores becomes weights, relative to the largest score so far.

    Of the 32 at `at` only `[low, high)` count. Updates the row's 16 partial sums and its largest score, and writes the
    factor by which what was summed up before has to be multiplied.
    """
    signature = types.void(scratch, *[types.int64] * 6)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        row, total, top, scale = (_start(context, builder, sig.args[0], args[0], args[place]) for place in (1, 4, 5, 6))
        low, high = (splat(builder, builder.trunc(value, i32), LANES) for value in args[2:4])
        places = [builder.gep(row, [number(start)]) for start in range(0, BLOCK_TOKENS, LANES)]
        scores = []
        for start, place in zip(range(0, BLOCK_TOKENS, LANES), places, strict=True):
            lanes = constant(i32, range(start, start + LANES))
            seen = builder.and_(builder.icmp_signed(">=", lanes, low), builder.icmp_signed("<", lanes, high))
            score = load(builder, _floats, place, 4)
            scores.append(builder.select(seen, score, constant(f32, [-math.inf] * LANES)))
        most = _greater(builder, *scores)
        for size in (8, 4, 2, 1):
            most = _greater(builder, most, shuffle(builder, most, most, [lane ^ size for lane in range(LANES)]))
        before = splat(builder, builder.load(top), LANES)
        now = _greater(builder, most, before)
        weights = [exponential(builder, builder.fsub(score, now)) for score in scores]
        changed = exponential(builder, builder.fsub(before, now))
        for place, weight in zip(places, weights, strict=True):
            store(builder, weight, place, 4)
        summed = fused(builder, load(builder, _floats, total, 4), changed, builder.fadd(*weights))
        store(builder, summed, total, 4)
        builder.store(builder.extract_element(now, ir.Constant(i32, 0)), top)
        builder.store(builder.extract_element(changed, ir.Constant(i32, 0)), scale)
        return context.get_dummy_value()

    return signature, codegen


def _typed_scale(typing: Any, scratch: Any, at: Any, kv: Any, place: Any) -> Any:
    """The 32 floats at `at` times the scales at byte `place`."""
    signature = types.void(scratch, types.int64, kv, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        row = _start(context, builder, sig.args[0], *args[:2])
        scales = builder.bitcast(_start(context, builder, sig.args[2], *args[2:]), f32.as_pointer())
        for start in range(0, BLOCK_TOKENS, LANES):
            here, scale = (builder.gep(pointer, [number(start)]) for pointer in (row, scales))
            scaled = builder.fmul(load(builder, _floats, here, 4), load(builder, _floats, scale, 4))
            store(builder, scaled, here, 4)
        return context.get_dummy_value()

    return signature, codegen


def _some(builder: Any, pointer: Any, left: Any) -> Any:
    """16 floats from memory, of which only `left` are there; the rest is 0."""
    wanted = builder.icmp_signed("<", constant(i64, range(LANES)), splat(builder, left, LANES))
    source, zero = builder.bitcast(pointer, _floats.as_pointer()), constant(f32, [0.0] * LANES)
    return call(builder, f"llvm.masked.load.v{LANES}f32.p0", _floats, [source, ir.Constant(i32, 4), wanted, zero])


def _typed_rounding(typing: Any, x: Any, at: Any, width: Any, kv: Any, place: Any) -> Any:
    """By what `width` floats of `x` from `at` are multiplied to become bytes; their scale goes to byte `place`.

    It is NaN where one of them is: then bytes say nothing.
    """
    signature = types.float32(x, types.int64, types.int64, kv, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x, at, width, kv, place = args
        source = _start(context, builder, sig.args[0], x, at)
        ints = vector(i32, LANES)
        most = alloca_once(builder, ints)
        builder.store(constant(i32, [0] * LANES), most)
        j, following, end = loop(builder, width, LANES, unroll=False)
        bits = builder.bitcast(_some(builder, builder.gep(source, [j]), builder.sub(width, j)), ints)
        size, before = builder.and_(bits, constant(i32, [0x7FFFFFFF] * LANES)), builder.load(most)
        # as integers: then NaN is larger than all others, wherever it stands
        builder.store(builder.select(builder.icmp_signed(">", size, before), size, before), most)
        following()
        end()
        found = builder.load(most)
        for lane in (8, 4, 2, 1):
            other = shuffle(builder, found, found, [place ^ lane for place in range(LANES)])
            found = builder.select(builder.icmp_signed(">", found, other), found, other)
        largest = builder.bitcast(builder.extract_element(found, ir.Constant(i32, 0)), f32)
        bound, least, full, zero = (ir.Constant(f32, value) for value in (LARGEST, _LEAST_SINGLE, _MOST, 0.0))
        largest = builder.select(builder.fcmp_ordered(">", largest, bound), bound, largest)
        tiny = builder.fcmp_ordered("<", largest, least)
        scale = builder.select(tiny, zero, builder.fdiv(largest, full))
        builder.store(scale, builder.bitcast(_start(context, builder, sig.args[3], kv, place), f32.as_pointer()))
        able = builder.fcmp_ordered(">=", largest, least)
        return builder.select(able, builder.fdiv(full, largest), zero)

    return signature, codegen


def _rounded(builder: Any, values: Any, factor: Any) -> Any:
    """The nearest bytes (half to even) to floats times `factor`; 0 for NaN."""
    known = builder.select(builder.fcmp_ordered("ord", values, values), values, constant(f32, [0.0] * LANES))
    scaled = builder.fmul(cut(builder, known), splat(builder, factor, LANES))
    moved = builder.fadd(scaled, constant(f32, [_ROUND] * LANES))
    return builder.trunc(builder.bitcast(moved, vector(i32, LANES)), vector(i8, LANES))


def _emit_put(context: Any, builder: Any, sig: Any, args: Any, transposed: bool) -> Any:
    kind, x, at, left, factor, kv, place = args
    values = _some(builder, _start(context, builder, sig.args[1], x, at), left)
    base = _start(context, builder, sig.args[5], kv, place)

    def for_kind(code: int) -> None:
        stored = values
        if code == F16:
            stored = narrow(builder, values)
        elif code == I8:
            stored = _rounded(builder, values, factor)
        target = builder.bitcast(base, _ELEMENTS[code].as_pointer())
        if not transposed:
            store(builder, stored, target, _SIZES[code])
            return
        for lane in range(LANES):
            one = builder.extract_element(stored, ir.Constant(i32, lane))
            builder.store(one, builder.gep(target, [number(lane * BLOCK_TOKENS)]))

    cases(builder, kind, {code: lambda code=code: for_kind(code) for code in _ELEMENTS})
    return context.get_dummy_value()


def _typed_put_values(typing: Any, kind: Any, x: Any, at: Any, left: Any, factor: Any, kv: Any, place: Any) -> Any:
    """16 floats of `x` from `at`, of which only `left` are there and the rest count as 0, to byte `place`.

    Only int8 heeds `factor`, which is what `_rounding` gives.
    """
    signature = types.void(types.int64, x, types.int64, types.int64, types.float32, kv, types.int64)
    return signature, lambda context, builder, sig, args: _emit_put(context, builder, sig, args, False)


def _typed_put_keys(typing: Any, kind: Any, x: Any, at: Any, left: Any, factor: Any, kv: Any, place: Any) -> Any:
    """The same, BLOCK_TOKENS elements apart."""
    signature = types.void(types.int64, x, types.int64, types.int64, types.float32, kv, types.int64)
    return signature, lambda context, builder, sig, args: _emit_put(context, builder, sig, args, True)


def _typed_ask(typing: Any, kv: Any, place: Any, nbytes: Any) -> Any:
    """Have `nbytes` (more than 0) of memory fetched from byte `place`."""
    signature = types.void(kv, types.int64, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        start = _start(context, builder, sig.args[0], args[0], args[1])
        at, following, end = loop(builder, args[2], 64)
        prefetch(builder, builder.gep(start, [at]))
        following()
        end()
        return context.get_dummy_value()

    return signature, codegen


_QUIET: Final = np.errstate(all="ignore")  # memory beyond a token's position may hold anything


def _plain_ask(kv: U8, place: int, nbytes: int) -> None:
    pass


_TYPES: Final = {SINGLE: np.float32, F16: np.float16, I8: np.int8}


def _elements(kind: int, kv: U8) -> NDArray[Any]:
    return kv.view(_TYPES[kind])


@_QUIET
def _plain_scores(
    kind: int, rows: int, kv: U8, keys: int, ahead: int, width: int, scratch: F32, own: int, step: int, out: int
) -> None:
    stored = _elements(kind, kv[keys : keys + head_nbytes(kind, width)])[: width * BLOCK_TOKENS]
    found = scratch[out : out + rows * BLOCK_TOKENS].reshape(rows, BLOCK_TOKENS)
    found[:] = 0
    for k in range(width):
        found += np.outer(scratch[own + k :: step][:rows], stored[k * BLOCK_TOKENS :][:BLOCK_TOKENS])


@_QUIET
def _plain_values(
    kind: int,
    rows: int,
    kv: U8,
    values: int,
    ahead: int,
    count: int,
    scratch: F32,
    weights: int,
    out: int,
    step: int,
    factors: int,
) -> None:
    stored = _elements(kind, kv[values:][: (len(kv) - values) // 4 * 4])
    for r in range(rows):
        found = scratch[out + r * step :][:BLOCK_TOKENS]
        found *= scratch[factors + r]
        for k in range(count):
            found += scratch[weights + r * BLOCK_TOKENS + k] * stored[k * step :][:BLOCK_TOKENS]


@_QUIET
def _plain_soften(scratch: F32, at: int, low: int, high: int, sums: int, largest: int, factor: int) -> None:
    row, total = scratch[at : at + BLOCK_TOKENS], scratch[sums : sums + LANES]
    row[:low], row[high:] = -np.inf, -np.inf
    now = max(row.max(), scratch[largest])
    scratch[factor] = plain_exponential(scratch[largest] - now)
    row[:] = plain_exponential(row - now)
    total[:] = total * scratch[factor] + row[:LANES] + row[LANES:]
    scratch[largest] = now


@_QUIET
def _plain_scale(scratch: F32, at: int, kv: U8, place: int) -> None:
    scratch[at : at + BLOCK_TOKENS] *= kv[place : place + _SCALE * BLOCK_TOKENS].view(np.float32)


def _plain_rounding(x: F32, at: int, width: int, kv: U8, place: int) -> np.float32:
    scale, factor = _scale_of(x[at : at + width])
    kv[place : place + _SCALE].view(np.float32)[0] = scale
    return factor


def _scale_of(x: F32) -> tuple[np.float32, np.float32]:
    """The scale of numbers as bytes, and what they are multiplied with to become these."""
    largest = np.minimum(np.abs(x).max(), np.float32(LARGEST))
    if largest < np.float32(_LEAST):
        return np.float32(0), np.float32(0)
    return largest / np.float32(_MOST), np.float32(0) if np.isnan(largest) else np.float32(_MOST) / largest


def _bytes_of(x: F32, factor: np.float32) -> NDArray[np.int8]:
    found: NDArray[np.int8] = np.rint(np.nan_to_num(x.clip(-LARGEST, LARGEST)) * factor).astype(np.int8)
    return found


def _plain_put_values(kind: int, x: F32, at: int, left: int, factor: np.float32, kv: U8, place: int) -> None:
    _plain_put(kind, x[at : at + min(left, LANES)], factor, kv, place, 1)


def _plain_put_keys(kind: int, x: F32, at: int, left: int, factor: np.float32, kv: U8, place: int) -> None:
    _plain_put(kind, x[at : at + min(left, LANES)], factor, kv, place, BLOCK_TOKENS)


def _plain_put(kind: int, x: F32, factor: np.float32, kv: U8, place: int, step: int) -> None:
    stored = _elements(kind, kv[place:][: (len(kv) - place) // 4 * 4])
    stored[: LANES * step : step] = 0
    if kind == I8:
        stored[: len(x) * step : step] = _bytes_of(x, factor)
    else:
        stored[: len(x) * step : step] = x.clip(-LARGEST, LARGEST) if kind == F16 else x


_scores: Any = _plain_scores if JIT_OFF else intrinsic(_typed_scores)
_values: Any = _plain_values if JIT_OFF else intrinsic(_typed_values)
_soften: Any = _plain_soften if JIT_OFF else intrinsic(_typed_soften)
_scale: Any = _plain_scale if JIT_OFF else intrinsic(_typed_scale)
_rounding: Any = _plain_rounding if JIT_OFF else intrinsic(_typed_rounding)
_ask: Any = _plain_ask if JIT_OFF else intrinsic(_typed_ask)
_put_values: Any = _plain_put_values if JIT_OFF else intrinsic(_typed_put_values)
_put_keys: Any = _plain_put_keys if JIT_OFF else intrinsic(_typed_put_keys)


_step: Any = njit(nogil=True)(padded_head)


@njit(nogil=True)
def _size(kind: int) -> int:
    """Bytes of a stored number."""
    if kind == I8:
        return 1
    return 2 if kind == F16 else 4


@njit(nogil=True)
def _place(kv: U8, block: int, layer: int, which: int, group: int) -> int:
    """Byte where a block's keys (`which` 0) or values (1) begin."""
    place: int = (((block * kv.shape[1] + layer) * 2 + which) * kv.shape[3] + group) * kv.shape[4]
    return place


@njit(nogil=True)
def store_token(kind: int, kv: U8, layer: int, table: I64, position: int, k: F32, v: F32) -> None:
    """One token's `k`, `v [g, e]` into `kv [blocks, layers, 2, g, head_nbytes(kind, e)]`; `table` are its blocks.

    As fp16 they are rounded (half to even); beyond its range, infinity included, they become the largest fp16. As int8
    so as well, and then rounded to 127ths of the head's largest; the scale of a head that holds NaN is NaN.
    """
    memory, keys, values = kv.reshape(-1), k.reshape(-1), v.reshape(-1)
    width, size = k.shape[1], _size(kind)
    block, slot = table[position // BLOCK_TOKENS], position % BLOCK_TOKENS
    step = _step(width)
    by_key = by_value = np.float32(1)
    for g in range(k.shape[0]):
        at = g * width
        key, value = _place(kv, block, layer, 0, g), _place(kv, block, layer, 1, g)
        if kind == I8:
            scale = BLOCK_TOKENS * step + slot * _SCALE
            by_key = _rounding(keys, at, width, memory, key + scale)
            by_value = _rounding(values, at, width, memory, value + scale)
        for j in range(0, width, LANES):
            _put_keys(kind, keys, at + j, width - j, by_key, memory, key + (j * BLOCK_TOKENS + slot) * size)
            _put_values(kind, values, at + j, width - j, by_value, memory, value + (slot * step + j) * size)


@njit("void(i8,u1[:,:,:,:,::1],i8,i8[:,::1],i8[::1],i8[::1],f4[:,:,::1],f4[:,:,::1])", nogil=True, cache=True)
def store_kv(kind: int, kv: U8, layer: int, tables: I64, sequence: I64, positions: I64, k: F32, v: F32) -> None:
    """This step's `k`, `v [T, g, e]`: `store_token` for each.

    Token t belongs to sequence `sequence[t]` at `positions[t]`; that sequence's blocks are `tables[sequence[t]]`.
    """
    for t in range(k.shape[0]):
        store_token(kind, kv, layer, tables[sequence[t]], positions[t], k[t], v[t])


@njit(nogil=True)
def _add_block(
    kind: int,
    memory: U8,
    keys: int,
    values: int,
    ahead: int,
    low: int,
    high: int,
    first: int,
    stop: int,
    width: int,
    rows: int,
    scratch: F32,
) -> None:
    """Rows `[first, stop)` of a unit of `rows`, which see the tokens `[low, high)` of one block; see `attend_unit`."""
    step, size = _step(width), _size(kind)
    scales = BLOCK_TOKENS * step
    sums = rows * BLOCK_TOKENS
    out = sums + rows * LANES
    own = out + rows * step
    largest = own + rows * step
    factors = largest + -(-rows // LANES) * LANES
    r = first
    while r < stop:
        count = min(_ROWS, stop - r)
        if kind == SINGLE:
            count = 4 if count >= 4 else 1
        elif kind == I8:
            while count & (count - 1):  # the largest power of two within it
                count &= count - 1
        _scores(kind, count, memory, keys, keys + ahead, width, scratch, own + r * step, step, r * BLOCK_TOKENS)
        for i in range(r, r + count):
            if kind == I8:
                _scale(scratch, i * BLOCK_TOKENS, memory, keys + scales)
            _soften(scratch, i * BLOCK_TOKENS, low, high, sums + i * LANES, largest + i, factors + i)
            if kind == I8:
                _scale(scratch, i * BLOCK_TOKENS, memory, values + scales)
        for j in range(0, step, BLOCK_TOKENS):
            _values(
                kind,
                count,
                memory,
                values + (low * step + j) * size,
                values + ahead + (low * step + j) * size,
                high - low,
                scratch,
                r * BLOCK_TOKENS + low,
                out + r * step + j,
                step,
                factors + r,
            )
        r += count


@njit(nogil=True)
def _first_place(position: np.int64, window: int) -> np.int64:
    """Where in its table the first block is of which the token at `position` sees something."""
    return max(np.int64(0), position + 1 - window) // BLOCK_TOKENS if window > 0 else np.int64(0)


@njit(nogil=True)
def attend_unit(
    kind: int,
    kv: U8,
    layer: int,
    tables: I64,
    sequence: I64,
    positions: I64,
    q: F32,
    group: int,
    per_group: int,
    window: int,
    scratch: F32,
    y: F32,
) -> None:
    """`attend` for one group's heads and some neighbouring tokens, whose `sequence`, `positions`, `q [T, h, e]` and `y
    [T, h * e]` these are: at most `unit_rows(per_group) / per_group`, one at least; `scratch [>= unit_floats(per_group,
    e)]`.

    At each place of the tables, neighbours that have the same block there read it together: it is in the nearest cache
    until the last of them has used it, also where they see different parts of it.
    """
    tokens, width = q.shape[0], q.shape[2]
    rows, step = tokens * per_group, _step(width)
    sums = rows * BLOCK_TOKENS
    out = sums + rows * LANES
    own = out + rows * step
    largest = own + rows * step
    memory = kv.reshape(-1)
    begin, last = _first_place(positions[0], window), positions[0]
    for t in range(1, tokens):
        begin, last = min(begin, _first_place(positions[t], window)), max(last, positions[t])
    for which in range(2):
        _ask(memory, _place(kv, tables[sequence[0], begin], layer, which, group), kv.shape[4])
    scale = np.float32(1.0 / math.sqrt(width))
    scratch[sums:own] = 0
    scratch[largest : largest + rows] = -np.inf
    for r in range(rows):
        query, mine = q[r // per_group, group * per_group + r % per_group], scratch[own + r * step :]
        for j in range(width):
            mine[j] = query[j] * scale
    leader = 0  # the first token that goes on to the next place
    for place in range(begin, last // BLOCK_TOKENS + 1):
        start = place * BLOCK_TOKENS
        while leader < tokens and positions[leader] < start + BLOCK_TOKENS:
            leader += 1
        t = 0
        while t < tokens:
            seen = positions[t] + 1 - start
            low = max(0, seen - window) if window > 0 else 0
            high = min(BLOCK_TOKENS, seen)
            first, t = t, t + 1
            if low >= high:
                continue
            block = tables[sequence[first], place]
            while t < tokens and tables[sequence[t], place] == block:  # who sees the same of the same block
                seen = positions[t] + 1 - start
                if min(BLOCK_TOKENS, seen) != high or (window > 0 and max(0, seen - window) != low):
                    break
                t += 1
            following = block  # for which memory is asked meanwhile
            if t < tokens and positions[t] >= start:
                following = tables[sequence[t], place]
            elif leader < tokens:
                following = tables[sequence[leader], place + 1]
            ahead = _place(kv, following - block, 0, 0, 0)
            keys, values = _place(kv, block, layer, 0, group), _place(kv, block, layer, 1, group)
            start_row, stop_row = first * per_group, t * per_group
            _add_block(kind, memory, keys, values, ahead, low, high, start_row, stop_row, width, rows, scratch)
    for r in range(rows):
        total = scratch[sums + r * LANES : sums + (r + 1) * LANES]
        for half in (8, 4, 2, 1):
            for lane in range(half):
                total[lane] += total[lane + half]
        inverse = np.float32(1) / total[0]
        head = group * per_group + r % per_group
        found, result = scratch[out + r * step :], y[r // per_group, head * width : (head + 1) * width]
        for j in range(width):
            result[j] = found[j] * inverse


@njit(nogil=True)
def cut_units(tables: I64, sequence: I64, positions: I64, window: int, groups: int, per_group: int, shares: int) -> I64:
    """Where units of work begin, and the end: runs of neighbouring tokens, each of which shares the first block that it
    and the one before it both see; none longer than `unit_rows`.

    Each group of a run is a unit. `shares` of them are worked on at once: where groups cannot be dealt out evenly, runs
    are cut until they can. Each part then reads the blocks again, which costs less than threads with nothing to do,
    because most of attention is multiply-adds. With as many groups as threads, or a multiple, nothing is read twice.

    The only function here that allocates: call it before threads go their own ways, where an error harms nobody.
    """
    most = max(1, TILE_ROWS // per_group)
    least = shares // math.gcd(groups, shares)
    tokens = sequence.shape[0]
    starts = np.empty(tokens + 1, np.int64)
    units = begin = 0
    for t in range(1, tokens + 1):
        if t < tokens and _meet(tables, sequence, positions, window, t):
            continue
        count = t - begin
        parts = max(-(-count // most), min(count, least))
        for part in range(parts):
            starts[units] = begin + part * count // parts
            units += 1
        begin = t
    starts[units] = tokens
    return starts[: units + 1]


@njit(nogil=True)
def _meet(tables: I64, sequence: I64, positions: I64, window: int, t: int) -> bool:
    """Whether there is a block that token `t` and the one before it both see, and the first such place has the same."""
    place = max(_first_place(positions[t - 1], window), _first_place(positions[t], window))
    if min(positions[t - 1], positions[t]) < place * BLOCK_TOKENS:
        return False
    return bool(tables[sequence[t - 1], place] == tables[sequence[t], place])


@njit(nogil=True)
def _attend_share(
    kind: int,
    kv: U8,
    layer: int,
    tables: I64,
    sequence: I64,
    positions: I64,
    q: F32,
    window: int,
    starts: I64,
    share: np.int64,
    shares: int,
    scratch: F32,
    y: F32,
) -> None:
    """Every so many units, from unit `share`; unit u is group `u % g` of the tokens from `starts[u // g]`."""
    groups = kv.shape[3]
    per_group = q.shape[1] // groups
    for unit in range(share, (starts.shape[0] - 1) * groups, shares):
        t, stop = starts[unit // groups], starts[unit // groups + 1]
        attend_unit(
            kind,
            kv,
            layer,
            tables,
            sequence[t:stop],
            positions[t:stop],
            q[t:stop],
            unit % groups,
            per_group,
            window,
            scratch,
            y[t:stop],
        )


@njit(
    "void(i8,u1[:,:,:,:,::1],i8,i8[:,::1],i8[::1],i8[::1],f4[:,:,::1],i8,f4[:,::1],f4[:,::1])",
    nogil=True,
    parallel=True,
    cache=True,
)
def attend(
    kind: int,
    kv: U8,
    layer: int,
    tables: I64,
    sequence: I64,
    positions: I64,
    q: F32,
    window: int,
    scratch: F32,
    y: F32,
) -> None:
    """`y [T, h * e]`: softmax(q k / sqrt(e)) v over positions `(p - window, p]` of the token's sequence.

    `q [T, h, e]`; `window` 0 means all; `kv` and the rest as in `store_kv`. `scratch [chunks, >= unit_floats]`: the
    work is shared out over its rows; where there is only one, no thread is woken.
    """
    chunks = scratch.shape[0]
    groups = kv.shape[3]
    starts = cut_units(tables, sequence, positions, window, groups, q.shape[1] // groups, chunks)
    if chunks == 1:
        _attend_share(
            kind, kv, layer, tables, sequence, positions, q, window, starts, np.int64(0), chunks, scratch[0], y
        )
    else:
        for chunk in prange(chunks):
            _attend_share(
                kind,
                kv,
                layer,
                tables,
                sequence,
                positions,
                q,
                window,
                starts,
                np.int64(chunk),
                chunks,
                scratch[chunk],
                y,
            )


def split(kind: int, kv: U8, width: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Keys `[blocks, layers, g, e, BLOCK_TOKENS]` and values `[blocks, layers, g, BLOCK_TOKENS, e]`: views of `kv`."""
    step, blocks = padded_head(width), kv.shape[:2]
    elements = _elements(kind, kv[..., : BLOCK_TOKENS * step * _SIZES[kind]])
    keys, values = elements[:, :, 0], elements[:, :, 1]
    return (
        keys.reshape(*blocks, -1, step, BLOCK_TOKENS)[:, :, :, :width],
        values.reshape(*blocks, -1, BLOCK_TOKENS, step)[..., :width],
    )


def split_scales(kv: U8) -> tuple[F32, F32]:
    """Scales of int8 keys and values, `[blocks, layers, g, BLOCK_TOKENS]` each: views of `kv`."""
    scales = kv[..., -_SCALE * BLOCK_TOKENS :].view(np.float32)
    return scales[:, :, 0], scales[:, :, 1]


def numbers(kind: int, kv: U8, width: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The keys and values that are stored, shapes as `split` gives them."""
    keys, values = (x.astype(np.float64) for x in split(kind, kv, width))
    if kind == I8:
        by_key, by_value = split_scales(kv)
        keys *= by_key[..., None, :]
        values *= by_value[..., None]
    return keys, values


def reference_store_kv(
    kind: int, kv: U8, layer: int, tables: I64, sequence: I64, positions: I64, k: F32, v: F32
) -> None:
    """The same by numpy's indexing; columns that pad values are zero."""
    width = k.shape[2]
    if kind == F16:
        k, v = (x.clip(-LARGEST, LARGEST) for x in (k, v))
    blocks, slots = tables[sequence, positions // BLOCK_TOKENS], positions % BLOCK_TOKENS
    for block, slot, key, value in zip(blocks, slots, k, v, strict=True):
        stored: list[NDArray[Any]] = [key, value]
        for which, x in enumerate(stored if kind == I8 else []):
            pairs = [_scale_of(head) for head in x]
            split_scales(kv[block : block + 1])[which][0, layer, :, slot] = [scale for scale, _ in pairs]
            stored[which] = np.array([_bytes_of(head, factor) for head, (_, factor) in zip(x, pairs, strict=True)])
        for every, wanted in ((width, False), (-(-width // LANES) * LANES, True)):
            keys, values = split(kind, kv[block : block + 1], every)
            if wanted:
                keys[0, layer, :, width:, slot], values[0, layer, :, slot, width:] = 0, 0
            else:
                keys[0, layer, :, :, slot], values[0, layer, :, slot] = stored


def reference_attend(
    kind: int,
    kv: U8,
    layer: int,
    tables: I64,
    sequence: I64,
    positions: I64,
    q: F32,
    window: int,
    scratch: F32,
    y: F32,
) -> None:
    """The same with the sequence's keys and values gathered first, in float64."""
    heads, width = q.shape[1:]
    per_group = heads // kv.shape[3]
    keys, values = (x[:, layer] for x in numbers(kind, kv, width))
    for t, (row, position) in enumerate(zip(sequence, positions, strict=True)):
        start = max(0, position + 1 - window) if window else 0
        places = np.arange(start, position + 1)
        blocks, slots = tables[row, places // BLOCK_TOKENS], places % BLOCK_TOKENS
        for h in range(heads):
            scores = keys[blocks, h // per_group, :, slots] @ q[t, h] / math.sqrt(width)
            weights = np.exp(scores - scores.max())
            y[t, h * width : (h + 1) * width] = weights / weights.sum() @ values[blocks, h // per_group, slots]
