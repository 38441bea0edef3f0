"""The forward pass for serving: numba kernels over resident blocks and KV blocks. Neither torch nor BLAS.

`Batch` is one step's tokens; `serve` builds a `Network` whose linears read whatever prefix of the stack is resident
at the moment they are called.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ...formats.architecture import Architecture, weight_shapes
from ...formats.blocks import rotation_signs, unpack_dense
from ...formats.kinds import rotation_blocks
from ...formats.stack import BlockEntry
from ...kernels.attention import attend, store_kv
from ...kernels.elementwise import add, gated, rms_norm, rotate
from ...kernels.hadamard import rotate_inputs, unrotate_rows
from ...kernels.matmul import matmul, row_stride, take_rows
from ...kernels.rows import PLANE, ROWS
from .network import Linear, Network, build_layer
from .rotary import rotary_frequencies
from .scheduler import Piece

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

_CHUNKS_PER_THREAD: Final = 2


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


class Scratch:
    """Row buffers of the matrix product, one for each width, shared by all linears of a model."""

    def __init__(self, threads: int) -> None:
        self._chunks = threads * _CHUNKS_PER_THREAD
        self._rows: dict[int, F32] = {}

    def rows(self, n: int) -> F32:
        """`[chunks, ROWS, row_stride(width)]` for inputs of n columns, zero past n."""
        if n not in self._rows:
            self._rows[n] = np.zeros((self._chunks, ROWS, row_stride(padded_width(n))), np.float32)
        return self._rows[n]


class Rotation:
    """The rotation of inputs of n columns. Linears that read the same input in turn share what was computed for it."""

    def __init__(self, n: int) -> None:
        self._signs, self._sizes = rotation_signs(n), np.array(rotation_blocks(n), np.int64)
        self._of: F32 | None = None
        self._rotated: F32 | None = None

    def inputs(self, x: F32) -> F32:
        """`x [T, n]` rotated, `[T, padded_width(n)]`, zero past n. `x` must not change while it is in use."""
        if self._of is not x or self._rotated is None:
            rotated = np.zeros((x.shape[0], padded_width(x.shape[1])), np.float32)
            rotate_inputs(x, self._signs, self._sizes, rotated)
            self._of, self._rotated = x, rotated
        return self._rotated

    def rows(self, y: F32) -> None:
        """Rotate rows of a stored weight, `[T, n]`, back, in place."""
        unrotate_rows(y, self._signs, self._sizes, y)


class Shared:
    """What the linears of one model share: scratch and rotations, by width."""

    def __init__(self, threads: int) -> None:
        self.scratch = Scratch(threads)
        self._rotations: dict[int, Rotation] = {}

    def rotation(self, n: int) -> Rotation:
        """Of inputs of n columns."""
        if n not in self._rotations:
            self._rotations[n] = Rotation(n)
        return self._rotations[n]


class ResidentLinear:
    """One weight matrix `[m, n]` as the blocks that are resident now."""

    def __init__(self, weights: Weights, name: str, shape: tuple[int, int], bias: F32 | None, shared: Shared) -> None:
        self._weights, self._name, self._bias, self._shared = weights, name, bias, shared
        self._m, self._n = shape

    def __call__(self, x: F32) -> F32:
        """`x [T, n] -> [T, m]`."""
        table = self._weights.table(self._name)
        if _rotated(table):
            x = self._shared.rotation(self._n).inputs(x)
        elif padded_width(self._n) != self._n:
            x = np.pad(x, ((0, 0), (0, padded_width(self._n) - self._n)))
        y = np.empty((x.shape[0], self._m), np.float32)
        matmul(self._weights.stored, table, self._n, x, self._shared.scratch.rows(self._n), y)
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

    def __init__(self, pieces: Rows[Piece], kv: F32, a: Architecture, threads: int) -> None:
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
        self._kv, self._window = kv, a.window or 0
        angles = np.outer(self._positions, rotary_frequencies(a))
        self._cosine, self._sine = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self._rows = np.arange(len(self.tokens))
        longest = int(self._positions.max()) + 1
        self._scores: F32 = np.empty((threads * _CHUNKS_PER_THREAD, longest), np.float32)

    def rotate(self, x: F32) -> F32:
        """Rotary embedding at this step's positions."""
        y = np.empty_like(x)
        rotate(x, self._rows, self._cosine, self._sine, y)
        return y

    def attend(self, layer: int, q: F32, k: F32, v: F32) -> F32:
        """Store this step's keys and values, then attend."""
        store_kv(self._kv, layer, self._tables, self._sequence, self._positions, k, v)
        y = np.empty((q.shape[0], q.shape[1] * q.shape[2]), np.float32)
        attend(self._kv, layer, self._tables, self._sequence, self._positions, q, self._window, self._scores, y)
        return y


def serve(a: Architecture, weights: Weights, threads: int) -> Network[F32]:
    """A network over resident blocks; the base of the stack must be resident already."""
    shared, shapes = Shared(threads), weight_shapes(a)

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
            shared.rotation(a.hidden).rows(y)
        return y

    return Network(
        architecture=a,
        ops=ServingOps(),
        embed=embed,
        layers=tuple(build_layer(a, index, vector, linear) for index in range(a.layers)),
        final_norm=vector("final_norm"),
        head=linear("embed" if a.tied else "head", None),
    )
