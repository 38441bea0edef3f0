"""Copying models whose masks are in a file of their own: masks first, shared where the library has them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from ebbflow.daemon.library import carry, copying
from ebbflow.daemon.library.carry import carry_model
from ebbflow.daemon.supervisor.library import Library, delete
from ebbflow.daemon.worker.resident import Resident
from ebbflow.formats.errors import (
    BadBlock,
    BadHeader,
    CorruptFile,
    CorruptManifest,
    DiskFull,
    NotArrived,
    TruncatedStack,
)
from ebbflow.formats.manifest import MANIFEST, MASKS, STACK, read_manifest, write_manifest
from ebbflow.formats.messages import ExportModel, ImportModel, Progress
from ebbflow.formats.stack import Stack, read_blocks, read_stack

from support.stacks import copy_model, write_sparse_model

Tell = Callable[[Progress], None]


class Stop(Exception):
    """The copy is killed."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse_model(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same masks, other values."""
    return write_sparse_model(tmp_path_factory.mktemp("variant") / "model", dtype="f16")


@pytest.fixture(scope="module")
def stack(source: Path) -> Stack:
    return read_stack(source / STACK)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    (tmp_path / "library").mkdir()
    return tmp_path / "library"


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry, "TELL_NBYTES", 1)
    monkeypatch.setattr(copying, "PIECE_NBYTES", 100)


def bring(source: Path, library: Path, name: str = "m", tell: Tell = lambda progress: None) -> None:
    carry_model(ImportModel(id=1, source=str(source), name=name), library, tell)


def take(library: Path, name: str, target: Path) -> None:
    carry_model(ExportModel(id=1, name=name, target=str(target)), library, lambda progress: None)


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in (STACK, MASKS)]


def links(folder: Path) -> int:
    return (folder / MASKS).stat().st_nlink


def test_masks_arrive_whole_before_the_stack_begins(source: Path, stack: Stack, library: Path) -> None:
    heard: list[Progress] = []
    there: list[int] = []

    def tell(progress: Progress) -> None:
        heard.append(progress)
        if (library / "m" / STACK).exists():
            assert (library / "m" / MASKS).read_bytes() == (source / MASKS).read_bytes()
            resident = Resident(read_stack(library / "m" / STACK))
            there.append(resident.present)
            resident.close()
        else:
            with pytest.raises(NotArrived):
                read_stack(library / "m" / STACK)
        line = Library(library).summaries()[0]
        assert 0 <= (line.arrived_nbytes or 0) <= line.nbytes

    bring(source, library, tell=tell)
    done = [progress.done for progress in heard]
    assert done == sorted(done)
    assert (done[-1], {progress.total for progress in heard}) == (stack.nbytes, {stack.nbytes})
    assert there[0] < stack.base < there[-2] < there[-1] == len(stack.blocks)
    assert contents(library / "m") == contents(source)
    assert sorted(path.name for path in (library / "m").iterdir()) == sorted(path.name for path in source.iterdir())


def test_an_import_shares_the_masks_that_the_library_has(source: Path, variant: Path, library: Path) -> None:
    bring(source, library, "a")
    bring(variant, library, "b")
    assert os.path.samestat((library / "a" / MASKS).stat(), (library / "b" / MASKS).stat())
    assert links(library / "a") == 2
    assert [line.shares for line in Library(library).summaries()] == [("b",), ("a",)]
    assert links(variant) == 1
    Library(library, delete).remove("a")
    assert contents(library / "b") == contents(variant)
    assert list(read_blocks(read_stack(library / "b" / STACK)))


