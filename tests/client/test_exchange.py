from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.client.exchange import Exchange, Lease, Reply, Sink, Watch
from ebbflow.formats.errors import BY_CODE
from ebbflow.formats.messages import (
    TERMINAL,
    Cancel,
    Chunk,
    Done,
    Failed,
    Finished,
    Generate,
    GetStatus,
    Ping,
    Pong,
    Started,
    request_decoder,
)
from ebbflow.formats.values import Sampling
from ebbflow.formats.wire import HEADER, MAGIC, MAX_MESSAGE, Message, decode, encode

LEASE = Lease(ping_seconds=2, silence_seconds=10, connect_seconds=2)


def finished(id_: int) -> Finished:
    return Finished(id=id_, reason="stop", prompt_tokens=1, tokens=2, seconds_to_first=0.1, seconds=0.2)


class Talk:
    """An exchange with a list of replies for each request."""

    def __init__(self) -> None:
        self.exchange = Exchange("ipc:///nowhere", LEASE)
        self.replies: dict[int, list[Reply]] = {}

    def sink(self, id_: int) -> Sink:
        return self.replies.setdefault(id_, []).append

    def open(self, make: Callable[[int], object] = lambda id_: GetStatus(id=id_), now: float = 0.0) -> int:
        id_ = self.exchange.allocate()
        self.exchange.open(id_, make(id_), self.sink(id_), now)  # type: ignore[arg-type]
        return id_

    def hear(self, message: Message, now: float = 0.0) -> None:
        self.exchange.receive(encode(message), now)

    def sent(self) -> list[Message]:
        return [decode(request_decoder, frames) for frames in self.exchange.take_outgoing()]

    def codes(self, id_: int) -> list[str]:
        return [reply.code for reply in self.replies[id_] if isinstance(reply, Failed)]


def test_a_request_is_sent_after_a_ping_and_its_replies_are_delivered_in_order():
    talk = Talk()
    assert talk.exchange.connection is None
    id_ = talk.open()
    assert talk.exchange.connection == 1
    assert talk.sent() == [Ping(), GetStatus(id=id_)]
    events = [Started(id=id_, prompt_tokens=3), Chunk(id=id_, text="a", tokens=1), finished(id_)]
    for event in events:
        talk.hear(event)
    assert talk.replies[id_] == events
    assert not talk.exchange.open_ids


def test_replies_after_the_end_and_for_unknown_requests_are_dropped():
    talk = Talk()
    id_ = talk.open()
    for event in (finished(id_), finished(id_), Chunk(id=id_, text="late", tokens=9), Done(id=id_ + 1)):
        talk.hear(event)
    assert talk.replies == {id_: [finished(id_)]}


@pytest.mark.parametrize(
    "frames", [[], [b""], [HEADER], [HEADER, b"\xff"], [HEADER, b""], [b"GET /", b""], [HEADER, b"\x80", b"more"]]
)
def test_garbage_is_dropped_and_does_not_keep_the_lease(frames: list[bytes]):
    talk = Talk()
    id_ = talk.open()
    talk.exchange.connected(0)
    for second in range(1, 10):
        talk.exchange.receive(frames, second)
        talk.exchange.tick(second)
    assert not talk.replies[id_]
    talk.exchange.tick(10)
    assert talk.codes(id_) == ["daemon_gone"]


def test_another_protocol_version_ends_requests_with_a_message_about_it():
    talk = Talk()
    id_ = talk.open()
    talk.exchange.receive([MAGIC + b"\x63", b""], 0)
    assert talk.codes(id_) == ["unsupported_version"]


def test_cancel_is_sent_once_and_the_daemon_has_the_last_word():
    talk = Talk()
    id_ = talk.open()
    talk.sent()
    talk.exchange.cancel(id_)
    talk.exchange.cancel(id_)
    talk.exchange.cancel(id_ + 7)
    assert talk.sent() == [Cancel(id=id_)]
    talk.hear(finished(id_))
    talk.exchange.cancel(id_)
    assert talk.sent() == []
    assert talk.replies[id_] == [finished(id_)]


