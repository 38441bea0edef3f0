"""What it costs to continue on keys and values that were computed at another size of the model: the demo's bands.

Each held-out window's first half is computed with the model at the lower end of one quality band (`engine/bands`), its
second half at the lower end of another, for all pairs, and the second half's log-probabilities are compared with those
of the whole model for both: KL, in nats a token. The scheduler lets a request use prefixes of its own band or a better
one; the rows below and above the diagonal say what that gives and what the rest would cost. One more row does it
within bands: first half at a band's lower end, second at its upper.

Run: .venv/bin/python bench/bands.py [--json FILE] [--check]
"""
# ruff: noqa: E402 - numba reads its settings when it is first imported

from __future__ import annotations

import sys

from ebbflow.kernels.cache import use_cache

from places import CACHE, demo_model

use_cache(CACHE / "accuracy")

import numpy as np
from numpy.typing import NDArray
from quality import heldout_tokens

from ebbflow.daemon.engine.bands import Bands
from ebbflow.daemon.engine.batch import Batch
from ebbflow.daemon.engine.kv import KvCache, blocks_for
from ebbflow.daemon.engine.sequences import Piece, Sequence
from ebbflow.daemon.engine.serving import ServingNetwork
from ebbflow.daemon.worker.processors import usable_threads
from ebbflow.daemon.worker.resident import Resident
from ebbflow.formats.manifest import STACK, Manifest, read_manifest
from ebbflow.formats.stack import read_stack
from ebbflow.kernels.threads import set_threads

from report import Report

F64 = NDArray[np.float64]
MOST_GROWTH = 1.02  # of KL, by using a prefix of a better band instead of computing it


class Halves:
    """Windows of text whose halves are computed at different sizes of the model."""

    def __init__(self, manifest: Manifest, resident: Resident) -> None:
        self._a, self._resident = manifest.architecture, resident
        self._threads = set_threads(usable_threads())
        while resident.blocks < resident.stack.base:
            resident.grow(resident.stack.base)
        self._network = ServingNetwork(self._a, resident, self._threads)
        self._kv = KvCache(self._a)
        self._windows = heldout_tokens().tolist()
        self._half = len(self._windows[0]) // 2
        self._blocks = [list(self._kv.allocate(blocks_for(len(window)))) for window in self._windows]

    def first(self, blocks: int) -> None:
        """Compute all first halves with so many blocks resident."""
        self._compute(blocks, 0, self._half)

    def second(self, blocks: int) -> list[F64]:
        """Log-probabilities `[T / 2 - 1, v]` of each second half, on the first halves as they were computed last."""
        found = []
        for logits in self._compute(blocks, self._half, 2 * self._half - 1):
            logits -= logits.max(axis=1, keepdims=True)
            found.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
        return found

    def _compute(self, blocks: int, start: int, stop: int) -> list[F64]:
        self._resident.shrink(blocks)
        while self._resident.blocks < blocks:
            self._resident.grow(blocks)
        found = []
        for tokens, places in zip(self._windows, self._blocks, strict=True):
            piece = Piece(Sequence(0, tokens, len(tokens), blocks=places), start, stop - start)
            batch = Batch([piece], self._kv.array, self._a, self._threads)
            found.append(self._network.logits(batch, list(range(stop - start))).astype(np.float64))
        return found


def divergence(want: list[F64], found: list[F64]) -> float:
    """Mean KL of `found` from `want`, nats a token."""
    return float(np.mean([(np.exp(a) * (a - b)).sum(axis=1).mean() for a, b in zip(want, found, strict=True)]))


def main() -> int:
    """All pairs of bands, and both ends of each."""
    report, folder = Report("What it costs to continue in another quality band, on the demo model"), demo_model()
    manifest, resident = read_manifest(folder), Resident(read_stack(folder / STACK))
    base, every = resident.stack.base, len(resident.stack.blocks)
    bands = Bands(manifest.curve, base, every)
    sizes: dict[int, list[int]] = {}
    for blocks in range(base, every + 1):
        sizes.setdefault(bands.of(blocks), []).append(blocks)
    halves = Halves(manifest, resident)
    halves.first(every)
    want = halves.second(every)
    costs: dict[tuple[int, int], float] = {}
    for before, blocks in sizes.items():
        halves.first(blocks[0])
        for after, others in sizes.items():
            costs[before, after] = divergence(want, halves.second(others[0]))
        report.note(
            f"prefix of band {before}, continued in " + ", ".join(map(str, sizes)),
            "KL " + ", ".join(f"{costs[before, after]:.4f}" for after in sizes),
            [costs[before, after] for after in sizes],
        )
    for band, blocks in sizes.items():
        halves.first(blocks[0])
        across = divergence(want, halves.second(blocks[-1]))
        halves.first(blocks[-1])
        report.note(
            f"within band {band}: prefix at its lower end, continued at its upper",
            f"KL {across:.4f}; all at the upper {divergence(want, halves.second(blocks[-1])):.4f}",
            across,
        )
    growth = max(costs[better, band] / costs[band, band] for better in sizes for band in sizes if better > band)
    report.bar("kl_with_a_better_prefix_by_its_own", growth, "<=", MOST_GROWTH)
    resident.close()
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
