"""The three standard streams as a shell may hand them over: closed, or with nowhere to write to.

What is written to them, and how, is in `output`.
"""

from __future__ import annotations

import contextlib
import os
import sys


def open_missing() -> None:
    """Put the null device where a stream was closed (`ebb list >&-`).

    Called before anything else is opened: the next file or socket would get the missing stream's number, and with it
    whatever a library prints.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115 - for as long as the process lives


def give_up(error: OSError) -> None:
    """Say that something could not be read or written; what is still buffered is lost and not tried again at exit."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"ebb: {error.filename or 'the output'}: {error.strerror or error}\n")
        sys.stderr.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # not a file at all, or closed
            os.dup2(null, stream.fileno())
    os.close(null)
