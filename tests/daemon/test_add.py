from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections import namedtuple
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from ebbflow.daemon.library import add, encode, place, source, texts
from ebbflow.daemon.library.add import add_model
from ebbflow.daemon.library.progress import Reporter
from ebbflow.daemon.library.spool import Spool
from ebbflow.daemon.library.synthetic import write_checkpoint
from ebbflow.formats.architecture import Architecture, weight_shapes
from ebbflow.formats.blocks import sum_blocks
from ebbflow.formats.checkpoint import open_checkpoint
from ebbflow.formats.container import padded
from ebbflow.formats.errors import (
    Cancelled,
    CorruptCheckpoint,
    DiskFull,
    EbbflowError,
    InvalidName,
    InvalidRequest,
    ModelExists,
    Retryable,
    StorageFailed,
    Unsupported,
    UnsupportedModel,
)
from ebbflow.formats.manifest import STACK, read_manifest
from ebbflow.formats.messages import AddModel, Progress
from ebbflow.formats.stack import read_blocks, read_stack
from ebbflow.formats.summary import summary

from support.tiny_models import write_tiny_model

STAGES = ["reading", "sampling", "measuring activations", "encoding", "ordering", "writing", "checking quality"]
SMALL = Architecture(
    family="llama",
    vocab=300,
    hidden=72,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=36,
    intermediate=172,
    context=64,
    norm_eps=1e-5,
    rotary_theta=1e4,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_checkpoint(SMALL, folder)
    return folder


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(texts, "STREAMS", 16)
    monkeypatch.setattr(texts, "LENGTH", 32)


class Adder:
    """Adds to one library; `told` is the progress of the last one."""

    def __init__(self, root: Path) -> None:
        self.library, self.cache = root / "library", root / "cache"
        self.told: list[Progress] = []

    def __call__(self, source: Path | str, name: str = "new", **options):
        self.told = []
        request = AddModel(id=7, source=str(source), name=name, **{"codec": "bitstack", "levels": 3, **options})
        return add_model(request, self.library, self.cache, self.told.append)

    def content(self) -> dict[str, bytes]:
        files = (path for path in self.library.rglob("*") if path.is_file())
        return {str(path.relative_to(self.library)): path.read_bytes() for path in files}

    def names(self) -> list[str]:
        return sorted(path.name for path in self.library.iterdir()) if self.library.exists() else []

    def stack(self, name: str = "new"):
        return read_stack(self.library / name / STACK)


@pytest.fixture
def adder(tmp_path) -> Adder:
    return Adder(tmp_path)


# -- what comes out -----------------------------------------------------------------------------------------------


def test_adds_a_model(adder, small):
    found = adder(small, rank=2, seed=5)
    manifest, stack = read_manifest(adder.library / "new"), adder.stack()
    assert summary(manifest) == found
    assert (found.name, found.family, found.codec) == ("new", "llama", "bitstack")
    assert found.original_nbytes == open_checkpoint(small).nbytes
    assert manifest.architecture == SMALL
    assert (manifest.nbytes, manifest.base_nbytes, manifest.blocks) == (
        stack.nbytes,
        stack.base_nbytes,
        len(stack.blocks),
    )
    assert (manifest.source.location, manifest.source.checksum) == (str(small), open_checkpoint(small).checksum())
    assert manifest.options == {"levels": 3, "rank": 2, "order": "gain", "calibration": "sampled", "seed": 5}
    assert (manifest.bos, manifest.eos) == (0, (1,))
    assert {path.name for path in (adder.library / "new").iterdir()} == {
        "manifest.json",
        STACK,
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert adder.names() == ["new"]


def test_every_weight_is_in_the_stack(adder, small):
    adder(small, levels=12, rank=16)
    checkpoint = open_checkpoint(small)
    blocks = list(read_blocks(adder.stack()))
    weights = sum_blocks(blocks)
    assert set(weights) == set(weight_shapes(SMALL))
    for name, weight in weights.items():
        original = checkpoint.tensor(name)
        error = float((torch.from_numpy(weight) - original).norm() / original.norm())
        assert error == 0 if "norm" in name else error < 0.02
    kinds = {entry.tensor: (entry.kind, entry.dtype) for entry, _ in blocks}
    assert kinds["embed"] == kinds["head"] == ("dense", "i8")
    assert kinds["final_norm"] == ("dense", "bf16")  # exact, because the source is bf16
    assert kinds["layers.1.down"] == ("signs", "")


def test_adds_planes(adder, small):
    adder(small, codec="nested", levels=None)
    manifest, stack = read_manifest(adder.library / "new"), adder.stack()
    assert manifest.codec == "nested"
    assert manifest.options == {"levels": 5, "order": "gain", "calibration": "sampled", "seed": 0}
    checkpoint, blocks = open_checkpoint(small), list(read_blocks(stack))
    for name, weight in sum_blocks(blocks).items():
        original = checkpoint.tensor(name)
        error = float((torch.from_numpy(weight) - original).norm() / original.norm())
        assert error == 0 if "norm" in name else error < 0.15
    assert {entry.kind for entry in stack.blocks if len(entry.shape) == 2} == {"plane"}
    assert all(entry.level == 0 for entry in stack.blocks[: stack.base])
    assert manifest.curve[0].kl > 10 * manifest.curve[-1].kl


def test_planes_are_the_same_for_the_same_seed(adder, small):
    for name in ("one", "two"):
        adder(small, name, codec="nested", seed=4)
    assert (adder.library / "one" / STACK).read_bytes() == (adder.library / "two" / STACK).read_bytes()


@pytest.mark.parametrize("order", ["gain", "paper"])
def test_base_is_every_level_0_and_gains_are_real(adder, small, order):
    adder(small, order=order)
    stack = adder.stack()
    assert all(entry.level == 0 for entry in stack.blocks[: stack.base])
    assert all(entry.level > 0 for entry in stack.blocks[stack.base :])
    assert [entry.tensor for entry in stack.blocks[: stack.base]] == list(weight_shapes(SMALL))
    assert all(entry.gain > 0 for entry in stack.blocks if entry.kind == "signs")
    rest = stack.blocks[stack.base :]
    if order == "paper":
        assert [entry.level for entry in rest] == sorted(entry.level for entry in rest)
    else:
        worth = [entry.gain / padded(entry.nbytes) for entry in rest]
        assert worth == sorted(worth, reverse=True)


def test_families_with_biases_norms_and_tied_heads(adder, tmp_path):
    for family in ("qwen2", "qwen3"):
        source = write_tiny_model(tmp_path / family, family, dtype="float32")
        adder(source, family, levels=2)
        blocks = adder.stack(family).blocks
        assert {entry.uses for entry in blocks if entry.tensor == "embed"} == {("embed", "head")}
        assert "head" not in {entry.tensor for entry in blocks}
        vectors = {entry.tensor for entry in blocks if len(entry.shape) == 1 and entry.dtype == "f32"}
        assert ("layers.0.q.bias" if family == "qwen2" else "layers.0.q_norm") in vectors


def test_more_bytes_are_measurably_better(adder, tmp_path):
    adder(write_tiny_model(tmp_path / "m"), levels=6)
    curve, stack = read_manifest(adder.library / "new").curve, adder.stack()
    assert len(curve) == add.CURVE_POINTS >= 16
    assert (curve[0].nbytes, curve[-1].nbytes) == (stack.base_nbytes, stack.nbytes)
    assert [point.blocks for point in curve] == sorted(point.blocks for point in curve)
    assert curve[-1].kl < 0.2 * curve[0].kl


def test_same_request_same_stack(adder, small):
    adder(small, "a")
    adder(small, "b")
    assert (adder.library / "a" / STACK).read_bytes() == (adder.library / "b" / STACK).read_bytes()


def test_a_better_estimate_can_replace_the_gain(adder, small):
    def down_first(gradient, before, after):
        return float(len(before) == SMALL.intermediate)

    request = AddModel(id=1, source=str(small), name="new", levels=2)
    add_model(request, adder.library, adder.cache, lambda p: None, estimate=down_first)
    stack = adder.stack()
    assert {entry.tensor.rsplit(".")[-1] for entry in stack.blocks[stack.base :][:4]} == {"gate", "up"}


# -- calibration text ---------------------------------------------------------------------------------------------


def test_sampled_text_is_kept_in_the_cache(adder, small, monkeypatch):
    adder(small, "a")
    monkeypatch.setattr(texts, "sample_tokens", None)  # would fail if called
    adder(small, "b")
    with pytest.raises(TypeError):
        adder(small, "c", seed=1)  # another seed is another text


def test_a_spoilt_cache_is_sampled_again(adder, small):
    adder(small, "a")
    (cached,) = (adder.cache / "calibration").iterdir()
    good = cached.read_bytes()
    for bad in (b"", b"rubbish", good[:-5], good[:-4] + b"\xff\xff\xff\x7f"):
        cached.write_bytes(bad)
        shutil.rmtree(adder.library / "a")
        adder(small, "a")
        assert cached.read_bytes() == good


def test_a_file_as_calibration(adder, small, tmp_path):
    text = tmp_path / "text"
    text.write_text("The tide comes in, the tide goes out. " * 60)
    adder(small, calibration=str(text))
    assert read_manifest(adder.library / "new").options["calibration"] == str(text)
    assert not (adder.cache / "calibration").exists()


def test_held_back_text_is_not_calibrated_on():
    tokens = torch.arange(20).reshape(10, 2)
    split = texts.split(tokens)
    assert split.held_back.tolist() == [[0, 1], [16, 17]]
    assert sorted([*split.calibration.tolist(), *split.held_back.tolist()]) == tokens.tolist()
    assert torch.equal(texts.split(tokens[:1]).calibration, texts.split(tokens[:1]).held_back)


# -- refusals and failures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"name": "../new"}, InvalidName),
        ({"name": ".adding-x-1"}, InvalidName),
        ({"codec": "best"}, Unsupported),
        ({"order": "random"}, Unsupported),
        ({"levels": 0}, InvalidRequest),
        ({"rank": 0}, InvalidRequest),
        ({"codec": "nested", "levels": 8}, InvalidRequest),
        ({"codec": "nested", "rank": 2}, InvalidRequest),
        ({"calibration": "/nowhere"}, InvalidRequest),
        ({"source": "/nowhere"}, UnsupportedModel),
        ({"source": "a/b/c"}, UnsupportedModel),
        ({"source": __file__}, UnsupportedModel),
    ],
)
def test_refusals(adder, small, options, error):
    options = {"source": small, "name": "new"} | options
    with pytest.raises(error):
        adder(**options)
    assert adder.content() == {}


