"""How many threads the kernels use: set once, before the first kernel runs."""

from __future__ import annotations

import os

import numba

from .rows import JIT_OFF


def set_threads(count: int | None = None) -> int:
    """Use `count` threads (default: the processors this process may run on); returns what is used."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    numba.set_num_threads(max(1, min(count or usable, int(vars(numba.config)["NUMBA_NUM_THREADS"]))))
    return int(numba.get_num_threads())


def thread_count() -> int:
    """How many threads a parallel region of this thread has."""
    return 1 if JIT_OFF else int(numba.get_num_threads())
