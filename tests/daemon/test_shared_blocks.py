"""Blocks that models have in common are in memory once, and nobody notices: not in any order of loading, growing,
shrinking and unloading, not when reading fails half way, and not when a header lies.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from numpy.typing import NDArray

from ebbflow.daemon.engine.batch import Batch
from ebbflow.daemon.engine.kv import KvCache
from ebbflow.daemon.engine.scheduler import Piece, Sequence
from ebbflow.daemon.engine.serving import ServingNetwork
from ebbflow.daemon.library.synthetic_stack import write_random_stack
from ebbflow.daemon.mapping import PAGE, private_nbytes
from ebbflow.daemon.worker.loop import Loop
from ebbflow.daemon.worker.resident import READ_NBYTES, Resident
from ebbflow.daemon.worker.shared import LEAST_NBYTES, Ground, SharedBlocks
from ebbflow.formats.child_messages import LoadModel, Report, SetTarget, ToWorker, UnloadModel
from ebbflow.formats.errors import CorruptStack, TruncatedStack
from ebbflow.formats.manifest import STACK
from ebbflow.formats.messages import Finished, Generate
from ebbflow.formats.stack import MARK, Stack, content_hash, mark_of, read_blocks, read_stack
from ebbflow.formats.values import Sampling

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
    resident = Resident(read_stack(folder / STACK), shared)
    move(resident, blocks)
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


def check_pages(grounds: set[Ground], residents: list[Resident]) -> None:
    """Whole pages that nobody uses are gone."""
    used = {page for r in residents for at, n in held(r) for page in range(at // PAGE, (at + n - 1) // PAGE + 1)}
    for ground in grounds:
        first = ground.address // PAGE
        for page in range(-(-ground.nbytes // PAGE)):
            if first + page not in used:
                assert not ground.mapping.bytes[page * PAGE : (page + 1) * PAGE].any()


class Machine(RuleBasedStateMachine):
    """Models that come, grow, shrink and go."""

    folders: dict[str, Path]

    @initialize()
    def begin(self) -> None:
        self.shared = SharedBlocks(LEAST)
        self.stacks = {name: read_stack(folder / STACK) for name, folder in self.folders.items()}
        self.payloads = {name: payloads_of(stack) for name, stack in self.stacks.items()}
        self.loaded: dict[str, Resident] = {}
        self.grounds: set[Ground] = set()

    name = st.sampled_from(["one", "variant", "again"])

    @rule(name=name)
    def load(self, name: str) -> None:
        if name not in self.loaded:
            self.loaded[name] = Resident(self.stacks[name], self.shared)
            self.grounds.add(self.loaded[name]._ground)
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
        check_pages(self.grounds, list(self.loaded.values()))

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
        check_pages(getattr(self, "grounds", set()), [])


def test_any_order_of_coming_and_going(folders: dict[str, Path]) -> None:
    Machine.folders = folders
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=25, stateful_step_count=20, deadline=None, derandomize=True)
    )
