"""64-bit words as sets of columns: counting, and placing the next bits of a stream where another word has ones.

`deposit` is one instruction where the processor has BMI2; elsewhere a loop gives the same bits.
"""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from .instructions import processor_features
from .vectors import call, i64

U64 = NDArray[np.uint64]

_OFF: Final = bool(vars(numba.config)["DISABLE_JIT"])
DEPOSITS: Final = bool(processor_features().get("bmi2")) and not _OFF
_ONE: Final = np.uint64(1)
_LOW: Final = np.uint64(63)


def emit_count(builder: Any, word: Any) -> Any:
    """How many ones."""
    return call(builder, "llvm.ctpop.i64", i64, [word])


def emit_deposit(builder: Any, bits: Any, where: Any) -> Any:
    """The low bits of `bits`, one after the other, where `where` has ones; only with BMI2."""
    return call(builder, "llvm.x86.bmi.pdep.64", i64, [bits, where])


def _typed_count(typing: Any, word: Any) -> Any:
    """How many ones."""
    return types.int64(types.uint64), lambda context, builder, sig, args: emit_count(builder, args[0])


def _typed_lowest(typing: Any, word: Any) -> Any:
    """The place of the lowest one; 64 if there is none."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return call(builder, "llvm.cttz.i64", i64, [args[0], ir.Constant(ir.IntType(1), 0)])

    return types.int64(types.uint64), codegen


def _typed_deposit(typing: Any, bits: Any, where: Any) -> Any:
    """What `emit_deposit` documents."""
    signature = types.uint64(types.uint64, types.uint64)
    return signature, lambda context, builder, sig, args: emit_deposit(builder, *args)


def _plain_count(word: np.uint64) -> int:
    return int(word).bit_count()


def _plain_lowest(word: np.uint64) -> int:
    return (int(word) & -int(word)).bit_length() - 1 if word else 64


@njit(nogil=True)
def portable_deposit(bits: np.uint64, where: np.uint64) -> np.uint64:
    """What `emit_deposit` documents, one after the other."""
    found = np.uint64(0)
    while where != np.uint64(0):
        rest = where & np.uint64(where - _ONE)
        if bits & _ONE:
            found |= where ^ rest
        bits, where = bits >> _ONE, rest
    return found


count: Any = _plain_count if _OFF else intrinsic(_typed_count)
lowest: Any = _plain_lowest if _OFF else intrinsic(_typed_lowest)
deposit: Any = intrinsic(_typed_deposit) if DEPOSITS else portable_deposit


@njit(nogil=True)
def taken(stream: U64, at: int) -> np.uint64:
    """64 bits of a stream from bit `at`; what is beyond its end is garbage."""
    last = stream.shape[0] - 1
    low, high = stream[min(at >> 6, last)], stream[min((at >> 6) + 1, last)]
    by = np.uint64(at & 63)
    return np.uint64(low >> by | high << _ONE << np.uint64(_LOW - by))