def test_an_existing_model_is_left_alone(adder, small):
    adder(small)
    before = adder.content()
    with pytest.raises(ModelExists, match="already has a model new"):
        adder(small, seed=3)
    assert adder.content() == before


def test_a_model_that_appears_meanwhile_wins(adder, small, monkeypatch):
    def other_job(*_):
        (adder.library / "new").mkdir()
        (adder.library / "new" / "theirs").write_bytes(b"first")

    monkeypatch.setattr(add, "copy_tokenizer", other_job)
    with pytest.raises(ModelExists, match="meanwhile"):
        adder(small)
    assert adder.content() == {"new/theirs": b"first"}


def test_broken_weights(adder, tmp_path):
    write_checkpoint(SMALL, tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2:] = b"\xc0\x7f"  # NaN
    weights.write_bytes(data)
    with pytest.raises(CorruptCheckpoint):
        adder(tmp_path / "broken")
    assert adder.content() == {}


def test_no_room_is_found_before_anything_is_written(adder, small, monkeypatch):
    expected = encode.expected_nbytes(SMALL, "bitstack", 3, None)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(place.shutil, "disk_usage", lambda path: usage(2 * expected - 1))
    with pytest.raises(DiskFull, match="are free"):
        adder(small)
    assert not adder.cache.exists()
    monkeypatch.setattr(place.shutil, "disk_usage", lambda path: usage(2 * expected))
    adder(small)
    assert 0.99 * expected < adder.stack().nbytes <= expected  # norms turned out to be exact in bf16


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Spool, "add"),
        (os, "fsync"),
        (Path, "rename"),
        (add, "write_stack"),
        (add, "write_manifest"),
        (shutil, "copyfile"),
    ],
)
def test_full_disk(adder, small, monkeypatch, owner, name):
    adder(small, "old")
    before = adder.content()
    monkeypatch.setattr(owner, name, full_disk)
    with pytest.raises(DiskFull, match="nothing was added"):
        adder(small)
    assert adder.content() == before
    assert adder.names() == ["old"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO])
