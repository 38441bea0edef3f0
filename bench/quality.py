"""The demo model at several sizes: KL per token to the original, loss and perplexity on held-out standard library text.

The text is read from the running Python's own standard library (the files named in examples/pystd-16m/heldout.txt).

Run: .venv/bin/python bench/quality.py [--json FILE] [--check]
"""

from __future__ import annotations

import sys
import sysconfig
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer

from ebbflow.daemon.library.add import add_model
from ebbflow.daemon.library.measure import measure_curve
from ebbflow.formats.checkpoint import open_checkpoint
from ebbflow.formats.manifest import STACK
from ebbflow.formats.messages import AddModel
from ebbflow.formats.stack import read_stack

from places import CACHE, DEMO
from report import Report

WINDOW, WINDOWS = 256, 40
SHARES = (0.3, 0.45, 0.6, 0.8, 1.0)


def heldout_tokens() -> torch.Tensor:
    """Token ids `[WINDOWS, WINDOW]`, spread evenly over the held-out files."""
    library = Path(sysconfig.get_paths()["stdlib"])
    names = (DEMO / "heldout.txt").read_text().split()
    text = "".join((library / name).read_text(errors="replace") for name in names if (library / name).exists())
    ids = torch.tensor(Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(text).ids)
    starts = torch.linspace(0, len(ids) - WINDOW, WINDOWS).long()
    return torch.stack([ids[start : start + WINDOW] for start in starts])


def main() -> int:
    """Add the demo to a library of its own and measure its prefixes."""
    report = Report("Quality of the demo model by size")
    checkpoint = open_checkpoint(DEMO)
    with tempfile.TemporaryDirectory() as library:
        request = AddModel(id=0, source=str(DEMO), name="demo")
        summary = add_model(request, Path(library), CACHE / "jobs", lambda message: None)
        stack = read_stack(Path(library) / "demo" / STACK)
        blocks = [stack.blocks_within(round(stack.nbytes * share)) for share in SHARES]
        curve = measure_curve(checkpoint, stack, heldout_tokens(), blocks)
    report.note("original", f"{summary.original_nbytes / 1e6:.1f} MB")
    for point in curve:
        text = f"{point.nbytes / 1e6:.1f} MB: KL {point.kl:.4f} nats, perplexity {point.perplexity:.2f}"
        report.note(f"{point.nbytes / stack.nbytes:.0%} of the stack", text, [point.nbytes, point.kl, point.perplexity])
    falling = max(later.kl - earlier.kl for earlier, later in pairwise(curve))
    report.bar("largest_KL_rise_with_size", falling, "<=", 0.0)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
