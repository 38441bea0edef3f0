"""A checkpoint as llama.cpp quantises it with an importance matrix, read back under our names.

Only weights differ from the original when they are compared: everything runs in our own forward pass.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import gguf
import torch
from torch import Tensor

from ebbflow.daemon.engine.dense import build_network
from ebbflow.daemon.library.measure import Original
from ebbflow.formats.architecture import Architecture, weight_shapes
from ebbflow.formats.checkpoint import Checkpoint

from llama import programs

_OUTER: Final = {"embed": "token_embd", "final_norm": "output_norm", "head": "output"}
_PARTS: Final = {
    "attention_norm": "attn_norm", "mlp_norm": "ffn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v",
    "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


@dataclass(frozen=True)
class Quantised:
    """Weights in float32, and for each the bytes of its data in the file and the name of its type."""

    weights: dict[str, Tensor]
    nbytes: dict[str, int]
    types: dict[str, str]

    def summary(self, names: Container[str]) -> str:
        """How many of these tensors have which type."""
        counts = Counter(kind for name, kind in self.types.items() if name in names)
        return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def quantise(checkpoint: Checkpoint, tokens: Tensor, types: tuple[str, ...]) -> dict[str, Quantised]:
    """`checkpoint` in each of llama.cpp's file types; the importance matrix is measured on `tokens [S, L]`.

    The files are made once and kept beside the programs.
    """
    made_from = checkpoint.checksum().encode() + tokens.numpy().tobytes()
    folder = programs().parent / hashlib.blake2b(made_from, digest_size=16).hexdigest()
    folder.mkdir(exist_ok=True)
    source, matrix = folder / "source.gguf", folder / "imatrix.gguf"
    if not matrix.exists():
        write_gguf(checkpoint, source)
        _measure_importance(checkpoint, source, matrix, tokens)
    found = {}
    for name in types:
        path, partial = folder / f"{name}.gguf", folder / f"{name}.partial"
        if not path.exists():
            _run("llama-quantize", "--imatrix", matrix, source, partial, name)
            partial.rename(path)
        found[name] = read_gguf(checkpoint.architecture, path)
    return found


def write_gguf(checkpoint: Checkpoint, path: Path) -> None:
    """Write a plain Llama model in float32; its vocabulary is `_piece` of every id, so that any ids can be fed."""
    a = checkpoint.architecture
    assert not (a.qkv_bias or a.output_bias or a.mlp_bias or a.qk_norm or a.rotary_scaling or a.window)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(a.vocab)
    writer.add_context_length(a.context)
    writer.add_embedding_length(a.hidden)
    writer.add_block_count(a.layers)
    writer.add_feed_forward_length(a.intermediate)
    writer.add_head_count(a.heads)
    writer.add_head_count_kv(a.kv_heads)
    writer.add_key_length(a.head_dim)
    writer.add_value_length(a.head_dim)
    writer.add_rope_dimension_count(a.head_dim)
    writer.add_rope_freq_base(a.rotary_theta)
    writer.add_layer_norm_rms_eps(a.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([_piece(token) for token in range(a.vocab)])
    writer.add_token_types([gguf.TokenType.USER_DEFINED] * a.vocab)
    writer.add_token_merges(["a b"])  # never met; a list may not be empty
    writer.add_add_bos_token(False)
    for name in weight_shapes(a):
        weight = checkpoint.tensor(name)
        writer.add_tensor(_gguf_name(name), _interleaved(weight, name, a).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(a: Architecture, path: Path) -> Quantised:
    """The tensors of a file under our names, in the order of rows that we use."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    ours = {name: tensors.pop(_gguf_name(name)) for name in weight_shapes(a)}
    assert not tensors, f"{path} holds {', '.join(tensors)}, which the model does not have"
    weights = {}
    for name, shape in weight_shapes(a).items():
        weight = torch.tensor(gguf.dequantize(ours[name].data, ours[name].tensor_type))
        weights[name] = _separated(weight.reshape(shape), name, a)
    return Quantised(
        weights,
        {name: int(tensor.n_bytes) for name, tensor in ours.items()},
        {name: tensor.tensor_type.name for name, tensor in ours.items()},
    )


def _measure_importance(checkpoint: Checkpoint, source: Path, matrix: Path, tokens: Tensor) -> None:
    """Feed exactly these ids, a chunk for each stream, and see that llama.cpp computes what we do."""
    text = matrix.with_suffix(".txt")
    text.write_text("".join(_piece(token) for token in tokens.flatten().tolist()))
    length = tokens.shape[1]
    partial = matrix.with_suffix(".partial.gguf")
    printed = _run("llama-imatrix", "-m", source, "-f", text, "-o", partial, "-c", str(length))
    theirs = re.search(r"Final estimate: PPL = ([0-9.]+)", printed)
    network = build_network(checkpoint.architecture, checkpoint.tensor)
    loss = Original(checkpoint, tokens).compare(network).loss.reshape(-1, length - 1)
    ours = float(loss[:, length // 2 :].mean().exp())  # the second half of each stream, as theirs
    if theirs is None or abs(float(theirs[1]) / ours - 1) > 0.01:
        raise RuntimeError(f"perplexity {theirs and theirs[1]} in llama.cpp, {ours:.4f} here:\n{printed[-2000:]}")
    partial.rename(matrix)


def _run(program: str, *arguments: str | Path) -> str:
    """What it printed. Raises `RuntimeError` with it when the program fails."""
    command = [programs() / program, *arguments]
    patient = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that spin starve each other on a busy machine
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=patient
    )
    if done.returncode:
        raise RuntimeError(f"{program} failed:\n{done.stdout[-2000:]}")
    return done.stdout


def _piece(token: int) -> str:
    """A token's text: of one length, so that no piece lies within two others."""
    return f"<{token:06}>"


def _gguf_name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name] + ".weight"
    _, layer, part = name.split(".")
    return f"blk.{layer}.{_PARTS[part]}.weight"


def _interleaved(weight: Tensor, name: str, a: Architecture) -> Tensor:
    """Rows of q and k as llama.cpp rotates them, neighbours in pairs; ours rotate halves of a head."""
    if name.split(".")[-1] not in ("q", "k"):
        return weight
    return weight.reshape(-1, 2, a.head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _separated(weight: Tensor, name: str, a: Architecture) -> Tensor:
    """The inverse of `_interleaved`."""
    if name.split(".")[-1] not in ("q", "k"):
        return weight
    return weight.reshape(-1, a.head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
