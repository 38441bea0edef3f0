"""The online rotation of a linear's input, and its inverse for a row that is looked up: fast Walsh-Hadamard transforms.

The definition is in `formats/kinds`; signs and sizes of the blocks are given. One row never sees another, and its
additions come in a fixed order.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from .rows import JIT_OFF
from .vectors import constant, f32, load, number, shuffle, store, vector

WHOLE: Final = 256  # the largest block, whose transform fits sixteen vector registers
LANES: Final = 16
_VECTORS: Final = WHOLE // LANES
_floats = vector(f32, LANES)

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


def _typed_butterflies(typing: Any, row: Any) -> Any:
    """The unscaled transform of WHOLE floats, in place, in the order of steps of `_transform`."""
    signature = types.void(row)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        start = context.make_array(sig.args[0])(context, builder, args[0]).data
        places = [builder.gep(start, [number(LANES * k)]) for k in range(_VECTORS)]
        values = [load(builder, _floats, place, 4) for place in places]
        step = 1
        while step < LANES:
            signs = constant(f32, [-1.0 if lane & step else 1.0 for lane in range(LANES)])
            turned = [lane ^ step for lane in range(LANES)]
            values = [
                builder.fadd(shuffle(builder, value, value, turned), builder.fmul(value, signs)) for value in values
            ]
            step *= 2
        step = 1
        while step < _VECTORS:
            for k in range(_VECTORS):
                if not k & step:
                    a, b = values[k], values[k + step]
                    values[k], values[k + step] = builder.fadd(a, b), builder.fsub(a, b)
            step *= 2
        for place, value in zip(places, values, strict=True):
            store(builder, value, place, 4)
        return context.get_dummy_value()

    return signature, codegen


_butterflies: Any = None if JIT_OFF else intrinsic(_typed_butterflies)


@njit(nogil=True)
def _transform(row: F32) -> None:
    """One block, in place, and scaled to keep its length; `row` has a power of two of numbers."""
    if not JIT_OFF and row.shape[0] == WHOLE:
        _butterflies(row)
    else:
        step = 1
        while step < row.shape[0]:
            for start in range(0, row.shape[0], 2 * step):
                for j in range(start, start + step):
                    a, b = row[j], row[j + step]
                    row[j], row[j + step] = a + b, a - b
            step *= 2
    scale = np.float32(1.0 / math.sqrt(row.shape[0]))
    for j in range(row.shape[0]):
        row[j] *= scale


@njit(nogil=True)
def rotate_row(x: F32, signs: F32, sizes: I64, y: F32) -> None:
    """`y[:n] = Q x[:n]`, n being the sum of `sizes`."""
    for j in range(signs.shape[0]):
        y[j] = x[j] * signs[j]
    start = 0
    for size in sizes:
        _transform(y[start : start + size])
        start += size


@njit("void(f4[:,::1],f4[::1],i8[::1],f4[:,::1])", nogil=True, cache=True)
def rotate_inputs(x: F32, signs: F32, sizes: I64, y: F32) -> None:
    """`y[:, :n] = Q x[:, :n]` for every row; `signs [n]`, `sizes` of the blocks add up to n. `y`'s other columns stay.

    `x` and `y` have at least n columns each, perhaps not equally many.
    """
    for t in range(x.shape[0]):
        rotate_row(x[t], signs, sizes, y[t])


@njit("void(f4[:,::1],f4[::1],i8[::1],f4[:,::1])", nogil=True, cache=True)
def unrotate_rows(x: F32, signs: F32, sizes: I64, y: F32) -> None:
    """`y[:, :n] = Q^T x[:, :n]`, the inverse of `rotate_inputs`."""
    for t in range(x.shape[0]):
        for j in range(signs.shape[0]):
            y[t, j] = x[t, j]
        start = 0
        for size in sizes:
            _transform(y[t, start : start + size])
            start += size
        for j in range(signs.shape[0]):
            y[t, j] *= signs[j]


def reference_rotate_inputs(x: F32, signs: F32, sizes: I64, y: F32) -> None:
    """By the whole matrix."""
    y[:, : len(signs)] = (x[:, : len(signs)] * signs).astype(np.float64) @ _matrix(sizes)


def reference_unrotate_rows(x: F32, signs: F32, sizes: I64, y: F32) -> None:
    """By the whole matrix."""
    y[:, : len(signs)] = x[:, : len(signs)].astype(np.float64) @ _matrix(sizes) * signs


def _matrix(sizes: I64) -> NDArray[np.float64]:
    """The blocks of a rotation on the diagonal; symmetric."""
    matrix = np.zeros((sum(sizes), sum(sizes)))
    start = 0
    for size in sizes:
        i = np.arange(size)
        parity = np.array([value.bit_count() & 1 for value in (i[:, None] & i).flatten().tolist()]).reshape(size, size)
        matrix[start : start + size, start : start + size] = (1 - 2 * parity) / math.sqrt(size)
        start += size
    return matrix
