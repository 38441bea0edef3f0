"""Tokens per second through the real daemon, at several sizes, and the matrix product against a plain memory read.

Run: .venv/bin/python bench/speed.py [--json FILE] [--check]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from ebbflow.client import Client
from ebbflow.daemon.library.add import add_model
from ebbflow.formats.messages import AddModel

from places import CACHE, DEMO, daemon, full_shape
from report import Report


def demo() -> Path:
    """The demo as a library model, made once."""
    library = CACHE / "library"
    if not (library / "pystd-16m").exists():
        library.mkdir(parents=True, exist_ok=True)
        request = AddModel(id=0, source=str(DEMO), name="pystd-16m")
        add_model(request, library, CACHE / "jobs", lambda message: None)
    return library / "pystd-16m"


def read_gigabytes_per_second() -> float:
    """A plain sum over 400 MB with one thread: what memory gives to a simple reader."""
    data = np.ones(50_000_000, np.int64)
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - began)
    return data.nbytes / best / 1e9


def decode(client: Client, model: str, tokens: int) -> float:
    """Tokens per second after the first."""
    with client.generate(model, "hello", max_tokens=tokens) as stream:
        stream.text()
    done = stream.result
    return (done.tokens - 1) / (done.seconds - done.seconds_to_first)


def prefill(client: Client, model: str, prompt: str) -> tuple[int, float]:
    """Prompt tokens, and how many a second."""
    with client.generate(model, prompt, max_tokens=1) as stream:
        stream.text()
    done = stream.result
    return done.prompt_tokens, done.prompt_tokens / done.seconds_to_first


def main() -> int:
    """Measure and report."""
    report = Report("Speed through the daemon (portable kernels)")
    plain = read_gigabytes_per_second()
    report.note("plain read, one thread", f"{plain:.1f} GB/s", plain)
    with daemon(demo(), full_shape()) as client:
        for model, tokens in (("pystd-16m", 200), (full_shape().name, 10)):
            decode(client, model, 5)
            for share in ("55%", "100%"):
                resized = client.resize(model, share)
                assert resized.residency is not None
                held = resized.residency.nbytes
                speeds = sorted(decode(client, model, tokens) for _ in range(3))
                rate = held * speeds[1] / 1e9
                text = f"{speeds[1]:.1f} tok/s, {rate:.2f} GB/s of weights"
                report.note(f"{model}, {held / 1e6:.0f} MB, decode", text, speeds)
            count, speed = prefill(client, model, "x = 1\n" * 40)
            report.note(f"{model}, prefill of {count} tokens", f"{speed:.0f} tok/s", speed)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
