"""The memory controller against a simulated machine: it gives back at once, takes slowly, and settles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.daemon.supervisor.budget import (
    DEAD_BAND,
    FORGIVE_SECONDS,
    GROW_STEP_LEAST,
    OOM_FACTOR,
    QUIET_LEAST_SECONDS,
    QUIET_MOST_SECONDS,
    SHRINK_MARGIN,
    Budget,
    Holding,
)
from ebbflow.daemon.supervisor.reading import Reading
from ebbflow.daemon.supervisor.shares import divide
from ebbflow.formats.units import AUTO, SizeWish

MB = 1_000_000
GB = 1_000_000_000
RESERVE = GB
TICK = 0.2


@dataclass
class Machine:
    """Memory, a neighbour in it, and a worker that drops at once and loads `rate` bytes a tick, in whole blocks."""

    total: int
    neighbour: Callable[[float, int], int]
    budget: Budget = field(default_factory=lambda: Budget(RESERVE))
    rate: int = 200 * MB
    block: int = 1
    lag: int = 0  # ticks before the worker hears of a target
    now: float = 0.0
    taken: int = 0
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    resident: dict[str, int] = field(default_factory=dict)
    heard: dict[str, int] = field(default_factory=dict)
    mail: list[tuple[float, str, int]] = field(default_factory=list)
    moves: list[tuple[float, int]] = field(default_factory=list)  # when, by how many bytes all targets together
    lowest: int = 10**18

    def __post_init__(self) -> None:
        self.taken = self.neighbour(0.0, self.total)

    @property
    def available(self) -> int:
        return self.total - self.taken - sum(self.resident.values())

    def load(self, name: str, base: int, full: int) -> int:
        self.sizes[name] = (base, full)
        self.post(self.budget.load(name, base, full, self.reading()))
        self.resident[name] = base
        return self.budget.target(name)

    def reading(self) -> Reading:
        return Reading(max(0, self.available), "system memory")

    def post(self, targets: dict[str, int]) -> None:
        self.mail += [(self.now + self.lag * TICK, name, target) for name, target in targets.items()]

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK)):
            self.tick()

    def tick(self) -> None:
        self.now += TICK
        self.taken = self.neighbour(self.now, self.available)
        due, self.mail = [m for m in self.mail if m[0] <= self.now], [m for m in self.mail if m[0] > self.now]
        for _, name, target in due:
            self.heard[name] = target
        for name, target in self.heard.items():
            base, full = self.sizes[name]
            assert base <= target <= full
            edge = max(base, full if target == full else target // self.block * self.block)
            self.resident[name] = min(edge, self.resident[name] + self.rate)
        holdings = {name: Holding(self.resident[name], target) for name, target in self.heard.items()}
        before = sum(map(self.budget.target, self.sizes))
        self.post(self.budget.update(self.now, self.reading(), holdings))
        change = sum(map(self.budget.target, self.sizes)) - before
        if change:
            self.moves.append((self.now, change))
        self.lowest = min(self.lowest, self.available)

    def reversals(self, since: float = 0.0) -> int:
        signs = [change > 0 for when, change in self.moves if when > since]
        return sum(grew and not grows for grew, grows in pairwise(signs))


def steady(nbytes: int) -> Callable[[float, int], int]:
    return lambda now, available: nbytes


def step(when: float, before: int, after: int) -> Callable[[float, int], int]:
    return lambda now, available: before if now < when else after


# -- shares -------------------------------------------------------------------------------------------------------

LIMITS = st.dictionaries(
    st.sampled_from("abcd"), st.tuples(st.integers(1, 10**9), st.integers(1, 10**10)).map(sorted).map(tuple), min_size=1
)


@settings(derandomize=True)
@given(st.integers(-(10**9), 10**11), LIMITS)
def test_shares_stay_within_their_limits_and_use_what_there_is(total, limits):
    shares = divide(total, limits)
    assert shares.keys() == limits.keys()
    assert all(base <= shares[name] <= full for name, (base, full) in limits.items())
    bases, fulls = (sum(limit[i] for limit in limits.values()) for i in (0, 1))
    expected = min(max(total, bases), fulls)
    assert expected - len(limits) - 1e-6 * expected <= sum(shares.values()) <= expected


def test_shares_are_in_proportion_to_full_sizes():
    assert divide(300, {"a": (0, 100), "b": (0, 500)}) == {"a": 50, "b": 250}
    assert divide(300, {"a": (80, 100), "b": (0, 500)}) == pytest.approx({"a": 80, "b": 220}, abs=1)
    assert divide(10, {}) == {}


# -- loading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("available", "target"), [(10 * GB, 2 * GB), (2 * GB, GB), (GB + 1, 500 * MB), (0, 500 * MB)])
def test_a_first_load_takes_what_is_left_and_at_least_its_base(available, target):
    assert Budget(RESERVE).load("a", 500 * MB, 2 * GB, Reading(available, "")) == {"a": target}


def test_a_second_model_shares_with_the_first_but_makes_nothing_grow():
    machine = Machine(4 * GB, steady(0))
    machine.load("a", 100 * MB, 3 * GB)
    machine.run(20)
    assert machine.resident["a"] == pytest.approx(3 * GB, abs=DEAD_BAND)
    machine.load("b", 100 * MB, 3 * GB)
    machine.run(20)
    assert machine.resident["a"] == pytest.approx(1.5 * GB, abs=DEAD_BAND)
    assert machine.resident["b"] == pytest.approx(1.5 * GB, abs=DEAD_BAND)


def test_a_wish_is_kept_whatever_the_memory():
    budget = Budget(RESERVE)
    budget.set_wish("a", SizeWish(fraction=0.5))
    assert budget.load("a", 100, 1000, Reading(0, "")) == {"a": 500}
    for now in range(10):
        assert budget.update(now, Reading(0, ""), {"a": Holding(500, 500)}) == {}
    assert budget.reason("a") == "asked for 50%"
    budget.set_wish("a", SizeWish(nbytes=300))
    assert (budget.target("a"), budget.wish("a")) == (300, SizeWish(nbytes=300))
    budget.set_wish("a", SizeWish(nbytes=5))
    assert budget.target("a") == 100


def test_fixed_models_are_not_shrunk_for_automatic_ones():
    machine = Machine(6 * GB, step(10, 0, 4 * GB))
    machine.budget.set_wish("fixed", SizeWish(nbytes=GB))
    machine.load("fixed", 100 * MB, 2 * GB)
    machine.load("free", 100 * MB, 2 * GB)
    machine.run(9)
    assert machine.resident == {"fixed": GB, "free": 2 * GB}
    machine.run(10)
    assert machine.resident == {"fixed": GB, "free": 100 * MB}
    assert machine.budget.reason("free") == "memory is short (system memory); this is the least it can be"


def test_wishes_outlive_workers_and_leave_with_the_model():
    budget = Budget(RESERVE)
    budget.set_wish("a", SizeWish(nbytes=300))
    budget.load("a", 100, 1000, Reading(GB, ""))
    budget.worker_gone(0, False)
    assert budget.target("a") is None
    assert budget.load("a", 100, 1000, Reading(GB, "")) == {"a": 300}
    budget.forget("a")
    assert budget.wish("a") == AUTO


def test_after_an_oom_kill_the_next_load_is_smaller_and_growth_is_slow():
    budget = Budget(RESERVE)
    budget.load("a", 100, 1000, Reading(10 * GB, ""))
    budget.worker_gone(5.0, True)
    assert budget.load("a", 100, 1000, Reading(10 * GB, "")) == {"a": 800}
    budget.worker_gone(6.0, True)
    assert budget.load("a", 100, 1000, Reading(10 * GB, "")) == {"a": 640}
    for now in range(7, 66):
        assert budget.update(now, Reading(10 * GB, ""), {"a": Holding(640, 640)}) == {}
    assert budget.update(66, Reading(10 * GB, ""), {"a": Holding(640, 640)}) == {"a": 1000}


def test_a_wish_that_got_the_worker_killed_is_cut_until_asked_again():
    budget = Budget(RESERVE)
    budget.set_wish("a", SizeWish(nbytes=1000))
    budget.load("a", 900, 2000, Reading(GB, ""))
    budget.worker_gone(5.0, True)
    assert budget.load("a", 900, 2000, Reading(GB, "")) == {"a": max(900, int(OOM_FACTOR * 1000))}
    assert "kernel killed" in budget.reason("a")
    budget.set_wish("a", SizeWish(nbytes=1000))
    assert budget.target("a") == 1000
    assert budget.reason("a") == "asked for 1.0 kB"


# -- shrinking and growing ----------------------------------------------------------------------------------------


def test_shrinking_is_immediate_and_as_large_as_what_is_missing():
    machine = Machine(10 * GB, step(10, 2 * GB, 4_500 * MB))
    machine.load("a", 100 * MB, 5 * GB)
    machine.run(9.8)
    assert machine.resident["a"] == 5 * GB
    machine.run(0.4)  # the neighbour jumps; the target follows in the same tick
    machine.tick()
    assert RESERVE <= machine.available <= RESERVE + SHRINK_MARGIN + 1
    assert len(machine.moves) == 1
    assert machine.budget.reason("a") == "memory is short (system memory)"


def test_growing_waits_and_goes_in_steps():
    machine = Machine(10 * GB, step(10, 8 * GB, 2 * GB))
    machine.load("a", 100 * MB, 5 * GB)
    machine.run(60)
    assert machine.moves[0][0] == pytest.approx(10, abs=1)  # quiet was long over
    assert all(0 < change <= 5 * GB / 16 for _, change in machine.moves)
    assert machine.resident["a"] == 5 * GB
    assert machine.budget.reason("a") == "all of it fits"


def test_growing_after_a_shrink_waits_for_quiet_and_says_so():
    machine = Machine(10 * GB, lambda now, _: 4_500 * MB if 10 <= now < 11 else 2 * GB)
    machine.load("a", 100 * MB, 5 * GB)
    machine.run(11.4)
    assert machine.budget.reason("a").startswith("growing again in ")
    machine.run(30)
    shrink, grow = (machine.moves[0][0], machine.moves[1][0])
    assert grow - shrink >= QUIET_LEAST_SECONDS
    assert machine.resident["a"] == 5 * GB


def test_a_worker_that_is_slow_to_drop_is_not_asked_twice():
    machine = Machine(10 * GB, step(10, 2 * GB, 5 * GB), lag=4)
    machine.load("a", 100 * MB, 5 * GB)
    machine.run(20)
    assert len(machine.moves) == 1
    assert machine.resident["a"] >= 4 * GB - 2 * SHRINK_MARGIN


def test_a_worker_that_never_answers_is_asked_again():
    budget = Budget(RESERVE)
    budget.load("a", 100 * MB, 5 * GB, Reading(10 * GB, ""))
    low = Reading(RESERVE - 100 * MB, "")
    targets = [budget.update(now / 5, low, {"a": Holding(5 * GB, 5 * GB)}) for now in range(8)]
    assert targets[0]
    assert not any(targets[1:5])
    assert targets[5]["a"] < targets[0]["a"]


def test_the_quiet_time_doubles_with_each_reversal_and_recovers():
    busy = Machine(10 * GB, lambda now, _: 4_500 * MB if now < 900 and now % 90 < 45 else 2 * GB)
    busy.load("a", 100 * MB, 5 * GB)
    busy.run(900)
    assert busy.budget.statistics().quiet_seconds > 8 * QUIET_LEAST_SECONDS
    assert busy.budget.statistics().quiet_seconds <= QUIET_MOST_SECONDS
    busy.run(7 * FORGIVE_SECONDS)
    assert busy.budget.statistics().quiet_seconds == QUIET_LEAST_SECONDS


NEIGHBOURS = st.integers(0, 20 * GB)
SIZES = st.tuples(st.integers(10 * MB, GB), st.integers(10 * MB, 15 * GB)).map(sorted)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(NEIGHBOURS, NEIGHBOURS, st.lists(SIZES, min_size=1, max_size=3), st.integers(0, 3), st.integers(1, 60 * MB))
def test_beside_a_steady_neighbour_it_settles_and_stays(before, after, sizes, lag, block):
    machine = Machine(16 * GB, step(30, before, after), lag=lag, block=block)
    for name, (base, full) in zip("abc", sizes, strict=False):
        machine.load(name, base, full)
        machine.tick()
    machine.run(30 + 120)
    settled = machine.now
    machine.run(120)
    assert machine.reversals(settled - 60) == 0
    assert not [change for when, change in machine.moves if when > settled and change < 0]
    at_base = all(machine.resident[name] == base for name, (base, _) in machine.sizes.items())
    full = all(machine.resident[name] == full for name, (_, full) in machine.sizes.items())
    assert at_base or machine.available >= RESERVE
    slack = len(sizes) * block + DEAD_BAND + GROW_STEP_LEAST
    assert full or machine.available <= RESERVE + slack or machine.available < RESERVE + DEAD_BAND


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    threshold=st.integers(RESERVE - 100 * MB, RESERVE + 300 * MB),
    bite=st.integers(10 * MB, 4 * GB),
    pause=st.floats(0.2, 10),
    hold=st.floats(0.2, 30),
    lag=st.integers(0, 3),
)
def test_a_neighbour_that_reacts_to_us_cannot_make_it_swing(threshold, bite, pause, hold, lag):
    """It takes a bite when more than `threshold` is free, and gives it back after `hold` seconds."""
    state = {"held": 0, "at": 0.0}

    def neighbour(now, available):
        if state["held"] and now - state["at"] >= hold:
            state.update(held=0, at=now)
        elif not state["held"] and now - state["at"] >= pause and available > threshold:
            state.update(held=bite, at=now)
        return state["held"]

    machine = Machine(6 * GB, neighbour, lag=lag)
    machine.load("a", 100 * MB, 6 * GB)
    seconds = 600
    machine.run(seconds)
    doublings = math.ceil(math.log2(QUIET_MOST_SECONDS / QUIET_LEAST_SECONDS))
    assert machine.reversals() <= 2 * doublings + seconds / QUIET_MOST_SECONDS


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 60), NEIGHBOURS), min_size=1, max_size=8), st.integers(0, 2))
def test_memory_is_given_back_whatever_the_neighbour_does(plan, lag):
    wanted, taken = 0, 0

    def neighbour(now, available):  # gets no more than there is, and so takes at once whatever is given back
        nonlocal taken
        taken = min(wanted, taken + available)
        return taken

    machine = Machine(16 * GB, neighbour, lag=lag)
    machine.load("a", 50 * MB, 8 * GB)
    machine.load("b", 50 * MB, 4 * GB)
    machine.run(20)
    tolerance = machine.rate * (1 + lag) + MB  # what a growth under way takes too much is given back a tick later
    for seconds, wanted in plan:
        machine.run(1 + 12 * TICK * (2 + lag))  # at most the reserve can be seen to be missing at a time
        machine.lowest = 10**18
        machine.run(seconds)
        assert wanted > machine.total - RESERVE - 100 * MB or machine.lowest >= RESERVE - tolerance
