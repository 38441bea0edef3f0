"""A memory cgroup (v1) of the test's own, below the one the suite runs in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MEMORY = Path("/sys/fs/cgroup/memory")


@dataclass(frozen=True)
class Cgroup:
    """Its folder, and the command prefix that starts a program inside it."""

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


def writable() -> bool:
    """Whether groups can be made here (root, and a v1 memory hierarchy)."""
    return os.access(MEMORY / "cgroup.procs", os.W_OK)


@contextmanager
def memory_cgroup(limit_nbytes: int) -> Iterator[Cgroup]:
    """A group limited to so many bytes; removed at the end, when its processes must have gone."""
    own = next(line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line)
    path = MEMORY / own.strip("/") / f"ebbflow-test-{os.getpid()}"
    path.mkdir()
    try:
        (path / "memory.limit_in_bytes").write_text(str(limit_nbytes))
        yield Cgroup(path)
    finally:
        path.rmdir()
