"""Kill `add_model` at every step that touches the disk: `python kill_steps.py SOURCE LIBRARY CACHE`.

Forks once for each step (one import of torch serves all) and kills the child there; a write is first half done.
Prints, as JSON lines: the step, the exit code, and the library's visible content after it.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from ebbflow.daemon.library import texts
from ebbflow.daemon.library.add import add_model
from ebbflow.formats.messages import AddModel

WRITES_BETWEEN = 9  # of the many equal writes, every ninth is enough


class Steps:
    """Counts steps; at number `fatal` the process dies."""

    def __init__(self, fatal: int | None) -> None:
        self.fatal, self.names, self._writes = fatal, [], 0

    def take(self, name: str, half: Callable[[], Any] = lambda: None) -> None:
        if len(self.names) == self.fatal:
            half()
            os._exit(9)
        self.names.append(name)

    def write(self, file: Any, data: bytes) -> int:
        self._writes += 1
        if self._writes % WRITES_BETWEEN == 1:
            self.take("write", lambda: (file.write(data[: len(data) // 2]), file.flush()))
        return file.write(data)


class WatchedFile:
    def __init__(self, file: Any, steps: Steps) -> None:
        self._file, self._steps = file, steps

    def write(self, data: bytes) -> int:
        return self._steps.write(self._file, data)

    def __enter__(self) -> WatchedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def watch(steps: Steps) -> None:
    open_path, rename, fsync = pathlib.Path.open, pathlib.Path.rename, os.fsync

    def watched_open(path: pathlib.Path, mode: str = "r", *more: Any, **named: Any) -> Any:
        file = open_path(path, mode, *more, **named)
        return WatchedFile(file, steps) if "w" in mode and "b" in mode else file

    def watched_rename(path: pathlib.Path, target: Any) -> Any:
        steps.take(f"rename {pathlib.Path(target).name}")
        return rename(path, target)

    def watched_fsync(descriptor: int) -> None:
        steps.take("fsync")
        fsync(descriptor)

    pathlib.Path.open, pathlib.Path.rename, os.fsync = watched_open, watched_rename, watched_fsync


def run(fatal: int | None, source: str, library: str, cache: str) -> list[str]:
    steps = Steps(fatal)
    watch(steps)
    add_model(
        AddModel(id=1, source=source, name="new", levels=2), pathlib.Path(library), pathlib.Path(cache), lambda p: None
    )
    return steps.names


def forked(fatal: int | None, arguments: list[str]) -> int:
    child = os.fork()
    if child == 0:
        run(fatal, *arguments)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def visible(library: str) -> list[str]:
    root = pathlib.Path(library)
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if ".adding" not in str(path))


if __name__ == "__main__":
    torch.set_num_threads(1)
    texts.STREAMS, texts.LENGTH = 8, 16
    for fatal in range(1000):
        code = forked(fatal, sys.argv[1:])
        print(json.dumps({"step": fatal, "code": code, "visible": visible(sys.argv[2])}), flush=True)
        if code == 0 or "new/manifest.json" in visible(sys.argv[2]):
            break
