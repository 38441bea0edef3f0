"""`y[T, m] = x[T, n] @ W^T` in integers for weights that are a sum of blocks: signs of low rank, or anything else.

Method, for `signs` blocks of rank 1 (or little more): what one rank of one level adds to row i of y is

    U[i, r] * sum_j S[i, j] z[j],    z = V[r] * x,

and V belongs to the whole matrix. So a token is made bytes once for each rank of each level (`fold_row`), and its
product with +-1, made of the stored bits in registers, is that of `planes.emit_dot`. The work grows with ranks times
tokens. Other blocks therefore go the plain way: four rows of W are decoded to floats (`rows`), rounded to bytes with a
scale for each row, and multiplied with the token's own bytes, whatever the rank. A lone block of int8 is just copied.

Columns keep their order. Of 512 columns, the 32 whose products meet in one of the 16 integer sums share a scale: fine
scales, which inputs that were not rotated need, cost nothing there.

Determinism is that of `planes`: integers are exact; floats are added in the order of columns, then ranks, then levels.
Layouts are those of `formats/kinds`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numba import njit, prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from .instructions import PORTABLE
from .planes import (
    AHEAD,
    COLUMNS,
    FLOATS,
    INTEGERS,
    MOST_TOKENS,
    SETS,
    SUMS,
    TILES,
    VECTORS,
    Fetch,
    dot,
    emit_dots,
    plain,
    pointer,
    portable_dot,
    width,
)
from .quantize import LARGEST, LEAST
from .rows import I8, JIT_OFF, PLANE, ROWS, SIGNS, WORD, decode_rows, half_to_float
from .vectors import Bytes, constant, f32, i8, i32, load, number, prefetch, shuffle, store, vector

FOLDED_RANK: Final = 2  # of the blocks whose inputs are folded; above, decoding rows is less work from a few tokens on
ROTATED: Final = -2  # forms of an input: what `planes` wants,
PLAIN: Final = -1  # the same columns in bytes; or, from 0 on, times the row of V that begins at this uint16
_FLIPS: Final = np.array([SETS[code].flip if code in SETS else 0 for code in range(len(TILES))], np.uint8)
_ROUND: Final = np.float32(12582912.0)  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits
_ROUND_BITS: Final = int(_ROUND.view(np.int32))
_INFINITY: Final = 0x7F800000
_WIDE: Final = 64  # floats handled together: COLUMNS / VECTORS
_NARROW: Final = _WIDE // 4

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]


@njit(nogil=True)
def folded(blocks: I64) -> bool:
    """Whether inputs are folded for these blocks."""
    for level in range(blocks.shape[0]):
        if blocks[level, 0] != SIGNS or blocks[level, 2] > FOLDED_RANK:
            return False
    return blocks.shape[0] > 0


def input_forms(blocks: I64, m: int, n: int) -> tuple[int, ...]:
    """The forms in which a weight `[m, n]` of these blocks wants its input, in order."""
    if len(blocks) and blocks[0, 0] >= PLANE:
        return (ROTATED,)
    if not folded(blocks):
        return (PLAIN,)
    before = m * -(-n // WORD) * (WORD // 16)
    return tuple(int(at) // 2 + before + m * int(k) + r * n for _, at, k in blocks for r in range(k))


def _typed_round(typing: Any, row: Any, at: Any, q: Any, t: Any, scales: Any, corrections: Any) -> Any:
    """COLUMNS floats of `row` from `at`: into token t's bytes, scales and corrections."""
    signature = types.void(row, types.int64, q, types.int64, scales, corrections)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        b = builder
        row, at, q, t, scales, corrections = args
        rows, bytes_, factors, sums = (
            context.make_array(sig.args[k])(context, b, value)
            for k, value in ((0, row), (2, q), (4, scales), (5, corrections))
        )
        floats, integers = vector(f32, _WIDE), vector(i32, _WIDE)
        values = [
            load(b, floats, b.gep(rows.data, [b.add(at, number(_WIDE * v))]), 4) for v in range(VECTORS)
        ]

        def everywhere(value: int) -> Any:
            return constant(i32, [value] * _WIDE)

        def larger(x: Any, y: Any) -> Any:
            return b.select(b.icmp_signed(">", x, y), x, y)

        def first_of_four(x: Any) -> Any:
            return shuffle(b, x, x, range(0, _WIDE, 4))

        top = everywhere(0)
        for value in values:
            top = larger(top, b.and_(b.bitcast(value, integers), everywhere(0x7FFFFFFF)))
        for step in (1, 2):
            top = larger(top, shuffle(b, top, top, [j ^ step for j in range(_WIDE)]))
        bad = b.icmp_signed(">=", top, everywhere(_INFINITY))
        narrow = first_of_four(top)
        largest = b.bitcast(narrow, vector(f32, _NARROW))
        nothing = b.fcmp_ordered("<", largest, constant(f32, [LEAST] * _NARROW))
        wrong = b.icmp_signed(">=", narrow, constant(i32, [_INFINITY] * _NARROW))
        most, zeros = (constant(f32, [value] * _NARROW) for value in (LARGEST, 0.0))
        scale = b.select(nothing, zeros, b.fdiv(largest, most))
        scale = b.select(wrong, constant(f32, [float("nan")] * _NARROW), scale)
        factor = b.select(b.or_(nothing, wrong), zeros, b.fdiv(most, largest))
        by = shuffle(b, factor, factor, [j // 4 for j in range(_WIDE)])
        magic, total = constant(f32, [float(_ROUND)] * _WIDE), everywhere(0)
        target = b.add(b.mul(t, b.extract_value(bytes_.shape, 1)), at)
        for v, value in enumerate(values):
            good = b.select(bad, constant(f32, [0.0] * _WIDE), value)
            moved = b.fadd(b.fmul(good, by), magic)
            whole = b.sub(b.bitcast(moved, integers), everywhere(_ROUND_BITS))
            total = b.add(total, whole)
            store(b, b.trunc(whole, vector(i8, _WIDE)), b.gep(bytes_.data, [b.add(target, number(_WIDE * v))]))
        for step in (1, 2):
            total = b.add(total, shuffle(b, total, total, [j ^ step for j in range(_WIDE)]))
        place = b.sdiv(target, number(COLUMNS // SUMS))
        store(b, scale, b.gep(factors.data, [place]), 4)
        less = b.mul(first_of_four(total), constant(i32, [-128] * _NARROW))
        store(b, less, b.gep(sums.data, [place]), 4)
        return context.get_dummy_value()

    return signature, codegen


def _plain_round(row: F32, at: int, q: NDArray[np.int8], t: int, scales: F32, corrections: NDArray[np.int32]) -> None:
    values = row[at : at + COLUMNS].reshape(VECTORS, SUMS, 4)
    largest = np.abs(values).max((0, 2))
    bad, nothing = ~np.isfinite(largest), largest < np.float32(LEAST)
    safe = np.where(bad | nothing, np.float32(1), largest)
    factor = np.where(bad | nothing, np.float32(0), np.float32(LARGEST) / safe)
    good = np.where(bad[:, None], np.float32(0), values)
    whole = np.rint(good * factor[:, None])
    q[t, at : at + COLUMNS] = whole.reshape(-1).astype(np.int8)
    places = slice(at // (COLUMNS // SUMS), (at + COLUMNS) // (COLUMNS // SUMS))
    scales[t, places] = np.where(bad, np.float32(np.nan), np.where(nothing, np.float32(0), safe / np.float32(LARGEST)))
    corrections[t, places] = -128 * whole.sum((0, 2)).astype(np.int32)


def _typed_dot_signs(
    typing: Any,
    instructions: Any,
    tokens: Any,
    stored: Any,
    places: Any,
    words: Any,
    tails: Any,
    x: Any,
    first: Any,
    scales: Any,
    corrections: Any,
    out: Any,
) -> Any:
    """`planes.dot` of ROWS rows of signs, whose words begin at the bytes `places [ROWS]`; what is left of them after the
    last whole COLUMNS is in `tails [ROWS, >= 64]`.
    """
    signature = types.void(
        types.int64, types.int64, stored, places, types.int64, tails, x, types.int64, scales, corrections, out
    )

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        instructions, tokens, stored, places, words, tails, *rest = args
        b = builder
        base, tail = (pointer(context, b, sig.args[k], value) for k, value in ((2, stored), (5, tails)))
        starts = context.make_array(sig.args[3])(context, b, places).data
        step = width(context, b, sig.args[5], tails)

        def rows(of: Bytes) -> Callable[[Any], Fetch]:
            begin = [b.gep(base, [b.load(b.gep(starts, [number(i)]))]) for i in range(ROWS)]
            ends = [b.gep(tail, [b.mul(step, number(i))]) for i in range(ROWS)]

            def block(j: Any) -> Fetch:
                at = b.sdiv(j, number(8))
                whole = b.icmp_signed("<=", b.add(at, number(COLUMNS // 8)), b.mul(words, number(8)))
                found = [b.select(whole, b.gep(begin[i], [at]), ends[i]) for i in range(ROWS)]
                for here in found:
                    prefetch(b, b.gep(here, [number(AHEAD)]))
                return lambda i, offset: of.signs(b.gep(found[i], [number(offset // 8)]))

            return block

        arrays = tuple(zip(sig.args[6:], rest, strict=True))
        emit_dots(context, b, instructions, tokens, arrays, rows)
        return context.get_dummy_value()

    return signature, codegen


_round: Any = _plain_round if JIT_OFF else intrinsic(_typed_round)
_dot_signs: Any = plain if JIT_OFF else intrinsic(_typed_dot_signs)


@njit(nogil=True)
def fold_row(
    x: F32,
    stored: NDArray[np.uint16],
    form: int,
    row: F32,
    t: int,
    q: NDArray[np.int8],
    scales: F32,
    corrections: NDArray[np.int32],
) -> None:
    """Row t of what `fold_inputs` documents, from `x [n]`, in one form; `row [padded(n)]` is scratch, zero past n."""
    n = x.shape[0]
    if form >= 0:
        for j in range(n):
            row[j] = x[j] * half_to_float(stored[form + j])
    else:
        for j in range(n):
            row[j] = x[j]
    for at in range(0, q.shape[1], COLUMNS):
        _round(row, at, q, t, scales, corrections)


@njit("void(f4[:,::1],u2[::1],i8[::1],i1[:,::1],f4[:,::1],i4[:,::1])", nogil=True, cache=True)
def fold_inputs(
    x: F32,
    stored: NDArray[np.uint16],
    forms: I64,
    q: NDArray[np.int8],
    scales: F32,
    corrections: NDArray[np.int32],
) -> None:
    """`x [T, n]` in bytes, in each of `forms` (not ROTATED): `q [forms * T, planes.padded(n)]`, form by form.

    `scale * q` is the value, of columns in their order. `scales` and `corrections` `[forms * T, padded(n) / 32]` are as
    in `quantize.quantize_inputs`, but of the 32 columns `512 b + 64 v + 4 s + (0 to 3)`, v from 0 to 7, of each sum s.
    """
    row = np.zeros(q.shape[1], np.float32)
    for f in range(forms.shape[0]):
        for t in range(x.shape[0]):
            fold_row(x[t], stored, forms[f], row, f * x.shape[0] + t, q, scales, corrections)


@njit(nogil=True)
def _find_signs(stored: U8, start: int, words: int, rows: int, places: I64, w: U8) -> None:
    """Places of ROWS rows of signs, the missing ones like the last, and the tails of all of them into `w`."""
    left = words % VECTORS * 8
    for i in range(ROWS):
        places[i] = start + 8 * words * min(i, rows - 1)
        if left:
            tail = places[i] + 8 * words - left
            for byte in range(WORD):
                w[i, byte] = stored[tail + byte] if byte < left else 0


@njit(nogil=True)
def _portable_signs(stored: U8, places: I64, words: int, w: U8) -> None:
    """The bytes of ROWS rows of signs, as `planes.portable_dot` wants them."""
    for i in range(ROWS):
        w[i] = 0
        for byte in range(8 * words):
            for bit in range(8):
                w[i, 8 * byte + bit] = 1 if stored[places[i] + byte] >> bit & 1 else 255


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
    stored: U8,
    blocks: I64,
    m: int,
    n: int,
    first: int,
    rows: int,
    flip: np.uint8,
    factors: F32,
    singles: F32,
    w: U8,
    scales: F32,
) -> None:
    """Rows of any blocks that add up -> bytes, and a scale for each row."""
    if blocks.shape[0] == 1 and blocks[0, 0] == I8:
        at = blocks[0, 1]
        numbers = stored[at : at + 4 * m].view(np.float32)
        for i in range(rows):
            scales[i] = numbers[first + i]
            start = at + 4 * m + (first + i) * n
            for j in range(n):
                w[i, j] = stored[start + j] ^ flip
        return
    decode_rows(stored.view(np.uint16), blocks, m, n, first, rows, factors, singles)
    _round_rows(singles, n, rows, flip, w, scales)


@njit(nogil=True)
def multiply_sum_rows(
    instructions: int,
    stored: U8,
    blocks: I64,
    m: int,
    n: int,
    first: int,
    stop: int,
    tokens: int,
    x: NDArray[np.int8],
    scales: F32,
    corrections: NDArray[np.int32],
    w: U8,
    singles: F32,
    factors: F32,
    floats: F32,
    integers: I64,
    bias: F32,
    y: F32,
    at: int,
    add: bool,
) -> None:
    """Rows `[first, stop)` of what `multiply_sum` documents, W `[m, n]`, into `y [T, at + row]`, or added to it.

    `bias` is `[m]` or empty. Scratch is as in `planes.multiply_rows`, and `singles [ROWS, >= n]`, `factors [ROWS, >=
    rank]`. Nothing is allocated.
    """
    words, tile, fold, flip = -(-n // WORD), TILES[instructions], folded(blocks), _FLIPS[instructions]
    halves = stored.view(np.uint16)
    size = MOST_TOKENS * ROWS
    out, totals, partials = floats[:size], floats[size : 2 * size], floats[2 * size :]
    places, sums = integers[:ROWS], integers[16:].view(np.int32)
    for begin in range(first, stop, ROWS):
        rows = min(ROWS, stop - begin)
        if not fold:
            _decode_bytes(stored, blocks, m, n, begin, rows, flip, factors, singles, w, partials)
            for i in range(rows):
                totals[i] = partials[i]  # `partials` is used again
        t = 0
        while t < tokens:
            count = tile if t + tile <= tokens else 1
            if fold:
                totals[: count * ROWS] = 0
                part = t
                for level in range(blocks.shape[0]):
                    start, k = blocks[level, 1], blocks[level, 2]
                    factor = start // 2 + m * words * (WORD // 16) + begin * k
                    _find_signs(stored, start + 8 * words * begin, words, rows, places, w)
                    if instructions == PORTABLE:
                        _portable_signs(stored, places, words, w)
                    for r in range(k):
                        if instructions == PORTABLE:
                            portable_dot(w, x, part, scales, sums, partials, out)
                        else:
                            _dot_signs(
                                instructions, count, stored, places, words, w, x, part, scales, corrections, out
                            )
                        for i in range(rows):
                            u = half_to_float(halves[factor + i * k + r])
                            for s in range(count):
                                totals[s * ROWS + i] += out[s * ROWS + i] * u
                        part += tokens
            elif instructions == PORTABLE:
                portable_dot(w, x, t, scales, sums, partials, out)
            else:
                dot(instructions, count, w, x, t, scales, corrections, out)
            for i in range(rows):
                for s in range(count):
                    value = totals[s * ROWS + i] if fold else out[s * ROWS + i] * totals[i]
                    if bias.shape[0]:
                        value += bias[begin + i]
                    y[t + s, at + begin + i] = y[t + s, at + begin + i] + value if add else value
            t += count


@njit(
    "void(i8,u1[::1],i8[:,::1],i8,i1[:,::1],f4[:,::1],i4[:,::1],u1[:,:,::1],f4[:,:,::1],f4[:,::1])",
    nogil=True,
    parallel=True,
    cache=True,
)
def multiply_sum(
    instructions: int,
    stored: U8,
    blocks: I64,
    n: int,
    x: NDArray[np.int8],
    scales: F32,
    corrections: NDArray[np.int32],
    scratch: U8,
    singles: F32,
    y: F32,
) -> None:
    """`y [T, m] = x @ W^T`, W `[m, n]` being the sum of `blocks [levels, 3]`, which are as in `rows.decode_rows`.

    `instructions` is the code of a set that `instructions.compiled` names. `x`, `scales` and `corrections` are what
    `fold_inputs` writes for the forms that `input_forms` names. `scratch [chunks, ROWS, level_stride(n)]` and `singles
    [chunks, ROWS, >= n]` are overwritten; rows are shared out over their chunks.
    """
    m, chunks = y.shape[1], scratch.shape[0]
    share = -(-m // (chunks * ROWS)) * ROWS
    none = np.empty(0, np.float32)
    rank = max(1, blocks[:, 2].max()) if blocks.shape[0] else 1
    factors = np.empty((chunks, ROWS, rank), np.float32)
    floats, integers = np.empty((chunks, FLOATS), np.float32), np.empty((chunks, INTEGERS), np.int64)
    for chunk in prange(chunks):
        multiply_sum_rows(
            instructions,
            stored,
            blocks,
            m,
            n,
            chunk * share,
            min(m, (chunk + 1) * share),
            y.shape[0],
            x,
            scales,
            corrections,
            scratch[chunk],
            singles[chunk],
            factors[chunk],
            floats[chunk],
            integers[chunk],
            none,
            y,
            0,
            False,
        )
