"""A step in one compiled program gives the bits of the same operations one by one, for every kind of network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numba
import numpy as np
import pytest

from ebbflow.daemon.engine.batch import Batch
from ebbflow.daemon.engine.kv import KvCache, blocks_for
from ebbflow.daemon.engine.sequences import Piece, Sequence
from ebbflow.daemon.engine.serving import ServingNetwork
from ebbflow.daemon.settings import KV_TYPES, KvType
from ebbflow.daemon.worker.resident import Resident
from ebbflow.formats.architecture import Architecture
from ebbflow.formats.manifest import STACK
from ebbflow.formats.stack import read_stack

from support.residents import load, move
from support.stacks import TINY, write_planes_model, write_signs_model, write_sparse_model

NETWORKS = {
    "plain": TINY,
    "odd": msgspec.structs.replace(TINY, hidden=72, heads=3, kv_heads=1, head_dim=24, intermediate=172),
    "tied, windowed": msgspec.structs.replace(TINY, tied=True, window=5),
    "biases": msgspec.structs.replace(TINY, qkv_bias=True, output_bias=True, mlp_bias=True),
    "norms of heads": msgspec.structs.replace(TINY, qk_norm=True),
}
TOKENS = np.random.default_rng(5).integers(0, TINY.vocab, 45).tolist()


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Architecture, Path]:
    a = NETWORKS[request.param]
    return a, write_planes_model(tmp_path / "model", a)


class Runs:
    """Two sequences, cut into steps: one in three pieces, the other beside its last two."""

    def __init__(self, a: Architecture, resident: Resident, whole: bool, dtype: KvType = "f16") -> None:
        self._a, self._whole = a, whole
        self._network, self._kv = ServingNetwork(a, resident, 2), KvCache(a, dtype)

    def logits(self) -> np.ndarray:
        first, second = (Sequence(key, TOKENS, len(TOKENS), blocks=self._blocks()) for key in (1, 2))
        found = [
            self._step([Piece(first, 0, 1)], [0]),
            self._step([Piece(first, 1, 40), Piece(second, 0, 7)], [0, 39, 46]),
            self._step([Piece(first, 41, 4), Piece(second, 7, 1)], []),
            self._step([Piece(second, 8, 2)], [1]),
        ]
        return np.concatenate(found)

    def of_two(self, shared: bool) -> np.ndarray:
        """Logits at the ends of two sequences that begin alike; in one step, the block they share computed once."""
        first, second = (Sequence(key, TOKENS[:32] + tail, 45) for key, tail in ((1, TOKENS[32:]), (2, TOKENS[:13])))
        first.blocks = self._blocks()
        if not shared:
            second.blocks = self._blocks()
            return np.concatenate([self._step([Piece(each, 0, 45)], [44]) for each in (first, second)])
        second.blocks = (first.blocks[0], *self._kv.allocate(1))
        self._step([Piece(first, 0, 44)], [])
        return self._step([Piece(first, 44, 1), Piece(second, 32, 13)], [0, 13])

    def _blocks(self) -> tuple[int, ...]:
        return self._kv.allocate(blocks_for(len(TOKENS)))

    def _step(self, pieces: list[Piece], rows: list[int]) -> np.ndarray:
        batch = Batch(pieces, self._kv.array, self._a, 2)
        if self._whole:
            return self._network.logits(batch, rows)
        hidden = self._network.network.forward(batch.tokens, batch)
        return self._network.network.head(np.ascontiguousarray(hidden[rows]))


def same(a: np.ndarray, b: np.ndarray) -> None:
    assert np.isfinite(a).all()
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("dtype", KV_TYPES)
def test_a_compiled_step_is_its_operations(network: tuple[Architecture, Path], dtype: KvType) -> None:
    a, folder = network
    stack = read_stack(folder / STACK)
    resident = load(folder, len(stack.blocks))
    for blocks in (len(stack.blocks), stack.base, stack.base + 5):
        move(resident, blocks)
        same(Runs(a, resident, True, dtype).logits(), Runs(a, resident, False, dtype).logits())
    resident.close()


@pytest.mark.parametrize("whole", [True, False])
def test_sequences_that_share_a_block_are_each_alone(network: tuple[Architecture, Path], whole: bool) -> None:
    a, folder = network
    resident = load(folder, len(read_stack(folder / STACK).blocks))
    same(Runs(a, resident, whole).of_two(shared=True), Runs(a, resident, whole).of_two(shared=False))
    resident.close()


def test_keys_and_values_in_bytes_are_close_to_fp16(tmp_path: Path) -> None:
    folder = write_planes_model(tmp_path / "model")
    resident = load(folder, len(read_stack(folder / STACK).blocks))
    bytes_, halves = (Runs(TINY, resident, True, dtype).logits() for dtype in ("i8", "f16"))
    error = np.abs(bytes_ - halves).max() / np.abs(halves).max()
    assert 1e-5 < error < 0.02
    resident.close()


def test_the_edge_moves_under_a_network(tmp_path: Path) -> None:
    """Its tables follow: results are those of a network made afterwards."""
    folder = write_planes_model(tmp_path / "model")
    stack = read_stack(folder / STACK)
    resident = load(folder, len(stack.blocks))
    lasting = Runs(TINY, resident, whole=True)
    for blocks in (len(stack.blocks), stack.base, stack.base + 5, len(stack.blocks)):
        move(resident, blocks)
        same(lasting.logits(), Runs(TINY, resident, whole=True).logits())
    resident.close()


def test_threads_do_not_show(tmp_path: Path) -> None:
    folder = write_planes_model(tmp_path / "model")
    resident = load(folder, len(read_stack(folder / STACK).blocks))
    found = []
    for threads in range(1, min(2, numba.config.NUMBA_NUM_THREADS) + 1):
        numba.set_num_threads(threads)
        found += [Runs(TINY, resident, whole=True).logits() for _ in range(5)]
    for other in found[1:]:
        same(found[0], other)
    resident.close()


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", ["odd", "tied, windowed", "biases"])
def test_a_compiled_step_of_signs_is_its_operations(name: str, rank: int, tmp_path: Path) -> None:
    """Embedding and head are int8."""
    a = NETWORKS[name]
    folder = write_signs_model(tmp_path / "model", a, levels=6, rank=rank)
    stack = read_stack(folder / STACK)
    resident = load(folder, len(stack.blocks))
    for blocks in (len(stack.blocks), stack.base, stack.base + 5, len(stack.blocks)):
        move(resident, blocks)
        same(Runs(a, resident, whole=True).logits(), Runs(a, resident, whole=False).logits())
    resident.close()


@pytest.mark.parametrize("dtype", ["f16", "i8", "i4"])
@pytest.mark.parametrize("name", ["odd", "tied, windowed", "biases"])
def test_a_compiled_step_of_tiers_is_its_operations(name: str, dtype: str, tmp_path: Path) -> None:
    """At edges between tiers, and between a mask and its values."""
    a = NETWORKS[name]
    folder = write_sparse_model(tmp_path / "model", a, dtype)
    stack = read_stack(folder / STACK)
    resident = load(folder, len(stack.blocks))
    for blocks in (len(stack.blocks), stack.base, stack.base + 4, stack.base + 5, len(stack.blocks)):
        move(resident, blocks)
        same(Runs(a, resident, whole=True).logits(), Runs(a, resident, whole=False).logits())
    resident.close()
