"""Tiny random checkpoints of every supported family, written by transformers' own classes, with a byte-level tokenizer.

Weights are large enough that logits differ clearly between tokens, and norms and biases are random too, so that a
mistake in any of them shows.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

# On a busy machine a second thread made each tiny matrix product wait 20 ms: 22 s instead of 7 for the oracle tests.
torch.set_num_threads(1)

BOS, EOS = 0, 1
VOCAB = 258  # <s>, </s> and one token for each byte

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.12,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": _LLAMA3_ROPE}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "smollm": (
        "Llama",
        {"hidden_size": 72, "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
}
FAMILIES = tuple(_FAMILIES)


def write_tiny_model(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str = "1GB",
    **config_overrides: Any,
) -> Path:
    """A random checkpoint of `family` in `folder` (made if missing); `-> folder`.

    `config_overrides` are fields of the family's transformers configuration class. A small `max_shard_size` such as
    `40KB` makes a sharded checkpoint.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    class_name, family_fields = _FAMILIES[family]
    config = getattr(transformers, class_name + "Config")(**(_COMMON | family_fields | config_overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, class_name + "ForCausalLM")(config).to(getattr(torch, dtype))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """`tokenizer.json` (bytes are tokens 2 to 257, `<s>` before every text) and `tokenizer_config.json`."""
    (folder / "tokenizer.json").write_text(_tokenizer_json())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@cache
def _tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": BOS, "</s>": EOS} | {letter: 2 + i for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer.to_str()
