"""Which token follows: exact where the choice is exact, and a distribution where it is drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ebbflow.daemon.engine.sampler import sample
from ebbflow.formats.values import Sampling

logit_lists = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40)


def array(values: list[float]) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def drawn(logits: NDArray[np.float32], sampling: Sampling, count: int = 300) -> set[int]:
    return {sample(logits, sampling, position) for position in range(count)}


def probabilities(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    normalised: NDArray[np.float64] = weights / weights.sum()
    return normalised


@settings(deadline=None, derandomize=True)
@given(logit_lists, st.integers(0, 10**6))
def test_greedy_is_the_first_largest(values: list[float], position: int) -> None:
    found = sample(array(values), Sampling(), position)
    assert found == values.index(max(values))


@settings(deadline=None, derandomize=True)
@given(logit_lists, st.integers(0, 2**63 - 1), st.integers(0, 10**6), st.floats(0.1, 5))
def test_the_same_seed_and_position_give_the_same_token(
    values: list[float], seed: int, position: int, temperature: float
) -> None:
    sampling = Sampling(temperature=temperature, seed=seed)
    first = sample(array(values), sampling, position)
    np.random.default_rng(5).random(3)  # no other generator matters
    assert sample(array(values), sampling, position) == first


def test_seeds_and_positions_differ() -> None:
    flat = np.zeros(50_000, np.float32)
    assert len({sample(flat, Sampling(temperature=1, seed=seed), 7) for seed in range(50)}) > 45
    assert len(drawn(flat, Sampling(temperature=1), 50)) > 45


@settings(deadline=None, derandomize=True)
@given(logit_lists, st.integers(1, 10))
def test_top_k_draws_among_the_k_largest(values: list[float], k: int) -> None:
    logits = array(values)
    allowed = set(np.argsort(-logits, kind="stable")[:k].tolist())
    assert drawn(logits, Sampling(temperature=2, top_k=k), 20) <= allowed


def test_top_k_of_ties_takes_the_lowest_ids_and_all_of_them() -> None:
    assert drawn(np.zeros(9, np.float32), Sampling(temperature=1, top_k=3)) == {0, 1, 2}
    assert drawn(np.zeros(3, np.float32), Sampling(temperature=1, top_k=10)) == {0, 1, 2}


@settings(deadline=None, derandomize=True)
@given(logit_lists, st.floats(0.01, 1))
def test_top_p_draws_within_the_smallest_set_that_reaches_p(values: list[float], p: float) -> None:
    logits = array(values)
    weights = probabilities(logits, 1.5)
    order = np.argsort(-logits, kind="stable")
    cumulative = np.cumsum(weights[order])
    assume(np.abs(cumulative - p).min() > 1e-9 or p == 1)
    size = int((cumulative < p).sum()) + 1
    assert drawn(logits, Sampling(temperature=1.5, top_p=p), 20) <= set(order[:size].tolist())


@pytest.mark.parametrize(
    ("p", "support"),
    [(0.01, {2}), (0.5, {2}), (0.51, {2, 0}), (0.8, {2, 0}), (0.81, {2, 0, 3}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_support(p: float, support: set[int]) -> None:
    logits = np.log(np.array([0.3, 0.05, 0.5, 0.15], np.float32))
    assert drawn(logits, Sampling(temperature=1, top_p=p), 500) == support


def test_top_p_is_measured_after_top_k() -> None:
    logits = np.log(np.array([0.3, 0.05, 0.5, 0.15], np.float32))
    assert drawn(logits, Sampling(temperature=1, top_k=2, top_p=0.6)) == {2}  # 0.5 of 0.8 is enough
    assert drawn(logits, Sampling(temperature=1, top_k=2, top_p=0.63)) == {2, 0}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits = np.array([0.0, 1.0, -1.0, 2.0, 0.5, -30.0], np.float32)
    count = 4000
    sampling = Sampling(temperature=temperature, seed=11)
    counts = np.bincount([sample(logits, sampling, position) for position in range(count)], minlength=6)
    expected = probabilities(logits, temperature) * count
    likely = expected > 1
    chi_square = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert chi_square < 20.5  # 4 degrees of freedom: exceeded by chance once in 2500
    assert counts[5] == 0


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-6])
def test_a_temperature_next_to_nothing_is_greedy(temperature: float) -> None:
    assert drawn(array([1, 3, 3 - 1e-3, -9]), Sampling(temperature=temperature), 20) == {1}


def test_the_largest_temperature_and_the_widest_logits() -> None:
    assert drawn(array([3e38, -3e38]), Sampling(temperature=100), 20) == {0}
    assert drawn(array([5, -5]), Sampling(temperature=100), 50) == {0, 1}


def test_one_token_is_the_only_choice() -> None:
    assert sample(array([-4]), Sampling(temperature=1, top_k=1, top_p=0.01), 0) == 0
