"""The scheduler against any sequence of events; no model anywhere, but every read goes through the block tables."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.daemon.engine.kv import MAX_SEQUENCES, blocks_for
from ebbflow.daemon.engine.prefixes import MIXED, Node
from ebbflow.daemon.engine.scheduler import AHEAD_TOKENS, MAX_WAITING, Scheduler
from ebbflow.daemon.engine.sequences import Sequence
from ebbflow.daemon.engine.waiting import OVERTAKEN_MOST, SIBLINGS, Policy, Waiting
from ebbflow.formats.errors import OutOfMemory, PromptTooLong, TooBusy

from support.scheduling import Memory, World, alone, band_of, prompt_of

POLICIES = (Policy(), Policy(False, False, False), Policy(True, False, True), Policy(False, True, True))

paths = st.sampled_from([[], [0], [1], [0, 0], [0, 1], [0, 0, 0], [0, 1, 1], [0, 1, 1, 0], [1, 0, 1, 1], [0, 1, 1, 1]])
tails = st.sampled_from([1, 1, 2, 20, 31, 32, 33])
requests = st.fixed_dictionaries(
    {
        "path": paths,
        "tail": tails,
        "more": st.sampled_from([1, 2, 5, 30, 70]),
        "namespace": st.sampled_from(["", "", "", "b"]),
        "owner": st.integers(0, 2),
        "priority": st.sampled_from([0, 0, 0, 1, 2]),
        "exact": st.sampled_from([False, False, False, True]),
        "samples": st.sampled_from([True, True, True, True, False]),
    }
)
submissions = st.tuples(st.just("submit"), requests)
steps = st.tuples(
    st.just("step"), st.tuples(st.sampled_from([1000, 64, 200, 33, 10, 1]), st.sampled_from([32, 32, 2, 1]))
)
picks = st.integers(0, 40)
actions = st.one_of(
    submissions,
    submissions,
    steps,
    steps,
    steps,
    st.tuples(st.just("fail"), st.sampled_from([1, 50, 1000])),
    st.tuples(st.just("cancel"), picks),
    st.tuples(st.just("preempt"), picks),
    st.tuples(st.just("unpin"), picks),
    st.tuples(st.just("trim"), st.integers(0, 24)),
    st.tuples(st.just("limit"), st.sampled_from([0, 3, 6, 10, 24])),
    st.tuples(st.just("resize"), st.integers(0, 3)),
    st.tuples(st.just("restore"), st.tuples(paths, st.integers(0, 3))),
)


def act(world: World, what: str, value: object) -> None:
    """One thing that may happen; nothing where there is nobody to whom it could."""
    scheduler = world.scheduler
    open_requests = [s for s in world.requests if s.key not in world.ended]
    match what, value:
        case "submit", {"path": list(path), "tail": int(tail), "more": int(more), **words}:
            try:
                world.submit(prompt_of(path, tail), more, **words)
            except (OutOfMemory, PromptTooLong):
                world.check()
        case "step", (int(limit), int(most)):
            world.step(limit, most)
        case "fail", int(limit):
            world.step(limit, fails=True)
        case "cancel", int(pick) if open_requests:
            world.end(open_requests[pick % len(open_requests)])
            world.check()
        case "preempt", int(pick) if scheduler.running:
            world.preempt(scheduler.running[pick % len(scheduler.running)])
        case "unpin", int(pick) if world.pins:
            world.unpin(pick % len(world.pins))
        case "trim", int(blocks):
            world.trim(blocks)
        case "limit", int(blocks):
            world.limit(blocks)
        case "resize", int(depth):
            world.resize(depth)
        case "restore", (list(path), int(depth)):
            world.restore("", prompt_of(path, 1), depth)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(actions, min_size=30, max_size=60),
    st.sampled_from(POLICIES),
    st.sampled_from([None, None, 0, 3]),
    st.sampled_from([24, 40, 14, 10]),
    st.sampled_from([7, 40, 1000, None]),
)
def test_whatever_happens(
    script: list[tuple[str, object]], policy: Policy, cached: int | None, most: int, last_limit: int | None
) -> None:
    """Every answer is that of the request alone; `World` checks the rest. `last_limit` None: cancel what is left."""
    world = World(most, policy, cached)
    for what, value in script:
        act(world, what, value)
    if last_limit is not None:
        world.drain(last_limit)
    for s in world.requests:
        told = tuple(world.told[s.key])
        prompt = tuple(world.prompts[s.key])
        assert not told or told == alone(prompt, s.limit - len(prompt), s.namespace)[: len(told)]
    world.empty()


# -- sharing --------------------------------------------------------------------------------------------------------


def group(number: int, prefix: int = 96, members: int = 16, tail: int = 10) -> list[list[int]]:
    """Prompts with one prefix, each with a tail of its own."""
    return [[100 + number] * prefix + [1000 * number + member] * tail for member in range(members)]


def test_a_shared_prefix_is_computed_once_by_its_leader() -> None:
    world = World(200)
    for prompt in group(0):
        world.submit(prompt, 5)
    world.drain(50)
    assert world.scheduler.totals.computed == 96 + 16 * (10 + 4)  # the last token of an answer is never computed
    assert world.scheduler.totals.reused == 15 * 96
    assert world.scheduler.totals.prompt == 16 * 106


def test_without_the_gate_all_of_them_compute_it() -> None:
    world = World(200, Policy(gate=False))
    for prompt in group(0):
        world.submit(prompt, 5)
    world.drain()
    assert world.scheduler.totals.computed == 16 * (106 + 4)


def test_three_levels_are_each_computed_once() -> None:
    world = World(400)
    prompts = [
        [1] * 64 + [2 + a] * 64 + [10 + 2 * a + b] * 64 + [c] * 5 for a in (0, 1) for b in (0, 1) for c in range(4)
    ]
    random.Random(0).shuffle(prompts)
    for prompt in prompts:
        world.submit(prompt, 1)
    world.drain(70)
    assert world.scheduler.totals.computed == 64 + 2 * 64 + 4 * 64 + 16 * 5


def test_the_next_turn_of_a_chat_reuses_prompt_and_answer() -> None:
    world = World(60)
    prompt = [1] * 40
    for turn in range(5):
        s = world.submit(prompt, 50)
        world.drain()
        assert s.reused == s.shareable == (len(prompt) - 5) // 32 * 32 * (turn > 0)
        prompt = prompt + world.told[s.key] + [turn] * 4
    assert len(prompt) == 40 + 5 * 54


def test_a_prompt_that_is_all_there_still_computes_its_last_token() -> None:
    world = World(60)
    first = world.submit([1] * 64, 1)
    world.drain()
    again, longer = world.submit([1] * 64, 1), world.submit([1] * 65, 1)
    world.drain()
    assert (first.reused, again.reused, longer.reused) == (0, 32, 64)
    assert (again.miss, longer.miss) == ("", "")
    assert world.told[0] == world.told[1]


@pytest.mark.parametrize("seed", range(3))
def test_groups_in_memory_for_two_are_computed_once_each(seed: int) -> None:
    """The queue is shuffled, so members come in any order; while one group is unfinished no other is begun for it."""
    prompts = [prompt for number in range(6) for prompt in group(number, prefix=160)]
    random.Random(seed).shuffle(prompts)
    world = World(2 * (5 + 16) + 8, checked=False)
    for prompt in prompts:
        world.submit(prompt, 4)
    world.drain(64)
    assert world.scheduler.totals.computed == 6 * (160 + 16 * (10 + 3))
    assert world.scheduler.totals.preemptions == 0
    world.empty()


def test_namespaces_share_nothing() -> None:
    world = World(60)
    for namespace in ("a", "b", "a"):
        world.submit([1] * 70, 2, namespace=namespace)
        world.drain()
    assert [s.reused for s in world.requests] == [0, 0, 64]
    assert world.told[0] == world.told[2] != world.told[1]
    world.empty()  # which looks at the roots


def test_a_cancelled_leader_hands_over() -> None:
    world = World(60)
    leader, *rest = [world.submit(prompt, 2) for prompt in group(0, members=3)]
    world.step(40)
    assert world.started == [0]
    world.end(leader)
    world.step(40)
    assert world.started == [0, 1]
    assert rest[0].reused == 32
    world.drain()
    assert rest[1].reused == 96


def test_why_a_prefix_was_not_there() -> None:
    world = World(12)
    first = world.submit([1] * 70, 1)
    world.drain()
    short = world.submit([1] * 32, 1)
    waits = world.submit([1] * 70, 1)
    world.trim(12)
    world.drain()
    assert (first.miss, short.miss, waits.miss) == ("new", "short", "evicted")
    assert waits.shareable == 64
    world.resize(1)  # of the same band
    larger, exact = world.submit([1] * 70, 1), world.submit([1] * 71, 1, exact=True)
    world.drain()
    assert (larger.reused, larger.miss, exact.reused, exact.miss) == (64, "", 0, "size")
    world.resize(2)
    better = world.submit([1] * 70, 1)
    world.drain()
    assert (better.reused, better.miss) == (0, "quality")


# -- quality --------------------------------------------------------------------------------------------------------


def test_an_exact_request_reads_nothing_of_a_mixture() -> None:
    world = World(40)
    mixed = world.submit([1] * 150, 1)
    world.step(64)
    world.resize(1)  # the same band, so that others may go on from what was computed
    world.drain()
    exact, other = world.submit([1] * 150, 1, exact=True), world.submit([1] * 150, 1)
    world.drain()
    assert mixed.depth == MIXED
    assert (exact.reused, other.reused) == (0, 128)


def test_going_on_from_another_size_makes_a_mixture() -> None:
    world = World(40)
    world.submit([1] * 70, 1)
    world.drain()
    world.resize(1)
    mixed = world.submit([1] * 150, 1)
    world.drain()
    exact = world.submit([1] * 150, 1, exact=True)
    world.drain()
    assert (mixed.reused, mixed.depth, exact.reused, exact.depth) == (64, MIXED, 0, 1)


def test_a_block_above_that_became_another_is_noticed_before_an_exact_request_starts() -> None:
    world = World(40, depth=1)
    world.submit([1] * 70, 1)
    world.drain()
    world.resize(2)
    better = world.submit([1] * 33, 1)
    world.step(10)
    world.resize(1)
    world.submit([9] * 5, 40, deadline=1.0)
    exact = world.submit([1] * 70, 1, exact=True)
    world.step(most=2, fails=True)  # both blocks match, but the other one goes first
    world.resize(2)
    world.step(most=2)
    assert world.ended[better.key] == "done"
    world.resize(1)
    world.step()
    assert exact.reused == 0
    world.drain()


def test_a_better_block_takes_the_place_of_a_worse() -> None:
    world = World(40)
    old = world.submit([1] * 70, 60)
    world.step()
    world.resize(2)
    new = world.submit([1] * 70, 2)
    world.step()
    assert new.reused == 0
    assert not set(new.blocks) & set(old.blocks)
    assert [node.block for node in new.nodes] == new.blocks[:2]
    world.drain()
    assert world.submit([1] * 70, 1).path[1].band == band_of(2)


@pytest.mark.parametrize("squeeze", ["grow", "limit"])
def test_the_last_one_never_fails_for_a_second_copy_of_its_blocks(squeeze: str) -> None:
    """It reads what it computed before the model grew; its nodes hold the same at a better quality, for others."""
    world = World(12)
    s = world.submit([1] * 130, 12 * 32 - 130)
    world.step()
    world.resize(2)
    world.submit([1] * 130, 1)
    world.step()
    assert [node.block for node in s.nodes] != s.blocks[:4]
    if squeeze == "limit":
        world.end(s)
        s = world.submit([1] * 130, 62)
        world.step()
        world.limit(0)
    world.drain()
    world.empty()


# -- order ----------------------------------------------------------------------------------------------------------


def test_first_come_first_served_without_any_policy() -> None:
    world = World(100, Policy(False, False, False))
    for number in (0, 1, 0, 2, 1):
        world.submit([number] * 70, 2)
    for _ in range(30):
        world.step(50, most=1)
    assert world.started == [0, 1, 2, 3, 4]


def test_longest_prefix_first() -> None:
    world = World(100)
    world.submit([1] * 100, 1)
    world.drain()
    for prompt in ([2] * 100, [1] * 64 + [3] * 36, [1] * 100):
        world.submit(prompt, 1)
    world.drain(most=1)
    assert world.started == [0, 3, 2, 1]


def test_nobody_is_overtaken_more_often_than_that() -> None:
    """A stream of requests with long prefixes cannot starve a cold one: exactly so many groups go before it."""
    world = World(100)
    world.submit([1] * 100, 1)
    world.drain()
    world.submit([1] * 100, 1)
    cold = world.submit([2] * 100, 1)
    world.submit([1] * 100, 1)
    while cold.key not in world.started:
        world.submit([1] * 100, 1)
        world.step(most=1)
    assert cold.overtaken == OVERTAKEN_MOST * SIBLINGS
    assert sum(key > cold.key for key in world.started) == OVERTAKEN_MOST * SIBLINGS
    world.drain(most=1)


def test_a_gated_sibling_is_not_overtaken_more_often_either() -> None:
    world = World(400, checked=False)
    world.submit([1] * 3200, 1)
    gated = world.submit([1] * 3200, 1)
    for number in range(2, 60):
        world.submit([number], 1)
    while gated.key not in world.started:
        world.step(33)
    assert gated.overtaken == OVERTAKEN_MOST * SIBLINGS
    world.drain()


def test_higher_priorities_first_and_they_do_not_count_as_overtaking() -> None:
    world = World(100)
    low = world.submit([1] * 10, 1)
    for _ in range(20):
        world.submit([2] * 10, 1, priority=1)
    world.drain(most=1)
    assert world.started == [*range(1, 21), 0]
    assert low.overtaken == 0


def test_a_higher_priority_takes_a_running_ones_place_but_not_the_oldests() -> None:
    world = World(100)
    oldest, young = world.submit([1] * 40, 40), world.submit([2] * 40, 40)
    world.step(most=2)
    high, second = (world.submit([3 + at] * 40, 5, priority=1) for at in (0, 1))
    world.step(most=2)
    assert world.scheduler.running == [oldest, high]
    assert (oldest.preemptions, young.preemptions) == (0, 1)
    world.drain(most=2)
    assert world.started == [0, 1, high.key, second.key, 1]
    assert second.preemptions == high.preemptions == 0
    assert tuple(world.told[1]) == alone((2,) * 40, 40)


def test_a_higher_priority_takes_blocks_only_if_that_helps() -> None:
    world = World(12)
    oldest = world.submit([1] * 200, 50)
    young = world.submit([2] * 40, 40)
    world.step()
    world.submit([3] * 300, 20, priority=1)
    world.step()
    assert world.scheduler.running == [oldest, young]
    world.drain()


def test_a_higher_priority_gets_the_blocks_of_those_that_yield() -> None:
    """Their prompts wait then, but what they want is no reason to let it wait too."""
    world = World(12)
    oldest = world.submit([1] * 40, 60)
    young = world.submit([2] * 200, 10)
    world.step()
    high = world.submit([3] * 250, 5, priority=1)
    world.step()
    assert world.scheduler.running == [oldest, high]
    assert young.preemptions == 1
    world.drain()


def test_clients_take_turns() -> None:
    world = World(100)
    for at in range(8):
        world.submit([at] * 10, 30, owner=1)
    for at in range(3):
        world.submit([50 + at] * 10, 30, owner=2)
    world.step(most=4)
    assert sorted(s.owner for s in world.scheduler.running) == [1, 1, 2, 2]


def test_earlier_deadlines_first_and_passed_ones_are_listed() -> None:
    world = World(100)
    late, soon, never = (world.submit([at], 20, deadline=when) for at, when in enumerate((9.0, 5.0, math.inf)))
    world.step(most=1)
    assert world.started == [soon.key]
    assert world.scheduler.expired(4.9) == []
    assert world.scheduler.expired(5.0) == [soon]
    assert world.scheduler.expired(1e9) == [soon, late]
    world.end(soon)
    world.end(late)
    assert world.scheduler.expired(math.inf) == []
    world.drain()
    assert world.ended[never.key] == "done"


def test_a_thousand_that_wait_are_not_all_looked_at_for_each_that_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    world, looks, usable = World(400, checked=False), Counter[int](), Waiting._usable

    def count(waiting: Waiting, node: Node, sequence: Sequence) -> bool:
        looks[sequence.key] += 1
        return usable(waiting, node, sequence)

    monkeypatch.setattr(Waiting, "_usable", count)
    for at in range(1000):
        world.submit([at] * 40, 2)
    assert len(world.scheduler.admit()) == MAX_SEQUENCES
    assert sum(looks.values()) <= 2 * 1000
    looks.clear()
    world.end(world.scheduler.running[0])
    assert len(world.scheduler.admit()) == 1
    assert not looks


# -- memory ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_held_is_refused_with_numbers() -> None:
    world = World(12)
    with pytest.raises(PromptTooLong, match=r"385 tokens take 13 blocks .*; there are 12: .*--kv-limit"):
        world.submit([1] * 384, 1)
    world.limit(6)
    with pytest.raises(OutOfMemory, match=r"200 tokens take 7 blocks .*; memory is short .* are 6 now;"):
        world.submit([1] * 199, 1)
    world.limit(12)
    world.submit([1] * 96, samples=False)
    world.drain()
    with pytest.raises(PromptTooLong, match=r"320 tokens take 10 .*, of which pins keep 3: ask for fewer, unpin s"):
        world.submit([1] * 319, 1)
    world.submit([1] * 287, 1)
    with pytest.raises(OutOfMemory, match=r"1 blocks .* more cannot be pinned: 3 of 12 are"):
        other = world.submit([2] * 32, samples=False)
        while other.pending:
            world.scheduler.admit()
            world.scheduler.complete(world.scheduler.plan(1000))
        world.scheduler.pin(other.nodes)


def test_a_limit_below_what_is_pinned() -> None:
    """Pins stay; of what runs one goes on beside them, what waits does later, and what comes is told why not."""
    world = World(20)
    world.submit([1] * 160, samples=False)
    world.drain()
    running = [world.submit([at] * 170, 40) for at in (2, 3)]
    world.step()
    waiting = world.submit([4] * 40, 20)
    world.limit(3)
    assert world.scheduler.running == running[:1]
    assert world.memory.held <= 5 + blocks_for(210)
    assert world.scheduler.prefixes.pinned == 5
    with pytest.raises(OutOfMemory, match=r"40 tokens take 2 .*: pins keep 5, and no more than 3 are .* or unpin some"):
        world.submit([5] * 39, 1)
    world.limit(6)
    with pytest.raises(OutOfMemory, match=r"40 tokens take 2 .* there are 6 now, of which pins keep 5; .* or unpin"):
        world.submit([5] * 39, 1)
    world.submit([5] * 31, 1)
    world.unpin(0)
    world.limit(3)
    world.submit([5] * 39, 1)
    world.drain()
    assert world.ended[waiting.key] == "done"
    world.empty()


def test_a_full_queue_is_said_so() -> None:
    world = World(8, checked=False)
    for _ in range(MAX_WAITING):
        world.submit([1], 1)
    with pytest.raises(TooBusy, match=str(MAX_WAITING)):
        world.submit([1], 1)
    assert len(world.scheduler.waiting) == MAX_WAITING


def test_no_more_sequences_run_than_attention_was_made_for() -> None:
    world = World(100)
    for key in range(MAX_SEQUENCES + 3):
        world.submit([key], 2)
    assert len(world.scheduler.admit(1000)) == MAX_SEQUENCES
    assert world.scheduler.admit(1000) == []


def test_a_quarter_of_the_memory_amid_sixteen_streams() -> None:
    """All the answers are as if nothing had been, none is lost, and the least room is held at once."""
    world = World(48)
    prompts = [prompt_of([at % 2, at // 2 % 2], 10 + at) for at in range(16)]
    for prompt in prompts:
        world.submit(prompt, 60)
    for _ in range(10):
        world.step(200)
    assert len(world.scheduler.running) == 16
    world.limit(12)
    assert world.memory.held <= 12
    assert 1 <= len(world.scheduler.running) < 16
    world.drain(200)
    assert [tuple(world.told[s.key]) for s in world.requests] == [alone(tuple(prompt), 60) for prompt in prompts]
    assert max(s.preemptions for s in world.requests) <= 6


def test_under_tight_memory_nobody_is_sent_back_and_forth() -> None:
    """Room for two and a half: one that gives up its place comes back only to stay for about a block's tokens."""
    world = World(25, checked=False)
    for at in range(12):
        world.submit([at] * 40, 280)
    world.drain(64)
    assert max(s.preemptions for s in world.requests) <= 280 // 32
    assert world.scheduler.totals.computed <= 2 * 12 * 320
    world.empty()


