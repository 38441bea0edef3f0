"""What people asked for a model: its size, limits and priority. Kept in a file, so that a restart forgets nothing.

A thread writes it, because syncing may take seconds and the supervisor's loop waits for no disk.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec

from ...formats.units import AUTO, SizeWish

log = logging.getLogger(__name__)

FILE: Final = ".terms.json"  # in the library's folder; the dot keeps it from being taken for a model


class Terms(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """`floor` and `cap` (bytes; a cap of 0 is none) hold an automatic size; `priority` multiplies what it is worth."""

    size: SizeWish = AUTO
    floor: int = 0
    cap: int = 0
    priority: float = 1.0

    def least(self, base: int, full: int) -> int:
        """The smallest automatic size of a model with such a stack, in bytes."""
        return max(base, min(self.floor, full))

    def most(self, base: int, full: int) -> int:
        """The largest automatic size, in bytes."""
        return max(self.least(base, full), min(self.cap or full, full))


def read_terms(folder: Path) -> dict[str, Terms]:
    """What was kept; nothing when there is no such file or it cannot be read, which is logged."""
    path = folder / FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Terms])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        log.warning("%s is ignored, sizes asked for earlier are forgotten: %s", path, error)
        return {}


class TermsFile:
    """The file in a library's folder. `keep` returns at once; `close` when what was kept last is on the disk
    or could not be written twice.

    A kill between the two leaves what the file held before, or any later state, whole.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ebbflow-terms")
        self._newest = self._written = b""
        self._last: Future[None] | None = None

    def keep(self, terms: Mapping[str, Terms]) -> None:
        """Have the file say this; of several that wait only the last is written."""
        text = self._newest = msgspec.json.format(msgspec.json.encode(terms), indent=1)
        self._last = self._writer.submit(self._write, text)

    @property
    def settled(self) -> bool:
        """Whether nothing is being written or waits for it."""
        return self._last is None or self._last.done()

    def close(self) -> None:
        """Wait until everything is written, and try once more what could not be; nothing may be kept after that."""
        self._writer.shutdown()
        if self._written is not self._newest:
            self._write(self._newest)

    def _write(self, text: bytes) -> None:
        """Atomically. What cannot be written is logged: it holds as long as this daemon."""
        if text is not self._newest:
            return
        temporary = self._path.with_name(FILE + ".partial")
        try:
            with temporary.open("wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self._path)
            self._written = text
        except Exception as error:  # noqa: BLE001 - nobody looks at the future
            why = f"{type(error).__name__}: {error}"
            log.warning("%s cannot be written; sizes asked for hold until the daemon ends: %s", self._path, why)
