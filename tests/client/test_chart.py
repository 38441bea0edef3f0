"""The plot of the size/quality curve: where dots are, and that nothing makes it fail."""

from __future__ import annotations

import math

import pytest

from ebbflow.client.cli.chart import HEIGHT, WIDTH, plot

MB = 1_000_000


def drawn(points: list[tuple[int, float]]) -> tuple[list[str], list[str], list[str]]:
    """What stands left of the axis, the plot itself, and the line of sizes."""
    title, *rows, axis, sizes = plot(points)
    assert title == "KL, nats a token"
    assert len(rows) == HEIGHT
    assert axis.strip() == "└" + "─" * WIDTH
    return [row[:9].strip() for row in rows], [row[10:].ljust(WIDTH) for row in rows], sizes.split()


def row_of(cells: list[str], column: int) -> int:
    """The first row with a letter in a column."""
    return next(i for i, line in enumerate(cells) if line[column] != " ")


def test_a_straight_line_in_log_kl_is_drawn_as_one():
    labels, cells, sizes = drawn([(MB, 1.0), (2 * MB, 0.1), (3 * MB, 0.01)])
    assert sizes == ["1.0", "MB", "2.0", "MB", "3.0", "MB"]
    assert [label for label in labels if label] == ["1", "0.1", "0.01"]
    assert (labels[0], labels[-1]) == ("1", "0.01")
    assert row_of(cells, 0) == 0
    assert row_of(cells, WIDTH - 1) == HEIGHT - 1
    middles = [row_of(cells, column) for column in range(2, WIDTH, 5)]
    assert middles == sorted(middles)
    assert all(abs(row - column * HEIGHT / WIDTH) <= 1 for row, column in zip(middles, range(2, WIDTH, 5), strict=True))


def test_labels_are_powers_of_ten_beside_their_rows():
    labels, cells, _ = drawn([(MB, 0.1), (2 * MB, 0.0101), (3 * MB, 0.0004)])
    assert row_of(cells, 0) == labels.index("0.1")
    assert abs(row_of(cells, WIDTH // 2) - labels.index("0.01")) <= 1
    assert "0.001" in labels


def test_sizes_lie_where_their_bytes_are():
    _, cells, _ = drawn([(MB, 1.0), (2 * MB, 0.01), (5 * MB, 0.01)])
    flat = cells[HEIGHT - 1]
    assert flat.index(flat.strip()[0]) == pytest.approx(WIDTH / 4, abs=2)
    assert flat.rstrip() == flat


@pytest.mark.parametrize(
    "kls", [(0.0, 0.0), (1e-9, 1e-12), (0.5, 0.5), (1.0, 1.0), (5.0, 0.0), (math.inf, 1.0, 0.1), (1.0, math.nan, 2.0)]
)
def test_whatever_was_measured_is_drawn(kls: tuple[float, ...]):
    labels, cells, _ = drawn([((i + 1) * MB, kl) for i, kl in enumerate(kls)])
    assert sum(bool(label) for label in labels) >= 2
    assert any(line.strip() for line in cells)


@pytest.mark.parametrize("points", [[], [(MB, 1.0)], [(MB, 1.0), (MB, 2.0)], [(MB, math.nan), (2 * MB, 1.0)]])
def test_less_than_two_sizes_make_no_plot(points: list[tuple[int, float]]):
    assert list(plot(points)) == []
