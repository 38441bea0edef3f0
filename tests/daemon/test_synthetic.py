from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from math import prod
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from ebbflow.daemon.engine.dense import DenseAttention, build_network
from ebbflow.daemon.library import synthetic_checkpoint
from ebbflow.daemon.library.shapes import SHAPES
from ebbflow.daemon.library.synthetic import main, write_checkpoint, write_random_stack
from ebbflow.daemon.library.synthetic_tokenizer import write_tokenizer
from ebbflow.formats.architecture import Architecture, weight_shapes
from ebbflow.formats.blocks import check_finite, sum_blocks
from ebbflow.formats.checkpoint import open_checkpoint
from ebbflow.formats.container import padded
from ebbflow.formats.errors import InvalidRequest, ModelExists
from ebbflow.formats.index import filled_before
from ebbflow.formats.kinds import words_per_row
from ebbflow.formats.manifest import MASKS, STACK, read_manifest
from ebbflow.formats.stack import read_blocks, read_stack

TINY = SHAPES["tiny"]  # 172 wide: rows do not end at a word


def weights_of(a: Architecture) -> int:
    return sum(prod(shape) for shape in weight_shapes(a).values())


@pytest.mark.parametrize(
    ("name", "millions"), [("tinyllama-1.1b", 1100), ("smollm-135m", 134.5), ("llama-3.2-1b", 1236)]
)
def test_named_shapes_have_the_size_of_their_models(name, millions):
    assert weights_of(SHAPES[name]) / 1e6 == pytest.approx(millions, rel=0.001)


# -- stacks -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["nested", "bitstack", "sparse"])
def model(request, tmp_path) -> Path:
    write_random_stack(TINY, tmp_path, "m", codec=request.param, seed=3, levels=3)
    return tmp_path / "m"


def test_a_random_stack_is_a_valid_model(model):
    manifest, stack = read_manifest(model), read_stack(model / STACK)
    assert manifest.architecture == TINY
    assert (manifest.name, manifest.blocks) == ("m", len(stack.blocks))
    assert (manifest.nbytes, manifest.base_nbytes) == (stack.nbytes, stack.base_nbytes)
    assert manifest.original_nbytes == 2 * weights_of(TINY)
    blocks = list(read_blocks(stack))
    assert {entry.tensor for entry, _ in blocks} == set(weight_shapes(TINY))
    for (entry, payload), filled in zip(blocks, filled_before(stack.blocks), strict=True):
        check_finite(entry, np.frombuffer(payload.ljust(padded(entry.nbytes), b"\0"), np.uint8), filled)


def test_a_random_stack_is_in_stack_order(model):
    stack = read_stack(model / STACK)
    assert [e.tensor for e in stack.blocks[: stack.base] if e.kind != "mask"] == list(weight_shapes(TINY))
    rest = stack.blocks[stack.base :]
    tiers = [
        a
        for a, b in pairwise(rest)
        if a.kind == "mask" and (b.kind, b.level, b.tensor) == ("values", a.level, a.tensor)
    ]
    assert len(tiers) == sum(entry.kind == "mask" for entry in rest)
    masks = {entry.tensor + str(entry.level): padded(entry.nbytes) for entry in rest if entry.kind == "mask"}
    worth = [
        entry.gain / (padded(entry.nbytes) + masks.get(entry.tensor + str(entry.level), 0))
        for entry in rest
        if entry.kind != "mask"
    ]
    assert worth == sorted(worth, reverse=True)
    assert worth[-1] > 0


def test_bits_past_the_last_column_are_zero(model):
    for entry, payload in read_blocks(read_stack(model / STACK)):
        if entry.kind in ("plane", "signs"):  # of masks, `check_finite` sees to it
            m, n = entry.shape
            words = np.frombuffer(payload, "<u8", m * words_per_row(n)).reshape(m, -1)
            assert n % 64 == 0 or not (words[:, -1] >> np.uint64(n % 64)).any()


