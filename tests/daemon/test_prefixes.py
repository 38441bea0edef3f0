"""The trie of prefixes on its own: against a plain model of it, and what goes first."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.daemon.engine.prefixes import BLOCK_TOKENS, MIXED, NO_BLOCK, Node, Prefixes

from support.scheduling import Memory


def tokens_of(path: list[int]) -> list[int]:
    """Tokens whose whole blocks are the letters of `path`, and one more."""
    return [letter for letter in path for _ in range(BLOCK_TOKENS)] + [0]


@dataclass(eq=False)
class Reader:
    """A running sequence as the trie sees it."""

    letters: list[int]
    nodes: list[Node] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)


class Book:
    """A trie, and who does what with it."""

    def __init__(self, most: int = 40, spares: bool = True) -> None:
        self.pool = Memory(most)
        self.prefixes = Prefixes(self.pool, spares=spares)
        self.readers: list[Reader] = []
        self.waits: list[list[Node]] = []
        self.pins: list[list[Node]] = []

    def wait(self, path: list[int], namespace: str = "") -> list[Node]:
        nodes, _ = self.prefixes.want(namespace, tokens_of(path))
        self.waits.append(nodes)
        return nodes

    def read(self, path: list[int], namespace: str = "", band: int = 0, depth: int = 0) -> Reader | None:
        """Use what is there in that band or better, and compute the rest of `path`; None where there is no room."""
        nodes, _ = self.prefixes.want(namespace, tokens_of(path))
        matched = []
        for node in nodes:
            if node.block == NO_BLOCK or node.band < band:
                break
            matched.append(node)
        self.prefixes.lock(matched)
        self.prefixes.unwant(nodes)
        reader = Reader(path, matched, [node.block for node in matched])
        self.readers.append(reader)
        if not self.prefixes.make_room(len(path) - len(matched), spare_wanted=False):
            self.stop(reader)
            return None
        reader.blocks += self.prefixes.allocate(len(path) - len(matched))
        for at in range(len(matched), len(path)):
            parent = reader.nodes[-1] if reader.nodes else None
            start = at * BLOCK_TOKENS
            node, reader.blocks[at] = self.prefixes.publish(
                parent, namespace, tokens_of(path), start, reader.blocks[at], band, depth
            )
            reader.nodes.append(node)
        self.check()
        return reader

    def stop(self, reader: Reader) -> None:
        self.readers.remove(reader)
        for block in reader.blocks:
            self.prefixes.drop(block)
        self.prefixes.unlock(reader.nodes)
        self.check()

    def check(self) -> None:
        self.prefixes.check_integrity(reader.blocks for reader in self.readers)
        assert len(self.prefixes._leaves) <= 64 + 4 * len(self.prefixes._holders) + 1 + len(self.readers) * 8

    def there(self, path: list[int], namespace: str = "") -> int:
        """How many blocks of `path` there are."""
        nodes, _ = self.prefixes.want(namespace, tokens_of(path))
        self.prefixes.unwant(nodes)
        return next((at for at, node in enumerate(nodes) if node.block == NO_BLOCK), len(nodes))


paths = st.lists(st.integers(1, 2), max_size=6)
picks = st.integers(0, 20)
actions = st.one_of(
    st.tuples(st.just("read"), st.tuples(paths, st.sampled_from(["", "b"]), st.integers(0, 2))),
    st.tuples(st.just("read"), st.tuples(paths, st.just(""), st.just(0))),
    st.tuples(st.just("wait"), paths),
    st.tuples(st.just("stop"), picks),
    st.tuples(st.just("leave"), picks),
    st.tuples(st.just("pin"), picks),
    st.tuples(st.just("unpin"), picks),
    st.tuples(st.just("evict"), picks),
    st.tuples(st.just("keep"), picks),
    st.tuples(st.just("restore"), st.tuples(paths, st.integers(0, 2))),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(actions, max_size=60), st.booleans())
def test_whatever_happens_everything_is_counted(script: list[tuple[str, object]], spares: bool) -> None:
    book = Book(24, spares)
    prefixes = book.prefixes
    for what, value in script:
        match what, value:
            case "read", (list(path), str(namespace), int(depth)):
                book.read(path, namespace, depth, depth)
            case "wait", list(path):
                book.wait(path)
            case "stop", int(pick) if book.readers:
                book.stop(book.readers[pick % len(book.readers)])
            case "leave", int(pick) if book.waits:
                prefixes.unwant(book.waits.pop(pick % len(book.waits)))
            case "pin", int(pick) if book.readers:
                book.pins.append(list(book.readers[pick % len(book.readers)].nodes))
                prefixes.pin(book.pins[-1])
            case "unpin", int(pick) if book.pins:
                prefixes.pin(book.pins.pop(pick % len(book.pins)), -1)
            case "evict", int(count):
                before, unused = book.pool.held, prefixes.evictable
                prefixes.evict(count)
                assert before - book.pool.held == min(count, unused)
            case "keep", int(count):
                prefixes.keep(count)
                assert prefixes.evictable <= count or not prefixes.unwanted
            case "restore", (list(path), int(depth)) if prefixes.make_room(len(path), spare_wanted=False):
                blocks = prefixes.allocate(len(path))
                nodes, fresh = prefixes.restore("", tokens_of(path), blocks, depth, depth)
                assert [i for i, node in enumerate(nodes) if node.block == blocks[i]] == fresh
                assert all(node.band >= depth for node in nodes)
        book.check()
    while book.readers:
        book.stop(book.readers[0])
    for nodes in book.waits:
        prefixes.unwant(nodes)
    for nodes in book.pins:
        prefixes.pin(nodes, -1)
    assert book.pool.held == prefixes.evictable == prefixes.unwanted
    prefixes.evict(24)
    book.check()
    assert not book.pool.held
    assert not prefixes._roots
    assert not prefixes._holders


def test_the_longest_unused_leaf_goes_first_and_parents_after_their_children() -> None:
    book = Book()
    for path in ([1, 1], [1, 2], [2]):
        reader = book.read(path)
        assert reader is not None
        book.stop(reader)
    reader = book.read([1, 1])
    assert reader is not None
    book.stop(reader)
    gone = []
    for _ in range(4):
        before = [book.there(path) for path in ([1, 1], [1, 2], [2])]
        book.prefixes.evict(1)
        after = [book.there(path) for path in ([1, 1], [1, 2], [2])]
        gone.append([b - a for b, a in zip(before, after, strict=True)])
        book.check()
    assert gone == [[0, 1, 0], [0, 0, 1], [1, 0, 0], [1, 1, 0]]


def test_what_is_used_pinned_or_wanted_stays_longer() -> None:
    book = Book()
    readers = [book.read([letter]) for letter in (1, 2, 3, 4)]
    used, pinned, wanted, other = (reader for reader in readers if reader)
    book.prefixes.pin(pinned.nodes)
    book.wait([3])
    for reader in (pinned, wanted, other):
        book.stop(reader)
    assert (book.prefixes.evictable, book.prefixes.unwanted, book.prefixes.pinned) == (2, 1, 1)
    assert not book.prefixes.make_room(book.pool.available + 2, spare_wanted=True)
    assert [book.there([letter]) for letter in (1, 2, 3, 4)] == [1, 1, 1, 1]
    for expected in ([1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]):
        book.prefixes.evict(1)
        assert [book.there([letter]) for letter in (1, 2, 3, 4)] == expected
        book.check()
    book.stop(used)
    book.prefixes.pin(pinned.nodes, -1)
    book.prefixes.evict(2)
    assert not book.pool.held


def test_two_that_compute_the_same_end_with_one_block() -> None:
    book = Book()
    tokens = tokens_of([1])
    first, second = book.prefixes.allocate(2)
    node, block = book.prefixes.publish(None, "", tokens, 0, first, 1, 2)
    assert block == first
    assert book.prefixes.publish(None, "", tokens, 0, second, 1, 2) == (node, first)
    assert book.pool.held == 1
    assert node.users == 2


@pytest.mark.parametrize(("band", "depth", "kept"), [(1, 3, 0), (1, MIXED, 0), (0, 0, 0), (2, 4, 1)])
def test_a_node_keeps_the_best_block_and_everybody_their_own(band: int, depth: int, kept: int) -> None:
    book = Book()
    tokens = tokens_of([1])
    blocks = book.prefixes.allocate(2)
    node, _ = book.prefixes.publish(None, "", tokens, 0, blocks[0], 1, 2)
    assert book.prefixes.publish(None, "", tokens, 0, blocks[1], band, depth) == (node, blocks[1])
    assert node.block == blocks[kept]
    assert book.pool.held == 2


def test_mixtures_are_never_taken_for_one_another() -> None:
    book = Book()
    blocks = book.prefixes.allocate(2)
    book.prefixes.publish(None, "", tokens_of([1]), 0, blocks[0], 1, MIXED)
    assert book.prefixes.publish(None, "", tokens_of([1]), 0, blocks[1], 1, MIXED)[1] == blocks[1]


def test_namespaces_are_apart_and_vanish() -> None:
    book = Book()
    a, b = book.read([1, 2], "a"), book.read([1, 2], "b")
    assert a is not None
    assert b is not None
    assert not set(a.blocks) & set(b.blocks)
    assert (book.there([1, 2], "a"), book.there([1, 2], "c")) == (2, 0)
    assert set(book.prefixes._roots) == {"a", "b"}
    book.stop(a)
    book.prefixes.evict(2)
    assert set(book.prefixes._roots) == {"b"}


def test_what_is_known_counts_those_that_wait() -> None:
    prefixes = Book().prefixes
    _, known = prefixes.want("", tokens_of([1, 2]))
    assert known == 0
    assert prefixes.want("", tokens_of([1, 2, 3]))[1] == 2
    assert prefixes.want("", tokens_of([1, 3]))[1] == 1
    assert prefixes.want("b", tokens_of([1, 2]))[1] == 0
    assert prefixes.want("", tokens_of([1])[:-1]) == ([], 0)  # its last token has to be computed anyway


def test_a_leader_is_the_first_and_only_itself_can_step_back() -> None:
    prefixes = Book().prefixes
    path, _ = prefixes.want("", tokens_of([1, 2]))
    prefixes.lead(path, "first")
    prefixes.lead(path, "second")
    prefixes.unlead(path, "second")
    assert [node.leader for node in path] == ["first", "first"]
    prefixes.unwant(path)
    assert list(prefixes.nodes())  # it is about to be computed
    prefixes.unlead(path, "first")
    assert not list(prefixes.nodes())


def test_the_heap_of_leaves_does_not_grow() -> None:
    book = Book()
    for _ in range(2000):
        reader = book.read([1, 2])
        assert reader is not None
        book.stop(reader)
        book.prefixes.unwant(book.prefixes.want("", tokens_of([1, 2]))[0])
    assert len(book.prefixes._leaves) <= 64 + 4 * 2 + 1


def test_restoring_nothing_leaves_nothing() -> None:
    book = Book()
    assert book.prefixes.restore("", [], [], 0, 0) == ([], [])
    book.check()
