"""Tokens per second of whole sparse models of the 1.1B shape, through the real daemon, against dense ones and planes.

Half of all linears' weights are there, as fp16, int8 or int4, in one tier (`full-tier`) and in the three of `ebb add`
(`full-sparse`). Their peers have the same shape: every weight in the same precision, dense (int4 has int8's: no dense
block is smaller), and `nested`, 8 planes, cut to the sparse model's bytes, or whole where that is less. Embedding and
head are int8 in all but `nested`. Three tasks: decoding for one request and for four at once, prefilling a prompt; what
is compared runs in turn, round by round, and the best of each counts. Every answer begins with nothing computed before.

Dense fp16 is multiplied in floats, sparse fp16 rounded to bytes on its way, as they are when served. Masks and values
are random, of as many ones a row: speed does not depend on them.

EBBFLOW_BENCH_ROWS names what is done, of: f16 i8 i4. Each makes its models the first time (8 GB in all), holds 4 to 6
GB, and takes about a minute after that. Needs the extra `bench`.

Run: .venv/bin/python bench/sparse_speed.py [--json FILE] [--check]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from speed import Ours, held

from ebbflow.client import Client

from places import daemon, full_shape
from report import Report

ROWS = {
    "f16": ("full-dense-f16", "full-tier-f16", "full-sparse-f16"),
    "i8": ("full-dense", "full-tier", "full-sparse"),
    "i4": ("full-dense", "full-tier-i4", "full-sparse-i4"),
}
BARS = {"f16": 1.5, "i8": 1.3}  # decode of one tier by dense: what single products are held to
NESTED = "full-8"
CONTEXT, PROMPT, TOKENS, REQUESTS, ROUNDS = 32, 512, 32, 4, 3
NAMES = {"full-dense": "dense", "full-tier": "one tier", "full-sparse": "three tiers"}

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


def name_of(model: str, values: str) -> str:
    """For the report."""
    kind = NAMES[model.removesuffix(f"-{values}")]
    return f"{kind} {'i8' if (values, kind) == ('i4', 'dense') else values}"


def measured(client: Client, sizes: dict[str, tuple[str, int]]) -> dict[str, dict[str, float]]:
    """The best of ROUNDS for each of `sizes`, a name's model and bytes, by name and task."""
    best: dict[str, dict[str, float]] = {name: dict.fromkeys(TASKS, 0.0) for name in sizes}
    asked = {model: Ours(client, model) for model, _ in sizes.values()}
    for _ in range(ROUNDS):
        for name, (model, nbytes) in sizes.items():
            held(client, model, f"{nbytes}B")
            asked[model].decode(CONTEXT, 2)  # what a new size makes anew is not counted
            for task, run in TASKS.items():
                best[name][task] = max(best[name][task], run(asked[model]))
    return best


def compare(report: Report, client: Client, values: str) -> None:
    """One kind of values."""
    sizes = {}
    for model in (*ROWS[values], NESTED):
        Ours(client, model).decode(CONTEXT, 2)  # loads it
        sizes[model] = model, held(client, model, "100%")
    _, most = sizes.pop(NESTED)
    peers = {model: f"nested for {model}" for model in ROWS[values][1:]}
    for model, peer in peers.items():
        sizes[peer] = NESTED, held(client, NESTED, f"{min(most, sizes[model][1])}B")
    found = measured(client, sizes)
    dense = ROWS[values][0]
    for model in ROWS[values]:
        nbytes, name = sizes[model][1], name_of(model, values)
        report.note(f"{values}: {name}", f"{nbytes / 1e6:.0f} MB", nbytes)
        for task, speed in found[model].items():
            text = f"{speed:.1f} tok/s"
            numbers = [speed]
            if model != dense:
                peer = peers[model]
                text += f"; {speed / found[dense][task]:.2f}x {name_of(dense, values)}"
                text += f", {speed / found[peer][task]:.2f}x nested of {sizes[peer][1] / 1e6:.0f} MB"
                numbers += [found[dense][task], found[peer][task]]
            report.note(f"  {task}", text, numbers)
    if values in BARS:
        ratio = found[ROWS[values][1]]["decode"] / found[dense]["decode"]
        report.bar(f"decode_of_half_{values}_by_dense", ratio, ">=", BARS[values])


def main() -> int:
    """A daemon for each kind of values."""
    report = Report("Speed of whole sparse models through the daemon")
    rows = os.environ.get("EBBFLOW_BENCH_ROWS", " ".join(ROWS)).split()
    if unknown := set(rows) - set(ROWS):
        sys.exit(f"EBBFLOW_BENCH_ROWS names {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    for values in rows:
        for model in (*ROWS[values], NESTED):
            full_shape(model)
        with daemon() as client:
            compare(report, client, values)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
