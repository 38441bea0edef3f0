"""The stack file: every weight of a model as blocks in stack order, in one safetensors file.

Covers the file: header, offsets, places, reading and writing. What its index says of a block is checked in `index`;
what is inside a block is in `kinds` and `blocks`; which block comes first is decided in `daemon/library/order`; keeping
a prefix in memory is `daemon/worker/resident`.

Specification (versions 2 and 3)
--------------------------------
::

    u64 little-endian   length of the header
    header              JSON, padded with spaces so that the data starts at a multiple of 4096
    data                the blocks, back to back, in stack order

* Block number i is a `U8` tensor named by i as six digits. Offsets follow the names, begin at 0, leave no hole and end
  at the end of the file. Each block is zero-padded inside its own tensor to a multiple of 64 bytes.
* `__metadata__` holds `format` = `ebbflow-stack`, `version` = `2` or `3` and `index`, itself JSON:
  `{"base": blocks without which the model is noise, "blocks": [entry, ...]}`, entry i describing block i:
  `kind`, `tensor`, `level` (0, 1, ... for each tensor in turn; of a mask and its values the same), `shape` of the
  weight, `nbytes` before padding, `gain` (drop in expected KL, nats per token), `hash` (BLAKE2b-128 of the unpadded
  bytes), `uses` (the places in the network that read the tensor), and `dtype` or `rank` where the kind wants it.
  Unknown fields are ignored.
* Version 3 is that of a stack of which masks lie in a file of their own, which other models may share: `masks`
  specifies it. Such a mask's entry has `beside` = true, and its tensor in the stack is empty. Only masks may.
* The header is at most 16 MB.

So any prefix of the data is a smaller model, and a complete file opens in any safetensors reader.

A file that is still arriving
-----------------------------
A stack may be used while it is being copied. Whoever copies puts an empty file `stack.safetensors.arriving` (the name
of the stack and `MARK`) beside it before the first byte, writes the stack under its own name (never a rename: readers
keep the file open), and takes the mark away when everything is there and synced. The bytes may come in any order. A
masks file is copied before the first byte of the stack, and gets its name when all of it is there.

* With the mark, a masks file that is not there or too short has not arrived, and without it there is no model yet.
  A block that is not wholly there, or does not match its hash, *has not arrived yet*; it may be asked for again later.
  The blocks before the first such block are a model, if they hold the base.
* Without the mark, a file that is shorter than its header says is `TruncatedStack`, now and for ever, and a block that
  does not match its hash is `BadBlock`.

A mark that a killed copy left behind does no harm: what is there serves, and `ebb import` goes on from it.
"""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from .container import (
    ALIGNMENT,
    MAX_HEADER,
    Tensor,
    content_hash,
    header_bytes,
    padded,
    replacing,
    write_block,
)
from .errors import (
    BadBlock,
    BadHeader,
    BadOffsets,
    CorruptManifest,
    CorruptStack,
    NotArrived,
    TruncatedStack,
    UnsupportedVersion,
)
from .files import open_plain
from .index import BlockEntry, StackIndex, check_blocks, prefix_edges
from .manifest import MANIFEST, MASKS, Manifest
from .masks import check_masks, digest, mask_offsets, masks_nbytes, write_mask, write_masks

FORMAT: Final = "ebbflow-stack"
VERSION: Final = 2
BESIDE_VERSION: Final = 3  # of a stack that has blocks beside it
MARK: Final = ".arriving"


@dataclass(frozen=True)
class Place:
    """Where on disk a block begins."""

    path: Path
    offset: int