def test_weights_are_like_a_fresh_networks(model):
    blocks = list(read_blocks(read_stack(model / STACK)))
    for name, weight in sum_blocks(blocks).items():
        values = weight[weight != 0]
        assert values.std() == pytest.approx(0.0 if "norm" in name else 0.021, rel=0.35, abs=1e-9)
    if blocks[-1][0].kind == "values":
        return
    first = sum_blocks((entry, payload) for entry, payload in blocks if entry.level == 0)
    assert first["layers.0.q"].std() == pytest.approx(0.02, rel=0.2)


def test_activations_stay_sane(model):
    weights = {name: torch.from_numpy(w) for name, w in sum_blocks(read_blocks(read_stack(model / STACK))).items()}
    network = build_network(TINY, weights.__getitem__)
    logits = network.head(network.forward(torch.arange(50), DenseAttention(TINY, 1, 50)))
    assert 0.01 < float(logits.std()) < 10


def test_same_seed_same_stack(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_stack(TINY, tmp_path, name, seed=seed, levels=2)
    a, b, c = ((tmp_path / name / STACK).read_bytes() for name in "abc")
    assert a == b != c


def test_rank_and_levels_are_as_asked(tmp_path):
    write_random_stack(TINY, tmp_path, "m", codec="bitstack", levels=5, rank=4)
    signs = [entry for entry in read_stack(tmp_path / "m" / STACK).blocks if entry.kind == "signs"]
    assert {entry.rank for entry in signs} == {4}
    assert {entry.level for entry in signs} == set(range(5))


@pytest.mark.parametrize("values", ["f16", "i8", "i4"])
def test_sparsity_and_values_are_as_asked(tmp_path, values):
    write_random_stack(TINY, tmp_path, "m", codec="sparse", levels=3, sparsity=0.7, values=values)
    blocks = list(read_blocks(read_stack(tmp_path / "m" / STACK)))
    assert {entry.dtype for entry, _ in blocks if entry.kind == "values"} == {values}
    assert {entry.level for entry, _ in blocks if entry.kind == "values"} == {0, 1, 2}
    weight = sum_blocks(blocks)["layers.0.q"]
    filled = sum(entry.rank for entry, _ in blocks if (entry.kind, entry.tensor) == ("mask", "layers.0.q"))
    assert filled == round(0.3 * weight.shape[1])
    assert (weight != 0).mean() == pytest.approx(0.3 * (14 / 15 if values == "i4" else 1), rel=0.02)


def test_sparse_stacks_of_one_seed_share_their_masks(tmp_path):
    for name, seed, values in (("a", 0, "i8"), ("b", 0, "i4"), ("c", 1, "i8")):
        write_random_stack(TINY, tmp_path, name, codec="sparse", seed=seed, values=values)
    inodes = [(tmp_path / name / MASKS).stat().st_ino for name in "abc"]
    assert inodes[0] == inodes[1] != inodes[2]
    one, two = (list(read_blocks(read_stack(tmp_path / name / STACK))) for name in "ab")
    assert [data for entry, data in one if entry.beside] == [data for entry, data in two if entry.beside]
    assert one != two


@pytest.mark.parametrize("wrong", [{"sparsity": 1.0}, {"sparsity": -0.1}, {"values": "f32"}, {"levels": 500}])
def test_a_sparse_stack_that_makes_no_sense(tmp_path, wrong):
    with pytest.raises(InvalidRequest):
        write_random_stack(TINY, tmp_path, "m", codec="sparse", **wrong)


@pytest.mark.parametrize("values", ["f16", "i8"])
def test_dense_stacks_are_one_block_a_tensor(tmp_path, values):
    write_random_stack(TINY, tmp_path, "m", codec="dense", values=values)
    blocks = list(read_blocks(read_stack(tmp_path / "m" / STACK)))
    dtypes = {entry.tensor: entry.dtype for entry, _ in blocks}
    assert set(dtypes) == set(weight_shapes(TINY))
    assert (dtypes["layers.0.q"], dtypes["embed"], dtypes["final_norm"]) == (values, "i8", "bf16")
    assert sum_blocks(blocks)["layers.0.q"].std() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("wrong", [{"values": "i4"}, {"levels": 2}])
def test_a_dense_stack_that_makes_no_sense(tmp_path, wrong):
    with pytest.raises(InvalidRequest):
        write_random_stack(TINY, tmp_path, "m", codec="dense", **wrong)


def test_biases_are_zero(tmp_path):
    biased = msgspec.structs.replace(TINY, qkv_bias=True)
    write_random_stack(biased, tmp_path, "m", levels=1)
    weights = sum_blocks(read_blocks(read_stack(tmp_path / "m" / STACK)))
    assert not weights["layers.0.q.bias"].any()


def test_an_unknown_codec(tmp_path):
    with pytest.raises(InvalidRequest, match="nested, bitstack"):
        write_random_stack(TINY, tmp_path, "m", codec="gzip")


def test_a_taken_name(model):
    with pytest.raises(ModelExists):
        write_random_stack(TINY, model.parent, "m")


# -- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_configuration_is_read_back(tmp_path, name):
    """What `checkpoint` makes of our configuration is the shape we started from."""
    from ebbflow.formats.huggingface import read_architecture

    (tmp_path / "config.json").write_text(json.dumps(synthetic_checkpoint.config(SHAPES[name])))
    assert read_architecture(tmp_path) == SHAPES[name]


def test_a_random_checkpoint(tmp_path):
    write_checkpoint(TINY, tmp_path, seed=1)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.architecture, checkpoint.nbytes) == (TINY, 2 * weights_of(TINY))
    assert (checkpoint.bos, checkpoint.eos) == (0, (1,))
    assert checkpoint.tensor("layers.1.up").std() == pytest.approx(0.02, rel=0.05)
    assert (checkpoint.tensor("final_norm") == 1).all()


