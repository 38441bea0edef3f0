"""The product with planes against a plain memory read, and against torch's products of the same shape.

By planes, tokens, threads and instruction set; the weight (135168 x 2048, 69 MB for two planes) does not fit a cache.
The plain read adds up 64-bit integers of 800 MB, vectorised, with as many threads. torch's rows are float32 and bytes
with float32 scales (`_weight_int8pack_mm`, bfloat16 inputs), both of a smaller weight of the same width. Signs, of as
many levels as planes, in turn with these; rounding the inputs is part of their time.

Run: EBBFLOW_INSTRUCTIONS=every .venv/bin/python bench/kernel.py [--json FILE] [--check]
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable

import numba
import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray

from ebbflow.kernels.instructions import NAMES, compiled
from ebbflow.kernels.planes import level_stride, multiply_planes, padded
from ebbflow.kernels.rounding import round_inputs
from ebbflow.kernels.rows import PLANE, ROWS, SHARED_PLANE, SIGNS
from ebbflow.kernels.signs import integral, multiply_sum, prepare

from places import restart_with_kernels
from report import Report

M, N = 135168, 2048
TORCH_M = 33792
SIGNS_M = 16896
PLANES, TOKENS = (2, 3, 4, 5, 6, 8), (1, 8, 32)
ROUNDS = 9


@njit(parallel=True, nogil=True)
def read(data: NDArray[np.int64], out: NDArray[np.int64]) -> None:
    """A sum for each thread."""
    share = len(data) // len(out)
    for part in prange(len(out)):
        out[part] = data[part * share : (part + 1) * share].sum()


def seconds(work: Callable[[], object]) -> list[float]:
    """The times of ROUNDS runs, after one that is not counted."""
    work()
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return times


def lines(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """A copy that begins at a cache line."""
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class Product:
    """A random weight of so many planes, and inputs of so many tokens."""

    def __init__(self, depth: int, tokens: int, rng: np.random.Generator, m: int = M) -> None:
        words, self._tokens = N // 64, tokens
        self.nbytes = depth * m * words * 8
        sizes = [
            8 * m * words * (1 if level else 2) + 2 * m + (4 * m if level == 0 else 4 << level)
            for level in range(depth - 1)
        ]
        starts = np.cumsum([0, *(-(-size // 64) * 64 for size in sizes)])
        kinds = [SHARED_PLANE if level else PLANE for level in range(depth - 1)]
        self._stored = lines(rng.integers(0, 2**16, int(starts[-1]) // 2, np.uint16) & 0xBFBF).view(np.uint8)
        self._table = np.array([[kind, start, 0] for kind, start in zip(kinds, starts, strict=False)], np.int64)
        p = padded(N)
        self._x = lines(rng.integers(-127, 128, (tokens, p)).astype(np.int8))
        self._scales = lines(rng.random((tokens, p // 32)).astype(np.float32))
        self._corrections = lines(np.zeros((tokens, p // 32), np.int32))
        self._y = np.empty((tokens, m), np.float32)

    def seconds(self, name: str, threads: int) -> list[float]:
        """Times of the whole product."""
        numba.set_num_threads(threads)
        scratch = lines(np.zeros((2 * threads, ROWS, level_stride(N)), np.uint8))
        arguments = (NAMES[name], self._stored, self._table, N, self._x, self._scales, self._corrections, scratch)
        return seconds(lambda: multiply_planes(*arguments, self._y))


class SignsProduct:
    """A random weight `[m, N]` of so many levels of signs, and inputs of so many tokens."""

    def __init__(self, levels: int, rank: int, tokens: int, m: int, rng: np.random.Generator) -> None:
        size = -(-(8 * m * (N // 64) + 2 * rank * (m + N)) // 64) * 64
        # bits of halves between 2^-8 and 2^8, or minus that
        stored = lines(rng.integers(0, 2**16, levels * size // 2, np.uint16) & 0xA3FF | 0x2000)
        self._table = np.array([[SIGNS, level * size, rank] for level in range(levels)], np.int64)
        made = prepare(stored, self._table, m, N) if integral(self._table) else np.zeros(0, np.uint8)
        self._stored, self._made = stored.view(np.uint8), lines(made)
        self._x, p = rng.standard_normal((tokens, N)).astype(np.float32), padded(N)
        self._rounded = (
            lines(np.zeros((tokens, p), np.int8)),
            lines(np.zeros((tokens, p // 32), np.float32)),
            lines(np.zeros((tokens, p // 32), np.int32)),
        )
        self._y = np.empty((tokens, m), np.float32)

    def seconds(self, name: str, threads: int) -> list[float]:
        """Times of rounding the inputs and of the whole product."""
        numba.set_num_threads(threads)
        scratch = lines(np.zeros((2 * threads, ROWS, level_stride(N)), np.uint8))
        singles = lines(np.zeros((2 * threads, ROWS, padded(N) + 16), np.float32))

        def work() -> None:
            round_inputs(self._x, self._made[: 4 * N].view(np.float32), *self._rounded)
            multiply_sum(
                NAMES[name], self._stored, self._table, self._made, N, *self._rounded, scratch, singles, self._y
            )

        return seconds(work)


def compare_signs(report: Report, rng: np.random.Generator, threads: int) -> None:
    """Signs by planes, at four levels and at eight."""
    best = compiled()[0]
    for depth in (4, 8):
        for tokens in TOKENS:
            planes = Product(depth, tokens, rng, SIGNS_M)
            for rank in (1, 16):
                levels = SignsProduct(depth, rank, tokens, SIGNS_M, rng)
                times = [levels.seconds(best, threads), planes.seconds(best, threads)]
                middle, peer = (statistics.median(some) for some in times)
                rate = SIGNS_M * N * tokens / middle / 1e9
                text = f"{rate:7.1f} G weights x tokens/s, {middle / peer:.2f}x the time of planes"
                report.note(f"{depth} levels of signs, rank {rank}, {tokens} tokens, {threads} threads", text, times)
                if rank == 1 and depth == 4 and tokens in (1, 8):
                    report.bar(f"signs_rank_1_by_planes_{tokens}_tokens", middle / peer, "<=", 1.3)


def plain_reads(report: Report, counts: list[int]) -> dict[int, float]:
    """GB/s of a plain read, by threads."""
    data, rates = np.ones(100_000_000, np.int64), {}
    for threads in counts:
        numba.set_num_threads(threads)
        out = np.zeros(threads, np.int64)
        times = seconds(lambda out=out: read(data, out))
        rates[threads] = data.nbytes / statistics.median(times) / 1e9
        report.note(f"plain read, {threads} threads", f"{rates[threads]:.1f} GB/s", times)
    return rates


def main() -> int:
    """Measure and compare."""
    restart_with_kernels()
    report, rng = Report("The product with planes"), np.random.default_rng(0)
    most = min(os.cpu_count() or 1, numba.config.NUMBA_NUM_THREADS)
    plain = plain_reads(report, sorted({1, most}))
    rates: dict[tuple[str, int, int, int], float] = {}
    for depth in PLANES:
        for tokens in TOKENS:
            product = Product(depth, tokens, rng)
            for name in compiled():
                if name == "portable" and (depth != 4 or tokens == TOKENS[-1]):
                    continue  # it takes seconds
                for threads in sorted({1, most}):
                    times = product.seconds(name, threads)
                    middle = statistics.median(times)
                    rates[name, depth, tokens, threads] = tokens / middle
                    share = product.nbytes / middle / 1e9 / plain[threads]
                    rate = M * N * tokens / middle / 1e9
                    text = f"{rate:7.1f} G weights x tokens/s, bytes at {share:.2f} of a plain read"
                    report.note(f"{name}, {depth} planes, {tokens} tokens, {threads} threads", text, times)
                    if (name, depth, tokens, threads) == (compiled()[0], 4, 1, most):
                        report.bar("share_of_plain_read_4_planes_1_token", share, ">=", 0.6)
            del product
    best = compiled()[0]
    report.bar("token_rate_8_by_1_4_planes", rates[best, 4, 8, most] / rates[best, 4, 1, most], ">=", 3.0)
    compare_signs(report, rng, most)
    torch.set_num_threads(most)
    weight = torch.randn(TORCH_M, N)
    rounded, scale = (weight * 30).clamp(-127, 127).to(torch.int8), torch.ones(TORCH_M, dtype=torch.bfloat16)
    for tokens in TOKENS:
        x = torch.randn(tokens, N)
        half = x.bfloat16()
        rows: dict[str, Callable[[], object]] = {
            "float32": lambda x=x: x @ weight.T,
            "bytes": lambda x=half: torch.ops.aten._weight_int8pack_mm(x, rounded, scale),
        }
        for name, work in rows.items():
            middle = statistics.median(times := seconds(work))
            ours = rates[best, 4, tokens, most] * M / (tokens / middle * TORCH_M)
            text = f"{TORCH_M * N * tokens / middle / 1e9:7.1f} G weights x tokens/s; ours with 4 planes is {ours:.1f}x"
            report.note(f"torch {name}, {tokens} tokens, {most} threads", text, times)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
