"""Whether a sparse tier on top of planes would earn its bytes: the demo's linears at 2 to 6 planes.

What a block is worth is what `ebb add` says: half of the sum of G_r (E H E^T)_rr, in nats. Two ways:

    top      after d planes a tier of their error's entries. Chosen are those that would lower the error most alone,
             (E H)_rj^2 / H_jj; their values are least squares, of E as it is or rotated, then rounded to i8 or i4. The
             next plane changes every error, so a tier holds until that comes; its bytes stay, in a file that is read up
             to an edge.
    before   weights of the largest |w| times their channel's norm are stored apart, as i8, and the planes choose their
             indices for the rest.

Where the entries may be, and what is charged for them:

    rows, ours       as many in each row; this library's blocks, a bit a column for where they are.
    rows, entropy    the same entries; two bytes for the scale of a row that has any, and for where they are the entropy
                     of one bit of that density, which no code of places undercuts, if they tell nothing of each other.
    free, entropy    likewise, entries of the whole matrix, its rows weighed by G.

First the gain by byte of a tier on top by that of the next plane of the same linears. Then what order makes of it: the
blocks of all linears, with tiers and without, sorted by `library/order`, and the estimated KL by that of planes alone
in as many bytes, at several sizes. Of bases, kinds of values and depths that have tiers, the best is shown. Before that
the KL that is measured on held-out text, all linears with as many planes, and with tiers `rows, entropy` besides, also
by that of planes in as many bytes (between two depths by its logarithm); `direction` is no tier, but takes the error's
part along H's first eigenvector out, a number for each row.

The KL is of all linears; gains and orders are of those of the layers that EBBFLOW_BENCH_LAYERS numbers, from 0 (2, if
nothing does: the layer in the middle).

Run: .venv/bin/python bench/hybrid.py [--json FILE] [--check]      (six minutes of a core, by pieces)
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate
from math import log2

import numpy as np
import torch
from quality import SEED, Demo, Original, heldout_tokens
from sparse_quality import BITS, calibrated
from torch import Tensor

from ebbflow.daemon.library.calibrate import LinearMoments
from ebbflow.daemon.library.encode_nested import encode_planes, input_metric
from ebbflow.daemon.library.order import Candidate, stack_order
from ebbflow.daemon.library.prune import Groups, Inputs, objective
from ebbflow.formats.blocks import GrowingWeight, rotate_rows, unrotate_rows
from ebbflow.formats.checkpoint import open_checkpoint
from ebbflow.formats.container import padded
from ebbflow.formats.kinds import BASE_PLANES, VALUES_LIMIT, mask_nbytes, values_nbytes

from places import DEMO
from report import Report

DENSITIES = (0.0025, 0.005, 0.01, 0.02, 0.05)
BEFORE = (0.0025, 0.01)
KINDS = ("i8", "i4")
CHARGES = ("rows, ours", "rows, entropy", "free, entropy")
LAYERS = "2"
DEPTHS = (2, 3, 4, 5)  # that a tier is on top of; one plane more is stored
SIZES = (2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5)  # bits a weight
CLIPPING = (1.0, 0.9, 0.8, 0.7, 0.6)
ROWS_AT_ONCE = 32  # bounds memory
CHECKED = 1.0  # bar: a tier that our blocks can hold earns less than a plane

Block = tuple[int, float]  # bytes, and the cost that is left with it
Key = tuple[str, str, float, str]  # charge, basis, density, values


def entropy(share: float) -> float:
    """Bits of one bit that is 1 so often."""
    return -share * log2(share) - (1 - share) * log2(1 - share) if 0 < share < 1 else 0.0


def chosen(scores: Tensor, gradient: Tensor, density: float, charge: str) -> Tensor:
    """The entries of the highest scores: in each row as many, or anywhere."""
    m, n = scores.shape
    if charge.startswith("rows"):
        return Groups(n, max(1, round(density * n))).best(scores)
    flat = (scores * gradient[:, None]).view(1, -1)
    return Groups(m * n, max(1, round(density * m * n))).best(flat).view(m, n)


def tier_nbytes(kept: Tensor, values: str, charge: str) -> int:
    """Of a tier with these entries."""
    m, n = kept.shape
    if charge.endswith("ours"):
        return padded(mask_nbytes(m, n, 0)) + padded(values_nbytes(m, 0, values, int(kept[0].sum())))
    count = int(kept.sum())
    scales = 2 * int(kept.any(1).sum())
    return scales + int((m * n * entropy(count / (m * n)) + count * BITS[values]) / 8)


def rounded(value: Tensor, values: str, norms: Tensor) -> Tensor:
    """With the best of a few scales for each row, errors weighed by channel."""
    limit = VALUES_LIMIT[values]
    widest = value.abs().amax(1, keepdim=True).clamp_min(1e-30) / limit
    best, found = torch.full_like(widest, torch.inf), value
    for share in CLIPPING:
        tried = (value / (share * widest)).round().clamp(-limit, limit) * share * widest
        error = ((tried - value) * norms).square().sum(1, keepdim=True)
        found, best = torch.where(error < best, tried, found), torch.minimum(error, best)
    return found


def solved(target: Tensor, inputs: Inputs, kept: Tensor) -> Tensor:
    """Least squares on what is kept, exactly: few entries a row. Of unit channels, `-> [m, n]` of those as they are."""
    result, right = torch.zeros_like(target), target @ inputs.scaled
    counted = kept.sum(1)
    for rows in counted.argsort().split(ROWS_AT_ONCE):  # of about as many entries
        counts = counted[rows]
        places = kept[rows].int().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
        own = torch.arange(places.shape[1]) < counts[:, None]
        h = inputs.scaled[places[:, :, None], places[:, None, :]] * own[:, :, None] * own[:, None, :]
        h.diagonal(dim1=1, dim2=2).copy_(torch.where(own, inputs.scaled[0, 0], 1.0))
        wanted = torch.where(own, right[rows].gather(1, places), 0.0)
        found = torch.cholesky_solve(wanted[:, :, None], torch.linalg.cholesky(h))[:, :, 0]
        result[rows] = torch.zeros(len(rows), target.shape[1]).scatter_(1, places, found * own)
    return result / inputs.norms


def rotated(rows: Tensor) -> Tensor:
    """As planes see them. Being its own transpose's inverse, a rotation leaves E H E^T."""
    return torch.from_numpy(rotate_rows(rows.contiguous().numpy()))