@pytest.mark.parametrize("limit", [1, 2, 5])
@pytest.mark.parametrize("policy", POLICIES)
def test_everything_ends_however_small_the_steps(limit: int, policy: Policy) -> None:
    world = World(8, policy, checked=False)
    for at in range(10):
        world.submit(prompt_of([at % 2, 0], 1 + at), 20, priority=at % 3, owner=at % 2)
    tokens = sum(s.limit for s in world.requests)
    assert world.drain(limit) <= 2 * tokens
    world.empty()


def test_a_large_request_is_not_passed_by_small_ones_for_ever() -> None:
    world = World(12)
    world.submit([1] * 32, 60)
    world.step()
    large = world.submit([2] * 300, 5)
    while large.key not in world.started:
        world.submit([3], 30)
        world.step()
        assert len(world.requests) < 400
    assert large.overtaken <= OVERTAKEN_MOST * SIBLINGS
    world.drain()


def test_a_sequence_starts_only_with_room_for_what_it_will_soon_write() -> None:
    scheduler = Scheduler(Memory(8))
    scheduler.submit(Sequence(0, [1] * 160, 200))
    scheduler.submit(Sequence(1, [2] * 32, 32 + AHEAD_TOKENS))
    assert [s.key for s in scheduler.admit()] == [0]  # 5 blocks, and 1 to grow; the other needs 3
    scheduler.finish(scheduler.running[0])
    assert [s.key for s in scheduler.admit()] == [1]


