"""What happens between the matrix products on the 1.1 B shape: attention, storing keys and values, gate and norm.

All layers together, by tokens and context, with keys and values in a mapping like the daemon's. The peer is torch's
`scaled_dot_product_attention` on float32 keys and values that lie ready in its own layout, in the same run. In between
other memory is read, because a step's weights would push keys and values out of the caches as well. For one token also
as one thread of a compiled step would do it all: no Python between layers, nobody to wake. Keys and values as int8 are
timed against fp16, in the same rounds.

Then 16 sequences that decode, one token each, behind a context that they share, against the same behind copies of it:
that is what reading a block once for all of them is worth. The 1.1 B shape has 8 query heads for each head of keys, so
its attention is mostly multiply-adds already; a shape with as many heads of keys as of queries shows the other end.

Run: .venv/bin/python bench/attention.py [--json FILE] [--check]
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product

import msgspec
import numba
import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from ebbflow.daemon.engine.kv import KvCache, blocks_for
from ebbflow.daemon.engine.sequences import Piece, Sequence
from ebbflow.daemon.engine.serving import Batch
from ebbflow.daemon.library.shapes import SHAPES
from ebbflow.daemon.settings import KV_TYPES, KvType
from ebbflow.formats.architecture import Architecture
from ebbflow.kernels.attention import KINDS, attend_unit, store_kv, store_token, unit_floats
from ebbflow.kernels.elementwise import gated, rms_norm

from places import restart_with_kernels
from report import Report

F32 = NDArray[np.float32]
SHAPE = SHAPES["tinyllama-1.1b"]
CASES = ((1, 128), (1, 1024), (64, 128), (64, 1024))
GOALS = {(1, 128): 0.3, (1, 1024): 2.0, (64, 1024): 60.0}  # ms
ROUNDS = 5
SHARERS = 16
SHARED = (512, 2048)  # tokens


def milliseconds(works: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """The times of ROUNDS runs of each, in turn, after one that is not counted; other memory is read before each."""
    other, times = np.ones(8_000_000), {name: list[float]() for name in works}
    for number in range(ROUNDS + 1):
        for name, work in works.items():
            other.sum()
            began = time.perf_counter()
            work()
            if number:
                times[name].append((time.perf_counter() - began) * 1e3)
    return times


@njit(nogil=True)
def one_token(
    kind: int, kv: NDArray[np.uint8], table: NDArray[np.int64], position: int, qkv: tuple[F32, F32, F32], scratch: F32
) -> F32:
    """All layers of one token's attention."""
    q, k, v = qkv
    tables, sequence, positions = table.reshape(1, -1), np.zeros(1, np.int64), np.full(1, position)
    y = np.empty((1, q.shape[1] * q.shape[2]), np.float32)
    for layer in range(kv.shape[1]):
        store_token(kind, kv, layer, table, position, k, v)
        for group in range(kv.shape[3]):
            per_group = q.shape[1] // kv.shape[3]
            attend_unit(kind, kv, layer, tables, sequence, positions, q, group, per_group, 0, scratch, y)
    return y


