"""A job that goes on where an earlier one ended: the same stack, less work, nothing left behind."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ebbflow.daemon.library import add, resume, texts
from ebbflow.daemon.library.add import add_model
from ebbflow.daemon.library.calibrate import Gradients, output_gradients, sample_tokens
from ebbflow.daemon.library.progress import Reporter
from ebbflow.daemon.library.resume import leftover_nbytes, resumable, work_key
from ebbflow.daemon.library.spool import Spool
from ebbflow.daemon.library.synthetic import write_checkpoint
from ebbflow.formats.architecture import Architecture
from ebbflow.formats.checkpoint import open_checkpoint
from ebbflow.formats.container import content_hash
from ebbflow.formats.errors import Cancelled, CorruptCheckpoint, DiskFull
from ebbflow.formats.index import BlockEntry
from ebbflow.formats.manifest import STACK
from ebbflow.formats.messages import AddModel, Progress

LAYERS = 3
SMALL = Architecture(
    family="llama", vocab=258, hidden=32, layers=LAYERS, heads=2, kv_heads=1, head_dim=16, intermediate=48, context=64,
    norm_eps=1e-5, rotary_theta=1e4,
)  # fmt: skip
PARTS = ["dense", "gradients", "layer-0000", "layer-0001", "layer-0002", "layer-0003"]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_checkpoint(SMALL, folder)
    return folder


@pytest.fixture(autouse=True)
def little_work(monkeypatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(texts, "STREAMS", 8)
    monkeypatch.setattr(texts, "LENGTH", 16)
    monkeypatch.setattr(add, "CURVE_POINTS", 2)


class Adder:
    """Adds to one library with one cache; `encoded` are the tensors that the last job encoded."""

    def __init__(self, root: Path) -> None:
        self.library, self.cache = root / "library", root / "cache"
        self.encoded: list[str] = []
        self.told: list[Progress] = []

    def __call__(self, source: Path, name: str, *, until: str = "", **options) -> bytes:
        """The stack's bytes; cancelled when the tensor `until` is being encoded."""
        self.encoded, self.told = [], []
        clock = itertools.count()  # every progress is told

        def hear(progress: Progress) -> None:
            self.told.append(progress)
            if progress.stage == "encoding" and progress.tensor:
                if until and progress.tensor == until:
                    raise Cancelled("enough")
                if progress.tensor not in self.encoded:
                    self.encoded.append(progress.tensor)

        request = AddModel(id=1, source=str(source), name=name, **{"levels": 2, **options})
        add_model(request, self.library, self.cache, hear, clock=lambda: float(next(clock)))
        return (self.library / name / STACK).read_bytes()

    def cancelled(self, source: Path, until: str, **options) -> None:
        with pytest.raises(Cancelled):
            self(source, "cancelled", until=until, **options)

    def works(self) -> list[Path]:
        return sorted((self.cache / "adding").iterdir())


@pytest.fixture
def adder(tmp_path) -> Adder:
    return Adder(tmp_path)


def encoded_layers(adder: Adder) -> set[str]:
    return {".".join(name.split(".")[:2]) for name in adder.encoded}


# -- the same stack with less work --------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["nested", "bitstack", "sparse"])
@pytest.mark.parametrize(("until", "left"), [("layers.0.gate", 3), ("layers.1.q", 2), ("layers.2.down", 1)])
def test_goes_on_after_the_last_whole_layer(adder, small, codec, until, left):
    whole = adder(small, "whole", codec=codec)
    assert {f"layers.{i}" for i in range(LAYERS)} <= encoded_layers(adder)
    adder.cancelled(small, until, codec=codec)
    assert adder(small, "again", codec=codec) == whole
    assert {name for name in encoded_layers(adder) if "layers" in name} == {
        f"layers.{i}" for i in range(LAYERS - left, LAYERS)
    }
    assert adder.works() == []


def test_goes_on_when_only_the_vocabulary_is_left_and_when_nothing_is(adder, small, monkeypatch):
    whole = adder(small, "whole")
    adder.cancelled(small, "embed")
    assert adder(small, "vocabulary") == whole
    assert adder.encoded == ["embed", "head"]

    def fail(*_: object, **__: object) -> None:
        raise DiskFull("no room")

    monkeypatch.setattr(add, "write_stack", fail)
    with pytest.raises(DiskFull):
        adder(small, "full")
    monkeypatch.undo()
    monkeypatch.setattr(texts, "STREAMS", 8)
    monkeypatch.setattr(texts, "LENGTH", 16)
    assert adder(small, "nothing") == whole
    assert adder.encoded == []


def test_gradients_are_not_computed_again(adder, small, monkeypatch):
    adder.cancelled(small, "layers.1.q")
    monkeypatch.setattr("ebbflow.daemon.library.encode.output_gradients", None)  # would fail if called
    adder(small, "again")


