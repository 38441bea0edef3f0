"""What a child process asks of the kernel for itself. Linux; elsewhere each function does nothing.

Starting and watching children is `supervisor`'s business.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Final

PARENT_VARIABLE: Final = "EBBFLOW_PARENT"  # the supervisor tells a child its own process id
MEMORY_VARIABLE: Final = "EBBFLOW_JOB_MEMORY"  # the supervisor tells a job how much memory it may take
SPARE_VARIABLE: Final = "EBBFLOW_SPARE_MEMORY"  # and a worker how much there is when it starts
PR_SET_PDEATHSIG: Final = 1  # <linux/prctl.h>
M_TRIM_THRESHOLD: Final = -1  # <malloc.h>
M_MMAP_THRESHOLD: Final = -3
LARGE_NBYTES: Final = 1 << 20


def die_with_parent(by: signal.Signals = signal.SIGKILL) -> None:
    """From now on the kernel sends this process `by` when its parent (the *thread* that started it) ends.

    The kernel says nothing of a parent that ended before: if `PARENT_VARIABLE` names another process than the present
    parent, this leaves with `SystemExit`.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(by), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    parent = os.environ.get(PARENT_VARIABLE)
    if parent and parent != str(os.getppid()):
        raise SystemExit(f"process {parent}, which started this one, is gone")


def free_at_once() -> None:
    """Make glibc give large arrays back when they are freed: by itself it keeps tens of megabytes for the next ones."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(option, LARGE_NBYTES)


def give_back_freed() -> None:
    """Have glibc return what it keeps of what was freed."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def set_oom_score(value: int) -> None:
    """Make this process the kernel's choice when memory runs out: -1000 never, 0 as any, 1000 always first.

    Raising it needs no right; where the kernel refuses (lowering it), nothing changes.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(value))


def allow_files(most: int) -> None:
    """Let this process open up to `most` files, or as many as the system lets it."""
    now, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now != resource.RLIM_INFINITY:
        ceiling = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, ceiling), hard))
