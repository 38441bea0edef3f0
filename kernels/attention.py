"""Causal attention over keys and values that live in fixed blocks, with grouped queries and an optional window.

Each (token, head) is computed alone, over its sequence's blocks in order: scores, their maximum, exponentials and the
weighted sum, all in position order with fixed partials. So a token's result does not depend on what else is in the
step, how a prompt was cut into chunks, or how many threads there are.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

BLOCK_TOKENS: Final = 32


KV_TYPE: Final = "f4[:,:,:,:,:,::1]"


@njit(nogil=True)
def store_token(kv: F32, layer: int, table: I64, position: int, k: F32, v: F32) -> None:
    """One token of what `store_kv` documents; `k`, `v [g * e]`."""
    e = kv.shape[5]
    block, slot = table[position // BLOCK_TOKENS], position % BLOCK_TOKENS
    for g in range(kv.shape[3]):
        for j in range(e):
            kv[block, layer, 0, g, slot, j] = k[g * e + j]
            kv[block, layer, 1, g, slot, j] = v[g * e + j]


@njit(nogil=True)
def attend_unit(
    kv: F32, layer: int, table: I64, position: int, q: F32, g: int, per_group: int, window: int, y: F32
) -> None:
    """One token and group of what `attend` documents; `q`, `y [per_group * e]`."""
    width = kv.shape[5]
    scale = np.float32(1.0 / math.sqrt(width))
    stop = position + 1
    start = max(0, stop - window) if window > 0 else 0
    scores = np.empty(stop, np.float32)
    partial = np.empty(16, np.float32)
    for h in range(per_group):
        largest = np.float32(-np.inf)
        for p in range(start, stop):
            keys = kv[table[p // BLOCK_TOKENS], layer, 0, g, p % BLOCK_TOKENS]
            partial[:] = 0
            whole = width - width % 16
            for j in range(0, whole, 16):
                for lane in range(16):
                    partial[lane] += q[h * width + j + lane] * keys[j + lane]
            score = np.float32(0)
            for lane in range(16):
                score += partial[lane]
            for j in range(whole, width):
                score += q[h * width + j] * keys[j]
            scores[p] = score * scale
            largest = max(largest, scores[p])
        total = np.float32(0)
        for p in range(start, stop):
            scores[p] = np.float32(math.exp(scores[p] - largest))
            total += scores[p]
        out = y[h * width : (h + 1) * width]
        out[:] = 0
        for p in range(start, stop):
            values = kv[table[p // BLOCK_TOKENS], layer, 1, g, p % BLOCK_TOKENS]
            weight = scores[p] / total
            for j in range(width):
                out[j] += weight * values[j]


@njit("void(f4[:,:,:,:,:,::1],i8,i8[:,::1],i8[::1],i8[::1],f4[:,:,::1],f4[:,:,::1])", nogil=True, cache=True)
def store_kv(kv: F32, layer: int, tables: I64, sequence: I64, positions: I64, k: F32, v: F32) -> None:
    """Write this step's `k`, `v [T, g, e]` into `kv [blocks, layers, 2, g, BLOCK_TOKENS, e]`.

    Token t belongs to sequence `sequence[t]` at `positions[t]`; that sequence's blocks are `tables[sequence[t]]`.
    """
    for t in range(k.shape[0]):
        block = tables[sequence[t], positions[t] // BLOCK_TOKENS]
        slot = positions[t] % BLOCK_TOKENS
        for g in range(k.shape[1]):
            for j in range(k.shape[2]):
                kv[block, layer, 0, g, slot, j] = k[t, g, j]
                kv[block, layer, 1, g, slot, j] = v[t, g, j]


def reference_store_kv(kv: F32, layer: int, tables: I64, sequence: I64, positions: I64, k: F32, v: F32) -> None:
    """The same by numpy's indexing."""
    blocks, slots = tables[sequence, positions // BLOCK_TOKENS], positions % BLOCK_TOKENS
    kv[blocks, layer, 0, :, slots] = k
    kv[blocks, layer, 1, :, slots] = v


@njit(
    "void(f4[:,:,:,:,:,::1],i8,i8[:,::1],i8[::1],i8[::1],f4[:,:,::1],i8,f4[:,::1],f4[:,::1])",
    nogil=True,
    parallel=True,
    cache=True,
)
def attend(
    kv: F32, layer: int, tables: I64, sequence: I64, positions: I64, q: F32, window: int, scratch: F32, y: F32
) -> None:
    """`y [T, h * e]`: softmax(q k / sqrt(e)) v over positions `(p - window, p]` of the token's sequence.

    `q [T, h, e]`; `window` 0 means all; `scratch [chunks, >= longest context]`: the work is shared out over its rows.
    """
    heads, width = q.shape[1], q.shape[2]
    groups = kv.shape[3]
    per_group = heads // groups
    chunks = scratch.shape[0]
    for chunk in prange(chunks):
        for unit in range(chunk, q.shape[0] * groups, chunks):
            t, g = unit // groups, unit % groups
            begin, end = g * per_group * width, (g + 1) * per_group * width
            mine = q[t].reshape(heads * width)[begin:end]
            attend_unit(kv, layer, tables[sequence[t]], positions[t], mine, g, per_group, window, y[t, begin:end])


def reference_attend(
    kv: F32, layer: int, tables: I64, sequence: I64, positions: I64, q: F32, window: int, scratch: F32, y: F32
) -> None:
    """The same with the sequence's keys and values gathered first, in float64."""
    heads, width = q.shape[1:]
    per_group = heads // kv.shape[3]
    for t, (row, position) in enumerate(zip(sequence, positions, strict=True)):
        start = max(0, position + 1 - window) if window else 0
        places = np.arange(start, position + 1)
        found = kv[tables[row, places // BLOCK_TOKENS], layer, :, :, places % BLOCK_TOKENS].astype(np.float64)
        for h in range(heads):
            keys, values = found[:, 0, h // per_group], found[:, 1, h // per_group]
            scores = keys @ q[t, h] / math.sqrt(width)
            weights = np.exp(scores - scores.max())
            y[t, h * width : (h + 1) * width] = weights / weights.sum() @ values
