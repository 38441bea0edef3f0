"""Choosing indices for the `nested` codec: error feedback, coordinate descent, and the sums behind a refit of levels.

Method: every weight has an index of D bits whose first d bits choose one of 2^d levels, for each depth d that is stored
(2 to D). Levels of all depths lie in one *heap*: level c of depth d at place 2^d + c. `feedback` is one pass of GPTQ
(arXiv 2210.17323) whose error is a weighted mix over depths; `descend` then re-chooses one column after the other so
that the weighted sum over depths of (E_d H E_d^T)_rr falls; `gather_moments` sums H and H w by index, from which levels
follow by least squares. Used when a model is added, never when it is served: rows of a matrix are independent of each
other in all three, which is what makes them cheap and deterministic: a row's data stay in the cache, the order of its
additions depends on nothing else.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]

ROWS: Final = 8  # share each row of H that is read


@njit("void(f4[:,::1],f4[:,::1],f4[::1],f4[::1],u1[:,::1])", nogil=True, parallel=True, cache=True)
def feedback(x: F32, inverse: F32, blend: F32, squares: F32, index: U8) -> None:
    """Choose `index [m, n]` column by column, handing each error on to the columns after it; `x [m, n]` is used up.

    `inverse [n, n]` is the upper Cholesky factor of the inverse of H, each row divided by its diagonal. For each leaf,
    `blend` is the weighted mean over depths of its levels, `squares` that of their squares: the leaf nearest to v, all
    depths weighed, has the least `squares - 2 v blend`.
    """
    m, n = x.shape
    for part in prange(-(-m // ROWS)):
        stop = min(m, (part + 1) * ROWS)
        for j in range(n):
            for i in range(part * ROWS, stop):
                value = x[i, j] + x[i, j]
                best, least = 0, squares[0] - value * blend[0]
                for leaf in range(1, blend.shape[0]):
                    cost = squares[leaf] - value * blend[leaf]
                    if cost < least:
                        best, least = leaf, cost
                index[i, j] = best
                error = x[i, j] - blend[best]
                for k in range(j + 1, n):
                    x[i, k] -= error * inverse[j, k]


def reference_feedback(x: F32, inverse: F32, blend: F32, squares: F32, index: U8) -> None:
    """Column by column, all rows at once."""
    for j in range(x.shape[1]):
        index[:, j] = (squares - (x[:, j] + x[:, j])[:, None] * blend).argmin(1)
        x[:, j + 1 :] -= (x[:, j] - blend[index[:, j]])[:, None] * inverse[j, j + 1 :]


@njit("void(f4[:,::1],f4[:,::1],f4[:,::1],f4[:,:,::1],i8[::1],u1[:,::1])", nogil=True, parallel=True, cache=True)
def descend(h: F32, heap: F32, weight: F32, gradient: F32, order: I64, index: U8) -> None:
    """Re-choose the indices of the columns in `order`, one after the other; `index [m, n]` is changed in place.

    `h [n, n]`, `heap [m, 2^(D+1)]` each row's levels, `weight [m, D+1]` what a row's error at each depth counts,
    `gradient [m, D+1, n]` is  E_d H  and is kept so; depths of weight zero throughout are not touched.
    """
    m, n = index.shape
    depth = weight.shape[1] - 1
    leaves = 1 << depth
    for part in prange(-(-m // ROWS)):
        first, stop = part * ROWS, min(m, (part + 1) * ROWS)
        squares = np.zeros((ROWS, 2 * leaves), np.float32)
        scaled = np.zeros((ROWS, 2 * leaves), np.float32)
        cost = np.zeros(2 * leaves, np.float32)
        for i in range(first, stop):
            for d in range(1, depth + 1):
                for place in range(1 << d, 2 << d):
                    scaled[i - first, place] = weight[i, d] * heap[i, place]
                    squares[i - first, place] = (
                        squares[i - first, place >> 1] + scaled[i - first, place] * heap[i, place]
                    )
        for at in range(order.shape[0]):
            j = order[at]
            own = h[j, j]
            for i in range(first, stop):
                row = i - first
                before: Any = np.int64(index[i, j])
                for d in range(1, depth + 1):
                    level = heap[i, (1 << d) + (before >> (depth - d))]
                    wanted = np.float32(-2) * (own * level + gradient[i, d, j])
                    for parent in range(1 << (d - 1), 1 << d):
                        cost[2 * parent] = cost[parent] + wanted * scaled[row, 2 * parent]
                        cost[2 * parent + 1] = cost[parent] + wanted * scaled[row, 2 * parent + 1]
                best, least = before, cost[leaves + before] + own * squares[row, leaves + before]
                for leaf in range(leaves):
                    total = cost[leaves + leaf] + own * squares[row, leaves + leaf]
                    if total < least:
                        best, least = leaf, total
                if best == before:
                    continue
                index[i, j] = best
                for d in range(1, depth + 1):
                    was, now = before >> (depth - d), best >> (depth - d)
                    if was != now and weight[i, d] != 0:
                        change = heap[i, (1 << d) + now] - heap[i, (1 << d) + was]
                        for k in range(n):
                            gradient[i, d, k] -= change * h[j, k]


def reference_descend(h: F32, heap: F32, weight: F32, gradient: F32, order: I64, index: U8) -> None:
    """The cost of every leaf from its definition, in float64, one weight after the other."""
    depth = weight.shape[1] - 1
    leaf = np.arange(1 << depth)
    for i in range(len(index)):
        for j in order:
            cost = np.zeros(1 << depth)
            for d in range(1, depth + 1):
                levels = heap[i, (1 << d) + (leaf >> (depth - d))].astype(np.float64)
                change = levels - levels[index[i, j]]
                cost += weight[i, d] * (change**2 * h[j, j] - 2 * change * gradient[i, d, j])
            best = cost.argmin()
            for d in range(1, depth + 1):
                levels = heap[i, (1 << d) + (leaf >> (depth - d))]
                gradient[i, d] -= (levels[best] - levels[index[i, j]]) * h[j] * (weight[i, d] != 0)
            index[i, j] = best


@njit("void(f4[:,::1],f4[:,::1],u1[:,::1],f4[:,:,::1],f4[:,::1])", nogil=True, parallel=True, cache=True)
def gather_moments(h: F32, w: F32, index: U8, moments: F32, targets: F32) -> None:
    """Of each row i of `w [m, n]`: `moments [m, K, K]` = S H S^T and `targets [m, K]` = S H w, S the one-hot matrix of
    `index [m, n]` (all below K).
    """
    m, n = w.shape
    count = targets.shape[1]
    for part in prange(-(-m // ROWS)):
        first, stop = part * ROWS, min(m, (part + 1) * ROWS)
        sums = np.zeros((ROWS, count, n), np.float32)
        for j in range(n):
            for i in range(first, stop):
                target = sums[i - first, index[i, j]]
                for k in range(n):
                    target[k] += h[j, k]
        for i in range(first, stop):
            moments[i] = 0
            for level in range(count):
                total = np.float32(0)
                for k in range(n):
                    value = sums[i - first, level, k]
                    moments[i, level, index[i, k]] += value
                    total += value * w[i, k]
                targets[i, level] = total


def reference_gather_moments(h: F32, w: F32, index: U8, moments: F32, targets: F32) -> None:
    """With the one-hot matrices."""
    hot: NDArray[Any] = (index[:, None] == np.arange(targets.shape[1])[:, None]).astype(np.float64)  # [m, K, n]
    moments[:] = np.einsum("mkn,np,mlp->mkl", hot, h, hot, optimize=True)
    targets[:] = np.einsum("mkn,np,mp->mk", hot, h, w, optimize=True)
