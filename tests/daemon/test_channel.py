"""`Hub` and `wait`: what arrives, what cannot be sent, and what strangers send."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.daemon.channel import PIPE_MESSAGES, Child, Hub, Lost, wait
from ebbflow.daemon.outboxes import Limits
from ebbflow.formats.child_messages import Exit, Ready, from_child_decoder
from ebbflow.formats.errors import DaemonFailed, InvalidRequest
from ebbflow.formats.messages import Chunk, Failed, Generate, ListModels, Ping, Pong, event_decoder, request_decoder
from ebbflow.formats.wire import HEADER, MAGIC, MAX_MESSAGE

from support.endless import Endless
from support.house import Peer

ADDRESS = "inproc://hub"


@pytest.fixture
def context():
    with zmq.Context() as context:
        yield context


@pytest.fixture
def hub(context):
    hub = Hub(ADDRESS, request_decoder, Limits(nbytes=100_000, messages=50), context=context)
    yield hub
    hub.close()


@pytest.fixture
def peer(context, hub):
    peer = Peer(context, ADDRESS, event_decoder)
    yield peer
    peer.close()


def meet(hub, peer) -> bytes:
    peer.say(Ping())
    [(identity, message)] = hub.receive()
    assert message == Ping()
    return identity


def test_messages_arrive_with_their_sender_and_answers_go_back(hub, peer):
    peer.say(Ping(), ListModels(id=7))
    (first, _), (second, message) = hub.receive()
    assert first == second
    assert message == ListModels(id=7)
    hub.send(first, Pong())
    assert peer.hear() == [Pong()]
    assert not hub.pending
    assert hub.lost() == []


def test_a_strangers_word_is_not_quoted_at_any_length(hub, peer):
    meet(hub, peer)
    word = "x" * (MAX_MESSAGE - 100)
    peer.socket.send_multipart([HEADER, msgspec.msgpack.encode({"type": word})])
    assert hub.receive() == []
    (failed,) = [event for event in peer.hear() if isinstance(event, Failed)]
    assert failed.code == "invalid_request"
    assert len(failed.message) < 5000


def test_receive_holds_only_so_much_at_once(context, hub):
    peers = [Peer(context, ADDRESS, event_decoder) for _ in range(12)]
    for number, peer in enumerate(peers):
        peer.say(Generate(id=number, model="m", prompt="x" * 1_900_000))
    rounds = [len(hub.receive()) for _ in range(4)]
    assert sum(rounds) == 12
    assert max(rounds) <= 5
    for peer in peers:
        peer.close()


def test_receive_takes_no_more_than_it_is_asked_to(hub, peer):
    peer.say(*(ListModels(id=number) for number in range(10)))
    assert [message.id for _, message in hub.receive(limit=4)] == [0, 1, 2, 3]
    assert len(hub.receive()) == 6


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([b""], "invalid_request"),
        ([HEADER], "invalid_request"),
        ([HEADER, b"", b""], "invalid_request"),
        ([HEADER] * 40, "invalid_request"),
        ([b"HTTP", b"\x80"], "invalid_request"),
        ([HEADER, b"\xc1"], "invalid_request"),
        ([HEADER, b"\x81\xa4type\xa7Unheard"], "invalid_request"),
        ([MAGIC + b"\x09", b"\x80"], "unsupported_version"),
    ],
)
def test_garbage_is_answered_and_does_no_harm(hub, peer, frames, code):
    peer.socket.send_multipart(frames)
    peer.say(ListModels(id=1))
    assert [message for _, message in hub.receive()] == [ListModels(id=1)]
    [failed] = peer.hear()
    assert isinstance(failed, Failed)
    assert (failed.id, failed.code) == (0, code)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=5), st.booleans())
def test_no_frames_raise(frames, with_header):
    with zmq.Context() as context:
        hub = Hub(ADDRESS, request_decoder, context=context)
        peer = Peer(context, ADDRESS, event_decoder)
        peer.socket.send_multipart([HEADER, *frames] if with_header else frames)
        for _, message in hub.receive():
            assert isinstance(message, request_decoder.type)
        peer.close()
        hub.close()


def until_lost(hub, act) -> list[Lost]:
    """Repeat until ZeroMQ's own thread has seen to a closed socket."""
    for _ in range(100_000):
        hub.receive()
        act()
        if lost := hub.lost():
            return lost
        os.sched_yield()
    raise AssertionError("nobody was lost")


