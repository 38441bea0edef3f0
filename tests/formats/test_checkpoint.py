from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ebbflow.formats import checkpoint as checkpoint_module
from ebbflow.formats.architecture import RotaryScaling, weight_shapes
from ebbflow.formats.checkpoint import INDEX, WEIGHTS, open_checkpoint
from ebbflow.formats.errors import CorruptCheckpoint, UnsupportedModel
from ebbflow.formats.huggingface import SUPPORTED, read_architecture

from support.tiny_models import FAMILIES, write_tiny_model

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("pristine"))


@pytest.fixture(scope="module")
def pristine_sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("pristine"), max_shard_size="60KB")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def sharded(pristine_sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine_sharded, tmp_path / "sharded"))


def change(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    document = json.loads(path.read_text())
    for name, value in fields.items():
        document.pop(name, None)
        if value is not None:
            document[name] = value
    path.write_text(json.dumps(document))


def change_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


# -- what can be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_every_family_is_found(family: str, tmp_path: Path) -> None:
    found = open_checkpoint(write_tiny_model(tmp_path, family))
    for name, shape in weight_shapes(found.architecture).items():
        weights = found.tensor(name)
        assert weights.dtype == torch.float32 and tuple(weights.shape) == shape, name


def test_the_families_differ_as_they_should(tmp_path: Path) -> None:
    found = {family: read_architecture(write_tiny_model(tmp_path / family, family)) for family in FAMILIES}
    assert [found[f].family for f in FAMILIES] == ["llama", "llama", "mistral", "qwen2", "qwen3", "llama"]
    assert {f for f in FAMILIES if found[f].tied} == {"qwen2", "qwen3", "smollm"}
    assert {f for f in FAMILIES if found[f].qkv_bias} == {"qwen2"}
    assert {f for f in FAMILIES if found[f].qk_norm} == {"qwen3"}
    assert {f for f in FAMILIES if found[f].window} == {"mistral"}
    assert found["qwen3"].head_dim == 32 and found["qwen2"].head_dim == 16
    assert found["llama3"].rotary_scaling == RotaryScaling(kind="llama3", factor=8.0, original_context=32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_come_as_float32_from_every_number_type(dtype: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, dtype=dtype)
    stored = load_file(folder / WEIGHTS)
    found = open_checkpoint(folder)
    assert torch.equal(found.tensor("layers.1.down"), stored["model.layers.1.mlp.down_proj.weight"].float())
    assert found.nbytes == sum(weights.nbytes for weights in stored.values())


def test_shards_hold_the_same_model(folder: Path, sharded: Path) -> None:
    one, many = open_checkpoint(folder), open_checkpoint(sharded)
    assert len(many.files) > 5
    assert many.nbytes == one.nbytes
    assert all(torch.equal(one.tensor(name), many.tensor(name)) for name in weight_shapes(one.architecture))


def test_a_tied_model_may_still_hold_a_head(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, "smollm")
    before = open_checkpoint(folder).nbytes
    change_weights(folder, lambda w: w.__setitem__("lm_head.weight", torch.zeros(3)))
    found = open_checkpoint(folder)
    assert found.nbytes == before
    assert "head" not in weight_shapes(found.architecture)


def test_old_rotary_buffers_are_ignored(folder: Path) -> None:
    change_weights(folder, lambda w: w.__setitem__("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(8)))
    open_checkpoint(folder)


def test_weights_outlive_their_file(folder: Path) -> None:
    found = open_checkpoint(folder)
    weights = found.tensor("embed")
    copy = weights.clone()
    (folder / WEIGHTS).write_bytes(b"\0" * (folder / WEIGHTS).stat().st_size)
    assert torch.equal(weights, copy)


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 5e5}}, 5e5, None),
        ({"rope_theta": 5e5}, 5e5, None),
        ({}, 1e4, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 1e4, RotaryScaling(kind="linear", factor=2.0)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            5e5,
            RotaryScaling(kind="llama3", factor=8.0, original_context=64),
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            5e5,
            RotaryScaling(kind="llama3", factor=8.0, original_context=64),
        ),
    ],
)
def test_both_spellings_of_rotary_settings(
    fields: dict[str, Any], theta: float, scaling: RotaryScaling | None, folder: Path
) -> None:
    change(folder / "config.json", **({"rope_parameters": None} | fields))
    found = read_architecture(folder)
    assert (found.rotary_theta, found.rotary_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"sliding_window": 64}, None),
        ({"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, None),
        ({"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0}, 64),
        ({"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 0}, None),
        ({"sliding_window": 64, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 64),
    ],
)
def test_qwen_windows(fields: dict[str, Any], window: int | None, folder: Path) -> None:
    change(folder / "config.json", model_type="qwen2", **fields)
    assert read_architecture(folder).window == window


@pytest.mark.parametrize(
    ("config", "generation", "bos", "eos"),
    [
        ({"bos_token_id": 3, "eos_token_id": 4}, {"bos_token_id": 5, "eos_token_id": [6, 7]}, 5, (6, 7)),
        ({"bos_token_id": 3, "eos_token_id": [4]}, {"bos_token_id": None, "eos_token_id": None}, 3, (4,)),
        ({"bos_token_id": 3, "eos_token_id": 4}, None, 3, (4,)),
        ({"bos_token_id": None, "eos_token_id": None}, None, None, ()),
    ],
)
def test_special_tokens(
    config: dict[str, Any], generation: dict[str, Any] | None, bos: int | None, eos: tuple[int, ...], folder: Path
) -> None:
    change(folder / "config.json", **config)
    if generation is None:
        (folder / "generation_config.json").unlink()
    else:
        change(folder / "generation_config.json", **generation)
    found = open_checkpoint(folder)
    assert (found.bos, found.eos) == (bos, eos)


def test_the_checksum_follows_configuration_and_weights(folder: Path, tmp_path: Path) -> None:
    first = open_checkpoint(folder).checksum()
    assert len(first) == 32
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert open_checkpoint(copy).checksum() == first
    change(copy / "config.json", rms_norm_eps=1e-4)
    assert open_checkpoint(copy).checksum() != first
    change_weights(folder, lambda w: w["model.norm.weight"].add_(1))
    assert open_checkpoint(folder).checksum() != first


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"model_type": "gemma2"}, "gemma2"),
        ({"model_type": None}, "model_type ''"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rotary settings"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"head_dim": 15}, "width 15"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "1 of its 2 layers"),
    ],
)
def test_a_configuration_the_engine_cannot_run(
    fields: dict[str, Any], found: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(folder / "config.json", **fields)
    monkeypatch.setattr(checkpoint_module, "safe_open", None)  # refused before any weight file is opened
    with pytest.raises(UnsupportedModel) as caught:
        open_checkpoint(folder)
    assert found in str(caught.value) and SUPPORTED in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf"])
def test_weights_in_other_formats(name: str, folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / name)
    with pytest.raises(UnsupportedModel, match=name):
        open_checkpoint(folder)


def test_a_folder_without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json"):
        open_checkpoint(folder)


def test_a_tensor_the_family_does_not_have(folder: Path) -> None:
    change_weights(folder, lambda w: w.__setitem__("model.layers.0.self_attn.q_proj.bias", torch.zeros(64)))
    with pytest.raises(UnsupportedModel, match=r"q_proj\.bias"):
        open_checkpoint(folder)


def test_weights_in_integers(folder: Path) -> None:
    change_weights(folder, lambda w: w.__setitem__("model.norm.weight", torch.zeros(64, dtype=torch.int8)))
    with pytest.raises(UnsupportedModel, match="I8"):
        open_checkpoint(folder)


# -- what is corrupt ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": None},
        {"hidden_size": "64"},
        {"num_hidden_layers": 10**12},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"rms_norm_eps": -1.0},
        {"bos_token_id": 258},
        {"eos_token_id": "</s>"},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}},
        {"intermediate_size": 97},
    ],
)
def test_a_configuration_that_cannot_be(fields: dict[str, Any], folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", **fields)
    with pytest.raises(CorruptCheckpoint):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_is_none(name: str, text: bytes, folder: Path) -> None:
    (folder / name).write_bytes(text)
    with pytest.raises(CorruptCheckpoint, match=name):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_missing_file(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(CorruptCheckpoint, match=name):
        open_checkpoint(folder)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="Hugging Face"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_missing_tensor(folder: Path) -> None:
    change_weights(folder, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CorruptCheckpoint, match=r"layers\.1\.mlp\.up_proj"):
        open_checkpoint(folder)


def test_an_untied_model_without_head(folder: Path) -> None:
    change_weights(folder, lambda w: w.pop("lm_head.weight"))
    with pytest.raises(CorruptCheckpoint, match="lm_head"):
        open_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_weight_file(keep: int, folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(CorruptCheckpoint, match=WEIGHTS):
        open_checkpoint(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number(bad: float, folder: Path) -> None:
    change_weights(folder, lambda w: w["model.norm.weight"].__setitem__(5, bad))
    found = open_checkpoint(folder)
    found.tensor("embed")
    with pytest.raises(CorruptCheckpoint, match=r"model\.norm\.weight"):
        found.tensor("final_norm")


def test_a_file_that_vanishes_after_opening(folder: Path) -> None:
    found = open_checkpoint(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CorruptCheckpoint):
        found.tensor("embed")
    with pytest.raises(CorruptCheckpoint):
        found.checksum()


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "..", "a\0.safetensors", "x/y.safetensors", ""]
)
def test_an_index_that_leaves_the_folder(name: str, sharded: Path) -> None:
    change(sharded / INDEX, weight_map={"model.norm.weight": name})
    with pytest.raises(CorruptCheckpoint, match="plain name"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("fields", [{"weight_map": None}, {"weight_map": {}}, {"weight_map": {"a": 1}}])
def test_an_index_that_is_none(fields: dict[str, Any], sharded: Path) -> None:
    change(sharded / INDEX, **fields)
    with pytest.raises(CorruptCheckpoint, match="index"):
        open_checkpoint(sharded)


def test_a_missing_shard(sharded: Path) -> None:
    next(sharded.glob("model-00003*")).unlink()
    with pytest.raises(CorruptCheckpoint, match="lacks model-00003"):
        open_checkpoint(sharded)


def test_a_mapped_tensor_is_that_of_the_file_and_does_not_count_as_memory_of_the_process(tmp_path):
    checkpoint = open_checkpoint(write_tiny_model(tmp_path / "m", dtype="bfloat16", max_shard_size="40KB"))
    for name, shape in weight_shapes(checkpoint.architecture).items():
        mapped = checkpoint.mapped(name)
        assert (mapped.dtype, tuple(mapped.shape)) == (torch.bfloat16, shape)
        assert torch.equal(mapped.float(), checkpoint.tensor(name))
        maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path / "m") in line]
        assert maps
        assert all(line.split()[1].startswith("r--") for line in maps)  # private and writable would be counted


def test_a_file_that_was_cut_since_it_was_checked(tmp_path):
    checkpoint = open_checkpoint(write_tiny_model(tmp_path / "m"))
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(CorruptCheckpoint, match="cannot be read"):
        [checkpoint.tensor(name) for name in weight_shapes(checkpoint.architecture)]
