"""Tiers of masks and values -> rows of weights in float32, which `matmul` multiplies; and where things are in tiers.

Method: a row's values become floats one after the other (`floats`), and those of 64 columns are put in their places at
once: by `vexpandps` with AVX-512, by `vpermps` with BMI2 (code AVX2), for which the ranks of eight columns among those
that have values are one deposit of bytes; else only the columns that have values are visited. Tier after tier writes
into the same row. `sparse` does the same with bytes, from the same columns.

Layouts are those of `formats/kinds`, whose promise that every row of a mask has the same number of ones makes all
offsets arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.cgutils import alloca_once
from numba.extending import intrinsic, register_jitable
from numpy.typing import NDArray

from .bits import DEPOSITS, count, deposit, emit_count, emit_deposit, lowest, taken
from .floats import LANES, typed_floats
from .instructions import AVX2, AVX512
from .planes import USABLE
from .rows import JIT_OFF, MASK, VALUES_F16, VALUES_I4, VALUES_I8, WORD, half_to_float
from .vectors import call, cases, constant, f32, i8, i32, i64, load, loop, number, plain, pointer, store, vector, width

EACH: Final = 0x0101010101010101
ABLE: Final = tuple(code for code in USABLE if code in (AVX512, AVX2)) if DEPOSITS else ()
CAN: Final = np.array([code in ABLE for code in range(max(AVX512, AVX2) + 2)])
_RANKS: Final = 0x0706050403020100
_EIGHT: Final = 8  # columns that AVX2 places together

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
U16 = NDArray[np.uint16]
U64 = NDArray[np.uint64]


@register_jitable
def sparse(blocks: I64) -> bool:
    """Whether these blocks are tiers."""
    return bool(blocks.shape[0] > 0 and blocks[0, 0] == MASK)


@register_jitable
def tier_width(blocks: I64, tier: int, n: int) -> int:
    """Words of a row of a tier's mask: one bit for each column that tiers before it have left."""
    left = n
    for before in range(tier):
        left -= blocks[2 * before, 2]
    return -(-left // WORD)


@register_jitable
def past_columns(n: int) -> np.uint64:
    """Of a row's last word, the bits that are of no column."""
    return np.uint64(0) if n % WORD == 0 else ~np.uint64(0) << np.uint64(n % WORD)


@register_jitable
def values_place(blocks: I64, tier: int, m: int, row: int) -> int:
    """Where a row of a tier's values begins."""
    kind, at, rank = blocks[2 * tier + 1, 0], blocks[2 * tier + 1, 1], blocks[2 * tier + 1, 2]
    if kind == VALUES_F16:
        return int(at + 2 * rank * row)
    scales = 4 * m if tier == 0 else 0
    return int(at + scales + row * (rank if kind == VALUES_I8 else -(-rank // 2)))


def emit_columns(b: Any, word: Any, stream: Any, length: Any, at: Any, filled: Any, first: bool) -> Any:
    """The columns of a tier in one word; marks them as filled, and moves `at` on in the stream of `length` words."""
    place = b.gep(filled, [word])
    if first:
        columns = b.load(b.gep(stream, [word]))
        b.store(columns, place)
        return columns
    before, begins, last = b.load(place), b.load(at), b.sub(length, number(1))
    free = b.not_(before)

    def smaller(x: Any) -> Any:
        return b.select(b.icmp_signed("<", x, last), x, last)

    index = b.lshr(begins, number(6))
    low, high = (b.load(b.gep(stream, [smaller(x)])) for x in (index, b.add(index, number(1))))
    columns = emit_deposit(b, call(b, "llvm.fshr.i64", i64, [high, low, begins]), free)
    b.store(b.add(begins, emit_count(b, free)), at)
    b.store(b.or_(before, columns), place)
    return columns


def emit_tier(
    b: Any,
    first: Any,
    words: Any,
    mask: tuple[Any, Any],
    filled: Any,
    begins: Any,
    emit: Callable[[bool, Any, Any, Any], None],
) -> None:
    """Code that runs `emit(whether first, word, columns, place)` for every word of a tier's row: the values of these
    columns begin at `place`, those of the first word at `begins`.

    `mask` is the stream of columns and its words. `filled` says which columns tiers before this one have, and gets this
    one's; `first` is 1 for tier 0, which overwrites it.
    """
    bit, place = alloca_once(b, i64), alloca_once(b, i64)

    def tier(initial: bool) -> None:
        b.store(number(0), bit)
        b.store(begins, place)
        word, following, end = loop(b, words, unroll=False)
        columns = emit_columns(b, word, *mask, bit, filled, initial)
        here = b.load(place)
        emit(initial, word, columns, here)
        b.store(b.add(here, emit_count(b, columns)), place)
        following()
        end()

    cases(b, first, {1: lambda: tier(True), 0: lambda: tier(False)})


def _emit_by_vector(b: Any, columns: Any, values: Any, out: Any, first: bool) -> None:
    """Expand 64 floats with AVX-512."""
    kind = vector(f32, LANES)
    for start in range(0, WORD, LANES):
        before = emit_count(b, b.and_(columns, number((1 << start) - 1)))
        found, here = load(b, kind, b.gep(values, [before]), 4), b.gep(out, [number(start)])
        under = constant(f32, [0.0] * LANES) if first else load(b, kind, here, 4)
        own = b.trunc(b.lshr(columns, number(start)), ir.IntType(LANES))
        where = b.bitcast(own, vector(ir.IntType(1), LANES))
        store(b, call(b, "llvm.x86.avx512.mask.expand.v16f32", kind, [found, under, where]), here, 4)


def _emit_by_eight(b: Any, columns: Any, values: Any, out: Any, first: bool) -> None:
    """Expand eight floats at a time with AVX2 and BMI2."""
    kind, bytes_ = vector(f32, _EIGHT), vector(i8, _EIGHT)
    for start in range(0, WORD, _EIGHT):
        before = emit_count(b, b.and_(columns, number((1 << start) - 1)))
        own = b.and_(b.lshr(columns, number(start)), number(0xFF))
        where = b.mul(emit_deposit(b, own, number(EACH)), number(0xFF))
        ranks = b.zext(b.bitcast(emit_deposit(b, number(_RANKS), where), bytes_), vector(i32, _EIGHT))
        found, here = load(b, kind, b.gep(values, [before]), 4), b.gep(out, [number(start)])
        found = call(b, "llvm.x86.avx2.permps", kind, [found, ranks])
        under = constant(f32, [0.0] * _EIGHT) if first else load(b, kind, here, 4)
        chosen = b.icmp_unsigned("!=", b.bitcast(where, bytes_), constant(i8, [0] * _EIGHT))
        store(b, b.select(chosen, found, under), here, 4)


def _typed_place(
    typing: Any,
    instructions: Any,
    stored: Any,
    mask: Any,
    length: Any,
    values: Any,
    filled: Any,
    words: Any,
    whole: Any,
    first: Any,
    w: Any,
    row: Any,
) -> Any:
    """A tier's floats into row `row` of `w [.., stride]`; of its `words` words of columns those from `whole` on (one at
    most) into the last WORD floats of `values [1, ..]`.

    The mask's row is `length` words of `stored` from byte `mask`; `filled [words]` says which columns tiers before this
    one have, and gets this one's. `first` is 1 for tier 0, which overwrites both. Reads LANES floats past the values.
    """
    signature = types.void(
        types.int64, stored, types.int64, types.int64, values, filled, *[types.int64] * 3, w, types.int64
    )

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        b = builder
        instructions, stored, mask, length, values, filled, words, whole, first, w, row = args
        stream = b.bitcast(b.gep(pointer(context, b, sig.args[1], stored), [mask]), i64.as_pointer())
        source, out = (
            b.bitcast(pointer(context, b, sig.args[k], x), f32.as_pointer()) for k, x in ((4, values), (9, w))
        )
        aside = b.gep(source, [b.sub(width(context, b, sig.args[4], values), number(WORD))])
        marks = context.make_array(sig.args[5])(context, b, filled).data
        target = b.gep(out, [b.mul(row, width(context, b, sig.args[9], w))])

        def for_set(code: int) -> None:
            expand = _emit_by_vector if code == AVX512 else _emit_by_eight

            def emit(initial: bool, word: Any, columns: Any, here: Any) -> None:
                inside = b.icmp_signed("<", word, whole)
                there = b.select(inside, b.gep(target, [b.mul(word, number(WORD))]), aside)
                expand(b, columns, b.gep(source, [here]), there, initial)

            emit_tier(b, first, words, (stream, length), marks, number(0), emit)

        cases(b, instructions, {code: lambda code=code: for_set(code) for code in ABLE})
        return context.get_dummy_value()

    return signature, codegen


_FORMS: Final = {VALUES_F16: "f16", VALUES_I8: "i8", VALUES_I4: "i4"}
_take_floats: Any = plain if JIT_OFF else intrinsic(typed_floats(_FORMS, add=False))
_place: Any = plain if JIT_OFF else intrinsic(_typed_place)


@njit(nogil=True)
def _portable_place(stream: U64, values: F32, filled: U64, words: int, first: bool, w: F32, row: int) -> None:
    """What `_typed_place` documents, one value at a time and all into `w`, whose row tier 0 finds full of zeros."""
    bit, place = 0, 0
    for word in range(words):
        if first:
            filled[word] = 0
        free = ~filled[word]
        columns = deposit(taken(stream, bit), free)
        bit += count(free)
        filled[word] |= columns
        while columns != np.uint64(0):
            w[row, WORD * word + lowest(columns)] = values[0, place]
            columns &= np.uint64(columns - np.uint64(1))
            place += 1


@njit(nogil=True)
def _values(stored: U16, kind: int, at: int, rank: int, scale: np.float32, out: F32) -> None:
    """A tier's `rank` values of one row, which begin at byte `at`, into `out [1, >= rank]`."""
    done = 0
    if not JIT_OFF:
        _take_floats(kind, stored, at, rank, scale, out, 0)
        done = rank // LANES * LANES
    bytes_ = stored.view(np.int8)
    for place in range(done, rank):
        if kind == VALUES_F16:
            out[0, place] = half_to_float(stored[at // 2 + place])
        elif kind == VALUES_I8:
            out[0, place] = scale * np.float32(bytes_[at + place])
        else:
            half = np.int64(bytes_[at + place // 2]) >> (4 * (place % 2)) & 15
            out[0, place] = scale * np.float32((half ^ 8) - 8)


@register_jitable
def values_floats(n: int) -> int:
    """Floats of scratch that `decode_tiers` wants."""
    return n + LANES + WORD


@njit(nogil=True)
def decode_tiers(
    instructions: int,
    stored: U16,
    blocks: I64,
    m: int,
    n: int,
    first: int,
    rows: int,
    filled: U64,
    values: F32,
    w: F32,
) -> None:
    """`rows.decode_rows` for a `sparse` weight, with the instruction set of that code; a last mask without its values
    counts for nothing.

    `filled [>= words]` and `values [1, >= values_floats(n)]` are scratch.
    """
    words, whole = -(-n // WORD), n // WORD
    for i in range(rows):
        if blocks.shape[0] < 2 or not CAN[instructions]:
            w[i, :n] = 0
        for tier in range(blocks.shape[0] // 2):
            kind, rank, row = blocks[2 * tier + 1, 0], blocks[2 * tier + 1, 2], first + i
            length, at = tier_width(blocks, tier, n), values_place(blocks, tier, m, row)
            mask, scale = blocks[2 * tier, 1] + 8 * length * row, np.float32(1)
            if kind != VALUES_F16:
                scale = stored.view(np.float32)[blocks[1, 1] // 4 + row]
            _values(stored, kind, at, rank, scale, values)
            if CAN[instructions]:
                _place(instructions, stored, mask, length, values, filled, words, whole, int(tier == 0), w, i)
            else:
                stream = stored.view(np.uint64)[mask // 8 : mask // 8 + length]
                _portable_place(stream, values, filled, words, tier == 0, w, i)
            if tier == 0:
                filled[words - 1] |= past_columns(n)
        if blocks.shape[0] >= 2 and CAN[instructions]:
            aside = values.shape[1] - WORD
            for j in range(n % WORD):
                w[i, WORD * whole + j] = values[0, aside + j]
