"""The forward pass for serving: numba kernels over resident blocks and KV blocks. Neither torch nor BLAS.

`Batch` is one step's tokens; `serve` builds a `Network` whose linears read whatever prefix of the stack is resident
at the moment they are called.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ...formats.architecture import Architecture, weight_shapes
from ...formats.blocks import rotation_signs, unpack_dense
from ...formats.kinds import rotation_blocks
from ...formats.stack import BlockEntry
from ...kernels.attention import KINDS, attend, store_kv, unit_floats
from ...kernels.elementwise import add, gated, rms_norm, rotate
from ...kernels.hadamard import rotate_inputs, unrotate_rows
from ...kernels.instructions import choose
from ...kernels.matmul import matmul, row_stride, take_rows
from ...kernels.planes import level_stride, multiply_planes
from ...kernels.planes import padded as padded_bytes
from ...kernels.quantize import quantize_inputs
from ...kernels.rows import PLANE, ROWS
from .network import Linear, Network, build_layer
from .rotary import rotary_frequencies
from .scheduler import Piece

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

_CHUNKS_PER_THREAD: Final = 2
_LITTLE: Final = 1 << 21  # multiply-adds of queries and keys that take less than waking threads, 40 us (AMD EPYC)
_LINE: Final = 64  # bytes of a cache line, and of the widest vector


class Weights(Protocol):
    """The resident prefix of a stack (`worker/resident`)."""

    @property
    def stored(self) -> NDArray[np.uint16]:
        """All resident bytes."""
        ...

    def table(self, tensor: str) -> I64:
        """A tensor's resident blocks."""
        ...

    def payload(self, tensor: str) -> tuple[BlockEntry, NDArray[np.uint8]]:
        """A vector's only block."""
        ...


class ServingOps:
    """`Ops` on numpy arrays, by kernels."""

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        """Over the last axis."""
        y = np.empty_like(x)
        rms_norm(x.reshape(-1, x.shape[-1]), weight, eps, y.reshape(-1, x.shape[-1]))
        return y

    def add(self, x: F32, y: F32) -> F32:
        """`x + y`; `y` may be one row."""
        z = np.empty_like(x)
        add(x, y, z)
        return z

    def gated(self, gate: F32, up: F32) -> F32:
        """`silu(gate) * up`."""
        y = np.empty_like(gate)
        gated(gate, up, y)
        return y

    def heads(self, x: F32, head_dim: int) -> F32:
        """Split the last axis."""
        return x.reshape(x.shape[0], -1, head_dim)


