"""How much memory the machine can spare, and how much our own processes hold. The only importer of psutil.

Reads the kernel's own figures below an injectable root, so that tests bring a tree of their own. What to do about them
is decided in `budget`, which also subtracts the reserve. On systems without /proc only psutil's figure is known, which
is too little to follow: such readings are marked, and only fixed sizes are served there.

There is no GPU figure yet: nothing of ours lives on one.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from ...formats.values import ProcessMemory
from ..cgroups import own_groups
from .reading import Reading

SYSTEM: Final = "system memory"
CGROUP: Final = "cgroup limit"
RLIMIT: Final = "process limit"
CAP: Final = "cap"
PRESSURE_PERCENT: Final = 10.0  # of the last ten seconds in which some program waited for memory
BATTERY_SECONDS: Final = 10.0  # between two looks: a battery may take milliseconds to answer
_FIGURE: Final = re.compile(r"^(\S+?):?\s+(\d+)(?: kB)?$", re.MULTILINE)
_RLIMIT: Final = re.compile(r"^Max (?:address space|data size)\s+(\d+)", re.MULTILINE)  # the soft one; or `unlimited`
_PRESSURE: Final = re.compile(r"^some avg10=(\d+(?:\.\d+)?)", re.MULTILINE)
_KIB: Final = 1024
_PART_NBYTES: Final = 1 << 16


@dataclass(frozen=True)
class _Files:
    """The names one cgroup version gives to the same four figures; `reclaimable` are keys of `memory.stat`."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: tuple[str, ...]


_V1: Final = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2: Final = _Files(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))


def read_clocks() -> tuple[float, float]:
    """Seconds since the machine started, with and without the time for which it was suspended."""
    running = time.monotonic()
    return (time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else running), running


class Sensor:
    """The machine as this process may use it. `cap` is the most that all of our processes together may hold, in bytes.

    No method raises: a figure that cannot be read limits nothing, and where none can be (a crowd of clients has taken
    every descriptor) the last ones hold.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        cap: int | None = None,
        clocks: Callable[[], tuple[float, float]] = read_clocks,
    ) -> None:
        self._proc = root / "proc"
        self._root = root
        self._supplies = root / "sys/class/power_supply"
        self._cap = cap
        self._clocks = clocks
        self._battery, self._battery_at = False, float("-inf")
        self._last, self._machine = Reading(0, SYSTEM), 0

    def set_cap(self, cap: int | None) -> None:
        """Another cap from now on, or none."""
        self._cap = cap

    def read(self, pids: Iterable[int] = (), worker: int | None = None) -> Reading:
        """The tightest of system memory, every cgroup above us, the worker's own limits and the cap less what `pids`
        hold; and what else says how careful to be.
        """
        held = {pid: _kib_figures(_text(self._proc / str(pid) / "status")) for pid in pids}
        anonymous = {pid: figures.get("RssAnon", 0) for pid, figures in held.items()}
        system = self._meminfo().get("MemAvailable")
        try:
            limits = [(int(psutil.virtual_memory().available) if system is None else system, SYSTEM)]
        except OSError:
            return self._last
        groups = list(self._groups())
        limits += [(headroom, CGROUP) for headroom in _headrooms(groups)]
        if worker is not None:
            limits += [(max(0, limit - anonymous.get(worker, 0)), RLIMIT) for limit in self._rlimits(worker)]
        if self._cap is not None:
            limits.append((max(0, self._cap - sum(anonymous.values())), CAP))
        available, source = min(limits)
        since_start, running = self._clocks()
        self._last = Reading(
            available,
            source,
            swapped=sum(figures.get("VmSwap", 0) for figures in held.values()),
            slept=since_start - running,
            pressure=self._pressed(groups),
            battery=self._on_battery(running),
            fixed_only=system is None,
        )
        return self._last

    def total(self) -> int:
        """Bytes of memory that we could ever have: the machine's, or the tightest cgroup limit."""
        with contextlib.suppress(OSError):
            self._machine = self._meminfo().get("MemTotal") or int(psutil.virtual_memory().total)
        return min([self._machine, *(limit for folder, files in self._groups() if (limit := _limit(folder, files)))])

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

    def _meminfo(self) -> dict[str, int]:
        return _kib_figures(_text(self._proc / "meminfo"))

    def _rlimits(self, pid: int) -> list[int]:
        """What address space and data of that process are limited to.

        The mapping of a stack takes address space for all of it when it is made, and fails there if it is too much.
        What then grows is the part in use, and that can be no more than the limit.
        """
        return [int(limit) for limit in _RLIMIT.findall(_text(self._proc / str(pid) / "limits"))]

    def _pressed(self, groups: list[tuple[Path, _Files]]) -> bool:
        """Whether programs wait for memory, here or in a cgroup above us."""
        files = [self._proc / "pressure/memory"]
        files += [folder / "memory.pressure" for folder, version in groups if version is _V2]
        shares = (_PRESSURE.search(_text(file)) for file in files)
        return any(share is not None and float(share[1]) >= PRESSURE_PERCENT for share in shares)

    def _on_battery(self, now: float) -> bool:
        if now - self._battery_at >= BATTERY_SECONDS:
            self._battery_at = now
            try:
                supplies = list(self._supplies.iterdir())
            except OSError:
                supplies = []
            self._battery = any(map(_discharging, supplies))
        return self._battery

    def _groups(self) -> Iterator[tuple[Path, _Files]]:
        """Every cgroup that contains us, in both versions, the root included."""
        for folder, version in own_groups(self._root, "memory"):
            yield folder, _V1 if version == 1 else _V2


def _headrooms(groups: list[tuple[Path, _Files]]) -> Iterator[int]:
    for folder, files in groups:
        limit, usage = _limit(folder, files), _number(folder / files.usage)
        if limit is not None and usage is not None:
            stat = _figures(_text(folder / "memory.stat"))
            yield max(0, limit - usage + sum(stat.get(key, 0) for key in files.reclaimable))


def _discharging(supply: Path) -> bool:
    """Whether this is the machine's own battery (a mouse's has another scope), and what feeds it."""
    ours = _text(supply / "type").strip() == "Battery" and _text(supply / "scope").strip() != "Device"
    return ours and _text(supply / "status").strip() == "Discharging"


def _text(path: Path) -> str:
    """A small file, or nothing. Without Python's file objects, which take four times as long, twenty times a second."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = b""
            while part := os.read(descriptor, _PART_NBYTES):  # the kernel hands out its longer ones page by page
                text += part
            return text.decode(errors="replace")
        finally:
            os.close(descriptor)
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
