"""Tokens per second through the real daemon, on the demo and against llama.cpp on the 1.1B shape, at equal bytes.

For each of llama.cpp's file types our stack is cut to the bytes of that file's tensors, embedding and head included on
both sides. Rounds alternate between the two; medians are compared. Ours are seconds that a client sees (decode: after
the first token); theirs are `llama-bench`'s own, of the same number of threads. Both models are random, of one shape.

Needs the `bench` extra, and builds llama.cpp the first time. EBBFLOW_BENCH_TYPES names other file types. With
EBBFLOW_INSTRUCTIONS=avx2 both our kernels and llama.cpp are compiled without AVX-512, and no bar is set.

Run: .venv/bin/python bench/speed.py [--json FILE] [--check]
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
from asking import Ours, held
from llama_speed import full_gguf, tensor_nbytes, tokens_per_second

from ebbflow.client import Client

from places import daemon, demo_model, full_shape, keep_to_wished_instructions
from report import Report

TYPES = os.environ.get("EBBFLOW_BENCH_TYPES", "Q2_K Q3_K_S Q4_K_S").split()
CONTEXTS, PROMPTS = (128, 1024), (128, 512)
TOKENS, ROUNDS = 48, 3
AVX512 = os.environ.get("EBBFLOW_INSTRUCTIONS") != "avx2"
SIZES = (350, 450, 550, 650, 750)  # MB


def read_gigabytes_per_second() -> float:
    """A plain sum over 400 MB with one thread: what memory gives to a simple reader."""
    data = np.ones(50_000_000, np.int64)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - began)
    return data.nbytes / min(times) / 1e9


def compare(report: Report, what: str, ours: Callable[[], float], theirs: Callable[[], float]) -> float:
    """Rounds of both in turn; our median by theirs."""
    mine, peer = [], []
    for _ in range(ROUNDS):
        mine.append(ours())
        peer.append(theirs())
    ratio = statistics.median(mine) / statistics.median(peer)
    text = f"{statistics.median(mine):.1f} tok/s, llama.cpp {statistics.median(peer):.1f}: {ratio:.2f}x"
    report.note(what, text, [mine, peer])
    return ratio


def against_llama(report: Report, client: Client, threads: int) -> None:
    """Every file type: decode and prefill at its bytes."""
    model = full_shape().name
    ours = Ours(client, model)
    for kind in TYPES:
        path = full_gguf(kind)
        nbytes = tensor_nbytes(path)
        mine = held(client, model, f"{nbytes}B")
        report.note(f"{kind}: bytes", f"{mine / 1e6:.1f} MB, llama.cpp {nbytes / 1e6:.1f} MB", [mine, nbytes])
        for context in CONTEXTS:
            ratio = compare(
                report,
                f"{kind}: decode at context {context}",
                lambda context=context: ours.decode(context, TOKENS),
                lambda context=context, path=path: tokens_per_second(
                    path, threads, generate=TOKENS, depth=context, avx512=AVX512
                ),
            )
            if AVX512:
                report.bar(f"decode_by_llama_{kind}_at_{context}", ratio, ">=", 1.5)
        for prompt in PROMPTS:
            ratio = compare(
                report,
                f"{kind}: prefill of {prompt}",
                lambda prompt=prompt: ours.prefill(prompt),
                lambda prompt=prompt, path=path: tokens_per_second(path, threads, prompt=prompt, avx512=AVX512),
            )
            if AVX512:
                report.bar(f"prefill_by_llama_{kind}_of_{prompt}", ratio, ">=", 1.5)


def by_size(report: Report, client: Client, plain: float) -> None:
    """Decoding costs what is resident: a straight line."""
    model = full_shape().name
    ours, sizes, costs = Ours(client, model), [], []
    for size in SIZES:
        sizes.append(held(client, model, f"{size}MB"))
        speeds = sorted(ours.decode(128, TOKENS) for _ in range(ROUNDS))
        costs.append(1e3 / speeds[ROUNDS // 2])
        share = sizes[-1] / costs[-1] / 1e6 / plain
        text = f"{speeds[ROUNDS // 2]:.1f} tok/s, {costs[-1]:.1f} ms a token, {share:.2f} of a plain read of one thread"
        report.note(f"{sizes[-1] / 1e6:.0f} MB, decode", text, speeds)
    slope, fixed = np.polyfit(np.array(sizes) / 1e6, costs, 1)
    report.note("cost of a token", f"{fixed:.1f} ms + {slope * 100:.2f} ms for 100 MB", [float(fixed), float(slope)])


def main() -> int:
    """Measure and report."""
    keep_to_wished_instructions()
    report = Report("Speed through the daemon, and against llama.cpp")
    threads = len(os.sched_getaffinity(0))
    plain = read_gigabytes_per_second()
    report.note("plain read, one thread", f"{plain:.1f} GB/s", plain)
    began = time.monotonic()
    demo_model(), full_shape()
    with daemon() as client:
        Ours(client, "pystd-16m").decode(8, 2)
        report.note(
            "from nothing to a first answer", f"{time.monotonic() - began:.1f} s, kernels compiled before or not"
        )
        for share in ("55%", "100%"):
            nbytes = held(client, "pystd-16m", share)
            small = Ours(client, "pystd-16m")
            speeds = sorted(small.decode(32, 200) for _ in range(ROUNDS))
            report.note(f"demo, {nbytes / 1e6:.1f} MB, decode", f"{speeds[1]:.0f} tok/s", speeds)
        report.note("demo, prefill of 400", f"{Ours(client, 'pystd-16m').prefill(400):.0f} tok/s")
        Ours(client, full_shape().name).decode(8, 2)  # loads it
        by_size(report, client, plain)
        against_llama(report, client, threads)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
