"""The demo model at many sizes: KL per token to the original and perplexity on held-out standard library text.

Rows: the codec `nested`, every byte of the file counted; `bitstack` at a rank by shape, 1, 4 and 16, each in both
orders; rounding to the nearest int8 and int4; llama.cpp's quantised types, with an importance matrix from the tokens
that `nested` is calibrated on. At each of these, `nested` is cut to as many bytes or fewer, twice: all bytes, and
those of the linears alone, with embedding, head and norms original in both. The text is read from the running Python's
own standard library (the files named in examples/pystd-16m/heldout.txt).

EBBFLOW_BENCH_ROWS names what `nested` is compared with, of: nearest llama bitstack-shape bitstack-1 bitstack-4
bitstack-16. `llama` alone takes a few minutes, each `bitstack` about as long. llama.cpp is built once (`llama.py`), and
wants the packages of the extra `bench`.

Run: scripts/setup bench && .venv/bin/python bench/quality.py [--json FILE] [--check]
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Container, Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import exp, inf, log, sqrt
from pathlib import Path
from typing import Final

import numpy as np
import torch
from tokenizers import Tokenizer

from ebbflow.daemon.engine.dense import build_network
from ebbflow.daemon.library.add import add_model
from ebbflow.daemon.library.encode import layer_linears
from ebbflow.daemon.library.measure import Original, Quality, prefix_qualities
from ebbflow.daemon.library.order import order_entries
from ebbflow.daemon.library.progress import Reporter
from ebbflow.daemon.library.texts import sampled_texts
from ebbflow.formats.architecture import weight_shapes
from ebbflow.formats.checkpoint import Checkpoint, open_checkpoint
from ebbflow.formats.container import padded
from ebbflow.formats.manifest import STACK
from ebbflow.formats.messages import AddModel
from ebbflow.formats.stack import Stack, read_blocks, read_stack, write_stack

from places import CACHE, DEMO
from report import Report

WINDOW, WINDOWS = 256, 40
MEGABYTES = (4.5, 5, 5.5, 6, 6.5, 7, 8, 9, 10, 11, 12, 13, 14, 16, 20, 26)
ROWS = ("nearest", "llama", "bitstack-shape", "bitstack-1", "bitstack-4", "bitstack-16")
LLAMA_TYPES = ("IQ2_XS", "Q2_K", "IQ3_XXS", "Q3_K_S", "Q4_K_S")
LLAMA_BARS = ("Q2_K", "Q3_K_S", "Q4_K_S")
GROUP = 32  # weights that share a scale when rounded to int4
SEED: Final = 0


@dataclass(frozen=True)
class Size:
    """A model of so many bytes, and how it does on every token."""

    nbytes: int
    found: Quality

    @property
    def kl(self) -> float:
        """Nats per token."""
        return self.found.mean_kl

    def text(self) -> str:
        """For the report."""
        return f"KL {self.kl:.5f} nats, perplexity {self.found.perplexity:.3f}"

    def numbers(self) -> list[float]:
        """For the report's samples."""
        return [self.nbytes, self.kl, self.found.perplexity]


@dataclass(frozen=True)
class Demo:
    """The original, and the text that everything is measured on."""

    checkpoint: Checkpoint
    original: Original

    def with_weights(self, weights: dict[str, torch.Tensor]) -> Quality:
        """The quality with these weights, and the original's for what is not among them."""

        def tensor(name: str) -> torch.Tensor:
            return weights[name] if name in weights else self.checkpoint.tensor(name)

        return self.original.compare(build_network(self.checkpoint.architecture, tensor))

    def prefixes(self, stack: Stack, sizes: Iterable[float], exact: Container[str] = ()) -> list[Size]:
        """The largest prefixes within `sizes` bytes, each once, from the smallest; the base where not even that fits.

        Tensors in `exact` stay original, and their bytes are not counted.
        """
        counted = [0 if entry.tensor in exact else padded(entry.nbytes) for entry in stack.blocks]
        edges = list(accumulate(counted, initial=0))
        fits = {max(stack.base, np.searchsorted(edges, size, "right") - 1) for size in sizes}
        found = prefix_qualities(self.original, self.checkpoint, stack, sorted(map(int, fits)), exact)
        return [Size(edges[count], quality) for count, quality in found]


