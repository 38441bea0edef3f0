"""The `nested` codec: one matrix -> its `plane` blocks, most significant first.

Method, for a weight W `[m, n]` whose inputs have the second moment H:

1. Rotate both (`formats/kinds`). Outliers are spread out, and every row of W looks Gaussian.
2. Choose an index of D bits for every weight from a tree codebook for Gaussian numbers, whose first d bits are an index
   of depth d: one pass of error feedback (GPTQ, arXiv 2210.17323) for a weighted mix of the depths.
3. Fit each row's levels of each depth by least squares, `L = (S^T H S)^-1 S^T H w` with S the one-hot matrix of the
   row's indices, shrunk towards the codebook; round them to what is stored. A table for each row is worth its bytes
   only in wide matrices; else all rows share one, fitted too, and each has a scale, fitted once the levels are
   integers. On the demo (512 and 1280 wide)
   tables up to depth 3 made the KL 3 % less, for 0.16 bit a weight, with which the next plane makes it 20 % less.
4. Coordinate descent over all depths at once, then fit again; a few times.

H is regularised throughout: real layers have one direction with 90 times the mean energy, and whoever fits it exactly
fits nothing else. The loops are in `kernels/nested`; which block goes where is `order`'s business, what its gain is
`gain`'s. Needs torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...formats.blocks import pack_plane, rotate_rows
from ...formats.container import content_hash
from ...formats.errors import CorruptCheckpoint, InvalidRequest
from ...formats.index import BlockEntry
from ...formats.kinds import BASE_PLANES, MAX_DEPTH, ROW_LEVELS, SHARED_LEVELS, payload_nbytes, plane_depth
from ...kernels.nested import descend, feedback, gather_moments
from .encode_bitstack import Level, checked_weight

DEFAULT_LEVELS: Final = 5
MAX_LEVELS: Final = MAX_DEPTH - BASE_PLANES + 1
ROW_TABLE_COLUMNS: Final = 512  # for each level of a row's own: such a table may cost 1/64 bit a weight

DAMPING: Final = 0.05  # of H's mean diagonal
SHRINKAGE: Final = 1e-2  # of the fit's mean diagonal, towards the codebook
SWEEPS: Final = 3
LARGEST_LEVEL: Final = 127
STEP_RANGE: Final = (1e-3, 1.0)  # in a row of size 1, whose largest level is not far from 4
ROWS_AT_ONCE: Final = 1024  # rows worked on together: bounds the memory of what is kept for each depth
CODEBOOK_SAMPLES: Final = 100_000
# What the error at depth d counts: in the feedback, where deeper errors are smaller by themselves, and in the descent,
# where each depth's is divided by what it is.
FEEDBACK_WEIGHTS: Final = (0.3, 0.6, 1.0, 1.0, 1.0, 1.0, 1.0)
DESCENT_WEIGHTS: Final = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


@dataclass(frozen=True)
class InputMetric:
    """What all linears that read one input share: its rotated second moment.

    `h [n, n]` is regularised and scaled to a mean diagonal of about 1, `exact [n, n]` neither. `inverse [n, n]` and
    `order [n]` are what `kernels/nested.feedback` wants: columns are done in this order.
    """

    exact: Tensor
    h: Tensor
    order: Tensor
    inverse: Tensor


def input_metric(inputs: Tensor) -> InputMetric:
    """From `H [n, n]`. Raises `CorruptCheckpoint` when it is not finite."""
    if not torch.isfinite(inputs).all():
        raise CorruptCheckpoint("the squares of the model's activations are not finite: its weights cannot be right")
    exact = _rotated(_rotated(inputs).T)
    unit = float(exact.diagonal().mean())
    h = exact / unit if unit > 0 else torch.zeros_like(exact)
    h.diagonal().add_(DAMPING)
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    inverse = _inverse_factor(h[order][:, order])
    return InputMetric(exact, h.contiguous(), order, inverse)


def choose_levels(wanted: int | None) -> int:
    """`wanted`, or the default. Raises `InvalidRequest` outside [1, 7]."""
    levels = DEFAULT_LEVELS if wanted is None else wanted
    if not 1 <= levels <= MAX_LEVELS:
        raise InvalidRequest(f"nested levels must be between 1 and {MAX_LEVELS}, not {levels}")
    return levels


def row_depth(n: int) -> int:
    """The deepest depth at which each row of n columns has a table of its own; below 2 none has."""
    return (n // ROW_TABLE_COLUMNS).bit_length() - 1


def level_dtype(n: int, level: int) -> str:
    """How the levels of a tensor's block number `level` are stored."""
    return ROW_LEVELS if plane_depth(level) <= row_depth(n) else SHARED_LEVELS