def test_a_library_that_cannot_be_written_is_named_with_the_reason(adder, small, monkeypatch, number):
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageFailed, match=f"library: {os.strerror(number)}"):
        adder(small)


@pytest.mark.parametrize("stage", STAGES)
def test_cancelled_at_any_stage(adder, small, stage):
    def cancel(progress: Progress) -> None:
        if progress.stage == stage:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        add_model(AddModel(id=1, source=str(small), name="new", levels=2), adder.library, adder.cache, cancel)
    assert adder.names() == []


def test_the_last_chance_to_cancel_is_when_all_is_made(adder, small):
    def commit() -> None:
        [made] = adder.library.iterdir()
        assert read_manifest(made).name == "new"
        raise Cancelled("at last")

    request = AddModel(id=1, source=str(small), name="new", levels=2)
    with pytest.raises(Cancelled, match="at last"):
        add_model(request, adder.library, adder.cache, adder.told.append, commit=commit)
    assert adder.names() == []


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(adder, small):
    for name in (".adding-a-1", ".adding-b-2"):
        (adder.library / name / "deep").mkdir(parents=True)
    alive = os.open(adder.library / ".adding-b-2", os.O_RDONLY)
    try:
        fcntl.flock(alive, fcntl.LOCK_EX)
        adder(small)
    finally:
        os.close(alive)
    assert adder.names() == [".adding-b-2", "new"]


