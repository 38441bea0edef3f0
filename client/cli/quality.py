"""How good a model is at a size between those that were measured. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ...formats.manifest import CurvePoint

LEAST_KL: Final = 1e-9


@dataclass(frozen=True)
class Quality:
    """KL to the original in nats a token, and by how much perplexity exceeds that of the whole stack (0.03: 3 %)."""

    kl: float
    excess: float

    def __str__(self) -> str:
        return f"KL {self.kl:.3g}, perplexity {self.excess:+.1%}"


def quality_at(curve: Sequence[CurvePoint], nbytes: int) -> Quality | None:
    """On the straight line, in logarithms, between the sizes around `nbytes`; beyond them, as at the nearest one."""
    points = sorted((point for point in curve if _sound(point)), key=lambda point: point.nbytes)
    if not points:
        return None
    above = bisect_left([point.nbytes for point in points], nbytes)
    low, high = points[max(above - 1, 0)], points[min(above, len(points) - 1)]
    span = high.nbytes - low.nbytes
    part = min(max((nbytes - low.nbytes) / span, 0.0), 1.0) if span else 0.0
    kl = _between(max(low.kl, LEAST_KL), max(high.kl, LEAST_KL), part)
    return Quality(kl, _between(low.perplexity, high.perplexity, part) / points[-1].perplexity - 1)


def _sound(point: CurvePoint) -> bool:
    return math.isfinite(point.kl) and math.isfinite(point.perplexity) and point.perplexity > 0


def _between(low: float, high: float, part: float) -> float:
    return math.exp(math.log(low) * (1 - part) + math.log(high) * part)
