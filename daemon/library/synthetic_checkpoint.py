"""A random checkpoint: a Hugging Face folder of the Llama family, bf16, as a source for `ebb add`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...formats.architecture import Architecture, weight_shapes
from ...formats.checkpoint import INDEX, WEIGHTS, source_name
from .synthetic_tokenizer import BOS, EOS, write_tokenizer

DEVIATION: Final = 0.02
ONE_FILE_NBYTES: Final = 2 * 10**9
SHARD_NBYTES: Final = 10**9


def write_checkpoint(a: Architecture, folder: Path, *, seed: int = 0) -> None:
    """Write a random model of shape `a` into `folder` (made if missing); over 2 GB in several files of up to 1 GB."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, a.vocab)
    (folder / "config.json").write_text(json.dumps(config(a), indent=1))
    generator = torch.Generator().manual_seed(seed)
    shards = list(_shards(a))
    where: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = WEIGHTS if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        weights = {source_name(name): _weight(name, weight_shapes(a)[name], generator) for name in names}
        save_file(weights, folder / file, {"format": "pt"})
        where |= dict.fromkeys(weights, file)
    if len(shards) > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def config(a: Architecture) -> dict[str, Any]:
    """The `config.json` of a Llama of that shape."""
    scaling = a.rotary_scaling
    rope = scaling and {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": a.activation,
        "torch_dtype": "bfloat16",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "vocab_size": a.vocab,
        "hidden_size": a.hidden,
        "intermediate_size": a.intermediate,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "max_position_embeddings": a.context,
        "rms_norm_eps": a.norm_eps,
        "rope_theta": a.rotary_theta,
        "rope_scaling": rope,
        "tie_word_embeddings": a.tied,
    }


def _shards(a: Architecture) -> Iterator[list[str]]:
    """Names of the tensors in each weight file."""
    sizes = {name: 2 * prod(shape) for name, shape in weight_shapes(a).items()}
    limit = ONE_FILE_NBYTES if sum(sizes.values()) <= ONE_FILE_NBYTES else SHARD_NBYTES
    names: list[str] = []
    for name, nbytes in sizes.items():
        if names and sum(sizes[n] for n in names) + nbytes > limit:
            yield names
            names = []
        names.append(name)
    yield names


def _weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith("norm"):
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator).mul_(DEVIATION).bfloat16()
