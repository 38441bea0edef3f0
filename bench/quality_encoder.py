"""A sentence encoder at many sizes: 1 - cosine to the original's embeddings, and the ten nearest neighbours that stay.

Calibrated on 400 doc strings of the running Python's standard library, measured on 500 others. Sizes are bits for each
weight of the linears, everything stored for them counted (scales, levels, factors, padding of blocks); nothing else is
touched. Rows: the codecs `nested` (one encoding; every size is a prefix of it, by gain per byte) and `bitstack` (ranks,
both orders; best per size), and rounding to the nearest with groups of 32. EBBFLOW_BENCH_RANKS names the ranks.

Needs the extra `bench`. Run: .venv/bin/python bench/quality_encoder.py [--json FILE] [--check]
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log
from typing import Final

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
from ebbflow.formats.stack import padded

from minilm import Encoder
from report import Report

NESTED_LEVELS = encode_nested.DEFAULT_LEVELS
SIZES: Final[dict[str, tuple[float, ...]]] = {
    "nested": (2.1, 2.5, 3.0, 3.25, 3.5, 4.0, 4.5, 5.5, 6.5),
    "bitstack": (2.1, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 14.0),
}
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


def main() -> int:
    """Measure every row, then compare."""
    report, encoder = Report("Quality of a sentence encoder by size"), Encoder()
    moments = encoder.moments()
    report.note("linears", f"{encoder.size / 1e6:.1f} M weights", encoder.size)
    rows: dict[str, list[Point]] = {}
    ranks = os.environ.get("EBBFLOW_BENCH_RANKS", " ".join(RANKS)).split()
    for codec in ("nested", *(f"bitstack {rank}" for rank in ranks)):
        begun, rank = time.monotonic(), codec.split()[-1]
        if codec == "nested":
            levels, names = nested(encoder, moments), {"gain": codec}
        else:
            levels = bitstack(encoder, moments, None if rank == "shape" else int(rank))
            names = {rule: f"{codec}, {rule} order" for rule in RULES}
        report.note(f"{codec}: encoded in", f"{time.monotonic() - begun:.0f} s", time.monotonic() - begun)
        for rule, name in names.items():
            rows[name] = []
            for point in measured(encoder, moments, levels, rule, SIZES[codec.split()[0]]):
                rows[name].append(point)
                report.note(f"{name}: {point.bits:.2f} bits", str(point), point.samples())
    for bits in (3, 4, 8):
        point = rounded(encoder, bits)
        equal = bits_at(rows["nested"], point.error)
        text = f"{point}" + (f"; nested has it at {equal / point.bits:.2f} of the bits" if equal else "")
        report.note(f"to the nearest: {point.bits:.2f} bits", text, point.samples())
    found = rows.pop("nested")
    ratios = []
    for point in found:
        others = [reached for row in rows.values() if (reached := bits_at(row, point.error)) is not None]
        if others:
            ratios.append(point.bits / min(others))
            report.note(f"bits of nested / bitstack at {point.error:.4f}", f"{ratios[-1]:.2f}", ratios[-1])
    report.bar("encoder_error_within_3.25_bits", best_within(found, 3.25), "<=", 0.066)
    report.bar("encoder_error_within_4.5_bits", best_within(found, 4.5), "<=", 0.011)
    if ratios:
        report.bar("encoder_nested_bits_by_bitstack_worst", max(ratios), "<=", 0.65)
    worst = max(rise(before, after) for before, after in pairwise(found))
    report.bar("encoder_largest_rise_in_standard_errors", worst, "<=", 2.0)
    return report.finish()


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
