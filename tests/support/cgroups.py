"""Memory cgroups of the suite's own: to measure one child in (so that the kernel's figure is its alone), or to limit.

Where none can be made, the child counts its own private pages instead. MemAvailable would not do: on a machine with
other programs on it, it moved by more than was measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Limited:
    """A v1 group with a limit, and the command prefix that starts a program inside it."""

    path: Path

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("sh", "-c", f'echo $$ > {self.path}/cgroup.procs && exec "$@"', "sh")

    def read(self, name: str) -> int:
        return int((self.path / name).read_text())

    @property
    def oom_kills(self) -> int:
        lines = dict(line.split() for line in (self.path / "memory.oom_control").read_text().splitlines())
        return int(lines["oom_kill"])


def can_limit() -> bool:
    """Whether groups can be made here (root, and a v1 memory hierarchy)."""
    return os.access(V1 / "cgroup.procs", os.W_OK)


@contextmanager
def limited_cgroup(nbytes: int) -> Iterator[Limited]:
    """A group limited to so many bytes; its processes must have gone at the end. Ask `can_limit` first."""
    with own_cgroup() as path:
        assert path is not None
        (path / "memory.limit_in_bytes").write_text(str(nbytes))
        yield Limited(path)


def measure(what: str, *arguments: str) -> dict[str, int]:
    """What the function `what` of `support.memory_child` measured."""
    with own_cgroup() as group:
        done = run_child("memory_child", what, str(group or ""), *arguments, timeout=300)
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
