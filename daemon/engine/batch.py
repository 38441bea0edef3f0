"""One step's tokens: their positions, and attention over the sequences they belong to."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...formats.architecture import Architecture
from ...kernels.attention import KINDS, attend, store_kv, unit_floats
from ...kernels.elementwise import rotate
from .rotary import rotary_frequencies
from .sequences import Piece
from .weights import lines

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

CHUNKS_PER_THREAD: Final = 2
_LITTLE: Final = 1 << 21  # multiply-adds of queries and keys that take less than waking threads, 40 us (AMD EPYC)


class Batch:
    """The tokens of one step, and attention over the sequences they belong to.

    Rotary sines are taken for this step's positions only: a table for a long context would hold hundreds of megabytes.
    """

    def __init__(self, pieces: Rows[Piece], kv: NDArray[Any], a: Architecture, threads: int) -> None:
        counts = [piece.count for piece in pieces]
        self.tokens: I64 = np.concatenate(
            [np.array(p.sequence.tokens[p.start : p.start + p.count], np.int64) for p in pieces]
        )
        self.positions: I64 = np.concatenate([np.arange(p.start, p.start + p.count, dtype=np.int64) for p in pieces])
        self.sequence: I64 = np.repeat(np.arange(len(pieces), dtype=np.int64), counts)
        self.tables: I64 = np.zeros((len(pieces), max(len(p.sequence.blocks) for p in pieces)), np.int64)
        for row, piece in enumerate(pieces):
            self.tables[row, : len(piece.sequence.blocks)] = piece.sequence.blocks
        self.last: I64 = np.cumsum(counts) - 1
        self.kind, self.kv = KINDS[f"{kv.dtype.kind}{8 * kv.itemsize}"], kv.view(np.uint8)
        self.window = a.window or 0
        angles = np.outer(self.positions, rotary_frequencies(a))
        self.cosine, self.sine = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self._rows = np.arange(len(self.tokens))
        work = len(self.tokens) * a.heads * a.head_dim * int(self.positions.max())
        chunks = threads * CHUNKS_PER_THREAD if work > _LITTLE else 1
        self._scratch_shape = (chunks, unit_floats(a.heads // a.kv_heads, a.head_dim))

    @cached_property
    def _scratch(self) -> F32:
        return lines(self._scratch_shape, np.float32)

    def rotate(self, x: F32) -> F32:
        """Rotary embedding at this step's positions."""
        y = np.empty_like(x)
        rotate(x, self._rows, self.cosine, self.sine, y)
        return y

    def attend(self, layer: int, q: F32, k: F32, v: F32) -> F32:
        """Store this step's keys and values, then attend."""
        where = (self.kind, self.kv, layer, self.tables, self.sequence, self.positions)
        store_kv(*where, k, v)
        y = np.empty((q.shape[0], q.shape[1] * q.shape[2]), np.float32)
        attend(*where, q, self.window, self._scratch, y)
        return y
