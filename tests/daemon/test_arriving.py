"""A model whose file is still arriving answers from its base on, and gets better; one that is truncated does not."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ebbflow.daemon.library import carry, copying
from ebbflow.daemon.library.carry import carry_model
from ebbflow.daemon.supervisor.library import Library
from ebbflow.daemon.worker.loop import Loop
from ebbflow.daemon.worker.served import LOOK_SECONDS
from ebbflow.formats.child_messages import LoadFailed, LoadModel, Report
from ebbflow.formats.errors import (
    BadBlock,
    CorruptManifest,
    DiskFull,
    EbbflowError,
    InvalidRequest,
    ModelExists,
    NotArrived,
    StorageFailed,
    TruncatedStack,
)
from ebbflow.formats.manifest import STACK, read_manifest, write_manifest
from ebbflow.formats.messages import Chunk, ExportModel, Finished, Generate, ImportModel, Progress
from ebbflow.formats.stack import Stack, mark_of, read_stack
from ebbflow.formats.values import Sampling

from support.fake_line import FakeClock, FakeLine
from support.stacks import copy_model, write_planes_model

ALL = 10**12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planes_model(tmp_path_factory.mktemp("source") / "model", levels=4)


@pytest.fixture(scope="module")
def stack(source: Path) -> Stack:
    return read_stack(source / STACK)


class Copy:
    """A model folder that somebody copies, block by block."""

    def __init__(self, source: Path, target: Path) -> None:
        self.bytes = (source / STACK).read_bytes()
        self.folder = copy_model(source, target)
        self.path = self.folder / STACK
        mark_of(self.path).touch()
        self.path.write_bytes(b"")

    def until(self, size: int) -> None:
        """The file's first `size` bytes are there."""
        with self.path.open("ab") as file:
            file.write(self.bytes[file.tell() : size])

    def done(self) -> None:
        self.until(len(self.bytes))
        mark_of(self.path).unlink()


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Copy:
    return Copy(source, tmp_path / "model")


class Worker:
    """A worker's loop that holds one model and is asked now and then."""

    def __init__(self, folder: Path) -> None:
        self.line, self.clock = FakeLine(), FakeClock()
        self.loop = Loop(self.line, 1, self.clock)
        self.line.script.append([LoadModel(model="m", folder=str(folder), target_nbytes=ALL)])
        self.said = self.turns()

    def turns(self, count: int = 3) -> list[Any]:
        """Some rounds, with time between them to look at the file."""
        for _ in range(count):
            self.clock.now += LOOK_SECONDS
            self.loop.turn()
        return self.line.take()

    @property
    def blocks(self) -> int:
        return self.loop.models["m"].resident.blocks

    def arrived(self) -> int | None:
        return self.loop.models["m"].residency("m").arrived_nbytes

    def answer(self) -> str:
        asked = Generate(id=1, model="m", prompt="Once", sampling=Sampling(max_tokens=8))
        self.line.script.append([asked])
        said = self.turns(20)
        assert isinstance([event for event in said if not isinstance(event, Report)][-1], Finished)
        return "".join(event.text for event in said if isinstance(event, Chunk))


def test_it_answers_at_its_base_and_improves_as_the_file_grows(source: Path, stack: Stack, copy: Copy) -> None:
    copy.until(stack.data_start + stack.edges[stack.base])
    worker = Worker(copy.folder)
    assert worker.blocks == stack.base
    assert worker.arrived() == stack.base_nbytes
    texts = [worker.answer()]
    for blocks in range(stack.base, len(stack.blocks)):
        copy.until(stack.data_start + stack.edges[blocks] + 1)  # of the next block there is a byte, which is not it
        worker.turns()
        assert worker.blocks == blocks
        assert worker.line.timeouts[-1] == LOOK_SECONDS  # it does not spin
    copy.done()
    said = worker.turns()
    assert worker.blocks == len(stack.blocks)
    assert worker.arrived() is None
    assert [event for event in said if isinstance(event, Report)][-1].models[0].arrived_nbytes is None
    texts.append(worker.answer())
    assert texts[1] == Worker(source).answer()
    assert texts[0] != texts[1]


@pytest.mark.parametrize("where", ["nothing", "length", "header", "base"])
def test_before_its_base_is_there_it_says_try_again(stack: Stack, copy: Copy, where: str) -> None:
    sizes = {"nothing": 0, "length": 5, "header": 1000, "base": stack.data_start + stack.base_nbytes - 1}
    copy.until(sizes[where])
    (failed,) = [event for event in Worker(copy.folder).said if isinstance(event, LoadFailed)]
    assert failed.code == "not_arrived"
    assert NotArrived.retryable