def test_a_large_checkpoint_is_sharded(tmp_path, monkeypatch):
    write_checkpoint(TINY, tmp_path / "one", seed=1)
    monkeypatch.setattr(synthetic_checkpoint, "ONE_FILE_NBYTES", 100_000)
    monkeypatch.setattr(synthetic_checkpoint, "SHARD_NBYTES", 80_000)
    write_checkpoint(TINY, tmp_path / "many", seed=1)
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) < 90_000
    for name in weight_shapes(TINY):
        assert torch.equal(one.tensor(name), many.tensor(name))


# -- tokenizers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [258, 300, 70_000])
def test_tokenizer(tmp_path, vocab):
    write_tokenizer(tmp_path, vocab)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == vocab
    assert all(tokenizer.id_to_token(i) is not None for i in range(vocab))
    assert all(tokenizer.decode([i], skip_special_tokens=False) for i in range(vocab))
    for text in ("Ebb and flow.", "naïve 東京 🌊\n\t", ""):
        ids = tokenizer.encode(text).ids
        assert all(0 <= i < vocab for i in ids)
        assert tokenizer.decode(ids) == text


def test_too_small_a_vocabulary(tmp_path):
    with pytest.raises(InvalidRequest, match="258"):
        write_tokenizer(tmp_path, 257)


# -- the command --------------------------------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    assert main(["tiny", "--stack", str(tmp_path), "--name", "full", "--levels", "1"]) == 0
    assert "full: 21 blocks" in capsys.readouterr().out
    assert main(["tiny", "--checkpoint", str(tmp_path / "c")]) == 0
    assert open_checkpoint(tmp_path / "c").architecture == TINY
    assert main(["tiny", "--stack", str(tmp_path), "--name", "full"]) == ModelExists.exit_code
    assert main(["huge", "--stack", str(tmp_path)]) == InvalidRequest.exit_code
    assert "tinyllama-1.1b" in capsys.readouterr().err


def test_script(tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "make-model"
    assert len(script.read_text().splitlines()) <= 20
    arguments = ["tiny", "--stack", str(tmp_path), "--name", "m"]
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    subprocess.run([str(script), *arguments], check=True, capture_output=True, env=environment)
    assert read_manifest(tmp_path / "m").name == "m"
