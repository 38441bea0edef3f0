"""Adding a model with the masks of another: the same file on the disk, other values."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from ebbflow.daemon.library import add, place, texts
from ebbflow.daemon.library.add import add_model
from ebbflow.daemon.library.encode import expected_nbytes, layer_linears
from ebbflow.daemon.library.encode_sparse import SparsePlan
from ebbflow.daemon.library.given import GivenMasks, on_positions
from ebbflow.daemon.library.prune import Groups, inputs_of, objective, prune
from ebbflow.daemon.library.synthetic import write_checkpoint
from ebbflow.daemon.supervisor.library import Library, delete
from ebbflow.formats.architecture import Architecture
from ebbflow.formats.blocks import sum_blocks
from ebbflow.formats.checkpoint import open_checkpoint
from ebbflow.formats.container import ALIGNMENT
from ebbflow.formats.errors import (
    BadBlock,
    Cancelled,
    CorruptManifest,
    DiskFull,
    InvalidName,
    InvalidRequest,
    NotArrived,
    TruncatedStack,
    UnknownModel,
)
from ebbflow.formats.index import StackIndex
from ebbflow.formats.manifest import MASKS, STACK, Manifest, read_manifest, write_manifest
from ebbflow.formats.masks import mask_offsets
from ebbflow.formats.messages import AddModel, Progress
from ebbflow.formats.pruning import Pruning
from ebbflow.formats.stack import Stack, mark_of, read_blocks, read_stack, write_stack

torch.set_num_threads(1)  # beside others on two cores, a second thread waits longer than it works

SHAPE = Architecture(
    family="llama", vocab=258, hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=48, context=64,
    norm_eps=1e-5, rotary_theta=1e4,
)  # fmt: skip
Tell = Callable[[Progress], None]


def add_to(home: Path, name: str, tell: Tell = lambda progress: None, source: str = "source", **options) -> Stack:
    request = AddModel(id=1, source=str(home / source), name=name, codec="sparse", **options)
    ticks = iter(range(10**9))
    add_model(request, home / "library", home / "cache", tell, clock=lambda: float(next(ticks)))
    return read_stack(home / "library" / name / STACK)


def write_source(folder: Path, shape: Architecture = SHAPE, seed: int = 0) -> None:
    write_checkpoint(shape, folder, seed=seed)
    path = folder / "model.safetensors"
    save_file({k: v if v.ndim == 1 else 10 * v for k, v in load_file(path).items()}, path, {"format": "pt"})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and a library with the sparse model `one`."""
    home = tmp_path_factory.mktemp("given")
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        write_source(home / "source")
        write_source(home / "finetuned", seed=1)
        add_to(home, "one", method="wanda", sparsity=0.6)
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    quick(monkeypatch)
    shutil.copytree(made, tmp_path / "home")
    return tmp_path / "home"


def quick(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(texts, "STREAMS", 16)
    patch.setattr(texts, "LENGTH", 32)
    patch.setattr(add, "CURVE_POINTS", 2)


def manifest_of(home: Path, name: str) -> Manifest:
    return read_manifest(home / "library" / name)


def weights_of(stack: Stack) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(weight) for name, weight in sum_blocks(read_blocks(stack)).items()}


def masks_of(stack: Stack) -> dict[tuple[str, int], bytes]:
    return {(entry.tensor, entry.level): data for entry, data in read_blocks(stack) if entry.kind == "mask"}


def same_file(home: Path, *names: str) -> bool:
    return len({(home / "library" / name / MASKS).stat().st_ino for name in names}) == 1