def test_without_the_mark_a_short_file_is_truncated_for_ever(stack: Stack, copy: Copy) -> None:
    copy.until(len(copy.bytes) - 1)
    assert read_stack(copy.path).arriving
    mark_of(copy.path).unlink()
    with pytest.raises(TruncatedStack):
        read_stack(copy.path)


def test_a_file_of_full_length_with_holes_is_still_arriving(stack: Stack, copy: Copy) -> None:
    """As rsync --inplace, or a download in pieces, would leave it."""
    hole = stack.base + 2
    content = bytearray(copy.bytes)
    start, stop = (stack.data_start + stack.edges[hole + i] for i in (0, 1))
    content[start:stop] = bytes(stop - start)
    copy.path.write_bytes(content)
    worker = Worker(copy.folder)
    assert worker.blocks == hole
    with copy.path.open("r+b") as file:
        file.seek(start)
        file.write(copy.bytes[start:stop])
    worker.turns()
    assert worker.blocks == len(stack.blocks)


def test_a_header_that_is_a_hole_has_not_arrived(stack: Stack, copy: Copy) -> None:
    for kept in (0, 8, 100):
        copy.path.write_bytes(copy.bytes[:kept] + bytes(len(copy.bytes) - kept))
        with pytest.raises(NotArrived):
            read_stack(copy.path)


def test_when_the_mark_goes_what_is_wrong_is_wrong(stack: Stack, copy: Copy, caplog: pytest.LogCaptureFixture) -> None:
    content = bytearray(copy.bytes)
    content[stack.data_start + stack.edges[stack.base + 1]] ^= 1
    copy.path.write_bytes(content)
    worker = Worker(copy.folder)
    assert worker.blocks == stack.base + 1
    mark_of(copy.path).unlink()
    worker.turns()
    assert worker.blocks == stack.base + 1
    assert "does not match its hash" in caplog.text
    assert worker.answer()


def test_a_copy_that_breaks_off_leaves_a_model_at_its_edge(
    stack: Stack, copy: Copy, caplog: pytest.LogCaptureFixture
) -> None:
    copy.until(stack.data_start + stack.edges[stack.base + 3] + 7)
    worker = Worker(copy.folder)
    mark_of(copy.path).unlink()
    worker.turns()
    assert worker.blocks == stack.base + 3
    assert "ends at byte" in caplog.text
    assert worker.answer()


# -- copying --------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """The copy is killed."""


def bring(source: Path, library: Path, tell: Any = lambda progress: None, name: str = "m") -> Any:
    return carry_model(ImportModel(id=1, source=str(source), name=name), library, tell)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    (tmp_path / "library").mkdir()
    return tmp_path / "library"


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry, "TELL_NBYTES", 1)
    monkeypatch.setattr(copying, "PIECE_NBYTES", 100)


def same(one: Path, two: Path) -> bool:
    return (one / STACK).read_bytes() == (two / STACK).read_bytes()


def test_an_import_is_a_model_from_its_base_on_and_then_a_whole_one(source: Path, stack: Stack, library: Path) -> None:
    served: list[int] = []
    heard: list[Progress] = []

    def tell(progress: Progress) -> None:
        heard.append(progress)
        if progress.done >= stack.base_nbytes and len(served) < 3:
            served.append(Worker(library / "m").blocks)
        line = Library(library).summaries()
        assert [model.name for model in line] == ["m"]
        assert line[0].arrived_nbytes is not None

    summary = bring(source, library, tell)
    assert served == [stack.base, stack.base + 1, stack.base + 2]
    assert [progress.done for progress in heard] == list(stack.edges)
    assert summary.name == "m"
    assert same(source, library / "m")
    assert not read_stack(library / "m" / STACK).arriving
    assert read_manifest(library / "m").name == "m"
    assert Library(library).summaries()[0].arrived_nbytes is None


@pytest.mark.parametrize("torn", [0, 1, 4096])
def test_an_import_goes_on_where_it_was_killed(source: Path, stack: Stack, library: Path, torn: int) -> None:
    for stop in (0, stack.base, len(stack.blocks) - 1, len(stack.blocks)):

        def kill(progress: Progress, stop: int = stop) -> None:
            if progress.done >= stack.edges[stop]:
                raise Stop

        with pytest.raises(Stop):
            bring(source, library, kill)
        path = library / "m" / STACK
        os.truncate(path, max(0, path.stat().st_size - torn))  # what the system had not written yet
        assert Library(library).arriving("m")
    heard: list[Progress] = []
    bring(source, library, heard.append)
    assert same(source, library / "m")
    assert heard[0].done >= stack.edges[len(stack.blocks) - 2] or torn == 4096


