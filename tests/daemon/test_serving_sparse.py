"""Serving from tiers of masks and values equals the dense reading of the same blocks, at every edge; what is bad is
refused.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from ebbflow.daemon.engine.dense import DenseAttention, build_network
from ebbflow.daemon.worker.served import Served
from ebbflow.formats.architecture import Architecture
from ebbflow.formats.blocks import sum_blocks
from ebbflow.formats.container import content_hash
from ebbflow.formats.errors import BadBlock
from ebbflow.formats.manifest import STACK
from ebbflow.formats.messages import Finished, Generate
from ebbflow.formats.stack import read_blocks, read_stack
from ebbflow.formats.values import Sampling

from support.engines import Answers, engine_of, finish
from support.fake_line import FakeClock
from support.residents import load, logits, move
from support.stacks import TINY, write_model, write_sparse_model

TOKENS = np.random.default_rng(0).integers(0, TINY.vocab, 40).tolist()
ODD = msgspec.structs.replace(TINY, hidden=72, heads=3, kv_heads=1, head_dim=24, intermediate=172, tied=True)
MODELS = {f"{name} {dtype}": (a, dtype) for name, a in (("tiny", TINY), ("odd", ODD)) for dtype in ("f16", "i8", "i4")}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Architecture]:
    a, dtype = MODELS[request.param]
    return write_sparse_model(tmp_path_factory.mktemp("sparse") / "model", a, dtype), a


def dense_logits(folder: Path, a: Architecture, blocks: int) -> np.ndarray:
    weights = sum_blocks(islice(read_blocks(read_stack(folder / STACK)), blocks))
    network = build_network(a, lambda name: torch.from_numpy(weights[name]))
    return network.head(network.forward(torch.tensor(TOKENS), DenseAttention(a, 1, len(TOKENS)))).numpy()


def edges(folder: Path) -> list[int]:
    """The base, an edge after a mask, one after its values, one between the tiers, and everything."""
    stack = read_stack(folder / STACK)
    return [
        stack.base,
        stack.base + 1,
        stack.base + 2,
        (stack.base + len(stack.blocks)) // 2,
        len(stack.blocks) - 1,
        len(stack.blocks),
    ]


def test_serving_equals_the_dense_reading_at_every_edge(model: tuple[Path, Architecture]) -> None:
    folder, a = model
    for blocks in edges(folder):
        expected = dense_logits(folder, a, blocks)
        resident = load(folder, blocks)
        found = logits(resident, TOKENS, a, exact=True)
        np.testing.assert_allclose(found, expected, atol=2e-5 * float(np.abs(expected).max()))
        in_bytes = logits(resident, TOKENS, a)
        assert 0 < np.abs(in_bytes - found).max() / np.abs(found).max() < 0.06
        resident.close()


def test_a_mask_alone_changes_nothing_and_its_values_do(model: tuple[Path, Architecture]) -> None:
    folder, a = model
    resident, found = load(folder, edges(folder)[0]), []
    for blocks in edges(folder)[:3]:
        move(resident, blocks)
        found.append(logits(resident, TOKENS, a))
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[1] != found[2]).any()
    resident.close()


def test_after_breathing_as_after_a_fresh_load(model: tuple[Path, Architecture]) -> None:
    folder, a = model
    fresh = {}
    for blocks in edges(folder):
        resident = load(folder, blocks)
        fresh[blocks] = logits(resident, TOKENS, a)
        resident.close()
    resident = load(folder, edges(folder)[0])
    for blocks in (*edges(folder)[::-1], *edges(folder)):
        move(resident, blocks)
        resident.check_integrity()
        np.testing.assert_array_equal(logits(resident, TOKENS, a), fresh[blocks])
    resident.close()


def test_an_engine_answers(model: tuple[Path, Architecture]) -> None:
    folder, _ = model
    resident = load(folder, edges(folder)[-1])
    answers, engine = Answers(), engine_of(folder, resident)
    for key in (1, 2):
        answers.hear(engine.submit(Generate(id=key, model="m", prompt="Once", sampling=Sampling(max_tokens=6))))
    finish(engine, answers)
    assert isinstance(answers.by_id[1].end, Finished)
    assert answers.by_id[1].text == answers.by_id[2].text
    resident.close()


def other_row(data: bytes) -> bytes:
    """A bit of the first row moves to the second."""
    words = np.frombuffer(data, "<u8").copy()
    words[0] &= words[0] - np.uint64(1)
    return words.tobytes()


SPOILT: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "a bit too few": ("mask", other_row, "ones"),
    "a bit past the columns": ("mask", lambda data: data[:7] + b"\xff" + data[8:], "ones"),
    "-128": ("values", lambda data: data[:-1] + b"\x80", "-128"),
    "a scale of NaN": ("values", lambda data: b"\0\0\xc0\x7f" + data[4:], "NaN"),
}


def place_of(blocks: list, kind: str, level: int) -> int:
    wanted = (kind, level, "layers.1.up")
    return next(i for i, (entry, _) in enumerate(blocks) if (entry.kind, entry.level, entry.tensor) == wanted)


def rewritten(folder: Path, change: Callable[[list], int]) -> Path:
    """A copy whose blocks `change` has changed; it returns how many are the base."""
    blocks = list(read_blocks(read_stack(folder / STACK)))
    return write_model(folder.parent / "changed", TINY, blocks, change(blocks))


@pytest.mark.parametrize(  # scales are in tier 0
    ("what", "level"), [(what, level) for what in SPOILT for level in (0, 1) if not (level and "scale" in what)]
)
def test_a_spoilt_block_is_not_admitted(what: str, level: int, tmp_path: Path) -> None:
    kind, spoil, message = SPOILT[what]

    def change(blocks: list) -> int:
        place = next(
            i for i, (e, _) in enumerate(blocks) if (e.kind, e.level, e.tensor) == (kind, level, "layers.1.up")
        )
        entry, data = blocks[place]
        blocks[place] = (msgspec.structs.replace(entry, hash=content_hash(spoil(data))), spoil(data))
        return base

    folder = write_sparse_model(tmp_path / "model")
    base = read_stack(folder / STACK).base
    broken = rewritten(folder, change)
    if level == 0:
        with pytest.raises(BadBlock, match=message):
            Served(broken, 0, 2, FakeClock())
        return
    served = Served(broken, 10**9, 2, FakeClock(0.0))
    with pytest.raises(BadBlock, match=message):
        served.move(1e9)
    served.resident.check_integrity()
    served.close()


def test_a_base_with_a_mask_but_not_its_values(tmp_path: Path) -> None:
    folder = write_sparse_model(tmp_path / "model")
    base = read_stack(folder / STACK).base

    def change(blocks: list) -> int:
        place = next(
            i for i, (entry, _) in enumerate(blocks) if (entry.kind, entry.tensor) == ("values", "layers.1.up")
        )
        blocks.insert(base - 1, blocks.pop(place))
        return base - 1

    with pytest.raises(BadBlock, match=r"nothing as layers\.1\.up"):
        Served(rewritten(folder, change), 0, 2, FakeClock())
