from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ebbflow.daemon.engine.dense import DenseAttention, KVCache, build_network
from ebbflow.daemon.engine.network import Network
from ebbflow.daemon.engine.rotary import rotary_frequencies
from ebbflow.formats.checkpoint import Checkpoint, open_checkpoint

from support.tiny_models import VOCAB, write_tiny_model

BATCH, LENGTH = 2, 40
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama without grouping": ("llama", {"num_key_value_heads": 4}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama linear rope": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "llama wide heads": ("llama", {"head_dim": 24}),
    "llama bf16": ("llama", {"dtype": "bfloat16"}),
    "llama fp16 sharded": ("llama", {"dtype": "float16", "max_shard_size": "40KB"}),
    "llama3": ("llama3", {}),
    "mistral": ("mistral", {}),
    "mistral without window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 untied, windowed": (
        "qwen2",
        {"tie_word_embeddings": False, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
    "smollm": ("smollm", {}),
}


def oracle_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens).logits.flatten(0, 1)


def random_tokens(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(VOCAB, (BATCH, length), generator=torch.Generator().manual_seed(5))


def dense(folder: Path) -> tuple[Checkpoint, Network[torch.Tensor]]:
    checkpoint = open_checkpoint(folder)
    return checkpoint, build_network(checkpoint.architecture, checkpoint.tensor)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant: str, tmp_path: Path) -> None:
    family, overrides = VARIANTS[variant]
    folder = write_tiny_model(tmp_path, family, **overrides)
    tokens = random_tokens()
    checkpoint, network = dense(folder)
    hidden = network.forward(tokens.flatten(), DenseAttention(checkpoint.architecture, BATCH, LENGTH))
    expected = oracle_logits(folder, tokens)
    assert expected.std() > 0.5
    torch.testing.assert_close(network.head(hidden), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3"])
@pytest.mark.parametrize("steps", [[1] * 12, [5, 1, 1, 4, 1]])
def test_decoding_with_a_cache_equals_the_whole_forward_pass(family: str, steps: list[int], tmp_path: Path) -> None:
    checkpoint, network = dense(write_tiny_model(tmp_path, family))
    length = sum(steps)
    tokens = random_tokens(length)
    whole = network.forward(tokens.flatten(), DenseAttention(checkpoint.architecture, BATCH, length))
    cache = KVCache(checkpoint.architecture, BATCH, length)
    parts, start = [], 0
    for step in steps:
        hidden = network.forward(tokens[:, start : start + step].flatten(), cache.step(step))
        parts.append(hidden.unflatten(0, (BATCH, step)))
        start += step
    torch.testing.assert_close(torch.cat(parts, dim=1).flatten(0, 1), whole, atol=1e-5, rtol=1e-5)


def test_gradients_flow_to_the_embedding(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path, "qwen3"))
    leaves: dict[str, torch.Tensor] = {}

    def tensor(name: str) -> torch.Tensor:
        return leaves.setdefault(name, checkpoint.tensor(name).requires_grad_())

    network = build_network(checkpoint.architecture, tensor)
    hidden = network.forward(random_tokens().flatten(), DenseAttention(checkpoint.architecture, BATCH, LENGTH))
    network.head(hidden).logsumexp(-1).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.abs().max() > 0 for leaf in leaves.values())


@pytest.mark.parametrize("overrides", [{}, {"rope_parameters": LINEAR_ROPE}, None])
def test_rotary_frequencies_equal_transformers(overrides: dict[str, Any] | None, tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    folder = (
        write_tiny_model(tmp_path, "llama3", head_dim=64)
        if overrides is None
        else write_tiny_model(tmp_path, "llama", head_dim=64, **overrides)
    )
    expected = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder)).inv_freq
    found = torch.tensor(rotary_frequencies(open_checkpoint(folder).architecture))
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
