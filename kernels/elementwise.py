"""What happens between the matrix products: norm, rotary embedding, gate, sum. One row or token never sees another.

Norm and gate are vector code, 16 columns at a time; a group that is cut short gives the same bits.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.cgutils import alloca_once
from numba.extending import intrinsic
from numpy.typing import NDArray

from .exponential import exponential, plain_exponential
from .rows import JIT_OFF
from .vectors import call, constant, f32, i32, i64, loop, shuffle, splat, vector

F32 = NDArray[np.float32]

LANES: Final = 16
_floats, _doubles = vector(f32, LANES), vector(ir.DoubleType(), LANES)


def _some(context: Any, builder: Any, kind: Any, array: Any, at: Any, left: Any) -> tuple[Any, Any]:
    """Pointer to LANES floats of an array from `at`, and which of them are among the first `left`."""
    start = builder.gep(context.make_array(kind)(context, builder, array).data, [at])
    wanted = builder.icmp_signed("<", constant(i64, range(LANES)), splat(builder, left, LANES))
    return builder.bitcast(start, _floats.as_pointer()), wanted


def _load_some(context: Any, builder: Any, kind: Any, array: Any, at: Any, left: Any) -> Any:
    """LANES floats, 0 where there are none."""
    pointer, wanted = _some(context, builder, kind, array, at, left)
    arguments = [pointer, ir.Constant(i32, 4), wanted, constant(f32, [0.0] * LANES)]
    return call(builder, f"llvm.masked.load.v{LANES}f32.p0", _floats, arguments)


def _store_some(context: Any, builder: Any, kind: Any, array: Any, at: Any, left: Any, values: Any) -> None:
    """The first `left` of LANES floats."""
    pointer, wanted = _some(context, builder, kind, array, at, left)
    arguments = [values, pointer, ir.Constant(i32, 4), wanted]
    call(builder, f"llvm.masked.store.v{LANES}f32.p0", ir.VoidType(), arguments)


def _typed_sum_squares(typing: Any, x: Any) -> Any:
    """Of one row of at least one float: in float64, in LANES partials, added up in a fixed tree."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        (x,) = args
        n = builder.extract_value(context.make_array(sig.args[0])(context, builder, x).shape, 0)
        total = alloca_once(builder, _doubles)
        builder.store(ir.Constant(_doubles, [0.0] * LANES), total)
        at, following, end = loop(builder, n, LANES)
        wide = builder.fpext(_load_some(context, builder, sig.args[0], x, at, builder.sub(n, at)), _doubles)
        builder.store(builder.fadd(builder.load(total), builder.fmul(wide, wide)), total)
        following()
        end()
        summed = builder.load(total)
        for half in (8, 4, 2, 1):
            summed = builder.fadd(summed, shuffle(builder, summed, summed, [lane ^ half for lane in range(LANES)]))
        return builder.extract_element(summed, ir.Constant(i32, 0))

    return types.float64(x), codegen


def _typed_scale(typing: Any, x: Any, scale: Any, weight: Any, at: Any, left: Any, y: Any) -> Any:
    """`y = x * scale * weight`, at most `left` floats from `at`."""
    signature = types.void(x, types.float32, weight, types.int64, types.int64, y)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x, scale, weight, at, left, y = args
        a, b = (_load_some(context, builder, sig.args[k], array, at, left) for k, array in ((0, x), (2, weight)))
        scaled = builder.fmul(builder.fmul(a, splat(builder, scale, LANES)), b)
        _store_some(context, builder, sig.args[5], y, at, left, scaled)
        return context.get_dummy_value()

    return signature, codegen


def _typed_gate(typing: Any, gate: Any, up: Any, at: Any, left: Any, y: Any) -> Any:
    """`y = silu(gate) * up`, at most `left` floats from `at`; the exponential is that of -|gate|, never large."""
    signature = types.void(gate, up, types.int64, types.int64, y)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        gate, up, at, left, y = args
        a, b = (_load_some(context, builder, sig.args[k], array, at, left) for k, array in ((0, gate), (1, up)))
        zero, one = (constant(f32, [value] * LANES) for value in (0.0, 1.0))
        shut = builder.fcmp_ordered("<", a, zero)
        power = exponential(builder, builder.select(shut, a, builder.fsub(zero, a)))
        part = builder.fdiv(builder.select(shut, builder.fmul(a, power), a), builder.fadd(one, power))
        _store_some(context, builder, sig.args[4], y, at, left, builder.fmul(part, b))
        return context.get_dummy_value()

    return signature, codegen


def _plain_sum_squares(x: F32) -> float:
    partials = np.zeros(LANES)
    for at in range(0, len(x), LANES):
        some = x[at : at + LANES].astype(np.float64)
        partials[: len(some)] += some * some
    for half in (8, 4, 2, 1):
        partials[:half] += partials[half : 2 * half]
    return float(partials[0])