@pytest.mark.parametrize("method", ["wanda", "admm"])
@pytest.mark.parametrize("values", ["f16", "i4"])
def test_the_masks_are_shared_and_the_values_are_its_own(home: Path, method: str, values: str) -> None:
    one, two = (
        read_stack(home / "library" / "one" / STACK),
        add_to(home, "two", masks_of="one", method=method, values=values),
    )
    assert masks_of(one) == masks_of(two)
    assert same_file(home, "one", "two")
    assert (home / "library" / "one" / MASKS).stat().st_nlink == 2
    manifest = manifest_of(home, "two")
    assert manifest.base_masks_nbytes == two.base_masks_nbytes == one.base_masks_nbytes > 0
    assert manifest.masks == manifest_of(home, "one").masks != ""
    assert {key: manifest.options[key] for key in ("levels", "masks_of", "method", "values")} == {
        "levels": 3, "masks_of": "one", "method": method, "values": values
    }  # fmt: skip
    assert manifest.options["sparsity"] == pytest.approx(0.6, abs=0.02)
    checkpoint, found, before = open_checkpoint(home / "source"), weights_of(two), weights_of(one)
    for name in layer_linears(SHAPE):
        original = checkpoint.tensor(name)
        assert float(((found[name] != 0) & (before[name] == 0)).float().mean()) < 0.02  # i8 may round to zero
        plain = torch.where(found[name] != 0, original, 0.0)
        if (method, values) == ("wanda", "f16"):
            torch.testing.assert_close(found[name], plain, rtol=1e-3, atol=1e-6)
        if (method, values) == ("admm", "f16"):
            assert not torch.allclose(found[name], plain, rtol=1e-2)
    with GivenMasks(home / "library", "one") as given:
        plan = SparsePlan(Pruning(values=values), None, given)
        assert two.nbytes <= expected_nbytes(SHAPE, "sparse", 3, None, plan) < 1.05 * two.nbytes


