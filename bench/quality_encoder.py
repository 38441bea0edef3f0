"""A sentence encoder at many sizes: 1 - cosine to the original's embeddings, and the ten nearest neighbours that stay.

Calibrated on 400 doc strings of the running Python's standard library, measured on 500 others. Sizes are bits for each
weight of the linears, everything stored for them counted (scales, levels, factors, padding of blocks); nothing else is
touched. Rows: the codecs `nested` (one encoding; every size is a prefix of it, by gain per byte) and `bitstack` (ranks,
both orders; best per size), and rounding to the nearest with groups of 32. EBBFLOW_BENCH_RANKS names the ranks.

Gains, and the H that `nested` minimises its errors for, are those `by text` of `minilm.Encoder.moments`. `nested by
token` has the ones that the project collects of language models, which misjudge this one: the error of its last layers
by up to 20 times.

Needs the extra `bench`. Run: .venv/bin/python bench/quality_encoder.py [--json FILE] [--check]
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import exp, log

import numpy as np
import torch
from torch import Tensor

from ebbflow.daemon.library import encode_bitstack, encode_nested
from ebbflow.daemon.library.calibrate import LinearMoments
from ebbflow.daemon.library.encode_bitstack import Level, choose_rank, encode_matrix, square_root
from ebbflow.daemon.library.encode_nested import encode_planes, input_metric
from ebbflow.daemon.library.gain import second_order_gain
from ebbflow.daemon.library.order import RULES, Candidate, stack_order
from ebbflow.formats.blocks import GrowingWeight
from ebbflow.formats.container import padded

from minilm import Encoder
from report import Report

NESTED_LEVELS = encode_nested.DEFAULT_LEVELS
NESTED_BITS = (2.1, 2.5, 3.0, 3.25, 3.5, 4.0, 4.5, 5.5, 6.5)
BITSTACK_BITS = (2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 11.0, 14.0)
RANKS = ("shape", "1", "4", "16")
GROUP = 32  # weights that share a scale when rounded to the nearest
SEED = 0

Moments = dict[str, LinearMoments]


@dataclass(frozen=True)
class Point:
    """One size: bits for each weight, 1 - cosine of each text, and the share of neighbours that stay."""

    bits: float
    errors: Tensor
    overlap: float

    @property
    def error(self) -> float:
        """The mean over texts."""
        return float(self.errors.mean())

    def __str__(self) -> str:
        return f"1 - cosine {self.error:.4f}, neighbours {self.overlap:.3f}"

    def samples(self) -> list[float]:
        """What a report stores."""
        return [self.bits, self.error, self.overlap]


def nested(encoder: Encoder, moments: Moments) -> list[Level]:
    """Every linear's planes, in network order."""
    metrics = {id(found.inputs): input_metric(found.inputs) for found in moments.values()}
    return [
        level
        for name, weight in encoder.weights.items()
        for level in encode_planes(
            name, weight, metrics[id(moments[name].inputs)], uses=(), levels=NESTED_LEVELS, seed=SEED
        )
    ]


def bitstack(encoder: Encoder, moments: Moments, rank: int | None) -> list[Level]:
    """Every linear's signs, in network order."""
    probes = {id(found.inputs): square_root(found.inputs) for found in moments.values()}
    return [
        level
        for name, weight in encoder.weights.items()
        for level in encode_matrix(
            name,
            weight,
            moments[name].scale,
            probes[id(moments[name].inputs)],
            uses=(),
            levels=encode_bitstack.DEFAULT_LEVELS,
            rank=choose_rank(weight.shape[0], weight.shape[1], rank),
            seed=SEED,
        )
    ]


def measured(
    encoder: Encoder, moments: Moments, levels: list[Level], rule: str, sizes: tuple[float, ...]
) -> Iterator[Point]:
    """The largest prefix within each of the sizes: the file's blocks in the order of `rule`, read as stored."""
    candidates = [
        Candidate(
            level.entry.tensor,
            level.entry.level,
            padded(level.entry.nbytes),
            second_order_gain(moments[level.entry.tensor].gradient, level.before, level.after),
        )
        for level in levels
    ]
    order = stack_order(candidates, rule)
    weights = {name: GrowingWeight() for name in encoder.weights}
    edges = 8 * np.cumsum([candidates[i].nbytes for i in order.positions]) / encoder.size
    done = 0
    for size in sizes:
        stop = int(np.searchsorted(edges, size, "right"))
        if stop < order.base or stop == done:
            continue
        for i in order.positions[done:stop]:
            weights[levels[i].entry.tensor].add(levels[i].entry, levels[i].payload)
        done = stop
        values = {name: torch.from_numpy(weight.value()) for name, weight in weights.items()}
        yield Point(float(edges[stop - 1]), *encoder.score(values))


