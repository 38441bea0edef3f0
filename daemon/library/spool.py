"""The spool: what a job has finished so far, on disk, until the stack is written; a later job may go on from there.

Work is finished in *parts*: the blocks of one layer, or other bytes that are dear to make. Each is a file of its own,
written beside its place, synced and renamed, and ends with a hash of all before it; a part that is cut short or changed
is as good as none. Which folder it is, and who may use it later, is `resume`'s business.

    part    data, BLAKE2b-128 of the data
    blocks  the data are payloads one after the other, their entries as JSON, the length of that (u64, little-endian)
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import msgspec

from ...formats.index import BlockEntry

DIGEST_NBYTES: Final = 16
CHUNK_NBYTES: Final = 2**20
PARTIAL: Final = ".partial"


class Spool:
    """Parts in one folder, by name. `entries[i]` describes block i of all parts that were loaded or written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: list[tuple[Path, int]] = []
        self._part: _Part | None = None
        self._added: list[BlockEntry] = []
        self.entries: list[BlockEntry] = []

    def keep(self, part: str, data: bytes) -> None:
        """Write a part. Raises `OSError` when the disk is full; the part is then not there."""
        with _Part(self._folder / part) as file:
            file.write(data)

    def kept(self, part: str) -> bytes | None:
        """The bytes of a part, or None when it is not there as it was written."""
        path = self._folder / part
        return path.read_bytes()[:-DIGEST_NBYTES] if _is_whole(path) else None

    def load(self, part: str) -> bool:
        """Count the blocks of a part as ours, if it is there as it was written."""
        path = self._folder / part
        if not _is_whole(path):
            return False
        self._count(path, _read_entries(path))
        return True

    @contextlib.contextmanager
    def writing(self, part: str) -> Iterator[None]:
        """Blocks that are added inside become a part at the end. Raises `OSError` when the disk is full."""
        with _Part(self._folder / part) as self._part:
            self._added = []
            yield
            text = msgspec.json.encode(self._added)
            self._part.write(text + len(text).to_bytes(8, "little"))
        self._count(self._folder / part, self._added)

    def add(self, entry: BlockEntry, payload: bytes) -> None:
        """Append a block to the part that is being written. Raises `OSError` when the disk is full."""
        assert self._part
        self._part.write(payload)
        self._added.append(entry)

    def read(self, position: int) -> bytes:
        """Block `position`'s bytes."""
        path, start = self._places[position]
        with path.open("rb") as file:
            file.seek(start)
            return file.read(self.entries[position].nbytes)

    def _count(self, path: Path, entries: list[BlockEntry]) -> None:
        start = 0
        for entry in entries:
            self._places.append((path, start))
            start += entry.nbytes
        self.entries += entries


class _Part:
    """A part being written. A context manager: it gets its name when the block ends without an error."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, path.with_name(path.name + PARTIAL)
        self._digest = hashlib.blake2b(digest_size=DIGEST_NBYTES)

    def write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)

    def __enter__(self) -> _Part:
        self._file: IO[bytes] = self._temporary.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            with self._file as file:
                if kind is None:
                    file.write(self._digest.digest())
                    file.flush()
                    os.fsync(file.fileno())
            if kind is None:
                self._temporary.rename(self._path)
        finally:
            self._temporary.unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    """Whether the file is there and ends with the hash of what comes before."""
    try:
        with path.open("rb") as file:
            left = os.fstat(file.fileno()).st_size - DIGEST_NBYTES
            digest = hashlib.blake2b(digest_size=DIGEST_NBYTES)
            while left > 0 and (data := file.read(min(left, CHUNK_NBYTES))):
                digest.update(data)
                left -= len(data)
            return left == 0 and file.read() == digest.digest()
    except OSError:
        return False


def _read_entries(path: Path) -> list[BlockEntry]:
    """The entries of a whole part."""
    with path.open("rb") as file:
        end = file.seek(-DIGEST_NBYTES - 8, os.SEEK_END)
        length = int.from_bytes(file.read(8), "little")
        file.seek(end - length)
        return msgspec.json.decode(file.read(length), type=list[BlockEntry])
