"""A world for the scheduler without a model: keys and values are hashes, written and read through the block tables.

What a position holds depends on all tokens before it, their namespace and the depths that they were computed at; the
next token is a hash of everything that the sequence reads. So a block that is stale, freed, foreign or written by two
changes some answer, or is noticed before that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from ebbflow.daemon.engine.kv import blocks_for
from ebbflow.daemon.engine.prefixes import BLOCK_TOKENS, MIXED, NO_BLOCK, Node
from ebbflow.daemon.engine.scheduler import Scheduler
from ebbflow.daemon.engine.sequences import Piece, Sequence
from ebbflow.daemon.engine.waiting import OVERTAKEN_MOST, SIBLINGS, Policy
from ebbflow.formats.errors import OutOfMemory

VOCAB = 50


def band_of(depth: int) -> int:
    """Two depths make one band."""
    return depth // 2


class Slot(NamedTuple):
    """One position: a hash of the tokens so far, one of their depths too, the least band and the only depth of all."""

    plain: int
    full: int
    band: int
    depth: int


def hash_of(namespace: str) -> int:
    return hash(tuple(namespace.encode()))


@lru_cache(maxsize=4096)
def chain(before: int, start: int, tokens: tuple[int, ...]) -> int:
    """The hash of tokens at positions from `start` on, behind others."""
    for at, token in enumerate(tokens, start):
        before = hash((before, token, at))
    return before


def written(before: Slot | None, token: int, position: int, namespace: str, depth: int) -> Slot:
    """What computing a token at some depth writes behind the slot `before`."""
    plain, full = (before.plain, before.full) if before else (hash_of(namespace), 0)
    return Slot(
        hash((plain, token, position)),
        hash((full, plain, token, position, depth)),
        min(before.band, band_of(depth)) if before else band_of(depth),
        depth if before is None or before.depth == depth else MIXED,
    )


def following(slots: Ids[Slot]) -> int:
    """The token that is sampled after them."""
    return hash(tuple(slot.plain for slot in slots)) % VOCAB


class Memory:
    """KV blocks that know what was written, and forget it when they are freed; a pool for the scheduler."""

    def __init__(self, most: int) -> None:
        self.most = self.limit = most
        self.slots: dict[int, list[Slot | None]] = {}
        self._free = list(range(most))

    @property
    def held(self) -> int:
        return len(self.slots)

    @property
    def available(self) -> int:
        return self.limit - self.held

    def allocate(self, count: int) -> tuple[int, ...]:
        assert count <= max(self.available, 0)
        blocks = tuple(self._free.pop(0) for _ in range(count))
        for block in blocks:
            self.slots[block] = [None] * BLOCK_TOKENS
        return blocks

    def free(self, blocks: tuple[int, ...]) -> None:
        for block in blocks:
            del self.slots[block]
        self._free += blocks

    def read(self, blocks: list[int], position: int) -> Slot:
        slot = self.slots[blocks[position // BLOCK_TOKENS]][position % BLOCK_TOKENS]
        assert slot is not None, "read before it was written"
        return slot


def next_by_looking(scheduler: Scheduler, free: int, band: int, depth: int) -> Sequence | None:
    """Who is to be admitted next, by the rule that `waiting` gives: looks at all that wait and all their blocks."""
    policy, running = scheduler.policy, Counter(s.owner for s in scheduler.running)
    candidates, held_back = list[tuple[Any, ...]](), Counter[tuple[int, int]]()
    for s in scheduler.waiting.values():
        there = 0
        for node in s.path:
            if node.block == NO_BLOCK or (node.depth != depth if s.exact else node.band < band):
                break
            there += 1
        following = s.path[there] if there < len(s.path) else None
        waits = policy.gate and following is not None and following.leader is not None
        late = s.overtaken >= OVERTAKEN_MOST * SIBLINGS
        held_back[s.priority, s.owner] += waits
        if late or not waits:
            here = (running[s.owner], s.deadline, -there) if policy.longest_first and not late else ()
            leads = following is not None and following.wanted > 1
            candidates.append((-s.priority, not late, *here, s.arrival, s, waits, leads))
    if not candidates:
        return None
    lowest, not_late, *_, s, waits, leads = min(candidates, key=lambda c: c[:-3])
    if not not_late:
        return None if waits else s
    return None if leads and held_back[-lowest, s.owner] >= max(free, 1) else s


@dataclass
class World:
    """The engine around a scheduler: computes what is planned, samples, ends what is done, and checks all the time."""

    most: int
    policy: Policy = field(default_factory=Policy)
    cached: int | None = None
    checked: bool = True
    depth: int = 0
    requests: list[Sequence] = field(default_factory=list)  # all that were accepted, by key
    told: dict[int, list[int]] = field(default_factory=dict)
    ended: dict[int, str] = field(default_factory=dict)
    prompts: dict[int, list[int]] = field(default_factory=dict)
    started: list[int] = field(default_factory=list)
    pins: list[list[Node]] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self) -> None:
        self.memory = Memory(self.most)
        self.scheduler = Scheduler(self.memory, self.policy, self.cached)
        self._views: dict[int, list[Slot]] = {}  # what each running sequence has read or written so far
        self.scheduler.set_quality(band_of(self.depth), self.depth)
        if self.checked:
            self._check_order()

    def _check_order(self) -> None:
        """From now on whoever is next is compared with whom looking at all would find."""
        scheduler, waiting = self.scheduler, self.scheduler._waiting
        quick = waiting.next

        def following(free: int, owners: Any) -> Sequence | None:
            wanted = next_by_looking(scheduler, free, band_of(self.depth), self.depth)
            found = quick(free, owners)
            assert found is wanted, "somebody else is next"
            waiting.check_integrity()
            return found

        waiting.next = following  # type: ignore[method-assign]

    # -- what may happen --------------------------------------------------------------------------------------------

    def submit(self, prompt: Ids[int], more: int = 1, **words: Any) -> Sequence:
        """A request for `more` tokens after `prompt`; the words are `Sequence`'s. Raises what `Scheduler` raises."""
        s = Sequence(len(self.requests), list(prompt), len(prompt) + more, **words)
        if not s.samples:
            s.limit = len(prompt)
        self.scheduler.submit(s)
        self.requests.append(s)
        self.told[s.key], self.prompts[s.key] = [], list(prompt)
        self.check()
        return s

    def step(self, limit: int = 1_000_000, most: int = 32, fails: bool = False) -> list[Piece]:
        """One step; one that fails has spoilt all that it should have written."""
        self.steps += 1
        first = self._oldest()
        for s in self.scheduler.admit(most):
            self.started.append(s.key)
            self._begin(s)
        pieces = self.scheduler.plan(limit)
        self.check(first)
        assert bool(pieces) == bool(self.scheduler.running)
        assert len({piece.sequence.key for piece in pieces}) == len(pieces)
        ones = sum(piece.sequence.pending == 1 for piece in pieces)
        assert sum(piece.count for piece in pieces) <= ones + max(limit - ones, limit // 4, 1)
        for piece in pieces:
            self._compute(piece, fails)
        if fails:
            self.check(first)
            return pieces
        self.scheduler.complete(pieces)
        for piece in pieces:
            s = piece.sequence
            assert piece.samples == (s.samples and s.pending == 0)
            if piece.samples:
                token = following([self.memory.read(s.blocks, at) for at in range(s.computed)])
                s.tokens.append(token)
                self.told[s.key].append(token)
            if len(s.tokens) >= s.limit and (s.samples or not s.pending):
                if not s.samples:
                    self._pin(s)
                self.end(s, "done")
        self.check()
        return pieces

    def end(self, s: Sequence, why: str = "cancelled") -> None:
        assert s.key not in self.ended, "two terminal events"
        self.ended[s.key] = why
        self.scheduler.finish(s)
        assert self.scheduler.prefixes.evictable <= self.scheduler.cached or not self.scheduler.prefixes.unwanted

    def resize(self, depth: int) -> None:
        self.depth = depth
        self.scheduler.set_quality(band_of(depth), depth)

    def limit(self, blocks: int) -> None:
        first = self._oldest()
        self.scheduler.set_limit(blocks)
        self.check(first)

    def preempt(self, s: Sequence) -> None:
        self.scheduler.preempt(s)
        self.check()

    def trim(self, blocks: int) -> None:
        before, unused = self.memory.held, self.scheduler.prefixes.evictable
        self.scheduler.trim(blocks)
        assert before - self.memory.held == min(blocks, unused)
        self.check()

    def unpin(self, index: int) -> None:
        self.scheduler.unpin(self.pins.pop(index))
        self.check()

    def restore(self, namespace: str, tokens: Ids[int], depth: int) -> bool:
        """Pin whole blocks that were computed in an earlier life; whether there was room."""
        restored = self.scheduler.restore(namespace, list(tokens), band_of(depth), depth)
        if restored is None:
            return False
        nodes, fresh = restored
        before: Slot | None = None
        for at in range(len(nodes) * BLOCK_TOKENS):
            before = written(before, tokens[at], at, namespace, depth)
            if at // BLOCK_TOKENS in fresh:
                self.memory.slots[nodes[at // BLOCK_TOKENS].block][at % BLOCK_TOKENS] = before
        self.pins.append(nodes)
        self.check()
        return True

    def drain(self, limit: int = 1_000_000, most: int = 32) -> int:
        """Step until everything has ended; how many steps that took. Never more than tokens times what there is."""
        before = self.steps
        bound = 100 + 4 * sum(s.limit for s in self.requests if s.key not in self.ended)
        while self.scheduler.busy:
            self.step(limit, most)
            assert self.steps - before <= bound, "no end"
        for s in self.requests:
            assert s.key in self.ended
            assert len(self.told[s.key]) == s.limit - len(self.prompts[s.key]) or self.ended[s.key] == "cancelled"
        return self.steps - before

    def empty(self) -> None:
        """Cancel and unpin everything: then nothing is left but what was cached, and after a trim nothing at all."""
        for s in self.requests:
            if s.key not in self.ended:
                self.end(s)
        while self.pins:
            self.unpin(0)
        scheduler = self.scheduler
        assert not scheduler.busy
        assert self.memory.held == scheduler.prefixes.evictable <= scheduler.cached
        self.trim(self.most)
        assert not self.memory.held
        assert not list(scheduler.prefixes.nodes())
        assert not scheduler.prefixes._roots
        assert self.memory.limit == scheduler._asked

    # -- what must be so --------------------------------------------------------------------------------------------

    def check(self, oldest: Sequence | None = None) -> None:
        """`oldest` ran before: it still does, if no older one came back."""
        if not self.checked:
            return
        scheduler, memory = self.scheduler, self.memory
        scheduler.check_integrity()
        assert memory.held <= memory.limit <= memory.most
        needs = [blocks_for(s.limit) for s in self.requests if s.key not in self.ended]
        assert memory.limit <= max(scheduler._asked, scheduler.prefixes.pinned + max(needs, default=0))
        assert oldest is None or min(s.arrival for s in scheduler.running) <= oldest.arrival
        assert all(s.overtaken < (OVERTAKEN_MOST + 1) * SIBLINGS for s in scheduler.waiting.values())
        for s in scheduler.running:
            slots = [slot for block in s.blocks for slot in memory.slots[block]]
            assert slots[: s.computed] == self._views[s.key][: s.computed], "what it reads changed"
        seen = set[int]()
        for namespace, root in scheduler.prefixes._roots.items():
            below = [(child, hash_of(namespace), 0) for child in root.children.values()]
            while below:
                node, before, start = below.pop()
                plain = chain(before, start, node.tokens)
                if node.block != NO_BLOCK:
                    last = memory.slots[node.block][-1]
                    assert last is not None
                    assert last.plain == plain, "a node's block holds other tokens"
                    assert node.band <= last.band, "worse than it says"
                    assert node.depth in (last.depth, MIXED), "of another size than it says"
                    assert node.block not in seen
                    seen.add(node.block)
                below += [(child, plain, start + BLOCK_TOKENS) for child in node.children.values()]

    def _oldest(self) -> Sequence | None:
        return min(self.scheduler.running, key=lambda s: s.arrival, default=None)

    def _begin(self, s: Sequence) -> None:
        """It starts, or goes on after it had given its place up, from what others have computed."""
        assert s.computed == BLOCK_TOKENS * len(s.nodes) < len(s.tokens)
        view = self._views[s.key] = [self.memory.read(s.blocks, at) for at in range(s.computed)]
        before: Slot | None = None
        for at, slot in enumerate(view):
            before = written(before, s.tokens[at], at, s.namespace, self.depth)
            assert slot.plain == before.plain
            assert slot.band >= band_of(self.depth) or s.exact
            assert slot == before or not s.exact, "not exact"

    def _compute(self, piece: Piece, spoils: bool) -> None:
        s, slots = piece.sequence, self.memory.slots
        assert s in self.scheduler.running
        assert piece.count >= 1
        assert piece.start == s.computed
        view = self._views[s.key]
        del view[piece.start :]
        published = {node.block for node in self.scheduler.prefixes.nodes()} if self.checked else set()
        for at in range(piece.start, piece.start + piece.count):
            block = s.blocks[at // BLOCK_TOKENS]
            if self.checked and (at == piece.start or not at % BLOCK_TOKENS):
                assert block not in published, "written after it was published"
                assert sum(block in other.blocks for other in self.scheduler.running) == 1
            before = self.memory.read(s.blocks, at - 1) if at and not spoils else None
            slot = written(before, s.tokens[at], at, s.namespace, self.depth)
            slots[block][at % BLOCK_TOKENS] = None if spoils else slot
            view.append(slot)

    def _pin(self, s: Sequence) -> None:
        try:
            self.scheduler.pin(s.nodes)
        except OutOfMemory:
            return
        self.pins.append(s.nodes)


@lru_cache(maxsize=4096)
def alone(prompt: tuple[int, ...], more: int, namespace: str = "") -> tuple[int, ...]:
    """The answer that a request gets when there is no other."""
    world = World(blocks_for(len(prompt) + more), checked=False)
    s = world.submit(prompt, more, namespace=namespace)
    world.drain()
    return tuple(world.told[s.key])


def prompt_of(path: Ids[int], tail: int) -> list[int]:
    """One prompt of a small tree, whose branches are 64, 32, 40 and 32 tokens long, and `tail` tokens of its own."""
    tokens: list[int] = []
    for level, (branch, length) in enumerate(zip(path, (64, 32, 40, 32), strict=False)):
        tokens += [(7 * level + 3 * branch + at) % VOCAB for at in range(length)]
    return tokens + [(tail + at) % VOCAB for at in range(tail)]
