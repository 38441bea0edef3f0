"""The trie of computed prefixes: which KV block holds which tokens, who needs it, and which may go. Pure.

A node stands for one whole block of tokens after all those above it; its key is the tokens themselves, so nothing can
collide. Prefixes of running sequences are in it as soon as they are computed, those of waiting ones as nodes without
a block: so the queue is known here, and what it needs goes last.

A block is counted by its holders: its node, and each running sequence that reads it. It is written once, before it gets
a node. When it was computed, the model had some size (`depth`, blocks of the stack) and quality (`band`): the least of
all that was read on the way, and a depth of MIXED where there were several. A node keeps the best block it was offered;
sequences that read the one before go on reading that.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final, Protocol

from ...kernels.attention import BLOCK_TOKENS

NO_BLOCK: Final = -1
MIXED: Final = -1


class Blocks(Protocol):
    """Where KV blocks come from."""

    @property
    def available(self) -> int:
        """Blocks that can be allocated now; negative while more are held than there should be."""
        ...

    def allocate(self, count: int) -> tuple[int, ...]:
        """Take blocks."""
        ...

    def free(self, blocks: tuple[int, ...]) -> None:
        """Give blocks back."""
        ...


@dataclass(eq=False, slots=True)
class Node:
    """One block of tokens after its parent's; the root of a namespace has no parent and no tokens.

    `users` are running sequences, `wanted` waiting ones whose prompts go through it; `leader` is the running sequence
    that is about to compute it, `filled` counts children with a block, `lost` says that it had one before.
    """

    parent: Node | None
    tokens: tuple[int, ...] = ()
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    block: int = NO_BLOCK
    band: int = 0
    depth: int = MIXED
    users: int = 0
    pins: int = 0
    wanted: int = 0
    filled: int = 0
    used_at: int = 0
    leader: object | None = None
    lost: bool = False

    @property
    def kept(self) -> bool:
        """Whether there is any reason to know of it."""
        return bool(
            self.block != NO_BLOCK or self.children or self.wanted or self.users or self.pins or self.leader is not None
        )


class Prefixes:
    """All prefixes of one model, over one pool of blocks. Unless `spares`, it does not matter who waits for what."""

    def __init__(self, pool: Blocks, *, spares: bool = True) -> None:
        self.pool = pool
        self._spares = spares
        self.evictable = 0  # blocks that nobody uses or has pinned: all can be freed, leaf by leaf
        self.unwanted = 0  # those of them that no waiting sequence will read either
        self.pinned = 0
        self.evicted = 0  # so far
        self.news = 0  # grows whenever what a waiting sequence would read comes or goes, or loses its leader
        self._roots: dict[str, Node] = {}
        self._holders: dict[int, int] = {}
        self._leaves: list[tuple[bool, int, int, Node]] = []  # a heap of what may go next; entries may be out of date
        self._numbers = count()
        self._clock = 0

    # -- nodes ------------------------------------------------------------------------------------------------------

    def want(self, namespace: str, tokens: Sequence[int]) -> tuple[list[Node], int]:
        """The nodes of a waiting sequence's whole blocks, its last token apart; how many of them were known before."""
        path: list[Node] = []
        node, known = self._root(namespace), 0
        for start in range(0, (len(tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS, BLOCK_TOKENS):
            node = self._child(node, tokens, start)
            known += node.kept
            path.append(node)
        for node in path:
            self._count(node, -1)
            node.wanted += 1
            self._count(node, 1)
        if not path:
            self._prune(self._root(namespace))
        return path, known

    def unwant(self, path: list[Node]) -> None:
        """The sequence does not wait any more."""
        for node in path:
            self._count(node, -1)
            node.wanted -= 1
            self._count(node, 1)
            self._offer(node)
        if path:
            self._prune(path[-1])

    def publish(
        self, parent: Node | None, namespace: str, tokens: Sequence[int], start: int, block: int, band: int, depth: int
    ) -> tuple[Node, int]:
        """The node of a block that a running sequence has computed, used by it from now on, and the block to read.

        That is another one, bit for bit the same, where somebody was faster; the caller's is then given back.
        """
        node = self._child(parent or self._root(namespace), tokens, start)
        self._count(node, -1)
        node.users += 1
        if node.block == NO_BLOCK or band > node.band:
            self._fill(node, block, band, depth)
        elif (node.band, node.depth) == (band, depth) and depth != MIXED and node.block != block:
            self.hold(node.block)
            self.drop(block)
            block = node.block
        self._count(node, 1)
        return node, block

    def restore(
        self, namespace: str, tokens: Sequence[int], blocks: Sequence[int], band: int, depth: int
    ) -> tuple[list[Node], list[int]]:
        """Nodes for whole blocks that were computed before this process began, and which of them hold `blocks` now.

        Those are to be written; the others had better ones.
        """
        node, path, fresh = self._root(namespace), list[Node](), list[int]()
        for index, block in enumerate(blocks):
            node = self._child(node, tokens, index * BLOCK_TOKENS)
            self._count(node, -1)
            if node.block == NO_BLOCK or band > node.band:
                self._fill(node, block, band, depth)
                fresh.append(index)
            self._count(node, 1)
            self.drop(block)
            path.append(node)
        for each in path:
            self._offer(each)
        self._prune(node)
        return path, fresh

    def replace(self, node: Node, block: int, band: int, depth: int) -> None:
        """A node in use takes another block for its own, even a worse one."""
        self._fill(node, block, band, depth)

    def lock(self, nodes: Iterable[Node]) -> None:
        """A running sequence uses these nodes, and reads their blocks."""
        for node in nodes:
            self._count(node, -1)
            node.users += 1
            self._count(node, 1)
            self.hold(node.block)

    def unlock(self, nodes: list[Node]) -> None:
        """It does not any more. The blocks that it read are dropped apart."""
        self._clock += 1
        for node in nodes:
            self._count(node, -1)
            node.users -= 1
            node.used_at = self._clock
            self._count(node, 1)
            self._offer(node)
        if nodes:
            self._prune(nodes[-1])

    def pin(self, nodes: Iterable[Node], by: int = 1) -> None:
        """Keep these nodes' blocks, or (by -1) let them go."""
        path = list(nodes)
        for node in path:
            self._count(node, -1)
            node.pins += by
            self._count(node, 1)
            self._offer(node)
        if path:
            self._prune(path[-1])

    def lead(self, nodes: Iterable[Node], leader: object) -> None:
        """Say who is about to compute these nodes, where nobody is yet."""
        for node in nodes:
            if node.leader is None:
                node.leader = leader

    def unlead(self, nodes: list[Node], leader: object) -> None:
        """Take it back."""
        for node in nodes:
            if node.leader is leader:
                node.leader = None
                self.news += bool(node.wanted)
        if nodes:
            self._prune(nodes[-1])

    # -- blocks -----------------------------------------------------------------------------------------------------

    def hold(self, block: int) -> None:
        """One holder more."""
        self._holders[block] = self._holders.get(block, 0) + 1

    def drop(self, block: int) -> None:
        """One holder less; without any it goes back to the pool."""
        self._holders[block] -= 1
        if not self._holders[block]:
            del self._holders[block]
            self.pool.free((block,))

    def allocate(self, count: int) -> list[int]:
        """So many blocks, each with the caller as its holder. `make_room` has said that they are there."""
        blocks = list(self.pool.allocate(count))
        for block in blocks:
            self.hold(block)
        return blocks

    def room(self, *, spare_wanted: bool) -> int:
        """Blocks that `make_room` can make available."""
        return self.pool.available + (self.unwanted if spare_wanted else self.evictable)

    def make_room(self, count: int, *, spare_wanted: bool) -> bool:
        """Evict until so many blocks are available; if that cannot be, nothing is lost."""
        if self.room(spare_wanted=spare_wanted) < count:
            return False
        while self.pool.available < count:
            self._evict()
        return True

    def keep(self, count: int) -> None:
        """Evict what nobody uses or waits for until at most `count` unused blocks are left."""
        while self.evictable > count and self.unwanted:
            self._evict()

    def evict(self, count: int) -> None:
        """Evict so many unused blocks, if there are: first those that nobody waits for."""
        for _ in range(min(count, self.evictable)):
            self._evict()

    def _evict(self) -> None:
        """The leaf that was used longest ago, of those that nobody waits for if there are any."""
        while True:
            wanted, used_at, _, node = heapq.heappop(self._leaves)
            if not self._is_leaf(node) or used_at != node.used_at:
                continue
            if wanted != self._spared(node):
                self._offer(node)
                continue
            break
        self._count(node, -1)
        block, node.block, node.lost = node.block, NO_BLOCK, True
        self.drop(block)
        self.evicted += 1
        self.news += bool(node.wanted)
        if node.parent is not None:
            node.parent.filled -= 1
            self._offer(node.parent)
        self._prune(node)

    def _spared(self, node: Node) -> bool:
        return self._spares and node.wanted > 0

    @staticmethod
    def _is_leaf(node: Node) -> bool:
        return node.block != NO_BLOCK and not (node.users or node.pins or node.filled)

    def _offer(self, node: Node) -> None:
        if self._is_leaf(node):
            heapq.heappush(self._leaves, (self._spared(node), node.used_at, next(self._numbers), node))
            if len(self._leaves) > 64 + 4 * len(self._holders):
                self._leaves = [
                    (self._spared(node), node.used_at, next(self._numbers), node)
                    for node in {id(entry[3]): entry[3] for entry in self._leaves}.values()
                    if self._is_leaf(node)
                ]
                heapq.heapify(self._leaves)

    def _fill(self, node: Node, block: int, band: int, depth: int) -> None:
        before, node.block, node.band, node.depth = node.block, block, band, depth
        self.hold(block)
        self.news += bool(node.wanted)
        if before == NO_BLOCK:
            assert node.parent is not None
            node.parent.filled += 1
        else:
            self.drop(before)

    def _count(self, node: Node, sign: int) -> None:
        """Before a node changes (-1), and after (1)."""
        if node.block == NO_BLOCK:
            return
        if node.pins:
            self.pinned += sign
        elif not node.users:
            self.evictable += sign
            if not self._spared(node):
                self.unwanted += sign

    def _root(self, namespace: str) -> Node:
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Node(None)
        return root

    @staticmethod
    def _child(parent: Node, tokens: Sequence[int], start: int) -> Node:
        key = tuple(tokens[start : start + BLOCK_TOKENS])
        child = parent.children.get(key)
        if child is None:
            child = parent.children[key] = Node(parent, key)
        return child

    def _prune(self, node: Node) -> None:
        """Forget a node, and then its parents, that nothing speaks for."""
        while not node.kept:
            if node.parent is None:
                self._roots = {name: root for name, root in self._roots.items() if root is not node}
                return
            if node.parent.children.get(node.tokens) is node:  # and not another one that came after it
                del node.parent.children[node.tokens]
            node = node.parent

    # -- tests ------------------------------------------------------------------------------------------------------

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots."""
        found = [child for root in self._roots.values() for child in root.children.values()]
        while found:
            node = found.pop()
            yield node
            found += node.children.values()

    def check_integrity(self, readers: Iterable[Sequence[int]]) -> None:
        """Raises `AssertionError` when what is counted is not so. `readers`: the blocks of each running sequence."""
        holders: dict[int, int] = {}
        for blocks in readers:
            for block in blocks:
                holders[block] = holders.get(block, 0) + 1
        evictable = unwanted = pinned = 0
        leaves = {id(entry[3]) for entry in self._leaves if entry[1] == entry[3].used_at}
        for node in self.nodes():
            assert node.kept, "a node without a reason"
            assert len(node.tokens) == BLOCK_TOKENS
            assert node.filled == sum(child.block != NO_BLOCK for child in node.children.values())
            assert all(child.wanted <= node.wanted and child.pins <= node.pins for child in node.children.values())
            if node.block == NO_BLOCK:
                assert not node.filled, "not closed under prefixes"
                assert not node.pins
                assert not node.users
                continue
            holders[node.block] = holders.get(node.block, 0) + 1
            pinned += bool(node.pins)
            unused = not node.users and not node.pins
            evictable += unused
            unwanted += unused and not self._spared(node)
            assert not self._is_leaf(node) or id(node) in leaves, "a leaf that would never go"
        assert (self.evictable, self.unwanted, self.pinned) == (evictable, unwanted, pinned)
        assert self._holders == holders
        assert all(root.children for root in self._roots.values())
