"""The online rotation of a linear's input, and its inverse for a row that is looked up: fast Walsh-Hadamard transforms.

The definition is in `formats/kinds`; signs and sizes of the blocks are given. One row never sees another, and its
additions come in a fixed order.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


@njit(nogil=True)
def _transform(row: F32) -> None:
    """One block, in place, and scaled to keep its length; `row` has a power of two of numbers."""
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


@njit("void(f4[:,::1],f4[::1],i8[::1],f4[:,::1])", nogil=True, cache=True)
def rotate_inputs(x: F32, signs: F32, sizes: I64, y: F32) -> None:
    """`y[:, :n] = Q x[:, :n]` for every row; `signs [n]`, `sizes` of the blocks add up to n. `y`'s other columns stay.

    `x` and `y` have at least n columns each, perhaps not equally many.
    """
    for t in range(x.shape[0]):
        for j in range(signs.shape[0]):
            y[t, j] = x[t, j] * signs[j]
        start = 0
        for size in sizes:
            _transform(y[t, start : start + size])
            start += size


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
