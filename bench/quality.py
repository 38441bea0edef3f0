"""The demo model at many sizes: KL per token to the original and perplexity on held-out standard library text.

Rows: the codecs `nested` and `bitstack` (rank by shape, 1, 4 and 16), every byte of the file counted, and rounding to
the nearest int8 and int4. The text is read from the running Python's own standard library (the files named in
examples/pystd-16m/heldout.txt). EBBFLOW_BENCH_RANKS names the ranks of `bitstack`; each takes a minute or two.

Run: .venv/bin/python bench/quality.py [--json FILE] [--check]
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
import time
from itertools import pairwise
from math import exp, log
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from ebbflow.daemon.engine.dense import build_network
from ebbflow.daemon.library.add import add_model
from ebbflow.daemon.library.measure import Original, measure_curve
from ebbflow.formats.architecture import weight_shapes
from ebbflow.formats.checkpoint import Checkpoint, open_checkpoint
from ebbflow.formats.manifest import STACK, CurvePoint
from ebbflow.formats.messages import AddModel
from ebbflow.formats.stack import read_stack

from places import CACHE, DEMO
from report import Report

WINDOW, WINDOWS = 256, 40
MEGABYTES = (6, 6.5, 7, 8, 9, 10, 11, 12, 13, 14, 16, 20, 26)
RANKS = ("shape", "1", "4", "16")
GROUP = 32  # weights that share a scale when rounded to int4


def heldout_tokens() -> torch.Tensor:
    """Token ids `[WINDOWS, WINDOW]`, spread evenly over the held-out files."""
    library = Path(sysconfig.get_paths()["stdlib"])
    names = (DEMO / "heldout.txt").read_text().split()
    text = "".join((library / name).read_text(errors="replace") for name in names if (library / name).exists())
    ids = torch.tensor(Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(text).ids)
    starts = torch.linspace(0, len(ids) - WINDOW, WINDOWS).long()
    return torch.stack([ids[start : start + WINDOW] for start in starts])


def codec_curve(codec: str, rank: int | None, tokens: torch.Tensor) -> tuple[tuple[CurvePoint, ...], float]:
    """Add the demo to a library of its own and measure its prefixes; and the seconds that adding took."""
    with tempfile.TemporaryDirectory() as library:
        request = AddModel(id=0, source=str(DEMO), name="demo", codec=codec, rank=rank)
        begun = time.monotonic()
        add_model(request, Path(library), CACHE / "jobs", lambda message: None)
        seconds = time.monotonic() - begun
        stack = read_stack(Path(library) / "demo" / STACK)
        sizes = [stack.base_nbytes, *(round(size * 1e6) for size in MEGABYTES), stack.nbytes]
        blocks = sorted({stack.blocks_within(size) for size in sizes})
        return measure_curve(open_checkpoint(DEMO), stack, tokens, blocks), seconds


def rounded(checkpoint: Checkpoint, bits: int, tokens: torch.Tensor) -> tuple[int, float]:
    """Bytes and KL of all matrices rounded to the nearest: int8 with a scale a row, int4 with one for 32 weights.

    The embedding, which is also the head, is int8 in both.
    """
    a = checkpoint.architecture
    weights, nbytes = {}, 0
    for name, shape in weight_shapes(a).items():
        weight = checkpoint.tensor(name)
        if len(shape) > 1:
            width, top = (GROUP, 7) if bits == 4 and name != "embed" else (shape[1], 127)
            groups = weight.reshape(-1, width)
            scale = groups.abs().amax(1, keepdim=True).clamp_min(1e-30) / top
            weight = ((groups / scale).round() * scale).reshape(shape)
            nbytes += (4 if top == 7 else 8) * weight.numel() // 8 + 2 * len(groups)
        else:
            nbytes += 2 * weight.numel()
        weights[name] = weight
    return nbytes, Original(checkpoint, tokens).compare(build_network(a, weights.__getitem__)).mean_kl


def bytes_at(curve: tuple[CurvePoint, ...], kl: float) -> float | None:
    """The bytes at which a curve reaches `kl`, between its points by logarithms; None outside of it."""
    for before, after in pairwise(curve):
        if before.kl >= kl >= after.kl and before.kl > after.kl:
            share = log(before.kl / kl) / log(before.kl / after.kl)
            return exp(log(before.nbytes) + share * log(after.nbytes / before.nbytes))
    return None


def main() -> int:
    """Measure every row, then compare."""
    report, tokens, checkpoint = Report("Quality of the demo model by size"), heldout_tokens(), open_checkpoint(DEMO)
    with torch.no_grad():
        itself = Original(checkpoint, tokens).compare(build_network(checkpoint.architecture, checkpoint.tensor))
    report.note("original", f"{checkpoint.nbytes / 1e6:.1f} MB, perplexity {itself.perplexity:.3f}", itself.perplexity)
    rows: dict[str, tuple[CurvePoint, ...]] = {}
    ranks = os.environ.get("EBBFLOW_BENCH_RANKS", " ".join(RANKS)).split()
    for name, codec, rank in [("nested", "nested", None)] + [
        (f"bitstack {rank}", "bitstack", None if rank == "shape" else int(rank)) for rank in ranks
    ]:
        with torch.no_grad():
            rows[name], seconds = codec_curve(codec, rank, tokens)
        report.note(f"{name}: added in", f"{seconds:.0f} s", seconds)
        for p in rows[name]:
            text = f"KL {p.kl:.5f} nats, perplexity {p.perplexity:.3f}"
            report.note(f"{name}: {p.nbytes / 1e6:.2f} MB", text, [p.nbytes, p.kl, p.perplexity])
    with torch.no_grad():
        for bits in (8, 4):
            nbytes, kl = rounded(checkpoint, bits, tokens)
            equal = bytes_at(rows["nested"], kl)
            text = f"KL {kl:.5f} nats" + (f"; nested has it at {equal / nbytes:.2f} of the bytes" if equal else "")
            report.note(f"nearest int{bits}: {nbytes / 1e6:.2f} MB", text, [nbytes, kl])
    ratios = []
    for point in rows["nested"]:
        others = [found for name in rows if name != "nested" if (found := bytes_at(rows[name], point.kl)) is not None]
        if others:
            ratios.append(point.nbytes / min(others))
            report.note(f"bytes of nested / bitstack at KL {point.kl:.5f}", f"{ratios[-1]:.2f}", ratios[-1])
    report.bar("nested_bytes_by_bitstack_worst", max(ratios), "<=", 0.65)
    report.bar("nested_bytes_by_bitstack_median", float(np.median(ratios)), "<=", 0.65)
    rise = max(later.kl - earlier.kl for earlier, later in pairwise(rows["nested"]))
    report.bar("largest_KL_rise_with_size", rise, "<=", 0.0)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