class Linear:
    """One linear, and its blocks in each way."""

    def __init__(self, name: str, weight: Tensor, moments: LinearMoments) -> None:
        self.name, self.weight, self.gradient = name, weight, moments.gradient
        self.metric, self.inputs = input_metric(moments.inputs), Inputs(moments.inputs)
        self.planes, self.errors = self._planes(weight)
        self.tops: dict[Key, list[Block]] = {}  # one for each of DEPTHS
        self.befores: dict[Key, list[Block]] = {}
        self._turned = Inputs(self.metric.exact)

    def try_tiers(self) -> None:
        """Fill `tops` and `befores`."""
        for error in self.errors[: len(DEPTHS)]:
            self._top("as it is", error, self.inputs)
            self._top("rotated", rotated(error), self._turned)
        for density in BEFORE:
            self._before(density)

    @cached_property
    def _first(self) -> Tensor:
        """H's first eigenvector, `[n, 1]`."""
        return torch.linalg.eigh(self.inputs.h).eigenvectors[:, -1:]

    def _cost(self, error: Tensor, h: Tensor) -> float:
        return float(0.5 * torch.dot(self.gradient, objective(error, h)))

    def _planes(self, weight: Tensor) -> tuple[list[Block], list[Tensor]]:
        blocks, errors, grown = [], [], GrowingWeight()
        for level in encode_planes(self.name, weight, self.metric, uses=(), levels=len(DEPTHS) + 1, seed=SEED):
            grown.add(level.entry, level.payload)
            errors.append(weight - torch.from_numpy(grown.value()))
            blocks.append((padded(level.entry.nbytes), self._cost(errors[-1], self.inputs.h)))
        return blocks, errors

    def _top(self, basis: str, error: Tensor, inputs: Inputs) -> None:
        target = error * inputs.norms
        scores = (target @ inputs.scaled).square()
        for density in DENSITIES:
            found: dict[str, tuple[Tensor, Tensor]] = {}
            for charge in CHARGES:
                where = charge.split(",")[0]
                if where not in found:
                    kept = chosen(scores, self.gradient, density, charge)
                    found[where] = kept, solved(target, inputs, kept)
                kept, value = found[where]
                for values in KINDS:
                    left = self._cost(error - rounded(value, values, inputs.norms), inputs.h)
                    blocks = self.tops.setdefault((charge, basis, density, values), [])
                    blocks.append((tier_nbytes(kept, values, charge), left))

    def _before(self, density: float) -> None:
        scores = self.weight.abs() * self.inputs.norms
        encoded: dict[str, tuple[Tensor, list[Block]]] = {}
        for charge in CHARGES:
            where = charge.split(",")[0]
            if where not in encoded:
                kept = chosen(scores.square(), self.gradient, density, charge)
                rest = self.weight - rounded(self.weight * kept, "i8", self.inputs.norms)
                encoded[where] = kept, self._planes(rest)[0]
            kept, ((nbytes, left), *later) = encoded[where]
            key = (charge, "as it is", density, "i8")
            self.befores[key] = [(nbytes + tier_nbytes(kept, "i8", charge), left), *later]

    def corrected(self, depth: int, density: float) -> tuple[Tensor, int]:
        """The weight that planes and a tier of i4, rotated, as many entries in each row, make; the tier's least bytes.

        Without a density: planes and the error's part along H's first eigenvector.
        """
        error, inputs = self.errors[depth - BASE_PLANES], self._turned
        if not density:
            first = self._first
            return self.weight - error + error @ first @ first.T, 2 * sum(self.weight.shape)
        target = rotated(error) * inputs.norms
        kept = chosen((target @ inputs.scaled).square(), self.gradient, density, CHARGES[1])
        value = solved(target, inputs, kept)
        tier = torch.from_numpy(unrotate_rows(rounded(value, "i4", inputs.norms).numpy()))
        return self.weight - error + tier, tier_nbytes(kept, "i4", CHARGES[1])

    def with_tops(self, key: Key, depths: tuple[int, ...]) -> list[Block]:
        """The planes, and after some of them a tier."""
        blocks = []
        for depth, plane in enumerate(self.planes, BASE_PLANES):
            blocks.append(plane)
            if depth in depths:
                blocks.append(self.tops[key][depth - BASE_PLANES])
        return blocks


