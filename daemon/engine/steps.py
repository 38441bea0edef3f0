"""Whole steps by `kernels/step`: the program, the tables of resident blocks, the work space."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...formats.architecture import Architecture
from ...formats.kinds import BASE_PLANES, MAX_DEPTH
from ...kernels.attention import unit_floats
from ...kernels.planes import level_stride
from ...kernels.planes import padded as padded_bytes
from ...kernels.rows import ROWS
from ...kernels.step import run_step
from ...kernels.team import counters_for
from ...kernels.threads import thread_count
from .batch import Batch
from .program import Program
from .weights import Weights, lines

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

_SLACK: Final = 8  # times the tokens of a step, and at least as many squared, is what work space may be kept for


class Steps:
    """Runs `kernels/step` over the resident blocks; keeps its work space."""

    def __init__(self, a: Architecture, program: Program, weights: Weights, threads: int, instructions: int) -> None:
        self._a, self._program, self._weights, self._instructions = a, program, weights, instructions
        self._shapes = program.shapes.copy()
        self._blocks = np.zeros((len(program.names), MAX_DEPTH - BASE_PLANES + 1, 3), np.int64)
        self._edge = -1
        widest = int(program.shapes[:, 1].max())
        self._padded = padded_bytes(widest)
        self._levels = lines((threads, ROWS * level_stride(widest)), np.uint8)
        self._rows = lines((threads, 2, self._padded), np.float32)
        self._units = lines((threads, unit_floats(a.heads // a.kv_heads, a.head_dim)), np.float32)
        self._counters = counters_for(len(program.phases))
        self._space: tuple[NDArray[Any], ...] = ()

    def run(self, batch: Batch, hidden: F32, wanted: I64) -> F32:
        """Embedded tokens `[T, d]`, used up -> logits of the tokens `wanted`."""
        self._follow_edge()
        a, tokens = self._a, hidden.shape[0]
        if not self._space or not tokens <= len(self._space[0]) <= _SLACK * max(tokens, _SLACK):
            self._space = ()  # before the next is made
            wide, narrow = a.heads * a.head_dim, a.kv_heads * a.head_dim
            self._space = (
                *(lines((tokens, n), np.float32) for n in (wide + 2 * narrow, wide, 2 * a.intermediate)),
                lines((tokens * self._padded,), np.int8),
                *(lines((tokens * self._padded // 32,), kind) for kind in (np.float32, np.int32)),
            )
        heads, mixed, gates, q, scales, corrections = self._space
        logits = np.empty((len(wanted), a.vocab), np.float32)
        self._counters[:] = 0
        run_step(
            min(thread_count(), len(self._levels)),
            self._instructions,
            self._program.phases,
            a.norm_eps,
            batch.window,
            self._weights.stored.view(np.uint8),
            self._shapes,
            self._blocks,
            self._program.vectors,
            self._program.signs,
            self._program.sizes,
            hidden,
            heads[:tokens],
            mixed[:tokens],
            gates[:tokens],
            logits,
            wanted,
            q,
            scales,
            corrections,
            batch.kind,
            batch.kv,
            batch.tables,
            batch.sequence,
            batch.positions,
            batch.cosine,
            batch.sine,
            self._levels,
            self._rows,
            self._units,
            self._counters,
        )
        return logits

    @property
    def work_nbytes(self) -> int:
        """Bytes of all work space."""
        return self.cache_nbytes + sum(array.nbytes for array in (self._levels, self._rows, self._units))

    @property
    def cache_nbytes(self) -> int:
        """Bytes of the work space that `trim` gives back."""
        return sum(array.nbytes for array in self._space)

    def trim(self) -> None:
        """Give back the work space that the next step could do without finding."""
        self._space = ()

    def _follow_edge(self) -> None:
        if self._edge == self._weights.blocks:
            return
        for place, name in enumerate(self._program.names):
            table = self._weights.table(name)
            self._shapes[place, 2] = len(table)
            self._blocks[place, : len(table)] = table
        self._edge = self._weights.blocks
