"""The resident prefix: at every edge its bytes are the file's and its answers those of a fresh load."""

from __future__ import annotations

import errno
import mmap
import os
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ebbflow.daemon.engine.batch import Batch
from ebbflow.daemon.engine.kv import KvCache
from ebbflow.daemon.engine.sequences import Piece, Sequence
from ebbflow.daemon.engine.serving import ServingNetwork
from ebbflow.daemon.worker.resident import READ_NBYTES, Resident
from ebbflow.formats.container import padded
from ebbflow.formats.errors import BadBlock, CorruptStack, TruncatedStack
from ebbflow.formats.manifest import STACK
from ebbflow.formats.stack import Stack, read_stack
from ebbflow.kernels.instructions import VARIABLE, available

from support.residents import load, logits, move, run_child
from support.stacks import TINY, copy_model, write_planes_model, write_signs_model, write_sparse_model

TOKENS = list(range(5, 25))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_signs_model(tmp_path_factory.mktemp("resident") / "model")


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[int, NDArray[np.float32]]:
    """What a fresh load at each depth computes."""
    stack = read_stack(folder / STACK)
    return {depth: fresh(folder, depth) for depth in range(stack.base, len(stack.blocks) + 1)}


def fresh(folder: Path, depth: int) -> NDArray[np.float32]:
    resident = load(folder, depth)
    result = logits(resident, TOKENS)
    resident.close()
    return result


def in_memory(stack: Stack) -> bytes:
    """All blocks of a stack as its files have them, wherever they are."""
    files = {place.path: place.path.read_bytes() for place in stack.places}
    sizes = [padded(entry.nbytes) for entry in stack.blocks]
    parts = zip(stack.places, sizes, strict=True)
    return b"".join(files[place.path][place.offset : place.offset + size] for place, size in parts)


def check(resident: Resident) -> None:
    """Bytes up to the edge are the files', and all whole pages beyond it are gone."""
    resident.check_integrity()
    stack = resident.stack
    data = in_memory(stack)
    memory = resident.stored.view(np.uint8)
    assert memory[: resident.nbytes].tobytes() == data[: resident.nbytes]
    beyond = -(-resident.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    assert not memory[beyond:].any()
    levels: dict[str, list[int]] = {}
    for entry, offset in zip(stack.blocks[: resident.blocks], stack.edges, strict=False):
        levels.setdefault(entry.tensor, []).append(offset)
    for tensor in {entry.tensor for entry in stack.blocks}:
        assert resident.table(tensor)[:, 1].tolist() == levels.get(tensor, [])


def test_depths_differ(expected: dict[int, Any]) -> None:
    """Else the comparisons below compare nothing."""
    depths = sorted(expected)
    assert all((expected[a] != expected[b]).any() for a, b in pairwise(depths))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 60), st.sampled_from([1, 3000, 20_000, READ_NBYTES])), max_size=8))
def test_any_way_to_an_edge_gives_what_a_fresh_load_gives(
    folder: Path, expected: dict[int, Any], moves: list[tuple[int, int]]
) -> None:
    resident = load(folder, 21)
    assert resident.stack.base == 21
    for target, slice_nbytes in moves:
        resident.shrink(target)
        for _ in range(3):  # three slices, wherever they lead
            resident.grow(min(target, len(resident.stack.blocks)), slice_nbytes)
        check(resident)
        np.testing.assert_array_equal(logits(resident, TOKENS), expected[resident.blocks])
    resident.close()


def test_a_network_built_at_the_base_uses_what_arrives_later(folder: Path, expected: dict[int, Any]) -> None:
    resident = load(folder, 21)
    network, kv = ServingNetwork(TINY, resident, threads=1), KvCache(TINY)
    for depth in (21, 49, 30, 35, 21):
        move(resident, depth)
        sequence = Sequence(0, TOKENS, len(TOKENS), blocks=kv.allocate(1))
        batch = Batch([Piece(sequence, 0, len(TOKENS))], kv.array, TINY, 1)
        np.testing.assert_array_equal(network.logits(batch, list(range(len(TOKENS)))), expected[depth])
        kv.free(sequence.blocks)


