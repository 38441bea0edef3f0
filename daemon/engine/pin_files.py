"""A pin's file: tokens, their KV blocks as they lie in memory, and what they belong to, in one safetensors file.

Writing is made of two parts, so that the slow one can happen beside the step loop: `write_partial` writes and syncs a
file that nobody reads, and renaming it is all that is left. Reading checks everything that a file says.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from ...formats.container import content_hash_of
from ...formats.errors import CorruptFile
from ...kernels.attention import BLOCK_TOKENS
from .bands import BANDS

VERSION: Final = 1


class Label(msgspec.Struct, frozen=True):
    """What a file's blocks belong to and how good they are; `blocks_hash` is BLAKE2b-128 of their bytes."""

    version: int
    model: str
    kv: str
    namespace: str
    band: int
    depth: int
    blocks_hash: str = ""


def write_partial(path: Path, label: Label, tokens: Sequence[int], blocks: Sequence[NDArray[np.uint8]]) -> None:
    """Write and sync a file at `path`, block by block: there may be no memory for a copy of them.

    Raises `OSError`; there is then no such file.
    """
    ids = np.array(tokens, "<i8").tobytes()
    end = len(ids) + len(blocks) * blocks[0].size
    label = msgspec.structs.replace(label, blocks_hash=_hash(blocks))
    header = {
        "__metadata__": {"label": msgspec.json.encode(label).decode()},
        "tokens": {"dtype": "I64", "shape": [len(tokens)], "data_offsets": [0, len(ids)]},
        "blocks": {"dtype": "U8", "shape": [len(blocks), blocks[0].size], "data_offsets": [len(ids), end]},
    }
    encoded = msgspec.json.encode(header)
    encoded += b" " * (-len(encoded) % 8)
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:  # what is no file of ours is not taken away
        try:
            file.write(len(encoded).to_bytes(8, "little") + encoded + ids)
            for block in blocks:
                file.write(block.data)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise


@dataclass(frozen=True)
class PinFile:
    """A pin's open file: its label, its tokens, and its blocks, of which `blocks[i : i + 1]` reads one."""

    label: Label
    tokens: list[int]
    blocks: Any

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self.tokens) // BLOCK_TOKENS

    def check_blocks(self) -> None:
        """Read them all once. Raises `CorruptFile` when they are not what was written."""
        if _hash(self.blocks[index : index + 1] for index in range(self.count)) != self.label.blocks_hash:
            raise CorruptFile("its blocks do not match their hash")


@contextlib.contextmanager
def open_pin(path: Path, model: str, kv: str, block_nbytes: int) -> Iterator[PinFile]:
    """The file of a pin of `model` with keys and values of type `kv`, in blocks of `block_nbytes`.

    Raises `CorruptFile`, and whatever opening and parsing raise.
    """
    with safe_open(path, framework="numpy") as file:
        label = msgspec.json.decode((file.metadata() or {})["label"], type=Label)
        if (label.version, label.model, label.kv) != (VERSION, model, kv):
            raise CorruptFile("it belongs to another model, or to keys and values of another type")
        tokens, blocks = file.get_slice("tokens"), file.get_slice("blocks")
        count = blocks.get_shape()[0] if blocks.get_shape() else 0
        found = (tokens.get_dtype(), tokens.get_shape(), blocks.get_dtype(), blocks.get_shape())
        if not count or found != ("I64", [count * BLOCK_TOKENS], "U8", [count, block_nbytes]):
            raise CorruptFile("its shapes are not those of a pin of this model")
        if not 0 <= label.band < BANDS:
            raise CorruptFile(f"there is no quality band {label.band}")
        yield PinFile(label, [int(token) for token in tokens[:]], blocks)


def _hash(blocks: Iterable[NDArray[np.uint8]]) -> str:
    return content_hash_of(block.data for block in blocks)
