"""How commands reach the daemon."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..client import Client
from ..launch import ensure_daemon


@contextmanager
def connected(*, start: bool = True) -> Iterator[Client]:
    """A client of this user's daemon, which is started if none runs, unless `start` is off.

    Raises `DaemonFailed`; without `start`, requests raise `NotRunning`.
    """
    if start:
        ensure_daemon()
    with Client() as client:
        yield client
