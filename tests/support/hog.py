"""A program that takes memory and gives it back, on command: `grow MEGABYTES` or `free`, one a line."""

from __future__ import annotations

import mmap
import subprocess
import sys
from typing import Self


class Hog:
    """The hog as a child process, behind the command `prefix`."""

    def __init__(self, prefix: tuple[str, ...]) -> None:
        self._process = subprocess.Popen(
            [*prefix, sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, command: str) -> None:
        """Returns when it is done. Raises `EOFError` when the hog has been killed."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise EOFError("the hog is gone")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)


def main() -> None:
    held: list[mmap.mmap] = []
    for line in sys.stdin:
        match line.split():
            case ["grow", megabytes]:
                block = mmap.mmap(-1, int(megabytes) * 1_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                for at in range(0, len(block), mmap.PAGESIZE):
                    block[at] = 1
                held.append(block)
            case _:
                held.clear()
        print("done", flush=True)


if __name__ == "__main__":
    main()