def padded_width(n: int) -> int:
    """Columns of an input that the kernels want: n rounded up to 64."""
    return -(-n // 64) * 64


def _lines(shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
    """Zeros that begin at a cache line, which vector loads then do not straddle."""
    nbytes = prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(nbytes + _LINE, np.uint8)
    start = -raw.ctypes.data % _LINE
    return raw[start : start + nbytes].view(dtype).reshape(shape)


@dataclass(frozen=True)
class Quantized:
    """Tokens as `kernels/planes` wants them, for inputs of n columns: `q [T, p]`, the others `[T, p / 32]`."""

    q: NDArray[np.int8]
    scales: F32
    corrections: NDArray[np.int32]


class Inputs:
    """What linears of one width do with their inputs. Those that read the same one in turn share what was computed."""

    def __init__(self, n: int, threads: int) -> None:
        self._n, self._chunks = n, threads * _CHUNKS_PER_THREAD
        self._signs, self._sizes = rotation_signs(n), np.array(rotation_blocks(n), np.int64)
        self._of: F32 | None = None
        self._as: F32 | Quantized | None = None

    @cached_property
    def rows(self) -> F32:
        """Scratch of `matmul`: `[chunks, ROWS, row_stride(width)]`, zero past n."""
        return np.zeros((self._chunks, ROWS, row_stride(padded_width(self._n))), np.float32)

    @cached_property
    def levels(self) -> NDArray[np.uint8]:
        """Scratch of `multiply_planes`: `[chunks, ROWS, level_stride(n)]`."""
        return _lines((self._chunks, ROWS, level_stride(self._n)), np.uint8)

    def quantized(self, x: F32) -> Quantized:
        """`x [T, n]` rotated and in bytes. `x` must not change while it is in use."""
        if self._of is not x or not isinstance(self._as, Quantized):
            tokens, p = x.shape[0], padded_bytes(self._n)
            self._of, self._as = (
                x,
                Quantized(
                    _lines((tokens, p), np.int8),
                    _lines((tokens, p // 32), np.float32),
                    _lines((tokens, p // 32), np.int32),
                ),
            )
            quantize_inputs(x, self._signs, self._sizes, self._as.q, self._as.scales, self._as.corrections)
        return self._as

    def rotated(self, x: F32) -> F32:
        """`x [T, n]` rotated, `[T, padded_width(n)]`, zero past n. `x` must not change while it is in use."""
        if self._of is not x or not isinstance(self._as, np.ndarray):
            self._of, self._as = x, np.zeros((x.shape[0], padded_width(self._n)), np.float32)
            rotate_inputs(x, self._signs, self._sizes, self._as)
        return self._as

    def rotate_back(self, y: F32) -> None:
        """Rows of a stored weight, `[T, n]`, in place."""
        unrotate_rows(y, self._signs, self._sizes, y)


class Shared:
    """What the linears of one model share: how they multiply, and their inputs by width."""

    def __init__(self, threads: int, exact: bool) -> None:
        self.exact, self.instructions = exact, choose()
        self._threads = threads
        self._inputs: dict[int, Inputs] = {}

    def inputs(self, n: int) -> Inputs:
        """Of n columns."""
        if n not in self._inputs:
            self._inputs[n] = Inputs(n, self._threads)
        return self._inputs[n]


class ResidentLinear:
    """One weight matrix `[m, n]` as the blocks that are resident now."""

    def __init__(self, weights: Weights, name: str, shape: tuple[int, int], bias: F32 | None, shared: Shared) -> None:
        self._weights, self._name, self._bias, self._shared = weights, name, bias, shared
        self._m, self._n = shape

    def __call__(self, x: F32) -> F32:
        """`x [T, n] -> [T, m]`."""
        table, stored = self._weights.table(self._name), self._weights.stored
        inputs = self._shared.inputs(self._n)
        y = np.empty((x.shape[0], self._m), np.float32)
        if _rotated(table) and not self._shared.exact:
            t = inputs.quantized(x)
            raw = stored.view(np.uint8)
            multiply_planes(
                self._shared.instructions, raw, table, self._n, t.q, t.scales, t.corrections, inputs.levels, y
            )
        else:
            if _rotated(table):
                x = inputs.rotated(x)
            elif padded_width(self._n) != self._n:
                x = np.pad(x, ((0, 0), (0, padded_width(self._n) - self._n)))
            matmul(stored, table, self._n, x, inputs.rows, y)
        if self._bias is not None:
            add(y, self._bias[None], y)
        return y


def _rotated(table: I64) -> bool:
    """Whether a tensor is made of planes, which are stored rotated."""
    return len(table) > 0 and bool(table[0, 0] >= PLANE)


class Batch:
    """The tokens of one step, and attention over the sequences they belong to.

    Rotary sines are taken for this step's positions only: a table for a long context would hold hundreds of megabytes.
    """

    def __init__(self, pieces: Rows[Piece], kv: NDArray[Any], a: Architecture, threads: int) -> None:
        counts = [piece.count for piece in pieces]
        self.tokens: I64 = np.concatenate(
            [np.array(p.sequence.tokens[p.start : p.start + p.count], np.int64) for p in pieces]
        )
        self._positions: I64 = np.concatenate([np.arange(p.start, p.start + p.count, dtype=np.int64) for p in pieces])
        self._sequence: I64 = np.repeat(np.arange(len(pieces), dtype=np.int64), counts)
        self._tables: I64 = np.zeros((len(pieces), max(len(p.sequence.blocks) for p in pieces)), np.int64)
        for row, piece in enumerate(pieces):
            self._tables[row, : len(piece.sequence.blocks)] = piece.sequence.blocks
        self.last: I64 = np.cumsum(counts) - 1
        self._kind, self._kv, self._window = KINDS[f"f{8 * kv.itemsize}"], kv.view(np.uint8), a.window or 0
        angles = np.outer(self._positions, rotary_frequencies(a))
        self._cosine, self._sine = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self._rows = np.arange(len(self.tokens))
        floats = unit_floats(a.heads // a.kv_heads, a.head_dim)
        work = len(self.tokens) * a.heads * a.head_dim * int(self._positions.max())
        chunks = threads * _CHUNKS_PER_THREAD if work > _LITTLE else 1
        self._scratch: F32 = _lines((chunks, floats), np.float32)

    def rotate(self, x: F32) -> F32:
        """Rotary embedding at this step's positions."""
        y = np.empty_like(x)
        rotate(x, self._rows, self._cosine, self._sine, y)
        return y

    def attend(self, layer: int, q: F32, k: F32, v: F32) -> F32:
        """Store this step's keys and values, then attend."""
        where = (self._kind, self._kv, layer, self._tables, self._sequence, self._positions)
        store_kv(*where, k, v)
        y = np.empty((q.shape[0], q.shape[1] * q.shape[2]), np.float32)
        attend(*where, q, self._window, self._scratch, y)
        return y


def serve(a: Architecture, weights: Weights, threads: int, exact: bool = False) -> Network[F32]:
    """A network over resident blocks; the base of the stack must be resident already.

    Planes are multiplied with inputs rounded to bytes; if `exact`, with floats, slowly.
    """
    shared, shapes = Shared(threads, exact), weight_shapes(a)

    def vector(name: str) -> F32:
        entry, payload = weights.payload(name)
        return unpack_dense(payload[: entry.nbytes].tobytes(), entry.shape, entry.dtype)

    def linear(name: str, bias: str | None) -> Linear[F32]:
        m, n = shapes[name]
        return ResidentLinear(weights, name, (m, n), vector(bias) if bias else None, shared)

    def embed(tokens: I64) -> F32:
        y = np.empty((tokens.shape[0], a.hidden), np.float32)
        table = weights.table("embed")
        take_rows(weights.stored, table, a.vocab, tokens, y)
        if _rotated(table):
            shared.inputs(a.hidden).rotate_back(y)
        return y

    return Network(
        architecture=a,
        ops=ServingOps(),
        embed=embed,
        layers=tuple(build_layer(a, index, vector, linear) for index in range(a.layers)),
        final_norm=vector("final_norm"),
        head=linear("embed" if a.tied else "head", None),
    )
