"""Blocks read from a file piece by piece, hashed and copied on the way: a block may be a gigabyte. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from ...formats.container import content_hash_of, padded
from ...formats.errors import TruncatedStack
from ...formats.index import BlockEntry

PIECE_NBYTES: Final = 4_000_000  # held at once: a copy is not stopped when memory is short


def holds(entry: BlockEntry, file: BinaryIO, path: Path, copy: Callable[[bytes], object] = len) -> bool:
    """Whether the block with which `file` goes on matches its hash; `copy` gets its bytes, with the padding.

    Raises `TruncatedStack`, which names `path`.
    """
    return content_hash_of(_pieces(entry, file, path, copy)) == entry.hash


def _pieces(entry: BlockEntry, file: BinaryIO, path: Path, copy: Callable[[bytes], object]) -> Iterator[bytes]:
    left = entry.nbytes
    padding = padded(left) - left
    while left or padding:
        piece = file.read(min(left or padding, PIECE_NBYTES))
        if not piece:
            raise TruncatedStack(f"{path} ends inside the {entry.kind} of {entry.tensor} level {entry.level}")
        copy(piece)
        if left:
            left -= len(piece)
            yield piece
        else:
            padding -= len(piece)
