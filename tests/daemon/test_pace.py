"""Steps stay under their target on any machine of cost `fixed + slope * tokens`, and use what they are given."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.daemon.engine.pace import MAX_TOKENS, STEP_SECONDS, Pace

fixed_costs = st.floats(0, 0.08)
any_fixed_costs = st.floats(0, 2)
slopes = st.floats(1e-5, 0.2)


def run(pace: Pace, fixed: float, slope: float, steps: int, want: int = MAX_TOKENS) -> list[float]:
    """Seconds of each step, when there is always work for `want` tokens."""
    seconds = []
    for _ in range(steps):
        tokens = min(pace.limit, want)
        seconds.append(fixed + slope * tokens)
        pace.record(tokens, seconds[-1])
        assert 1 <= pace.limit <= MAX_TOKENS
    return seconds


def longest(least: float) -> float:
    """What a step may take where one token takes `least`: `STEP_SECONDS`, or half as long again where it must."""
    return max(STEP_SECONDS, 1.5 * least) if least > Pace().target else STEP_SECONDS


def best(fixed: float, slope: float) -> int:
    """The most tokens that fit the target."""
    return max(1, min(MAX_TOKENS, math.floor((Pace().target - fixed) / slope)))


@given(any_fixed_costs, slopes)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_steps_settle_below_the_limit_whatever_the_machine(fixed: float, slope: float) -> None:
    pace = Pace()
    seconds = run(pace, fixed, slope, 40)[20:]
    # one step in a while tries a token more, or looks whether fewer are quicker
    assert sum(second > longest(fixed + slope) * 1.01 for second in seconds) <= 1


@given(fixed_costs, slopes)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_and_use_at_least_half_of_what_fits(fixed: float, slope: float) -> None:
    pace = Pace()
    run(pace, fixed, slope, 60)
    assert pace.limit >= best(fixed, slope) // 2


@given(fixed_costs, st.floats(1e-5, 0.005), st.floats(2, 50))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_sudden_slow_down_costs_few_long_steps(fixed: float, slope: float, factor: float) -> None:
    pace = Pace()
    run(pace, fixed / 4, slope, 40)
    slow = run(pace, fixed / 4 * factor, slope * factor, 30)
    least = (fixed / 4 + slope) * factor
    longer = [second for second in slow if second > longest(least) * 1.01]
    assert len(longer) <= 7
    assert sum(second > 1.2 * longest(least) for second in longer) <= 4


@given(fixed_costs, st.floats(1e-5, 0.002))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_slow_minute_is_forgotten(fixed: float, slope: float) -> None:
    pace = Pace()
    run(pace, fixed, slope * 20, 40)
    run(pace, fixed, slope, 100)
    assert pace.limit >= best(fixed, slope) // 2


@given(fixed_costs, st.floats(1e-5, 0.002))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_prompt_after_a_long_answer_is_read_at_full_speed(fixed: float, slope: float) -> None:
    pace = Pace()
    run(pace, fixed, slope, 20)
    run(pace, fixed, slope, 300, want=1)
    seconds = run(pace, fixed, slope, 10)
    assert pace.limit >= best(fixed, slope) // 2
    assert max(seconds) <= STEP_SECONDS


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_long_time_of_small_steps_is_no_licence_for_a_huge_one(tokens: int) -> None:
    pace = Pace()
    run(pace, 0.02, 0.004, 200, want=tokens)
    first = run(pace, 0.02, 0.004, 1)[0]
    assert first <= 2 * STEP_SECONDS


@given(st.lists(st.tuples(st.integers(1, MAX_TOKENS), st.floats(0, 100)), max_size=50))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_limit_is_sane_whatever_was_measured(steps: list[tuple[int, float]]) -> None:
    pace = Pace()
    for tokens, seconds in steps:
        pace.record(tokens, seconds)
        assert 1 <= pace.limit <= MAX_TOKENS


def test_a_machine_too_slow_for_one_token_still_works() -> None:
    pace = Pace()
    seconds = run(pace, 3.0, 1.0, 20)
    assert pace.limit == 3
    assert max(seconds[10:]) <= 1.5 * 4.0


@pytest.mark.parametrize("fixed", [0.125, 0.3, 0.7])
def test_a_machine_whose_steps_are_mostly_fixed_cost_reads_prompts_in_large_pieces(fixed: float) -> None:
    pace, slope = Pace(), 0.001
    tokens = []
    for _ in range(100):
        tokens.append(pace.limit)
        pace.record(pace.limit, fixed + slope * pace.limit)
    seconds = [fixed + slope * count for count in tokens]
    assert max(seconds) <= 1.52 * (fixed + slope)
    best = 0.5 * fixed / slope / (1.5 * fixed)  # tokens a second of the largest steps allowed
    assert sum(tokens[30:]) / sum(seconds[30:]) >= best / 2


def test_one_accident_does_not_stop_everything() -> None:
    pace = Pace()
    run(pace, 0.03, 0.005, 40)
    before = pace.limit
    pace.record(before, 0.2)
    assert pace.limit >= before // 4


@pytest.mark.parametrize("fixed", [0.05, 0.125, 0.2, 0.7])
def test_a_prompt_after_a_long_answer_does_not_crawl_where_one_token_takes_long(fixed: float) -> None:
    pace, slope = Pace(), 0.0017
    run(pace, fixed, slope, 20)
    run(pace, fixed, slope, 300, want=1)
    left, steps = 240, 0
    while left > 0:
        tokens = min(pace.limit, left)
        pace.record(tokens, fixed + slope * tokens)
        left, steps = left - tokens, steps + 1
    assert steps <= 20
