"""The resident prefix of a stack as the forward pass sees it, and memory that vectors like."""

from __future__ import annotations

from math import prod
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ...formats.index import BlockEntry

I64 = NDArray[np.int64]
_LINE: Final = 64  # bytes of a cache line, and of the widest vector


class Weights(Protocol):
    """The resident prefix of a stack (`worker/resident`)."""

    @property
    def blocks(self) -> int:
        """How many of the stack's blocks are resident."""
        ...

    @property
    def version(self) -> int:
        """Another number whenever `stored` or a table may be another."""
        ...

    @property
    def stored(self) -> NDArray[np.uint16]:
        """Memory with all resident bytes, at the offsets that the tables say."""
        ...

    def table(self, tensor: str) -> I64:
        """A tensor's resident blocks."""
        ...

    def payload(self, tensor: str) -> tuple[BlockEntry, NDArray[np.uint8]]:
        """A vector's only block."""
        ...


def lines(shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
    """Zeros that begin at a cache line, which vector loads then do not straddle."""
    nbytes = prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(nbytes + _LINE, np.uint8)
    start = -raw.ctypes.data % _LINE
    return raw[start : start + nbytes].view(dtype).reshape(shape)
