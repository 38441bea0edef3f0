"""What rounding costs on the demo model: keys and values as int8, and activations as int8, at all of it and at half.

Rows differ in nothing but what is rounded: the same resident blocks read the same held-out text (`quality`'s), by the
kernels that serve. Each is compared with the one it would replace, token by token: KL, and by how much perplexity
grows, with its standard error (window by window, as tokens of one window are not independent).

Run: .venv/bin/python bench/accuracy.py [--json FILE] [--check]
"""
# ruff: noqa: E402 - numba reads its settings when it is first imported

from __future__ import annotations

import sys
from math import sqrt
from typing import Final, Literal

from ebbflow.kernels.cache import use_cache

from places import CACHE, demo_model

use_cache(CACHE / "accuracy")

import numpy as np
from numpy.typing import NDArray
from quality import heldout_tokens

from ebbflow.daemon.engine.batch import Batch
from ebbflow.daemon.engine.kv import KvCache, blocks_for
from ebbflow.daemon.engine.sequences import Piece, Sequence
from ebbflow.daemon.engine.serving import ServingNetwork
from ebbflow.daemon.worker.processors import usable_threads
from ebbflow.daemon.worker.resident import Resident
from ebbflow.formats.architecture import Architecture
from ebbflow.formats.manifest import STACK, read_manifest
from ebbflow.formats.stack import read_stack
from ebbflow.kernels.threads import set_threads

from report import Report

F64 = NDArray[np.float64]
SIZES: Final = {"all": 1.0, "half": 0.5}
SERVED, SERVED_I8 = "int8 activations, f16 KV", "int8 activations, i8 KV"
EXACT, EXACT_I8, YARDSTICK = "float activations, f16 KV", "float activations, i8 KV", "float activations, f32 KV"
ROWS: Final[dict[str, tuple[bool, Literal["f16", "i8", "f32"]]]] = {  # whether exact, and how KV is stored
    YARDSTICK: (True, "f32"),
    EXACT: (True, "f16"),
    EXACT_I8: (True, "i8"),
    SERVED: (False, "f16"),
    SERVED_I8: (False, "i8"),
}
COMPARED: Final = ((EXACT, YARDSTICK), (EXACT_I8, EXACT), (SERVED_I8, SERVED), (SERVED, EXACT), (SERVED_I8, YARDSTICK))
BARS: Final = {(SERVED, EXACT): "int8_activations", (SERVED_I8, SERVED): "i8_kv"}
MOST: Final = 0.3  # percent of perplexity


class Reader:
    """Reads windows of text, one at a time."""

    def __init__(self, a: Architecture, resident: Resident, exact: bool, kv: Literal["f16", "i8", "f32"]) -> None:
        threads = set_threads(usable_threads())
        self._a, self._threads = a, threads
        self._network, self._kv = ServingNetwork(a, resident, threads, exact), KvCache(a, kv)

    def read(self, tokens: list[int]) -> F64:
        """Log-probabilities `[T - 1, v]` of what follows each token but the last."""
        blocks = self._kv.allocate(blocks_for(len(tokens)))
        piece = Piece(Sequence(0, tokens, len(tokens), blocks=blocks), 0, len(tokens))
        batch = Batch([piece], self._kv.array, self._a, self._threads)
        logits = self._network.logits(batch, list(range(len(tokens) - 1))).astype(np.float64)
        self._kv.free(blocks)
        logits -= logits.max(axis=1, keepdims=True)
        found: F64 = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return found


def measure(report: Report, size: str, a: Architecture, resident: Resident) -> None:
    """All comparisons at the blocks that are resident."""
    readers = {name: Reader(a, resident, *choice) for name, choice in ROWS.items()}
    losses: dict[str, list[float]] = {name: [] for name in ROWS}
    divergences: dict[tuple[str, str], list[float]] = {pair: [] for pair in COMPARED}
    for window in heldout_tokens().tolist():
        found = {name: reader.read(window) for name, reader in readers.items()}
        for name, logs in found.items():
            losses[name].append(-float(logs[np.arange(len(window) - 1), window[1:]].mean()))
        for new, old in COMPARED:
            divergences[new, old].append(float((np.exp(found[old]) * (found[old] - found[new])).sum(axis=1).mean()))
    for name in ROWS:
        report.note(f"{size}: {name}", f"perplexity {np.exp(np.mean(losses[name])):.4f}", losses[name])
    for (new, old), kl in divergences.items():
        steps = np.subtract(losses[new], losses[old])
        growth, error = (100 * np.expm1(x) for x in (steps.mean(), steps.std() / sqrt(len(steps))))
        text = f"KL {np.mean(kl):.2e} nats, perplexity {growth:+.4f} % (standard error {error:.4f})"
        report.note(f"{size}: {new}, by {old}", text, [kl, steps.tolist()])
        if (new, old) in BARS:
            report.bar(f"perplexity_percent_{BARS[new, old]}_{size}", float(growth), "<=", MOST)


def main() -> int:
    """At all of the stack, and at half of its bytes."""
    report, folder = Report("What rounding costs on the demo model"), demo_model()
    a, resident = read_manifest(folder).architecture, Resident(read_stack(folder / STACK))
    for size, share in SIZES.items():
        blocks = resident.stack.blocks_within(int(share * resident.stack.nbytes))
        resident.shrink(blocks)
        while resident.blocks < blocks:
            resident.grow(blocks)
        report.note(f"{size}: resident", f"{resident.nbytes / 1e6:.2f} MB of {resident.stack.nbytes / 1e6:.2f}")
        measure(report, size, a, resident)
    resident.close()
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
