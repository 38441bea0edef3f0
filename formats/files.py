"""Opening files that somebody else may have put there."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Final

_link_flag: Final = ContextVar("_link_flag", default=os.O_NOFOLLOW)


@contextlib.contextmanager
def following_links() -> Iterator[None]:
    """Have `open_plain` follow links, too: within a folder that a person named, whose files may all be links."""
    token = _link_flag.set(0)
    try:
        yield
    finally:
        _link_flag.reset(token)


def open_plain(path: Path) -> int:
    """A descriptor to read `path` with. Raises `OSError`, also for what is no plain file: whoever opens a pipe waits
    for its other end, maybe for ever, and a link leads to what was never meant to be read, but within
    `following_links`. Folders above may be links.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | _link_flag.get())
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise OSError(errno.ELOOP, "it is a link; put what it names in its place", str(path)) from error
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is not a plain file", str(path))
