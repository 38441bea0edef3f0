"""The control groups that this process is in: where the system says what limits it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def own_groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """Folders of every group that contains us, the root included, each with its version, 1 or 2. Need not exist.

    `root` is where the file system begins: tests bring a tree of their own. Raises nothing.
    """
    cgroups = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            base, version = cgroups / controller, 1
        elif not controllers:
            unified = cgroups / "unified"
            base, version = unified if unified.exists() else cgroups, 2
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        for ancestor in (inside, *inside.parents):
            # In a container the path may be the host's; then only the root, which is the container's own, exists.
            if ".." not in ancestor.parts:
                yield base / ancestor, version