@dataclass(frozen=True)
class Stack:
    """A validated stack file. `edges[i]` is the byte where block i begins when all lie back to back, as in memory.

    On disk block i is at `places[i]`; `file_edges[i]` is where in the stack's own file, from the start of its data,
    what it holds of the first i blocks ends: `edges`, less what lies beside. `arriving`: it had its mark when it was
    opened, and blocks must be checked when they are read.
    """

    path: Path
    data_start: int
    base: int
    blocks: tuple[BlockEntry, ...]
    edges: tuple[int, ...]
    file_edges: tuple[int, ...]
    places: tuple[Place, ...]
    arriving: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, padding included."""
        return self.edges[-1]

    @property
    def base_nbytes(self) -> int:
        """Bytes of the base, the least that makes a model."""
        return self.edges[self.base]

    @property
    def base_masks_nbytes(self) -> int:
        """Bytes of the base that are masks of the masks file."""
        return masks_nbytes(self.blocks[: self.base])

    def blocks_within(self, nbytes: int) -> int:
        """The most blocks whose bytes fit in `nbytes`, but never fewer than the base."""
        return max(self.base, bisect_right(self.edges, nbytes) - 1)

    @property
    def masks_path(self) -> Path | None:
        """The masks file, where there is one."""
        return next((place.path for place in self.places if place.path != self.path), None)


def mark_of(path: Path) -> Path:
    """The mark that says that the stack at `path` is still arriving."""
    return path.with_name(path.name + MARK)


def encode_header(index: StackIndex) -> bytes:
    """Length field and padded header of a stack file. Raises `BadHeader` when it would exceed `MAX_HEADER`."""
    version = BESIDE_VERSION if any(entry.beside for entry in index.blocks) else VERSION
    metadata = {"format": FORMAT, "version": str(version), "index": msgspec.json.encode(index).decode()}
    edges = _file_edges(index.blocks)
    return header_bytes(metadata, ((f"{i:06}", edges[i + 1] - edges[i]) for i in range(len(index.blocks))))


def write_stack(
    path: Path, index: StackIndex, payload: Callable[[int], bytes | memoryview], masks_there: bool = False
) -> None:
    """Write a stack file, and before it the masks file, unless that is there already (`masks_there`).

    `payload(i)` gives block i's bytes, without padding, and is called at most once for each; in order, but masks that
    lie beside come first. Each file is written beside its place, synced and renamed, so it is either absent, what it
    was, or complete; the masks of another stack in the same folder are replaced.
    Raises `BadBlock` when a payload is not what its entry says, and whatever `payload` or the disk raises.
    """
    beside = {entry.hash: position for position, entry in reversed(list(enumerate(index.blocks))) if entry.beside}
    if beside and not masks_there:

        def write(entry: BlockEntry, file: BinaryIO) -> None:
            write_mask(entry, payload(beside[entry.hash]), file)

        write_masks(path.with_name(MASKS), index.blocks, write)
    with replacing(path) as file:
        file.write(encode_header(index))
        for position, entry in enumerate(index.blocks):
            if entry.beside:
                continue
            data = payload(position)
            if len(data) != entry.nbytes or content_hash(data) != entry.hash:
                raise BadBlock(f"block {position} of {entry.tensor} changed between encoding and writing")
            write_block(file, data)


def read_stack(path: Path) -> Stack:
    """Open and check a stack file's header; no block is read.

    One that is still arriving needs no more than its header, and its masks file. Raises `TruncatedStack`, `BadHeader`,
    `BadOffsets`, `BadBlock`, `UnknownKind`, `UnsupportedVersion`, or `NotArrived` when the header or the masks have
    not arrived.
    """
    arriving = mark_of(path).exists()  # looked for first: it goes when the rest is there
    try:
        return _read_stack(path, arriving)
    except CorruptStack as error:
        if arriving and _header_is_missing(path):
            raise NotArrived(f"{path} has only begun to arrive; try again in a moment") from error
        raise


def _header_is_missing(path: Path) -> bool:
    """Whether the file ends before its header does, or the header is a hole that somebody will fill."""
    try:
        with os.fdopen(open_plain(path), "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return length == 0 or (length <= MAX_HEADER and (len(text := file.read(length)) < length or text[-1] == 0))
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _read_stack(path: Path, arriving: bool) -> Stack:
    try:
        with os.fdopen(open_plain(path), "rb") as file:
            file_nbytes = os.fstat(file.fileno()).st_size
            length = _header_length(file.read(8), file_nbytes)
            text = file.read(length)
    except OSError as error:
        raise CorruptStack(f"{path} cannot be read: {error.strerror}") from error
    metadata, tensors = _parse_header(text)
    index = _parse_index(metadata)
    file_edges = _check_offsets(tensors, index.blocks)
    data_nbytes = file_nbytes - 8 - length
    if data_nbytes < file_edges[-1] and not arriving:
        raise TruncatedStack(f"{path} holds {data_nbytes} bytes of data; its header says {file_edges[-1]}")
    if data_nbytes > file_edges[-1]:
        raise BadOffsets(f"{path} has {data_nbytes - file_edges[-1]} bytes that belong to no block")
    check_blocks(index.blocks)
    _check_sizes(index.blocks, file_edges, metadata["version"])
    places = _places(path, index.blocks, 8 + length, file_edges, arriving)
    return Stack(path, 8 + length, index.base, index.blocks, prefix_edges(index.blocks), file_edges, places, arriving)


def _places(
    path: Path, blocks: Sequence[BlockEntry], data_start: int, file_edges: Sequence[int], arriving: bool
) -> tuple[Place, ...]:
    """Where the blocks lie; that there is a masks file, and that it is theirs, is checked."""
    masks, offsets = path.with_name(MASKS), dict[str, int]()
    if any(entry.beside for entry in blocks):
        try:
            check_masks(masks, blocks)
        except TruncatedStack as error:
            if arriving:
                raise NotArrived(f"{masks} has not arrived yet; try again in a moment") from error
            raise
        _, offsets = mask_offsets(blocks)
    return tuple(
        Place(masks, offsets[entry.hash]) if entry.beside else Place(path, data_start + file_edges[position])
        for position, entry in enumerate(blocks)
    )


def _header_length(prefix: bytes, file_nbytes: int) -> int:
    if len(prefix) < 8:
        raise TruncatedStack(f"{len(prefix)} bytes are too few for a stack file")
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= MAX_HEADER or (8 + length) % ALIGNMENT:
        raise BadHeader(f"header length {length} is not allowed: data must start at a multiple of {ALIGNMENT}")
    if 8 + length > file_nbytes:
        raise TruncatedStack(f"the header needs {8 + length} bytes; the file has {file_nbytes}")
    return length


def _parse_header(text: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        document = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(document.pop("__metadata__", msgspec.Raw(b"{}")), type=dict[str, str])
        tensors = {name: msgspec.json.decode(raw, type=Tensor) for name, raw in document.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadHeader(f"the header is not what the specification asks for: {error}") from error
    if metadata.get("format") != FORMAT:
        raise BadHeader(f"format is {metadata.get('format')!r}, not {FORMAT!r}: not a stack file")
    if metadata.get("version") not in (str(VERSION), str(BESIDE_VERSION)):
        raise UnsupportedVersion(
            f"stack version {metadata.get('version')!r}; this ebbflow reads versions {VERSION} and {BESIDE_VERSION}"
        )
    return metadata, tensors


def _parse_index(metadata: dict[str, str]) -> StackIndex:
    try:
        index = msgspec.json.decode(metadata.get("index", ""), type=StackIndex)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadHeader(f"the index is not what the specification asks for: {error}") from error
    if not 1 <= index.base <= len(index.blocks):
        raise BadHeader(f"a base of {index.base} blocks out of {len(index.blocks)}")
    return index


def _check_offsets(tensors: dict[str, Tensor], blocks: Sequence[BlockEntry]) -> tuple[int, ...]:
    """Where each block begins in the file's data, and the last one ends."""
    if len(tensors) != len(blocks):
        raise BadHeader(f"the index lists {len(blocks)} blocks, the header {len(tensors)} tensors")
    edges = [0]
    for position, entry in enumerate(blocks):
        tensor = tensors.get(f"{position:06}")
        if tensor is None:
            raise BadHeader(f"no tensor named {position:06}")
        start, stop = tensor.data_offsets
        if start != edges[-1] or stop < start or (stop > start) == entry.beside:
            raise BadOffsets(
                f"block {position} lies at [{start}, {stop}); it must begin at {edges[-1]}, and be empty if and only "
                "if it lies beside"
            )
        if tensor.dtype != "U8" or tensor.shape != (stop - start,):
            raise BadBlock(f"block {position} is {tensor.dtype} {list(tensor.shape)} over {stop - start} bytes, not U8")
        edges.append(stop)
    return tuple(edges)


