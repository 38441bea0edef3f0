"""The library index over folders of every kind."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ebbflow.daemon.supervisor.library import Library, delete, delete_behind
from ebbflow.formats.errors import UnknownModel
from ebbflow.formats.manifest import MANIFEST

from support.models import write_model


@pytest.fixture
def library(tmp_path):
    return Library(tmp_path, delete)


def names(library) -> list[str]:
    return [summary.name for summary in library.summaries()]


def test_only_complete_models_are_listed(library, tmp_path, caplog):
    write_model(tmp_path, "b", full=10, base=3)
    write_model(tmp_path, "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    write_model(tmp_path, "scrambled")
    (tmp_path / "scrambled" / MANIFEST).write_bytes(b"\xff{")
    write_model(tmp_path, "future")
    (tmp_path / "future" / MANIFEST).write_text('{"version": 99}')
    write_model(tmp_path, "moved")
    (tmp_path / "moved").rename(tmp_path / "elsewhere")
    write_model(tmp_path, ".adding-c-1")
    library.scan()
    assert names(library) == ["a", "b"]
    assert (library.summaries()[1].nbytes, library.summaries()[1].base_nbytes) == (10, 3)
    for broken in ("empty", "scrambled", "future", "elsewhere"):
        assert caplog.text.count(f"{tmp_path}/{broken}") == 1
    library.scan()
    assert caplog.text.count(f"{tmp_path}/scrambled") == 1


def test_a_broken_name_is_taken_all_the_same(library, tmp_path):
    (tmp_path / "empty").mkdir()
    library.scan()
    assert library.exists("empty")
    assert not library.exists("nobody")


def test_unknown_models_are_named_with_what_there_is(library, tmp_path):
    with pytest.raises(UnknownModel, match="there is none"):
        library.get("x")
    write_model(tmp_path, "demo")
    library.scan()
    with pytest.raises(UnknownModel, match=r"'x'.*there is demo"):
        library.folder("x")


def test_a_library_that_is_not_there_is_empty(tmp_path, caplog):
    library = Library(tmp_path / "nowhere", delete)
    library.scan()
    library.clean()
    assert names(library) == []
    assert "cannot be read" in caplog.text


def test_remove_takes_the_name_at_once_and_the_bytes_later(tmp_path):
    later = []
    library = Library(tmp_path, later.append)
    for round_ in range(2):  # the second time while the first is still being deleted
        write_model(tmp_path, "demo")
        library.scan()
        library.remove("demo")
        assert names(library) == []
        assert not (tmp_path / "demo").exists()
        assert len(later) == round_ + 1
    assert len(list(tmp_path.iterdir())) == 2
    for folder in later:
        assert folder.name.startswith(".removing-demo")
        delete_behind(folder)
    with pytest.raises(UnknownModel):
        library.remove("demo")


def test_clean_deletes_what_nobody_owns(library, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    kept = {f".adding-a-{os.getppid()}", "demo", ".other"}
    gone = {
        f".adding-b-{dead.pid}",
        f".removing-c-{dead.pid}",
        f".removing-d-{os.getpid()}",
        ".adding-e",
        ".adding-f-x",
    }
    gone.add(f".adding-g-{10**30}")
    for name in kept | gone:
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_text("x")
    library.clean()
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_discard_deletes_one_jobs_folder(library, tmp_path):
    (tmp_path / ".adding-a-5").mkdir()
    (tmp_path / ".adding-a-6").mkdir()
    library.discard("a", 5)
    library.discard("a", 7)
    assert [path.name for path in tmp_path.iterdir()] == [".adding-a-6"]
