"""Kill `Library.remove` before each change of the disk: `python kill_removing.py ROOT`, with models m0, m1, ... there.

Model m<n> is removed by a child that dies at its n-th step. Prints as JSON, for each: the step's name (or nothing, when
the child came to its end), and whether the model was still in the index, whole, of the next daemon.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from ebbflow.daemon.supervisor.library import Library, delete


def mortal(fatal: int, told: int) -> None:
    """Every change of the disk is a step; the process ends at number `fatal` and writes which it was to `told`."""
    steps = 0

    def watched(name: str) -> Any:
        change = getattr(os, name)

        def step(*arguments: Any, **named: Any) -> Any:
            nonlocal steps
            if steps == fatal:
                os.write(told, name.encode())
                os._exit(9)
            steps += 1
            return change(*arguments, **named)

        return step

    for name in ("rename", "unlink", "rmdir"):
        setattr(os, name, watched(name))


def remove(root: Path, fatal: int) -> str:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        mortal(fatal, writer)
        library = Library(root, delete)
        library.remove(f"m{fatal}")
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as said:
        return said.read()


if __name__ == "__main__":
    root = Path(sys.argv[1])
    found = []
    for fatal in range(len(list(root.iterdir()))):
        before = sorted(path.name for path in (root / f"m{fatal}").iterdir())
        step = remove(root, fatal)
        library = Library(root, delete)
        library.clean()
        there = any(model.name == f"m{fatal}" for model in library.summaries())
        whole = there and sorted(path.name for path in (root / f"m{fatal}").iterdir()) == before
        left = [path.name for path in root.iterdir() if path.name.startswith(".")]
        found.append({"step": step, "there": there, "whole": whole, "left": left})
    print(json.dumps(found))
