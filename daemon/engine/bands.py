"""Quality in a few coarse steps, so that a prefix computed at one size of a model can be used at another."""

from __future__ import annotations

from bisect import bisect_right
from typing import Final

from ...formats.manifest import CurvePoint

# Mean KL to the original, in nats a token. Continuing on keys and values of the next worse band costs less than
# computing everything there would (DESIGN.md), and breathing within a band empties no cache.
THRESHOLDS: Final = (0.3, 0.1, 0.03, 0.01, 0.003)
BANDS: Final = len(THRESHOLDS) + 1


class Bands:
    """Bands, 0 the worst, by the measured `curve`; where nothing was measured, equal parts of the stack's blocks."""

    def __init__(self, curve: tuple[CurvePoint, ...], base: int, blocks: int) -> None:
        self._edges = [base + (blocks - base) * part // BANDS for part in range(1, BANDS)]
        if curve:
            points = sorted(curve, key=lambda point: point.blocks)
            self._edges = [
                next((point.blocks for point in points if point.kl < threshold), blocks + 1) for threshold in THRESHOLDS
            ]

    def of(self, blocks: int) -> int:
        """The band in which the model is while so many blocks are resident."""
        return bisect_right(self._edges, blocks)
