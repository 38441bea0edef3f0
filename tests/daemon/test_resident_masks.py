"""The resident prefix of a stack whose masks lie in a file of their own: the same as with masks inside."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from ebbflow.daemon.worker.resident import READ_NBYTES, Resident
from ebbflow.formats.errors import BadBlock, CorruptStack, NotArrived, TruncatedStack
from ebbflow.formats.manifest import MASKS, STACK
from ebbflow.formats.stack import Stack, mark_of, read_stack

from support.residents import load, logits, move
from support.stacks import copy_model, write_sparse_model

TOKENS = list(range(5, 25))


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse_model(tmp_path_factory.mktemp("beside") / "model")


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse_model(tmp_path_factory.mktemp("inside") / "model", beside=False)


@pytest.fixture(scope="module")
def stack(beside: Path) -> Stack:
    return read_stack(beside / STACK)


def memory(resident: Resident) -> bytes:
    return resident.stored.view(np.uint8)[: resident.nbytes].tobytes()


@pytest.mark.parametrize("slice_nbytes", [1, 5000, READ_NBYTES])
def test_memory_and_answers_are_those_of_masks_inside(beside: Path, inside: Path, slice_nbytes: int) -> None:
    one, two = load(beside, 0), load(inside, 0)
    data = (inside / STACK).read_bytes()[two.stack.data_start :]
    assert (one.stack.edges, one.stack.nbytes) == (two.stack.edges, len(data))
    for blocks in (one.stack.base, one.stack.base + 3, len(one.stack.blocks), one.stack.base + 1):
        for resident in (one, two):
            resident.shrink(blocks)
            while resident.blocks < blocks:
                resident.grow(blocks, slice_nbytes)
            resident.check_integrity()
        assert memory(one) == memory(two) == data[: one.nbytes]
        np.testing.assert_array_equal(logits(one, TOKENS), logits(two, TOKENS))


def test_closing_closes_both_files(beside: Path, tmp_path: Path) -> None:
    def files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = files()
    resident = load(beside, 30)
    assert files() == before + 2
    resident.close()
    assert files() == before
    folder = copy_model(beside, tmp_path / "m")
    found = read_stack(folder / STACK)
    (folder / MASKS).unlink()
    with pytest.raises(CorruptStack, match=MASKS):
        Resident(found)
    assert files() == before


def test_files_removed_while_open_still_serve(beside: Path, stack: Stack, tmp_path: Path) -> None:
    folder = copy_model(beside, tmp_path / "m")
    resident = load(folder, stack.base)
    shutil.rmtree(folder)
    move(resident, len(stack.blocks))
    whole = load(beside, len(stack.blocks))
    assert memory(resident) == memory(whole)


def test_masks_cut_under_us_stop_the_edge(beside: Path, stack: Stack, tmp_path: Path) -> None:
    folder = copy_model(beside, tmp_path / "m")
    resident = load(folder, stack.base)
    last = max(i for i, entry in enumerate(stack.blocks) if entry.beside)
    os.truncate(folder / MASKS, stack.places[last].offset + 1)
    with pytest.raises(TruncatedStack, match=MASKS):
        move(resident, len(stack.blocks))
    assert stack.base <= resident.blocks <= last
    resident.check_integrity()


def test_while_it_arrives_masks_count_with_their_values(beside: Path, stack: Stack, tmp_path: Path) -> None:
    folder = copy_model(beside, tmp_path / "m")
    mark_of(folder / STACK).touch()
    for blocks in (stack.base, stack.base + 1, stack.base + 2, len(stack.blocks)):
        os.truncate(folder / STACK, stack.data_start + stack.file_edges[blocks])
        resident = Resident(read_stack(folder / STACK))
        # a mask takes nothing of the stack's own file, so it is there as soon as what comes before
        there = blocks + 1 if blocks < len(stack.blocks) and stack.blocks[blocks].beside else blocks
        assert resident.present == there
        move(resident, there)
        resident.close()
        (folder / STACK).write_bytes((beside / STACK).read_bytes())


def test_a_hole_in_the_masks_has_not_arrived_as_long_as_there_is_the_mark(
    beside: Path, stack: Stack, tmp_path: Path
) -> None:
    folder = copy_model(beside, tmp_path / "m")
    hole = next(i for i in range(stack.base, len(stack.blocks)) if stack.blocks[i].beside)
    content = bytearray((folder / MASKS).read_bytes())
    at = stack.places[hole].offset
    content[at : at + 64] = bytes(64)
    (folder / MASKS).write_bytes(content)
    mark_of(folder / STACK).touch()
    resident = load(folder, stack.base)
    with pytest.raises(NotArrived):
        move(resident, len(stack.blocks))
    assert resident.blocks == hole == resident.present
    mark_of(folder / STACK).unlink()
    resident.look()
    with pytest.raises(BadBlock):
        move(resident, len(stack.blocks))
    assert resident.blocks == hole
