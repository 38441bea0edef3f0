"""What happens between the matrix products: norm, rotary embedding, gate, sum. One row or token never sees another."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

F32 = NDArray[np.float32]


@njit(nogil=True)
def norm_row(x: F32, weight: F32, eps: float, y: F32) -> None:
    """One row of what `rms_norm` documents."""
    total = 0.0
    for j in range(x.shape[0]):
        total += np.float64(x[j]) * np.float64(x[j])
    scale = np.float32(1.0 / math.sqrt(total / x.shape[0] + eps))
    for j in range(x.shape[0]):
        y[j] = x[j] * scale * weight[j]


@njit(nogil=True)
def gate_row(gate: F32, up: F32, y: F32) -> None:
    """One row of what `gated` documents."""
    for j in range(gate.shape[0]):
        value = gate[j]
        y[j] = value / (np.float32(1) + math.exp(-value)) * up[j]


@njit(nogil=True)
def turn_head(x: F32, cosine: F32, sine: F32, y: F32) -> None:
    """Rotary embedding of one head `x [e]`, by `cosine`, `sine [e / 2]`; `y` may be `x`."""
    half = x.shape[0] // 2
    for j in range(half):
        a, b = x[j], x[j + half]
        y[j] = a * cosine[j] - b * sine[j]
        y[j + half] = b * cosine[j] + a * sine[j]


@njit("void(f4[:,::1],f4[::1],f8,f4[:,::1])", nogil=True, cache=True)
def rms_norm(x: F32, weight: F32, eps: float, y: F32) -> None:
    """`y = x / sqrt(mean(x^2) + eps) * weight` for every row of `x [rows, n]`; sums are float64, in column order."""
    for i in range(x.shape[0]):
        norm_row(x[i], weight, eps, y[i])


def reference_rms_norm(x: F32, weight: F32, eps: float, y: F32) -> None:
    """The formula."""
    y[:] = x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + eps) * weight


@njit("void(f4[:,::1],f4[:,::1],f4[:,::1])", nogil=True, cache=True)
def gated(gate: F32, up: F32, y: F32) -> None:
    """`y = silu(gate) * up`, all `[T, f]`."""
    for i in range(gate.shape[0]):
        gate_row(gate[i], up[i], y[i])


def reference_gated(gate: F32, up: F32, y: F32) -> None:
    """The formula."""
    with np.errstate(over="ignore"):
        y[:] = gate / (1 + np.exp(-gate.astype(np.float64))) * up


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
