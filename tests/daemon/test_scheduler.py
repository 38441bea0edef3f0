"""The scheduler against any sequence of submissions, cancellations and step sizes; no model anywhere."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.daemon.engine.kv import MAX_SEQUENCES, blocks_for
from ebbflow.daemon.engine.scheduler import MAX_WAITING, Piece, Scheduler, Sequence
from ebbflow.formats.errors import TooBusy

CAPACITY = 12
LONGEST = CAPACITY * 32


@dataclass
class Pool:
    """KV blocks as numbers; refuses to give what it does not have, or to take what it did not give."""

    free_blocks: list[int] = field(default_factory=lambda: list(range(CAPACITY)))
    held: set[int] = field(default_factory=set)

    @property
    def available(self) -> int:
        return len(self.free_blocks)

    def allocate(self, count: int) -> tuple[int, ...]:
        blocks = tuple(self.free_blocks.pop() for _ in range(count))
        self.held |= set(blocks)
        return blocks

    def free(self, blocks: tuple[int, ...]) -> None:
        assert set(blocks) <= self.held
        self.held -= set(blocks)
        self.free_blocks += blocks


@dataclass
class World:
    """An engine without a network: computes what is planned, samples zeros, checks everything in between."""

    scheduler: Scheduler = field(default_factory=lambda: Scheduler(Pool()))
    passed_over: dict[int, int] = field(default_factory=dict)
    started: list[int] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)

    def step(self, limit: int) -> list[Piece]:
        self.started += [sequence.key for sequence in self.scheduler.admit()]
        running = list(self.scheduler.running)
        pieces = self.scheduler.plan(limit)
        assert sum(piece.count for piece in pieces) <= limit
        assert bool(pieces) == bool(running)
        assert len({id(piece.sequence) for piece in pieces}) == len(pieces)
        for sequence in running:
            self.passed_over[sequence.key] = self.passed_over.get(sequence.key, 0) + 1
        for piece in pieces:
            self.compute(piece)
        self.check()
        return pieces

    def compute(self, piece: Piece) -> None:
        sequence = piece.sequence
        assert sequence in self.scheduler.running
        assert piece.count >= 1
        assert piece.start == sequence.computed  # once, and in order
        assert piece.start + piece.count <= len(sequence.tokens) <= len(sequence.blocks) * 32
        sequence.computed += piece.count
        self.passed_over[sequence.key] = 0
        assert piece.samples == (sequence.pending == 0)
        if piece.samples:
            sequence.tokens.append(0)
            if len(sequence.tokens) >= sequence.limit:
                self.scheduler.finish(sequence)
                self.finished.append(sequence.key)

    def check(self) -> None:
        scheduler = self.scheduler
        scheduler.check_integrity()
        assert isinstance(scheduler.pool, Pool)
        assert scheduler.pool.held == {block for s in scheduler.running for block in s.blocks}
        assert len(scheduler.running) <= MAX_SEQUENCES
        # a prompt may be long, a round is not: everything running is served once in so many steps
        assert all(self.passed_over.get(s.key, 0) <= 2 * MAX_SEQUENCES for s in scheduler.running)


requests = st.tuples(st.integers(1, LONGEST - 1), st.integers(1, 40))  # prompt, tokens to generate
limits = st.one_of(st.integers(1, 4), st.integers(1, 512))
actions = st.one_of(
    st.tuples(st.just("submit"), requests),
    st.tuples(st.just("step"), limits),
    st.tuples(st.just("cancel"), st.integers(0, 40)),
)


def new(key: int, prompt: int, more: int) -> Sequence:
    return Sequence(key, [0] * prompt, min(LONGEST, prompt + more))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(actions, max_size=60), st.integers(1, 64))
def test_whatever_happens(script: list[tuple[str, object]], last_limit: int) -> None:
    world, sequences, cancelled = World(), [], set()
    for what, value in script:
        match what, value:
            case "submit", (int(prompt), int(more)):
                sequences.append(new(len(sequences), prompt, more))
                world.scheduler.submit(sequences[-1])
            case "step", int(limit):
                world.step(limit)
            case "cancel", int(index) if index < len(sequences):
                world.scheduler.finish(sequences[index])
                cancelled.add(index)
                world.check()
    for _ in range(60_000):
        if not world.scheduler.busy:
            break
        world.step(last_limit)
    assert not world.scheduler.busy
    assert {s.key for s in sequences} == set(world.finished) | cancelled
    assert world.started == sorted(world.started)  # first come, first served
    assert isinstance(world.scheduler.pool, Pool)
    assert not world.scheduler.pool.held
    for sequence in sequences:
        assert sequence.key in cancelled or len(sequence.tokens) == sequence.limit


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 17])
def test_a_long_prompt_does_not_stop_the_others(limit: int) -> None:
    world = World()
    writers = [new(key, 1, 30) for key in range(4)]
    for sequence in writers:
        world.scheduler.submit(sequence)
    while any(s.pending > 1 for s in writers) or not world.started:
        world.step(limit)
    reader = new(4, 200, 5)
    world.scheduler.submit(reader)
    before = [len(s.tokens) for s in writers]
    for _ in range(20):
        world.step(limit)
    gained = [len(s.tokens) - b for s, b in zip(writers, before, strict=True)]
    assert min(gained) >= 20 * min(limit, 4) // 5 // 2
    assert reader.computed >= min(200, 20 * limit // 10)


def test_decodes_and_a_prompt_share_a_step() -> None:
    world = World()
    for key in range(3):
        world.scheduler.submit(new(key, 1, 10))
    world.step(64)
    world.scheduler.submit(new(3, 100, 5))
    pieces = world.step(64)
    assert sorted((piece.sequence.key, piece.count) for piece in pieces) == [(0, 1), (1, 1), (2, 1), (3, 61)]


def test_a_request_waits_for_room_and_starts_when_there_is() -> None:
    world = World()
    world.scheduler.submit(new(0, 10 * 32 - 5, 5))
    world.scheduler.submit(new(1, 3 * 32, 1))
    world.step(1000)
    assert world.started == [0]
    while world.scheduler.busy:
        world.step(1000)
    assert world.started == [0, 1]


def test_cancelling_what_waits_lets_the_next_one_start() -> None:
    world = World()
    large, small = new(1, 11 * 32, 1), new(2, 1, 5)
    world.scheduler.submit(new(0, 32, 20))
    world.step(100)
    world.scheduler.submit(large)
    world.scheduler.submit(small)
    world.step(100)
    assert world.started == [0]
    world.scheduler.finish(large)
    world.step(100)
    assert world.started == [0, 2]


def test_finishing_twice_frees_once() -> None:
    world = World()
    sequence = new(0, 40, 5)
    world.scheduler.submit(sequence)
    world.step(100)
    world.scheduler.finish(sequence)
    world.scheduler.finish(sequence)
    assert isinstance(world.scheduler.pool, Pool)
    assert sorted(world.scheduler.pool.free_blocks) == list(range(CAPACITY))


def test_a_full_queue_is_said_so() -> None:
    scheduler = Scheduler(Pool())
    for key in range(MAX_WAITING):
        scheduler.submit(new(key, 1, 1))
    with pytest.raises(TooBusy, match=str(MAX_WAITING)):
        scheduler.submit(new(MAX_WAITING, 1, 1))
    assert len(scheduler.waiting) == MAX_WAITING


def test_no_more_sequences_run_than_attention_was_made_for() -> None:
    scheduler = Scheduler(Pool(free_blocks=list(range(100))))
    for key in range(MAX_SEQUENCES + 3):
        scheduler.submit(new(key, 1, 1))
    assert len(scheduler.admit()) == MAX_SEQUENCES
    assert scheduler.admit() == []


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (32, 1), (33, 2), (64, 2)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens) == blocks
