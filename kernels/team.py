"""Threads that work through one step together: shares of a phase, and the end of a phase.

The threads of one parallel region run a step as a sequence of phases. In each they claim shares until none is left, so
that a thread which the system holds up costs one share of its time, not half of the phase; then they wait for each
other. Waiting spins, and only within a step: between steps nobody does. A thread that waits for long is waiting for one
that the system holds up, most likely because another program wants the processors: it then sleeps, a little at a time.
(Offering the processor, `sched_yield`, gives a busy neighbour a whole time slice, which took nine tenths of the speed
beside one single program.)

All of this needs every thread of the region to be running, which numba's `workqueue` layer grants: a region of as many
iterations as threads gives each thread one.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic
from numpy.typing import NDArray

from .rows import JIT_OFF

LINE: Final = 8  # i64 in one cache line: counters of different phases do not share one
SPINS: Final = 500_000  # turns of about 0.7 ns: longer than one share of a phase takes
NAP_MICROSECONDS: Final = 50

I64 = NDArray[np.int64]


def _place(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _typed_fetch_add(typing: Any, counters: Any, index: Any, amount: Any) -> Any:
    """The counter before `amount` was added, atomically."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = _place(context, builder, sig.args[0], args[0], args[1])
        return builder.atomic_rmw("add", place, args[2], "seq_cst")

    return types.int64(counters, types.int64, types.int64), codegen


def _typed_look(typing: Any, counters: Any, index: Any) -> Any:
    """The counter, as the other threads left it."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_place(context, builder, sig.args[0], args[0], args[1]), "seq_cst", 8)

    return types.int64(counters, types.int64), codegen


def _typed_nap(typing: Any) -> Any:
    """Sleep for a moment."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        number = ir.IntType(32)
        sleep = get_or_insert_function(builder.module, ir.FunctionType(number, [number]), "usleep")
        builder.call(sleep, [number(NAP_MICROSECONDS)])
        return context.get_dummy_value()

    return types.void(), codegen


def _plain_fetch_add(counters: I64, index: int, amount: int) -> int:
    before = int(counters[index])
    counters[index] += amount
    return before


def _plain_look(counters: I64, index: int) -> int:
    return int(counters[index])


def _plain_nap() -> None:
    pass


_fetch_add: Any = _plain_fetch_add if JIT_OFF else intrinsic(_typed_fetch_add)
_look: Any = _plain_look if JIT_OFF else intrinsic(_typed_look)
_nap: Any = _plain_nap if JIT_OFF else intrinsic(_typed_nap)


def counters_for(phases: int) -> I64:
    """Counters of a step of at most so many phases, to be zeroed before each."""
    return np.zeros((2 * phases + 2) * LINE, np.int64)


@njit(nogil=True)
def claim(counters: I64, phase: int) -> int:
    """The next share of a phase that nobody has claimed: 0, 1, ..."""
    return int(_fetch_add(counters, 2 * phase * LINE, 1))


@njit(nogil=True)
def finish(counters: I64, phase: int, threads: int) -> None:
    """Wait until every thread has finished the phase."""
    place = (2 * phase + 1) * LINE
    _fetch_add(counters, place, 1)
    turns = 0
    while _look(counters, place) < threads:
        turns += 1
        if turns > SPINS:
            _nap()