class Stored:
    """Keys and values of a context, in every layer, and its last `tokens`."""

    def __init__(self, dtype: KvType, tokens: int, k: F32, v: F32, threads: int) -> None:
        a, context, kv = SHAPE, len(k), KvCache(SHAPE, dtype)
        sequence = Sequence(0, [0] * context, context, blocks=kv.allocate(blocks_for(context)))
        before = Batch([Piece(sequence, 0, context)], kv.array, a, threads)
        for layer in range(a.layers):
            before.attend(layer, np.zeros((context, a.heads, a.head_dim), np.float32), k, v)
        self._batch = Batch([Piece(sequence, context - tokens, tokens)], kv.array, a, threads)
        self._step = (KINDS[dtype], kv.array.view(np.uint8), np.array(sequence.blocks), context - tokens)
        self._scratch = np.empty(unit_floats(a.heads // a.kv_heads, a.head_dim), np.float32)
        self._k, self._v = k[-tokens:].copy(), v[-tokens:].copy()

    def attend(self, q: F32) -> F32:
        """Store and attend."""
        for layer in range(SHAPE.layers):
            y = self._batch.attend(layer, q, self._k, self._v)
        return y

    def in_a_step(self, q: F32) -> F32:
        """The same for one token, without Python, by one thread."""
        return one_token(*self._step, (q, self._k[0], self._v[0]), self._scratch)


class Case:
    """The last `tokens` of `context`, in every layer."""

    def __init__(self, tokens: int, context: int, threads: int, rng: np.random.Generator) -> None:
        a, self._tokens = SHAPE, tokens
        k, v = (rng.standard_normal((context, a.kv_heads, a.head_dim)).astype(np.float32) for _ in "kv")
        self._stored = {dtype: Stored(dtype, tokens, k, v, threads) for dtype in KV_TYPES}
        self._q = rng.standard_normal((tokens, a.heads, a.head_dim)).astype(np.float32)
        torch.set_num_threads(threads)
        keys, values = (torch.from_numpy(x).transpose(0, 1)[None] for x in (k, v))
        self._layers = [(keys.contiguous().clone(), values.contiguous().clone()) for _ in range(a.layers)]
        self._queries = torch.from_numpy(self._q).transpose(0, 1)[None].contiguous()
        self._mask = torch.ones(tokens, context, dtype=torch.bool).tril(context - tokens)

    def ours(self, dtype: KvType = "f16") -> F32:
        """Store and attend."""
        return self._stored[dtype].attend(self._q)

    def in_a_step(self, dtype: KvType = "f16") -> F32:
        """The same for one token, without Python, by one thread."""
        return self._stored[dtype].in_a_step(self._q)

    def torchs(self) -> torch.Tensor:
        """Attend."""
        for k, v in self._layers:
            y = torch.nn.functional.scaled_dot_product_attention(
                self._queries, k, v, attn_mask=self._mask if self._tokens > 1 else None, enable_gqa=True
            )
        return y

    def difference(self, dtype: KvType = "f16") -> float:
        """The largest, between the two."""
        theirs = self.torchs()[0].transpose(0, 1).reshape(self._tokens, -1).numpy()
        return float(np.abs(self.ours(dtype) - theirs).max())


class Sharers:
    """SHARERS sequences behind `context` tokens, a multiple of 32, whose blocks they share or have copies of."""

    def __init__(self, a: Architecture, dtype: KvType, context: int, copies: bool) -> None:
        a, rng = msgspec.structs.replace(a, context=2 * context), np.random.default_rng(0)
        kv, self._layers = KvCache(a, dtype), range(a.layers)
        roots = [kv.allocate(blocks_for(context)) for _ in range(SHARERS if copies else 1)]
        shape = (context, a.kv_heads, a.head_dim)
        k, v = (rng.standard_normal(shape).astype(np.float32) for _ in "kv")
        for root in roots:
            b = Batch([Piece(Sequence(0, [0] * context, context, blocks=root), 0, context)], kv.array, a, 1)
            for layer in self._layers:
                store_kv(b.kind, b.kv, layer, b.tables, b.sequence, b.positions, k, v)
        end, tokens = context + 1, [0] * (context + 1)
        blocks = [(*roots[number % len(roots)], *kv.allocate(1)) for number in range(SHARERS)]
        pieces = [Piece(Sequence(n, tokens, end, blocks=each), context, 1) for n, each in enumerate(blocks)]
        self._batch = Batch(pieces, kv.array, a, 1)
        shapes = (a.heads, a.kv_heads, a.kv_heads)
        self._qkv = [rng.standard_normal((SHARERS, heads, a.head_dim)).astype(np.float32) for heads in shapes]

    def attend(self) -> F32:
        """Store and attend."""
        for layer in self._layers:
            y = self._batch.attend(layer, *self._qkv)
        return y


def measure_sharing(report: Report) -> None:
    """Against copies, by one thread: a compiled step wakes nobody for attention."""
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    many = msgspec.structs.replace(SHAPE, kv_heads=SHAPE.heads, layers=4)
    for a, dtype, context in product((SHAPE, many), KV_TYPES, SHARED):
        shared, copied = (Sharers(a, dtype, context, copies) for copies in (False, True))
        assert (shared.attend() == copied.attend()).all()
        times = milliseconds({"shared": shared.attend, "copies": copied.attend})
        ours, theirs = (statistics.median(times[each]) for each in ("shared", "copies"))
        text = f"{ours:8.2f} ms; with copies {theirs:8.2f} ms, {theirs / ours:.1f}x"
        name = "" if a is SHAPE else f", {a.kv_heads} KV heads, {a.layers} layers"
        report.note(f"{SHARERS} share {context} tokens, {dtype}{name}", text, times)
        report.bar(f"shared_by_copies_{dtype}_{a.kv_heads}_heads_{context}", ours / theirs, "<=", 1.0)
    numba.set_num_threads(before)


def main() -> int:
    """Measure and compare."""
    restart_with_kernels()
    report, rng = Report("Between the matrix products, 1.1 B shape"), np.random.default_rng(0)
    threads = min(os.cpu_count() or 1, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    for tokens, context in CASES:
        case = Case(tokens, context, threads, rng)
        works = {"ours": case.ours, "i8": partial(case.ours, "i8"), "torch": case.torchs}
        if tokens == 1:
            works |= {"step": case.in_a_step, "i8 step": partial(case.in_a_step, "i8")}
        times = milliseconds(works)
        ours, theirs = (statistics.median(times[name]) for name in ("ours", "torch"))
        text = f"{ours:8.2f} ms; torch {theirs:8.2f} ms, {theirs / ours:.1f}x; they differ by {case.difference():.1e}"
        report.note(f"attention, {tokens} tokens at {context}", text, times)
        if tokens == 1:
            ours = statistics.median(times["step"])
            report.note(f"the same, one thread and compiled, at {context}", f"{ours:8.2f} ms", times["step"])
        for name, other in (("i8", "ours"), ("i8 step", "step")):
            if name in times:
                bytes_, halves = (statistics.median(times[key]) for key in (name, other))
                text = f"{bytes_:8.2f} ms, {bytes_ / halves:.2f} of fp16; from torch {case.difference('i8'):.1e}"
                report.note(f"  {name}", text, times[name])
                if context == 1024:
                    report.bar(f"{name.replace(' ', '_')}_by_f16_{tokens}_at_{context}", bytes_ / halves, "<=", 1.1)
        if (tokens, context) in GOALS:
            report.bar(f"attention_ms_{tokens}_at_{context}", ours, "<=", GOALS[tokens, context])
    measure_sharing(report)
    for tokens in (1, 64):
        gate, up = (rng.standard_normal((tokens, SHAPE.intermediate)).astype(np.float32) for _ in "gu")
        x, weight = rng.standard_normal((tokens, SHAPE.hidden)).astype(np.float32), np.ones(SHAPE.hidden, np.float32)
        y, z = np.empty_like(gate), np.empty_like(x)
        t_gate, t_up = torch.from_numpy(gate), torch.from_numpy(up)
        layers = range(SHAPE.layers)
        times = milliseconds(
            {
                "gated": lambda: [gated(gate, up, y) for _ in layers],  # noqa: B023
                "torch": lambda: [torch.nn.functional.silu(t_gate) * t_up for _ in layers],  # noqa: B023
                "rms_norm": lambda: [rms_norm(x, weight, 1e-5, z) for _ in range(2 * len(layers) + 1)],  # noqa: B023
            }
        )
        ours, theirs, norm = (statistics.median(times[name]) for name in ("gated", "torch", "rms_norm"))
        report.note(f"gate, {tokens} tokens", f"{ours:8.2f} ms; torch {theirs:8.2f} ms, {theirs / ours:.1f}x", times)
        report.note(f"norm, {tokens} tokens", f"{norm:8.2f} ms")
    report.bar("gate_ms_64", ours, "<=", 2.0)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
