"""Blocks that models have in common are in memory once, and nobody notices: not in any order of loading, growing,
shrinking and unloading, not when reading fails half way, and not when a header lies.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from numpy.typing import NDArray

from ebbflow.daemon.engine.batch import Batch
from ebbflow.daemon.engine.kv import KvCache
from ebbflow.daemon.engine.scheduler import Piece, Sequence
from ebbflow.daemon.engine.serving import ServingNetwork
from ebbflow.daemon.library.synthetic_stack import write_random_stack
from ebbflow.daemon.mapping import PAGE, Mapping
from ebbflow.daemon.worker import shared as shared_module
from ebbflow.daemon.worker.loop import Loop
from ebbflow.daemon.worker.resident import READ_NBYTES, Resident
from ebbflow.daemon.worker.shared import LEAST_NBYTES, Arena, SharedBlocks
from ebbflow.formats.child_messages import LoadModel, Report, SetTarget, ToWorker, UnloadModel
from ebbflow.formats.errors import CorruptStack, TruncatedStack
from ebbflow.formats.manifest import STACK
from ebbflow.formats.messages import Finished, Generate
from ebbflow.formats.stack import Stack, mark_of, read_blocks, read_stack
from ebbflow.formats.values import Sampling

from support.cgroups import measure
from support.engines import Answers
from support.fake_line import FakeClock, FakeLine
from support.residents import load, logits, move, run_child
from support.stacks import TINY, copy_model, write_planes_model, write_sparse_model, write_variant

# Blocks from 512 bytes to 17 pages; everything is shared, however small.
A = msgspec.structs.replace(TINY, hidden=256, head_dim=64, intermediate=320, layers=1)
LEAST = 64
TOKENS = list(range(5, 25))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, a variant with its masks, and the model again under another name."""
    root = tmp_path_factory.mktemp("variants")
    one = write_sparse_model(root / "one", A)
    return {"one": one, "variant": write_variant(one, root / "variant"), "again": copy_model(one, root / "again")}


def opened(folder: Path, blocks: int, shared: SharedBlocks) -> Resident:
    """With the edge at `blocks`, or at the end."""
    resident = Resident(read_stack(folder / STACK), shared)
    move(resident, min(blocks, len(resident.stack.blocks)))
    return resident


def check(resident: Resident, payloads: list[bytes]) -> None:
    """Its tables point to what its file holds."""
    resident.check_integrity()
    memory, taken = resident.stored.view(np.uint8), dict[str, int]()
    for entry, payload in zip(resident.stack.blocks[: resident.blocks], payloads, strict=False):
        level = taken.get(entry.tensor, 0)
        start = int(resident.table(entry.tensor)[level, 1])
        assert start >= 0
        assert start % 64 == 0
        assert memory[start : start + len(payload)].tobytes() == payload
        taken[entry.tensor] = level + 1
    for tensor in {entry.tensor for entry in resident.stack.blocks}:
        assert len(resident.table(tensor)) == taken.get(tensor, 0)


def payloads_of(stack: Stack) -> list[bytes]:
    return [data for _, data in read_blocks(stack)]


def held(resident: Resident) -> set[tuple[int, int]]:
    """Address and length of all its blocks, padding included."""
    found, edges = set(), resident.stack.edges
    start = resident.stored.ctypes.data
    levels: dict[str, int] = {}
    for position, entry in enumerate(resident.stack.blocks[: resident.blocks]):
        level = levels.get(entry.tensor, 0)
        levels[entry.tensor] = level + 1
        found.add((start + int(resident.table(entry.tensor)[level, 1]), edges[position + 1] - edges[position]))
    return found


