"""The stack file: every weight of a model as blocks in stack order, in one safetensors file.

Covers the container: header, offsets, index, reading and writing. What is inside a block is in `kinds` and `blocks`;
which block comes first is decided in `daemon/library/order`; keeping a prefix in memory is `daemon/worker/resident`.

Specification (version 2)
-------------------------
::

    u64 little-endian   length of the header
    header              JSON, padded with spaces so that the data starts at a multiple of 4096
    data                the blocks, back to back, in stack order

* Block number i is a `U8` tensor named by i as six digits. Offsets follow the names, begin at 0, leave no hole and end
  at the end of the file. Each block is zero-padded inside its own tensor to a multiple of 64 bytes.
* `__metadata__` holds `format` = `ebbflow-stack`, `version` = `2` and `index`, itself JSON:
  `{"base": blocks without which the model is noise, "blocks": [entry, ...]}`, entry i describing block i:
  `kind`, `tensor`, `level` (0, 1, ... for each tensor in turn; of a mask and its values the same), `shape` of the
  weight, `nbytes` before padding, `gain` (drop in expected KL, nats per token), `hash` (BLAKE2b-128 of the unpadded
  bytes), `uses` (the places in the network that read the tensor), and `dtype` or `rank` where the kind wants it.
  Unknown fields are ignored.
* The header is at most 16 MB.

So any prefix of the data is a smaller model, and a complete file opens in any safetensors reader.

A file that is still arriving
-----------------------------
A stack may be used while it is being copied. Whoever copies puts an empty file `stack.safetensors.arriving` (the name
of the stack and `MARK`) beside it before the first byte, writes the stack under its own name (never a rename: readers
keep the file open), and takes the mark away when everything is there and synced. The bytes may come in any order.

* With the mark, a block that is not wholly there, or does not match its hash, *has not arrived yet*; it may be asked
  for again later. The blocks before the first such block are a model, if they hold the base.
* Without the mark, a file that is shorter than its header says is `TruncatedStack`, now and for ever, and a block that
  does not match its hash is `BadBlock`.

A mark that a killed copy left behind does no harm: what is there serves, and `ebb import` goes on from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Final

import msgspec

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
from .kinds import payload_nbytes
from .manifest import MANIFEST, Manifest

FORMAT: Final = "ebbflow-stack"
VERSION: Final = 2
ALIGNMENT: Final = 4096
BLOCK_ALIGNMENT: Final = 64
MAX_HEADER: Final = 16_000_000
MARK: Final = ".arriving"
_TIERED: Final = ("mask", "values")


class BlockEntry(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One block's line in the index; the fields are those of the specification above."""

    kind: str
    tensor: str
    level: int
    shape: tuple[int, ...]
    nbytes: int
    gain: float
    hash: str
    uses: tuple[str, ...]
    dtype: str = ""
    rank: int = 0


class StackIndex(msgspec.Struct, frozen=True):
    """The index as stored in the header's metadata."""

    base: int
    blocks: tuple[BlockEntry, ...]


