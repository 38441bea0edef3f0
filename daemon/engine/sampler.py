"""From logits to the next token. Greedy, or temperature, top-k and top-p with a generator that depends only on the
request's seed and the token's position, so a request gives the same text whatever runs beside it.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...formats.values import Sampling

_LIKELY: Final = 1024  # tokens that nearly always hold the share that top_p asks for


def sample(logits: NDArray[np.float32], sampling: Sampling, position: int) -> int:
    """The next token's id from `logits [v]`; ties and greedy choice go to the lowest id."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    ids = _largest(logits, sampling.top_k) if 0 < sampling.top_k < len(logits) else np.arange(len(logits))
    below = logits[ids].astype(np.float64) - float(logits.max())
    with np.errstate(over="ignore"):  # far enough below, at a temperature next to nothing, is minus infinity
        weights = np.exp(below / sampling.temperature)
    if sampling.top_p < 1:
        kept = _nucleus(logits[ids], weights, sampling.top_p)
        ids, weights = ids[kept], weights[kept]
    cumulative = np.cumsum(weights)
    draw = np.random.Generator(np.random.Philox(key=[sampling.seed, position])).random()
    chosen = int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))
    return int(ids[min(chosen, len(ids) - 1)])


def _largest(values: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Positions of the `count` largest values, largest first, ties to the lower position; no sort of them all."""
    least = np.partition(values, -count)[-count]
    found = np.flatnonzero(values >= least)
    return found[np.argsort(-values[found], kind="stable")][:count]


def _nucleus(logits: NDArray[np.float32], weights: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Positions of the smallest set whose share of the weights reaches `top_p`, largest first; never empty."""
    wanted = top_p * weights.sum()
    order = _largest(logits, min(_LIKELY, len(logits)))
    if weights[order].sum() < wanted:
        order = _largest(logits, len(logits))
    return order[: int(np.searchsorted(np.cumsum(weights[order]), wanted)) + 1]
