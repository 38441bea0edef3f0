"""What every bench prints and stores: the machine, the measurements, one line for each bar."""

from __future__ import annotations

import argparse
import json
import operator
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

_OPERATORS = {"<=": operator.le, ">=": operator.ge}


def percentile(samples: list[float], fraction: float) -> float:
    """The smallest sample that at least `fraction` of them do not exceed."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, max(0, round(fraction * len(ordered) + 0.5) - 1))]


def machine() -> str:
    """The processor's name, cores, memory and system."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GB, {platform.system()} {platform.release()}"


class Report:
    """Collects; `finish` prints the verdict and gives the exit code.

    `switches` are options of this bench, each with what it does; `given` says which were.
    """

    def __init__(self, title: str, **switches: str) -> None:
        parser = argparse.ArgumentParser(description=title)
        for name, text in switches.items():
            parser.add_argument(f"--{name}", action="store_true", help=text)
        parser.add_argument("--json", metavar="FILE", help="store raw samples there")
        parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
        self._options = parser.parse_args()
        self._data: dict[str, Any] = {"title": title, "command": sys.argv, "machine": machine(), "samples": {}}
        self._missed = 0
        print(f"{title}\non {self._data['machine']}")

    def given(self, switch: str) -> bool:
        """Whether one of the `switches` was."""
        return bool(getattr(self._options, switch))

    def note(self, name: str, text: str, samples: object = None) -> None:
        """A line of the report, and the raw numbers behind it."""
        print(f"  {name:<44} {text}", flush=True)
        self._data["samples"][name] = samples if samples is not None else text

    def times(self, name: str, seconds: list[float]) -> None:
        """Median, p99 and count of measured times."""
        middle, worst = statistics.median(seconds), percentile(seconds, 0.99)
        self.note(name, f"p50 {middle * 1e3:.1f} ms, p99 {worst * 1e3:.1f} ms, {len(seconds)} rounds", seconds)

    def bar(self, name: str, value: float, comparison: str, target: float) -> None:
        """A goal, and whether it was reached."""
        reached = _OPERATORS[comparison](value, target)
        self._missed += not reached
        print(f"BAR {name} {value:.4g} {comparison} {target:g} {'ok' if reached else 'MISSED'}", flush=True)
        self._data.setdefault("bars", []).append([name, value, comparison, target, bool(reached)])

    def finish(self) -> int:
        """Store what was measured; 1 when `--check` was given and a bar was missed."""
        if self._options.json:
            Path(self._options.json).write_text(json.dumps(self._data, indent=1))
        return int(self._options.check and self._missed > 0)
