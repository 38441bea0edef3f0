"""Serving from planes equals the dense reading of the same blocks, at every depth, and repeats bit for bit."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from ebbflow.daemon.engine import engine as engine_module
from ebbflow.daemon.engine.dense import DenseAttention, build_network
from ebbflow.daemon.engine.serving import Inputs
from ebbflow.daemon.engine.tokenizer import Tokenizer
from ebbflow.daemon.settings import WorkerSettings
from ebbflow.formats.architecture import Architecture
from ebbflow.formats.blocks import rotate_rows, sum_blocks
from ebbflow.formats.manifest import STACK
from ebbflow.formats.messages import Finished, Generate
from ebbflow.formats.stack import read_blocks, read_stack
from ebbflow.formats.values import Sampling

from support.engines import Answers, engine_of, finish
from support.residents import load, logits, move
from support.stacks import TINY, write_planes_model

TOKENS = np.random.default_rng(0).integers(0, TINY.vocab, 40).tolist()
ODD = Architecture(
    family="llama",
    vocab=258,
    hidden=72,  # 64 + 8 columns: blocks of the rotation of two sizes, and a word that is not full
    layers=2,
    heads=3,
    kv_heads=1,
    head_dim=24,
    intermediate=172,
    context=512,
    norm_eps=1e-5,
    rotary_theta=10000.0,
    tied=True,
)


@pytest.fixture(scope="module", params=["tiny", "odd"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Architecture]:
    a = TINY if request.param == "tiny" else ODD
    return write_planes_model(tmp_path_factory.mktemp("planes") / "model", a), a


def dense_logits(folder: Path, a: Architecture, blocks: int) -> np.ndarray:
    weights = sum_blocks(islice(read_blocks(read_stack(folder / STACK)), blocks))
    network = build_network(a, lambda name: torch.from_numpy(weights[name]))
    found = network.head(network.forward(torch.tensor(TOKENS), DenseAttention(a, 1, len(TOKENS))))
    return found.numpy()


def depths(folder: Path) -> list[int]:
    """The base, everything, and edges between and inside the levels."""
    stack = read_stack(folder / STACK)
    return [stack.base, stack.base + 1, (stack.base + len(stack.blocks)) // 2, len(stack.blocks) - 1, len(stack.blocks)]


def test_serving_equals_the_dense_reading_at_every_depth(model: tuple[Path, Architecture]) -> None:
    folder, a = model
    for blocks in depths(folder):
        expected = dense_logits(folder, a, blocks)
        resident = load(folder, blocks)
        found = logits(resident, TOKENS, a, exact=True)
        np.testing.assert_allclose(found, expected, atol=2e-5 * float(np.abs(expected).max()))
        resident.close()


def test_an_exact_engine_computes_with_floats(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the sampler is given is the dense reading's logits; from inputs in bytes it is further away."""
    folder, found = write_planes_model(tmp_path / "model"), {}
    blocks = len(read_stack(folder / STACK).blocks)
    resident = load(folder, blocks)
    for exact in (True, False):
        given = list[np.ndarray]()
        monkeypatch.setattr(engine_module, "sample", lambda logits, *_, given=given: given.append(logits.copy()) or 1)
        monkeypatch.setattr(Tokenizer, "encode", lambda self, text: list(TOKENS))
        engine = engine_of(folder, resident, settings=WorkerSettings(exact=exact))
        answers = Answers()
        answers.hear(engine.submit(Generate(id=1, model="m", prompt="x", sampling=Sampling(max_tokens=1))))
        finish(engine, answers)
        found[exact] = given[-1]
    expected = dense_logits(folder, TINY, blocks)[-1]
    error = {exact: np.abs(logits - expected).max() / np.abs(expected).max() for exact, logits in found.items()}
    assert error[True] < 1e-3 < error[False] < 0.1  # keys and values are fp16
    resident.close()


def test_depths_differ(model: tuple[Path, Architecture]) -> None:
    """Else the comparison above compares nothing."""
    folder, a = model
    found = [dense_logits(folder, a, blocks) for blocks in depths(folder)]
    assert all(np.abs(one - other).max() > 1e-3 for i, one in enumerate(found) for other in found[:i])


def test_after_breathing_as_after_a_fresh_load(model: tuple[Path, Architecture]) -> None:
    folder, a = model
    fresh = {}
    for blocks in depths(folder):
        resident = load(folder, blocks)
        fresh[blocks] = logits(resident, TOKENS, a)
        resident.close()
    resident = load(folder, depths(folder)[0])
    for blocks in (*depths(folder)[::-1], *depths(folder)):
        move(resident, blocks)
        resident.check_integrity()
        np.testing.assert_array_equal(logits(resident, TOKENS, a), fresh[blocks])
    resident.close()


def test_an_engine_answers_at_every_depth(model: tuple[Path, Architecture]) -> None:
    folder, _ = model
    texts = set()
    for blocks in depths(folder):
        resident = load(folder, blocks)
        answers, engine = Answers(), engine_of(folder, resident)
        for key in (1, 2):
            answers.hear(engine.submit(Generate(id=key, model="m", prompt="Once", sampling=Sampling(max_tokens=12))))
        finish(engine, answers)
        assert isinstance(answers.by_id[1].end, Finished)
        assert answers.by_id[1].text == answers.by_id[2].text
        texts.add(answers.by_id[1].text)
        resident.close()
    assert len(texts) > 1


def test_linears_that_read_one_input_share_what_was_made_of_it() -> None:
    inputs, x = Inputs(72, 1), np.random.default_rng(1).standard_normal((3, 72)).astype(np.float32)
    once = inputs.rotated(x)
    assert once.shape == (3, 128)
    assert inputs.rotated(x) is once
    np.testing.assert_allclose(once[:, :72], rotate_rows(x), atol=1e-6)
    assert not once[:, 72:].any()
    np.testing.assert_allclose(inputs.rotated(2 * x), 2 * once, atol=1e-6)
    rows = np.ascontiguousarray(once[:, :72])
    inputs.rotate_back(rows)
    np.testing.assert_allclose(rows, x, atol=1e-5)
    bytes_ = inputs.quantized(x)
    assert inputs.quantized(x) is bytes_
    assert inputs.quantized(2 * x) is not bytes_
    assert bytes_.q.ctypes.data % 64 == 0


def test_inputs_in_bytes_are_close_to_exact_ones(model: tuple[Path, Architecture]) -> None:
    folder, a = model
    for blocks in depths(folder):
        resident = load(folder, blocks)
        exact, rounded = (logits(resident, TOKENS, a, exact=exact) for exact in (True, False))
        difference = np.abs(rounded - exact).max() / np.abs(exact).max()
        assert 0 < difference < 0.06
        resident.close()
