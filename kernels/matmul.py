"""`y[T, m] = x[T, n] @ W(resident blocks)^T` straight from the stored bytes, and rows of W for the embedding.

Determinism: every output is one dot product with 16 float partials over the columns in order, added up in a fixed tree,
whatever the number of tokens, rows, chunks or threads; no fast-math, and multiply-add is fused only where it is written
so (`fma`). Tested bitwise.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from .floats import LANES
from .instructions import choose
from .later import loaded_later
from .rows import JIT_OFF, ROWS, WORD, decode_rows, fused, largest_rank
from .tiers import decode_tiers, sparse, values_floats

TOKENS: Final = 4  # tokens multiplied together with ROWS rows: 16 accumulators stay in registers
_CODE: Final = choose()
_i64, _f32 = ir.IntType(64), ir.FloatType()
_vf32 = ir.VectorType(_f32, LANES)


def row_stride(p: int) -> int:
    """Floats from one row of scratch to the next, at least `p`.

    Rows a multiple of 4096 bytes apart make the store to one row and the load from the next look alike to the
    processor; keeping them about 1 KiB apart within the page made decoding 13 % faster (AMD EPYC, 2048 columns).
    """
    return p + (272 - p) % 1024


def _dot_codegen(tokens: int) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        w, x, first, out = args
        rows, inputs, results = (
            context.make_array(kind)(context, builder, value)
            for kind, value in ((sig.args[0], w), (sig.args[1], x), (sig.args[3], out))
        )
        width, stride = (builder.extract_value(array.shape, 1) for array in (inputs, rows))
        zero = ir.Constant(_i64, 0)
        entry, loop, end = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("end")
        builder.branch(loop)
        builder.position_at_end(loop)
        j = builder.phi(_i64)
        j.add_incoming(zero, entry)
        sums = [builder.phi(_vf32) for _ in range(ROWS * tokens)]

        def vector(data: Any, row: Any, step: Any) -> Any:
            place = builder.gep(data, [builder.add(builder.mul(row, step), j)])
            return builder.load(builder.bitcast(place, _vf32.as_pointer()), align=4)

        xs = [vector(inputs.data, builder.add(first, ir.Constant(_i64, t)), width) for t in range(tokens)]
        ws = [vector(rows.data, ir.Constant(_i64, i), stride) for i in range(ROWS)]
        totals = [fused(builder, ws[i], xs[t], sums[t * ROWS + i]) for t in range(tokens) for i in range(ROWS)]
        following = builder.add(j, ir.Constant(_i64, LANES))
        j.add_incoming(following, loop)
        for phi, total in zip(sums, totals, strict=True):
            phi.add_incoming(ir.Constant(_vf32, [0.0] * LANES), entry)
            phi.add_incoming(total, loop)
        builder.cbranch(builder.icmp_signed("<", following, width), loop, end)
        builder.position_at_end(end)
        for place, total in enumerate(totals):
            target = builder.gep(results.data, [ir.Constant(_i64, place * LANES)])
            builder.store(total, builder.bitcast(target, _vf32.as_pointer()), align=4)
        return context.get_dummy_value()

    return codegen


def _typed_dot_one(typing: Any, w: Any, x: Any, first: Any, out: Any) -> Any:
    """Partials of ROWS rows of `w` with token `first` of `x`, into `out [ROWS, LANES]`. Equal widths."""
    return types.void(w, x, types.int64, out), _dot_codegen(1)


def _typed_dot_four(typing: Any, w: Any, x: Any, first: Any, out: Any) -> Any:
    """The same for TOKENS tokens from `first`, into `out [TOKENS * ROWS, LANES]`."""
    return types.void(w, x, types.int64, out), _dot_codegen(TOKENS)


def _plain_dot(w: Any, x: Any, first: int, out: Any, tokens: int) -> None:
    out[: tokens * ROWS] = 0
    for j in range(0, x.shape[1], LANES):
        for t in range(tokens):
            out[t * ROWS : (t + 1) * ROWS] += w[:, j : j + LANES] * x[first + t, j : j + LANES]


def _plain_dot_one(w: Any, x: Any, first: int, out: Any) -> None:
    _plain_dot(w, x, first, out, 1)


def _plain_dot_four(w: Any, x: Any, first: int, out: Any) -> None:
    _plain_dot(w, x, first, out, TOKENS)


_dot_one: Any = _plain_dot_one if JIT_OFF else intrinsic(_typed_dot_one)
_dot_four: Any = _plain_dot_four if JIT_OFF else intrinsic(_typed_dot_four)


@njit(nogil=True)
def _fold(partials: NDArray[np.float32]) -> np.float32:
    """The sum of LANES partials in a fixed tree; uses them up."""
    for step in (8, 4, 2, 1):
        for lane in range(step):
            partials[lane] += partials[lane + step]
    return np.float32(partials[0])


@njit(nogil=True)
def _rows_times_tokens(
    w: NDArray[np.float32],
    x: NDArray[np.float32],
    partials: NDArray[np.float32],
    y: NDArray[np.float32],
    first: int,
    rows: int,
) -> None:
    t = 0
    while t + TOKENS <= x.shape[0]:
        _dot_four(w, x, t, partials)
        for s in range(TOKENS):
            for i in range(rows):
                y[t + s, first + i] = _fold(partials[s * ROWS + i])
        t += TOKENS
    while t < x.shape[0]:
        _dot_one(w, x, t, partials)
        for i in range(rows):
            y[t, first + i] = _fold(partials[i])
        t += 1


@njit(nogil=True)
def _decode(
    stored: NDArray[np.uint16],
    blocks: NDArray[np.int64],
    m: int,
    n: int,
    first: int,
    rows: int,
    factors: NDArray[np.float32],
    filled: NDArray[np.uint64],
    values: NDArray[np.float32],
    w: NDArray[np.float32],
) -> None:
    """Rows of any blocks; scratch as `_scratch` makes it."""
    if sparse(blocks):
        decode_tiers(_CODE, stored, blocks, m, n, first, rows, filled, values, w)
    else:
        decode_rows(stored, blocks, m, n, first, rows, factors, w)


@njit(nogil=True)
def _scratch(blocks: NDArray[np.int64], n: int) -> tuple[NDArray[np.float32], NDArray[np.uint64], NDArray[np.float32]]:
    """For factors of signs, or for tiers: filled columns and values."""
    if sparse(blocks):
        return (
            np.empty((0, 0), np.float32),
            np.empty(-(-n // WORD), np.uint64),
            np.empty((1, values_floats(n)), np.float32),
        )
    return np.empty((ROWS, largest_rank(blocks)), np.float32), np.empty(0, np.uint64), np.empty((0, 0), np.float32)


@loaded_later("void(u2[::1],i8[:,::1],i8,f4[:,::1],f4[:,:,::1],f4[:,::1])")
def matmul(
    stored: NDArray[np.uint16],
    blocks: NDArray[np.int64],
    n: int,
    x: NDArray[np.float32],
    scratch: NDArray[np.float32],
    y: NDArray[np.float32],
) -> None:
    """`y [T, m] = x @ W^T`, W `[m, n]` being the sum of `blocks [levels, 3]` (see `rows.decode_rows`).

    `x [T, p]` is contiguous, p a multiple of 64 and at least n, zero past n. `scratch [chunks, ROWS, row_stride(p)]` is
    zero past column n and stays so; rows are shared out over its chunks.
    """
    m, chunks = y.shape[1], scratch.shape[0]
    share = -(-m // (chunks * ROWS)) * ROWS
    for chunk in prange(chunks):
        w = scratch[chunk]
        partials = np.empty((TOKENS * ROWS, LANES), np.float32)
        factors, filled, values = _scratch(blocks, n)
        for first in range(chunk * share, min(m, (chunk + 1) * share), ROWS):
            rows = min(ROWS, m - first)
            _decode(stored, blocks, m, n, first, rows, factors, filled, values, w)
            _rows_times_tokens(w, x, partials, y, first, rows)


@njit("void(u2[::1],i8[:,::1],i8,i8[::1],f4[:,::1])", nogil=True, cache=True)
def take_rows(
    stored: NDArray[np.uint16], blocks: NDArray[np.int64], m: int, tokens: NDArray[np.int64], y: NDArray[np.float32]
) -> None:
    """`y[t] = W[tokens[t]]`, decoding only those rows; `y [T, n]`, tokens in `[0, m)`."""
    factors, filled, values = _scratch(blocks, y.shape[1])
    for t in range(tokens.shape[0]):
        _decode(stored, blocks, m, y.shape[1], tokens[t], 1, factors, filled, values, y[t : t + 1])