# -- the hub ------------------------------------------------------------------------------------------------------


def test_a_hub_id_is_downloaded(adder, small, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(small))
    adder("org/Small-0.1")
    assert asked == [(("org/Small-0.1",), {"allow_patterns": ["*.safetensors", "*.json", "*.jinja"]})]
    assert read_manifest(adder.library / "new").source.location == "org/Small-0.1"


class Response:
    """As much of an HTTP response as the hub's errors look at."""

    headers: dict[str, str] = {}  # noqa: RUF012
    request = None
    status_code = 404


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (lambda: RepositoryNotFoundError("401: no such repository", response=Response()), UnsupportedModel),
        (lambda: LocalEntryNotFoundError("no connection, nothing cached"), Retryable),
        (lambda: huggingface_hub.errors.HTTPError("connection reset"), Retryable),
        (lambda: ConnectionError("refused"), Retryable),
        (lambda: OSError(errno.ENOSPC, "No space left on device"), DiskFull),
    ],
)
def test_what_the_hub_says_is_passed_on(adder, monkeypatch, raised, expected):
    def download(*_: object, **__: object) -> None:
        raise raised()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(EbbflowError) as caught:
        adder("org/model")
    assert type(caught.value) is expected
    if expected is not DiskFull:
        assert str(raised()) in str(caught.value)


@pytest.mark.parametrize("name", ["org", "/org/model", "org/model/x", "../model", "org/..", "-o/m", "org/mo del", ""])
def test_what_is_no_hub_id_is_never_downloaded(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UnsupportedModel, match="neither a folder nor a hub id"):
        source.find_source(str(name) if name else "nothing here")


# -- progress -----------------------------------------------------------------------------------------------------


def test_all_stages_are_told_in_order(adder, small):
    adder(small)
    stages = list(dict.fromkeys(progress.stage for progress in adder.told))
    assert stages == STAGES
    assert {progress.id for progress in adder.told} == {7}
    nbytes = open_checkpoint(small).nbytes
    assert all(0 <= progress.done <= progress.total for progress in adder.told)
    assert {progress.total for progress in adder.told if progress.stage != "reading"} == {nbytes}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_is_told_ten_times_a_second_and_extrapolated():
    told, clock = [], Clock()
    reporter = Reporter(3, 1000, told.append, clock)
    reporter.begin("encoding")
    for _ in range(100):
        clock.now += 0.0101
        reporter.fraction(round((clock.now - 100) * 10), 100, "t")
    assert 9 <= len(told) <= 11
    last = told[-1]
    assert (last.stage, last.tensor, last.total) == ("encoding", "t", 1000)
    assert last.eta_seconds == pytest.approx(10 - (clock.now - 100), abs=0.5)
    assert told[0].eta_seconds is None
    reporter.enter("measuring activations")  # told at once, and the count goes on
    assert (told[-1].stage, told[-1].done) == ("measuring activations", reporter_done(clock))
    reporter.begin("ordering")
    assert (told[-1].done, told[-1].eta_seconds) == (0, None)


def reporter_done(clock: Clock) -> int:
    return 1000 * round((clock.now - 100) * 10) // 100