def test_an_export_is_a_file_of_its_own(source: Path, variant: Path, library: Path, tmp_path: Path) -> None:
    bring(source, library, "a")
    bring(variant, library, "b")
    take(library, "b", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(variant)
    assert (links(tmp_path / "out"), links(library / "b")) == (1, 2)
    second = tmp_path / "second"
    second.mkdir()
    bring(tmp_path / "out", second)
    assert contents(second / "m") == contents(variant)


@pytest.mark.parametrize("moment", ["in the masks", "after the masks", "in the stack", "at the end"])
def test_a_killed_import_goes_on(source: Path, stack: Stack, library: Path, moment: str) -> None:
    masks = stack.nbytes - stack.file_edges[-1]
    at = {
        "in the masks": 1,
        "after the masks": masks + 1,
        "in the stack": masks + stack.file_edges[stack.base + 4],
        "at the end": stack.nbytes,
    }[moment]

    def kill(progress: Progress) -> None:
        if progress.done >= at:
            raise Stop

    with pytest.raises(Stop):
        bring(source, library, tell=kill)
    assert Library(library).arriving("m")
    inode = (library / "m" / MASKS).stat().st_ino if moment != "in the masks" else 0
    heard: list[int] = []
    bring(source, library, tell=lambda progress: heard.append(progress.done))
    assert contents(library / "m") == contents(source)
    if inode:  # masks that were whole are not copied again
        assert (library / "m" / MASKS).stat().st_ino == inode
        assert heard[0] >= masks
    assert not [path for path in (library / "m").iterdir() if path.suffix in (".partial", ".arriving")]


def test_masks_spoilt_in_a_half_copy_are_copied_again_and_never_written_into(
    source: Path, variant: Path, stack: Stack, library: Path
) -> None:
    bring(variant, library, "a")

    def kill(progress: Progress) -> None:
        if progress.done > stack.nbytes - 5000:
            raise Stop

    with pytest.raises(Stop):
        bring(source, library, tell=kill)
    assert links(library / "a") == 2
    spoilt = bytearray((source / MASKS).read_bytes())
    spoilt[-64] ^= 1
    (library / "m" / MASKS).write_bytes(spoilt)  # both, because it is one file
    bring(source, library)
    assert contents(library / "m") == contents(source)
    assert (library / "a" / MASKS).read_bytes() == bytes(spoilt)  # not ours to mend behind its back
    assert links(library / "a") == 1


@pytest.mark.parametrize("name", [MASKS, MASKS + ".partial"])
def test_masks_are_not_written_through_a_link(source: Path, library: Path, tmp_path: Path, name: str) -> None:
    def kill(progress: Progress) -> None:
        raise Stop

    with pytest.raises(Stop):
        bring(source, library, tell=kill)
    elsewhere = tmp_path / "precious"
    elsewhere.write_text("keep")
    (library / "m" / MASKS).unlink(missing_ok=True)
    (library / "m" / name).symlink_to(elsewhere)
    bring(source, library)
    assert elsewhere.read_text() == "keep"
    assert not (library / "m" / MASKS).is_symlink()
    assert contents(library / "m") == contents(source)


def test_what_cannot_be_imported(source: Path, library: Path, tmp_path: Path) -> None:
    def harmed(name: str, harm: Callable[[Path], object], error: type[Exception]) -> None:
        folder = copy_model(source, tmp_path / name)
        harm(folder)
        with pytest.raises(error):
            bring(folder, library, name)

    content = (source / MASKS).read_bytes()
    harmed("a", lambda folder: (folder / MASKS).unlink(), TruncatedStack)
    harmed("b", lambda folder: os.truncate(folder / MASKS, len(content) - 1), TruncatedStack)
    harmed("c", lambda folder: (folder / MASKS).write_bytes(content[:-64] + bytes(63) + b"\1"), BadBlock)
    harmed("d", lambda folder: shutil.copy(folder / STACK, folder / MASKS), BadHeader)
    other = msgspec.structs.replace(read_manifest(source), masks="0" * 32)
    harmed("e", lambda folder: write_manifest(folder, other), CorruptManifest)
    assert not (library / "c" / MASKS).exists()


def test_a_folder_of_links_is_imported_as_what_they_name(source: Path, library: Path, tmp_path: Path) -> None:
    """As in a snapshot of Hugging Face. In the library itself nothing is read through a link, also by an export."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in source.iterdir():
        (snapshot / path.name).symlink_to(path)
    bring(snapshot, library)
    assert contents(library / "m") == contents(source)
    assert not any(path.is_symlink() for path in (library / "m").iterdir())
    for name in (MASKS, STACK, MANIFEST):
        (library / "m" / name).unlink()
        (library / "m" / name).symlink_to(source / name)
        with pytest.raises(CorruptFile, match="a link"):
            take(library, "m", tmp_path / "out")
        (snapshot / name).unlink()
        os.mkfifo(tmp_path / name)
        (snapshot / name).symlink_to(tmp_path / name)
        with pytest.raises(CorruptFile, match="not a plain file"):
            bring(snapshot, library, "n")


def test_room_is_wanted_for_masks_only_where_they_are_copied(
    source: Path, variant: Path, stack: Stack, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(source, library, "a")
    wanted = (variant / STACK).stat().st_size
    usage = type("Usage", (), {"free": wanted})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage)
        shutil.rmtree(library / "a")
        with pytest.raises(DiskFull):
            bring(variant, library, "b")
        assert not (library / "b").exists()
    bring(source, library, "a")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    bring(variant, library, "b")
    assert links(library / "a") == 2


def test_a_library_that_lies_about_its_masks_is_not_linked_to(source: Path, variant: Path, library: Path) -> None:
    """Its manifest says our masks; its file has others, or is a link out of the library."""
    bring(source, library, "a")
    (library / "a" / MASKS).write_bytes(b"anything")
    bring(variant, library, "b")
    (library / "a" / MASKS).unlink()
    (library / "a" / MASKS).symlink_to(source / MASKS)
    shutil.rmtree(library / "b")
    bring(variant, library, "b")
    assert contents(library / "b") == contents(variant)
    assert (links(library / "b"), links(source)) == (1, 1)
