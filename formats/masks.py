"""The masks file: the masks of a sparse model in a file of their own, which models with the same masks share.

Specification (version 1)
-------------------------
`masks.safetensors` lies beside the stack and holds those masks whose entries in the stack's index say `beside`: of
every hash one `U8` tensor, named by it (32 hexadecimal digits) and zero-padded to a multiple of 64 bytes, in order of
level and then of the tensor's name, whatever order the stack has them in. The container is `container`'s. Its header
begins with `__metadata__`, which holds `format` = `ebbflow-masks` and `version` = `1`, has nothing else in it than that
and the tensors, each as `dtype`, `shape`, `data_offsets`, and no white space but the padding. So the index says every
byte of the header, and stacks for which `digest` gives the same string have the same masks file, whatever the values
are and their order.

Sharing is a hard link: the file system counts who holds the file, and removing either model leaves the other whole.
So a masks file is never written to after it has got its name (`container.replacing`). Who links, and when a copy is
made instead, is in `daemon/library/masks`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from .container import content_hash, header_bytes, padded, replacing, write_block
from .errors import BadBlock, BadHeader, BadOffsets, CorruptStack, TruncatedStack
from .files import open_plain
from .index import BlockEntry

FORMAT: Final = "ebbflow-masks"
VERSION: Final = 1
_HASH: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)


def digest(blocks: Sequence[BlockEntry]) -> str:
    """BLAKE2b-128 over the hashes of a stack's masks that lie beside it, or nothing where there is none."""
    hashes = [entry.hash for entry in _sorted(blocks)]
    return content_hash("".join(hashes).encode()) if hashes else ""


def masks_nbytes(blocks: Iterable[BlockEntry]) -> int:
    """Bytes in memory, padding included, of the masks among some blocks that lie beside the stack."""
    return sum(padded(entry.nbytes) for entry in blocks if entry.beside)


def masks_beside(blocks: Sequence[BlockEntry]) -> tuple[BlockEntry, ...]:
    """The masks of the file, in its order: of those with the same hash, the first.

    Raises `BadBlock` when a hash is none, or two entries give the same one different lengths.
    """
    found: dict[str, BlockEntry] = {}
    for entry in _sorted(blocks):
        first = found.setdefault(entry.hash, entry)
        if not _HASH.fullmatch(entry.hash) or first.nbytes != entry.nbytes:
            raise BadBlock(f"{entry.hash!r} cannot be the hash of {entry.tensor}'s mask of level {entry.level}")
    return tuple(found.values())


def encode_header(masks: Sequence[BlockEntry]) -> bytes:
    """Length field and padded header of a masks file. Raises `BadHeader` when it would be too large."""
    metadata = {"format": FORMAT, "version": str(VERSION)}
    return header_bytes(metadata, ((entry.hash, padded(entry.nbytes)) for entry in masks))


def mask_offsets(blocks: Sequence[BlockEntry]) -> tuple[int, dict[str, int]]:
    """The size of the whole masks file of this stack, and where in it each hash begins."""
    masks = masks_beside(blocks)
    offsets, at = {}, len(encode_header(masks))
    for entry in masks:
        offsets[entry.hash] = at
        at += padded(entry.nbytes)
    return at, offsets


def check_masks(path: Path, blocks: Sequence[BlockEntry]) -> None:
    """See that `path` is the masks file of the stack with this index; no mask is read.

    Raises `TruncatedStack` when it is not there or too short, `BadHeader` when it is of other masks, `BadOffsets` when
    it is too long, `BadBlock`, or `CorruptStack` when it cannot be read.
    """
    header, (nbytes, _) = encode_header(masks_beside(blocks)), mask_offsets(blocks)
    try:
        with os.fdopen(open_plain(path), "rb") as file:
            size, found = os.fstat(file.fileno()).st_size, file.read(len(header))
    except FileNotFoundError as error:
        raise TruncatedStack(f"{path} is not there, and the stack beside it has its masks in it") from error
    except OSError as error:
        raise CorruptStack(f"{path} cannot be read: {error.strerror}") from error
    if len(found) < len(header) and header.startswith(found):
        raise TruncatedStack(f"{path} ends at byte {len(found)}, inside its header")
    if found != header:
        raise BadHeader(f"{path} does not hold the masks of the stack beside it, or not as the specification asks for")
    if size < nbytes:
        raise TruncatedStack(f"{path} holds {size} bytes; its header says {nbytes}")
    if size > nbytes:
        raise BadOffsets(f"{path} has {size - nbytes} bytes that belong to no mask")


def write_masks(path: Path, blocks: Sequence[BlockEntry], write: Callable[[BlockEntry, BinaryIO], None]) -> None:
    """Make the masks file of the stack with this index; `write` appends the bytes of a mask, with their padding.

    Raises what `write` or the disk raises; `path` is then what it was.
    """
    masks = masks_beside(blocks)
    with replacing(path) as file:
        file.write(encode_header(masks))
        for entry in masks:
            write(entry, file)


def write_mask(entry: BlockEntry, payload: bytes | memoryview, file: BinaryIO) -> None:
    """Append a mask. Raises `BadBlock` when it is not what its entry says."""
    if len(payload) != entry.nbytes or content_hash(payload) != entry.hash:
        raise BadBlock(f"the mask of {entry.tensor} level {entry.level} changed between encoding and writing")
    write_block(file, payload)


def _sorted(blocks: Sequence[BlockEntry]) -> list[BlockEntry]:
    return sorted((entry for entry in blocks if entry.beside), key=lambda entry: (entry.level, entry.tensor))