def test_stored_gradients_are_exact(small):
    checkpoint = open_checkpoint(small)
    tokens = sample_tokens(checkpoint, streams=2, length=8)
    made = output_gradients(checkpoint, tokens, 0, lambda *_: None)
    stored = Gradients.from_bytes(made.to_bytes())
    assert stored.logits == made.logits
    assert torch.equal(stored.embedding, made.embedding)
    for one, other in zip(stored.layers, made.layers, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[role], other[role]) for role in one)


def test_killed_at_any_step(small, tmp_path):
    script = Path(__file__).parents[1] / "support" / "kill_steps.py"
    command = [sys.executable, "-P", str(script), str(small), str(tmp_path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    *killed, last = [json.loads(line) for line in output.splitlines()]
    assert len(killed) > 15
    for step in killed:
        assert (step["code"], step["visible"]) == (9, [])
        assert (step["again"], step["left"], step["library"]) == (0, [], ["new"])
    # The last kill comes after the rename: the model is complete.
    stack = (tmp_path / str(last["step"]) / "library" / "new" / STACK).read_bytes()
    assert {step["stack"] for step in killed} == {hashlib.blake2b(stack).hexdigest()}
    # The later the kill, the less there is to do: all of it at first, nothing at last.
    layers = [len({name.split(".")[1] for name in step["encoded"] if "." in name}) for step in killed]
    assert layers == sorted(layers, reverse=True)
    assert set(layers) == set(range(LAYERS + 1))


# -- damage -------------------------------------------------------------------------------------------------------


def flip(data: bytearray, at: int) -> None:
    data[at] ^= 16


DAMAGES = {
    "first byte": lambda data: flip(data, 0),
    "middle": lambda data: flip(data, len(data) // 2),
    "index": lambda data: flip(data, len(data) - 60),
    "length": lambda data: flip(data, len(data) - 17),
    "hash": lambda data: flip(data, len(data) - 1),
    "short": lambda data: data.__delitem__(slice(len(data) - 5, None)),
    "half": lambda data: data.__delitem__(slice(len(data) // 2, None)),
    "longer": lambda data: data.extend(b"x"),
    "empty": lambda data: data.clear(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parts_are_as_good_as_none(tmp_path, damage):
    spool = Spool(tmp_path)
    with spool.writing("blocks"):
        spool.add(entry("a", b"payload of a"), b"payload of a")
        spool.add(entry("b", b"and b"), b"and b")
    spool.keep("bytes", b"some bytes that are dear to make, and as long as an index")
    again = Spool(tmp_path)
    assert again.load("blocks")
    assert [again.read(i) for i in range(2)] == [b"payload of a", b"and b"]
    for part in ("blocks", "bytes"):
        data = bytearray((tmp_path / part).read_bytes())
        DAMAGES[damage](data)
        (tmp_path / part).write_bytes(data)
    spoilt = Spool(tmp_path)
    assert not spoilt.load("blocks")
    assert spoilt.kept("bytes") is None
    assert spoilt.entries == []


def entry(tensor: str, payload: bytes) -> BlockEntry:
    return BlockEntry(
        kind="dense", tensor=tensor, level=0, shape=(1,), nbytes=len(payload), gain=0.0, hash=content_hash(payload),
        uses=(tensor,), dtype="i8",
    )  # fmt: skip


@pytest.mark.parametrize(("part", "left"), [("dense", 1), ("gradients", 1), ("layer-0000", 3), ("layer-0001", 2)])
def test_what_is_damaged_is_made_again(adder, small, part, left):
    whole = adder(small, "whole")
    adder.cancelled(small, "layers.2.q")
    (work,) = adder.works()
    assert sorted(path.name for path in work.iterdir()) == PARTS[:4]
    data = bytearray((work / part).read_bytes())
    flip(data, len(data) // 3)
    (work / part).write_bytes(data)
    assert adder(small, "again") == whole
    assert len(encoded_layers(adder) - {"embed", "head"}) == left


def test_a_part_that_was_never_finished_is_not_there(tmp_path):
    spool = Spool(tmp_path)
    with pytest.raises(DiskFull), spool.writing("blocks"):
        spool.add(entry("a", b"payload"), b"payload")
        raise DiskFull("no room")
    assert list(tmp_path.iterdir()) == []
    assert not spool.load("blocks")


# -- whose work it is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"seed": 1}, {"levels": 3}, {"codec": "bitstack"}])
def test_other_options_are_other_work(adder, small, options):
    adder.cancelled(small, "layers.2.q")
    adder(small, "other", **options)
    assert len(encoded_layers(adder) - {"embed", "head"}) == LAYERS
    assert len(adder.works()) == 1


def test_another_order_or_name_is_the_same_work(adder, small):
    adder.cancelled(small, "layers.2.q")
    adder(small, "paper", order="paper")
    assert encoded_layers(adder) == {"layers.2", "embed", "head"}


def test_other_weights_are_other_work(adder, small, tmp_path):
    adder.cancelled(small, "layers.2.q")
    write_checkpoint(SMALL, tmp_path / "other", seed=1)
    adder(tmp_path / "other", "other")
    assert len(encoded_layers(adder) - {"embed", "head"}) == LAYERS


def test_the_key_is_of_everything_that_blocks_depend_on(monkeypatch):
    tokens = torch.arange(12).reshape(3, 4)
    keys = {
        work_key("a", tokens, "nested", 5, None),
        work_key("b", tokens, "nested", 5, None),
        work_key("a", tokens + 1, "nested", 5, None),
        work_key("a", tokens.reshape(4, 3), "nested", 5, None),
        work_key("a", tokens, "nested", 6, None),
        work_key("a", tokens, "nested", None, 5),
    }
    monkeypatch.setattr(resume, "_code", lambda: "other code")
    keys.add(work_key("a", tokens, "nested", 5, None))
    torch.set_num_threads(2)
    keys.add(work_key("a", tokens, "nested", 5, None))
    assert len(keys) == 8
    torch.set_num_threads(1)


def test_two_at_the_same_work_do_not_meet(tmp_path):
    with resumable(tmp_path, "key", 0) as first:
        alone = subprocess.run([sys.executable, "-c", TAKE, str(tmp_path)], check=True, capture_output=True, text=True)
        assert first.name == "key"
        assert first.exists()
    assert alone.stdout.startswith("key-")
    assert list((tmp_path / "adding").iterdir()) == []


TAKE = """
import sys
from pathlib import Path
from ebbflow.daemon.library.resume import resumable
with resumable(Path(sys.argv[1]), "key", 0) as folder:
    print(folder.name)
"""


# -- what is kept, and for how long -------------------------------------------------------------------------------


def leave(cache: Path, key: str, age: float = 0.0, nbytes: int = 10) -> Path:
    folder = cache / "adding" / key
    folder.mkdir(parents=True)
    (folder / "layer-0000").write_bytes(bytes(nbytes))
    changed = folder.stat().st_mtime - age
    os.utime(folder, (changed, changed))
    return folder


def names(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "adding").iterdir())


def test_the_latest_leftovers_are_kept(tmp_path):
    for age, key in enumerate("abcd"):
        leave(tmp_path, key, 100.0 * age)
    leave(tmp_path, "e-77", 50.0)  # of a job that was not alone
    with resumable(tmp_path, "new", 0):
        assert names(tmp_path) == ["a", "b", "new"]
    assert names(tmp_path) == ["a", "b"]
    assert leftover_nbytes(tmp_path) == 20


def test_old_leftovers_are_removed(tmp_path):
    leave(tmp_path, "old", resume.KEPT_SECONDS + 60.0)
    leave(tmp_path, "young", resume.KEPT_SECONDS - 3600.0)
    with resumable(tmp_path, "new", 0):
        assert names(tmp_path) == ["new", "young"]


def test_leftovers_are_never_why_there_is_no_room(adder, small):
    free = resume.shutil.disk_usage(adder.cache.parent).free
    leave(adder.cache, "a")
    leave(adder.cache, "mine")
    with resumable(adder.cache, "mine", free + 2**60):
        assert names(adder.cache) == ["mine"]


def test_work_in_use_is_left_alone(tmp_path):
    folder = leave(tmp_path, "used", resume.KEPT_SECONDS + 60.0)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with resumable(tmp_path, "new", 2**60):
            assert names(tmp_path) == ["new", "used"]
        assert leftover_nbytes(tmp_path) == 0
    finally:
        os.close(held)


def test_a_broken_checkpoint_leaves_no_work_and_other_errors_do(tmp_path):
    for error, left in ((CorruptCheckpoint("NaN"), []), (DiskFull("no room"), ["key"]), (KeyError("bug"), ["key"])):
        with pytest.raises(type(error)), resumable(tmp_path, "key", 0):
            raise error
        assert names(tmp_path) == left


# -- progress -----------------------------------------------------------------------------------------------------


def test_what_was_done_before_says_nothing_about_the_time_left():
    told: list[Progress] = []
    clock: Iterator[float] = iter([0.0, 0.0, 0.0, 10.0, 10.0, 10.0])
    reporter = Reporter(1, 1000, told.append, lambda: next(clock))
    reporter.begin("encoding")
    reporter.skip(80, 100)
    reporter.fraction(90, 100)
    assert (told[-1].done, told[-1].eta_seconds) == (900, 10.0)


def test_progress_goes_on_where_it_was(adder, small):
    adder.cancelled(small, "layers.2.q")
    before = next(progress.done for progress in adder.told if progress.tensor == "layers.2.q")
    adder(small, "again")
    done = [progress.done for progress in adder.told if progress.stage == "encoding"]
    assert 0.8 * before < done[0] < before
    assert done == sorted(done)