def encode_planes(
    tensor: str, weight: Tensor, metric: InputMetric, *, uses: tuple[str, ...], levels: int, seed: int
) -> Iterator[Level]:
    """Encode `weight [m, n]` into `levels` blocks. Deterministic for a seed, on one machine.

    Raises `CorruptCheckpoint` for weights that are not finite, or beyond 1e6.
    """
    rotated = _rotated(checked_weight(tensor, weight))
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(tensor.encode()))
    encoder = _Encoder(rotated, metric, levels)
    for _ in range(SWEEPS):
        encoder.improve(torch.randperm(len(metric.h), generator=generator).numpy())
    before = row_errors(rotated, metric.exact)
    for level, table in enumerate(encoder.tables):
        planes = _planes(encoder.index, level, levels)
        payload = pack_plane(planes, table.scale, table.stored)
        after = torch.cat([row_errors(encoder.error(level, rows), metric.exact) for rows in _parts(len(rotated))])
        entry = BlockEntry(
            kind="plane",
            tensor=tensor,
            level=level,
            shape=tuple(weight.shape),
            nbytes=payload_nbytes("plane", tuple(weight.shape), dtype=level_dtype(weight.shape[1], level), level=level),
            gain=0.0,
            hash=content_hash(payload),
            uses=uses,
            dtype=level_dtype(weight.shape[1], level),
        )
        yield Level(entry, payload, before, after)
        before = after


def row_errors(error: Tensor, h: Tensor) -> Tensor:
    """(E H E^T)_rr of each row of E `[m, n]`, `-> [m]`."""
    return ((error @ h) * error).sum(dim=1).clamp_(min=0)


@cache
def gaussian_codebook(depth: int) -> F32:
    """The heap of a tree of levels for standard normal numbers, `[2^(depth + 1)]`: each interval is cut in two where
    the squared error falls most, and its level is its mean.
    """
    normal = NormalDist()
    x = np.array([normal.inv_cdf((i + 0.5) / CODEBOOK_SAMPLES) for i in range(CODEBOOK_SAMPLES)])
    total = np.concatenate([[0.0], np.cumsum(x)])
    heap = np.zeros(2 << depth, np.float32)
    pieces = [(0, CODEBOOK_SAMPLES)]
    for d in range(1, depth + 1):
        pieces = [half for piece in pieces for half in _halves(total, *piece)]
        heap[1 << d : 2 << d] = [(total[stop] - total[start]) / (stop - start) for start, stop in pieces]
    return heap


def _halves(total: NDArray[np.float64], start: int, stop: int) -> tuple[tuple[int, int], tuple[int, int]]:
    cuts = np.arange(start + 1, stop)
    left, right = total[cuts] - total[start], total[stop] - total[cuts]
    cut = int(cuts[np.argmax(left**2 / (cuts - start) + right**2 / (stop - cuts))])
    return (start, cut), (cut, stop)


@dataclass(frozen=True)
class _Table:
    """The levels of one depth as stored, and what they mean: `values [m, 2^d]`."""

    scale: F32
    stored: NDArray[np.int8]
    values: F32


