"""The kernels of this folder beside their references, with inputs for both, as `kernels/table` has all others.

Arguments are numpy arrays here too. They go to the device and the result comes back, or, where Triton interprets its
kernels (TRITON_INTERPRET=1, set before it is imported), all stays where it is.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from ..reference import reference_levels, reference_multiply_sparse
from ..rows import VALUES_F16
from ..table import Arguments, Draw, Entry, store_levels
from .sparse import multiply_sparse


def device() -> str:
    """Where kernels run: torch's name for it."""
    return "cpu" if triton.knobs.runtime.interpret else "cuda"


def multiply_arrays(
    kind: int,
    stored: NDArray[np.uint8],
    blocks: NDArray[np.int64],
    n: int,
    x: NDArray[Any],
    y: NDArray[np.float32],
) -> None:
    """`multiply_sparse` with numpy arrays."""
    memory, table, inputs, output = (torch.from_numpy(array).to(device()) for array in (stored, blocks, x, y))
    multiply_sparse(kind, memory, table, n, inputs, output)
    y[:] = output.cpu().numpy()


def multiply_sparse_arguments(draw: Draw, *, m: int, n: int, tokens: int, levels: tuple[str, ...]) -> Arguments:
    """Inputs of `multiply_sparse`, its output last."""
    stored, table = store_levels(draw, levels, m, n)
    kind = int(table[1, 0]) if len(table) > 1 else VALUES_F16
    y = np.full((tokens, m), np.nan, np.float32)
    return [kind, stored.view(np.uint8), table, n, draw.singles(tokens, n), y]


def _magnitude(
    kind: int, stored: NDArray[np.uint8], blocks: NDArray[np.int64], n: int, x: NDArray[Any], y: NDArray[np.float32]
) -> NDArray[Any]:
    weight = reference_levels(stored.view(np.uint16), blocks, y.shape[1], n)[0]
    magnitude: NDArray[Any] = np.abs(x.astype(np.float64)) @ np.abs(weight).T
    return magnitude


TABLE: Final = (
    Entry(
        "multiply_sparse",
        multiply_arrays,
        reference_multiply_sparse,
        multiply_sparse_arguments,
        _magnitude,
        roundings=40,
    ),
)
