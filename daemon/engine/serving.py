"""The forward pass for serving: numba kernels over resident blocks and KV blocks. Neither torch nor BLAS.

`ServingNetwork` computes with whatever prefix of the stack is resident when it is called: a whole step in one program
(`steps`), or operation by operation, as `Network` describes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ...formats.architecture import Architecture, weight_shapes
from ...formats.blocks import rotation_signs, unpack_dense
from ...formats.kinds import rotation_blocks
from ...kernels.elementwise import add, gated, rms_norm
from ...kernels.hadamard import rotate_inputs, unrotate_rows
from ...kernels.instructions import choose
from ...kernels.matmul import matmul, row_stride, take_rows
from ...kernels.planes import level_stride, multiply_planes
from ...kernels.planes import padded as padded_bytes
from ...kernels.quantize import quantize_inputs
from ...kernels.rounding import round_inputs
from ...kernels.rows import I8, MASK, PLANE, ROWS, SIGNS
from ...kernels.signs import integral, multiply_sum, prepare
from .batch import CHUNKS_PER_THREAD, Batch
from .network import Linear, Network, build_layer
from .program import build_program
from .steps import Steps
from .weights import Weights, lines

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


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


@dataclass(frozen=True)
class Quantized:
    """Tokens as `kernels/planes` wants them, for inputs of n columns: `q [T, p]`, the others `[T, p / 32]`."""

    q: NDArray[np.int8]
    scales: F32
    corrections: NDArray[np.int32]


class Inputs:
    """What linears of one width do with their inputs. Those that read the same one in turn share what was computed."""

    def __init__(self, n: int, threads: int) -> None:
        self._n, self._chunks = n, threads * CHUNKS_PER_THREAD
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
        return lines((self._chunks, ROWS, level_stride(self._n)), np.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes of scratch and of what was computed last."""
        made = [self.__dict__[name] for name in ("rows", "levels") if name in self.__dict__]
        match self._as:
            case Quantized(q, scales, corrections):
                made += [q, scales, corrections]
            case np.ndarray():
                made.append(self._as)
        return sum(array.nbytes for array in made)

    def quantized(self, x: F32) -> Quantized:
        """`x [T, n]` rotated and in bytes. `x` must not change while it is in use."""
        if self._of is not x or not isinstance(self._as, Quantized):
            self._of, self._as = x, self._space(x)
            quantize_inputs(x, self._signs, self._sizes, self._as.q, self._as.scales, self._as.corrections)
        return self._as

    def rounded(self, x: F32, c: F32) -> Quantized:
        """`x [T, n]` in bytes, as `rounding.round_inputs` does it."""
        t = self._space(x)
        round_inputs(x, c, t.q, t.scales, t.corrections)
        return t

    def _space(self, x: F32) -> Quantized:
        tokens, p = x.shape[0], padded_bytes(self._n)
        shape = (tokens, p // 32)
        return Quantized(lines((tokens, p), np.int8), lines(shape, np.float32), lines(shape, np.int32))

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

    @property
    def nbytes(self) -> int:
        """Bytes that all inputs keep."""
        return sum(inputs.nbytes for inputs in self._inputs.values())

    def trim(self) -> None:
        """Forget all inputs; they are made again when they are wanted."""
        self._inputs.clear()


class ResidentLinear:
    """One weight matrix `[m, n]` as the blocks that are resident now."""

    def __init__(self, weights: Weights, name: str, shape: tuple[int, int], bias: F32 | None, shared: Shared) -> None:
        self._weights, self._name, self._bias, self._shared = weights, name, bias, shared
        self._m, self._n = shape
        self._made, self._made_of = np.zeros(0, np.uint8), 0

    def __call__(self, x: F32) -> F32:
        """`x [T, n] -> [T, m]`."""
        table, stored = self._weights.table(self._name), self._weights.stored
        inputs = self._shared.inputs(self._n)
        y = np.empty((x.shape[0], self._m), np.float32)
        code, raw = self._shared.instructions, stored.view(np.uint8)
        if _rotated(table) and not self._shared.exact:
            t = inputs.quantized(x)
            multiply_planes(code, raw, table, self._n, t.q, t.scales, t.corrections, inputs.levels, y)
        elif _coarse(table) and not self._shared.exact:
            made = self._prepare(table)
            t = inputs.rounded(x, made[: 4 * self._n].view(np.float32))
            multiply_sum(code, raw, table, made, self._n, t.q, t.scales, t.corrections, inputs.levels, inputs.rows, y)
        else:
            if _rotated(table):
                x = inputs.rotated(x)
            elif padded_width(self._n) != self._n:
                x = np.pad(x, ((0, 0), (0, padded_width(self._n) - self._n)))
            matmul(stored, table, self._n, x, inputs.rows, y)
        if self._bias is not None:
            add(y, self._bias[None], y)
        return y

    def _prepare(self, table: I64) -> NDArray[np.uint8]:
        """What `signs.prepare` makes of the resident blocks, if it is wanted."""
        if self._made_of != len(table):
            self._made_of = len(table)
            wanted = integral(table)
            self._made = prepare(self._weights.stored, table, self._m, self._n) if wanted else np.zeros(0, np.uint8)
        return self._made


def _rotated(table: I64) -> bool:
    """Whether a tensor is made of planes, which are stored rotated."""
    return len(table) > 0 and bool(table[0, 0] >= PLANE)


def _coarse(table: I64) -> bool:
    """Whether rounding to bytes loses nothing worth keeping: not of numbers stored as floats, unless those are a
    pruned weight's values.
    """
    return all(kind in (I8, SIGNS) or kind >= MASK for kind in table[:, 0])


class ServingNetwork:
    """The forward pass over resident blocks; the base of the stack must be resident already.

    Weights are multiplied in integers, a whole step in one compiled program. Where matrices are stored as floats, or if
    `exact`, floats are, and operations run one by one.
    """

    def __init__(self, a: Architecture, weights: Weights, threads: int, exact: bool = False) -> None:
        self._a, self._weights, self._threads = a, weights, threads
        self._shared, self._shapes = Shared(threads, exact), weight_shapes(a)
        self.network = Network(
            architecture=a,
            ops=ServingOps(),
            embed=self._embed,
            layers=tuple(build_layer(a, index, self._vector, self._linear) for index in range(a.layers)),
            final_norm=self._vector("final_norm"),
            head=self._linear("embed" if a.tied else "head", None),
        )
        matrices = [name for name, shape in self._shapes.items() if len(shape) > 1]
        whole = not exact and all(_coarse(weights.table(name)) for name in matrices)
        self._steps = (
            Steps(a, build_program(a, self._vector), weights, threads, self._shared.instructions) if whole else None
        )

    def logits(self, batch: Batch, rows: list[int]) -> F32:
        """Logits `[len(rows), v]` of some of a step's tokens; all of them get their keys and values stored."""
        hidden = self._embed(batch.tokens)
        if self._steps is not None:
            return self._steps.run(batch, hidden, np.array(rows, np.int64))
        hidden = self.network.forward(batch.tokens, batch)
        return self.network.head(hidden[rows]) if rows else np.empty((0, self._a.vocab), np.float32)

    @property
    def work_nbytes(self) -> int:
        """Bytes of work space that is kept from step to step."""
        return self._steps.work_nbytes if self._steps else self._shared.nbytes

    @property
    def cache_nbytes(self) -> int:
        """Bytes of it that `trim` gives back."""
        return self._steps.cache_nbytes if self._steps else self._shared.nbytes

    def trim(self) -> None:
        """Between steps: keep nothing that the next one can make again."""
        self._shared.trim()
        if self._steps is not None:
            self._steps.trim()

    def _vector(self, name: str) -> F32:
        entry, payload = self._weights.payload(name)
        return unpack_dense(payload[: entry.nbytes].tobytes(), entry.shape, entry.dtype)

    def _linear(self, name: str, bias: str | None) -> Linear[F32]:
        m, n = self._shapes[name]
        return ResidentLinear(self._weights, name, (m, n), self._vector(bias) if bias else None, self._shared)

    def _embed(self, tokens: I64) -> F32:
        y = np.empty((tokens.shape[0], self._a.hidden), np.float32)
        table = self._weights.table("embed")
        take_rows(self._weights.stored, table, self._a.vocab, tokens, y)
        if _rotated(table):
            self._shared.inputs(self._a.hidden).rotate_back(y)
        return y