def test_silence_ends_everything_when_the_lease_ends_and_not_before():
    talk = Talk()
    first, second = talk.open(), talk.open()
    talk.exchange.connected(0)
    for now in range(1, 10):
        talk.exchange.tick(now)
    assert talk.exchange.open_ids == {first, second}
    talk.exchange.tick(10)
    assert talk.codes(first) == talk.codes(second) == ["daemon_gone"]
    assert talk.exchange.connection is None


def test_pongs_keep_the_lease_and_pings_are_sent_only_while_something_is_open():
    talk = Talk()
    id_ = talk.open()
    talk.exchange.connected(0)
    talk.sent()
    for now in range(2, 60, 2):
        assert talk.exchange.deadline() == now
        talk.exchange.tick(now)
        assert talk.sent() == [Ping(open=(id_,))]
        talk.hear(Pong(), now)
    talk.hear(finished(id_))
    assert talk.exchange.deadline() is None
    talk.exchange.tick(1000)
    assert talk.sent() == []


def test_an_idle_hour_does_not_count_as_silence():
    talk = Talk()
    talk.hear(finished(talk.open()))
    id_ = talk.open(now=3600)
    talk.exchange.tick(3601)
    assert talk.replies[id_] == []


def test_time_in_which_this_process_was_stopped_does_not_count_as_silence():
    talk = Talk()
    id_ = talk.open()
    talk.exchange.connected(0)
    talk.exchange.tick(500)
    assert talk.replies[id_] == []
    assert talk.sent()[-1] == Ping(open=(id_,))  # and if it was too long for the daemon, it says so now


def test_a_ping_names_what_the_daemon_should_have():
    talk = Talk()
    first, _ping, _watch = talk.open(), talk.open(lambda _: Ping()), talk.open(lambda _: Watch())
    second = talk.open()
    talk.exchange.connected(0)
    talk.sent()
    talk.exchange.tick(2)
    assert talk.sent() == [Ping(open=(first, second))]
    talk.hear(Pong())
    talk.hear(Failed(id=first, code="lease_lost", message=""))
    talk.exchange.tick(4)
    assert talk.sent() == [Ping(open=(second,))]
    assert talk.codes(first) == ["lease_lost"]


def test_nobody_answering_the_connection_ends_requests_soon():
    talk = Talk()
    id_ = talk.open()
    talk.exchange.tick(1.9)
    assert talk.replies[id_] == []
    talk.exchange.tick(2)
    assert talk.codes(id_) == ["daemon_gone"]


def test_one_refusal_may_be_a_full_backlog_and_the_second_is_final():
    talk = Talk()
    id_ = talk.open()
    talk.exchange.refused()
    assert talk.replies[id_] == []
    talk.exchange.refused()
    assert talk.codes(id_) == ["not_running"]
    assert talk.sent() == []  # what was meant for a dead daemon must not reach the next one
    talk.open()
    talk.exchange.refused()
    assert talk.exchange.connection == 2


def test_a_lost_connection_ends_what_is_open_and_the_next_request_gets_a_fresh_one():
    talk = Talk()
    id_ = talk.open()
    talk.exchange.connected(0)
    talk.exchange.lost()
    assert talk.codes(id_) == ["daemon_gone"]
    assert talk.exchange.connection is None
    talk.open()
    assert talk.exchange.connection == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda id_: Generate(id=id_, model="m", prompt="x" * (MAX_MESSAGE + 1)),
        lambda id_: Generate(id=id_, model="m", prompt=7),
        lambda id_: Generate(id=id_, model="m", prompt="\ud800"),
        lambda id_: Generate(id=id_, model="m", prompt="p", sampling=Sampling(seed=2**70)),
        lambda id_: Generate(id=id_, model=object(), prompt="p"),
    ],
    ids=["too large", "wrong type", "lone surrogate", "huge number", "no msgpack"],
)
def test_what_the_daemon_could_not_read_fails_at_once_and_is_not_sent(make: Callable[[int], object]):
    talk = Talk()
    id_ = talk.open(make)
    assert talk.codes(id_) == ["invalid_request"]
    assert talk.sent() == []
    assert talk.exchange.connection is None


