"""Which tokens the next step computes, and whose keys and values are kept for whom. Pure: no clock, arrays or sockets.

Who of those that wait is next is said in `waiting`.

A sequence gets blocks for its prompt when it is admitted, one by one afterwards. If there are none, first what nobody
uses or waits for is evicted, then what only waiting ones want, and then the youngest running sequence gives up its
place: it goes on later, from what is left of its blocks. The oldest never does, so everything that was accepted ends.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from typing import Final, Protocol

from ...formats.errors import OutOfMemory, PromptTooLong, TooBusy
from ...kernels.attention import BLOCK_TOKENS
from .kv import MAX_SEQUENCES, blocks_for
from .prefixes import MIXED, Blocks, Node, Prefixes
from .sequences import Piece, Sequence
from .waiting import Policy, Waiting

MAX_WAITING: Final = 4096
AHEAD_TOKENS: Final = 64  # of its answer, for which a sequence must find room before it starts
SPOILT: Final = -1  # a band below all others
_SHARE: Final = 4  # prompts get at least one of so many parts of a step, however many sequences decode


class Pool(Blocks, Protocol):
    """KV blocks, of which at most `limit` shall be held: what `most` says, or less for a while."""

    limit: int

    @property
    def most(self) -> int:
        """The limit that the settings give."""
        ...

    @property
    def held(self) -> int:
        """Blocks that are allocated."""
        ...


@dataclass
class Totals:
    """Tokens so far: of prompts that began, those of them that were there already, and all that were computed."""

    prompt: int = 0
    reused: int = 0
    computed: int = 0
    preemptions: int = 0


class Scheduler:
    """Waiting and running sequences over one pool of KV blocks; at most `cached` blocks of no running one are kept."""

    def __init__(self, pool: Pool, policy: Policy | None = None, cached: int | None = None) -> None:
        self.pool = pool
        self.policy = policy or Policy()
        self.cached = pool.most if cached is None else cached
        self.prefixes = Prefixes(pool, spares=self.policy.wanted)
        self._waiting = Waiting(self.prefixes, self.policy)
        self.totals = Totals()
        self.running: list[Sequence] = []
        self._arrivals = count()
        self._asked = pool.most
        self._band, self._depth = 0, 0
        self._owners: Counter[int] = Counter()  # of what runs
        self._needs: Counter[int] = Counter()  # blocks that accepted sequences may need at most
        self._timed = 0  # sequences that have a deadline
        self._ordered = True
        self._stops = 0  # so many that ran do no more
        self._stuck: tuple[int, int, int, int, int] | None = None  # how things were when nothing could be admitted

    @property
    def waiting(self) -> dict[int, Sequence]:
        """Those that wait, by arrival."""
        return self._waiting.sequences

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self.waiting or self.running)

    # -- what the world wants ---------------------------------------------------------------------------------------

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises `TooBusy` when the queue is full, `PromptTooLong` for what can never be held, `OutOfMemory` for what
        cannot be held within the present limit.
        """
        if len(self.waiting) >= MAX_WAITING:
            raise TooBusy(f"{MAX_WAITING} requests are waiting already; try again later")
        self._check_need(sequence)
        sequence.arrival = next(self._arrivals)
        sequence.prompt_tokens = len(sequence.tokens)
        self._needs[blocks_for(sequence.limit)] += 1
        self._timed += sequence.deadline < math.inf
        sequence.shareable = BLOCK_TOKENS * self._waiting.add(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, waiting or running; its whole blocks stay for others while there is room."""
        if sequence in self.running:
            self._stop(sequence)
        elif self.waiting.get(sequence.arrival) is sequence:
            self._waiting.remove(sequence)
        else:
            return
        self._timed -= sequence.deadline < math.inf
        need = blocks_for(sequence.limit)
        self._needs[need] -= 1
        if not self._needs[need]:
            del self._needs[need]
        self._settle()

    def spoil(self, sequence: Sequence) -> None:
        """What a running sequence computed alone, from the end of it, is of no use: nobody shall begin with it."""
        below: Node | None = None
        for node in reversed(sequence.nodes[sequence.matched :]):
            if node.users > 1 or node.pins or node.filled > (below is not None):
                break
            node.band, node.depth, below = SPOILT, MIXED, node
        self.prefixes.news += 1

    def expired(self, now: float) -> list[Sequence]:
        """Sequences whose deadline has passed."""
        if not self._timed:
            return []
        return [s for group in (self.running, self.waiting.values()) for s in group if s.deadline <= now]

    def set_quality(self, band: int, depth: int) -> None:
        """What the model is from the next step on: a quality, the higher the better, and an exact size."""
        if (band, depth) != (self._band, self._depth):
            self._band, self._depth = band, depth
            self._waiting.set_quality(band, depth)

    def set_limit(self, blocks: int) -> None:
        """Hold at most so many blocks from now on, though never fewer than one accepted sequence may need."""
        self._asked = min(blocks, self.pool.most)
        self._settle()

    def trim(self, blocks: int) -> None:
        """Give back up to so many blocks that nobody uses."""
        self.prefixes.evict(blocks)

    def pin(self, nodes: list[Node]) -> None:
        """Keep the blocks of a computed prefix. Raises `OutOfMemory` if too little would be left for what runs."""
        more = sum(not node.pins for node in nodes)
        if self._least() + more > self.pool.most:
            raise OutOfMemory(
                f"{more} blocks of keys and values more cannot be pinned: {self.prefixes.pinned} of {self.pool.most} "
                "are, and requests need the rest; raise the daemon's --kv-limit, or unpin something"
            )
        self.prefixes.pin(nodes)
        self._settle()

    def unpin(self, nodes: list[Node]) -> None:
        """Let them go."""
        self.prefixes.pin(nodes, -1)
        self._settle()

    def restore(self, namespace: str, tokens: list[int], band: int, depth: int) -> tuple[list[Node], list[int]] | None:
        """Pinned nodes for `tokens` computed in an earlier life, and for which of them to write the block.

        None: there is no room.
        """
        need = len(tokens) // BLOCK_TOKENS
        if self._least() + need > self._asked or not self.prefixes.make_room(need, spare_wanted=False):
            return None
        nodes, fresh = self.prefixes.restore(namespace, tokens, self.prefixes.allocate(need), band, depth)
        self.pin(nodes)
        return nodes, fresh

    # -- one step ---------------------------------------------------------------------------------------------------

    def admit(self, most: int = MAX_SEQUENCES) -> list[Sequence]:
        """Start waiting sequences while there is room, so that at most `most` (>= 1) run; returns those started."""
        started: list[Sequence] = []
        most = max(1, min(most, MAX_SEQUENCES))
        while self.waiting and not self._still_stuck(most):
            sequence = self._next(most)
            if sequence is None or not self._find_room(sequence, most):
                self._stuck = self._state(most)
                break
            self._start(sequence)
            started.append(sequence)
        return [sequence for sequence in started if sequence in self.running]

    def plan(self, limit: int) -> list[Piece]:
        """The next step's pieces: one token of all that decode, and prompts in what is left of `limit` (>= 1) tokens.

        Sequences that share blocks are neighbours, which attention wants.
        """
        full = [s for s in self.running if s.computed >= len(s.blocks) * BLOCK_TOKENS]
        for sequence in sorted(full, key=lambda s: s.arrival):
            if sequence in self.running:
                self._grow(sequence)
        self._order()
        reading = [s for s in self.running if len(s.tokens) - s.computed > 1]
        left = max(limit - len(self.running) + len(reading), limit // _SHARE, 1)
        sizes: dict[int, int] = {}
        for sequence in sorted(reading, key=lambda s: (-s.priority, s.arrival)):
            sizes[sequence.arrival] = size = min(left, sequence.pending)
            left -= size
        pieces = [Piece(s, s.computed, sizes.get(s.arrival, 1)) for s in self.running]
        return [piece for piece in pieces if piece.count] if reading else pieces

    def complete(self, pieces: Iterable[Piece]) -> None:
        """The step was computed; until this is said, it was not. Whole blocks are everybody's from now on."""
        band, depth = self._band, self._depth
        for piece in pieces:
            s = piece.sequence
            if not s.computed:
                s.band, s.depth = band, depth
            elif (s.band, s.depth) != (band, depth):
                s.band, s.depth = min(s.band, band), depth if s.depth == depth else MIXED
            s.computed = piece.start + piece.count
            self.totals.computed += piece.count
            if s.computed >= (len(s.nodes) + 1) * BLOCK_TOKENS:
                self._publish(s)

    def _publish(self, s: Sequence) -> None:
        for index in range(len(s.nodes), s.computed // BLOCK_TOKENS):
            parent = s.nodes[-1] if s.nodes else None
            node, s.blocks[index] = self.prefixes.publish(
                parent, s.namespace, s.tokens, index * BLOCK_TOKENS, s.blocks[index], s.band, s.depth
            )
            self.prefixes.unlead([node], s)
            s.nodes.append(node)

    # -- admission --------------------------------------------------------------------------------------------------

    def _check_need(self, sequence: Sequence) -> None:
        need, pinned, now = blocks_for(sequence.limit), self.prefixes.pinned, self._asked
        wanted = f"{sequence.limit} tokens take {need} blocks of keys and values"
        kept = f", of which pins keep {pinned}" if pinned else ""
        if need > self.pool.most - pinned:
            less = "ask for fewer, unpin something," if pinned else "ask for fewer,"
            raise PromptTooLong(f"{wanted}; there are {self.pool.most}{kept}: {less} or raise the daemon's --kv-limit")
        if need > now - pinned:
            there = f"memory is short and there are {now} now{kept}"
            if pinned > now:  # what is pinned stays, whatever the limit
                there = f"memory is short: pins keep {pinned}, and no more than {now} are to be held now"
            later = "try again later, or unpin something" if pinned else "try again later"
            raise OutOfMemory(f"{wanted}; {there}; {later}")

    def _state(self, most: int) -> tuple[int, int, int, int, int]:
        """What decides whether something can be admitted."""
        room = self.prefixes.room(spare_wanted=self.policy.wanted)
        return most, self._waiting.changes, self._stops, self.prefixes.news, room

    def _still_stuck(self, most: int) -> bool:
        """Whether nothing has happened since admission failed; looking at all that wait would take long."""
        if self._stuck is None or not self.running:
            return False
        *before, room_before = self._stuck
        *now, room = self._state(most)
        return now == before and room <= room_before

    def _next(self, most: int) -> Sequence | None:
        """Who is to be admitted next, if somebody is who can have a place."""
        free = most - len(self.running)
        if free <= 0 and self._waiting.highest <= min(s.priority for s in self.running):
            return None
        return self._waiting.next(free, self._owners)

    def _find_room(self, sequence: Sequence, most: int) -> bool:
        """A place and blocks for a sequence, if need be those of running ones of a lower priority."""
        matched = sequence.path[: sequence.matched]
        self.prefixes.lock(matched)
        need = blocks_for(min(sequence.limit, len(sequence.tokens) + AHEAD_TOKENS)) - len(matched)
        found = len(self.running) < most and self._make_room(need)
        if not found and self._yielding_helps(sequence, need, most):
            while not found and self._yield_place(sequence):
                # what those that yielded want goes too, or they would have yielded nothing
                enough = need + len(self.running)
                found = len(self.running) < most and self.prefixes.make_room(enough, spare_wanted=False)
        if not found:
            self._drop(matched, [node.block for node in matched])
        return found

    def _make_room(self, need: int) -> bool:
        """Evict for a sequence that begins, and for one block more of each that runs, lest it be sent back at once.

        What waiting ones want goes only if nothing runs, for then nothing else helps.
        """
        spare_wanted = self.policy.wanted and bool(self.running)
        return self.prefixes.make_room(need + len(self.running), spare_wanted=spare_wanted)

    def _yielding_helps(self, sequence: Sequence, need: int, most: int) -> bool:
        """Whether there is room once all of a lower priority have given up their places."""
        oldest = min(self.running, key=lambda s: s.arrival, default=None)
        stay = [s for s in self.running if s is oldest or s.priority >= sequence.priority]
        if len(stay) == len(self.running) or len(stay) >= most:
            return False
        kept = {node.block for s in stay for node in s.nodes if not node.pins}
        for s in stay:
            shared = {node.block for node in s.nodes}
            kept |= {block for block in s.blocks if block not in shared}
        kept |= {node.block for node in sequence.path[: sequence.matched] if not node.pins}
        return need + len(stay) <= self.pool.limit - self.prefixes.pinned - len(kept)

    def _yield_place(self, sequence: Sequence) -> bool:
        """Have a running sequence of a lower priority give up its place; whether there was one."""
        victim = self._youngest()
        if victim is None or victim.priority >= sequence.priority:
            return False
        self.preempt(victim)
        return True

    def _start(self, sequence: Sequence) -> None:
        matched, rest = sequence.path[: sequence.matched], sequence.path[sequence.matched :]
        self._waiting.start(sequence)
        sequence.nodes = matched
        more = blocks_for(len(sequence.tokens)) - len(matched)
        sequence.blocks = [node.block for node in matched] + self.prefixes.allocate(more)
        sequence.computed = len(matched) * BLOCK_TOKENS
        sequence.band = min((node.band for node in matched), default=self._band)
        depths = {node.depth for node in matched}
        sequence.depth = depths.pop() if len(depths) == 1 else MIXED
        if sequence.reused is None:
            sequence.reused = sequence.computed
            sequence.miss = self._waiting.reason(sequence, rest[0] if rest else None)
            self.totals.prompt += sequence.prompt_tokens
            self.totals.reused += sequence.computed
        self.running.append(sequence)
        self._owners[sequence.owner] += 1
        self._ordered = False

    # -- blocks -----------------------------------------------------------------------------------------------------

    def _grow(self, sequence: Sequence) -> None:
        """A block for the next token of a sequence whose blocks are full."""
        while not self.prefixes.make_room(1, spare_wanted=False):
            victim = self._youngest()
            if victim is not None:
                self.preempt(victim)
                if victim is sequence:
                    return
            elif not self._unite():
                raise OutOfMemory("no block of keys and values is left")  # `_least` makes sure that one is
        sequence.blocks += self.prefixes.allocate(1)

    def _youngest(self) -> Sequence | None:
        """Who gives up its place next: the lowest priority, then the last that came; never the very first."""
        others = sorted(self.running, key=lambda s: s.arrival)[1:]
        return min(others, key=lambda s: (s.priority, -s.arrival), default=None)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's place away; it waits, and goes on where it was as if nothing had been."""
        self._stop(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
        self.totals.preemptions += 1
        self._waiting.add(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._stops += 1
        self._owners[sequence.owner] -= 1
        if not self._owners[sequence.owner]:
            del self._owners[sequence.owner]
        self._drop(sequence.nodes, sequence.blocks)
        self.prefixes.unlead(sequence.path, sequence)
        sequence.blocks, sequence.nodes = [], []

    def _drop(self, nodes: list[Node], blocks: list[int]) -> None:
        for block in blocks:
            self.prefixes.drop(block)
        self.prefixes.unlock(nodes)

    def _least(self) -> int:
        """Blocks without which something that was accepted could never end."""
        return self.prefixes.pinned + max(self._needs, default=0)

    def _settle(self) -> None:
        """Come down to the limits."""
        self.pool.limit = max(self._asked, self._least())
        while self.pool.available < 0:
            if self.prefixes.evictable:
                self.prefixes.evict(1)
                continue
            victim = self._youngest()
            if victim is not None:
                self.preempt(victim)
            elif not self._unite():
                break
        self.prefixes.keep(self.cached)

    def _unite(self) -> bool:
        """Let nodes take the last running sequence's own blocks where they hold others; whether that freed any.

        It computed them at another size than somebody else did. Both cannot stay where there is no room for one.
        """
        held = self.pool.held
        for s in self.running:
            for node, block in zip(s.nodes, s.blocks, strict=False):
                # below the first all get the band that is known of them, so that none is better than those above it
                if not node.pins and (node.block != block or self.pool.held < held):
                    self.prefixes.replace(node, block, s.band, s.depth)
        return self.pool.held < held

    def _order(self) -> None:
        if not self._ordered:
            self.running.sort(key=lambda s: s.blocks)
            self._ordered = True

    def check_integrity(self) -> None:
        """Raises `AssertionError` when what is counted is not so."""
        self.prefixes.check_integrity(s.blocks for s in self.running)
        self._waiting.check_integrity()
        assert self._owners == Counter(s.owner for s in self.running)
        everything = [*self.running, *self.waiting.values()]
        assert self._needs == Counter(blocks_for(s.limit) for s in everything)
        assert self.pool.limit >= self._least()
        assert self.pool.held <= self.pool.limit
        users = Counter(id(node) for s in self.running for node in s.nodes)
        wanted = Counter(id(node) for s in self.waiting.values() for node in s.path)
        for node in self.prefixes.nodes():
            assert node.users == users[id(node)]
            assert node.wanted == wanted[id(node)]
            assert node.leader is None or node.leader in self.running
        for s in self.running:
            own = s.blocks[len(s.nodes) :]
            assert len(set(own)) == len(own)
            assert s.computed <= len(s.blocks) * BLOCK_TOKENS
            assert len(s.nodes) == s.computed // BLOCK_TOKENS
