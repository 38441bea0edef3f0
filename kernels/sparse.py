"""Tiers of masks and values -> rows of bytes, which `signs.multiply_sum` multiplies.

Method: a row's values are bytes one after the other (int8 as they are stored, halves of bytes unpacked, fp16 rounded
with the row's own scale, which all its tiers share). The next tier's mask has a bit only for columns that are still
zero. With AVX-512 the last tier comes first: its values expanded by its mask (`vpexpandb`, 64 at once) are all that the
columns left by the tier before it hold, so that one merges them with its own, and no mask's bits have to be moved to
their columns. Elsewhere the first tier comes first and `deposit` moves them: values are put in their places by eight
deposits of bytes with BMI2 (code AVX2), else one by one, tier after tier into the same row. What fp16 becomes is what
`signs` makes of rows decoded to floats, without the floats of all columns.

Nothing here is rounded but fp16, value by value, and nothing is added up: no order matters. Layouts are those of
`formats/kinds`, whose promise that every row of a mask has the same number of ones makes all offsets arithmetic.
"""

from __future__ import annotations

from itertools import product
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.cgutils import alloca_once
from numba.extending import intrinsic, register_jitable
from numpy.typing import NDArray

from .bits import count, deposit, emit_count, emit_deposit, taken
from .floats import LANES, emit_floats
from .instructions import AVX2, AVX512
from .planes import SETS
from .quantize import LARGEST, LEAST
from .rows import JIT_OFF, VALUES_F16, VALUES_I8, WORD, half_to_float
from .tiers import CAN, EACH, emit_tier, past_columns, tier_width, values_place
from .vectors import (
    AHEAD,
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
    plain,
    pointer,
    prefetch,
    shuffle,
    splat,
    store,
    vector,
    width,
)

_NIBBLES: Final = 32  # bytes of them that are unpacked at once
_ROUND: Final = np.float32(12582912.0)  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]