def test_room_is_wanted_only_for_what_is_not_there_yet(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with GivenMasks(home / "library", "one") as given:
        most = expected_nbytes(SHAPE, "sparse", 3, None, SparsePlan(Pruning(values="i4"), None, given))
        masks = given.linkable_nbytes
    there = mask_offsets(read_stack(home / "library" / "one" / STACK).blocks)[0]
    assert 0 < masks < there < masks + 2 * ALIGNMENT
    wanted = 2 * most - masks
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(place.shutil, "disk_usage", lambda path: usage(wanted - 1))
    with pytest.raises(DiskFull, match="are free"):
        add_to(home, "two", masks_of="one", values="i4")
    monkeypatch.setattr(place.shutil, "disk_usage", lambda path: usage(wanted))
    add_to(home, "two", masks_of="one", values="i4")
    assert same_file(home, "one", "two")


def test_another_checkpoint_of_the_same_shapes(home: Path) -> None:
    two = add_to(home, "two", source="finetuned", masks_of="one", method="magnitude", values="f16")
    assert same_file(home, "one", "two")
    original = open_checkpoint(home / "finetuned").tensor("layers.1.up")
    found = weights_of(two)["layers.1.up"]
    assert 0.35 < float((found != 0).float().mean()) < 0.45
    torch.testing.assert_close(found[found != 0], original[found != 0], rtol=1e-3, atol=1e-6)


def test_without_being_asked_the_same_masks_are_one_file(home: Path) -> None:
    """The order of a stack depends on its values; that of its masks file does not."""
    add_to(home, "two", method="wanda", sparsity=0.6, values="i4")
    assert same_file(home, "one", "two")
    add_to(home, "three", method="wanda", sparsity=0.5)
    assert not same_file(home, "one", "three")
    assert (home / "library" / "three" / MASKS).stat().st_nlink == 1


def test_either_may_be_removed_and_the_other_is_whole(home: Path) -> None:
    two = list(read_blocks(add_to(home, "two", masks_of="one", values="i4")))
    library = Library(home / "library", delete)
    lines = {line.name: line for line in library.summaries()}
    size = (home / "library" / "one" / MASKS).stat().st_size
    assert {name: (line.shares, line.shared_nbytes) for name, line in lines.items()} == {
        "one": (("two",), size), "two": (("one",), size)
    }  # fmt: skip
    assert library.detail(1, "two").summary == lines["two"]
    library.remove("one")
    assert (home / "library" / "two" / MASKS).stat().st_nlink == 1
    assert list(read_blocks(read_stack(home / "library" / "two" / STACK))) == two
    assert library.summaries()[0].shares == ()
    add_to(home, "one", masks_of="two", method="wanda")
    library.remove("two")
    assert len(list(read_blocks(read_stack(home / "library" / "one" / STACK)))) == len(two)


def test_the_other_may_be_removed_half_way(home: Path) -> None:
    whole = add_to(home, "whole", masks_of="one", values="i4")
    expected = list(read_blocks(whole))
    for name in ("whole", "one"):
        gone = home / "library" / name
        if name == "whole":
            shutil.rmtree(gone)

    def remove(progress: Progress) -> None:
        if progress.stage == "encoding":
            shutil.rmtree(home / "library" / "one", ignore_errors=True)

    assert list(read_blocks(add_to(home, "two", remove, masks_of="one", values="i4"))) == expected
    assert not (home / "library" / "one").exists()
    assert (home / "library" / "two" / MASKS).stat().st_nlink == 1


def test_work_with_the_masks_of_one_is_not_gone_on_with_for_another(home: Path) -> None:
    add_to(home, "other", method="wanda", sparsity=0.6, seed=1)
    assert masks_of(read_stack(home / "library" / "one" / STACK)) != masks_of(
        read_stack(home / "library" / "other" / STACK)
    )

    def stop(progress: Progress) -> None:
        if progress.tensor.startswith("layers.1"):
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        add_to(home, "m", stop, masks_of="one", method="wanda")
    (work,) = (home / "cache" / "adding").iterdir()
    assert (work / "layer-0000").exists()
    add_to(home, "m", masks_of="other", method="wanda")
    assert same_file(home, "m", "other")
    encoded: set[str] = set()

    def hear(progress: Progress) -> None:
        if progress.stage == "encoding":
            encoded.add(progress.tensor)

    add_to(home, "again", hear, masks_of="one", method="wanda")
    assert {name.rpartition(".")[0] for name in encoded if name.startswith("layers")} == {"layers.1"}
    assert same_file(home, "again", "one")


def test_masks_that_lie_inside_the_other_are_taken_too(home: Path) -> None:
    folder = home / "library" / "one"
    blocks = list(read_blocks(read_stack(folder / STACK)))
    inside = tuple(msgspec.structs.replace(entry, beside=False) for entry, _ in blocks)
    base = read_stack(folder / STACK).base
    write_stack(folder / STACK, StackIndex(base, inside), lambda i: blocks[i][1])
    (folder / MASKS).unlink()
    write_manifest(folder, msgspec.structs.replace(read_manifest(folder), masks="", base_masks_nbytes=0))
    with GivenMasks(home / "library", "one") as given:
        assert not given.linkable_nbytes
    two = add_to(home, "two", masks_of="one", method="wanda")
    assert masks_of(two) == masks_of(read_stack(folder / STACK))
    assert (home / "library" / "two" / MASKS).stat().st_nlink == 1


def test_a_pruned_checkpoint_keeps_its_zeros_also_among_given_positions(home: Path) -> None:
    path = home / "source" / "model.safetensors"
    save_file({k: v * (v > 0) if v.ndim == 2 else v for k, v in load_file(path).items()}, path, {"format": "pt"})
    found = weights_of(add_to(home, "two", masks_of="one", values="f16"))["layers.0.q"]
    assert (found != 0).any()
    assert not found[open_checkpoint(home / "source").tensor("layers.0.q") == 0].any()


def test_values_on_given_positions_are_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=generator) * 0.9 ** torch.arange(64) @ torch.randn(64, 64, generator=generator)
    inputs, weight = inputs_of(x.T @ x / len(x)), torch.randn(24, 64, generator=generator)
    ours = prune(weight, inputs, Groups(64, 24), "admm")
    found = on_positions(weight, inputs, ours.kept, "admm", None)
    plain = on_positions(weight, inputs, ours.kept, "wanda", None)
    errors = [float(objective(weight - one.weight, inputs.h).sum()) for one in (found, ours, plain)]
    assert torch.equal(plain.weight, weight * ours.kept)
    assert not found.weight[~ours.kept].any()
    assert errors[0] < 1.02 * errors[1] < 0.2 * errors[2]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"masks_of": "nobody"}, UnknownModel, "nobody"),
        ({"masks_of": "../one"}, InvalidName, "is not a model name"),
        ({"masks_of": "one", "sparsity": 0.5}, InvalidRequest, "not 0.5"),
        ({"masks_of": "one", "pattern": "2:4"}, InvalidRequest, r"not 0\.5|not the pattern 2:4"),
        ({"masks_of": "one", "levels": 2}, InvalidRequest, "3 tiers"),
        ({"masks_of": "one", "codec": "nested"}, InvalidRequest, "masks_of belongs to the codec sparse"),
        ({"masks_of": "dense"}, InvalidRequest, "of the codec nested and has no masks"),
        ({"masks_of": "wide"}, InvalidRequest, r"masks of wide are of another model.*layers\.0\.down"),
    ],
)
def test_what_cannot_be_asked(home: Path, options: dict, error: type[Exception], said: str) -> None:
    if options["masks_of"] == "dense":
        manifest = msgspec.structs.replace(manifest_of(home, "one"), name="dense", codec="nested")
        shutil.copytree(home / "library" / "one", home / "library" / "dense")
        write_manifest(home / "library" / "dense", manifest)
    if options["masks_of"] == "wide":
        write_source(home / "wide", msgspec.structs.replace(SHAPE, intermediate=64))
        add_to(home, "wide", source="wide", method="magnitude")
    before = sorted(path.name for path in (home / "library").iterdir())
    with pytest.raises(error, match=said):
        request = {"codec": "sparse", **options}
        add_model(
            AddModel(id=1, source=str(home / "source"), name="m", **request),
            home / "library", home / "cache", lambda progress: None,
        )  # fmt: skip
    assert sorted(path.name for path in (home / "library").iterdir()) == before


