"""The demo model pruned, before any retraining: each method at 50, 60 and 70 %, 2:4 and 4:8, values of 8 bits.

Masks and values are chosen on the text that `ebb add` samples; KL to the original and perplexity are those of held-out
standard library text, every second window of `quality`; embedding, head and norms are the original's. `left` is what
the linears' errors leave of their outputs, sum of (E H E^T) by that of (W H W^T), the mean over linears. Then what is
stored: bytes in a file by what arithmetic wants (values, scales, and a bit for every position of a tier that was still
zero), also of a layer of the 1.1B shape; what values of 16 and 4 bits do; and the model that `ebb add --codec sparse`
makes, at seven sizes, beside `nested` in as many bytes.

EBBFLOW_BENCH_ROWS names what is done, of: 50% 60% 70% 2:4 4:8 storage stacks; all take a quarter of an hour.

Run: .venv/bin/python bench/sparse_quality.py [--json FILE] [--check]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from quality import SEED, Demo, Original, add, heldout_tokens
from torch import Tensor

from ebbflow.daemon.library.calibrate import LinearMoments, layer_moments
from ebbflow.daemon.library.encode import layer_linears
from ebbflow.daemon.library.encode_sparse import (
    DEFAULT_LEVELS,
    SparsePlan,
    round_values,
    tier_counts,
    tier_nbytes,
)
from ebbflow.daemon.library.progress import Reporter
from ebbflow.daemon.library.prune import Groups, Inputs, inputs_of, objective, prune
from ebbflow.daemon.library.shapes import SHAPES
from ebbflow.daemon.library.texts import sampled_texts
from ebbflow.formats.checkpoint import Checkpoint, open_checkpoint
from ebbflow.formats.container import padded
from ebbflow.formats.kinds import VALUES_LIMIT
from ebbflow.formats.pruning import METHODS, PATTERNS, VALUES, Pruning

from places import CACHE, DEMO
from report import Report

SPARSITIES = (0.5, 0.6, 0.7)
BITS = {"i8": 8, "f16": 16, "i4": 4}
SCALE_BITS = 32
WIDE = [shape for name, shape in layer_linears(SHAPES["tinyllama-1.1b"]).items() if name.startswith("layers.0.")]
EQUAL = 1 + 1e-5  # floats add up in another order

Judge = Callable[[dict[str, Tensor]], tuple[float, str]]
"""What a model with these weights loses, as a number and in words."""


@dataclass(frozen=True)
class Pruned:
    """All linears as one method leaves them, not rounded: by name weights, and the error of every row.

    `left` is the mean share of the outputs' energy, `seconds` of processor time.
    """

    weights: dict[str, Tensor]
    errors: dict[str, Tensor]
    left: float
    seconds: float


@dataclass(frozen=True)
class Linears:
    """The linears of the demo's layers: weights, and what their inputs look like."""

    weights: dict[str, Tensor]
    inputs: dict[str, Inputs]

    def pruned(self, pruning: Pruning) -> Pruned:
        """By the codec's own functions."""
        weights, errors, left, begun = {}, {}, [], time.process_time()
        for name, weight in self.weights.items():
            inputs = self.inputs[name]
            found = prune(weight, inputs, SparsePlan(pruning).groups(name, weight.shape[1]), pruning.method).weight
            weights[name], errors[name] = found, objective(weight - found, inputs.h)
            left.append(float(errors[name].sum() / objective(weight, inputs.h).sum()))
        return Pruned(weights, errors, sum(left) / len(left), time.process_time() - begun)

    def rounded(self, weights: dict[str, Tensor], values: str) -> dict[str, Tensor]:
        """As they are stored."""
        return {name: round_values(weight, self.inputs[name], values).weight for name, weight in weights.items()}


