"""What waits for slow peers: in order, and never more than the limits allow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.daemon.outboxes import MESSAGE_NBYTES, Limits, Outboxes


def message(nbytes: int) -> list[bytes]:
    """One that counts as so many bytes."""
    return [b"", b"x" * (nbytes - MESSAGE_NBYTES)]


@pytest.fixture
def outboxes():
    outboxes = Outboxes(Limits(nbytes=4_000, messages=5, total=10_000))
    yield outboxes
    outboxes.check_integrity()


def test_what_waits_is_sent_in_order(outboxes):
    for number in range(3):
        assert outboxes.push(b"a", [b"%d" % number]) == []
    for number in range(3):
        assert outboxes.first(b"a") == [b"%d" % number]
        outboxes.pop(b"a")
    assert outboxes.first(b"a") is None
    assert (len(outboxes), outboxes.nbytes) == (0, 0)


@pytest.mark.parametrize(("nbytes", "fits"), [(200, 5), (1_000, 4)])
def test_one_peer_has_a_limit(outboxes, nbytes, fits):
    outboxes.push(b"b", message(200))
    for _ in range(fits):
        assert outboxes.push(b"a", message(nbytes)) == []
    assert outboxes.push(b"a", message(nbytes)) == [b"a"]
    assert list(outboxes) == [b"b"]


def test_all_together_have_one_and_the_slowest_goes(outboxes):
    for peer, nbytes in ((b"a", 3_000), (b"b", 3_500), (b"c", 2_500)):
        outboxes.push(peer, message(nbytes))
    assert outboxes.push(b"d", message(1_001)) == [b"b"]
    assert sorted(outboxes) == [b"a", b"c", b"d"]
    assert outboxes.nbytes == 6_501


def test_who_is_dropped_waits_for_nothing(outboxes):
    outboxes.push(b"a", message(3_000))
    outboxes.drop(b"a")
    outboxes.drop(b"nobody")
    assert b"a" not in outboxes
    assert outboxes.nbytes == 0


@given(st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c", b"d"]), st.integers(-1, 3_000))))
def test_no_limit_is_ever_passed(steps):
    limits = Limits(nbytes=4_000, messages=5, total=6_000)
    outboxes = Outboxes(limits)
    for peer, size in steps:
        if size >= 0:
            for slow in outboxes.push(peer, message(MESSAGE_NBYTES + size)):
                assert slow not in outboxes
        elif outboxes.first(peer):
            outboxes.pop(peer)
        outboxes.check_integrity()
        assert outboxes.nbytes <= limits.total
