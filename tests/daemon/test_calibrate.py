from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ebbflow.daemon.engine.dense import DenseAttention, build_network
from ebbflow.daemon.library import calibrate
from ebbflow.daemon.library.calibrate import LinearMoments, encode_calibration, layer_moments, sample_tokens
from ebbflow.daemon.library.measure import quality
from ebbflow.formats.checkpoint import Checkpoint, open_checkpoint
from ebbflow.formats.errors import CorruptCheckpoint, CorruptFile, InvalidRequest

from support.tiny_models import BOS, EOS, VOCAB, write_tiny_model

SOURCE_LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def all_moments(checkpoint: Checkpoint, tokens: torch.Tensor, vocabulary: bool = False) -> dict[str, LinearMoments]:
    layers = layer_moments(checkpoint, tokens, vocabulary=vocabulary)
    return {name: found for _, layer in layers for name, found in layer.items()}


def transformers_activations(
    folder: Path, tokens: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs of every linear `[S, L, n]`, and gradients of the log-probability of drawn tokens at its output."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            inputs[name], outputs[name] = args[0].detach(), output
            output.retain_grad()

        return hook

    for index, layer in enumerate(model.model.layers):
        for role, path in SOURCE_LINEARS.items():
            layer.get_submodule(path).register_forward_hook(keep(f"layers.{index}.{role}"))
    logits = model(tokens).logits.flatten(0, 1)
    targets = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(0))
    logits.log_softmax(-1).gather(1, targets).sum().backward()
    return inputs, {name: output.grad for name, output in outputs.items()}  # type: ignore[misc]


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "qwen3"])
def test_moments_equal_those_of_transformers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "CHUNK_TOKENS", 50)  # two streams at a time, and the last one alone
    folder = write_tiny_model(tmp_path, family)
    checkpoint = open_checkpoint(folder)
    tokens = sample_tokens(checkpoint, streams=5, length=24)
    moments = all_moments(checkpoint, tokens)
    inputs, gradients = transformers_activations(folder, tokens)
    assert set(moments) == set(inputs)
    for name, found in moments.items():
        x = inputs[name].flatten(0, 1)
        torch.testing.assert_close(found.inputs, x.T @ x / len(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.scale, inputs[name].norm(dim=1).mean(0) + 1e-3, atol=1e-4, rtol=1e-4)
        expected = gradients[name].flatten(0, 1).square().mean(0)
        torch.testing.assert_close(found.gradient, expected, atol=float(expected.max()) * 1e-3, rtol=1e-3)


def test_linears_that_read_the_same_share_one_moment(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path))
    moments = all_moments(checkpoint, sample_tokens(checkpoint, streams=2, length=8))
    at = "layers.1."
    assert moments[at + "q"].inputs is moments[at + "k"].inputs is moments[at + "v"].inputs
    assert moments[at + "gate"].inputs is moments[at + "up"].inputs
    assert moments[at + "q"].inputs is not moments[at + "o"].inputs


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "layers.0.v"),
        ("llama", "layers.0.down"),
        ("llama", "layers.1.q"),
        ("llama", "embed"),
        ("llama", "head"),
        ("smollm", "embed"),  # tied
    ],
)
def test_moments_predict_the_kl_of_a_small_error(family: str, name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path, family))
    tokens = sample_tokens(checkpoint, streams=32, length=32)
    found = all_moments(checkpoint, tokens, vocabulary=True)[name]
    weight = checkpoint.tensor(name)
    error = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * weight.std() * 0.02
    predicted = 0.5 * float((found.gradient * torch.einsum("rn,nk,rk->r", error, found.inputs, error)).sum())

    def logits(change: torch.Tensor | float) -> torch.Tensor:
        a = checkpoint.architecture
        network = build_network(a, lambda n: checkpoint.tensor(n) + (change if n == name else 0))
        return network.head(network.forward(tokens.flatten(), DenseAttention(a, *tokens.shape)))

    measured = quality(logits(0.0), logits(error), tokens.flatten()).mean_kl
    assert measured > 1e-6
    assert 0.6 < predicted / measured < 1.7


def test_moments_hold_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path, num_hidden_layers=3))
    tokens = sample_tokens(checkpoint, streams=2, length=8)
    loaded: list[tuple[str, weakref.ref[torch.Tensor]]] = []
    read = Checkpoint.tensor

    def watched(self: Checkpoint, name: str) -> torch.Tensor:
        weights = read(self, name)
        loaded.append((name, weakref.ref(weights)))
        alive = {name.split(".")[1] if "." in name else "outer" for name, held in loaded if held() is not None}
        assert len(alive) == 1, f"{alive} are in memory at once"
        return weights

    monkeypatch.setattr(Checkpoint, "tensor", watched)
    for index, _ in layer_moments(checkpoint, tokens):
        assert all(held() is None for _, held in loaded), f"weights are held after layer {index}"
    assert len(loaded) > 3 * 3 * 7


def test_moments_of_a_layer_are_forgotten_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path))
    steps = layer_moments(checkpoint, sample_tokens(checkpoint, streams=2, length=8))
    held = weakref.ref(next(steps)[1]["layers.0.down"].inputs)
    alive: list[bool] = []
    read = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: alive.append(held() is not None) or read(self, name))
    assert next(steps)[0] == 1
    assert alive and not any(alive)