def test_a_failed_step_leaves_no_trace() -> None:
    world = World(40)
    s = world.submit([1] * 100, 10)
    for _ in range(3):
        world.step(40)
        before = (s.computed, list(s.blocks), list(s.nodes), list(s.tokens), world.scheduler.totals.computed)
        world.step(40, fails=True)
        assert before == (s.computed, s.blocks, s.nodes, s.tokens, world.scheduler.totals.computed)
    world.drain(40)
    assert tuple(world.told[s.key]) == alone((1,) * 100, 10)


def test_what_is_kept_of_finished_ones_has_a_limit() -> None:
    for cached in (0, 3, 40):
        world = World(40, cached=cached)
        world.submit([1] * 200, 1)
        world.drain()
        assert world.memory.held == min(cached, 6)


@pytest.mark.parametrize("spares", [True, False])
def test_what_waiting_ones_will_read_goes_last(spares: bool) -> None:
    world = World(12, Policy(wanted=spares))
    for number in (1, 2):
        world.submit([number] * 65, 1)
        world.drain()
    blocker = world.submit([3] * 33, 200)
    world.step(most=1)
    world.submit([1] * 70, 1)  # though 1 was used longest ago
    world.trim(2)
    world.end(blocker)
    world.drain()
    assert world.requests[-1].reused == (64 if spares else 0)