def test_a_block_spoiled_by_a_kill_is_copied_again(source: Path, stack: Stack, library: Path) -> None:
    with pytest.raises(Stop):
        bring(source, library, lambda progress: stop_at(progress, stack.edges[-2]))
    with (library / "m" / STACK).open("r+b") as file:
        file.seek(stack.data_start + stack.edges[3])
        file.write(b"\xff" * 64)
    bring(source, library)
    assert same(source, library / "m")


def stop_at(progress: Progress, done: int) -> None:
    if progress.done >= done:
        raise Stop


def test_what_is_in_the_library_is_not_overwritten(source: Path, library: Path, tmp_path: Path) -> None:
    bring(source, library)
    with pytest.raises(ModelExists):
        bring(source, library)
    other = write_planes_model(tmp_path / "other", levels=3, seed=5)
    mark_of(library / "m" / STACK).touch()
    with pytest.raises(ModelExists):
        bring(other, library)


def test_a_disk_that_fills_up_keeps_what_is_there(
    source: Path, stack: Stack, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holds = carry._holds

    def full(stack: Stack, file: Any, position: int, copy: Any) -> bool:
        if position > stack.base:
            raise OSError(errno.ENOSPC, "No space left on device")
        return holds(stack, file, position, copy)

    with monkeypatch.context() as patch:
        patch.setattr(carry, "_holds", full)
        with pytest.raises(DiskFull, match="goes on"):
            bring(source, library)
    assert Worker(library / "m").blocks == stack.base + 1
    bring(source, library)
    assert same(source, library / "m")


def test_no_room_is_said_before_anything_is_written(
    source: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(DiskFull):
        bring(source, library)
    assert not list(library.iterdir())


def test_what_cannot_be_imported(source: Path, stack: Stack, library: Path, tmp_path: Path) -> None:
    def harmed(name: str, harm: Any, error: type[EbbflowError]) -> None:
        folder = copy_model(source, tmp_path / name)
        harm(folder)
        with pytest.raises(error):
            bring(folder, library, name=name)

    def spoil(folder: Path) -> None:
        with (folder / STACK).open("r+b") as file:
            file.seek(stack.data_start + stack.edges[4])
            file.write(b"\x00\xff" * 8)

    harmed("a", lambda folder: mark_of(folder / STACK).touch(), NotArrived)
    harmed("b", lambda folder: os.truncate(folder / STACK, 9000), TruncatedStack)
    harmed("c", spoil, BadBlock)
    harmed("d", lambda folder: (folder / "manifest.json").unlink(), CorruptManifest)
    endless = msgspec.structs.replace(read_manifest(source), created="x" * 1_000_000)
    harmed("f", lambda folder: write_manifest(folder, endless), CorruptManifest)
    modest = msgspec.structs.replace(read_manifest(source), base_nbytes=1)
    harmed("g", lambda folder: write_manifest(folder, modest), CorruptManifest)
    other = write_planes_model(tmp_path / "two-levels", levels=2)
    harmed("e", lambda folder: (folder / STACK).write_bytes((other / STACK).read_bytes()), CorruptManifest)


def test_an_export_can_be_imported_elsewhere(source: Path, library: Path, tmp_path: Path) -> None:
    bring(source, library)
    target = tmp_path / "My stick"
    assert carry_model(ExportModel(id=1, name="m", target=str(target)), library, lambda progress: None).name == "m"
    assert same(source, target)
    assert not mark_of(target / STACK).exists()
    second = tmp_path / "second"
    second.mkdir()
    bring(target, second, name="again")
    assert Worker(second / "again").answer() == Worker(source).answer()
    with pytest.raises(ModelExists):
        carry_model(ExportModel(id=1, name="m", target=str(target)), library, lambda progress: None)
    (tmp_path / "link").symlink_to(library)
    for nowhere in (tmp_path / "no" / "where", library / "n", library / "m" / "n", tmp_path / "link" / "n"):
        with pytest.raises(InvalidRequest):
            carry_model(ExportModel(id=1, name="m", target=str(nowhere)), library, lambda progress: None)


def test_a_half_copied_stack_is_not_written_through_a_link(source: Path, library: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        bring(source, library, lambda progress: stop_at(progress, 1))
    elsewhere = tmp_path / "precious"
    elsewhere.write_text("keep")
    (library / "m" / STACK).unlink()
    (library / "m" / STACK).symlink_to(elsewhere)
    with pytest.raises(StorageFailed):
        bring(source, library)
    assert elsewhere.read_text() == "keep"