def test_a_vanished_peer_is_named_at_the_next_send(hub, peer, context):
    identity = meet(hub, peer)
    hub.send(b"nobody", Pong())
    assert hub.lost() == [Lost(b"nobody", "vanished")]
    assert hub.lost() == []
    peer.close()
    assert until_lost(hub, lambda: hub.send(identity, Pong())) == [Lost(identity, "vanished")]


@pytest.fixture
def slow(context, hub):
    """A peer that lets only one message wait on its side."""
    peer = Peer(context, ADDRESS, event_decoder, rcvhwm=1)
    yield peer
    peer.close()


def test_a_slow_reader_gets_everything_in_order(hub, slow):
    identity = meet(hub, slow)
    count = PIPE_MESSAGES + 40
    for number in range(count):
        hub.send(identity, Chunk(id=number, text="", tokens=0))
    assert hub.pending
    heard = []
    while hub.pending:
        heard += slow.hear()
        hub.flush()
    heard += slow.hear()
    assert [message.id for message in heard] == list(range(count))
    assert hub.lost() == []


@pytest.mark.parametrize(("text", "fits"), [("", 50), ("x" * 10_000, 10)])
def test_an_outbox_is_bounded_in_messages_and_bytes(hub, slow, text, fits):
    identity = meet(hub, slow)
    while not hub.pending:
        hub.send(identity, Chunk(id=1, text="", tokens=0))
    for _ in range(fits - 1):
        hub.send(identity, Chunk(id=1, text=text, tokens=0))
    assert hub.lost() == []
    hub.send(identity, Chunk(id=1, text=text, tokens=0))
    assert hub.lost() == [Lost(identity, "overflowed")]
    assert not hub.pending


def test_all_outboxes_together_are_bounded_and_the_slowest_reader_is_lost(context):
    hub = Hub(ADDRESS, request_decoder, Limits(nbytes=100_000, total=150_000), context=context)
    peers = [Peer(context, ADDRESS, event_decoder, rcvhwm=1) for _ in range(3)]
    identities = [meet(hub, peer) for peer in peers]
    for identity, count in zip(identities, (5, 9, 3), strict=True):
        for _ in range(PIPE_MESSAGES + 5):
            hub.send(identity, Pong())
        for _ in range(count):
            hub.send(identity, Chunk(id=1, text="x" * 9_000, tokens=0))
        assert hub.lost() == ([Lost(identities[1], "overflowed")] if count == 3 else [])
    for peer in peers:
        peer.close()
    hub.close()


def test_a_peer_that_vanishes_with_a_full_outbox_frees_it(hub, slow):
    identity = meet(hub, slow)
    while not hub.pending:
        hub.send(identity, Pong())
    hub.send(identity, Pong())
    slow.close()
    assert until_lost(hub, hub.flush) == [Lost(identity, "vanished")]
    assert not hub.pending


def test_what_is_too_large_to_send_is_refused_here(hub, peer):
    identity = meet(hub, peer)
    with pytest.raises(InvalidRequest, match=str(MAX_MESSAGE)):
        hub.send(identity, Chunk(id=1, text="x" * MAX_MESSAGE, tokens=0))
    hub.send(identity, Pong())
    assert peer.hear() == [Pong()]


def test_an_address_that_cannot_be_bound_is_a_typed_error(tmp_path: Path):
    with pytest.raises(DaemonFailed, match="cannot be bound"):
        Hub(f"ipc://{tmp_path}/no/such/folder/sock", request_decoder)


def test_child_and_hub_speak_over_ipc(tmp_path: Path):
    hub = Hub(f"ipc://{tmp_path}/c", from_child_decoder)
    child = Child(f"ipc://{tmp_path}/c", "worker-1")
    child.send(Ready(pid=1))
    wait([hub], [], 20)
    assert hub.receive() == [(b"worker-1", Ready(pid=1))]
    hub.send(b"worker-1", Exit())
    assert child.receive(20) == [Exit()]
    child.close()
    hub.close()


