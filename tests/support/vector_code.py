"""Runs code that a kernel module emits for vectors over whole arrays: to test what no kernel shows by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from ebbflow.kernels.vectors import load, store, vector

LANES = 16


def by_vectors(emit: Callable[[Any, Any], Any], source: Any, target: Any) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """A function of arrays from `emit(builder, vector)`; `source` and `target` are element types, as LLVM has them."""
    kinds = {ir.FloatType(): np.float32, ir.IntType(16): np.uint16}

    def typed(typing: Any, x: Any, at: Any, y: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            x, at, y = args
            start, out = (
                builder.gep(context.make_array(kind)(context, builder, array).data, [at])
                for kind, array in ((sig.args[0], x), (sig.args[2], y))
            )
            store(builder, emit(builder, load(builder, vector(source, LANES), start, 2)), out, 2)
            return context.get_dummy_value()

        return types.void(x, types.int64, y), codegen

    one = intrinsic(typed)

    @njit([types.void(*(from_dtype(np.dtype(kinds[kind]))[::1] for kind in (source, target)))])
    def each(x: NDArray[Any], y: NDArray[Any]) -> None:
        for at in range(0, x.shape[0], LANES):
            one(x, at, y)

    def whole(x: NDArray[Any]) -> NDArray[Any]:
        padded = np.zeros(-(-len(x) // LANES) * LANES, x.dtype)
        padded[: len(x)] = x
        y = np.empty(len(padded), kinds[target])
        each(padded, y)
        return y[: len(x)]

    return whole
