"""Stored blocks -> rows of weights in float32, a few rows at a time; nothing of W is ever held but those rows.

Method: four output rows are decoded into a scratch of four rows, level after level, each level adding its part. For a
`signs` level and 64 columns at once, the magnitude `sum_r U[i, r] V[r, j]` is built in vector registers (V is read
once for the four rows), its sign taken from the stored bits, and added. Rank k therefore costs k multiply-adds a weight
however many tokens follow, and no order of additions depends on how many rows, tokens or threads there are.

Layouts are those of `formats/kinds`. The vector code is an intrinsic (LLVM IR, legal on every target) because numba
leaves this loop at half speed; under `NUMBA_DISABLE_JIT` its plain twin runs instead.
"""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic, register_jitable
from numpy.typing import NDArray

from .floats import LANES, typed_floats
from .halves import WIDEN_SCALE, widen
from .vectors import plain

F32: Final = 0
F16: Final = 1
BF16: Final = 2
I8: Final = 3
SIGNS: Final = 4
MASK: Final = 5  # of a tier, whose values come next
VALUES_F16: Final = 6
VALUES_I8: Final = 7
VALUES_I4: Final = 8
PLANE: Final = 9  # levels for each row
SHARED_PLANE: Final = 10  # levels shared by all rows
CODES: Final = {"f32": F32, "f16": F16, "bf16": BF16, "i8": I8}
VALUES_CODES: Final = {"f16": VALUES_F16, "i8": VALUES_I8, "i4": VALUES_I4}

BASE_PLANES: Final = 2  # in a tensor's first plane block
ROWS: Final = 4  # rows decoded together
WORD: Final = 64  # columns whose signs are one stored word
GROUPS: Final = WORD // LANES
JIT_OFF: Final = bool(vars(numba.config)["DISABLE_JIT"])

_i16, _i32, _i64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_f32 = ir.FloatType()
_vi16, _vi32, _vf32 = (ir.VectorType(kind, LANES) for kind in (_i16, _i32, _f32))


def _data(context: Any, builder: Any, kind: Any, array: Any, offset: Any) -> Any:
    """Pointer to element `offset` of a contiguous array."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [offset])


def _splat(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_vf32, ir.Undefined), value, ir.Constant(_i32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_i32, LANES), [0] * LANES))


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c` for vectors, rounded once."""
    kind = ir.FunctionType(_vf32, [_vf32] * 3)
    return builder.call(get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32"), [a, b, c])


def _load(builder: Any, kind: Any, pointer: Any, align: int) -> Any:
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=align)


def _low_bits(value: int) -> Any:
    return ir.Constant(_vi32, [value] * LANES)