def test_a_ping_is_answered_by_any_pong_and_a_watch_only_by_the_end():
    talk = Talk()
    ping, watch = talk.open(lambda _: Ping()), talk.open(lambda _: Watch())
    talk.hear(Pong())
    assert talk.replies[ping] == [Done(id=ping)]
    talk.exchange.lost()
    assert talk.codes(watch) == ["daemon_gone"]


def test_cancelling_a_ping_ends_it_here():
    talk = Talk()
    id_ = talk.open(lambda _: Ping())
    talk.exchange.cancel(id_)
    assert talk.codes(id_) == ["cancelled"]


def test_closing_ends_everything_tells_the_daemon_and_refuses_what_comes_later():
    talk = Talk()
    id_ = talk.open()
    talk.exchange.close()
    assert talk.codes(id_) == ["cancelled"]
    assert talk.sent()[-1] == Cancel(id=id_)
    talk.exchange.close()
    assert talk.codes(talk.open()) == ["cancelled"]


IDS = st.integers(1, 12)
STEPS = st.one_of(
    st.tuples(st.just("open"), st.sampled_from(["status", "ping", "watch", "huge"])),
    st.tuples(st.just("cancel"), IDS),
    st.tuples(st.just("hear"), IDS, st.sampled_from([*TERMINAL[:2], Started, Chunk, Done, Pong, bytes])),
    st.tuples(st.sampled_from(["connected", "refused", "lost", "close"])),
    st.tuples(st.just("pass"), st.floats(0, 30)),
)


def event(id_: int, kind: type) -> list[bytes]:
    made: dict[type, Message] = {
        Finished: finished(id_),
        Failed: Failed(id=id_, code="internal", message=""),
        Started: Started(id=id_, prompt_tokens=1),
        Chunk: Chunk(id=id_, text="x", tokens=1),
        Done: Done(id=id_),
        Pong: Pong(),
    }
    return encode(made[kind]) if kind in made else [b"EB", b"garbage"]


def request(kind: str) -> Callable[[int], object]:
    return {
        "status": lambda id_: GetStatus(id=id_),
        "ping": lambda _: Ping(),
        "watch": lambda _: Watch(),
        "huge": lambda id_: Generate(id=id_, model="m", prompt="x" * (MAX_MESSAGE + 1)),
    }[kind]


@given(st.lists(STEPS, max_size=40))
def test_every_request_gets_exactly_one_terminal_reply_and_nothing_after_it(steps: list[tuple[object, ...]]):
    talk = Talk()
    now = 0.0
    for step in steps:
        match step:
            case ("open", str(kind)):
                talk.open(request(kind), now)
            case ("cancel", int(id_)):
                talk.exchange.cancel(id_)
            case ("hear", int(id_), kind):
                talk.exchange.receive(event(id_, kind), now)  # type: ignore[arg-type]
            case ("pass", float(seconds)):
                now += seconds
                talk.exchange.tick(now)
            case ("connected",):
                talk.exchange.connected(now)
            case (str(name),):
                getattr(talk.exchange, name)()
        ends = {id_: Counter(isinstance(reply, TERMINAL) for reply in got)[True] for id_, got in talk.replies.items()}
        assert all(count == (id_ not in talk.exchange.open_ids) for id_, count in ends.items())
        assert not talk.exchange.open_ids or talk.exchange.connection is not None
    talk.exchange.close()
    for got in talk.replies.values():
        assert [isinstance(reply, TERMINAL) for reply in got] == [False] * (len(got) - 1) + [True]
        assert all(reply.code in BY_CODE for reply in got if isinstance(reply, Failed))
