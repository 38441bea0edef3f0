"""Runs a measurement of `support.memory_child` in a memory cgroup of its own, so that the kernel's figure is its alone.

Where none can be made, the child counts its own private pages instead. MemAvailable would not do: on a machine with
other programs on it, it moved by more than was measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from support.residents import run_child

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")
USAGE = ("memory.usage_in_bytes", "memory.current")


@contextmanager
def own_cgroup() -> Iterator[Path | None]:
    """A fresh group below this process's own, with the same limits; None where that is not allowed."""
    group = next((made for parent in _parents() if (made := _make(parent)) is not None), None)
    try:
        yield group
    finally:
        if group is not None:
            group.rmdir()


def measure(what: str, *arguments: str) -> dict[str, int]:
    """What the function `what` of `support.memory_child` measured."""
    with own_cgroup() as group:
        done = run_child("memory_child", what, str(group or ""), *arguments, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, int] = json.loads(done.stdout)
    return found


def _parents() -> Iterator[Path]:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield V1 / path.lstrip("/")
        elif not controllers:
            yield V2 / path.lstrip("/")


def _make(parent: Path) -> Path | None:
    group = parent / f"ebbflow-test-{os.getpid()}"
    with suppress(OSError):
        group.mkdir()
        if any((group / name).exists() for name in USAGE):
            return group
        group.rmdir()
    return None
