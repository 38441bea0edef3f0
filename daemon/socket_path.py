"""The file of a bound ipc address, which anybody may delete or replace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


class SocketPath:
    """The file of a bound ipc address, and whether it is still the one that was bound."""

    def __init__(self, address: str) -> None:
        self._path = Path(address.removeprefix("ipc://"))
        self._times = 0
        self._file = self._look()

    def __str__(self) -> str:
        return str(self._path)

    def ours(self) -> bool:
        """Whether who connects there reaches us."""
        return self._file is not None and self._file == self._look()

    def take_back(self, bind: Callable[[str], object]) -> None:
        """Bind a new file beside it and move that there. Raises what `bind` raises, or `OSError`."""
        self._times += 1
        beside = self._path.with_name(f"{self._path.name}.{self._times}")
        bind(f"ipc://{beside}")
        beside.replace(self._path)
        self._file = self._look()

    def _look(self) -> tuple[int, int] | None:
        try:
            status = self._path.lstat()
        except OSError:
            return None
        return status.st_dev, status.st_ino