def curve(linears: dict[str, list[Block]], sizes: list[float]) -> list[float]:
    """The cost left at each of the `sizes` in bytes, of all blocks as `ebb add` orders them."""
    candidates, total = [], 0.0
    for name, blocks in linears.items():
        before = blocks[0][1]
        total += before
        for level, (nbytes, left) in enumerate(blocks):
            candidates.append(Candidate(name, level, nbytes, before - left))
            before = left
    found = [candidates[i] for i in stack_order(candidates).positions]
    edges = list(accumulate(candidate.nbytes for candidate in found))
    costs = list(accumulate((-candidate.gain for candidate in found), initial=total))[1:]
    start = len(linears) - 1  # of levels 0, which have no gain here
    return [float(np.interp(size, edges[start:], costs[start:])) for size in sizes]


def compare_rates(report: Report, linears: list[Linear]) -> float:
    """Gain by byte of tiers by that of the next plane; the most that our blocks reach."""
    reached = 0.0
    for i, depth in enumerate(DEPTHS):
        before = sum(linear.planes[i][1] for linear in linears)
        after = sum(linear.planes[i + 1][1] for linear in linears)
        nbytes = sum(linear.planes[i + 1][0] for linear in linears)
        text = f"{before:.4f} -> {after:.4f} nats in {nbytes / 1e6:.2f} MB"
        report.note(f"{depth} planes, the next one", text, [before, after, nbytes])
        rate = (before - after) / nbytes
        for charge in CHARGES:
            found, texts = {}, []
            for density in DENSITIES:
                for key in (key for key in linears[0].tops if (key[0], key[2]) == (charge, density)):
                    left = sum(linear.tops[key][i][1] for linear in linears)
                    size = sum(linear.tops[key][i][0] for linear in linears)
                    found[key] = (before - left) / size / rate
                ratio, best = max((found[key], key) for key in found if key[2] == density)
                texts.append(f"{density:.2%} {ratio:.2f} ({best[1]}, {best[3]})")
            if charge == CHARGES[0]:
                reached = max(reached, *found.values())
            report.note(f"{depth} planes, {charge}", "; ".join(texts), [[*key, found[key]] for key in found])
    return reached