class _Tensor(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class Stack:
    """A validated stack file. `edges[i]` is the byte, from the start of the data, where block i begins.

    `arriving`: it had its mark when it was opened, and blocks must be checked when they are read.
    """

    path: Path
    data_start: int
    base: int
    blocks: tuple[BlockEntry, ...]
    edges: tuple[int, ...]
    arriving: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, padding included."""
        return self.edges[-1]

    @property
    def base_nbytes(self) -> int:
        """Bytes of the base, the least that makes a model."""
        return self.edges[self.base]

    def blocks_within(self, nbytes: int) -> int:
        """The most blocks whose bytes fit in `nbytes`, but never fewer than the base."""
        return max(self.base, bisect_right(self.edges, nbytes) - 1)


def mark_of(path: Path) -> Path:
    """The mark that says that the stack at `path` is still arriving."""
    return path.with_name(path.name + MARK)


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


def encode_header(index: StackIndex) -> bytes:
    """Length field and padded header of a stack file. Raises `BadHeader` when it would exceed `MAX_HEADER`."""
    document: dict[str, object] = {
        "__metadata__": {"format": FORMAT, "version": str(VERSION), "index": msgspec.json.encode(index).decode()}
    }
    start = 0
    for position, entry in enumerate(index.blocks):
        stop = start + padded(entry.nbytes)
        document[f"{position:06}"] = _Tensor("U8", (stop - start,), (start, stop))
        start = stop
    text = msgspec.json.encode(document)
    if len(text) + ALIGNMENT > MAX_HEADER:
        raise BadHeader(f"{len(index.blocks)} blocks need a header of {len(text)} bytes; at most {MAX_HEADER} fit")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_stack(path: Path, index: StackIndex, payload: Callable[[int], bytes | memoryview]) -> None:
    """Write a stack file; `payload(i)` gives block i's bytes, without padding, and is called once for each in order.

    A sibling temporary file is written, synced and renamed, so `path` is either absent, what it was, or complete.
    Raises `BadBlock` when a payload is not what its entry says, and whatever `payload` or the disk raises.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        with temporary.open("wb") as file:
            file.write(encode_header(index))
            for position, entry in enumerate(index.blocks):
                data = payload(position)
                if len(data) != entry.nbytes or content_hash(data) != entry.hash:
                    raise BadBlock(f"block {position} of {entry.tensor} changed between encoding and writing")
                file.write(data)
                file.write(bytes(padded(entry.nbytes) - entry.nbytes))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read_stack(path: Path) -> Stack:
    """Open and check a stack file's header; no block is read.

    One that is still arriving needs no more than its header. Raises `TruncatedStack`, `BadHeader`, `BadOffsets`,
    `BadBlock`, `UnknownKind`, `UnsupportedVersion`, or `NotArrived` when the header has not arrived.
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
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return length == 0 or (length <= MAX_HEADER and (len(text := file.read(length)) < length or text[-1] == 0))
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _read_stack(path: Path, arriving: bool) -> Stack:
    try:
        with path.open("rb") as file:
            file_nbytes = os.fstat(file.fileno()).st_size
            length = _header_length(file.read(8), file_nbytes)
            text = file.read(length)
    except OSError as error:
        raise CorruptStack(f"{path} cannot be read: {error.strerror}") from error
    metadata, tensors = _parse_header(text)
    index = _parse_index(metadata)
    edges = _check_offsets(tensors, len(index.blocks))
    data_nbytes = file_nbytes - 8 - length
    if data_nbytes < edges[-1] and not arriving:
        raise TruncatedStack(f"{path} holds {data_nbytes} bytes of data; its header says {edges[-1]}")
    if data_nbytes > edges[-1]:
        raise BadOffsets(f"{path} has {data_nbytes - edges[-1]} bytes that belong to no block")
    _check_blocks(index, edges)
    return Stack(path, 8 + length, index.base, index.blocks, edges, arriving)


def _header_length(prefix: bytes, file_nbytes: int) -> int:
    if len(prefix) < 8:
        raise TruncatedStack(f"{len(prefix)} bytes are too few for a stack file")
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= MAX_HEADER or (8 + length) % ALIGNMENT:
        raise BadHeader(f"header length {length} is not allowed: data must start at a multiple of {ALIGNMENT}")
    if 8 + length > file_nbytes:
        raise TruncatedStack(f"the header needs {8 + length} bytes; the file has {file_nbytes}")
    return length


def _parse_header(text: bytes) -> tuple[dict[str, str], dict[str, _Tensor]]:
    try:
        document = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(document.pop("__metadata__", msgspec.Raw(b"{}")), type=dict[str, str])
        tensors = {name: msgspec.json.decode(raw, type=_Tensor) for name, raw in document.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadHeader(f"the header is not what the specification asks for: {error}") from error
    if metadata.get("format") != FORMAT:
        raise BadHeader(f"format is {metadata.get('format')!r}, not {FORMAT!r}: not a stack file")
    if metadata.get("version") != str(VERSION):
        raise UnsupportedVersion(f"stack version {metadata.get('version')!r}; this ebbflow reads version {VERSION}")
    return metadata, tensors


def _parse_index(metadata: dict[str, str]) -> StackIndex:
    try:
        index = msgspec.json.decode(metadata.get("index", ""), type=StackIndex)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadHeader(f"the index is not what the specification asks for: {error}") from error
    if not 1 <= index.base <= len(index.blocks):
        raise BadHeader(f"a base of {index.base} blocks out of {len(index.blocks)}")
    return index


def _check_offsets(tensors: dict[str, _Tensor], count: int) -> tuple[int, ...]:
    if len(tensors) != count:
        raise BadHeader(f"the index lists {count} blocks, the header {len(tensors)} tensors")
    edges = [0]
    for position in range(count):
        tensor = tensors.get(f"{position:06}")
        if tensor is None:
            raise BadHeader(f"no tensor named {position:06}")
        start, stop = tensor.data_offsets
        if start != edges[-1] or stop <= start:
            raise BadOffsets(f"block {position} lies at [{start}, {stop}); it must begin at {edges[-1]}")
        if tensor.dtype != "U8" or tensor.shape != (stop - start,):
            raise BadBlock(f"block {position} is {tensor.dtype} {list(tensor.shape)} over {stop - start} bytes, not U8")
        edges.append(stop)
    return tuple(edges)


def _check_blocks(index: StackIndex, edges: Sequence[int]) -> None:
    tensors: dict[str, _Seen] = {}
    for position, entry in enumerate(index.blocks):
        name = f"block {position} ({entry.tensor} level {entry.level})"
        seen = tensors.setdefault(entry.tensor, _Seen(entry.shape, entry.kind))
        expected = payload_nbytes(
            entry.kind, entry.shape, dtype=entry.dtype, rank=entry.rank, level=entry.level, filled=seen.filled
        )
        if entry.nbytes != expected or padded(expected) != edges[position + 1] - edges[position]:
            raise BadBlock(f"{name} says {entry.nbytes} bytes; {entry.kind} {list(entry.shape)} takes {expected}")
        if not entry.uses:
            raise BadBlock(f"{name} is used nowhere")
        seen.add(entry, name)


@dataclass
class _Seen:
    """What blocks of one tensor have been so far, the first being of this shape and kind."""

    shape: tuple[int, ...]
    first: str
    level: int = 0
    filled: int = 0  # columns of every row with values
    mask: BlockEntry | None = None  # whose values come next
    dtype: str = ""  # of values

    def add(self, entry: BlockEntry, name: str) -> None:
        """The next block. Raises `BadBlock` when it cannot follow those before."""
        if entry.level != self.level:
            raise BadBlock(f"{name} comes before level {self.level}")
        if entry.shape != self.shape:
            raise BadBlock(f"{name} has another shape than the tensor's first block")
        if (entry.kind == "plane") != (self.first == "plane"):
            raise BadBlock(f"{name} is {entry.kind}, and blocks before it are not: planes are not added to others")
        if self.first in _TIERED or entry.kind in _TIERED:
            self._add_tiered(entry, name)
        else:
            self.level += 1

    def _add_tiered(self, entry: BlockEntry, name: str) -> None:
        if self.first not in _TIERED or entry.kind not in _TIERED:
            raise BadBlock(f"{name} is {entry.kind}, and the first is {self.first}: tiers are not added to others")
        if (entry.kind == "mask") != (self.mask is None):
            raise BadBlock(f"{name} is {entry.kind}: of every tier there is a mask, and then its values")
        if self.mask is None:
            self.mask = entry
            return
        if entry.rank != self.mask.rank:
            raise BadBlock(f"{name} has {entry.rank} values a row; its mask says {self.mask.rank}")
        if entry.dtype != (self.dtype or entry.dtype):
            raise BadBlock(f"{name} is {entry.dtype}, and tiers before it are {self.dtype}")
        self.level, self.filled, self.mask, self.dtype = self.level + 1, self.filled + entry.rank, None, entry.dtype


def filled_before(entries: Iterable[BlockEntry]) -> tuple[int, ...]:
    """For each block, how many columns of every row have values in earlier tiers of its tensor."""
    filled: dict[str, int] = {}
    found = []
    for entry in entries:
        before = filled.get(entry.tensor, 0)
        found.append(before)
        if entry.kind == "values":
            filled[entry.tensor] = before + entry.rank
    return tuple(found)


def read_blocks(stack: Stack, positions: Iterable[int] | None = None) -> Iterator[tuple[BlockEntry, bytes]]:
    """Entry and bytes of the blocks at `positions`, in that order, each checked against its hash; by default all.

    Raises `BadBlock` or `TruncatedStack`.
    """
    with stack.path.open("rb") as file:
        for position in range(len(stack.blocks)) if positions is None else positions:
            entry = stack.blocks[position]
            file.seek(stack.data_start + stack.edges[position])
            data = file.read(entry.nbytes)
            if len(data) != entry.nbytes:
                raise TruncatedStack(f"{stack.path} ends inside block {position}")
            if content_hash(data) != entry.hash:
                raise BadBlock(f"block {position} ({entry.tensor} level {entry.level}) does not match its hash")
            yield entry, data


def check_manifest(stack: Stack, manifest: Manifest) -> None:
    """Raises `CorruptManifest` when it says other sizes than the stack has: memory is divided by what it says."""
    said = (manifest.nbytes, manifest.base_nbytes, manifest.blocks)
    if said != (stack.nbytes, stack.base_nbytes, len(stack.blocks)):
        raise CorruptManifest(f"{stack.path} and the {MANIFEST} beside it are not of the same model")


def prefix_edges(entries: Sequence[BlockEntry]) -> tuple[int, ...]:
    """Where each block would begin, and the last one end, if `entries` were written in this order."""
    return tuple(accumulate((padded(entry.nbytes) for entry in entries), initial=0))
