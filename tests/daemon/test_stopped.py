"""Processes that could not run for a while: a client (Ctrl-Z), the daemon, the machine's clock. Nobody waits for ever,
nobody is given up for a silence that could not be heard.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.client.exchange import Exchange, Lease, Reply
from ebbflow.daemon.supervisor.server import NAMED_PER_PING
from ebbflow.daemon.supervisor.steady import JUMP_SECONDS, SteadyClock
from ebbflow.formats.messages import LEASE_SECONDS, TERMINAL, Cancel, Chunk, Generate, Ping, Pong
from ebbflow.formats.wire import encode

from support.house import House, finished, generate
from support.models import write_model

HOUR = 3600.0


@pytest.fixture
def house(tmp_path):
    write_model(tmp_path, "demo")
    house = House(tmp_path)
    yield house
    house.close()


class Stoppable:
    """A client's exchange on one of the house's sockets, with everything it was told."""

    def __init__(self, house: House) -> None:
        self.house, self.peer = house, house.client()
        self.exchange = Exchange("inproc://clients", Lease())
        self.replies: dict[int, list[Reply]] = {}

    def ask(self, prompt: str = "x") -> int:
        id_ = self.exchange.allocate()
        sink = self.replies.setdefault(id_, []).append
        self.exchange.open(id_, Generate(id=id_, model="demo", prompt=prompt), sink, self.house.now)
        return id_

    def run(self) -> None:
        """What the channel's thread does in one round."""
        while self.peer.socket.poll(0):
            self.exchange.receive(self.peer.socket.recv_multipart(), self.house.now)
        self.exchange.tick(self.house.now)
        for frames in self.exchange.take_outgoing():
            self.peer.socket.send_multipart(frames)

    def ends(self, id_: int) -> list[str]:
        return [getattr(reply, "code", "done") for reply in self.replies[id_] if isinstance(reply, TERMINAL)]


def test_a_client_stopped_for_longer_than_its_lease_hears_of_it_once_when_it_wakes(house) -> None:
    client = Stoppable(house)
    id_ = client.ask()
    client.run()
    house.turn()
    worker = house.ready_worker()
    _, sent = worker.hear()
    worker.say(Chunk(id=sent.id, text="a", tokens=1))
    house.turn()
    for _ in range(20):  # Ctrl-Z; the daemon goes on
        house.turn(1.0)
    assert worker.hear() == [Cancel(id=sent.id)]
    for _ in range(4):  # fg
        client.run()
        house.turn(1.0)
    assert client.ends(id_) == ["lease_lost"]
    another = client.ask()
    for _ in range(3):
        client.run()
        house.turn(1.0)
    assert client.ends(another) == []


def test_a_ping_that_overtakes_nothing_ends_nothing(house) -> None:
    client = house.client()
    client.say(generate(1), Ping(open=(1,)))
    house.turn()
    assert client.hear() == [Pong()]
    client.say(Ping(open=tuple(range(1, 5000))))
    house.turn()
    heard = client.hear()
    assert {event.code for event in heard[:-1]} == {"lease_lost"}
    assert 1 not in {event.id for event in heard[:-1]}
    assert heard[-1] == Pong()
    assert len(heard) == NAMED_PER_PING


STEPS = st.lists(
    st.one_of(
        st.just(("ask",)),
        st.just(("client",)),
        st.just(("worker",)),
        st.tuples(st.just("pass"), st.sampled_from([0.5, 2.0, 9.0, 11.0])),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_however_long_it_was_stopped_each_request_ends_once_and_none_is_forgotten(tmp_path_factory, steps) -> None:
    root = tmp_path_factory.mktemp("stopped")
    write_model(root, "demo")
    house = House(root)
    try:
        client, worker = Stoppable(house), None
        for step in steps:
            if step == ("ask",) and len(client.exchange.open_ids) < 5:
                client.ask()
            elif step == ("client",):
                client.run()
            elif step == ("worker",) and house.launcher.workers:
                worker = worker or house.ready_worker()
                worker.say(*(finished(m.id) for m in worker.hear() if isinstance(m, Generate)))
            house.turn(step[1] if step[0] == "pass" else 0.0)
        for _ in range(8):  # now both run
            client.run()
            if house.launcher.workers:
                worker = worker or house.ready_worker()
                worker.say(*(finished(m.id) for m in worker.hear() if isinstance(m, Generate)))
            house.turn(1.0)
        assert not client.exchange.open_ids
        assert all(
            Counter(map(type, got)).total() and len(client.ends(id_)) == 1 for id_, got in client.replies.items()
        )
        assert len(house.server.requests) == 0
    finally:
        house.close()


class Hands:
    """A clock set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_steady_clock_takes_jumps_out_both_ways() -> None:
    hands = Hands()
    clock = SteadyClock(hands)
    hands.now += 1.0
    assert clock() == 101.0
    hands.now += HOUR
    assert clock() == 101.0
    hands.now += JUMP_SECONDS
    assert clock() == 101.0 + JUMP_SECONDS
    hands.now -= HOUR
    assert clock() == 101.0 + JUMP_SECONDS


def test_hours_that_jump_by_end_no_lease_and_kill_no_worker(house) -> None:
    hands = Hands()
    clock = SteadyClock(hands)
    client = house.client()

    def turn(seconds: float) -> None:
        hands.now += seconds
        house.now = clock()
        house.turn()

    client.say(generate(1), generate(2))
    turn(0.0)
    house.launcher.workers[0].words = ""
    turn(HOUR)  # while the worker starts
    worker = house.ready_worker()
    worker.hear()
    for jump in (HOUR, 30 * HOUR, LEASE_SECONDS + JUMP_SECONDS):
        turn(jump)
        turn(0.2)
    assert house.launcher.workers[0].signals == []
    assert len(house.server.requests) == 2
    assert client.hear() == []
    for _ in range(60):  # but time that passes turn by turn counts
        turn(0.2)
    assert len(house.server.requests) == 0


def test_a_frame_of_a_ping_is_small() -> None:
    assert sum(map(len, encode(Ping(open=tuple(range(100_000, 100_256)))))) < 2000
