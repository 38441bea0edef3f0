"""Child process of test_resident: compute at every depth while the memory beyond the edge may not even be read.

`FOLDER compute` prints how many depths it computed at; `FOLDER touch` reads one forbidden byte instead, and must die.
`FOLDER compute OTHER` computes with two models that share all blocks they can.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

from ebbflow.daemon.worker.resident import Resident
from ebbflow.daemon.worker.shared import SharedBlocks
from ebbflow.formats.manifest import STACK, read_manifest
from ebbflow.formats.stack import read_stack

from support.residents import load, logits, move

PROT_NONE = 0


def protect(tail: tuple[int, int], protection: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    address, length = tail
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(length), protection):
        raise OSError(ctypes.get_errno(), "mprotect")


def compute_both(folders: list[Path]) -> int:
    """Shrink and grow them in turn; only pages with blocks of their prefixes may be touched."""
    shared, depths = SharedBlocks(64), 0
    stacks = [read_stack(folder / STACK) for folder in folders]
    a = read_manifest(folders[0]).architecture
    residents = [Resident(stack, shared) for stack in stacks]
    total, base = len(stacks[0].blocks), stacks[0].base
    for edges in ((total, total), (base, total), (base + 9, base), (total, base + 4), (base, total - 1)):
        for resident, edge in zip(residents, edges, strict=True):
            move(resident, edge)
        used = {page for resident in residents for page in pages(resident)}
        all_pages = {
            page
            for resident in residents
            for arena in resident._arenas
            for page in range(arena.address // mmap.PAGESIZE, -(-(arena.address + arena.nbytes) // mmap.PAGESIZE))
        }
        for page in all_pages - used:
            protect((page * mmap.PAGESIZE, mmap.PAGESIZE), PROT_NONE)
        for resident in residents:
            logits(resident, list(range(40)), a)
        for page in all_pages - used:
            protect((page * mmap.PAGESIZE, mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE)
        depths += bool(all_pages - used)
    return depths


def pages(resident: Resident) -> set[int]:
    """Of all blocks of its prefix."""
    found, levels, start = set(), dict[str, int](), resident.stored.ctypes.data
    for entry in resident.stack.blocks[: resident.blocks]:
        level = levels[entry.tensor] = levels.get(entry.tensor, -1) + 1
        at = start + int(resident.table(entry.tensor)[level, 1])
        found |= set(range(at // mmap.PAGESIZE, (at + entry.nbytes - 1) // mmap.PAGESIZE + 1))
    return found


def main() -> None:
    if sys.argv[3:]:
        print(compute_both([Path(sys.argv[1]), Path(sys.argv[3])]))
        return
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