def test_wait_returns_for_a_message_a_descriptor_or_the_time(hub, peer):
    wait([hub], [], 0)
    peer.say(Ping())
    wait([hub], [], None)
    hub.receive()
    reader, writer = os.pipe()
    os.write(writer, b"x")
    wait([hub], [reader], None)
    os.close(reader)
    os.close(writer)


def test_wait_comes_back_soon_while_an_outbox_is_due(hub, slow):
    identity = meet(hub, slow)
    while not hub.pending:
        hub.send(identity, Pong())
    wait([hub], [], None)  # would never return otherwise


def test_the_file_of_the_socket_is_made_again_wherever_it_went(tmp_path: Path, context, caplog):
    path = tmp_path / "sock"
    hub = Hub(f"ipc://{path}", request_decoder, context=context)
    peers = []

    def arrives() -> None:
        peers.append(Peer(context, f"ipc://{path}", event_decoder))
        for peer in peers:  # who was connected before still is
            peer.say(Ping())
        heard = 0
        while heard < len(peers):
            wait([hub], [], 20)
            heard += len(hub.receive())

    arrives()
    hub.keep_path()
    assert not caplog.records
    path.unlink()
    hub.keep_path()
    arrives()
    path.unlink()
    path.write_text("somebody else's")
    hub.keep_path()
    arrives()
    assert len(caplog.records) == 2
    shutil.rmtree(tmp_path)
    hub.keep_path()
    assert "cannot be made again" in caplog.text
    for peer in peers:
        peer.close()
    hub.close()


def private_nbytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def test_starting_over_frees_what_a_message_without_end_takes(tmp_path: Path, context):
    hub = Hub(f"ipc://{tmp_path}/c", request_decoder)
    before = Peer(context, f"ipc://{tmp_path}/c", event_decoder)
    endless = Endless(tmp_path / "c")
    small = private_nbytes()
    endless.go_on(100)
    before.say(Ping())
    wait([hub], [], 20)
    assert [message for _, message in hub.receive()] == [Ping()]
    assert private_nbytes() > small + 90_000_000  # nothing is ever heard of it
    hub.start_over()
    assert private_nbytes() < small + 50_000_000
    assert endless.cut_off()
    after = Peer(context, f"ipc://{tmp_path}/c", event_decoder)
    for peer in (before, after):  # ZeroMQ connects anew by itself
        peer.say(Ping())
        wait([hub], [], 20)
        [(identity, _)] = hub.receive()
        hub.send(identity, Pong())
        assert peer.socket.poll(20_000)
        peer.close()
    endless.close()
    hub.close()


def test_starting_over_after_the_socket_was_made_again(tmp_path: Path, context):
    hub = Hub(f"ipc://{tmp_path}/c", request_decoder)
    (tmp_path / "c").unlink()
    hub.keep_path()
    hub.start_over()
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    peer = Peer(context, f"ipc://{tmp_path}/c", event_decoder)
    peer.say(Ping())
    wait([hub], [], 20)
    assert len(hub.receive()) == 1
    hub.keep_path()
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    peer.close()
    hub.close()


def test_starting_over_serves_what_it_can_and_the_rest_when_it_is_free(tmp_path: Path, context, monkeypatch, caplog):
    file, beside = tmp_path / "c", tmp_path / "other"
    hub = Hub(f"ipc://{file}", request_decoder)
    hub.listen(f"ipc://{beside}", None)
    reopen = hub._open

    def reopen_late(*taken: Path) -> None:
        reopen()
        for path in taken:
            path.unlink(missing_ok=True)
            path.mkdir()

    for taken, free in ((beside, file), (file, beside)):
        monkeypatch.setattr(hub, "_open", lambda taken=taken: reopen_late(taken))
        hub.start_over()
        assert f"ipc://{taken} cannot be bound again" in caplog.text
        with contextlib.closing(Peer(context, f"ipc://{free}", event_decoder)) as peer:
            peer.say(Ping())
            wait([hub], [], 20)
            assert len(hub.receive()) == 1
        hub.bind_missing()
        assert taken.is_dir()
        taken.rmdir()
        hub.bind_missing()
        assert taken.is_socket()
        hub.keep_path()  # nothing is amiss with the file that was made late
        assert sorted(tmp_path.iterdir()) == [file, beside]
    hub.close()