class _Encoder:
    """The state of encoding one matrix: leaf `index [m, n]`, and the tables of every level."""

    def __init__(self, rows: Tensor, metric: InputMetric, levels: int) -> None:
        self._rows, self._metric, self._levels = rows, metric, levels
        self._depth = plane_depth(levels - 1)
        self._own = min(max(row_depth(rows.shape[1]), BASE_PLANES - 1), self._depth)
        self._size = rows.square().mean(1).sqrt_()
        self._sized_one = rows / torch.where(self._size > 0, self._size, 1.0)[:, None]
        self._curves = [_codebook(d) for d in range(self._own + 1, self._depth + 1)]
        self._steps = torch.ones(len(rows), len(self._curves))  # of rows of size 1
        self.index = self._first_indices()
        self.tables: list[_Table] = []
        self._fit()

    def improve(self, order: NDArray[np.int64]) -> None:
        """One sweep of descent over the columns in `order`, and new levels for what it chose."""
        for rows in _parts(len(self._rows)):
            self._descend(rows, order)
        self._fit()

    def error(self, level: int, rows: slice) -> Tensor:
        """What the levels up to `level` leave of some rows."""
        index = self.index[rows] >> (self._depth - plane_depth(level))
        return self._rows[rows] - torch.from_numpy(
            np.take_along_axis(self.tables[level].values[rows], index.astype(np.intp), axis=1)
        )

    def _first_indices(self) -> U8:
        """Error feedback over rows of size 1."""
        depth, order = self._depth, self._metric.order
        heap, leaf = gaussian_codebook(depth), np.arange(1 << depth)
        weights = np.array(FEEDBACK_WEIGHTS[: depth - 1]) / sum(FEEDBACK_WEIGHTS[: depth - 1])
        values = np.stack([heap[(1 << d) + (leaf >> (depth - d))] for d in range(BASE_PLANES, depth + 1)])
        blend, squares = weights @ values, weights @ values**2
        x = self._sized_one[:, order].contiguous().numpy()
        index = np.empty(x.shape, np.uint8)
        feedback(x, self._metric.inverse.numpy(), blend.astype(np.float32), squares.astype(np.float32), index)
        return np.ascontiguousarray(index[:, torch.argsort(order).numpy()])

    def _descend(self, rows: slice, order: NDArray[np.int64]) -> None:
        index, h = self.index[rows], self._metric.h
        heap = np.zeros((len(index), 2 << self._depth), np.float32)
        weight = np.zeros((len(index), self._depth + 1), np.float32)
        gradient = torch.zeros(len(index), self._depth + 1, index.shape[1])
        total = row_errors(self._rows[rows], h)
        for level, table in enumerate(self.tables):
            d, error = plane_depth(level), self.error(level, rows)
            gradient[:, d] = error @ h
            left = (gradient[:, d] * error).sum(1)
            weight[:, d] = DESCENT_WEIGHTS[level] / left.clamp_min(1e-9 * total + 1e-30)
            heap[:, 1 << d : 2 << d] = table.values[rows]
        descend(h.numpy(), heap, weight, gradient.numpy(), order, index)

    def _fit(self) -> None:
        """The levels of every depth for the present indices, all from one sum over the deepest."""
        parts = [self._fit_rows(rows) for rows in _parts(len(self._rows))]
        self.tables = [_row_table(torch.cat(values)) for values in zip(*(part.own for part in parts), strict=True)]
        for k, curve in enumerate(self._curves):
            self._curves[k] = _solve_curve(torch.stack([part.curves[k] for part in parts]).sum(0), curve)
            self._curves[k] *= LARGEST_LEVEL / self._curves[k].abs().max()
        levels = [curve.round() for curve in self._curves]
        self._steps = torch.cat([self._fit_steps(rows, levels) for rows in _parts(len(self._rows))])
        self.tables += [_shared_table(whole, self._size * self._steps[:, k]) for k, whole in enumerate(levels)]

    def _fit_steps(self, rows: slice, levels: list[Tensor]) -> Tensor:
        """The best step of each row for each of the shared `levels`, `[rows, K]`."""
        x, steps = self._sized_one[rows], []
        for k, whole in enumerate(levels):
            index = torch.from_numpy(self.index[rows] >> (self._depth - self._own - 1 - k))
            values = whole[index.int()]
            seen = values @ self._metric.h
            step = (seen * x).sum(1) / (seen * values).sum(1).clamp_min(1e-30)
            steps.append(step.clamp(*STEP_RANGE))
        return _columns(steps, len(x))

    def _fit_rows(self, rows: slice) -> _Fit:
        x = self._sized_one[rows]
        moments, targets = _moments(x, self._metric, self.index[rows], 1 << self._depth)
        own = []
        for d in range(BASE_PLANES, self._own + 1):
            a, b = _coarser(moments, targets, d)
            own.append(_solve(a, b, _codebook(d)))
        curves = []
        for k, step in enumerate(self._steps[rows].T):
            a, b = _coarser(moments, targets, self._own + 1 + k)
            curves.append(torch.cat([torch.einsum("mkl,m->kl", a, step**2), (step @ b)[:, None]], dim=1))
        return _Fit([values * self._size[rows, None] for values in own], curves)


