"""Models and texts that are broken or odd, all the way through adding: a good stack, or a typed error and no trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from ebbflow.daemon.library import add, texts
from ebbflow.daemon.library.add import add_model
from ebbflow.daemon.library.synthetic import write_checkpoint
from ebbflow.formats.architecture import Architecture
from ebbflow.formats.blocks import sum_blocks
from ebbflow.formats.checkpoint import open_checkpoint, source_name
from ebbflow.formats.errors import CorruptCheckpoint, InvalidRequest
from ebbflow.formats.manifest import STACK, read_manifest
from ebbflow.formats.messages import AddModel
from ebbflow.formats.stack import read_blocks, read_stack

SHAPE = Architecture(
    family="llama", vocab=258, hidden=64, layers=2, heads=2, kv_heads=1, head_dim=32, intermediate=96, context=64,
    norm_eps=1e-5, rotary_theta=1e4,
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "nested": {"levels": 5},
    "bitstack": {"levels": 10},
    "sparse": {"sparsity": 0.02, "values": "f16"},  # so little that the model comes near
}

Weights = dict[str, torch.Tensor]
codecs = pytest.mark.parametrize("codec", ["nested", "bitstack", "sparse"])


@pytest.fixture(autouse=True)
def little_work(monkeypatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(texts, "STREAMS", 16)
    monkeypatch.setattr(texts, "LENGTH", 32)
    monkeypatch.setattr(add, "CURVE_POINTS", 3)


class Place:
    """A checkpoint, and the library it is added to."""

    def __init__(self, root: Path) -> None:
        self.source, self.library, self.cache = root / "source", root / "library", root / "cache"

    def write(self, shape: Architecture = SHAPE, change: Callable[[Weights], None] = lambda weights: None) -> None:
        """Random weights, ten times larger than a fresh network's, then changed; by our names."""
        write_checkpoint(shape, self.source)
        path = self.source / "model.safetensors"
        stored = load_file(path)
        names = {source_name(name): name for name in open_checkpoint(self.source)._places}
        weights = {names[key]: value if value.ndim == 1 else 10 * value for key, value in stored.items()}
        change(weights)
        save_file({source_name(name): value for name, value in weights.items()}, path, {"format": "pt"})

    def add(self, codec: str, **options) -> dict[str, torch.Tensor]:
        """The weights of the whole stack; the curve must be of sane numbers, and of a model that came near."""
        request = AddModel(id=1, source=str(self.source), name="m", codec=codec, **OPTIONS[codec], **options)
        add_model(request, self.library, self.cache, lambda progress: None)
        curve = read_manifest(self.library / "m").curve
        assert all(math.isfinite(point.kl) and math.isfinite(point.perplexity) for point in curve)
        assert curve[-1].kl <= 0.3 * curve[0].kl + 1e-6
        blocks = read_blocks(read_stack(self.library / "m" / STACK))
        return {name: torch.from_numpy(weight) for name, weight in sum_blocks(blocks).items()}

    def original(self, name: str) -> torch.Tensor:
        return open_checkpoint(self.source).tensor(name)

    def assert_untouched(self) -> None:
        assert [path for path in self.library.rglob("*") if path.is_file()] == []
        assert list((self.cache / "adding").glob("*")) == []


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


def relative(found: torch.Tensor, original: torch.Tensor) -> float:
    return float((found - original).norm() / original.norm())


# -- weights ------------------------------------------------------------------------------------------------------


@codecs
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["embed", "layers.1.down", "layers.0.mlp_norm", "head"])
def test_weights_that_are_no_numbers(place, codec, bad, name):
    def spoil(weights: Weights) -> None:
        weights[name].view(-1)[7] = bad

    place.write(change=spoil)
    with pytest.raises(CorruptCheckpoint, match=f"{source_name(name)} .*NaN or infinity"):
        place.add(codec)
    place.assert_untouched()


@codecs
@pytest.mark.parametrize("name", ["layers.1.down", "layers.0.q"])
def test_weights_beyond_all_sense(place, codec, name):
    def spoil(weights: Weights) -> None:
        weights[name][3, 4] = 1e7

    place.write(change=spoil)
    with pytest.raises(CorruptCheckpoint, match="1e"):
        place.add(codec)
    place.assert_untouched()


@codecs
def test_activations_that_overflow(place, codec):
    def spoil(weights: Weights) -> None:
        weights["layers.0.up"] *= 1e30
        weights["layers.0.down"] *= 1e30

    place.write(change=spoil)
    with pytest.raises(CorruptCheckpoint, match="not finite"):
        place.add(codec)
    place.assert_untouched()


