"""Automatic mode against a real memory hog, on the full shape: the stack gives way, nothing fails or is killed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from ebbflow.client import Client, errors
from ebbflow.daemon.library.shapes import SHAPES
from ebbflow.daemon.library.synthetic_stack import write_random_stack

from support.cgroups import Limited, can_limit, limited_cgroup
from support.hog import Hog
from support.real_daemon import RealDaemon, real_daemon, until

LIMIT = 1_000_000_000
RESERVE = 150_000_000
pytestmark = pytest.mark.skipif(
    not can_limit(), reason="needs root and a cgroup v1 memory hierarchy to limit real memory"
)


@pytest.fixture
def cgroup() -> Iterator[Limited]:
    with limited_cgroup(LIMIT) as group:
        yield group


@pytest.fixture
def daemon(cgroup: Limited) -> Iterator[RealDaemon]:
    with real_daemon("--reserve", str(RESERVE), prefix=cgroup.prefix) as running:
        write_random_stack(SHAPES["tinyllama-1.1b"], running.paths.library, "full", levels=3)
        yield running


def resident(client: Client) -> int:
    return client.status().models[0].nbytes


def test_the_stack_gives_way_to_a_hog_and_comes_back(cgroup: Limited, daemon: RealDaemon) -> None:
    pieces: list[str] = []
    failures: list[errors.EbbflowError] = []

    def stream() -> None:
        try:
            with daemon.client() as own, own.generate("full", "hello", max_tokens=1500) as text:
                pieces.extend(text)
        except errors.EbbflowError as error:
            failures.append(error)

    with daemon.client() as client, ExitStack() as hogs:
        asking = threading.Thread(target=stream)
        asking.start()
        until(lambda: bool(client.status().models))
        full = client.status().models[0].total_nbytes
        until(lambda: resident(client) == full)
        hog = hogs.enter_context(Hog(cgroup.prefix))
        for _ in range(4):
            hog.ask("grow 100")
            until(lambda: LIMIT - cgroup.read("memory.usage_in_bytes") > RESERVE)
        shrunk = resident(client)
        assert shrunk < full - 150_000_000
        assert not failures
        count = len(pieces)
        until(lambda: len(pieces) > count or bool(failures))
        hog.ask("free")
        until(lambda: resident(client) > shrunk + 150_000_000)
        client.pause()
        until(lambda: all(m.nbytes == m.base_nbytes for m in client.status().models))  # or unloaded, if it is idle
        client.resume()
        client.yield_memory("100MB", "1m")
        assert (client.status().yielded_nbytes, client.status().paused) == (100_000_000, False)
        client.shutdown()
    asking.join()
    assert cgroup.oom_kills == 0
    assert [type(failure).__name__ for failure in failures] in ([], ["Cancelled"], ["DaemonGone"])