@dataclass(frozen=True)
class _Fit:
    """For some rows: levels of their own for each depth that has them, then the curve's normal equations `[K, K + 1]`
    for each that has not.
    """

    own: list[Tensor]
    curves: list[Tensor]


def _parts(m: int) -> list[slice]:
    return [slice(start, min(m, start + ROWS_AT_ONCE)) for start in range(0, m, ROWS_AT_ONCE)]


def _columns(parts: list[Tensor], m: int) -> Tensor:
    return torch.stack(parts, dim=1) if parts else torch.zeros(m, 0)


def _codebook(depth: int) -> Tensor:
    """The levels of one depth for rows of size 1."""
    return torch.from_numpy(gaussian_codebook(depth)[1 << depth : 2 << depth])


def _moments(x: Tensor, metric: InputMetric, index: U8, count: int) -> tuple[Tensor, Tensor]:
    moments, targets = np.zeros((len(x), count, count), np.float32), np.zeros((len(x), count), np.float32)
    gather_moments(metric.h.numpy(), np.ascontiguousarray(x.numpy()), index, moments, targets)
    return torch.from_numpy(moments), torch.from_numpy(targets)


def _coarser(moments: Tensor, targets: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The same sums for the first `depth` bits of every index."""
    count = 1 << depth
    return (
        moments.unflatten(1, (count, -1)).unflatten(3, (count, -1)).sum((2, 4)),
        targets.unflatten(1, (count, -1)).sum(2),
    )


def _solve(a: Tensor, b: Tensor, prior: Tensor) -> Tensor:
    """Least squares for `a [m, K, K]`, `b [m, K]`, shrunk towards `prior [K]`."""
    ridge = SHRINKAGE * a.diagonal(dim1=1, dim2=2).mean(1).double()
    a, b = a.double(), b.double() + ridge[:, None] * prior
    a.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    solution: Tensor = torch.linalg.solve(a, b).float()
    return solution


def _solve_curve(equations: Tensor, prior: Tensor) -> Tensor:
    return _solve(equations[None, :, :-1], equations[None, :, -1], prior)[0]


def _row_table(values: Tensor) -> _Table:
    scale = _bf16_above(values.abs().amax(1) / LARGEST_LEVEL)
    levels = (values / torch.where(scale > 0, scale, 1.0)[:, None]).round_().clamp_(-LARGEST_LEVEL, LARGEST_LEVEL)
    return _Table(scale.numpy(), levels.to(torch.int8).numpy(), (scale[:, None] * levels).numpy())


def _shared_table(whole: Tensor, steps: Tensor) -> _Table:
    """Levels `whole [2^d]` times a step for each row."""
    scale = steps.bfloat16().float()
    return _Table(scale.numpy(), whole.to(torch.int8).numpy(), (scale[:, None] * whole).numpy())


def _planes(index: U8, level: int, levels: int) -> NDArray[np.bool_]:
    """The bits of leaf indices that block number `level` of `levels` holds, the top bit first."""
    last = levels - 1 - level
    bits = range(last + BASE_PLANES - 1, last - 1, -1) if level == 0 else (last,)
    return np.stack([(index >> bit & 1).astype(np.bool_) for bit in bits])


def _bf16_above(values: Tensor) -> Tensor:
    """The least bf16 numbers that are not below `values`, all of which are positive or zero."""
    return ((values.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def _rotated(rows: Tensor) -> Tensor:
    return torch.from_numpy(rotate_rows(rows.contiguous().numpy()))


def _inverse_factor(h: Tensor) -> Tensor:
    """The upper Cholesky factor of `h`'s inverse, each row divided by its diagonal."""
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    return upper.div_(upper.diagonal().clone()[:, None]).contiguous()
