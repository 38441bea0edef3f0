"""The memory controller against a simulated machine: it gives back at once, takes slowly, and settles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.daemon.supervisor.books import Common, Holding
from ebbflow.daemon.supervisor.budget import (
    CALM_LOOK_SECONDS,
    DEAD_BAND,
    GROW_STEP_LEAST,
    LOOK_SECONDS,
    SHRINK_MARGIN,
    Budget,
    Statistics,
)
from ebbflow.daemon.supervisor.demand import OOM_FACTOR
from ebbflow.daemon.supervisor.outlook import Outlook
from ebbflow.daemon.supervisor.quiet import FORGIVE_SECONDS
from ebbflow.daemon.supervisor.quiet import LEAST_SECONDS as QUIET_LEAST_SECONDS
from ebbflow.daemon.supervisor.quiet import MOST_SECONDS as QUIET_MOST_SECONDS
from ebbflow.daemon.supervisor.reading import Reading
from ebbflow.daemon.supervisor.terms import Terms
from ebbflow.formats.errors import OutOfMemory, Unsupported
from ebbflow.formats.manifest import CurvePoint
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
    budget: Budget = field(default_factory=lambda: Budget(Outlook(RESERVE)))
    rate: int = 200 * MB
    block: int = 1
    common: float = 0.0  # the part of each stack that all models have in common
    lag: int = 0  # ticks before the worker hears of a target
    now: float = 0.0
    taken: int = 0
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    resident: dict[str, int] = field(default_factory=dict)
    heard: dict[str, int] = field(default_factory=dict)
    mail: list[tuple[float, str, int]] = field(default_factory=list)
    tick_seconds: float = TICK
    swapped: int = 0
    slept: float = 0.0
    pressure: bool = False
    battery: bool = False
    moves: list[tuple[float, int]] = field(default_factory=list)  # when, by how many bytes all targets together
    lowest: int = 10**18

    def __post_init__(self) -> None:
        self.taken = self.neighbour(0.0, self.total)

    @property
    def available(self) -> int:
        return self.total - self.taken - sum(self.resident.values()) + sum(self.shared(name) for name in self.resident)

    def shared(self, name: str, *, base: bool = False) -> int:
        """Bytes of a prefix (of its base) that are counted with a model loaded before, whose prefix has them too."""
        before = list(self.resident)[: list(self.resident).index(name)]
        held = {other: self.sizes[other][0] if base else self.resident[other] for other in (*before, name)}
        return int(self.common * min(held[name], max((held[other] for other in before), default=0)))

    def load(self, name: str, base: int, full: int, curve: tuple[CurvePoint, ...] = ()) -> int:
        self.sizes[name] = (base, full)
        self.post(self.budget.load(name, base, full, self.reading(), curve))
        self.resident[name] = base
        return self.budget.target(name)

    def reading(self) -> Reading:
        available = max(0, self.available)
        return Reading(available, "system memory", self.swapped, self.slept, self.pressure, self.battery)

    def unload(self, name: str) -> None:
        self.budget.unload(name)
        for known in (self.sizes, self.resident, self.heard):
            del known[name]
        self.mail = [m for m in self.mail if m[1] != name]

    def post(self, targets: dict[str, int]) -> None:
        self.mail += [(self.now + self.lag * self.tick_seconds, name, target) for name, target in targets.items()]

    @property
    def targets(self) -> dict[str, int]:
        return {name: self.budget.target(name) for name in self.sizes}

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / self.tick_seconds)):
            self.tick()

    def tick(self) -> None:
        self.now += self.tick_seconds
        self.taken = self.neighbour(self.now, self.available)
        due, self.mail = [m for m in self.mail if m[0] <= self.now], [m for m in self.mail if m[0] > self.now]
        for _, name, target in due:
            self.heard[name] = target
        for name, target in self.heard.items():
            base, full = self.sizes[name]
            assert base <= target <= full
            edge = max(base, full if target == full else target // self.block * self.block)
            self.resident[name] = min(edge, self.resident[name] + self.rate)
        holdings = {
            name: Holding(self.resident[name], target, self.shared(name), self.shared(name, base=True))
            for name, target in self.heard.items()
        }
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


# -- loading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("available", "target"), [(10 * GB, 2 * GB), (2 * GB, GB), (1_500 * MB, 500 * MB)])
def test_a_first_load_takes_what_is_left_and_at_least_its_base(available, target):
    assert Budget(Outlook(RESERVE)).load("a", 500 * MB, 2 * GB, Reading(available, "")) == {"a": target}


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
    budget = Budget(Outlook(RESERVE))
    budget.set_terms("a", Terms(size=SizeWish(fraction=0.5)))
    assert budget.load("a", 100, 1000, Reading(2 * GB, "")) == {"a": 500}
    for now in range(10):
        assert budget.update(now, Reading(0, ""), {"a": Holding(500, 500)}) == {}
    assert budget.reason("a") == "asked for 50%"
    budget.set_terms("a", Terms(size=SizeWish(nbytes=300)))
    assert (budget.target("a"), budget.demand.size("a")) == (300, SizeWish(nbytes=300))
    budget.set_terms("a", Terms(size=SizeWish(nbytes=5)))
    assert budget.target("a") == 100


def test_fixed_models_are_not_shrunk_for_automatic_ones():
    machine = Machine(6 * GB, step(10, 0, 4 * GB))
    machine.budget.set_terms("fixed", Terms(size=SizeWish(nbytes=GB)))
    machine.load("fixed", 100 * MB, 2 * GB)
    machine.load("free", 100 * MB, 2 * GB)
    machine.run(9)
    assert machine.resident == {"fixed": GB, "free": 2 * GB}
    machine.run(10)
    assert machine.resident == {"fixed": GB, "free": 100 * MB}
    assert machine.budget.reason("free") == "memory is short (system memory); this is the least it can be"


def test_wishes_outlive_workers_and_leave_with_the_model():
    budget = Budget(Outlook(RESERVE))
    budget.set_terms("a", Terms(size=SizeWish(nbytes=300)))
    budget.load("a", 100, 1000, Reading(10 * GB, ""))
    budget.worker_gone(0, False)
    assert budget.target("a") is None
    assert budget.load("a", 100, 1000, Reading(10 * GB, "")) == {"a": 300}
    budget.forget("a")
    assert budget.demand.size("a") == AUTO


def test_after_an_oom_kill_the_next_load_is_smaller_and_growth_is_slow():
    budget = Budget(Outlook(RESERVE))
    budget.load("a", 100, 1000, Reading(10 * GB, ""))
    budget.worker_gone(5.0, True)
    assert budget.load("a", 100, 1000, Reading(10 * GB, "")) == {"a": 800}
    budget.worker_gone(6.0, True)
    assert budget.load("a", 100, 1000, Reading(10 * GB, "")) == {"a": 640}
    for now in range(7, 66):
        assert budget.update(now, Reading(10 * GB, ""), {"a": Holding(640, 640)}) == {}
    assert budget.update(66, Reading(10 * GB, ""), {"a": Holding(640, 640)}) == {"a": 1000}


def test_a_wish_that_got_the_worker_killed_is_cut_until_asked_again():
    budget = Budget(Outlook(RESERVE))
    budget.set_terms("a", Terms(size=SizeWish(nbytes=1000)))
    budget.load("a", 900, 2000, Reading(10 * GB, ""))
    budget.worker_gone(5.0, True)
    assert budget.load("a", 900, 2000, Reading(10 * GB, "")) == {"a": max(900, int(OOM_FACTOR * 1000))}
    assert "kernel killed" in budget.reason("a")
    budget.set_terms("a", Terms(size=SizeWish(nbytes=1000)))
    assert budget.target("a") == 1000
    assert budget.reason("a") == "asked for 1.0 kB"


def test_a_size_that_does_not_fit_comes_as_far_as_it_fits_and_the_rest_later():
    machine = Machine(6 * GB, step(20, 4 * GB, GB))
    machine.budget.set_terms("a", Terms(size=SizeWish(nbytes=3 * GB)))
    machine.load("a", 500 * MB, 4 * GB)
    machine.run(10)
    assert machine.resident["a"] == GB
    assert machine.budget.reason("a") == "asked for 3.0 GB; more does not fit now"
    machine.run(60)
    assert machine.resident["a"] == 3 * GB
    assert machine.budget.reason("a") == "asked for 3.0 GB"
    machine.budget.set_terms("a", Terms(size=SizeWish(nbytes=4 * GB)))
    assert machine.budget.target("a") == 4 * GB
    machine.neighbour = steady(2 * GB)
    machine.tick()
    machine.budget.set_terms("a", Terms(size=SizeWish(nbytes=4 * GB)))
    assert machine.budget.target("a") <= 6 * GB - 2 * GB - RESERVE + machine.rate


# -- admission and unloading --------------------------------------------------------------------------------------


def test_a_model_whose_base_does_not_fit_is_refused_and_may_be_asked_again():
    budget = Budget(Outlook(RESERVE))
    with pytest.raises(OutOfMemory, match="500 MB to begin with, of which 400 MB can be had"):
        budget.make_room("a", 500 * MB, Reading(1_400 * MB, "cap"), [])
    assert OutOfMemory.retryable
    assert budget.make_room("a", 500 * MB, Reading(1_500 * MB, "cap"), []) == []


def test_models_make_room_down_to_their_least_and_then_idle_ones_go_least_worth_first():
    machine = Machine(3 * GB, steady(0))
    for name in "abc":
        machine.load(name, 400 * MB, 800 * MB)
        machine.run(2)
    machine.budget.demand.use("a", machine.now)
    machine.budget.set_terms("b", Terms(priority=0.5))
    room = {idle: machine.budget.make_room("new", 800 * MB, machine.reading(), idle) for idle in ("", "ab", "abc")}
    assert room == {"": [], "ab": [], "abc": []}
    assert machine.budget.make_room("new", 1_200 * MB, machine.reading(), "abc") == ["b"]
    assert machine.budget.make_room("new", 1_500 * MB, machine.reading(), "abc") == ["b", "c"]
    with pytest.raises(OutOfMemory):
        machine.budget.make_room("new", 1_500 * MB, machine.reading(), "a")


def test_below_all_bases_idle_models_go_one_at_a_time_and_requests_are_refused():
    machine = Machine(4 * GB, step(10, 0, 2_700 * MB))
    for name in "abc":
        machine.load(name, 300 * MB, 900 * MB)
        machine.run(1)
    machine.budget.demand.use("a", machine.now)
    machine.budget.demand.use("c", machine.now)
    assert machine.budget.evict("abc") is None
    assert machine.budget.refusal() is None
    machine.run(9)
    assert machine.resident == {"a": 300 * MB, "b": 300 * MB, "c": 300 * MB}
    assert machine.budget.strangled
    assert "at their least" in str(machine.budget.refusal())
    assert machine.budget.evict("") is None
    assert machine.budget.evict("bc") == "b"
    assert machine.budget.evict("c") is None  # what b gave is not there yet
    machine.unload("b")
    machine.run(1)
    assert machine.budget.strangled
    assert machine.budget.refusal() is None  # half of the reserve is there
    assert machine.budget.evict("c") == "c"
    machine.unload("c")
    machine.run(1)
    assert not machine.budget.strangled
    assert machine.budget.refusal() is None


def test_where_memory_cannot_be_followed_only_sizes_are_served():
    budget, blind = Budget(Outlook(RESERVE)), Reading(10 * GB, "", fixed_only=True)
    with pytest.raises(Unsupported, match="ebb resize a"):
        budget.make_room("a", 100, blind, [])
    budget.set_terms("a", Terms(size=SizeWish(nbytes=300)))
    assert budget.make_room("a", 100, blind, []) == []


# -- floors, caps, several models ---------------------------------------------------------------------------------


def test_floors_and_caps_hold_whatever_the_memory():
    machine = Machine(10 * GB, step(20, 0, 9 * GB))
    machine.budget.set_terms("a", Terms(floor=700 * MB, cap=GB))
    machine.load("a", 100 * MB, 3 * GB)
    machine.load("b", 100 * MB, 3 * GB)
    machine.run(15)
    assert machine.resident == {"a": GB, "b": 3 * GB}
    assert machine.budget.reason("a") == "at its cap of 1.0 GB"
    machine.run(30)
    assert machine.resident == {"a": 700 * MB, "b": 100 * MB}
    machine.budget.set_terms("a", Terms())
    machine.run(5)
    assert machine.resident["a"] == 100 * MB


CURVES = {
    "steep": tuple(CurvePoint(1, n * MB, kl, 1.0) for n, kl in ((100, 3.0), (400, 0.01), (2000, 0.001))),
    "flat": tuple(CurvePoint(1, n * MB, kl, 1.0) for n, kl in ((100, 0.3), (400, 0.25), (2000, 0.1))),
}


def test_what_is_worth_least_goes_first_and_use_and_priority_count():
    machine = Machine(5 * GB, step(10, 0, 3 * GB))
    for name, curve in CURVES.items():
        machine.load(name, 100 * MB, 2000 * MB, curve)
    machine.run(9)
    assert all(nbytes >= 2 * GB - DEAD_BAND for nbytes in machine.resident.values())
    machine.run(5)
    left = machine.resident["steep"] + machine.resident["flat"]
    assert 350 * MB <= machine.resident["steep"] < 700 * MB
    assert left >= GB - 2 * SHRINK_MARGIN
    machine.budget.set_terms("steep", Terms(priority=100.0))
    machine.run(60)
    assert machine.resident["steep"] > 700 * MB


def test_bytes_move_to_the_model_that_is_used_and_then_stay():
    machine = Machine(5 * GB, steady(2 * GB))
    machine.load("a", 100 * MB, 2 * GB)
    machine.run(2)
    machine.load("b", 100 * MB, 2 * GB)
    machine.run(20)
    assert machine.resident["a"] == pytest.approx(machine.resident["b"], abs=4 * DEAD_BAND)
    for _ in range(20):
        machine.budget.demand.use("b", machine.now)
        machine.run(3)
    assert machine.resident["b"] > machine.resident["a"] + 300 * MB
    moves = len(machine.moves)
    machine.run(30)
    assert len(machine.moves) - moves <= 6
    assert machine.available >= RESERVE


# -- yield, pause, battery, swap, pressure, sleep -----------------------------------------------------------------


def test_what_is_yielded_is_left_free_until_it_ends():
    machine = Machine(6 * GB, steady(0))
    machine.load("a", 100 * MB, 8 * GB)
    machine.run(20)
    assert machine.resident["a"] == pytest.approx(5 * GB, abs=DEAD_BAND)
    machine.budget.concede(2 * GB, machine.now + 30)
    machine.tick()
    machine.tick()
    assert machine.available >= RESERVE + 2 * GB
    assert machine.budget.statistics(machine.now).yielded == 2 * GB
    assert machine.budget.reason("a").startswith("2.0 GB yielded for another 30 s")
    machine.run(29)
    assert machine.available >= RESERVE + 2 * GB
    machine.run(30)
    assert machine.resident["a"] == pytest.approx(5 * GB, abs=DEAD_BAND)
    assert machine.budget.statistics(machine.now) == Statistics(
        RESERVE, 0, machine.resident["a"], machine.available, 2.0, 0.0
    )
    machine.budget.concede(2 * GB, math.inf)
    machine.run(1)
    machine.budget.concede(0, 0)
    machine.run(30)
    assert machine.resident["a"] == pytest.approx(5 * GB, abs=DEAD_BAND)


def test_paused_models_are_at_their_least_and_idle_ones_go():
    machine = Machine(6 * GB, steady(0))
    machine.budget.set_terms("b", Terms(floor=300 * MB))
    machine.budget.set_terms("c", Terms(size=SizeWish(nbytes=500 * MB)))
    for name in "abc":
        machine.load(name, 100 * MB, GB)
    machine.run(5)
    machine.budget.pause()
    machine.run(10)
    assert machine.resident == {"a": 100 * MB, "b": 300 * MB, "c": 500 * MB}
    assert machine.budget.reason("a") == "paused (`ebb resume` ends it)"
    assert machine.budget.evict("ac") == "a"
    machine.unload("a")
    assert machine.load("a", 100 * MB, GB) == 100 * MB
    machine.budget.resume()
    machine.run(20)
    assert machine.resident == {"a": GB, "b": GB, "c": 500 * MB}


def test_a_shrink_because_more_is_to_be_left_free_is_no_reversal():
    machine = Machine(6 * GB, steady(0))
    machine.load("a", 100 * MB, 8 * GB)
    machine.run(10)
    machine.budget.keep_free(2 * GB, 0)
    machine.run(1)
    assert machine.available >= 2 * GB
    assert machine.budget.statistics(machine.now).quiet_seconds == QUIET_LEAST_SECONDS


def test_on_battery_more_is_left_free():
    machine = Machine(6 * GB, steady(0), budget=Budget(Outlook(RESERVE, GB)))
    machine.load("a", 100 * MB, 8 * GB)
    machine.run(10)
    machine.battery = True
    machine.run(1)
    assert machine.available >= 2 * GB
    assert "on battery" in machine.budget.reason("a")
    machine.battery = False
    machine.run(20)
    assert machine.available < RESERVE + DEAD_BAND
    assert machine.budget.statistics(machine.now).quiet_seconds == QUIET_LEAST_SECONDS


def test_being_swapped_out_is_an_emergency():
    machine = Machine(10 * GB, steady(0))
    machine.load("a", 100 * MB, 2 * GB)
    machine.run(10)
    machine.swapped = 50 * MB
    machine.tick()
    assert machine.budget.target("a") == 2 * GB - 50 * MB - SHRINK_MARGIN
    target = machine.budget.target("a")
    machine.tick()
    assert machine.budget.target("a") == target  # what is in swap and stays there is no news
    machine.run(QUIET_MOST_SECONDS)
    assert machine.budget.target("a") == 2 * GB


def test_under_pressure_nothing_grows():
    machine = Machine(10 * GB, step(5, 8 * GB, 2 * GB))
    machine.load("a", 100 * MB, 5 * GB)
    machine.pressure = True
    machine.run(60)
    assert machine.resident["a"] == GB
    assert machine.budget.reason("a") == "not growing while programs wait for memory"
    machine.pressure = False
    machine.run(20)
    assert machine.resident["a"] == 5 * GB


def test_after_a_sleep_nothing_grows_before_it_was_measured():
    machine = Machine(10 * GB, step(10, 8 * GB, 2 * GB))
    machine.load("a", 100 * MB, 5 * GB)
    machine.run(9.8)
    machine.slept = 3600.0
    machine.run(QUIET_LEAST_SECONDS)
    assert not machine.moves
    machine.run(2)
    assert machine.moves


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


def test_caches_go_before_blocks_and_are_measured_before_more_is_asked():
    budget, full = Budget(Outlook(RESERVE)), {"a": Holding(5 * GB, 5 * GB)}
    budget.load("a", 100 * MB, 5 * GB, Reading(10 * GB, ""))
    low = Reading(RESERVE - 10 * MB, "")
    assert budget.update(0.0, low, full, caches=100 * MB) == {}
    assert budget.missing
    assert budget.update(0.1, low, full) == {}
    assert budget.update(0.3, low, full) == {"a": 5 * GB - 10 * MB - SHRINK_MARGIN}  # they never came
    budget = Budget(Outlook(RESERVE))
    budget.load("a", 100 * MB, 5 * GB, Reading(10 * GB, ""))
    low = Reading(RESERVE - 200 * MB, "")
    assert budget.update(0.0, low, full, caches=50 * MB) == {"a": 5 * GB - 150 * MB - SHRINK_MARGIN}
    assert not budget.update(0.1, Reading(RESERVE + SHRINK_MARGIN, ""), {"a": Holding(*2 * [budget.target("a")])})
    assert not budget.missing


def test_a_worker_that_never_answers_is_asked_again():
    budget = Budget(Outlook(RESERVE))
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
    assert busy.budget.statistics(busy.now).quiet_seconds > 8 * QUIET_LEAST_SECONDS
    assert busy.budget.statistics(busy.now).quiet_seconds <= QUIET_MOST_SECONDS
    busy.run(7 * FORGIVE_SECONDS)
    assert busy.budget.statistics(busy.now).quiet_seconds == QUIET_LEAST_SECONDS


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
    tick=st.sampled_from([0.05, TICK]),
)
def test_a_neighbour_that_reacts_to_us_cannot_make_it_swing_nor_starve_it(threshold, bite, pause, hold, lag, tick):
    """It takes a bite when more than `threshold` is free, and gives it back after `hold` seconds."""
    state = {"held": 0, "at": 0.0}

    def neighbour(now, available):
        if state["held"] and now - state["at"] >= hold:
            state.update(held=0, at=now)
        elif not state["held"] and now - state["at"] >= pause and available > threshold:
            state.update(held=bite, at=now)
        return state["held"]

    machine = Machine(6 * GB, neighbour, lag=lag, tick_seconds=tick)
    machine.load("a", 100 * MB, 3 * GB)
    machine.load("b", 100 * MB, 3 * GB)
    seconds = 300
    machine.run(seconds)
    doublings = math.ceil(math.log2(QUIET_MOST_SECONDS / QUIET_LEAST_SECONDS))
    assert machine.reversals() <= 2 * doublings + seconds / QUIET_MOST_SECONDS
    assert all(machine.resident[name] >= 100 * MB for name in "ab")
    machine.neighbour, machine.tick_seconds = steady(0), TICK
    machine.run(2 * QUIET_MOST_SECONDS)
    assert machine.available <= RESERVE + DEAD_BAND, "it grows in the end"


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


def ramp(start: float, rate: float, most: int) -> Callable[[float, int], int]:
    return lambda now, available: int(max(0.0, min(most, (now - start) * rate)))


def test_a_neighbour_that_keeps_taking_is_met_before_the_reserve_is_touched():
    machine = Machine(6 * GB, ramp(10, GB, 3 * GB), lag=2, tick_seconds=0.05)
    machine.load("a", 100 * MB, 4 * GB)
    machine.run(9.9)
    assert machine.resident["a"] == 4 * GB
    machine.lowest = 10**18
    machine.run(5)
    assert machine.lowest >= RESERVE - 60 * MB  # without looking ahead 150 MB: three ticks
    assert machine.resident["a"] == 2 * GB - SHRINK_MARGIN or machine.available < RESERVE + 300 * MB
    machine.run(60)
    assert machine.available <= RESERVE + DEAD_BAND


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    plan=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5 * GB)), min_size=1, max_size=6),
    rate=st.integers(100 * MB, 3 * GB),
    floors=st.lists(st.integers(0, GB), min_size=3, max_size=3),
    caps=st.lists(st.sampled_from([0, 200 * MB, GB, 9 * GB]), min_size=3, max_size=3),
    fixed=st.sampled_from(["", "a", "b"]),
    lag=st.integers(0, 3),
    uses=st.lists(st.sampled_from("abc"), max_size=6),
)
def test_whatever_comes_limits_hold_and_no_more_is_promised_than_there_is(plan, rate, floors, caps, fixed, lag, uses):
    wanted, taken = 0, 0

    def neighbour(now, available):
        nonlocal taken
        taken += max(-int(rate * 0.05), min(int(rate * 0.05), wanted - taken, available))
        return taken

    machine = Machine(9 * GB, neighbour, lag=lag, tick_seconds=0.05)
    for name, floor, cap in zip("abc", floors, caps, strict=True):
        machine.budget.set_terms(name, Terms(floor=floor, cap=cap, size=SizeWish(GB) if name == fixed else AUTO))
        machine.load(name, 100 * MB, 2 * GB)
        machine.run(0.5)
    for (seconds, wanted), used in zip(plan, [*uses, *plan], strict=False):  # noqa: B007 - the neighbour reads it
        if isinstance(used, str):
            machine.budget.demand.use(used, machine.now)
        for _ in range(20 * seconds):
            before, targets = machine.available, dict(machine.targets)
            machine.tick()
            grown = sum(max(0, machine.targets[n] - targets[n]) for n in "abc")
            assert grown <= max(0, before - RESERVE) + machine.rate + int(rate * 0.05)
            for name, floor, cap in zip("abc", floors, caps, strict=True):
                low = max(100 * MB, floor)
                if name != fixed:
                    assert low <= machine.targets[name] <= max(low, cap or 2 * GB)
    wanted, machine.tick_seconds = 0, TICK
    machine.run(200)
    tops = {
        n: GB if n == fixed else max(100 * MB, floors[i], min(caps[i] or 9 * GB, 2 * GB)) for i, n in enumerate("abc")
    }
    assert machine.resident == tops, "it grows in the end"


@pytest.mark.parametrize("common", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("lag", [0, 2])
def test_what_is_shared_is_not_spent_twice(common: float, lag: int) -> None:
    """Two variants give way as fast as others do, and use what sharing leaves."""
    machine = Machine(8 * GB, step(30, 2 * GB, 4_500 * MB), lag=lag, tick_seconds=0.05)
    machine.common = common
    for name in ("a", "b"):
        machine.load(name, 500 * MB, 3 * GB)
    machine.run(29)
    # 5 GB less the reserve are theirs
    wanted = min(6 * GB, 4 * GB / (1 - common / 2))
    assert sum(machine.resident.values()) > 0.93 * wanted
    machine.lowest = 10**18
    machine.run(1.5)
    assert machine.available >= RESERVE - DEAD_BAND
    machine.run(30)
    assert machine.available >= RESERVE
    assert machine.available <= RESERVE + 2 * DEAD_BAND or all(n == 3 * GB for n in machine.resident.values())
    assert machine.reversals(since=31) == 0


def test_unloading_one_of_two_variants_promises_only_what_is_its_own() -> None:
    machine = Machine(8 * GB, steady(GB))
    machine.common = 0.5
    for name in ("a", "b"):
        machine.load(name, 500 * MB, 2 * GB)
    machine.run(60)
    assert machine.resident == {"a": 2 * GB, "b": 2 * GB}
    assert machine.available == 4 * GB  # 3 GB for 4
    # of the tails of 1.5 GB each, half of one is in memory once; of the bases, 250 MB
    room = machine.budget.spare(machine.reading())
    assert room <= 4 * GB - RESERVE + 2 * 1_500 * MB - 750 * MB
    assert machine.budget.make_room("c", room, machine.reading(), {"a", "b"}) == []
    assert machine.budget.make_room("c", room + 200 * MB, machine.reading(), {"a", "b"}) == ["a"]
    with pytest.raises(OutOfMemory):
        machine.budget.make_room("c", room + 800 * MB, machine.reading(), {"a", "b"})
    # both together free their bases of 1 GB, less what is in memory once
    assert machine.budget.make_room("c", room + 700 * MB, machine.reading(), {"a", "b"}) == ["a", "b"]
    freed = machine.available
    claimed = machine.budget.unload("a")
    for known in (machine.sizes, machine.resident, machine.heard):
        del known["a"]
    assert 0 < claimed <= machine.available - freed == GB
    # at once, and not from the next report on: nobody else has what is left
    assert machine.budget.spare(machine.reading()) == machine.available - RESERVE + 1_500 * MB


def test_more_is_dropped_where_a_part_of_it_frees_nothing() -> None:
    dropped = []
    for shared in (0, 500 * MB, 2 * GB):
        budget = Budget(Outlook(RESERVE))
        for name in ("a", "b"):
            budget.load(name, 500 * MB, 2_500 * MB, Reading(20 * GB, ""))
        holdings = {name: Holding(2_500 * MB, 2_500 * MB) for name in ("a", "b")}
        holdings["b"] = Holding(2_500 * MB, 2_500 * MB, shared + 100 * MB, 100 * MB)
        budget.update(1.0, Reading(RESERVE - 84 * MB, ""), holdings)
        dropped.append(5_000 * MB - sum(budget.target(name) for name in ("a", "b")))
        assert abs(budget.outlook.asked_back - 100 * MB) < 10
    assert dropped == pytest.approx([100 * MB, 100 * MB / 0.875, 200 * MB], abs=10)


def test_giving_up_what_another_goes_on_using_is_no_neighbour_s_doing() -> None:
    """The sum of sizes falls and nothing gets free: that must not look as if somebody took it."""
    budget = Budget(Outlook(RESERVE))
    for name in ("a", "b"):
        budget.load(name, 500 * MB, 2_500 * MB, Reading(20 * GB, ""))
    for number in range(4):
        size = 2_500 * MB - number * 100 * MB
        shared = Holding(2_500 * MB, 2_500 * MB, size)
        budget.update(1 + number * 0.05, Reading(4 * GB, ""), {"a": Holding(size, size), "b": shared})
    assert budget.outlook.slope.coming == 0


def loaded(*models: tuple[str, int, Common], shared_base: int = 0) -> Budget:
    """A budget with models of 2 GB that hold so much, with bases of 500 MB, of which the second shares a part."""
    budget = Budget(Outlook(RESERVE))
    for name, _, common in models:
        budget.load(name, 500 * MB, 2 * GB, Reading(20 * GB, ""), common=common)
    holdings = {name: Holding(nbytes, nbytes) for name, nbytes, _ in models}
    if shared_base:
        second = models[1][0]
        holdings[second] = replace(holdings[second], shared=shared_base, shared_base=shared_base)
    for name, nbytes, _ in models:
        budget._books.models[name].target = nbytes
    budget.update(1.0, Reading(RESERVE + DEAD_BAND, ""), holdings)
    return budget


def test_a_model_that_shares_with_nobody_frees_all_of_its_base() -> None:
    kin = Common("one architecture")
    budget = loaded(
        ("c", 501 * MB, Common("another")), ("b", 500 * MB, kin), ("a", 500 * MB, kin), shared_base=400 * MB
    )
    reading = Reading(RESERVE + 100 * MB, "")
    assert budget.make_room("d", 600 * MB, reading, {"a", "b", "c"}) == ["c"]
    assert budget.make_room("d", 601 * MB, reading, {"a", "b", "c"}) == ["c"]  # with what it has beyond its base
    assert budget.make_room("d", 700 * MB, reading, {"a", "b"}) == ["a", "b"]
    budget.unload("c")
    assert budget._books.shared == 400 * MB, "these two share as before"


VARIANT = Common("k", "masks", 200 * MB)


@pytest.mark.parametrize("held", [500 * MB, 700 * MB])
def test_a_variant_asks_only_for_what_is_not_there(held: int) -> None:
    """Of its base of 500 MB, 200 are masks that another model has in memory; nobody shrinks for these."""
    budget = loaded(("a", held, VARIANT))
    reading = Reading(RESERVE + 310 * MB, "")
    beyond = held - 500 * MB
    assert budget.make_room("b", 510 * MB + beyond, reading, set(), VARIANT) == []
    with pytest.raises(OutOfMemory, match="needs 311 MB to begin with, of which 310 MB" if not beyond else "needs"):
        budget.make_room("b", 511 * MB + beyond, reading, set(), VARIANT)
    for other in (Common("k", "others", 200 * MB), Common("k", "", 200 * MB)):
        with pytest.raises(OutOfMemory):
            budget.make_room("b", 511 * MB, Reading(RESERVE + 310 * MB - beyond, ""), set(), other)
    budget.load("b", 500 * MB, 2 * GB, reading, common=VARIANT)
    assert budget.target("a") + budget.target("b") == held + 510 * MB
    assert budget.spare(reading) == beyond + 10 * MB, "what it still takes is what it was granted"


def test_a_variant_does_not_count_on_masks_of_a_model_that_goes_for_it() -> None:
    budget = loaded(("a", 500 * MB, VARIANT))
    reading = Reading(RESERVE + 250 * MB, "")
    assert budget.make_room("b", 450 * MB, reading, {"a"}, VARIANT) == []
    assert budget.make_room("b", 750 * MB, reading, {"a"}, VARIANT) == ["a"]
    with pytest.raises(OutOfMemory):
        budget.make_room("b", 751 * MB, reading, {"a"}, VARIANT)


def test_masks_that_a_loading_twin_counts_on_are_not_freed_by_unloading_the_other() -> None:
    budget = loaded(("a", 500 * MB, VARIANT))
    reading = Reading(RESERVE + 300 * MB, "")
    budget.load("b", 500 * MB, 2 * GB, reading, common=VARIANT)
    assert budget.make_room("c", 300 * MB, reading, {"a"}) == ["a"]
    with pytest.raises(OutOfMemory):
        budget.make_room("c", 301 * MB, reading, {"a"})
    assert budget.unload("a") == 300 * MB
    assert budget.spare(Reading(RESERVE + 600 * MB, "")) == 300 * MB, "b still reads as much"


def test_when_a_model_cannot_be_loaded_the_next_of_its_twins_reads_their_masks() -> None:
    budget = Budget(Outlook(RESERVE))
    reading = Reading(RESERVE + 2 * GB, "")
    for name in ("a", "b", "c"):
        budget.load(name, 500 * MB, 500 * MB, reading, common=VARIANT)
    assert budget.spare(reading) == 2 * GB - (500 + 300 + 300) * MB
    assert budget.unload("a") == 0
    assert budget.spare(reading) == 2 * GB - (500 + 300) * MB
    budget.update(1.0, reading, {"b": Holding(500 * MB, 500 * MB)})
    assert budget.unload("b") == 300 * MB
    assert budget.spare(reading) == 2 * GB - 300 * MB, "c finds the masks: it was told before b went"
    budget.load("d", 500 * MB, 500 * MB, reading, common=VARIANT)
    assert budget.unload("c") == 0
    assert budget.spare(reading) == 2 * GB - 500 * MB


def test_what_lies_beyond_a_damage_is_not_waited_for() -> None:
    for damaged_at in (None, GB):
        budget, reading = Budget(Outlook(RESERVE)), Reading(RESERVE + GB, "")
        holdings = {"a": Holding(GB, 2 * GB, damaged_at=damaged_at)}
        budget.load("a", 500 * MB, 2 * GB, Reading(RESERVE + 4 * GB, ""))
        budget.update(0.0, reading, holdings)
        assert budget.look_seconds() == (CALM_LOOK_SECONDS if damaged_at else LOOK_SECONDS)
        budget.load("b", 500 * MB, 2 * GB, reading)
        budget._books.retarget({"a": 2 * GB, "b": GB})
        for now in range(60):
            budget.update(now, reading, {**holdings, "b": Holding(GB, GB)})
        assert (budget.target("b") > GB) == bool(damaged_at)