def heldout_tokens() -> torch.Tensor:
    """Token ids `[WINDOWS, WINDOW]`, spread evenly over the held-out files."""
    library = Path(sysconfig.get_paths()["stdlib"])
    names = (DEMO / "heldout.txt").read_text().split()
    text = "".join((library / name).read_text(errors="replace") for name in names if (library / name).exists())
    ids = torch.tensor(Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(text).ids)
    starts = torch.linspace(0, len(ids) - WINDOW, WINDOWS).long()
    return torch.stack([ids[start : start + WINDOW] for start in starts])


def add(codec: str, rank: int | None, library: Path) -> tuple[Stack, float]:
    """The demo's stack, made in a library of its own; and the seconds that took."""
    request = AddModel(id=0, source=str(DEMO), name="demo", codec=codec, rank=rank, seed=SEED)
    library.mkdir()
    begun = time.monotonic()
    add_model(request, library, CACHE / "jobs", lambda message: None)
    return read_stack(library / "demo" / STACK), time.monotonic() - begun


def reordered(demo: Demo, stack: Stack, rule: str) -> Stack:
    """The stack that `ebb add --order RULE` writes: the same blocks in another order, in a file beside it."""
    blocks = list(read_blocks(stack))
    index, positions = order_entries(demo.checkpoint.architecture, [entry for entry, _ in blocks], rule)
    path = stack.path.with_name(f"{rule}-{STACK}")
    write_stack(path, index, lambda i: blocks[positions[i]][1])
    return read_stack(path)


def nearest(demo: Demo, bits: int) -> Size:
    """All matrices rounded to the nearest: int8 with a scale a row, int4 with one for 32 weights.

    The embedding, which is also the head, is int8 in both.
    """
    weights, nbytes = {}, 0
    for name, shape in weight_shapes(demo.checkpoint.architecture).items():
        weight = demo.checkpoint.tensor(name)
        if len(shape) > 1:
            width, top = (GROUP, 7) if bits == 4 and name != "embed" else (shape[1], 127)
            groups = weight.reshape(-1, width)
            scale = groups.abs().amax(1, keepdim=True).clamp_min(1e-30) / top
            weights[name] = ((groups / scale).round() * scale).reshape(shape)
            nbytes += (4 if top == 7 else 8) * weight.numel() // 8 + 2 * len(groups)
        else:
            nbytes += 2 * weight.numel()
    return Size(nbytes, demo.with_weights(weights))


def bytes_at(curve: list[Size], kl: float) -> float | None:
    """The bytes at which a curve reaches `kl`, between its points by logarithms; None outside of it."""
    for before, after in pairwise(curve):
        if before.kl >= kl >= after.kl and before.kl > after.kl:
            share = log(before.kl / kl) / log(before.kl / after.kl)
            return exp(log(before.nbytes) + share * log(after.nbytes / before.nbytes))
    return None


def rise(before: Size, after: Size) -> float:
    """By how many standard errors the KL grows; window by window, as tokens of one window are not independent."""
    steps = (after.found.kl - before.found.kl).reshape(WINDOWS, -1).mean(1)
    error = float(steps.std()) / sqrt(WINDOWS)
    return float(steps.mean()) / error if error else 0.0


def compare_llama(report: Report, demo: Demo, stack: Stack) -> list[Size]:
    """Rows, ratios and bars; the sizes at which `stack` was measured with all bytes counted."""
    from llama_weights import quantise  # wants the extra `bench`

    reporter = Reporter(0, 0, lambda message: None, time.monotonic)
    checkpoint = demo.checkpoint
    texts = sampled_texts(checkpoint, checkpoint.checksum(), SEED, CACHE / "jobs", reporter)
    models = quantise(checkpoint, texts.calibration, LLAMA_TYPES)
    linears = set(layer_linears(checkpoint.architecture))
    measured = []
    for kind, counted in (("total", set(weight_shapes(checkpoint.architecture))), ("linears", linears)):
        others = set(weight_shapes(checkpoint.architecture)) - counted
        theirs = {}
        for name, model in models.items():
            weights = {key: weight for key, weight in model.weights.items() if key in counted}
            theirs[name] = Size(sum(model.nbytes[key] for key in counted), demo.with_weights(weights))
        ours = demo.prefixes(stack, [size.nbytes for size in theirs.values()], others)
        for name, peer in theirs.items():
            label = f"llama.cpp {name}, {kind}: {peer.nbytes / 1e6:.3f} MB"
            report.note(label, f"{peer.text()} ({models[name].summary(counted)})", peer.numbers())
            best = max(
                (size for size in ours if size.nbytes <= peer.nbytes), key=lambda size: size.nbytes, default=None
            )
            ratio = best.kl / peer.kl if best else inf
            if best:
                text = f"{best.text()}, {ratio:.3f} of theirs ({rise(peer, best):+.1f} standard errors)"
                report.note(f"  nested, {kind}: {best.nbytes / 1e6:.3f} MB", text, best.numbers())
            if name in LLAMA_BARS:
                report.bar(f"KL_by_llama_{name}_{kind}", ratio, "<=", 1.0)
        if kind == "total":
            measured = ours
    return measured


