"""How many threads the kernels use: set once, before the first kernel runs."""

from __future__ import annotations

import numba

from .rows import JIT_OFF


def set_threads(count: int) -> int:
    """Use `count` threads, or as many as there are processors; returns what is used."""
    numba.set_num_threads(max(1, min(count, int(vars(numba.config)["NUMBA_NUM_THREADS"]))))
    return int(numba.get_num_threads())


def thread_count() -> int:
    """How many threads a parallel region of this thread has."""
    return 1 if JIT_OFF else int(numba.get_num_threads())
