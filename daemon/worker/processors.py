"""How many threads are worth starting: the processors we may run on, less those that would only be in the way.

A thread of a step waits for all others, so the slowest decides. Left out are the second threads of a core (both share
its multipliers), the small cores of a mixed processor, and what a control group's quota does not pay for: who uses up
the quota stands still until the next period, and lets the others wait.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Final

from ..cgroups import own_groups

# What the system says of a core's speed, best first, and how far below the fastest a core may be: frequencies of equal
# cores differ by some percent, and capacities count what a core does per clock as well.
_SPEEDS: Final = (("cpu_capacity", 0.6), ("cpufreq/cpuinfo_max_freq", 0.8))


def usable_threads(root: Path = Path("/"), allowed: Collection[int] | None = None) -> int:
    """At least 1. `allowed` are the processors we may run on (default: what the system says).

    Cores of which nothing is known count as equal.
    """
    if allowed is None:
        known = hasattr(os, "sched_getaffinity")
        allowed = os.sched_getaffinity(0) if known else range(os.cpu_count() or 1)
    folders = [root / f"sys/devices/system/cpu/cpu{number}" for number in sorted(allowed)]
    for name, share in _SPEEDS:
        speeds = [_number(_text(folder / name)) for folder in folders]
        least = share * max((speed for speed in speeds if speed), default=0.0)
        folders = [folder for folder, speed in zip(folders, speeds, strict=True) if not speed or speed >= least]
    cores = {_text(folder / "topology/thread_siblings_list") or folder.name for folder in folders}
    return max(1, min(len(cores), int(min(_quotas(root), default=len(cores)))))


def _quotas(root: Path) -> list[float]:
    """Processors' worth of time that each control group above us allows."""
    found = []
    for folder, version in own_groups(root, "cpu"):
        if version == 1:
            words = [_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        else:
            words = _text(folder / "cpu.max").split()
        quota, period = map(_number, words) if len(words) == 2 else (None, None)
        if quota and period:
            found.append(quota / period)
    return found


def _number(text: str) -> int | None:
    """Nothing for `max`, or -1, which mean no limit."""
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
