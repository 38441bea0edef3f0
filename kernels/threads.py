"""How many threads the kernels use: set once, before the first kernel runs."""

from __future__ import annotations

import os

import numba


def set_threads(count: int | None = None) -> int:
    """Use `count` threads (default: the processors this process may run on); returns what is used."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    numba.set_num_threads(max(1, min(count or usable, int(vars(numba.config)["NUMBA_NUM_THREADS"]))))
    return int(numba.get_num_threads())
