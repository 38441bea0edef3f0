"""Whole steps by `kernels/step`: the program, the tables of resident blocks, the work space."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...formats.architecture import Architecture
from ...kernels.attention import unit_floats
from ...kernels.planes import FLOATS, INTEGERS, level_stride
from ...kernels.planes import padded as padded_bytes
from ...kernels.rows import PLANE, ROWS
from ...kernels.signs import integral, prepare, table_nbytes
from ...kernels.step import MULTIPLY, run_step
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
        self._blocks = np.zeros((len(program.names), 0, 3), np.int64)
        self._prepared: dict[int, NDArray[np.uint8]] = {}
        self._made = np.zeros(0, np.uint8)
        self._version, self._forms = -1, 1
        widest = int(program.shapes[:, 1].max())
        self._padded = padded_bytes(widest)
        self._levels = lines((threads, ROWS * level_stride(widest)), np.uint8)
        self._rows = lines((threads, 2 + ROWS, self._padded), np.float32)
        self._floats, self._integers = lines((threads, FLOATS), np.float32), lines((threads, INTEGERS), np.int64)
        self._tables = lines((threads, 0), np.uint8)
        self._units = lines((threads, unit_floats(a.heads // a.kv_heads, a.head_dim)), np.float32)
        self._counters = counters_for(len(program.phases))
        self._space: tuple[NDArray[Any], ...] = ()

    def run(self, batch: Batch, hidden: F32, wanted: I64) -> F32:
        """Embedded tokens `[T, d]`, used up -> logits of the tokens `wanted`."""
        self._follow_tables()
        a, tokens = self._a, hidden.shape[0]
        if not self._space or not tokens <= len(self._space[0]) <= _SLACK * max(tokens, _SLACK):
            self._space = ()  # before the next is made
            wide, narrow = a.heads * a.head_dim, a.kv_heads * a.head_dim
            self._space = (
                *(lines((tokens, n), np.float32) for n in (wide + 2 * narrow, wide, 2 * a.intermediate)),
                lines((self._forms * tokens * self._padded,), np.int8),
                *(lines((self._forms * tokens * self._padded // 32,), kind) for kind in (np.float32, np.int32)),
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
            self._made,
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
            self._floats,
            self._integers,
            self._tables,
            self._units,
            self._counters,
        )
        return logits

    @property
    def work_nbytes(self) -> int:
        """Bytes of all work space."""
        scratch = (self._levels, self._rows, self._floats, self._integers, self._tables, self._units)
        return self.cache_nbytes + sum(array.nbytes for array in (*scratch, self._blocks, self._made))

    @property
    def cache_nbytes(self) -> int:
        """Bytes of the work space that `trim` gives back."""
        return sum(array.nbytes for array in self._space)

    def trim(self) -> None:
        """Give back the work space that the next step could do without finding."""
        self._space = ()

    def _follow_tables(self) -> None:
        if self._version == self._weights.version:
            return
        tables = [self._weights.table(name) for name in self._program.names]
        self._blocks = np.zeros((len(tables), max(map(len, tables)), 3), np.int64)
        for place, table in enumerate(tables):
            if len(table) != self._shapes[place, 2] and integral(table):
                m, n = self._shapes[place, :2]
                self._prepared[place] = prepare(self._weights.stored, table, int(m), int(n))
            elif not integral(table):
                self._prepared.pop(place, None)
            self._shapes[place, 2] = len(table)
            self._blocks[place, : len(table)] = table
        self._gather_prepared()
        self._number_forms()
        nbytes = max(map(table_nbytes, tables, self._shapes[:, 1]))
        if nbytes > self._tables.shape[1]:
            self._tables = lines((len(self._levels), nbytes), np.uint8)
        self._version = self._weights.version

    def _gather_prepared(self) -> None:
        """One array of all that was prepared, each part at a cache line."""
        self._made = lines((sum(map(len, self._prepared.values())),), np.uint8)
        at = 0
        for place, made in self._prepared.items():
            self._made[at : at + len(made)], self._shapes[place, 6] = made, at
            self._prepared[place] = self._made[at : at + len(made)]
            at += len(made)

    def _number_forms(self) -> None:
        """In which form of its phase's input each matrix is multiplied: neighbours that want the same share it."""
        most = 1
        for phase in self._program.phases[self._program.phases[:, 0] == MULTIPLY]:
            form, before = -1, ""
            for place in range(phase[1], phase[1] + phase[2]):
                planes = self._blocks[place, 0, 0] >= PLANE
                wanted = "rotated" if planes else f"times {place}" if place in self._prepared else "plain"
                form, before = form + (wanted != before), wanted
                self._shapes[place, 5] = form
            most = max(most, form + 1)
        if most > self._forms:
            self._forms, self._space = most, ()
