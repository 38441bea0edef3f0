"""How commands reach the daemon."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...formats.errors import DaemonGone
from ..client import Client
from ..launch import ensure_daemon


@contextmanager
def connected(*, start: bool = True) -> Iterator[Client]:
    """A client of this user's daemon, which is started if none runs, unless `start` is off.

    Raises `DaemonFailed` or `DaemonGone`; without `start`, requests raise `NotRunning`.
    """
    with Client() as client:
        if start:
            _reach(client)
        yield client


def _reach(client: Client) -> None:
    """A daemon that was just stopping may answer once and then be gone: then the next one is started."""
    try:
        ensure_daemon()
        client.ping()
    except DaemonGone:
        ensure_daemon()
