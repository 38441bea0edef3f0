"""How much memory the machine can spare, and how much our own processes hold. The only importer of psutil.

Reads the kernel's own figures below an injectable root, so that tests bring a tree of their own. What to do about them
is decided in `budget`, which also subtracts the reserve. On systems without /proc only psutil's figure is known.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from ...formats.messages import ProcessMemory
from ..cgroups import own_groups
from .reading import Reading

SYSTEM: Final = "system memory"
CGROUP: Final = "cgroup limit"
CAP: Final = "cap"
_FIGURE: Final = re.compile(r"^(\S+?):?\s+(\d+)(?: kB)?$", re.MULTILINE)
_KIB: Final = 1024


@dataclass(frozen=True)
class _Files:
    """The names one cgroup version gives to the same four figures; `reclaimable` are keys of `memory.stat`."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: tuple[str, ...]


_V1: Final = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2: Final = _Files(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))


class Sensor:
    """The machine as this process may use it. `cap` is the most that all of our processes together may hold, in bytes.

    No method raises: a figure that cannot be read limits nothing.
    """

    def __init__(self, root: Path = Path("/"), cap: int | None = None) -> None:
        self._proc = root / "proc"
        self._root = root
        self._cap = cap

    def set_cap(self, cap: int | None) -> None:
        """Another cap from now on, or none."""
        self._cap = cap

    def read(self, pids: Iterable[int] = ()) -> Reading:
        """The tightest of system memory, every cgroup above us, and the cap less what `pids` hold."""
        readings = [Reading(self._system_available(), SYSTEM)]
        readings += [Reading(headroom, CGROUP) for headroom in self._headrooms()]
        if self._cap is not None:
            readings.append(Reading(max(0, self._cap - sum(map(self._anonymous, pids))), CAP))
        return min(readings, key=lambda reading: reading.available)

    def total(self) -> int:
        """Bytes of memory that we could ever have: the machine's, or the tightest cgroup limit."""
        machine = _kib_figures(_text(self._proc / "meminfo")).get("MemTotal") or int(psutil.virtual_memory().total)
        return min([machine, *(limit for folder, files in self._groups() if (limit := _limit(folder, files)))])

    def process(self, role: str, pid: int) -> ProcessMemory | None:
        """What the kernel says one of our processes holds; absent when it is gone."""
        figures = _kib_figures(_text(self._proc / str(pid) / "smaps_rollup"))
        if figures:
            private = figures.get("Private_Clean", 0) + figures.get("Private_Dirty", 0)
            return ProcessMemory(role=role, pid=pid, private_nbytes=private, swapped_nbytes=figures.get("Swap", 0))
        if self._proc.exists():
            return None
        try:
            return ProcessMemory(role=role, pid=pid, private_nbytes=psutil.Process(pid).memory_info().rss)
        except psutil.Error:
            return None

    def oom_kills(self) -> int:
        """How many processes the kernel has killed for memory since it started."""
        return _figures(_text(self._proc / "vmstat")).get("oom_kill", 0)

    def _system_available(self) -> int:
        available = _kib_figures(_text(self._proc / "meminfo")).get("MemAvailable")
        return int(psutil.virtual_memory().available) if available is None else available

    def _anonymous(self, pid: int) -> int:
        # Unlike smaps_rollup this does not walk the page tables: it is read five times a second.
        return _kib_figures(_text(self._proc / str(pid) / "status")).get("RssAnon", 0)

    def _headrooms(self) -> Iterator[int]:
        for folder, files in self._groups():
            limit, usage = _limit(folder, files), _number(folder / files.usage)
            if limit is not None and usage is not None:
                stat = _figures(_text(folder / "memory.stat"))
                yield max(0, limit - usage + sum(stat.get(key, 0) for key in files.reclaimable))

    def _groups(self) -> Iterator[tuple[Path, _Files]]:
        """Every cgroup that contains us, in both versions, the root included."""
        for folder, version in own_groups(self._root, "memory"):
            yield folder, _V1 if version == 1 else _V2


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _figures(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in _FIGURE.findall(text)}


def _kib_figures(text: str) -> dict[str, int]:
    return {name: value * _KIB for name, value in _figures(text).items()}


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _limit(folder: Path, files: _Files) -> int | None:
    """The tightest limit set on a cgroup; version 1 writes a huge number, version 2 `max`, for none."""
    limits = [number for name in files.limits if (number := _number(folder / name)) is not None and number < 2**62]
    return min(limits, default=None)
