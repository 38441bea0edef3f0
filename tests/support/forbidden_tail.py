"""Child process of test_resident: compute at every depth while the memory beyond the edge may not even be read.

`FOLDER compute` prints how many depths it computed at; `FOLDER touch` reads one forbidden byte instead, and must die.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

from ebbflow.formats.manifest import STACK
from ebbflow.formats.stack import read_stack

from support.residents import load, logits

PROT_NONE = 0


def protect(tail: tuple[int, int], protection: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    address, length = tail
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(length), protection):
        raise OSError(ctypes.get_errno(), "mprotect")


def main() -> None:
    folder, what = Path(sys.argv[1]), sys.argv[2]
    total = len(read_stack(folder / STACK).blocks)
    resident, depths = load(folder, total), 0
    for depth in range(total - 1, resident.stack.base - 1, -1):
        resident.shrink(depth)
        tail = resident.tail()
        if tail[1] < mmap.PAGESIZE:
            continue
        protect(tail, PROT_NONE)
        if what == "touch":
            ctypes.string_at(tail[0], 1)
        logits(resident, list(range(40)))
        protect(tail, mmap.PROT_READ | mmap.PROT_WRITE)
        depths += 1
    print(depths)


if __name__ == "__main__":
    main()