def check_pages(arenas: set[Arena], residents: list[Resident]) -> None:
    """Whole pages that nobody uses are gone."""
    used = {page for r in residents for at, n in held(r) for page in range(at // PAGE, (at + n - 1) // PAGE + 1)}
    for arena in arenas:
        first = arena.address // PAGE
        for page in range(-(-arena.nbytes // PAGE)):
            if first + page not in used:
                assert not arena.mapping.bytes[page * PAGE : (page + 1) * PAGE].any()


class Machine(RuleBasedStateMachine):
    """Models that come, grow, shrink and go."""

    folders: dict[str, Path]

    @initialize()
    def begin(self) -> None:
        self.shared = SharedBlocks(LEAST)
        self.stacks = {name: read_stack(folder / STACK) for name, folder in self.folders.items()}
        self.payloads = {name: payloads_of(stack) for name, stack in self.stacks.items()}
        self.loaded: dict[str, Resident] = {}
        self.arenas: set[Arena] = set()

    name = st.sampled_from(["one", "variant", "again"])

    @rule(name=name)
    def load(self, name: str) -> None:
        if name not in self.loaded:
            self.loaded[name] = Resident(self.stacks[name], self.shared)
            self.arenas.add(self.loaded[name]._arena)
            move(self.loaded[name], self.stacks[name].base)

    @rule(name=name, blocks=st.integers(0, 50), nbytes=st.sampled_from([1, 50_000, READ_NBYTES]))
    def grow(self, name: str, blocks: int, nbytes: int) -> None:
        if name in self.loaded:
            before = self.loaded[name].blocks
            self.loaded[name].grow(min(blocks, len(self.stacks[name].blocks)), nbytes)
            assert self.loaded[name].blocks >= before

    @rule(name=name, reads=st.integers(0, 3))
    def grow_and_fail(self, name: str, reads: int) -> None:
        if name not in self.loaded:
            return
        resident, left, read = self.loaded[name], [reads], Resident._read

        def failing(self: Resident, start: int, stop: int) -> None:
            read(self, start, stop)
            left[0] -= 1
            if left[0] < 0:
                raise CorruptStack("the disk is gone")

        before = (resident.blocks, resident.version, resident.statistics(), len(self.shared))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Resident, "_read", failing)
            try:
                resident.grow(len(resident.stack.blocks))
            except CorruptStack:
                assert (resident.blocks, resident.version, resident.statistics(), len(self.shared)) == before

    @rule(name=name, blocks=st.integers(0, 50))
    def shrink(self, name: str, blocks: int) -> None:
        if name in self.loaded:
            self.loaded[name].shrink(blocks)

    @rule(name=name)
    def unload(self, name: str) -> None:
        if name in self.loaded:
            self.loaded.pop(name).close()

    @invariant()
    def everybody_has_what_is_theirs(self) -> None:
        if not hasattr(self, "loaded"):
            return
        for name, resident in self.loaded.items():
            check(resident, self.payloads[name])
        check_pages(self.arenas, list(self.loaded.values()))

    @invariant()
    def the_books_agree(self) -> None:
        residents = list(getattr(self, "loaded", {}).values())
        statistics = [resident.statistics() for resident in residents]
        taken = sum(n for _, n in set().union(*map(held, residents)))
        assert sum(s.nbytes - s.shared_nbytes for s in statistics) == taken
        # what bases share stays shared when all edges move down to them
        bases = sum(r.stack.base_nbytes for r in residents)
        distinct = {(e.hash, e.nbytes, e.kind, e.level) for r in residents for e in r.stack.blocks[: r.stack.base]}
        least = sum(-(-nbytes // 64) * 64 for _, nbytes, _, _ in distinct)
        assert sum(s.shared_base_nbytes for s in statistics) <= bases - least

    def teardown(self) -> None:
        for resident in getattr(self, "loaded", {}).values():
            resident.close()
        assert not len(getattr(self, "shared", ()))
        check_pages(getattr(self, "arenas", set()), [])


def test_any_order_of_coming_and_going(folders: dict[str, Path]) -> None:
    Machine.folders = folders
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=12, stateful_step_count=15, deadline=None, derandomize=True)
    )


def test_the_machine_shares_at_all(folders: dict[str, Path]) -> None:
    shared = SharedBlocks(LEAST)
    one = opened(folders["one"], 99, shared)
    assert one.statistics().shared_nbytes == 0
    variant, again = opened(folders["variant"], 99, shared), opened(folders["again"], 99, shared)
    masks = sum(e.nbytes for e in one.stack.blocks if e.kind != "values")
    assert variant.statistics().shared_nbytes >= masks
    assert again.statistics().shared_nbytes == again.nbytes
    assert variant.nbytes - variant.statistics().shared_nbytes < 0.9 * variant.nbytes


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> Callable[[str, int], NDArray[np.float32]]:
    """What a model that shares with nobody computes."""
    known: dict[tuple[str, int], NDArray[np.float32]] = {}

    def find(name: str, blocks: int) -> NDArray[np.float32]:
        if (name, blocks) not in known:
            resident = load(folders[name], blocks)
            known[name, blocks] = logits(resident, TOKENS, A)
            resident.close()
        return known[name, blocks]

    return find


class Asked:
    """A model that is asked again and again by one network, as the engine does it."""

    def __init__(self, folder: Path, blocks: int, shared: SharedBlocks) -> None:
        self.name, self.resident = folder.name, opened(folder, blocks, shared)
        self.network, self.kv = ServingNetwork(A, self.resident, threads=1), KvCache(A)

    def logits(self) -> NDArray[np.float32]:
        sequence = Sequence(0, TOKENS, len(TOKENS), blocks=self.kv.allocate(1))
        batch = Batch([Piece(sequence, 0, len(TOKENS))], self.kv.array, A, 1)
        found = self.network.logits(batch, list(range(len(TOKENS))))
        self.kv.free(sequence.blocks)
        return found


@pytest.mark.parametrize("order", list(permutations(["one", "variant", "again"])), ids="-".join)
def test_answers_are_those_of_models_that_share_nothing(
    order: tuple[str, ...], folders: dict[str, Path], expected: Callable[[str, int], NDArray[np.float32]]
) -> None:
    shared, models = SharedBlocks(LEAST), dict[str, Asked]()

    def ask() -> None:
        for name, model in models.items():
            np.testing.assert_array_equal(model.logits(), expected(name, model.resident.blocks))

    for name in order:
        models[name] = Asked(folders[name], 99, shared)
        ask()
    first, second, third = (models[name].resident for name in order)
    first.shrink(30)
    ask()
    second.shrink(30)
    move(first, len(first.stack.blocks))  # where some of what it held is now another's
    ask()
    third.shrink(0)
    models.pop(order[0]).resident.close()
    ask()
    move(third, 40)
    ask()
    models.pop(order[1]).resident.close()
    ask()


def test_a_step_follows_blocks_that_moved_while_the_edge_came_back(
    folders: dict[str, Path], expected: Callable[[str, int], NDArray[np.float32]]
) -> None:
    """Between two steps of a model its edge may go and return, and its blocks be another's then."""
    shared = SharedBlocks(LEAST)
    one, again = Asked(folders["one"], 99, shared), Asked(folders["again"], 20, shared)
    one.logits()
    blocks = one.resident.blocks
    one.resident.shrink(20)
    move(again.resident, blocks)
    move(one.resident, blocks)
    assert one.resident.statistics().shared_nbytes > 200_000  # its tail was its own before
    np.testing.assert_array_equal(one.logits(), expected("one", blocks))


def test_mappings_may_lie_far_apart(
    folders: dict[str, Path],
    expected: Callable[[str, int], NDArray[np.float32]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_module, "Mapping", lambda nbytes: Mapping(nbytes + (9 << 30)))
    shared = SharedBlocks(LEAST)
    models = [Asked(folders[name], 99, shared) for name in folders]
    assert models[-1].resident.stored.nbytes > 9 << 30
    for model in models:
        np.testing.assert_array_equal(model.logits(), expected(model.name, model.resident.blocks))


def test_nothing_is_read_that_is_there(folders: dict[str, Path], tmp_path: Path) -> None:
    shared = SharedBlocks(LEAST)
    one = opened(folders["one"], 99, shared)
    cut = copy_model(folders["one"], tmp_path / "cut")
    stack = read_stack(cut / STACK)
    resident = Resident(stack, shared)
    os.truncate(stack.path, stack.data_start)
    move(resident, len(stack.blocks))
    check(resident, payloads_of(one.stack))
    resident.shrink(30)
    one.close()
    with pytest.raises(TruncatedStack):
        resident.grow(40)
    assert resident.blocks == 30


def spoil(folder: Path, position: int) -> None:
    """Turn the lowest bit of a block's last byte; the header goes on saying what it said."""
    stack = read_stack(folder / STACK)
    place = stack.places[position]
    with place.path.open("r+b") as file:
        at = place.offset + stack.blocks[position].nbytes - 1
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def position_of(folder: Path, kind: str, tensor: str = "layers.0.up", level: int = 0) -> int:
    blocks = read_stack(folder / STACK).blocks
    return next(i for i, e in enumerate(blocks) if (e.kind, e.tensor, e.level) == (kind, tensor, level))


def test_bytes_that_are_not_what_a_header_says_stay_with_their_own_model(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """A file that rotted, or was made to hurt: it holds other bytes than those of the hash that it names."""
    liar = copy_model(folders["one"], tmp_path / "liar")
    place, whole = position_of(liar, "values"), payloads_of(read_stack(liar / STACK))
    spoil(liar, place)
    poisoned = [*whole]
    poisoned[place] = whole[place][:-1] + bytes([whole[place][-1] ^ 1])
    shared = SharedBlocks(LEAST)
    first = opened(liar, 99, shared)
    second, third = opened(folders["one"], 99, shared), opened(folders["again"], 99, shared)
    check(first, poisoned)
    check(second, whole)
    check(third, whole)
    assert third.statistics().shared_nbytes == third.nbytes  # all of it is the second's, or the first's and right
    assert 0 < second.nbytes - second.statistics().shared_nbytes < 2 * len(whole[place])
    second.close()
    check(third, whole)
    late = opened(liar, 99, shared)  # it finds what it says that it holds
    check(late, whole)
    for resident in (first, third, late):
        resident.close()
    assert not len(shared)


def test_blocks_that_are_read_otherwise_are_not_the_same(tmp_path: Path, folders: dict[str, Path]) -> None:
    """The same bytes as another kind of block: each is checked as what it is."""
    shared = SharedBlocks(LEAST)
    one, planes = opened(folders["one"], 99, shared), opened(write_planes_model(tmp_path / "p", A), 99, shared)
    same = {e.hash for e in one.stack.blocks} & {e.hash for e in planes.stack.blocks}
    assert {e.hash for e in one.stack.blocks if len(e.shape) == 1} <= same  # norms are ones in both
    check(planes, payloads_of(planes.stack))
    assert 0 < planes.statistics().shared_nbytes < 20_000


def test_small_blocks_are_each_model_s_own(folders: dict[str, Path]) -> None:
    shared = SharedBlocks()
    residents = [opened(folders[name], 99, shared) for name in ("one", "again")]
    wanted = sum(n for n in np.diff(residents[1].stack.edges) if n >= LEAST_NBYTES)
    assert residents[1].statistics().shared_nbytes == wanted > 0


def test_a_stack_that_is_arriving_shares_what_is_there(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its hashes are checked when it reads; what it did not read, it checks when it has to."""
    shared = SharedBlocks(LEAST)
    one = opened(folders["one"], 99, shared)
    coming = copy_model(folders["one"], tmp_path / "coming")
    mark_of(coming / STACK).touch()
    place = position_of(coming, "values", level=1)
    spoil(coming, place)
    resident = opened(coming, 99, shared)
    check(resident, payloads_of(one.stack))
    resident.shrink(0)
    one.close()
    while resident.blocks < place:
        resident.grow(place)
    with pytest.raises(Exception, match="has not arrived"):
        resident.grow(place + 1)
    spoil(coming, place)  # the byte as it was
    resident.look()
    move(resident, len(resident.stack.blocks))
    check(resident, payloads_of(resident.stack))


def test_no_step_reads_what_nobody_holds(folders: dict[str, Path]) -> None:
    """Two models that share; the kernel kills whoever touches a page without blocks of a prefix."""
    done = run_child("forbidden_tail", str(folders["one"]), "compute", str(folders["variant"]))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 3


# Blocks of some 100 KB, so that pages count.
LARGE = msgspec.structs.replace(TINY, hidden=1024, heads=8, kv_heads=8, head_dim=128, intermediate=1408, layers=1)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models with the same masks, embedding and head."""
    library = tmp_path_factory.mktemp("large")
    for name, values in (("bytes", "i8"), ("halves", "f16")):
        write_random_stack(LARGE, library, name, codec="sparse", values=values)
    return {name: library / name for name in ("bytes", "halves")}


def test_the_kernel_counts_it_once(large: dict[str, Path]) -> None:
    found = measure("variants", str(large["bytes"]), str(large["halves"]))
    for when in ("first", "both", "shrunk", "grown", "second", "none"):
        assert abs(found[f"{when} used"] - found[f"{when} booked"]) < 500_000
    assert found["alone"] - found["both booked"] > 2_300_000
    assert found["shrunk booked"] < found["grown booked"] == found["both booked"]
    assert found["second booked"] == found["second alone"]
    assert found["none booked"] == 0


def test_a_worker_serves_variants_that_share(large: dict[str, Path]) -> None:
    """Each answers as it does alone, whoever is loaded beside it, and the reports say what is shared."""

    class Worker:
        def __init__(self) -> None:
            self.line, self.answers, self.reported = FakeLine(), Answers(), ()
            self.loop = Loop(self.line, 2, FakeClock())

        def hear(self, *messages: ToWorker) -> None:
            self.line.script.append(list(messages))
            while self.line.script or any(m.engine.busy or not m.arrived for m in self.loop.models.values()):
                self.loop.turn()
            said = self.line.take()
            self.answers.hear(said)
            self.reported = [m.models for m in said if isinstance(m, Report)][-1]

        def load(self, name: str) -> None:
            self.hear(LoadModel(model=name, folder=str(large[name]), target_nbytes=10**9))

        def ask(self, key: int, name: str) -> str:
            self.hear(Generate(id=key, model=name, prompt="Once", sampling=Sampling(max_tokens=3)))
            assert isinstance(self.answers.by_id[key].end, Finished)
            return self.answers.by_id[key].text

        @property
        def shared_nbytes(self) -> list[int]:
            return [residency.shared_nbytes for residency in self.reported]

    alone = {}
    for name in large:
        worker = Worker()
        worker.load(name)
        alone[name] = worker.ask(1, name)
        assert worker.shared_nbytes == [0]
    worker = Worker()
    worker.load("bytes")
    worker.load("halves")
    assert worker.shared_nbytes[0] == 0
    assert worker.shared_nbytes[1] > worker.reported[1].shared_base_nbytes > 1_000_000
    assert [worker.ask(1, "bytes"), worker.ask(2, "halves")] == list(alone.values())
    before = worker.shared_nbytes[1]
    worker.hear(SetTarget(model="bytes", target_nbytes=0))
    base = worker.reported[1].shared_base_nbytes
    assert worker.shared_nbytes == [0, base]  # what the other gave up beyond its base counts here now
    assert before > base
    assert worker.ask(3, "halves") == alone["halves"]
    worker.hear(SetTarget(model="bytes", target_nbytes=10**9))
    assert worker.ask(4, "bytes") == alone["bytes"]
    worker.hear(UnloadModel(model="bytes"))
    assert worker.shared_nbytes == [0]
    assert worker.ask(5, "halves") == alone["halves"]
