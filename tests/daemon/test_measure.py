from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ebbflow.daemon.engine.dense import DenseAttention, build_network
from ebbflow.daemon.library.calibrate import sample_tokens
from ebbflow.daemon.library.measure import Original, measure_curve, prefix_qualities, quality
from ebbflow.formats.architecture import weight_shapes, weight_uses
from ebbflow.formats.blocks import pack_dense, pack_signs, sum_blocks
from ebbflow.formats.checkpoint import Checkpoint, open_checkpoint
from ebbflow.formats.container import content_hash
from ebbflow.formats.errors import BadBlock
from ebbflow.formats.index import BlockEntry, StackIndex
from ebbflow.formats.stack import Stack, read_blocks, read_stack, write_stack

from support.tiny_models import write_tiny_model


def write_test_stack(checkpoint: Checkpoint, path: Path) -> Stack:
    """Int8 weights as the base, then for every matrix one block of signs that repairs some of the rounding."""
    a = checkpoint.architecture
    base: list[tuple[BlockEntry, bytes]] = []
    residual: list[tuple[BlockEntry, bytes]] = []
    for name, shape in weight_shapes(a).items():
        weight = checkpoint.tensor(name).numpy()
        dtype = "i8" if len(shape) == 2 else "f32"
        payload = pack_dense(weight, dtype)
        base.append((entry(name, 0, shape, payload, weight_uses(a, name), kind="dense", dtype=dtype), payload))
        if len(shape) == 2:
            rest = weight - sum_blocks([base[-1]])[name]
            u = np.abs(rest).mean(axis=1, keepdims=True).astype(np.float16)
            payload = pack_signs(rest > 0, u, np.ones((1, shape[1]), np.float16))
            residual.append((entry(name, 1, shape, payload, weight_uses(a, name), kind="signs", rank=1), payload))
    blocks = base + residual
    write_stack(path, StackIndex(len(base), tuple(e for e, _ in blocks)), lambda i: blocks[i][1])
    return read_stack(path)


def entry(
    name: str,
    level: int,
    shape: tuple[int, ...],
    payload: bytes,
    uses: tuple[str, ...],
    *,
    kind: str,
    dtype: str = "",
    rank: int = 0,
) -> BlockEntry:
    return BlockEntry(
        kind=kind,
        tensor=name,
        level=level,
        shape=shape,
        nbytes=len(payload),
        gain=1.0,
        hash=content_hash(payload),
        uses=uses,
        dtype=dtype,
        rank=rank,
    )


def logits(checkpoint: Checkpoint, weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    network = build_network(checkpoint.architecture, weights.__getitem__)
    return network.head(network.forward(tokens.flatten(), DenseAttention(checkpoint.architecture, *tokens.shape)))


@pytest.mark.parametrize("family", ["llama", "smollm"])
def test_the_curve_equals_whole_models_compared_one_by_one(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path / "source", family))
    stack = write_test_stack(checkpoint, tmp_path / "stack.safetensors")
    tokens = sample_tokens(checkpoint, streams=3, length=20)
    counts = [stack.base + 3, stack.base, len(stack.blocks)]
    points = measure_curve(checkpoint, stack, tokens, counts)

    original = logits(checkpoint, {n: checkpoint.tensor(n) for n in weight_shapes(checkpoint.architecture)}, tokens)
    p = original.double().softmax(-1).unflatten(0, (3, 20))[:, :-1]
    for count, point in zip(counts, points, strict=True):
        weights = sum_blocks(list(read_blocks(stack))[:count])
        q = logits(checkpoint, {n: torch.from_numpy(w) for n, w in weights.items()}, tokens).double().softmax(-1)
        q = q.unflatten(0, (3, 20))[:, :-1]
        assert (point.blocks, point.nbytes) == (count, stack.edges[count])
        assert point.kl == pytest.approx(float((p * (p.log() - q.log())).sum(-1).mean()), rel=1e-3)
        chosen = q.gather(-1, tokens[:, 1:, None])
        assert point.perplexity == pytest.approx(math.exp(float(-chosen.log().mean())), rel=1e-5)
    assert 0 < points[2].kl < points[1].kl < 0.1


def test_tensors_left_exact_are_the_original_s(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path / "source"))
    stack = write_test_stack(checkpoint, tmp_path / "stack.safetensors")
    tokens = sample_tokens(checkpoint, streams=2, length=20)
    original, names = Original(checkpoint, tokens), set(weight_shapes(checkpoint.architecture))
    counts = [stack.base, len(stack.blocks)]
    ((_, nothing),) = prefix_qualities(original, checkpoint, stack, counts[:1], names)
    assert float(nothing.kl.max()) < 1e-9
    small, large = (found for _, found in prefix_qualities(original, checkpoint, stack, counts, names - {"layers.0.q"}))
    ((_, whole),) = prefix_qualities(original, checkpoint, stack, counts[:1])
    assert 0 < large.mean_kl < small.mean_kl < whole.mean_kl


def test_no_sizes_give_no_points(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path / "source"))
    stack = write_test_stack(checkpoint, tmp_path / "stack.safetensors")
    assert measure_curve(checkpoint, stack, torch.zeros((1, 4), dtype=torch.int64), []) == ()


def test_a_damaged_block_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path / "source"))
    stack = write_test_stack(checkpoint, tmp_path / "stack.safetensors")
    data = bytearray(stack.path.read_bytes())
    data[stack.data_start + 1] ^= 1
    stack.path.write_bytes(data)
    with pytest.raises(BadBlock, match="hash"):
        measure_curve(checkpoint, stack, torch.zeros((1, 4), dtype=torch.int64), [stack.base])


def test_quality_of_a_model_against_itself_and_against_a_known_distribution() -> None:
    fair, biased = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    target = torch.tensor([1])
    same = quality(biased, biased + 7, target)
    assert same.mean_kl == pytest.approx(0, abs=1e-12)
    assert same.perplexity == pytest.approx(10)
    other = quality(fair, biased, target)
    assert other.mean_kl == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-6)


def test_an_impossible_target_gives_a_finite_perplexity() -> None:
    found = quality(torch.zeros(1, 2), torch.tensor([[0.0, -5000.0]]), torch.tensor([1]))
    assert math.isfinite(found.perplexity)