def compare_orders(report: Report, linears: list[Linear]) -> dict[str, float]:
    """The cost at equal bytes by that of planes alone, for each charge and density; the least of each charge."""
    weights = sum(linear.weight.numel() for linear in linears)
    sizes = [bits * weights / 8 for bits in SIZES]
    plain = curve({linear.name: linear.planes for linear in linears}, sizes)
    report.note("bits a weight", " ".join(f"{bits:.1f}" for bits in SIZES))
    report.note("planes alone, nats", " ".join(f"{cost:.4f}" for cost in plain), plain)
    least: dict[str, float] = {}
    for way in ("top", "before"):
        for charge in CHARGES:
            for density in DENSITIES if way == "top" else BEFORE:
                rows = []
                for key, depths, blocks in tried(way, linears, charge, density):
                    ratios = [cost / other for cost, other in zip(curve(blocks, sizes), plain, strict=True)]
                    rows.append((min(ratios), ratios, key, depths))
                low, ratios, key, depths = min(rows, key=lambda row: row[0])
                text = " ".join(f"{ratio:.2f}" for ratio in ratios)
                detail = f"; {key[1]}, {key[3]}, after {depths}" if depths else ""
                report.note(f"{way}, {charge}, {density:.2%}", text + detail, [[*row] for row in rows])
                name = f"{way}, {charge}"
                least[name] = min(least.get(name, low), low)
    return least


def tried(
    way: str, linears: list[Linear], charge: str, density: float
) -> Iterator[tuple[Key, tuple[int, ...], dict[str, list[Block]]]]:
    """What is tried at a density: key, the depths that have tiers, and every linear's blocks."""
    found = linears[0].tops if way == "top" else linears[0].befores
    for key in (key for key in found if (key[0], key[2]) == (charge, density)):
        if way == "before":
            yield key, (), {linear.name: linear.befores[key] for linear in linears}
            continue
        for depths in (DEPTHS, *((depth,) for depth in DEPTHS)):
            yield key, depths, {linear.name: linear.with_tops(key, depths) for linear in linears}


def compare_quality(report: Report, linears: list[Linear]) -> None:
    """KL on held-out text, where all linears have as many planes, and a tier or not."""
    checkpoint = open_checkpoint(DEMO)
    demo = Demo(checkpoint, Original(checkpoint, heldout_tokens()[::2]))
    weights = sum(linear.weight.numel() for linear in linears)
    plain_kl, plain_nbytes, tiers = [], [], []
    for depth in (*DEPTHS, DEPTHS[-1] + 1):
        level = depth - BASE_PLANES
        nbytes = sum(nbytes for linear in linears for nbytes, _ in linear.planes[: level + 1])
        plain = demo.with_weights({linear.name: linear.weight - linear.errors[level] for linear in linears}).mean_kl
        report.note(f"KL, {depth} planes", f"{plain:.5f} nats, {8 * nbytes / weights:.2f} bits", [plain, nbytes])
        plain_kl.append(plain)
        plain_nbytes.append(nbytes)
        for density in (0.0, *BEFORE):
            found = {linear.name: linear.corrected(depth, density) for linear in linears}
            more = sum(size for _, size in found.values())
            kl = demo.with_weights({name: weight for name, (weight, _) in found.items()}).mean_kl
            name = f"KL, {depth} planes and {f'a tier of {density:.2%}' if density else 'direction'}"
            report.note(name, f"{kl:.5f} nats, {8 * (nbytes + more) / weights:.2f} bits", [kl, nbytes + more])
            tiers.append((name, nbytes + more, kl))
    for name, nbytes, kl in tiers:
        if nbytes <= plain_nbytes[-1]:
            ratio = kl / float(np.exp(np.interp(nbytes, plain_nbytes, np.log(plain_kl))))
            report.note(f"{name}, by planes in as many bytes", f"{ratio:.3f}", ratio)


def main() -> int:
    """All linears' KL, then the gains of some, one after the other."""
    report, linears, begun = Report("A sparse tier on top of planes"), [], time.monotonic()
    checkpoint = open_checkpoint(DEMO)
    known = [str(i) for i in range(checkpoint.architecture.layers)]
    layers = os.environ.get("EBBFLOW_BENCH_LAYERS", LAYERS).split()
    if unknown := set(layers) - set(known):
        sys.exit(f"EBBFLOW_BENCH_LAYERS names {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    with torch.no_grad():
        for name, weight, moments in calibrated(checkpoint):
            linears.append(Linear(name, weight, moments))
        compare_quality(report, linears)
        some = [linear for linear in linears if linear.name.split(".")[1] in layers]
        for linear in some:
            linear.try_tiers()
            print(f"  {linear.name}, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    report.note("gains and orders", f"of layers {', '.join(layers)}", layers)
    reached = compare_rates(report, some)
    for name, ratio in compare_orders(report, some).items():
        report.note(f"{name}: least cost by planes'", f"{ratio:.3f}", ratio)
    report.bar("hybrid_rate_in_our_blocks_by_the_next_plane", reached, "<=", CHECKED)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
