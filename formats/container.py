"""A safetensors file of plain bytes: what the stack file and the masks file have in common.

The length of the header (u64, little-endian); the header, JSON, padded with spaces so that the data starts at a
multiple of 4096; then `U8` tensors back to back, each zero-padded to a multiple of 64 bytes. Which tensors there are,
and what the header says of them, is `stack`'s and `masks`' business.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from .errors import BadHeader

ALIGNMENT: Final = 4096
BLOCK_ALIGNMENT: Final = 64
MAX_HEADER: Final = 16_000_000


class Tensor(msgspec.Struct, frozen=True):
    """A tensor's line in the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def content_hash(payload: bytes | memoryview) -> str:
    """BLAKE2b-128 of a block's bytes without padding, as hexadecimal digits."""
    return content_hash_of([payload])


def content_hash_of(pieces: Iterable[bytes | memoryview]) -> str:
    """The same of bytes that come in pieces."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def padded(nbytes: int) -> int:
    """A block's size in the file."""
    return -(-nbytes // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT


def header_bytes(metadata: dict[str, str], sizes: Iterable[tuple[str, int]]) -> bytes:
    """Length field and padded header of a file of these tensors: name and bytes, padding included, of each in order.

    Raises `BadHeader` when it would exceed `MAX_HEADER`.
    """
    document: dict[str, object] = {"__metadata__": metadata}
    start = 0
    for name, nbytes in sizes:
        document[name] = Tensor("U8", (nbytes,), (start, start + nbytes))
        start += nbytes
    text = msgspec.json.encode(document)
    if len(text) + ALIGNMENT > MAX_HEADER:
        raise BadHeader(f"{len(document) - 1} blocks need a header of {len(text)} bytes; at most {MAX_HEADER} fit")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_block(file: BinaryIO, data: bytes | memoryview) -> None:
    """Append a block and its padding."""
    file.write(data)
    file.write(bytes(padded(len(data)) - len(data)))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends without an error: written beside it, synced,
    renamed. So `path` is absent, what it was, or complete, and other names of what it was keep that.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        temporary.unlink(missing_ok=True)  # of a killed one; or a link, and it is nobody's we know
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
