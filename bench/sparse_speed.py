"""Tokens per second of whole sparse models of the 1.1B shape, through the real daemon, against dense ones and planes.

Half of all linears' weights are there, as fp16, int8 or int4, in one tier or in the three of `ebb add`. The peers are
of the same shape: every weight in the same precision, dense (int4 has int8's: no dense block is smaller), and `nested`,
8 planes, cut to the sparse model's bytes, or whole where that is less. Embedding and head are int8 in all but `nested`.
Three tasks: decoding for one request and for four at once, prefilling a prompt; what is compared runs in turn, round by
round, and the best of each counts. Nothing is reused of the answers before.

Sparse fp16 is rounded to bytes on its way, in a step that is one compiled program. Dense fp16 is multiplied in floats,
operation by operation, as it is when served: nothing was done for its speed, since no codec makes such models. Masks
and values are random, of as many ones a row, which speed does not depend on.

EBBFLOW_BENCH_ROWS names what is done, of: f16 f16-tiers i8 i8-tiers i4 i4-tiers. All want 9 GB of disk the first time,
3 to 6 GB of memory, and take ten to twenty minutes, or half with EBBFLOW_BENCH_ROUNDS=1.

Run: .venv/bin/python bench/sparse_speed.py [--json FILE] [--check]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from asking import Ours, held

from ebbflow.client import Client

from places import daemon, full_shape
from report import Report

ROWS = {
    "f16": ("full-dense-f16", "full-tier-f16"),
    "f16-tiers": ("full-dense-f16", "full-sparse-f16"),
    "i8": ("full-dense", "full-tier"),
    "i8-tiers": ("full-dense", "full-sparse"),
    "i4": ("full-dense", "full-tier-i4"),
    "i4-tiers": ("full-dense", "full-sparse-i4"),
}
BARS = {"f16": 1.5, "i8": 1.3}  # decode of one tier by dense: what single products are held to
NESTED = "full-8"
CONTEXT, PROMPT, TOKENS, REQUESTS = 32, 512, 24, 4
ROUNDS = int(os.environ.get("EBBFLOW_BENCH_ROUNDS", "2"))

Task = Callable[[Ours], float]


def decode_many(ours: Ours) -> float:
    """Tokens a second of REQUESTS at once, added up."""
    with ThreadPoolExecutor(REQUESTS) as pool:
        return sum(pool.map(lambda _: ours.decode(CONTEXT, TOKENS), range(REQUESTS)))


TASKS: dict[str, Task] = {
    "decode": lambda ours: ours.decode(CONTEXT, TOKENS),
    f"decode, {REQUESTS} requests": decode_many,
    f"prefill of {PROMPT}": lambda ours: ours.prefill(PROMPT),
}


def measured(client: Client, sizes: dict[str, int]) -> dict[str, dict[str, float]]:
    """The best of ROUNDS of each task for each model of `sizes`, which are bytes."""
    prompts: dict[int, str] = {}
    best: dict[str, dict[str, float]] = {model: dict.fromkeys(TASKS, 0.0) for model in sizes}
    asked = {model: Ours(client, model, prompts) for model in sizes}
    asked[NESTED].prefill(PROMPT)  # finds the prompt: with dense fp16 that takes a minute
    for model, nbytes in sizes.items():
        held(client, model, f"{nbytes}B")
        asked[model].decode(CONTEXT, 2)  # what a new size makes anew is not counted
    for _ in range(ROUNDS):
        for model in sizes:
            for task, run in TASKS.items():
                best[model][task] = max(best[model][task], run(asked[model]))
    return best


def compare(report: Report, client: Client, row: str) -> None:
    """One sparse model and its peers."""
    sizes = {}
    for model in (*ROWS[row], NESTED):
        Ours(client, model).decode(CONTEXT, 2)  # loads it
        sizes[model] = held(client, model, "100%")
    dense, sparse = ROWS[row]
    sizes[NESTED] = held(client, NESTED, f"{min(sizes[NESTED], sizes[sparse])}B")
    text = ", ".join(f"{model} {nbytes / 1e6:.0f}" for model, nbytes in sizes.items())
    report.note(f"{row}: MB", text, list(sizes.values()))
    found = measured(client, sizes)
    for task in TASKS:
        speeds = {model: found[model][task] for model in sizes}
        mine = speeds[sparse]
        text = f"{mine:.1f} tok/s; {mine / speeds[dense]:.2f}x dense ({speeds[dense]:.1f}), "
        text += f"{mine / speeds[NESTED]:.2f}x nested ({speeds[NESTED]:.1f})"
        report.note(f"{row}: {task}", text, speeds)
    if row in BARS:
        report.bar(f"decode_of_half_{row}_by_dense", found[sparse]["decode"] / found[dense]["decode"], ">=", BARS[row])


def main() -> int:
    """A daemon for each row."""
    report = Report("Speed of whole sparse models through the daemon")
    rows = os.environ.get("EBBFLOW_BENCH_ROWS", " ".join(ROWS)).split()
    if unknown := set(rows) - set(ROWS):
        sys.exit(f"EBBFLOW_BENCH_ROWS names {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    for row in rows:
        for model in (*ROWS[row], NESTED):
            full_shape(model)
        with daemon() as client:
            compare(report, client, row)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
