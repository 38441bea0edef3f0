"""Where the time of one step goes: the 1.1 B shape at several sizes, decoding at two contexts and reading a prompt.

A step is a program of phases (`kernels/step`); the cost of a part is the whole program's time less that of the program
without it, products with the rounding of their inputs. In one process, no daemon: what a client sees is `speed.py`'s.
The least of rounds in turn, because what others do on the machine only ever adds.

Run: .venv/bin/python bench/step.py [--json FILE]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ebbflow.daemon.engine.batch import Batch
from ebbflow.daemon.engine.kv import KvCache, blocks_for
from ebbflow.daemon.engine.program import Program, build_program
from ebbflow.daemon.engine.sequences import Piece, Sequence
from ebbflow.daemon.engine.serving import ServingNetwork
from ebbflow.daemon.engine.steps import Steps
from ebbflow.daemon.worker.processors import usable_threads
from ebbflow.daemon.worker.resident import Resident
from ebbflow.formats.blocks import unpack_dense
from ebbflow.formats.manifest import STACK, read_manifest
from ebbflow.formats.stack import read_stack
from ebbflow.kernels import step
from ebbflow.kernels.instructions import choose
from ebbflow.kernels.threads import set_threads

from places import full_shape, restart_with_kernels
from report import Report

SIZES = (431, 639, 750)  # MB
CASES = ((1, 128), (1, 1024), (64, 128))  # tokens, context
ROUNDS = 15
PARTS: dict[str, Callable[[NDArray[np.int64]], NDArray[np.bool_]]] = {
    "attention, with heads": lambda p: (p[:, 0] == step.HEADS) | (p[:, 0] == step.ATTEND),
    "queries, keys, values": lambda p: _multiply(p, step.TARGET_HEADS),
    "output and down": lambda p: _multiply(p, step.TARGET_HIDDEN),
    "gate and up": lambda p: _multiply(p, step.TARGET_WIDE),
    "head": lambda p: _multiply(p, step.TARGET_LOGITS),
}


def _multiply(phases: NDArray[np.int64], target: int) -> NDArray[np.bool_]:
    return (phases[:, 0] == step.MULTIPLY) & (phases[:, 3] == target)


def without(phases: NDArray[np.int64], chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
    """A program that leaves these phases out; of a product only its matrices, and so their inputs' rounding too."""
    left = phases.copy()
    left[chosen & (phases[:, 0] == step.MULTIPLY), 2] = 0
    return np.ascontiguousarray(left[~chosen | (phases[:, 0] == step.MULTIPLY)])


def milliseconds(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The least of ROUNDS runs of each, in turn."""
    times = dict.fromkeys(works, float("inf"))
    for _ in range(ROUNDS):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            times[name] = min(times[name], (time.perf_counter() - began) * 1e3)
    return times


def main() -> int:
    """Measure and print."""
    restart_with_kernels()
    report, threads = Report("The parts of a step, 1.1 B shape"), set_threads(usable_threads())
    folder = full_shape()
    a, resident = read_manifest(folder).architecture, Resident(read_stack(folder / STACK))
    kv = KvCache(a)
    sequence = Sequence(0, [1] * a.context, a.context, blocks=kv.allocate(blocks_for(a.context)))
    kv.array[list(sequence.blocks)] = 0

    def grow(nbytes: int) -> None:
        while resident.blocks < resident.stack.blocks_within(nbytes):
            resident.grow(resident.stack.blocks_within(nbytes))

    def vector(name: str) -> NDArray[np.float32]:
        entry, payload = resident.payload(name)
        return unpack_dense(payload[: entry.nbytes].tobytes(), entry.shape, entry.dtype)

    for size in SIZES:
        grow(size * 1_000_000)
        whole = build_program(a, vector)

        def steps(program: Program) -> Steps:
            return Steps(a, program, resident, threads, choose())

        programs = {"all": steps(whole)} | {
            name: steps(replace(whole, phases=without(whole.phases, chosen(whole.phases))))
            for name, chosen in PARTS.items()
        }
        network = ServingNetwork(a, resident, threads)
        for tokens, context in CASES:
            batch = Batch([Piece(sequence, context - tokens, tokens)], kv.array, a, threads)
            hidden, wanted = np.ones((tokens, a.hidden), np.float32), np.array([tokens - 1])
            works: dict[str, Callable[[], object]] = {
                name: lambda program=program, batch=batch, hidden=hidden, wanted=wanted: program.run(
                    batch, hidden.copy(), wanted
                )
                for name, program in programs.items()
            }
            works["and outside"] = lambda network=network, batch=batch, tokens=tokens: network.logits(
                batch, [tokens - 1]
            )
            times = milliseconds(works)
            costs = {name: times["all"] - times[name] for name in PARTS}
            costs["norms, waiting"] = times["all"] - sum(costs.values())
            costs["embedding"] = times["and outside"] - times["all"]
            total = times["and outside"]
            title = f"{resident.nbytes / 1e6:.0f} MB, {tokens} tokens at {context}"
            report.note(title, f"{total:.1f} ms, {tokens / total * 1e3:.0f} tok/s", times)
            for name, cost in costs.items():
                report.note(f"    {name}", f"{cost:8.2f} ms  {'#' * max(0, round(40 * cost / total))}", cost)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
