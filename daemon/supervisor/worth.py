"""What the bytes of a model are worth: its stack as pieces with a falling gain per byte. Pure arithmetic.

From the manifest's curve (KL at some sizes): between two points log KL is a straight line, which is what it nearly is;
of all that only the lower convex hull counts, so that a piece is never worth more than the one before it and dividing
by worth (`pool`) can be greedy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from ...formats.manifest import CurvePoint

SMALLEST_KL: Final = 1e-6  # nats; what is measured below is noise
TYPICAL_KL: Final = (1.0, 1e-3)  # of a base and of a whole stack, where nothing was measured
_CUTS: Final = 8  # pieces between two points of the curve
_NEXT_TO_NOTHING: Final = 1e-18  # nats a byte: more is still better than less


@dataclass(frozen=True)
class Piece:
    """Bytes of a stack up to `stop`, from where the piece before ends; `gain` is the KL (nats) each of them saves."""

    stop: int
    gain: float


def pieces(base: int, full: int, curve: Sequence[CurvePoint]) -> tuple[Piece, ...]:
    """The stack beyond its base, in order, with falling gains; empty when the base is all of it."""
    if full <= base:
        return ()
    hull = _hull(_dense(_points(base, full, curve)))
    return tuple(
        Piece(full if i == len(hull) - 2 else round(x1), max((y0 - y1) / (x1 - x0), _NEXT_TO_NOTHING))
        for i, ((x0, y0), (x1, y1)) in enumerate(pairwise(hull))
    )


def _points(base: int, full: int, curve: Sequence[CurvePoint]) -> list[tuple[float, float]]:
    """Size and log KL, ascending, from `base` to `full`, never rising."""
    known: dict[int, float] = {}
    lowest = math.inf
    for point in sorted(curve, key=lambda point: point.nbytes):
        if base <= point.nbytes <= full and math.isfinite(point.kl):
            lowest = min(lowest, math.log(max(point.kl, SMALLEST_KL)))
            known[point.nbytes] = lowest
    if len(known) < 2:
        return [(base, math.log(TYPICAL_KL[0])), (full, math.log(TYPICAL_KL[1]))]
    points = [(float(x), y) for x, y in known.items()]
    (x0, y0), (x1, y1) = points[:2]
    if x0 > base:
        points.insert(0, (base, y0 + (y0 - y1) / (x1 - x0) * (x0 - base)))
    if points[-1][0] < full:
        points.append((full, points[-1][1]))
    return points


def _dense(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Size and KL, with `_CUTS - 1` more sizes between each two."""
    dense = [(points[0][0], math.exp(min(points[0][1], 50.0)))]
    for (x0, y0), (x1, y1) in pairwise(points):
        for cut in range(1, _CUTS + 1):
            share = cut / _CUTS
            dense.append((x0 + (x1 - x0) * share, math.exp(min(y0 + (y1 - y0) * share, 50.0))))
    return dense


def _hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex hull of points in order of x: slopes rise, so gains fall."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) >= 2:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x1) < (y - y1) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull
