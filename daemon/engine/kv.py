"""Keys and values of running sequences, in fixed blocks of 32 tokens that really go back when they are freed.

One mapping, laid out as `kernels/attention` says, fp16, int8 or float32. Freed blocks are given back to the system at
once. Who holds which block, and for whom, is the business of `prefixes` and `scheduler`.
"""

from __future__ import annotations

from math import prod
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from ...formats.architecture import Architecture
from ...kernels.attention import BLOCK_TOKENS, KINDS, head_nbytes
from ..mapping import Mapping
from ..settings import KvType

MOST_NBYTES: Final = 2_000_000_000  # of one model's keys and values, unless one context needs more
MAX_SEQUENCES: Final = 32
_TYPES: Final[dict[str, type]] = {"f16": np.float16, "f32": np.float32, "i8": np.int8}


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // BLOCK_TOKENS)


class KvCache:
    """The KV blocks of one model, `array [blocks, layers, 2, g, elements]`, of which `limit` may be held.

    As `f16` numbers are rounded on their way in, and those beyond 65504 cut to that; as `i8` each head of a token is
    rounded to bytes with a scale of its own, behind the others' bytes; `f32` is for comparisons. `most_nbytes` is what
    they may take, though one whole context always fits.
    """

    def __init__(self, a: Architecture, dtype: KvType | Literal["f32"] = "f16", most_nbytes: int = MOST_NBYTES) -> None:
        heads = (a.layers, 2, a.kv_heads)
        self.block_nbytes = prod(heads) * head_nbytes(KINDS[dtype], a.head_dim)
        whole = blocks_for(a.context)
        self.most = self.limit = max(whole, min(2 * MAX_SEQUENCES * whole, most_nbytes // self.block_nbytes))
        self._mapping = Mapping(self.most * self.block_nbytes)
        numbers: NDArray[Any] = self._mapping.bytes.view(_TYPES[dtype])
        self.array = numbers.reshape(self.most, *heads, -1)
        self._free = list(range(self.most - 1, -1, -1))

    @property
    def held(self) -> int:
        """Blocks that are allocated."""
        return self.most - len(self._free)

    @property
    def available(self) -> int:
        """Blocks that can be allocated within the limit; negative when it was lowered below what is held."""
        return self.limit - self.held

    def allocate(self, count: int) -> tuple[int, ...]:
        """`count` blocks; the caller has checked `available`."""
        assert count <= self.available
        return tuple(self._free.pop() for _ in range(count))

    def free(self, blocks: tuple[int, ...]) -> None:
        """Take blocks back and return their memory."""
        for block in blocks:
            self._mapping.release(block * self.block_nbytes, (block + 1) * self.block_nbytes)
        self._free.extend(blocks)

    def check_integrity(self) -> None:
        """Raises `AssertionError` when a block is free twice."""
        assert len(set(self._free)) == len(self._free)