def test_moments_tell_their_progress(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path, num_hidden_layers=3))
    tokens = sample_tokens(checkpoint, streams=2, length=8)
    seen: list[tuple[str, int, int]] = []
    assert next(layer_moments(checkpoint, tokens, lambda *step: seen.append(step)))[0] == 0
    assert seen == [("gradients", i, 6) for i in range(1, 7)] + [("moments", 1, 3)]


@pytest.mark.parametrize(("shape", "expected"), [((40, 16), (4, 16)), ((3, 16), (3, 16)), ((2, 100), (1, 64))])
def test_gradients_use_evenly_chosen_streams(
    shape: tuple[int, int], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "GRADIENT_TOKENS", 64)
    tokens = torch.arange(shape[0])[:, None].expand(shape)
    chosen = calibrate._subset(tokens)
    assert chosen.shape == expected
    assert len(set(chosen[:, 0].diff().tolist())) <= 1


def test_the_same_seed_gives_the_same_tokens_and_moments(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path))
    state = torch.get_rng_state()
    tokens = sample_tokens(checkpoint, streams=4, length=16, seed=3)
    assert torch.equal(tokens, sample_tokens(checkpoint, streams=4, length=16, seed=3))
    assert not torch.equal(tokens, sample_tokens(checkpoint, streams=4, length=16, seed=4))
    first, second = all_moments(checkpoint, tokens), all_moments(checkpoint, tokens)
    assert all(torch.equal(first[name].gradient, second[name].gradient) for name in first)
    assert torch.equal(torch.get_rng_state(), state)


def test_streams_begin_with_bos_and_never_end(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path))
    seen: list[tuple[str, int, int]] = []
    tokens = sample_tokens(checkpoint, streams=8, length=40, progress=lambda *step: seen.append(step))
    assert tokens.shape == (8, 40) and tokens.dtype == torch.int64
    assert bool((tokens[:, 0] == BOS).all())
    assert bool(((tokens[:, 1:] != BOS) & (tokens[:, 1:] != EOS)).all())
    assert len({tuple(row) for row in tokens.tolist()}) == 8
    assert seen[-1] == ("sample", 40, 40)


def test_streams_begin_anywhere_without_bos(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, bos_token_id=None)
    (folder / "generation_config.json").unlink()
    tokens = sample_tokens(open_checkpoint(folder), streams=8, length=2)
    assert len(set(tokens[:, 0].tolist())) > 4


def test_sampling_follows_the_models_distribution(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_model(tmp_path, initializer_range=0.3))
    tokens = sample_tokens(checkpoint, streams=64, length=48)
    network = build_network(checkpoint.architecture, checkpoint.tensor)
    logits = network.head(network.forward(tokens.flatten(), DenseAttention(checkpoint.architecture, *tokens.shape)))
    logits[:, [BOS, EOS]] = -torch.inf
    after_hot = slice(calibrate.HOT_TOKENS, -1)
    log_p = logits.log_softmax(-1).unflatten(0, (64, 48))[:, after_hot]
    surprise = -log_p.gather(-1, tokens[:, calibrate.HOT_TOKENS + 1 :, None]).mean()
    entropy = -(log_p.exp() * log_p.clamp(min=-1e9)).sum(-1).mean()
    assert float(surprise) == pytest.approx(float(entropy), rel=0.05)


def test_lengths_are_cut_to_the_context_and_to_the_most_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "MAX_TOKENS", 100)
    checkpoint = open_checkpoint(write_tiny_model(tmp_path, max_position_embeddings=16))
    assert sample_tokens(checkpoint, streams=64, length=500).shape == (6, 16)


def test_weights_that_overflow_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 1e38
    weights["model.layers.0.mlp.up_proj.weight"] *= 1e30
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CorruptCheckpoint, match="not finite"):
        sample_tokens(checkpoint, streams=2, length=4)
    with pytest.raises(CorruptCheckpoint, match="not finite"):
        next(iter(layer_moments(checkpoint, torch.zeros((2, 4), dtype=torch.int64))))


def test_a_calibration_file_becomes_streams_over_all_of_it(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    text = "".join(chr(97 + i * 26 // 5000) for i in range(5000))
    (tmp_path / "text").write_text(text)
    tokens = encode_calibration(folder, tmp_path / "text", 101, streams=11, bos=BOS)
    assert tokens.shape == (11, 101) and tokens.dtype == torch.int64
    assert bool((tokens[:, 0] == BOS).all()) and int(tokens.max()) < VOCAB
    first, last = int(tokens[0, 1]), int(tokens[-1, -1])
    assert last - first == 25  # from the first a to the last z
    assert encode_calibration(folder, tmp_path / "text", 100, bos=None).shape == (50, 100)


@pytest.mark.parametrize("content", [b"too short", b"\xff" * 5000])
def test_a_calibration_file_without_enough_text_is_refused(content: bytes, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(InvalidRequest, match="calibration file"):
        encode_calibration(folder, tmp_path / "text", 64, bos=None)


def test_a_missing_calibration_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be read"):
        encode_calibration(write_tiny_model(tmp_path / "model"), tmp_path / "none", 64, bos=None)


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    (tmp_path / "text").write_text("x" * 2000)
    with pytest.raises(CorruptFile, match=r"tokenizer\.json"):
        encode_calibration(folder, tmp_path / "text", 64, bos=None)
