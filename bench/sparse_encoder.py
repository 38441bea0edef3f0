"""The sentence encoder all-MiniLM-L6-v2 pruned, before any retraining: each method at 50, 60 and 70 %, 2:4 and 4:8.

Calibrated and measured on doc strings, as `quality_encoder`; errors are 1 - cosine to the original's embeddings, and
the ten nearest neighbours that stay are counted. H is that of tokens, which is what the methods were published with and
what `ebb add` has; `by-text` prunes half for `minilm.Encoder.moments`' other one. `left` is as in `sparse_quality`, by
the H that was pruned for. Embeddings, norms and biases are the original's.

EBBFLOW_BENCH_ROWS names what is done, of: 50% 60% 70% 2:4 4:8 by-text.

Needs the extra `bench`. Run: .venv/bin/python bench/sparse_encoder.py [--json FILE] [--check]
"""

from __future__ import annotations

import os
import sys

import torch
from sparse_quality import Judge, compare_methods, configurations, linears_of
from torch import Tensor

from ebbflow.formats.pruning import METHODS, Pruning

from minilm import Encoder
from report import Report


def judge_of(encoder: Encoder) -> Judge:
    """1 - cosine, in the mean over texts."""

    def judge(weights: dict[str, Tensor]) -> tuple[float, str]:
        errors, overlap = encoder.score(weights)
        return float(errors.mean()), f"1 - cosine {float(errors.mean()):.4f}, neighbours {overlap:.3f}"

    return judge


def main() -> int:
    """By token, with bars; then what moments by text make of half."""
    report, encoder = Report("Quality of a pruned sentence encoder"), Encoder()
    known = [*(label for label, _, _ in configurations()), "by-text"]
    rows = os.environ.get("EBBFLOW_BENCH_ROWS", " ".join(known)).split()
    if unknown := set(rows) - set(known):
        sys.exit(f"EBBFLOW_BENCH_ROWS names {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    judge = judge_of(encoder)
    linears, by_text = (
        linears_of((name, weight, moments[name]) for name, weight in encoder.weights.items() if name in moments)
        for moments in encoder.moments(gradients="by-text" in rows)
    )
    compare_methods(report, "cosine", judge, linears, rows)
    for method in METHODS[1:] if "by-text" in rows else ():  # magnitude asks no moments
        found = by_text.pruned(Pruning(0.5, None, method))
        error, text = judge(by_text.rounded(found.weights, "i8"))
        report.note(f"50% {method} by text", f"{text}, left {found.left:.4f}", [error, found.left])
    return report.finish()


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