@register_jitable
def _line(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


@register_jitable
def _left_nbytes(n: int) -> int:
    """What a tier and those after it put into the columns that the tiers before have left, and what is read past it."""
    return _line(n) + 2 * WORD


@register_jitable
def expansion_nbytes(n: int) -> int:
    """Scratch of `expand_rows`: which columns are filled, a tier's values of one row in bytes, and what two tiers leave
    to those before.
    """
    return _line(8 * -(-n // WORD)) + _line(n + 1) + 2 * _left_nbytes(n)


def _typed_merge(
    typing: Any,
    stored: Any,
    mask: Any,
    words: Any,
    unpacked: Any,
    aside: Any,
    at: Any,
    left: Any,
    behind: Any,
    out: Any,
    row: Any,
    form: Any,
) -> Any:
    """With AVX-512: a tier's bytes and those of the tiers after it, for the columns that its mask has, into row `row`
    of `out [.., stride]`.

    The mask's row is `words` words of `stored` from byte `mask`; the tier's own bytes begin at `at` of `unpacked` if
    `aside`, else of `stored`; those of later tiers are row `behind` of `left [2, ..]`. `form` is the sum of 1 if there
    are later tiers, 2 for the first, whose bytes are flipped, and 4 to read nothing past the tier's own bytes (else 64
    more). Bytes of the columns past the last are as if they were zero, with 128 more of those for any but the first.
    """
    whole = types.int64
    signature = types.void(stored, whole, whole, unpacked, whole, whole, left, whole, out, whole, whole)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        b = builder
        stored, mask, words, unpacked, aside, at, left, behind, out, row, form = args
        base, own, below, above = (
            pointer(context, b, sig.args[k], x) for k, x in ((0, stored), (3, unpacked), (6, left), (8, out))
        )
        source = b.select(b.icmp_signed("!=", aside, number(0)), own, base)
        raw = b.gep(base, [mask])
        stream = b.bitcast(raw, i64.as_pointer())
        rest = b.gep(below, [b.mul(behind, width(context, b, sig.args[6], left))])
        target = b.gep(above, [b.mul(row, width(context, b, sig.args[8], out))])
        kind, bits, zeros = vector(i8, WORD), vector(ir.IntType(1), WORD), constant(i8, [0] * WORD)
        place, taken_at = alloca_once(b, i64), alloca_once(b, i64)

        def taken_from(values: Any, ones: Any, careful: bool) -> Any:
            if careful:
                valid = call(b, "llvm.x86.bmi.bzhi.64", i64, [number(-1), ones])
                arguments = [values, ir.Constant(ir.IntType(32), 1), b.bitcast(valid, bits), zeros]
                return call(b, "llvm.masked.load.v64i8.p0", kind, arguments)
            # Through a register: `vpexpandb` from memory takes three times as long on Zen 4.
            return b.asm(ir.FunctionType(kind, [kind]), "", "=v,0", [load(b, kind, values)], side_effect=False)

        def merge(careful: bool, first: bool, more: bool) -> None:
            b.store(at, place)
            b.store(number(0), taken_at)
            word, following, end = loop(b, words, unroll=False)
            columns, here = b.load(b.gep(stream, [word])), b.load(place)
            prefetch(b, b.gep(raw, [b.add(b.mul(word, number(8)), number(AHEAD))]))
            prefetch(b, b.gep(source, [b.add(here, number(AHEAD))]))
            ones = emit_count(b, columns)
            found, under = taken_from(b.gep(source, [here]), ones, careful), zeros
            if more:
                begins = b.load(taken_at)
                others = b.bitcast(b.not_(columns), bits)
                later = taken_from(b.gep(rest, [begins]), ones, careful=False)
                under = call(b, "llvm.x86.avx512.mask.expand.v64i8", kind, [later, zeros, others])
                b.store(b.add(begins, b.sub(number(WORD), ones)), taken_at)
            merged = call(b, "llvm.x86.avx512.mask.expand.v64i8", kind, [found, under, b.bitcast(columns, bits)])
            if first:
                merged = b.xor(merged, constant(i8, [SETS[AVX512].flip] * WORD))
            store(b, merged, b.gep(target, [b.mul(word, number(WORD))]))
            b.store(b.add(here, ones), place)
            following()
            end()
            if not first:
                for past in range(2):
                    store(b, zeros, b.gep(target, [b.mul(b.add(words, number(past)), number(WORD))]))

        forms = product((False, True), repeat=3)
        with b.if_then(b.icmp_signed(">", words, number(0))):
            cases(b, form, {4 * c + 2 * f + m: lambda c=c, f=f, m=m: merge(c, f, m) for c, f, m in forms})
        return context.get_dummy_value()

    return signature, codegen


def _emit_by_words(b: Any, columns: Any, values: Any, at: Any, stop: Any, out: Any, flip: int, first: bool) -> None:
    """Expand eight bytes at a time with BMI2; no byte from `stop` on is touched."""
    last = b.sub(stop, number(8))
    for k in range(8):
        before = emit_count(b, b.and_(columns, number((1 << 8 * k) - 1)))
        own = b.and_(b.lshr(columns, number(8 * k)), number(0xFF))
        where = b.mul(emit_deposit(b, own, number(EACH)), number(0xFF))
        wanted = b.add(at, before)
        begins = b.select(b.icmp_signed("<", wanted, last), wanted, last)
        by = b.and_(b.mul(b.sub(wanted, begins), number(8)), number(63))  # 64 where no byte is wanted any more
        raw = b.lshr(load(b, i64, b.gep(values, [begins])), by)
        found = emit_deposit(b, b.xor(raw, number(flip * EACH)), where)
        here = b.gep(out, [number(8 * k)])
        under = number(flip * EACH) if first else load(b, i64, here)
        store(b, b.or_(found, b.and_(under, b.not_(where))), here)


def _typed_expand(
    typing: Any,
    stored: Any,
    mask: Any,
    length: Any,
    unpacked: Any,
    aside: Any,
    at: Any,
    stop: Any,
    filled: Any,
    words: Any,
    first: Any,
    w: Any,
    row: Any,
) -> Any:
    """With AVX2: a tier's bytes into row `row` of `w [ROWS, stride]`, xor the set's flip: `[at, stop)` of `unpacked` if
    `aside`, else of `stored`.

    The mask's row is `length` words of `stored` from byte `mask`; `filled [words]` says which columns tiers before this
    one have, and gets this one's. `first` is 1 for tier 0, which overwrites both.
    """
    whole = types.int64
    signature = types.void(stored, *[whole] * 2, unpacked, *[whole] * 3, filled, whole, whole, w, whole)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        b = builder
        stored, mask, length, unpacked, aside, at, stop, filled, words, first, w, row = args
        base, own, out = (pointer(context, b, sig.args[k], x) for k, x in ((0, stored), (3, unpacked), (10, w)))
        source = b.select(b.icmp_signed("!=", aside, number(0)), own, base)
        marks = context.make_array(sig.args[7])(context, b, filled).data
        raw = b.gep(base, [mask])
        stream = b.bitcast(raw, i64.as_pointer())
        target = b.gep(out, [b.mul(row, width(context, b, sig.args[10], w))])

        def emit(initial: bool, word: Any, columns: Any, here: Any) -> None:
            prefetch(b, b.gep(raw, [b.add(b.mul(word, number(8)), number(AHEAD))]))
            prefetch(b, b.gep(source, [b.add(here, number(AHEAD))]))
            there = b.gep(target, [b.mul(word, number(WORD))])
            _emit_by_words(b, columns, source, here, stop, there, SETS[AVX2].flip, initial)

        emit_tier(b, first, words, (stream, length), marks, at, emit)
        return context.get_dummy_value()

    return signature, codegen


_expand: Any = plain if JIT_OFF else intrinsic(_typed_expand)
_merge: Any = plain if JIT_OFF else intrinsic(_typed_merge)


@njit(nogil=True)
def _portable_expand(
    stream: U64, values: U8, at: int, filled: U64, words: int, first: bool, flip: np.uint8, w: U8, row: int
) -> None:
    """What `_typed_expand` documents, one column at a time."""
    bit = 0
    for word in range(words):
        if first:
            filled[word] = 0
            w[row, WORD * word : WORD * (word + 1)] = flip
        free = ~filled[word]
        columns = deposit(taken(stream, bit), free)
        bit += count(free)
        filled[word] |= columns
        for j in range(WORD):
            if columns >> np.uint64(j) & np.uint64(1):
                w[row, WORD * word + j] = values[at] ^ flip
                at += 1


def _typed_largest(typing: Any, stored: Any, at: Any, count: Any) -> Any:
    """The largest of `count // LANES * LANES` halves from byte `at`, their signs dropped; 0 of none."""
    signature = types.int64(stored, types.int64, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        b, kind = builder, vector(i16, LANES)
        base = b.gep(pointer(context, b, sig.args[0], args[0]), [args[1]])
        top = alloca_once(b, kind)
        b.store(constant(i16, [0] * LANES), top)
        with b.if_then(b.icmp_signed(">=", args[2], number(LANES))):
            place, following, end = loop(b, b.and_(args[2], number(-LANES)), LANES)
            here = b.gep(base, [b.mul(place, number(2))])
            prefetch(b, b.gep(here, [number(AHEAD)]))
            halves = load(b, kind, here)
            sizes, before = b.and_(halves, constant(i16, [0x7FFF] * LANES)), b.load(top)
            b.store(b.select(b.icmp_signed(">", sizes, before), sizes, before), top)
            following()
            end()
        largest = call(b, f"llvm.vector.reduce.smax.v{LANES}i16", i16, [b.load(top)])
        return b.zext(largest, i64)

    return signature, codegen


def _typed_round_halves(typing: Any, stored: Any, at: Any, count: Any, by: Any, out: Any) -> Any:
    """`count // LANES * LANES` halves from byte `at`, times `by`, to the nearest integers, into the bytes of `out`."""
    signature = types.void(stored, types.int64, types.int64, types.float32, out)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        b = builder
        stored, at, count, by, out = args
        base, target = (pointer(context, b, sig.args[k], x) for k, x in ((0, stored), (4, out)))
        with b.if_then(b.icmp_signed(">=", count, number(LANES))):
            place, following, end = loop(b, b.and_(count, number(-LANES)), LANES)
            found = b.fmul(emit_floats(b, "f16", base, at, place), splat(b, by, LANES))
            moved = b.fadd(found, constant(f32, [float(_ROUND)] * LANES))
            bytes_ = b.trunc(b.bitcast(moved, vector(i32, LANES)), vector(i8, LANES))
            store(b, bytes_, b.gep(target, [place]))
            following()
            end()
        return context.get_dummy_value()

    return signature, codegen


def _typed_unpack(typing: Any, stored: Any, at: Any, count: Any, out: Any) -> Any:
    """The halves of `count // _NIBBLES * _NIBBLES` bytes from byte `at`, low ones first, as signed bytes into `out`."""
    signature = types.void(stored, types.int64, types.int64, out)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        b, kind = builder, vector(i8, _NIBBLES)
        base, target = (pointer(context, b, sig.args[k], args[k]) for k in (0, 3))
        with b.if_then(b.icmp_signed(">=", args[2], number(_NIBBLES))):
            place, following, end = loop(b, b.and_(args[2], number(-_NIBBLES)), _NIBBLES)
            here = b.gep(base, [b.add(args[1], place)])
            prefetch(b, b.gep(here, [number(AHEAD)]))
            pairs = load(b, kind, here)
            low, high = b.and_(pairs, constant(i8, [15] * _NIBBLES)), b.lshr(pairs, constant(i8, [4] * _NIBBLES))
            order = [k // 2 + _NIBBLES * (k % 2) for k in range(2 * _NIBBLES)]
            found, eights = shuffle(b, low, high, order), constant(i8, [8] * (2 * _NIBBLES))
            store(b, b.sub(b.xor(found, eights), eights), b.gep(target, [b.mul(place, number(2))]))
            following()
            end()
        return context.get_dummy_value()

    return signature, codegen


_largest: Any = plain if JIT_OFF else intrinsic(_typed_largest)
_unpack_vectors: Any = plain if JIT_OFF else intrinsic(_typed_unpack)
_round_vectors: Any = plain if JIT_OFF else intrinsic(_typed_round_halves)


@njit(nogil=True)
def _largest_of_halves(halves: NDArray[np.uint16], at: int, count: int) -> int:
    """Of `count` halves from byte `at`, their signs dropped: its bits."""
    top, done = 0, 0
    if not JIT_OFF:
        top = _largest(halves, at, count)
        done = count // LANES * LANES
    for k in range(at // 2 + done, at // 2 + count):
        top = max(top, int(halves[k]) & 0x7FFF)
    return top


@njit(nogil=True)
def _round_halves(halves: NDArray[np.uint16], at: int, count: int, by: np.float32, bytes_: U8) -> None:
    """`count` halves from byte `at`, times `by`, to the nearest integers."""
    done = 0
    if not JIT_OFF:
        _round_vectors(halves, at, count, by, bytes_)
        done = count // LANES * LANES
    for k in range(done, count):
        moved = np.float32(half_to_float(halves[at // 2 + k]) * by + _ROUND)
        bytes_[k] = np.uint8(moved.view(np.int32) & np.int32(0xFF))


@njit(nogil=True)
def _unpack_nibbles(stored: U8, at: int, count: int, bytes_: U8) -> None:
    """The signed halves of `count` bytes from byte `at`, low ones first."""
    done = 0
    if not JIT_OFF:
        _unpack_vectors(stored, at, count, bytes_)
        done = count // _NIBBLES * _NIBBLES
    for k in range(done, count):
        pair = int(stored[at + k])
        bytes_[2 * k] = np.uint8(((pair & 15 ^ 8) - 8) & 0xFF)
        bytes_[2 * k + 1] = np.uint8(((pair >> 4 ^ 8) - 8) & 0xFF)


@njit(nogil=True)
def expand_rows(
    instructions: int,
    stored: U8,
    blocks: I64,
    m: int,
    n: int,
    first: int,
    rows: int,
    flip: np.uint8,
    scratch: U8,
    w: U8,
    scales: F32,
) -> None:
    """Rows `[first, first + rows)` of a `sparse` weight `[m, n]` into `w [ROWS, >= columns in whole words]`, xor
    `flip`, which is the instruction set's; row i's bytes count `scales[i]` each.

    `scratch [>= expansion_nbytes(n)]` begins at a multiple of 8. A mask without its values counts for nothing.
    """
    words, tiers = -(-n // WORD), blocks.shape[0] // 2
    filled, unpacked = scratch[: 8 * words].view(np.uint64), scratch[_line(8 * words) :]
    left = unpacked[_line(n + 1) :][: 2 * _left_nbytes(n)].reshape(2, _left_nbytes(n))
    merges = instructions == AVX512 and CAN[AVX512]
    halves, numbers = stored.view(np.uint16), stored.view(np.float32)  # a view for each row would count references
    for i in range(rows):
        row, by = first + i, np.float32(0)
        if tiers == 0:
            scales[i] = 0
            w[i, : WORD * words] = flip
        elif blocks[1, 0] == VALUES_F16:
            top = 0
            for tier in range(tiers):
                top = max(top, _largest_of_halves(halves, values_place(blocks, tier, m, row), blocks[2 * tier, 2]))
            largest = np.float32(half_to_float(np.uint16(top)))
            scales[i] = largest / np.float32(LARGEST)
            if largest >= np.float32(LEAST):
                by = np.float32(LARGEST) / largest
            else:
                scales[i] = 0
        else:
            scales[i] = numbers[blocks[1, 1] // 4 + row]
        for step in range(tiers):
            tier = tiers - 1 - step if merges else step
            kind, rank, length = blocks[2 * tier + 1, 0], blocks[2 * tier, 2], tier_width(blocks, tier, n)
            mask, at = blocks[2 * tier, 1] + 8 * length * row, values_place(blocks, tier, m, row)
            stop, aside = values_place(blocks, tier, m, m), kind != VALUES_I8
            if aside:
                if kind == VALUES_F16:
                    _round_halves(halves, at, rank, by, unpacked)
                else:
                    _unpack_nibbles(stored, at, -(-rank // 2), unpacked)
                at, stop = 0, unpacked.shape[0]
            if merges:
                form = int(step > 0) + 2 * int(tier == 0) + 4 * int(at + rank + WORD > stop)
                if tier == 0:
                    _merge(stored, mask, length, unpacked, int(aside), at, left, step & 1, w, i, form)
                else:
                    _merge(stored, mask, length, unpacked, int(aside), at, left, step & 1, left, 1 - (step & 1), form)
            elif CAN[instructions]:
                first_tier = int(tier == 0)
                _expand(stored, mask, length, unpacked, int(aside), at, stop, filled, words, first_tier, w, i)
            else:
                stream = stored[mask : mask + 8 * length].view(np.uint64)
                _portable_expand(stream, unpacked if aside else stored, at, filled, words, tier == 0, flip, w, i)
            if tier == 0:
                filled[words - 1] |= past_columns(n)