def _check_sizes(blocks: Sequence[BlockEntry], file_edges: Sequence[int], version: str) -> None:
    for position, entry in enumerate(blocks):
        own = file_edges[position + 1] - file_edges[position]
        if not entry.beside and own != padded(entry.nbytes):
            raise BadBlock(f"block {position} has {own} bytes of the file; {entry.nbytes} take {padded(entry.nbytes)}")
        if entry.beside and version != str(BESIDE_VERSION):
            raise BadBlock(f"block {position} lies beside, which is of version {BESIDE_VERSION}, not {version}")


def _file_edges(blocks: Sequence[BlockEntry]) -> tuple[int, ...]:
    return tuple(accumulate((0 if entry.beside else padded(entry.nbytes) for entry in blocks), initial=0))


class BlockReader:
    """Reads blocks of a stack whose files it keeps open, so that they may be removed meanwhile. A context manager.

    Raises `CorruptStack` when they are gone already.
    """

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._files: dict[Path, BinaryIO] = {}
        with contextlib.ExitStack() as opened:
            for path in dict.fromkeys(place.path for place in stack.places):
                try:
                    self._files[path] = opened.enter_context(os.fdopen(open_plain(path), "rb"))
                except OSError as error:
                    raise CorruptStack(f"{path} cannot be read: {error.strerror}") from error
            self._close = opened.pop_all().close

    def read(self, position: int) -> bytes:
        """The bytes of a block, checked against its hash. Raises `BadBlock` or `TruncatedStack`."""
        entry, place = self._stack.blocks[position], self._stack.places[position]
        file = self._files[place.path]
        file.seek(place.offset)
        data = file.read(entry.nbytes)
        if len(data) != entry.nbytes:
            raise TruncatedStack(f"{place.path} ends inside block {position}")
        if content_hash(data) != entry.hash:
            raise BadBlock(f"block {position} ({entry.tensor} level {entry.level}) does not match its hash")
        return data

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()


def read_blocks(stack: Stack, positions: Iterable[int] | None = None) -> Iterator[tuple[BlockEntry, bytes]]:
    """Entry and bytes of the blocks at `positions`, in that order, each checked against its hash; by default all.

    Raises `BadBlock`, `TruncatedStack` or `CorruptStack`.
    """
    with BlockReader(stack) as reader:
        for position in range(len(stack.blocks)) if positions is None else positions:
            yield stack.blocks[position], reader.read(position)


def check_manifest(stack: Stack, manifest: Manifest) -> None:
    """Raises `CorruptManifest` when it says other sizes or masks than the stack has: memory is divided by what it says,
    and masks are shared.
    """
    said = (manifest.nbytes, manifest.base_nbytes, manifest.blocks, manifest.masks)
    right = said == (stack.nbytes, stack.base_nbytes, len(stack.blocks), digest(stack.blocks))
    if not right or manifest.base_masks_nbytes not in (0, stack.base_masks_nbytes):
        raise CorruptManifest(f"{stack.path} and the {MANIFEST} beside it are not of the same model")
