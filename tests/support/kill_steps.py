"""Kill `add_model` at every write, copy and rename, and add again: `python kill_steps.py SOURCE FOLDER`.

Forks for each step (one import of torch serves all) and kills the child there; a write is first half done. Then a
second child goes on from what the first one left in the cache. Prints, as JSON lines: the step, the exit code, the
library's visible content after it; then, of the second child, which layers it encoded and the stack's hash, and what
is left of its work in the cache. Each step has a library and a cache of its own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch

from ebbflow.daemon.library import add, texts
from ebbflow.daemon.library.add import add_model
from ebbflow.formats.manifest import STACK
from ebbflow.formats.messages import AddModel
from ebbflow.formats.paths import ADDING

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
    open_path, rename, mkdir = pathlib.Path.open, pathlib.Path.rename, pathlib.Path.mkdir
    copyfile = shutil.copyfile

    def watched_open(path: pathlib.Path, mode: str = "r", *more: Any, **named: Any) -> Any:
        file = open_path(path, mode, *more, **named)
        return WatchedFile(file, steps) if mode in ("wb", "xb") else file

    def watched_rename(path: pathlib.Path, target: Any) -> Any:
        steps.take(f"rename {pathlib.Path(target).name}")
        return rename(path, target)

    def watched_mkdir(path: pathlib.Path, *more: Any, **named: Any) -> None:
        if path.name.startswith(ADDING):
            mkdir(path, *more, **named)
            steps.take("mkdir")  # it is there, and nobody holds its lock yet
        else:
            mkdir(path, *more, **named)

    def watched_copy(source: pathlib.Path, target: pathlib.Path) -> Any:
        data = source.read_bytes()
        steps.take(f"copy {target.name}", lambda: target.write_bytes(data[: len(data) // 2]))
        return copyfile(source, target)

    pathlib.Path.open, pathlib.Path.rename, pathlib.Path.mkdir = watched_open, watched_rename, watched_mkdir
    shutil.copyfile = watched_copy


def run(fatal: int | None, source: str, folder: pathlib.Path) -> None:
    """Add the model, or die; the tensors that were encoded are written to `folder/encoded`."""
    steps, encoded = Steps(fatal), set()
    watch(steps)
    # bitstack: with nested each child would make its codebook anew, which takes longer than all the rest
    request = AddModel(id=1, source=source, name="new", codec="bitstack", levels=2)
    clock = itertools.count()  # so that every progress is told
    add_model(
        request,
        folder / "library",
        folder / "cache",
        lambda progress: encoded.add(progress.tensor if progress.stage == "encoding" else ""),
        clock=lambda: float(next(clock)),
    )
    (folder / "encoded").write_text(" ".join(sorted(encoded)))


def forked(fatal: int | None, source: str, folder: pathlib.Path) -> int:
    child = os.fork()
    if child == 0:
        run(fatal, source, folder)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(root: pathlib.Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if ".adding" not in str(path))


def report(fatal: int, source: str, folder: pathlib.Path) -> dict[str, Any]:
    code = forked(fatal, source, folder)
    seen = {"step": fatal, "code": code, "visible": content(folder / "library")}
    if seen["visible"]:
        return seen
    seen["again"] = forked(None, source, folder)
    stack = (folder / "library" / "new" / STACK).read_bytes()
    return seen | {
        "encoded": (folder / "encoded").read_text().split(),
        "stack": hashlib.blake2b(stack).hexdigest(),
        "left": content(folder / "cache" / "adding"),
        "library": sorted(path.name for path in (folder / "library").iterdir()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    texts.STREAMS, texts.LENGTH = 8, 16
    add.CURVE_POINTS = 2
    for fatal in range(1000):
        seen = report(fatal, sys.argv[1], pathlib.Path(sys.argv[2]) / str(fatal))
        print(json.dumps(seen), flush=True)
        if seen["visible"]:
            break