def rounded(encoder: Encoder, bits: int) -> Point:
    """Groups of weights rounded to the nearest multiple of an f16 scale, the largest of them at the end of the range
    that has one step more.
    """
    weights, top = {}, 2 ** (bits - 1)
    for name, weight in encoder.weights.items():
        groups = weight.reshape(-1, GROUP)
        largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
        scale = (largest / -top).half().float()
        steps = (groups / torch.where(scale == 0, 1.0, scale)).round().clamp(-top, top - 1)
        weights[name] = (steps * scale).reshape(weight.shape)
    return Point(bits + 16 / GROUP, *encoder.score(weights))


def bits_at(points: list[Point], error: float) -> float | None:
    """The bits at which a row reaches `error`, between its points by logarithms; None outside of it."""
    for before, after in pairwise(points):
        if before.error >= error >= after.error and before.error > after.error:
            share = log(before.error / error) / log(before.error / after.error)
            return exp(log(before.bits) + share * log(after.bits / before.bits))
    return None


def rise(before: Point, after: Point) -> float:
    """By how many standard errors, paired by text, the larger size is worse."""
    change = after.errors - before.errors
    return float(change.mean() / (change.std() / len(change) ** 0.5))


def best_within(points: list[Point], bits: float) -> float:
    """The least error of the sizes that are not larger."""
    return min(point.error for point in points if point.bits <= bits)


def timed(report: Report, name: str, encode: Callable[[], list[Level]]) -> list[Level]:
    """What `encode` gives."""
    begun = time.monotonic()
    levels = encode()
    seconds = time.monotonic() - begun
    report.note(f"{name}: encoded in", f"{seconds:.0f} s", seconds)
    return levels


def row(report: Report, name: str, points: Iterable[Point]) -> list[Point]:
    """All points, each reported as soon as it is measured."""
    found = []
    for point in points:
        found.append(point)
        report.note(f"{name}: {point.bits:.2f} bits", str(point), point.samples())
    return found


def main() -> int:
    """Measure every row, then compare."""
    report, encoder = Report("Quality of a sentence encoder by size"), Encoder()
    by_token, by_text = encoder.moments()
    report.note("linears", f"{encoder.size / 1e6:.1f} M weights", encoder.size)
    rows: dict[str, list[Point]] = {}
    for name, moments in (("nested", by_text), ("nested by token", by_token)):
        levels = timed(report, name, partial(nested, encoder, moments))
        rows[name] = row(report, name, measured(encoder, moments, levels, "gain", NESTED_BITS))
    for rank in os.environ.get("EBBFLOW_BENCH_RANKS", " ".join(RANKS)).split():
        number = None if rank == "shape" else int(rank)
        levels = timed(report, f"bitstack {rank}", partial(bitstack, encoder, by_text, number))
        for rule in RULES:
            name = f"bitstack {rank}, {rule} order"
            rows[name] = row(report, name, measured(encoder, by_text, levels, rule, BITSTACK_BITS))
    for bits in (3, 4, 8):
        point = rounded(encoder, bits)
        equal = bits_at(rows["nested"], point.error)
        text = f"{point}" + (f"; nested has it at {equal / point.bits:.2f} of the bits" if equal else "")
        report.note(f"to the nearest: {point.bits:.2f} bits", text, point.samples())
    found, by_token_row = rows.pop("nested"), rows.pop("nested by token")
    for point in found:
        if equal := bits_at(by_token_row, point.error):
            report.note(f"bits by text / by token at {point.error:.4f}", f"{point.bits / equal:.2f}")
    ratios = []
    for point in found:
        others = [reached for row in rows.values() if (reached := bits_at(row, point.error)) is not None]
        if others:
            ratios.append(point.bits / min(others))
            report.note(f"bits of nested / bitstack at {point.error:.4f}", f"{ratios[-1]:.2f}", ratios[-1])
    for name, points in (("", found), ("_by_token", by_token_row)):
        report.bar(f"encoder_error{name}_within_3.25_bits", best_within(points, 3.25), "<=", 0.066)
        report.bar(f"encoder_error{name}_within_4.5_bits", best_within(points, 4.5), "<=", 0.011)
    if ratios:
        report.bar("encoder_nested_bits_by_bitstack_worst", max(ratios), "<=", 0.65)
    worst = max(rise(before, after) for before, after in pairwise(found))
    report.bar("encoder_largest_rise_in_standard_errors", worst, "<=", 2.0)
    return report.finish()


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
