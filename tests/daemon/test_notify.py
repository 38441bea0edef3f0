"""What systemd is told, as it would hear it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from ebbflow.daemon.supervisor.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path) -> Iterator[tuple[str, socket.socket]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.settimeout(5)
        name = str(tmp_path / "s") if request.param == "path" else f"\0ebbflow-test-{os.getpid()}"
        heard.bind(name)
        yield name.replace("\0", "@"), heard


def test_what_is_told(manager):
    name, heard = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    notifier.ready("two\nlines")
    notifier.reloading(12.5)
    notifier.stopping(3)
    notifier.status("well")
    assert [heard.recv(1000) for _ in range(4)] == [
        b"READY=1\nSTATUS=two lines",
        b"RELOADING=1\nMONOTONIC_USEC=12500000",
        b"STOPPING=1\nEXTEND_TIMEOUT_USEC=3000000",
        b"STATUS=well",
    ]


def test_the_watchdog_is_fed_in_time_and_not_at_every_turn(manager):
    name, heard = manager
    notifier = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "8000000", "WATCHDOG_PID": "7"}, pid=7)
    assert notifier.watchdog_seconds == 4
    for tick in range(100):
        notifier.feed(tick / 10)
    notifier.status("end")
    told = list(iter(lambda: heard.recv(1000), b"STATUS=end"))
    assert told == [b"WATCHDOG=1"] * 5


@pytest.mark.parametrize(
    "environment",
    [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "5", "WATCHDOG_PID": "8"}],
)
def test_without_a_watchdog_nobody_is_fed(environment):
    notifier = Notifier(environment, pid=7)
    assert notifier.watchdog_seconds is None
    notifier.feed(1.0)


def test_a_manager_that_is_gone_or_does_not_listen_harms_nobody(tmp_path):
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).ready("")
    Notifier({"NOTIFY_SOCKET": "/" + "x" * 200}).ready("")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(tmp_path / "deaf"))
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "deaf")})
        for _ in range(5000):
            notifier.status("x" * 1000)