def test_reused_and_computed_make_the_prompt() -> None:
    world = World(100)
    for at in range(20):
        s = world.submit(prompt_of([at % 2, at // 2 % 2, at // 4 % 2], 1 + at % 3), 1)
        before = world.scheduler.totals.computed
        world.drain(50)
        assert s.reused is not None
        assert s.reused + world.scheduler.totals.computed - before == s.prompt_tokens == len(world.prompts[s.key])
    totals = world.scheduler.totals
    assert totals.reused + totals.computed == totals.prompt


def test_finishing_twice_is_finishing_once() -> None:
    world = World(40)
    running, waiting = world.submit([1] * 40, 5), world.submit([2] * 40, 5)
    world.step(most=1)
    for s in (running, running, waiting, waiting):
        world.scheduler.finish(s)
        world.scheduler.check_integrity()
    assert not world.scheduler.busy
    assert world.memory.held == 1


# -- steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 17])
def test_a_long_prompt_does_not_stop_the_others_nor_they_it(limit: int) -> None:
    world = World(60)
    writers = [world.submit([key], 60) for key in range(4)]
    while any(s.pending > 1 for s in writers) or len(world.started) < 4:
        world.step(limit)
    reader = world.submit([9] * 200, 5)
    before = [len(s.tokens) for s in writers]
    for _ in range(20):
        world.step(limit)
    assert [len(s.tokens) - b for s, b in zip(writers, before, strict=True)] == [20] * 4
    assert reader.computed >= min(200, 20 * max(limit - 4, limit // 4, 1))


def test_those_that_share_blocks_are_neighbours() -> None:
    world = World(100)
    for at in range(12):
        world.submit([at % 3] * 64 + [at], 20)
    for _ in range(3):
        pieces = world.step()
    firsts = [piece.sequence.blocks[0] for piece in pieces]
    assert len(firsts) == 12
    assert sum(a != b for a, b in pairwise(firsts)) == 2


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (32, 1), (33, 2), (64, 2)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens) == blocks
