"""The runtime folder: ours alone, and one daemon at a time in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ...formats.errors import AlreadyRunning, DaemonFailed
from ...formats.paths import Paths


def prepare(paths: Paths) -> None:
    """Create the folders that are missing. Raises `DaemonFailed` when one cannot be, or others could meddle."""
    try:
        for folder in (paths.library, paths.cache, paths.logs):
            folder.mkdir(parents=True, exist_ok=True)
        paths.runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = paths.runtime.lstat()
    except OSError as error:
        raise DaemonFailed(f"{error.filename} cannot be created: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise DaemonFailed(
            f"{paths.runtime} must be a folder that belongs to user {os.geteuid()} with mode 700; "
            f"it belongs to {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}"
        )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the daemon's lock. Taken before the socket is bound: a second bind would steal its path.

    Raises `AlreadyRunning`, or `DaemonFailed` when the lock cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DaemonFailed(f"the lock {path} cannot be opened: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 20).decode(errors="replace").strip()
            raise AlreadyRunning(f"a daemon (process {holder or 'unknown'}) already runs in {path.parent}") from error
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)
