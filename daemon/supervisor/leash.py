"""Runs a command that cannot outlive the supervisor: `python -m ebbflow.daemon.supervisor.leash PARENT COMMAND...`

A worker holds gigabytes; if its supervisor is killed, nobody would ever tell it to leave. Linux can send a signal when
the parent dies, but only the child itself can ask for that, so this stands between fork and the real command. It also
volunteers the command as the first to go when the kernel runs out of memory. Elsewhere than on Linux it does neither.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import Final

PR_SET_PDEATHSIG: Final = 1
OOM_SCORE: Final = "800"


def leash(parent: int) -> None:
    """Die when `parent`, who started this process, dies; be the kernel's first choice when memory runs out."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        with contextlib.suppress(OSError):  # a kernel or container that forbids it changes nothing else
            Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)
    if os.getppid() != parent:
        raise SystemExit("the supervisor is gone")


def main() -> None:
    """Leash this process and become the command."""
    parent, *command = sys.argv[1:]
    leash(int(parent))
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
