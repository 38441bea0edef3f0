"""The size/quality curve: a table of what was measured, and a plot of log KL against size, in dots of braille letters.

Each letter of the plot is a cell of 2 by 4 dots. Points lie where they were measured; between them the line is straight
in log KL, which is what it nearly is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

import click

from ...formats.manifest import CurvePoint
from ...formats.units import format_size
from .output import write_table

WIDTH: Final = 60  # letters
HEIGHT: Final = 12
SMALLEST_KL: Final = 1e-6  # drawn for anything below
_BLANK: Final = 0x2800
_DOTS: Final = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a braille letter, by column and row


def write_curve(curve: Sequence[CurvePoint], total_nbytes: int) -> None:
    """The plot, then a line for each measured size, the smallest first."""
    points = sorted(curve, key=lambda point: point.nbytes)
    for line in plot([(point.nbytes, point.kl) for point in points]):
        click.echo(line)
    rows = [
        (
            format_size(point.nbytes),
            f"{point.nbytes / max(total_nbytes, 1):.0%}",
            f"{point.kl:.3g}",
            f"{point.perplexity:.2f}",
        )
        for point in points
    ]
    titles = ("SIZE", "OF STACK", "KL", "PERPLEXITY")
    write_table(titles, rows, right=titles)


def plot(points: Sequence[tuple[int, float]]) -> Iterator[str]:
    """Lines of text: log KL (nats per token) over bytes; nothing for fewer than two sizes with a KL that is finite."""
    known = [(nbytes, max(kl, SMALLEST_KL)) for nbytes, kl in points if math.isfinite(kl)]
    left, right = min((x for x, _ in known), default=0), max((x for x, _ in known), default=0)
    if left == right:
        return
    bottom, top = _decades([kl for _, kl in known])
    cells = [[0] * WIDTH for _ in range(HEIGHT)]
    dots = [
        (
            (nbytes - left) / (right - left) * (2 * WIDTH - 1),
            (top - math.log10(kl)) / (top - bottom) * (4 * HEIGHT - 1),
        )
        for nbytes, kl in known
    ]
    for x, y in _line(dots):
        cells[y // 4][x // 2] |= _DOTS[x % 2][y % 4]
    marks = _marks(bottom, top)
    yield "KL, nats a token"
    for row, letters in enumerate(cells):
        label = marks.get(row, "")
        drawn = "".join(chr(_BLANK + letter) if letter else " " for letter in letters)
        yield f"{label:>8} {'┤' if label else '│'}{drawn}".rstrip()
    yield " " * 9 + "└" + "─" * WIDTH
    yield " " * 10 + _spread([format_size(left), format_size((left + right) // 2), format_size(right)])


def _decades(kls: Sequence[float]) -> tuple[float, float]:
    """Powers of ten, or halves of one, around all of `kls`, never the same."""
    bottom, top = math.floor(2 * math.log10(min(kls))) / 2, math.ceil(2 * math.log10(max(kls))) / 2
    return (bottom, top) if bottom < top else (bottom - 0.5, top + 0.5)


def _marks(bottom: float, top: float) -> dict[int, str]:
    """Rows of the plot that a power of ten lies in (the ends, where there is none), and how it is written."""
    powers = [float(power) for power in range(math.ceil(bottom), math.floor(top) + 1)]
    rows = {round((top - power) / (top - bottom) * (4 * HEIGHT - 1)) // 4: f"{10**power:g}" for power in powers}
    return rows if len(rows) > 1 else {0: f"{10**top:.2g}", HEIGHT - 1: f"{10**bottom:.2g}"}


def _line(dots: Sequence[tuple[float, float]]) -> Iterator[tuple[int, int]]:
    """Every dot on the way from point to point."""
    for (x, y), (next_x, next_y) in pairwise(dots):
        steps = max(1, round(abs(next_x - x)), round(abs(next_y - y)))
        for step in range(steps + 1):
            yield round(x + (next_x - x) * step / steps), round(y + (next_y - y) * step / steps)


def _spread(labels: Sequence[str]) -> str:
    """Labels at the left, in the middle and at the right of the plot."""
    first, middle, last = labels
    line = first + middle.rjust((WIDTH + len(middle)) // 2 - len(first))
    return line + last.rjust(WIDTH - len(line))
