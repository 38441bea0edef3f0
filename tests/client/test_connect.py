"""How a command reaches a daemon that comes and goes."""

from __future__ import annotations

import pytest

from ebbflow.client.cli import connect
from ebbflow.formats.errors import DaemonGone, NotRunning


class Coming:
    """A daemon of which every start, and every ping, ends as told; then well."""

    def __init__(self, starts: list[DaemonGone | None], pings: list[DaemonGone | None]) -> None:
        self.starts, self.pings = starts, pings
        self.started = 0

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self) -> None:
        self.started += 1
        _end(self.starts)

    def ping(self) -> None:
        _end(self.pings)


def _end(how: list[DaemonGone | None]) -> None:
    if how and (error := how.pop(0)):
        raise error


@pytest.mark.parametrize(
    ("starts", "pings", "wanted"),
    [
        ([], [], 1),
        ([], [NotRunning("it stopped meanwhile")], 2),
        ([DaemonGone("it stopped while it was asked")], [], 2),
    ],
)
def test_a_daemon_that_goes_while_it_is_reached_is_replaced_once(monkeypatch, starts, pings, wanted):
    daemon = Coming(starts, pings)
    monkeypatch.setattr(connect, "Client", lambda: daemon)
    monkeypatch.setattr(connect, "ensure_daemon", daemon.start)
    with connect.connected() as client:
        assert client is daemon
    assert daemon.started == wanted


def test_one_that_goes_again_and_again_is_an_error(monkeypatch):
    daemon = Coming([DaemonGone("gone"), DaemonGone("gone again")], [])
    monkeypatch.setattr(connect, "Client", lambda: daemon)
    monkeypatch.setattr(connect, "ensure_daemon", daemon.start)
    with pytest.raises(DaemonGone, match="gone again"), connect.connected():
        pass


def test_nothing_is_started_for_who_only_looks(monkeypatch):
    daemon = Coming([], [])
    monkeypatch.setattr(connect, "Client", lambda: daemon)
    monkeypatch.setattr(connect, "ensure_daemon", daemon.start)
    with connect.connected(start=False):
        pass
    assert daemon.started == 0