def _plain_scale(x: F32, scale: float, weight: F32, at: int, left: int, y: F32) -> None:
    some = slice(at, at + min(left, LANES))
    y[some] = x[some] * np.float32(scale) * weight[some]


def _plain_gate(gate: F32, up: F32, at: int, left: int, y: F32) -> None:
    some = slice(at, at + min(left, LANES))
    a = gate[some]
    power = plain_exponential(-np.abs(a))
    y[some] = np.where(a < 0, a * power, a) / (1 + power) * up[some]


_sum_squares: Any = _plain_sum_squares if JIT_OFF else intrinsic(_typed_sum_squares)
_scale: Any = _plain_scale if JIT_OFF else intrinsic(_typed_scale)
_gate: Any = _plain_gate if JIT_OFF else intrinsic(_typed_gate)


@njit(nogil=True)
def norm_row(x: F32, weight: F32, eps: float, y: F32) -> None:
    """`rms_norm` of one row."""
    n = x.shape[0]
    whole = n - n % LANES
    scale = np.float32(1.0 / math.sqrt(_sum_squares(x) / n + eps))
    for j in range(0, whole, LANES):
        _scale(x, scale, weight, j, LANES, y)
    _scale(x, scale, weight, whole, n - whole, y)


@njit("void(f4[:,::1],f4[::1],f8,f4[:,::1])", nogil=True, cache=True)
def rms_norm(x: F32, weight: F32, eps: float, y: F32) -> None:
    """`y = x / sqrt(mean(x^2) + eps) * weight` for every row of `x [rows, n]`.

    The sum is float64, in 16 partials in column order, added up in a fixed tree.
    """
    for i in range(x.shape[0]):
        norm_row(x[i], weight, eps, y[i])


def reference_rms_norm(x: F32, weight: F32, eps: float, y: F32) -> None:
    """The formula."""
    y[:] = x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + eps) * weight


@njit(nogil=True)
def gate_row(gate: F32, up: F32, y: F32, start: int, stop: int) -> None:
    """`gated` for the columns `[start, stop)` of one row."""
    whole = stop - (stop - start) % LANES
    for j in range(start, whole, LANES):
        _gate(gate, up, j, LANES, y)
    if whole < stop:
        _gate(gate, up, whole, stop - whole, y)


@njit("void(f4[:,::1],f4[:,::1],f4[:,::1])", nogil=True, cache=True)
def gated(gate: F32, up: F32, y: F32) -> None:
    """`y = silu(gate) * up`, all `[T, f]`; a finite gate below -88 is shut (0), NaN stays NaN."""
    for i in range(gate.shape[0]):
        gate_row(gate[i], up[i], y[i], 0, gate.shape[1])


def reference_gated(gate: F32, up: F32, y: F32) -> None:
    """The formula."""
    with np.errstate(over="ignore"):
        y[:] = gate / (1 + np.exp(-gate.astype(np.float64))) * up


@njit(nogil=True)
def turn_head(x: F32, cosine: F32, sine: F32, y: F32) -> None:
    """Rotary embedding of one head `x [e]`, by `cosine`, `sine [e / 2]`; `y` may be `x`."""
    half = x.shape[0] // 2
    for j in range(half):
        a, b = x[j], x[j + half]
        y[j] = a * cosine[j] - b * sine[j]
        y[j + half] = b * cosine[j] + a * sine[j]


@njit("void(f4[:,:,::1],i8[::1],f4[:,::1],f4[:,::1],f4[:,:,::1])", nogil=True, cache=True)
def rotate(x: F32, positions: NDArray[np.int64], cosine: F32, sine: F32, y: F32) -> None:
    """Rotary embedding: `x, y [T, heads, e]`; row `positions[t]` of `cosine`, `sine [rows, e / 2]` turns token t.

    Pairs are (j, j + e / 2).
    """
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            turn_head(x[t, h], cosine[positions[t]], sine[positions[t]], y[t, h])


def reference_rotate(x: F32, positions: NDArray[np.int64], cosine: F32, sine: F32, y: F32) -> None:
    """The same as a complex product."""
    half = x.shape[2] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * (cosine + 1j * sine)[positions][:, None]
    y[..., :half], y[..., half:] = turned.real, turned.imag


@njit("void(f4[:,::1],f4[:,::1],f4[:,::1])", nogil=True, cache=True)
def add(x: F32, y: F32, z: F32) -> None:
    """`z = x + y`; all `[T, n]`, or `y [1, n]` added to every row (a bias)."""
    for i in range(x.shape[0]):
        row = i if y.shape[0] > 1 else 0
        for j in range(x.shape[1]):
            z[i, j] = x[i, j] + y[row, j]


def reference_add(x: F32, y: F32, z: F32) -> None:
    """The formula."""
    z[:] = x + y
