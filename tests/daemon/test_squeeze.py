"""The last resort: how much of keys and values requests may keep, and when they get it back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.daemon.supervisor.caches import TRIM_SECONDS, Caches
from ebbflow.daemon.supervisor.owners import REMEMBERED, Owners
from ebbflow.daemon.supervisor.quiet import LEAST_SECONDS, MOST_SECONDS
from ebbflow.daemon.supervisor.squeeze import (
    EASE,
    EVERY_SECONDS,
    KEPT_FREE,
    LEAST,
    Squeeze,
    level_above,
    level_below,
)
from ebbflow.formats.values import Residency

MB = 1_000_000


def test_what_is_missing_is_taken_from_what_is_held():
    squeeze = Squeeze()
    assert squeeze.update(10.0, -100 * MB, [400 * MB], last_resort=True) == 300 * MB
    assert squeeze.update(10.1, -100 * MB, [400 * MB], last_resort=True) is None  # not before the first was seen
    assert squeeze.update(10.0 + EVERY_SECONDS, -50 * MB, [310 * MB], last_resort=True) == 260 * MB
    assert squeeze.update(12.0, -900 * MB, [260 * MB], last_resort=True) == LEAST
    assert squeeze.update(13.0, -900 * MB, [LEAST], last_resort=True) is None


def test_only_as_the_last_resort_and_only_where_there_is_something():
    squeeze = Squeeze()
    assert squeeze.update(1.0, -100 * MB, [400 * MB], last_resort=False) is None
    assert squeeze.update(2.0, 100 * MB, [400 * MB], last_resort=True) is None
    assert squeeze.update(3.0, -100 * MB, [], last_resort=True) is None
    assert squeeze.update(4.0, -100 * MB, [LEAST // 2], last_resort=True) is None
    assert squeeze.limit == 0


def test_it_is_eased_after_a_quiet_time_and_lifted_when_nothing_is_in_the_way():
    squeeze = Squeeze()
    squeeze.update(10.0, -100 * MB, [400 * MB], last_resort=True)
    assert squeeze.update(11.0, 500 * MB, [300 * MB], last_resort=False) is None
    later = 10.0 + LEAST_SECONDS
    assert squeeze.update(later, EASE - 1, [300 * MB], last_resort=False) is None
    assert squeeze.update(later, EASE, [300 * MB], last_resort=False) == 300 * MB + EASE - KEPT_FREE
    assert squeeze.update(later + 1, EASE, [300 * MB], last_resort=False) is None  # not taken yet: the same room
    assert squeeze.update(later + 2, 200 * MB, [316 * MB], last_resort=False) == 0
    assert squeeze.limit == 0


def test_squeezing_and_easing_in_turns_gets_rare():
    squeeze, held, limits = Squeeze(), 400 * MB, []
    for tick in range(10 * 60 * 5):  # ten minutes of a neighbour that takes whatever is left
        now = tick / 5
        room = -30 * MB if held > 380 * MB else 40 * MB
        limit = squeeze.update(now, room, [held], last_resort=room < 0)
        if limit is not None:
            limits.append(now)
            held = limit or 400 * MB
    assert len([when for when in limits if when > 300]) <= 2 * (300 / MOST_SECONDS + 1)


def test_the_largest_give_first():
    squeeze = Squeeze()
    assert squeeze.update(1.0, -100 * MB, [300 * MB, 100 * MB, 250 * MB], last_resort=True) == 225 * MB


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 10**9), min_size=1, max_size=6), nbytes=st.integers(1, 10**9))
def test_levels_are_what_they_say(sizes, nbytes):
    level = level_above(sizes, nbytes)
    above = sum(max(0, size - level) for size in sizes)
    assert nbytes <= above < nbytes + len(sizes) or (level == 0 and above == sum(sizes))
    level = level_below(sizes, nbytes)
    assert nbytes - len(sizes) < sum(max(0, level - size) for size in sizes) <= nbytes


def residency(cache: int, kv_cached: int) -> Residency:
    return Residency(
        model="demo", blocks=1, total_blocks=1, nbytes=1, total_nbytes=1, base_nbytes=1, target_nbytes=1,
        cache_nbytes=cache, kv_cached_nbytes=kv_cached,
    )  # fmt: skip


def test_what_was_asked_for_is_not_there_to_be_asked_for_again():
    caches = Caches()
    caches.note([residency(100 * MB, 80 * MB)])
    assert caches.left(1.0) == 100 * MB
    assert caches.ask(1.0, 30 * MB)  # and all of the 20 MB of work space
    assert caches.left(1.1) == 50 * MB
    assert caches.ask(1.1, 500 * MB)
    assert caches.left(1.2) == 0
    assert not caches.ask(1.3, MB)
    caches.note([residency(5 * MB, 5 * MB)])
    assert caches.left(1.4) == 0
    assert caches.left(1.1 + TRIM_SECONDS) == 5 * MB


def test_an_order_is_sent_once_where_nothing_is_known_to_be_cached():
    caches = Caches()
    assert caches.ask(1.0, MB)
    assert not caches.ask(1.5, MB)
    assert caches.ask(1.0 + TRIM_SECONDS, MB)


def test_owners_keep_their_numbers_and_none_is_given_twice():
    owners = Owners()
    assert [owners.number(client) for client in (b"a", b"b", b"a")] == [1, 2, 1]
    for number in range(REMEMBERED - 1):
        owners.number(b"%d" % number)
    assert owners.number(b"a") == 1 or owners.number(b"b") > REMEMBERED
    assert owners.number(b"b") == REMEMBERED + 2


@pytest.mark.parametrize("excess", [0, 10])
def test_levels_of_nothing(excess):
    assert level_above([], excess) == 0
    assert level_below([], excess) == excess
