"""What the bench of shared prefixes holds to be the most that sharing can save, against trying every order."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads import Ask, Dice, Spoken, chats, in_turn, levels, longest, most_saved, sharers, together


def saved_in_order(spoken: tuple[Spoken, ...], grain: int) -> int:
    """What a cache that forgets nothing saves when these come one after another."""
    known, saved = set[tuple[int, ...]](), 0
    for each in spoken:
        usable = max(0, len(each.prompt) - 1) // grain
        found = 0
        while found < usable and each.prompt[: (found + 1) * grain] in known:
            found += 1
        saved += found * grain
        whole = each.prompt + each.answer[:-1]
        known |= {whole[:stop] for stop in range(grain, len(whole) + 1, grain)}
    return saved


ids = st.lists(st.integers(0, 1), max_size=7).map(tuple)
spoken = st.lists(st.builds(Spoken, ids.filter(len), ids), max_size=5)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(spoken, st.integers(1, 3))
def test_the_bound_is_what_the_best_order_saves(spoken: list[Spoken], grain: int) -> None:
    assert most_saved(spoken, grain) == max(saved_in_order(order, grain) for order in permutations(spoken))


def bound(asks: list[Ask], grain: int) -> int:
    return most_saved([Spoken(ask.prompt, ()) for ask in asks], grain)


@pytest.mark.parametrize("grain", [1, 32])
def test_sharers_compute_each_prefix_once(grain: int) -> None:
    asks = sharers(Dice(32000, 1), 3)
    assert len(asks) == 48
    assert {len(ask.prompt) for ask in asks} == {562}
    assert bound(asks, grain) >= 3 * 15 * 512
    assert bound(asks, grain) < 3 * 15 * 512 + 32 * grain
    assert [ask.prompt[:512] for ask in asks[:16]] != [asks[0].prompt[:512]] * 16, "not shuffled"
    assert sharers(Dice(32000, 1), 3) == asks
    assert sharers(Dice(32000, 2), 3) != asks


def test_levels_share_at_every_depth() -> None:
    asks = levels(Dice(32000, 1), (64, 32, 32), (2, 3, 4), own=10)
    assert len(asks) == 2 * 3 * 4
    assert bound(asks, 32) == 24 * 128 - (64 + 2 * 32 + 6 * 32)


def test_chats_go_on_after_their_own_answers() -> None:
    asks = chats(Dice(32000, 1), 3, 3, system=64, turn=10, tokens=5)
    assert [ask.after for ask in asks] == [None, None, None, 0, 1, 2, 3, 4, 5]
    assert longest(asks) == 64 + 3 * (10 + 5)
    assert len({asks[number].prompt[:64] for number in range(3)}) == 1


def test_users_ask_in_turn() -> None:
    asks = in_turn(sharers(Dice(32000, 1), 1, members=5), 2)
    assert [ask.after for ask in asks] == [None, None, 0, 1, 2]
    assert [ask.after for ask in together(asks[:2], asks)] == [None, None, None, None, 2, 3, 4]