@codecs
def test_dead_rows_and_columns(place, codec):
    """Weights of zero, and a channel that nothing ever writes to: its activations are zero everywhere."""

    def kill(weights: Weights) -> None:
        weights["layers.0.q"][3:9] = 0
        weights["layers.1.up"][:, 5] = 0
        weights["layers.1.o"][:] = 0
        weights["embed"][:, 11] = 0
        for layer in range(SHAPE.layers):
            weights[f"layers.{layer}.o"][11] = 0
            weights[f"layers.{layer}.down"][11] = 0

    place.write(change=kill)
    found = place.add(codec)
    assert not found["layers.0.q"][3:9].any()
    assert not found["layers.1.o"].any()
    for name in ("layers.0.q", "layers.1.up", "layers.1.gate", "layers.0.down"):
        assert relative(found[name], place.original(name)) < 0.15


@codecs
def test_a_model_of_zeros(place, codec):
    place.write(change=lambda weights: [weight.zero_() for weight in weights.values() if weight.ndim > 1])
    assert not any(weight.any() for weight in place.add(codec).values() if weight.ndim > 1)


@codecs
def test_one_weight_a_hundred_times_its_row(place, codec):
    def spike(weights: Weights) -> None:
        for name in ("layers.0.v", "layers.1.down", "embed"):
            row = weights[name][6]
            row[10] = 100 * row.float().square().mean().sqrt()

    place.write(change=spike)
    found = place.add(codec)
    for name in ("layers.0.v", "layers.1.down", "embed"):
        original = place.original(name)
        assert float(found[name][6, 10]) == pytest.approx(float(original[6, 10]), rel=0.1)
        others = torch.arange(len(original)) != 6
        assert relative(found[name][others], original[others]) < 0.15


@codecs
def test_one_direction_that_is_all_there_is(place, codec):
    """Every row of the embedding the same: moments of rank one at the first layer."""

    def flatten(weights: Weights) -> None:
        weights["embed"][:] = weights["embed"][0]

    place.write(change=flatten)
    found = place.add(codec)
    assert relative(found["layers.0.q"], place.original("layers.0.q")) < 0.3


# -- shapes and texts ---------------------------------------------------------------------------------------------


@codecs
@pytest.mark.parametrize(("hidden", "intermediate"), [(172, 576), (576, 172)])
def test_widths_that_are_no_power_of_two(place, codec, hidden, intermediate):
    place.write(msgspec.structs.replace(SHAPE, hidden=hidden, intermediate=intermediate, layers=1))
    found = place.add(codec)
    for name in ("layers.0.q", "layers.0.o", "layers.0.down", "embed"):
        assert relative(found[name], place.original(name)) < 0.2


@codecs
def test_fewer_tokens_than_columns(place, codec, monkeypatch):
    monkeypatch.setattr(texts, "STREAMS", 2)
    monkeypatch.setattr(texts, "LENGTH", 8)
    place.write()
    found = place.add(codec)
    assert relative(found["layers.0.down"], place.original("layers.0.down")) < 0.3


@codecs
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "gives 0 tokens; at least"),
        (b"a handful", "gives 9 tokens; at least"),
        (b"\n" * 200, "gives 200 tokens; at least"),
        (b"\xff\xfe" * 3000, "UTF-8"),
        (b"good text, then \x80" * 300, "UTF-8"),
    ],
)
def test_calibration_files_that_are_no_use(place, codec, content, said, tmp_path):
    (tmp_path / "text").write_bytes(content)
    place.write()
    with pytest.raises(InvalidRequest, match=f"calibration file .*{said}"):
        place.add(codec, calibration=str(tmp_path / "text"))
    place.assert_untouched()


@codecs
@pytest.mark.parametrize("path", ["", "/nowhere/text", "/tmp"])
def test_calibration_files_that_are_not_there(place, codec, path):
    place.write()
    with pytest.raises(InvalidRequest, match="no calibration file"):
        place.add(codec, calibration=path)
    place.assert_untouched()


@codecs
def test_the_least_text_that_is_enough(place, codec, tmp_path, monkeypatch):
    monkeypatch.setattr("ebbflow.daemon.library.calibrate.MIN_FILE_TOKENS", 64)
    (tmp_path / "text").write_text("x" * 64)  # all tokens alike: one direction again
    place.write()
    place.add(codec, calibration=str(tmp_path / "text"))