def compare_bitstack(report: Report, demo: Demo, nested: list[Size], ranks: list[str], folder: Path) -> None:
    """Rows of both orders, and the bytes that `nested` takes by those of whatever is best at the same KL."""
    rows: dict[str, list[Size]] = {}
    for rank in ranks:
        stack, seconds = add("bitstack", None if rank == "shape" else int(rank), folder / f"bitstack-{rank}")
        report.note(f"bitstack rank {rank}: added in", f"{seconds:.0f} s", seconds)
        for order in ("gain", "paper"):
            name = f"bitstack rank {rank}, {order}"
            rows[name] = demo.prefixes(reordered(demo, stack, order), sizes(stack))
            show(report, name, rows[name])
    ratios = []
    for point in nested:
        others = {name: found for name in rows if (found := bytes_at(rows[name], point.kl)) is not None}
        if others:
            best = min(others, key=lambda name: others[name])
            ratios.append(point.nbytes / others[best])
            report.note(f"bytes by bitstack's at KL {point.kl:.5f}", f"{ratios[-1]:.2f} ({best})", ratios[-1])
    report.bar("nested_bytes_by_bitstack_worst", max(ratios, default=inf), "<=", 0.65)
    report.bar("nested_bytes_by_bitstack_median", float(np.median(ratios or [inf])), "<=", 0.65)


def sizes(stack: Stack) -> list[float]:
    """Where a stack is measured: base, whole, and every size of `MEGABYTES` between."""
    return [stack.base_nbytes, *(size * 1e6 for size in MEGABYTES if size * 1e6 >= stack.base_nbytes), stack.nbytes]


def show(report: Report, name: str, curve: list[Size]) -> None:
    """A note for each size."""
    for size in curve:
        report.note(f"{name}: {size.nbytes / 1e6:.2f} MB", size.text(), size.numbers())


def compare(report: Report, rows: list[str], folder: Path) -> None:
    """Measure every row, then compare."""
    checkpoint = open_checkpoint(DEMO)
    demo = Demo(checkpoint, Original(checkpoint, heldout_tokens()))
    itself = demo.with_weights({}).perplexity
    report.note("original", f"{checkpoint.nbytes / 1e6:.1f} MB, perplexity {itself:.3f}", itself)
    stack, seconds = add("nested", None, folder / "nested")
    report.note("nested: added in", f"{seconds:.0f} s", seconds)
    nested = demo.prefixes(stack, sizes(stack))
    show(report, "nested", nested)
    for bits in (8, 4) if "nearest" in rows else ():
        size = nearest(demo, bits)
        equal = bytes_at(nested, size.kl)
        text = size.text() + (f"; nested has this KL at {equal / size.nbytes:.2f} of the bytes" if equal else "")
        report.note(f"nearest int{bits}: {size.nbytes / 1e6:.2f} MB", text, size.numbers())
    if "llama" in rows:
        nested += compare_llama(report, demo, stack)
    ranks = [row.removeprefix("bitstack-") for row in rows if row.startswith("bitstack-")]
    if ranks:
        compare_bitstack(report, demo, nested, ranks, folder)
    ordered = sorted({size.nbytes: size for size in nested}.values(), key=lambda size: size.nbytes)
    worst = max(rise(before, after) for before, after in pairwise(ordered))
    report.bar("largest_rise_with_size_in_standard_errors", worst, "<=", 2.0)
    report.bar("perplexity_of_the_whole_stack_by_the_original", ordered[-1].found.perplexity / itself, "<=", 1.005)


def main() -> int:
    """Run, in a folder that goes away."""
    report = Report("Quality of the demo model by size")
    rows = os.environ.get("EBBFLOW_BENCH_ROWS", " ".join(ROWS)).split()
    if unknown := set(rows) - set(ROWS):
        sys.exit(f"EBBFLOW_BENCH_ROWS names {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        compare(report, rows, Path(folder))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
