"""The library against links that lead out of it, and against being killed at any step of taking a model out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ebbflow.daemon.supervisor.library import Library, delete
from ebbflow.formats.errors import InvalidName, UnknownModel
from ebbflow.formats.manifest import MANIFEST
from ebbflow.formats.paths import check_name

from support.models import write_model

SCRIPT = Path(__file__).parent.parent / "support" / "kill_removing.py"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "library").mkdir()
    return tmp_path / "library"


def test_a_model_folder_that_is_a_link_is_no_model(root, caplog):
    outside = root.parent / "outside"
    write_model(outside, "linked")
    (root / "linked").symlink_to(outside / "linked")
    library = Library(root, delete)
    assert library.summaries() == ()
    assert f"{root}/linked is a link" in caplog.text
    with pytest.raises(UnknownModel):
        library.remove("linked")
    assert (outside / "linked" / MANIFEST).exists()
    assert library.exists("linked")


@pytest.mark.parametrize("name", [MANIFEST, "stack.ebb", "tokenizer.json"])
def test_a_model_with_a_link_among_its_files_is_no_model(root, name, caplog):
    write_model(root, "mixed")
    secret = root.parent / "secret"
    secret.write_text("not for models")
    (root / "mixed" / name).unlink(missing_ok=True)
    (root / "mixed" / name).symlink_to(secret)
    library = Library(root, delete)
    assert library.summaries() == ()
    assert f"{name} is a link" in caplog.text
    (root / "mixed" / name).unlink()
    write_model(root, "mixed")
    assert [model.name for model in library.summaries()] == ["mixed"]


@pytest.mark.parametrize("name", [MANIFEST, "tokenizer.json"])
def test_a_model_with_a_pipe_among_its_files_is_no_model(root, name, caplog):
    write_model(root, "mixed")
    (root / "mixed" / name).unlink(missing_ok=True)
    os.mkfifo(root / "mixed" / name)
    assert Library(root, delete).summaries() == ()
    assert f"{name} is neither a file nor a folder" in caplog.text


def test_a_name_that_leads_nowhere_is_taken(root):
    (root / "dangling").symlink_to("/nowhere")
    assert Library(root, delete).exists("dangling")


def test_what_is_deleted_is_never_behind_a_link(root):
    outside = root.parent / "outside"
    write_model(outside, "kept")
    write_model(root, "going")
    (root / "going" / "more").mkdir()
    (root / "going" / "more" / "way-out").symlink_to(outside, target_is_directory=True)
    Library(root, delete).remove("going")
    assert not (root / "going").exists()
    assert (outside / "kept" / MANIFEST).exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc", ".hidden", "a\0b", "a\nb", "ü", "x" * 65, "-x"])
def test_names_that_are_paths_are_refused(name):
    with pytest.raises(InvalidName):
        check_name(name)


def test_killed_at_any_step_of_removing_a_model_is_whole_or_gone(root):
    for number in range(8):
        write_model(root, f"m{number}")
        for name in ("stack.ebb", "tokenizer.json"):
            (root / f"m{number}" / name).write_bytes(b"x" * 1000)
    done = subprocess.run([sys.executable, "-P", str(SCRIPT), str(root)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert [(one["step"], one["there"]) for one in found[:6]] == [
        ("rename", True),
        ("unlink", False),
        ("unlink", False),
        ("unlink", False),
        ("rmdir", False),
        ("", False),
    ]
    assert found[0]["whole"]
    assert all(one["left"] == [] for one in found)
