"""`python -m ebbflow.daemon.worker ADDRESS IDENTITY`: the big process, started by the supervisor."""

from __future__ import annotations

import os
import signal
import sys
import time

from ..process import die_with_parent, set_oom_score

OOM_SCORE = 600  # the kernel shall choose the worker, never the supervisor or the user's programs


def main() -> None:
    """Serve until told to leave."""
    die_with_parent()
    set_oom_score(OOM_SCORE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the supervisor, which then says Exit
    address, identity = sys.argv[1:3]

    # Only now: until here, nothing that takes time could let the parent end unnoticed.
    from ...formats.paths import default_paths
    from ...kernels.cache import compile_once, use_cache
    from ...kernels.instructions import choose

    choose()  # a wrong choice ends the worker here, in words, before the compiler meets it
    compile_once(use_cache(default_paths().cache))

    # numba reads its settings when it is first imported
    from ...formats.messages import Ready
    from ...kernels.threads import set_threads
    from ..channel import Child
    from ..mapping import private_nbytes
    from .loop import Loop

    channel = Child(address, identity)
    try:
        loop = Loop(channel, set_threads(), time.monotonic)
        channel.send(Ready(pid=os.getpid(), private_nbytes=private_nbytes()))
        while loop.turn():
            pass
    finally:
        channel.close()


if __name__ == "__main__":
    main()
