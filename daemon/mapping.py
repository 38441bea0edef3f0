"""Private anonymous memory that can be given back piece by piece, and what the kernel says of this process.

Anonymous on purpose: dropping file-backed or shared pages passes every naive check and returns nothing (DESIGN.md,
"Memory"). No huge pages, so that the grain of giving back is one 4 KiB page.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..formats.errors import OutOfMemory, Unsupported

PAGE: Final = mmap.PAGESIZE
_NORESERVE: Final = 0x4000  # MAP_NORESERVE, which Python 3.11 does not name
# Of /proc/self/smaps: what cannot be written, and has a file.
_AREA: Final = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) r-[x-]p \S+ \S+ [1-9]\d* +(\S.*)$")


class Mapping:
    """`nbytes` of zeroed private memory that costs nothing until written.

    Raises `Unsupported` where the system cannot give pages back, `OutOfMemory` where it gives no address space.
    """

    def __init__(self, nbytes: int) -> None:
        if sys.platform != "linux":
            raise Unsupported("resident memory that can shrink needs Linux; other systems are not supported yet")
        self.nbytes = nbytes
        try:
            self._map = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        except (OSError, OverflowError) as error:
            raise OutOfMemory(f"the system gives no address space for {nbytes} bytes: {error}") from error
        self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)

    def release(self, start: int, stop: int) -> None:
        """Give the whole pages inside `[start, stop)` back to the system; they read as zeros until written again."""
        first, last = -(-start // PAGE) * PAGE, stop // PAGE * PAGE
        if stop >= self.nbytes:
            last = -(-self.nbytes // PAGE) * PAGE
        if first < last:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def address(self) -> int:
        """Where the mapping begins."""
        return int(self.bytes.ctypes.data)


def private_nbytes() -> int:
    """What this process alone has written, as the kernel counts it (Private_Dirty of smaps_rollup), in bytes.

    Clean private pages are left out: those of a library turn from shared to private when another process that has it
    mapped ends, 150 MB at a time.
    """
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) * 1024
    raise Unsupported("this kernel does not say what memory a process holds (no Private_Dirty in smaps_rollup)")


def drop_clean_pages(library: str) -> None:
    """Forget the pages of a loaded library (part of its file's name) that are as they are in the file.

    They come back from the page cache, or the disk, when they are touched; for code that will not be. Only areas that
    cannot be written and of which nothing was (relocations would be undone) are dropped. Where there is no
    /proc/self/smaps nothing happens.
    """
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return
    libc = ctypes.CDLL(None)
    area: re.Match[str] | None = None
    for line in lines:
        found = _AREA.match(line)
        if found or line.split(" ", 1)[0][-1:] != ":":
            area = found if found and library in Path(found[3]).name else None
        elif area and line.startswith("Private_Dirty:") and line.split()[1] == "0":
            start, stop = int(area[1], 16), int(area[2], 16)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)