def _typed_add_signs(typing: Any, u16: Any, bits: Any, words: Any, v: Any, n: Any, k: Any, u: Any, w: Any) -> Any:
    """`w[i, j] +-= sum_r u[i, r] v[r, j]` for ROWS rows and every whole group of WORD columns below n."""
    signature = types.void(u16, types.int64, types.int64, types.int64, types.int64, types.int64, u, w)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        stored, bits, words, v, n, k, u, w = args
        zero, one, word = (ir.Constant(_i64, value) for value in (0, 1, WORD))
        base = context.make_array(sig.args[0])(context, builder, stored).data
        factors = context.make_array(sig.args[6])(context, builder, u).data
        scratch = context.make_array(sig.args[7])(context, builder, w)
        stride = builder.extract_value(scratch.shape, 1)
        entry = builder.block
        column, rank, finish, end = (builder.append_basic_block(name) for name in ("column", "rank", "finish", "end"))
        whole = builder.mul(builder.sdiv(n, word), word)
        builder.cbranch(builder.icmp_signed("<", zero, whole), column, end)

        builder.position_at_end(column)
        j = builder.phi(_i64)
        j.add_incoming(zero, entry)
        builder.branch(rank)

        builder.position_at_end(rank)
        r = builder.phi(_i64)
        r.add_incoming(zero, column)
        magnitudes = [[builder.phi(_vf32) for _ in range(GROUPS)] for _ in range(ROWS)]
        at = builder.gep(base, [builder.add(v, builder.add(builder.mul(r, n), j))])
        halves = [builder.gep(at, [ir.Constant(_i64, g * LANES)]) for g in range(GROUPS)]
        values = [widen(builder, _load(builder, _vi16, half, 2)) for half in halves]
        sums = []
        for row, before in enumerate(magnitudes):
            place = builder.add(builder.mul(k, ir.Constant(_i64, row)), r)
            factor = _splat(builder, builder.load(builder.gep(factors, [place])))
            after = [fused(builder, factor, new, old) for old, new in zip(before, values, strict=True)]
            for old, new in zip(before, after, strict=True):
                old.add_incoming(ir.Constant(_vf32, [0.0] * LANES), column)
                old.add_incoming(new, rank)
            sums.append(after)
        following = builder.add(r, one)
        r.add_incoming(following, rank)
        builder.cbranch(builder.icmp_signed("<", following, k), rank, finish)

        builder.position_at_end(finish)
        for row, totals in enumerate(sums):
            place = builder.add(
                builder.add(bits, builder.mul(words, ir.Constant(_i64, row))), builder.sdiv(j, ir.Constant(_i64, 16))
            )
            signs = builder.load(builder.bitcast(builder.gep(base, [place]), _i64.as_pointer()), align=2)
            target = builder.gep(scratch.data, [builder.add(builder.mul(stride, ir.Constant(_i64, row)), j)])
            for group, total in enumerate(totals):
                part = builder.trunc(builder.lshr(signs, ir.Constant(_i64, group * LANES)), _i16)
                positive = builder.bitcast(part, ir.VectorType(ir.IntType(1), LANES))
                flipped = builder.bitcast(builder.xor(builder.bitcast(total, _vi32), _low_bits(0x80000000)), _vf32)
                where = builder.gep(target, [ir.Constant(_i64, group * LANES)])
                summed = builder.fadd(_load(builder, _vf32, where, 4), builder.select(positive, total, flipped))
                builder.store(summed, builder.bitcast(where, _vf32.as_pointer()), align=4)
        after_word = builder.add(j, word)
        j.add_incoming(after_word, finish)
        builder.cbranch(builder.icmp_signed("<", after_word, whole), column, end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen


@njit(nogil=True)
def half_to_float(bits: np.uint16) -> np.float32:
    """Finite fp16 bits -> float32, exact, subnormals included."""
    # numba widens the result of a shift to 64 bits, hence the outer cast
    rest = np.uint32(np.uint32(bits & np.uint16(0x7FFF)) << np.uint32(13)).view(np.float32) * np.float32(WIDEN_SCALE)
    return -rest if bits & np.uint16(0x8000) else rest


@njit(nogil=True)
def _add_signs_columns(
    stored: NDArray[np.uint16],
    bits: int,
    words: int,
    v: int,
    stop: int,
    n: int,
    k: int,
    u: NDArray[np.float32],
    w: NDArray[np.float32],
    rows: int,
    start: int,
) -> None:
    """The same sum, scalar, for `rows` rows and the columns `[start, stop)`."""
    for i in range(rows):
        for j in range(start, stop):
            total = np.float32(0)
            for r in range(k):
                total += u[i, r] * half_to_float(stored[v + r * n + j])
            positive = (stored[bits + i * words + j // 16] >> np.uint16(j % 16)) & np.uint16(1)
            w[i, j] += total if positive else -total


def _plain_add_signs(stored: Any, bits: int, words: int, v: int, n: int, k: int, u: Any, w: Any) -> None:
    _add_signs_columns(stored, bits, words, v, n - n % WORD, n, k, u, w, ROWS, 0)


_add_signs_vector: Any = _plain_add_signs if JIT_OFF else intrinsic(_typed_add_signs)
_FORMS: Final = {F32: "f32", F16: "f16", BF16: "bf16", I8: "i8"}
_add_floats: Any = plain if JIT_OFF else intrinsic(typed_floats(_FORMS, add=True))


@njit(nogil=True)
def _row_levels(
    stored: NDArray[np.uint16], blocks: NDArray[np.int64], m: int, words: int, row: int, levels: NDArray[np.float32]
) -> None:
    """What every index of the deepest resident plane means in one row, into `levels [2^depth]`."""
    last = blocks.shape[0] - 1
    at = int(blocks[last, 1]) // 2 + 4 * m * words * (1 if last else BASE_PLANES)
    scale = bf16_to_float(stored[at + row])
    count = 1 << (last + BASE_PLANES)
    integers = stored.view(np.int8)
    start = 2 * (at + m) + (row * count if blocks[last, 0] == PLANE else 0)
    for c in range(count):
        levels[c] = scale * np.float32(integers[start + c])


@njit(nogil=True)
def bf16_to_float(bits: np.uint16) -> np.float32:
    """Exact."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@njit(nogil=True)
def _decode_planes(
    stored: NDArray[np.uint16],
    blocks: NDArray[np.int64],
    m: int,
    n: int,
    first: int,
    rows: int,
    w: NDArray[np.float32],
) -> None:
    """`decode_rows` for a weight made of planes: 64 indices at a time are put together, then looked up."""
    words = -(-n // WORD)
    count = blocks.shape[0]
    levels = np.empty(1 << (count + BASE_PLANES - 1), np.float32)
    index = np.empty(WORD, np.uint8)
    packed = stored.view(np.uint64)
    for i in range(rows):
        _row_levels(stored, blocks, m, words, first + i, levels)
        for word in range(words):
            place = (first + i) * words + word
            base = blocks[0, 1] // 8 + place
            high, low = packed[base], packed[base + m * words]
            for j in range(WORD):
                index[j] = ((high >> np.uint64(j)) & np.uint64(1)) << np.uint64(1) | (low >> np.uint64(j)) & np.uint64(
                    1
                )
            for level in range(1, count):
                bits = packed[blocks[level, 1] // 8 + place]
                for j in range(WORD):
                    index[j] = (np.uint64(index[j]) << np.uint64(1)) | (bits >> np.uint64(j)) & np.uint64(1)
            start = word * WORD
            for j in range(min(WORD, n - start)):
                w[i, start + j] = levels[index[j]]


@register_jitable
def largest_rank(blocks: NDArray[np.int64]) -> int:
    """Of signs; at least 1."""
    rank = 1
    for level in range(blocks.shape[0]):
        if blocks[level, 0] == SIGNS:
            rank = max(rank, blocks[level, 2])
    return rank


@njit(nogil=True)
def _add_row(
    stored: NDArray[np.uint16],
    kind: int,
    at: int,
    m: int,
    n: int,
    row: int,
    w: NDArray[np.float32],
    i: int,
) -> None:
    """A dense block's row `row` to `w[i]`."""
    scale, done = np.float32(1), 0
    if kind == I8:
        scale = stored[at // 2 : at // 2 + 2 * m].view(np.float32)[row]
        at += 4 * m + row * n
    else:
        at += (4 if kind == F32 else 2) * row * n
    if not JIT_OFF:
        _add_floats(kind, stored, at, n, scale, w, i)
        done = n // LANES * LANES
    for j in range(done, n):
        if kind == I8:
            w[i, j] += scale * np.float32(stored.view(np.int8)[at + j])
        elif kind == F32:
            low, high = stored[at // 2 + 2 * j], stored[at // 2 + 2 * j + 1]
            w[i, j] += np.uint32(np.uint32(low) | np.uint32(high) << np.uint32(16)).view(np.float32)
        elif kind == BF16:
            w[i, j] += bf16_to_float(stored[at // 2 + j])
        else:
            w[i, j] += half_to_float(stored[at // 2 + j])


@njit(nogil=True)
def decode_rows(
    stored: NDArray[np.uint16],
    blocks: NDArray[np.int64],
    m: int,
    n: int,
    first: int,
    rows: int,
    factors: NDArray[np.float32],
    w: NDArray[np.float32],
) -> None:
    """Rows `[first, first + rows)` of a weight `[m, n]` into `w [ROWS, >= n]`; columns past n are left alone.

    `stored` is the resident memory as uint16, a multiple of 8 bytes; `blocks [levels, 3]` holds each level's kind code,
    byte offset (even; of planes, masks and values a multiple of 8) and rank (of tiers: values of a row, but these are
    for `tiers.decode_tiers`); `factors [ROWS, >= rank of signs]` is scratch. `1 <= rows <= ROWS`. Planes come rotated.
    """
    if blocks.shape[0] and blocks[0, 0] >= PLANE:
        _decode_planes(stored, blocks, m, n, first, rows, w)
        return
    for i in range(rows):
        w[i, :n] = 0
    for level in range(blocks.shape[0]):
        kind, at, k = blocks[level, 0], blocks[level, 1] // 2, blocks[level, 2]
        if kind == SIGNS:
            words = -(-n // 64) * 4
            bits, u = at + first * words, at + m * words + first * k
            v = at + m * words + m * k
            flat = factors.reshape(-1)
            for place in range(rows * k):
                flat[place] = half_to_float(stored[u + place])
            grid = flat[: ROWS * k].reshape(ROWS, k)
            tail = 0
            if rows == ROWS:
                _add_signs_vector(stored, bits, words, v, n, k, grid, w)
                tail = n - n % WORD
            _add_signs_columns(stored, bits, words, v, n, n, k, grid, w, rows, tail)
        else:
            for i in range(rows):
                _add_row(stored, kind, blocks[level, 1], m, n, first + i, w, i)