@pytest.fixture(scope="module")
def tiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stack of masks and values: 35 blocks of base, 63 in all."""
    return write_sparse_model(tmp_path_factory.mktemp("tiers") / "model", shares=(30, 25))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 63), st.sampled_from([1, 3000, READ_NBYTES])), max_size=8))
def test_any_way_to_an_edge_of_tiers_gives_what_a_fresh_load_gives(tiers: Path, moves: list[tuple[int, int]]) -> None:
    resident = load(tiers, 35)
    network, kv = ServingNetwork(TINY, resident, threads=1), KvCache(TINY)
    for target, slice_nbytes in moves:
        resident.shrink(target)
        for _ in range(3):
            resident.grow(target, slice_nbytes)
        check(resident)
        sequence = Sequence(0, TOKENS, len(TOKENS), blocks=kv.allocate(1))
        batch = Batch([Piece(sequence, 0, len(TOKENS))], kv.array, TINY, 1)
        found = network.logits(batch, list(range(len(TOKENS))))
        np.testing.assert_array_equal(found, fresh(tiers, resident.blocks))
        kv.free(sequence.blocks)
    resident.close()


def test_growing_goes_in_slices_of_whole_blocks(folder: Path) -> None:
    resident = load(folder, 0)
    edges = resident.stack.edges
    for target, nbytes, arrives in ((49, 1, 1), (49, edges[5] - edges[1], 5), (8, 10**9, 8), (8, 1, 8), (3, 1, 8)):
        resident.grow(target, nbytes)
        assert resident.blocks == arrives
        assert resident.statistics().nbytes == resident.nbytes == edges[arrives]
        check(resident)


def test_the_base_stays_whatever_is_asked(folder: Path) -> None:
    resident = load(folder, 30)
    resident.shrink(0)
    assert resident.blocks == resident.stack.base
    resident.shrink(-5)
    assert resident.blocks == resident.stack.base
    check(resident)


def test_block_by_block_as_much_is_dropped_as_at_once(folder: Path, tiers: Path) -> None:
    """Each edge lies within a page; none of these pages may stay behind."""
    for resident in (load(folder, 49), load(tiers, 63)):
        for depth in range(resident.blocks - 1, resident.stack.base - 1, -1):
            resident.shrink(depth)
            check(resident)


def test_shrinking_upwards_does_nothing(folder: Path) -> None:
    resident = load(folder, 25)
    resident.shrink(40)
    assert resident.blocks == 25


def test_vectors_are_found_by_name(folder: Path) -> None:
    resident = load(folder, 21)
    entry, payload = resident.payload("final_norm")
    assert entry.tensor == "final_norm"
    assert (payload[: entry.nbytes].view(np.float32) == 1).all()
    assert resident.table("no such tensor").shape == (0, 3)


def spoil(folder: Path, position: int, at: int, value: int) -> None:
    """Overwrite 16 bits, counted from the end of block `position`'s payload if negative."""
    stack = read_stack(folder / STACK)
    start = stack.edges[position] + (at if at >= 0 else stack.blocks[position].nbytes + at)
    with (folder / STACK).open("r+b") as file:
        file.seek(stack.data_start + start)
        file.write(value.to_bytes(2, "little"))


