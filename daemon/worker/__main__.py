"""`python -m ebbflow.daemon.worker ADDRESS IDENTITY [SETTINGS]`: the big process, started by the supervisor."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time

from ..process import (
    PARENT_VARIABLE,
    SPARE_VARIABLE,
    die_with_parent,
    free_at_once,
    give_back_freed,
    set_oom_score,
)

OOM_SCORE = 600  # the kernel shall choose the worker, never the supervisor or the user's programs
COMPILERS_NBYTES = 1_500_000_000  # for two at once, and something to be left
COMPILING = "compiling kernels for this machine, which the first start does once"


def main() -> None:
    """Serve until told to leave."""
    die_with_parent()
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # for what this process starts
    set_oom_score(OOM_SCORE)
    free_at_once()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the supervisor, which then says Exit
    address, identity, *flags = sys.argv[1:]

    # Only now: until here, nothing that takes time could let the parent end unnoticed.
    from ...formats.child_messages import Ready
    from ...formats.messages import Progress
    from ...formats.paths import default_paths
    from ...kernels.cache import compile_once, compiled, use_cache
    from ...kernels.instructions import choose
    from ..channel import Child
    from ..settings import parse_settings
    from .processors import usable_threads

    settings = parse_settings(flags)
    choose()  # a wrong choice ends the worker here, in words, before the compiler meets it
    channel = Child(address, identity)
    try:
        kernels = use_cache(default_paths().cache)
        if not compiled(kernels):
            channel.send(Progress(id=0, stage=COMPILING))
            room = int(os.environ.get(SPARE_VARIABLE, "0")) >= COMPILERS_NBYTES
            compile_once(kernels, "ebbflow.daemon.worker.compiling", together=room and usable_threads() > 1)

        # numba reads its settings when it is first imported
        from ...kernels.threads import set_threads
        from ..mapping import drop_clean_pages, private_nbytes
        from .loop import Loop

        threads = set_threads(usable_threads() if settings.threads is None else settings.threads)
        loop = Loop(channel, threads, time.monotonic, settings)
        drop_clean_pages("llvmlite")  # 70 MB of a compiler that has nothing more to do
        gc.collect()
        give_back_freed()
        gc.freeze()  # what is here stays, and need not be looked at again
        channel.send(Ready(pid=os.getpid(), private_nbytes=private_nbytes()))
        while loop.turn():
            pass
    finally:
        channel.close()


if __name__ == "__main__":
    main()
