"""The size/quality curve, as a small chart of lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from rich.bar import Bar

from ...formats.manifest import CurvePoint
from ...formats.units import format_size
from .output import write_table

WIDTH: Final = 30


def write_curve(curve: Sequence[CurvePoint], total_nbytes: int) -> None:
    """One line a measured size; the bar is as long as the loss of quality (KL) is large."""
    points = sorted(curve, key=lambda point: point.nbytes)
    finite = [point.kl for point in points if math.isfinite(point.kl)]
    worst = max(finite, default=0.0)
    rows = [
        (
            format_size(point.nbytes),
            f"{point.nbytes / max(total_nbytes, 1):.0%}",
            f"{point.kl:.4f}",
            f"{point.perplexity:.2f}",
            Bar(1.0, 0.0, point.kl / worst if math.isfinite(point.kl) and worst > 0 else 1.0, width=WIDTH),
        )
        for point in points
    ]
    write_table(("SIZE", "OF STACK", "KL", "PERPLEXITY", "LOSS"), rows, right=("SIZE", "OF STACK", "KL", "PERPLEXITY"))