@pytest.mark.parametrize("bits", [0x7E00, 0x7C00, 0xFC00, 0x7C01], ids=["nan", "inf", "-inf", "signalling-nan"])
@pytest.mark.parametrize("slice_nbytes", [1, READ_NBYTES])
def test_a_factor_that_is_no_number_stops_the_edge(folder: Path, tmp_path: Path, bits: int, slice_nbytes: int) -> None:
    broken = copy_model(folder, tmp_path / "broken")
    spoil(broken, 33, -2, bits)
    resident = load(broken, 30)
    before = {entry.tensor: resident.table(entry.tensor) for entry in resident.stack.blocks}
    if slice_nbytes == 1:
        move(resident, 33)
    with pytest.raises(BadBlock, match="NaN"):
        resident.grow(49, slice_nbytes)
    assert resident.blocks == 33  # what is whole before it is there, however much was read at once
    check(resident)
    resident.shrink(30)
    assert all((resident.table(tensor) == table).all() for tensor, table in before.items())
    np.testing.assert_array_equal(logits(resident, TOKENS), fresh(folder, 30))


def test_a_scale_that_is_no_number_stops_the_edge(folder: Path, tmp_path: Path) -> None:
    broken = copy_model(folder, tmp_path / "broken")
    spoil(broken, 0, 2, 0x7FC0)  # the upper half of the embedding's first int8 scale
    resident = load(broken, 0)
    with pytest.raises(BadBlock):
        resident.grow(49)
    assert resident.blocks == 0
    check(resident)


def test_a_file_cut_under_us_stops_the_edge(folder: Path, tmp_path: Path) -> None:
    cut = copy_model(folder, tmp_path / "cut")
    resident = load(cut, 30)
    stack = resident.stack
    whole = stack.path.read_bytes()
    os.truncate(stack.path, stack.data_start + stack.edges[40] + 10)
    with pytest.raises(TruncatedStack, match=str(stack.nbytes)):
        resident.grow(49)
    assert resident.blocks == 40
    check(resident)
    with pytest.raises(TruncatedStack):
        resident.grow(41)
    assert resident.blocks == 40
    stack.path.write_bytes(whole)  # the same file, whole again
    move(resident, 49)
    check(resident)


def test_a_missing_file(folder: Path, tmp_path: Path) -> None:
    gone = copy_model(folder, tmp_path / "gone")
    stack = read_stack(gone / STACK)
    stack.path.unlink()
    with pytest.raises(CorruptStack, match="No such file"):
        Resident(stack)


def test_a_file_removed_while_open_still_serves(folder: Path, tmp_path: Path, expected: dict[int, Any]) -> None:
    gone = copy_model(folder, tmp_path / "gone")
    resident = load(gone, 21)
    resident.stack.path.unlink()
    move(resident, 49)
    np.testing.assert_array_equal(logits(resident, TOKENS), expected[49])


def test_what_is_no_file_is_not_opened(folder: Path, tmp_path: Path) -> None:
    other = copy_model(folder, tmp_path / "other")
    stack = read_stack(other / STACK)
    stack.path.unlink()
    stack.path.mkdir()
    with pytest.raises(CorruptStack, match="cannot be opened: it is not a plain file"):
        Resident(stack)


def test_what_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    resident = load(folder, 21)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        with pytest.raises(CorruptStack, match="cannot be read"):
            resident.grow(49)
    assert resident.blocks == 21
    check(resident)
    resident.close()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_closing_closes_the_file(folder: Path) -> None:
    before = open_files()
    resident = load(folder, 49)
    assert open_files() == before + 1
    resident.close()
    assert open_files() == before


def test_no_step_reads_beyond_the_edge(folder: Path) -> None:
    """A dropped block reads as zeros, silently; here the kernel kills whoever touches it."""
    done = run_child("forbidden_tail", str(folder), "compute")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


@pytest.mark.parametrize("write", [write_planes_model, write_sparse_model])
@pytest.mark.parametrize("name", available())
def test_no_step_reads_planes_or_tiers_beyond_the_edge(
    name: str, write: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, name)
    done = run_child("forbidden_tail", str(write(tmp_path / "model")), "compute")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


def test_the_forbidden_tail_is_really_forbidden(folder: Path) -> None:
    assert run_child("forbidden_tail", str(folder), "touch").returncode == -signal.SIGSEGV
