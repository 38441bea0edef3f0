"""Products with sparse tiers: against dense blocks of the same precision, nested planes of equal bytes, and CSR.

Layers of 4096 x 4096 and of 2048 x 5632, so many of them below each other that no cache holds them; one token and
eight. What is compared runs in turn, round by round. Rounding the inputs is part of the time of integer products. Dense
fp16 and exact products are in floats, as they are when served; sparse fp16 is in bytes when served. The dense int8
block is read by the same integer product. torch's CSR and scipy's are float32 of fewer rows, and so is torch's dense
product; their rates are per weight of the dense matrix. Break-even sparsity is where a sparse product takes as long as
the dense one of its precision, between the sparsities measured.

Run: .venv/bin/python bench/sparse.py [--json FILE] [--check]                       (some minutes, 4 GB of memory)
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import numba
import numpy as np
import torch
from kernel import lines, plain_reads
from numpy.typing import NDArray

from ebbflow.daemon.library.encode_sparse import DEFAULT_LEVELS, tier_counts
from ebbflow.daemon.library.prune import Groups
from ebbflow.formats.kinds import values_row_nbytes, words_per_row
from ebbflow.kernels.instructions import NAMES, compiled
from ebbflow.kernels.matmul import matmul, row_stride
from ebbflow.kernels.planes import level_stride, multiply_planes, padded
from ebbflow.kernels.rounding import round_inputs
from ebbflow.kernels.rows import CODES, MASK, PLANE, ROWS, SHARED_PLANE, VALUES_CODES
from ebbflow.kernels.signs import multiply_sum

from places import restart_with_kernels
from report import Report

try:
    from scipy.sparse import csr_matrix
except ImportError:  # nothing of ours needs it
    csr_matrix = None

LAYERS = {"4096 x 4096": (4096, 4096, 8), "2048 x 5632": (2048, 5632, 12)}  # rows, columns, how many
SPARSITIES = (0.0, 0.2, 0.5, 0.6, 0.7)
SHOWN = SPARSITIES[2:]
TIERS = DEFAULT_LEVELS
VALUES = ("f16", "i8", "i4")
TOKENS = (1, 8)
CSR_SHARE = 8  # of the rows
ROUNDS = 11
PATTERNS = 61

Work = Callable[[], object]


def ratio(slower: list[float], faster: list[float]) -> float:
    """How many times as fast the second is, by the least of each: what others do on the machine only ever adds."""
    return min(slower) / min(faster)


def in_turn(works: dict[str, Work]) -> dict[str, list[float]]:
    """Times of ROUNDS runs of each, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(ROUNDS + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if number:
                times[name].append(time.perf_counter() - began)
    return times


class Weight:
    """Blocks of one weight `[m, n]` in memory, and its table."""

    def __init__(self, m: int, n: int, parts: list[tuple[int, int, NDArray[np.uint8]]]) -> None:
        starts = np.cumsum([0, *(-(-len(data) // 64) * 64 for _, _, data in parts)])
        self.m, self.n, self.nbytes = m, n, int(sum(len(data) for _, _, data in parts))
        self.stored = lines(np.zeros(int(starts[-1]) // 2, np.uint16))
        for (_, _, data), start in zip(parts, starts, strict=False):
            self.stored.view(np.uint8)[start : start + len(data)] = data
        self.table = np.array([(kind, at, rank) for (kind, rank, _), at in zip(parts, starts, strict=False)], np.int64)


def scales(m: int) -> NDArray[np.uint8]:
    """Of every row the same."""
    return np.full(m, 1e-4, "<f4").view(np.uint8)


def halves(count: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Normal numbers in fp16, a million different ones."""
    return np.resize(rng.standard_normal(1 << 20).astype("<f2") * np.float16(0.02), count).view(np.uint8)


def dense_weight(m: int, n: int, dtype: str, rng: np.random.Generator) -> Weight:
    """One block."""
    if dtype == "f16":
        return Weight(m, n, [(CODES[dtype], 0, halves(m * n, rng))])
    data = np.concatenate([scales(m), rng.integers(-127, 128, m * n, np.int8).view(np.uint8)])
    return Weight(m, n, [(CODES[dtype], 0, data)])


def random_mask(m: int, n: int, rank: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """`rank` ones in each row: PATTERNS different rows, turned."""
    few = rng.random((PATTERNS, n)).argsort(axis=1) < rank
    rows = np.lib.stride_tricks.sliding_window_view(np.concatenate([few, few], axis=1), n, axis=1)
    found = np.empty((m, words_per_row(n) * 8), np.uint8)
    for start in range(0, m, 1024):
        some = np.arange(start, min(m, start + 1024))
        bits = np.packbits(rows[some % PATTERNS, rng.integers(0, n, len(some))], axis=1, bitorder="little")
        found[start : start + len(some), : bits.shape[1]] = bits
        found[start : start + len(some), bits.shape[1] :] = 0
    return found.reshape(-1)


def sparse_weight(m: int, n: int, dtype: str, sparsity: float, rng: np.random.Generator, tiers: int = 1) -> Weight:
    """So many tiers, cut as `ebb add` cuts them."""
    parts, filled = [], 0
    for kept in tier_counts(n, Groups(n, round(n * (1 - sparsity))), tiers):
        rank = kept - filled
        count = m * values_row_nbytes(dtype, rank)
        if dtype == "f16":
            values = halves(m * rank, rng)
        elif dtype == "i4":
            low, high = (rng.integers(-7, 8, count, np.int8).view(np.uint8) for _ in range(2))
            values = low & 15 | high << 4
        else:
            values = rng.integers(-127, 128, count, np.int8).view(np.uint8)
        if dtype != "f16" and not filled:
            values = np.concatenate([scales(m), values])
        parts.append((MASK, rank, random_mask(m, n - filled, rank, rng)))
        parts.append((VALUES_CODES[dtype], rank, values))
        filled = kept
    return Weight(m, n, parts)


def planes_weight(m: int, n: int, depth: int, rng: np.random.Generator) -> Weight:
    """So many planes; scales are bf16 of ordinary size."""
    parts = []
    for level in range(depth - 1):
        planes = rng.bytes(8 * m * words_per_row(n) * (1 if level else 2))
        levels = rng.integers(-127, 128, (m if level == 0 else 1) << (level + 2), np.int8)
        data = np.frombuffer(planes + np.full(m, 0x3C00, "<u2").tobytes() + levels.tobytes(), np.uint8)
        parts.append((SHARED_PLANE if level else PLANE, 0, data))
    return Weight(m, n, parts)


class Product:
    """What multiplies with `tokens` tokens of n columns; output and scratch are shared by all weights."""

    def __init__(self, m: int, n: int, tokens: int, threads: int, rng: np.random.Generator) -> None:
        self._code, self._n = NAMES[compiled()[0]], n
        p, width = padded(n), -(-n // 64) * 64
        self._x = rng.standard_normal((tokens, n)).astype(np.float32)
        self._wide = np.zeros((tokens, width), np.float32)
        self._wide[:, :n] = self._x
        self._q = lines(np.zeros((tokens, p), np.int8))
        self._scales = lines(np.zeros((tokens, p // 32), np.float32))
        self._corrections = lines(np.zeros((tokens, p // 32), np.int32))
        self._levels = lines(np.zeros((2 * threads, ROWS, level_stride(n)), np.uint8))
        self._rows = lines(np.zeros((2 * threads, ROWS, row_stride(width)), np.float32))
        self._y, self._none = np.empty((tokens, m), np.float32), np.zeros(0, np.uint8)

    def in_bytes(self, weight: Weight) -> Work:
        """As it is served."""

        def work() -> None:
            rounded = self._q, self._scales, self._corrections
            round_inputs(self._x, self._none.view(np.float32), *rounded)
            stored = weight.stored.view(np.uint8)
            multiply_sum(
                self._code, stored, weight.table, self._none, self._n, *rounded, self._levels, self._rows, self._y
            )

        return work

    def of_planes(self, weight: Weight) -> Work:
        """Of inputs that are rotated already, which costs more than rounding."""

        def work() -> None:
            round_inputs(self._x, self._none.view(np.float32), self._q, self._scales, self._corrections)
            stored = weight.stored.view(np.uint8)
            multiply_planes(
                self._code,
                stored,
                weight.table,
                self._n,
                self._q,
                self._scales,
                self._corrections,
                self._levels,
                self._y,
            )

        return work

    def in_floats(self, weight: Weight) -> Work:
        """Exact."""
        return lambda: matmul(weight.stored, weight.table, self._n, self._wide, self._rows, self._y)


def peers(n: int, rows: int, tokens: int, rng: np.random.Generator) -> dict[str, Work]:
    """Products of other libraries with `[rows, n]`, float32."""
    x = torch.randn(n, tokens)
    full = torch.randn(rows, n)
    works: dict[str, Work] = {"torch dense float32": lambda: full @ x}
    for sparsity in SHOWN:
        kept = torch.from_numpy(rng.random((rows, n)) >= sparsity)
        csr = (full * kept).to_sparse_csr()
        works[f"torch CSR {sparsity:.0%}"] = lambda csr=csr: csr @ x
        if csr_matrix is None:
            continue
        parts = [part.numpy() for part in (csr.values(), csr.col_indices().int(), csr.crow_indices().int())]
        mine = csr_matrix(tuple(parts), shape=(rows, n))
        works[f"scipy CSR {sparsity:.0%}"] = lambda mine=mine: mine @ x.numpy()
    return works


def depth_of(weight: Weight) -> int:
    """Planes that take about as many bytes as this weight."""
    return min(8, max(2, round(8 * weight.nbytes / (weight.m * weight.n))))


def break_even(dense: list[float], times: dict[float, list[float]]) -> str:
    """Where the sparse product is as fast as the dense one, between measured points."""
    relative = {s: min(found) / min(dense) for s, found in times.items()}
    if relative[SPARSITIES[0]] <= 1:
        return "faster at any sparsity"
    for low, high in pairwise(SPARSITIES):
        if relative[high] <= 1:
            share = (relative[low] - 1) / (relative[low] - relative[high])
            return f"{low + (high - low) * share:.0%}"
    return f"above {SPARSITIES[-1]:.0%}"


def compare(report: Report, name: str, tokens: int, threads: int, plain: float, rng: np.random.Generator) -> None:
    """All formats of layers of one shape."""
    rows, n, layers = LAYERS[name]
    m = rows * layers
    product = Product(m, n, tokens, threads, rng)
    weights = {f"dense {dtype}": dense_weight(m, n, dtype, rng) for dtype in ("f16", "i8")}
    weights |= {
        f"sparse {dtype} {sparsity:.0%}": sparse_weight(m, n, dtype, sparsity, rng)
        for dtype in VALUES
        for sparsity in SPARSITIES
        if dtype != "i4" or sparsity in SHOWN
    }
    weights |= {f"sparse {dtype} 50% in {TIERS} tiers": sparse_weight(m, n, dtype, 0.5, rng, TIERS) for dtype in VALUES}
    depths = sorted({depth_of(weight) for key, weight in weights.items() if "sparse" in key})
    weights |= {f"{depth} planes": planes_weight(m, n, depth, rng) for depth in depths}
    works = {
        key: product.of_planes(weight) if "planes" in key else product.in_bytes(weight)
        for key, weight in weights.items()
        if key != "dense f16"
    }
    works["dense f16"] = product.in_floats(weights["dense f16"])
    for dtype in ("f16", "i8"):
        works[f"sparse {dtype} 50% exact"] = product.in_floats(weights[f"sparse {dtype} 50%"])
        weights[f"sparse {dtype} 50% exact"] = weights[f"sparse {dtype} 50%"]
    works["dense i8 exact"] = product.in_floats(weights["dense i8"])
    weights["dense i8 exact"] = weights["dense i8"]
    times = in_turn(works)
    title = f"{name}, {tokens} tokens: "
    for key in sorted(times):
        least, weight = min(times[key]), weights[key]
        text = f"{m * n * tokens / least / 1e9:6.1f} G weights x tokens/s, {8 * weight.nbytes / m / n:5.2f} bits, "
        text += f"{weight.nbytes / least / 1e9 / plain:.2f} of a plain read"
        if key.startswith("sparse") and "exact" not in key:
            dense = "dense f16" if "f16" in key else "dense i8"
            for other in (dense, f"{depth_of(weight)} planes"):
                text += f"; {ratio(times[other], times[key]):.2f}x {other}"
        report.note(title + key, text, times[key])
    for dtype in ("f16", "i8"):
        found = {s: times[f"sparse {dtype} {s:.0%}"] for s in SPARSITIES}
        report.note(f"{title}break-even of {dtype}", break_even(times[f"dense {dtype}"], found))
    if tokens == 1:
        for dtype, target in (("f16", 1.5), ("i8", 1.3)):
            value = ratio(times[f"dense {dtype}"], times[f"sparse {dtype} 50%"])
            report.bar(f"sparse_{dtype}_50_by_dense_{dtype}_{n}", value, ">=", target)
            value = ratio(times[f"dense {dtype}"], times[f"sparse {dtype} 50% in {TIERS} tiers"])
            report.bar(f"sparse_{dtype}_50_in_tiers_by_dense_{dtype}_{n}", value, ">=", target)
    mine = {key: m * n / min(some) for key, some in times.items()}
    for key, some in in_turn(peers(n, m // CSR_SHARE, tokens, rng)).items():
        rate = m // CSR_SHARE * n / min(some)
        ours = "sparse i8 " + key.rpartition(" ")[2] if "CSR" in key else "sparse i8 50%"
        text = f"{rate * tokens / 1e9:6.1f} G weights x tokens/s; our {ours} is {mine[ours] / rate:.1f}x"
        report.note(title + key, text, some)


def main() -> int:
    """Measure and compare."""
    restart_with_kernels()
    report, rng = Report("Products with sparse tiers"), np.random.default_rng(0)
    threads = min(os.cpu_count() or 1, numba.config.NUMBA_NUM_THREADS)
    plain = plain_reads(report, [threads])[threads]
    torch.set_num_threads(threads)
    if csr_matrix is None:
        report.note("scipy CSR", "not compared: scipy is not installed")
    for name in LAYERS:
        for tokens in TOKENS:
            compare(report, name, tokens, threads, plain, rng)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
