"""From logits to the next token. Greedy, or temperature, top-k and top-p with a generator that depends only on the
request's seed and the token's position, so a request gives the same text whatever runs beside it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...formats.messages import Sampling


def sample(logits: NDArray[np.float32], sampling: Sampling, position: int) -> int:
    """The next token's id from `logits [v]`; ties and greedy choice go to the lowest id."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    below = logits[order].astype(np.float64) - float(logits[order[0]])
    with np.errstate(over="ignore"):  # far enough below, at a temperature next to nothing, is minus infinity
        weights = np.exp(below / sampling.temperature)
    weights /= weights.sum()
    cumulative = np.cumsum(weights)
    if sampling.top_p < 1:
        # the smallest set whose probability reaches top_p, never empty
        keep = int(np.searchsorted(cumulative, sampling.top_p)) + 1
        order, cumulative = order[:keep], cumulative[:keep]
    draw = np.random.Generator(np.random.Philox(key=[sampling.seed, position])).random()
    chosen = int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))
    return int(order[min(chosen, len(order) - 1)])