def wanted_nbytes(m: int, n: int, groups: Groups, levels: int, values: str) -> float:
    """What arithmetic wants of a matrix: values, a scale for each row of integers, and for each tier a bit for every
    position that was still zero.
    """
    counts = [count * (n // groups.group) for count in tier_counts(n, groups, levels)]
    masks = n + sum(n - count for count in counts[:-1])
    return m * (counts[-1] * BITS[values] + masks + (SCALE_BITS if values in VALUES_LIMIT else 0)) / 8


def stored_ratio(shapes: Iterable[tuple[int, int]], pruning: Pruning, levels: int) -> float:
    """Bytes of some matrices in a file by what arithmetic wants; a codec's test says that it keeps to them."""
    plan, nbytes, wanted = SparsePlan(pruning), 0, 0.0
    for m, n in shapes:
        groups = plan.groups("", n)
        nbytes += sum(map(padded, tier_nbytes(m, n, groups, levels, pruning.values)))
        wanted += wanted_nbytes(m, n, groups, levels, pruning.values)
    return nbytes / wanted


def calibrated(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor, LinearMoments]]:
    """Every linear of the layers: name, weight, and the moments that `ebb add` would measure."""
    reporter = Reporter(0, 0, lambda message: None, time.monotonic)
    texts = sampled_texts(checkpoint, checkpoint.checksum(), SEED, CACHE / "jobs", reporter)
    for _, linears in layer_moments(checkpoint, texts.calibration, seed=SEED):
        for name, moments in linears.items():
            yield name, checkpoint.tensor(name), moments


def linears_of(found: Iterable[tuple[str, Tensor, LinearMoments]]) -> Linears:
    """From names, weights and moments; linears that read the same share what is made of it."""
    weights, inputs, shared = {}, {}, {}
    for name, weight, moments in found:
        weights[name] = weight
        _, inputs[name] = shared.setdefault(id(moments.inputs), (moments.inputs, inputs_of(moments.inputs)))
    return Linears(weights, inputs)


def configurations() -> Iterator[tuple[str, float | None, str | None]]:
    """Label, sparsity, pattern."""
    yield from ((f"{sparsity:.0%}", sparsity, None) for sparsity in SPARSITIES)
    yield from ((pattern, None, pattern) for pattern in PATTERNS)


def compare_methods(report: Report, measure: str, judge: Judge, linears: Linears, rows: list[str]) -> None:
    """A row for each method and each configuration among `rows`, and the bars between them; `judge` measures the error
    called `measure` of a model with the given weights.
    """
    for label, sparsity, pattern in (found for found in configurations() if found[0] in rows):
        errors, found = {}, {}
        for method in METHODS:
            found[method] = linears.pruned(Pruning(sparsity, pattern, method))
            errors[method], text = judge(linears.rounded(found[method].weights, "i8"))
            numbers = [errors[method], found[method].left, found[method].seconds]
            report.note(f"{label} {method}", f"{text}, left {numbers[1]:.4f}, {numbers[2]:.0f} s", numbers)
        start, end = found["wanda"].errors, found["frankwolfe"].errors
        worst = max(float((end[name] / start[name].clamp_min(1e-30)).max()) for name in start)
        share = sum(float(end[name].sum()) for name in end) / sum(float(start[name].sum()) for name in start)
        report.note(
            f"{label}: Frank-Wolfe's objective by Wanda's", f"{share:.4f}, worst row {worst:.4f}", [share, worst]
        )
        report.bar(f"worst_row_frankwolfe_by_wanda_{label}", worst, "<=", EQUAL)
        if label == "50%":
            for better, worse in (("admm", "wanda"), ("sparsegpt", "wanda"), ("wanda", "magnitude")):
                report.bar(f"{measure}_{better}_by_{worse}_50%", errors[better] / errors[worse], "<=", 0.99)
                report.bar(f"left_{better}_by_{worse}_50%", found[better].left / found[worse].left, "<=", 0.99)


def judge_of(demo: Demo) -> Judge:
    """KL to the original."""

    def judge(weights: dict[str, Tensor]) -> tuple[float, str]:
        quality = demo.with_weights(weights)
        return quality.mean_kl, f"KL {quality.mean_kl:.4f} nats, perplexity {quality.perplexity:.2f}"

    return judge


def compare_storage(report: Report, demo: Demo, linears: Linears) -> None:
    """Kinds of values, and bytes against arithmetic."""
    pruned = linears.pruned(Pruning(0.5)).weights
    for values in VALUES:
        quality = demo.with_weights(linears.rounded(pruned, values))
        report.note(f"50% admm, {values}", f"KL {quality.mean_kl:.4f} nats", quality.mean_kl)
    ratios, own = [], [tuple(weight.shape) for weight in linears.weights.values()]
    for label, sparsity, pattern in configurations():
        for values in VALUES:
            for levels in (1, DEFAULT_LEVELS):
                pruning = Pruning(sparsity, pattern, values=values)
                pair = [stored_ratio(shapes, pruning, levels) for shapes in (own, WIDE)]
                text = f"{pair[0]:.4f}, 1.1B shape {pair[1]:.4f}"
                report.note(f"bytes by arithmetic: {label}, {values}, {levels} tiers", text, pair)
                ratios += pair
    report.bar("bytes_by_arithmetic_worst", max(ratios), "<=", 1.02)


def compare_stacks(report: Report, demo: Demo, folder: Path) -> None:
    """What is added, whole and cut, and `nested` in as many bytes."""
    stack, seconds = add("sparse", None, folder / "sparse")
    report.note("sparse: added in", f"{seconds:.0f} s", seconds)
    nested, _ = add("nested", None, folder / "nested")
    edges = [stack.base_nbytes + (stack.nbytes - stack.base_nbytes) * i / 6 for i in range(7)]
    for size in demo.prefixes(stack, edges):
        peer = demo.prefixes(nested, [size.nbytes])[-1]
        text = f"{size.text()}; nested, {peer.nbytes / 1e6:.2f} MB: {peer.text()}"
        report.note(f"sparse: {size.nbytes / 1e6:.2f} MB", text, [size.numbers(), peer.numbers()])


def main() -> int:
    """Run, in a folder that goes away."""
    report = Report("Quality of the pruned demo model")
    known = [label for label, _, _ in configurations()] + ["storage", "stacks"]
    rows = os.environ.get("EBBFLOW_BENCH_ROWS", " ".join(known)).split()
    if unknown := set(rows) - set(known):
        sys.exit(f"EBBFLOW_BENCH_ROWS names {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    checkpoint = open_checkpoint(DEMO)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        demo, linears = (
            Demo(checkpoint, Original(checkpoint, heldout_tokens()[::2])),
            linears_of(calibrated(checkpoint)),
        )
        report.note("original", f"perplexity {demo.with_weights({}).perplexity:.3f}")
        compare_methods(report, "KL", judge_of(demo), linears, rows)
        if "storage" in rows:
            compare_storage(report, demo, linears)
        if "stacks" in rows:
            compare_stacks(report, demo, Path(folder))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