def test_a_pattern_or_a_sparsity_that_it_has_may_be_said(home: Path) -> None:
    add_to(home, "patterned", method="wanda", pattern="4:8")
    add_to(home, "same", masks_of="patterned", pattern="4:8", values="i4")
    assert manifest_of(home, "same").options["pattern"] == "4:8"
    with pytest.raises(InvalidRequest, match="not the pattern 2:4"):
        add_to(home, "bad", masks_of="patterned", pattern="2:4")
    add_to(home, "half", masks_of="patterned", sparsity=0.5, levels=3, method="wanda", values="f16")
    assert same_file(home, "patterned", "same", "half")


def test_the_others_files_that_are_damaged(home: Path) -> None:
    folder = home / "library" / "one"
    stack = read_stack(folder / STACK)
    content, manifest = (folder / MASKS).read_bytes(), read_manifest(folder)

    def refused(error: type[Exception]) -> None:
        with pytest.raises(error):
            add_to(home, "m", masks_of="one")
        (folder / MASKS).write_bytes(content)

    (folder / MASKS).write_bytes(content[:-64] + bytes(63) + b"\1")
    refused(BadBlock)
    (folder / MASKS).unlink()
    refused(TruncatedStack)
    mark_of(stack.path).touch()
    refused(NotArrived)
    mark_of(stack.path).unlink()
    write_manifest(folder, msgspec.structs.replace(manifest, masks="0" * 32))
    refused(CorruptManifest)
    assert sorted(path.name for path in (home / "library").iterdir()) == ["one"]


def test_a_file_that_is_not_whole_any_more_is_not_shared(home: Path) -> None:
    masks = home / "library" / "one" / MASKS
    content = masks.read_bytes()
    masks.write_bytes(content[:-64] + bytes(63) + b"\1")
    add_to(home, "two", method="wanda", sparsity=0.6, values="i4")
    assert masks.stat().st_nlink == 1
    assert (home / "library" / "two" / MASKS).read_bytes() == content


@pytest.mark.parametrize("number", ["EXDEV", "EPERM", "EMLINK"])
def test_where_there_are_no_links_it_is_a_copy(home: Path, monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    import errno

    def refuse(*_: object, **__: object) -> None:
        raise OSError(getattr(errno, number), "no link")

    monkeypatch.setattr(os, "link", refuse)
    add_to(home, "two", masks_of="one", method="wanda")
    monkeypatch.undo()
    names = [home / "library" / name / MASKS for name in ("one", "two")]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert not same_file(home, "one", "two")
    assert Library(home / "library").summaries()[0].shares == ()
