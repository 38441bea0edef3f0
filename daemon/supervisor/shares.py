"""Dividing bytes among models. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping


def divide(total: int, limits: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Shares of `total` bytes in proportion to full sizes, each within its `(base, full)`.

    The shares add up to `total`, less at most one byte a model, unless the bases need more or the full sizes less.
    """
    low, high = 0.0, 1.0
    if sum(full for _, full in limits.values()) <= total:
        return {name: full for name, (_, full) in limits.items()}
    for _ in range(60):  # the sum of the clipped shares rises with the scale: halve the interval it lies in
        scale = (low + high) / 2
        if sum(_clip(scale, *limit) for limit in limits.values()) > total:
            high = scale
        else:
            low = scale
    return {name: _clip(low, *limit) for name, limit in limits.items()}


def _clip(scale: float, base: int, full: int) -> int:
    return max(base, min(full, int(scale * full)))
