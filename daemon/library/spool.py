"""The spool: encoded blocks on disk, in the order of encoding, until all gains are known and the stack is written."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from ...formats.stack import BlockEntry


class Spool:
    """One append-only file. `entries[i]` describes block i; a context manager that closes and removes the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w+b")
        self._starts: list[int] = []
        self._end = 0
        self.entries: list[BlockEntry] = []

    def add(self, entry: BlockEntry, payload: bytes) -> None:
        """Append a block. Raises `OSError` when the disk is full."""
        self._file.seek(self._end)
        self._file.write(payload)
        self._starts.append(self._end)
        self._end += len(payload)
        self.entries.append(entry)

    def read(self, position: int) -> bytes:
        """Block `position`'s bytes."""
        self._file.seek(self._starts[position])
        return self._file.read(self.entries[position].nbytes)

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        finally:
            self._path.unlink(missing_ok=True)
