from __future__ import annotations

from pathlib import Path

import pytest

from ebbflow.formats.errors import DaemonFailed, InvalidName
from ebbflow.formats.paths import SOCKET_PATH_LIMIT, Paths, check_name, default_paths


def test_everything_below_one_home(monkeypatch, tmp_path):
    monkeypatch.setenv("EBBFLOW_HOME", str(tmp_path))
    paths = default_paths()
    assert paths == Paths(tmp_path / "run", tmp_path / "library", tmp_path / "cache", tmp_path / "logs", tmp_path)
    assert paths.settings == tmp_path / "config.toml"
    assert paths.lock == tmp_path / "run" / "daemon.lock"
    assert paths.log == tmp_path / "logs" / "daemon.log"


def test_a_relative_home_is_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EBBFLOW_HOME", "here")
    assert default_paths().library == tmp_path / "here" / "library"


def test_the_platforms_folders_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("EBBFLOW_HOME", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    paths = default_paths()  # without a runtime folder: no warning
    assert paths.library == tmp_path / "data" / "ebbflow" / "library"
    assert paths.cache == tmp_path / "cache" / "ebbflow"


def test_addresses(tmp_path):
    paths = Paths(Path("/run/e"), tmp_path, tmp_path, tmp_path, tmp_path)
    assert paths.clients == "ipc:///run/e/ebbflow.sock"
    assert paths.children == "ipc:///run/e/children.sock"


def test_a_path_too_long_for_a_socket_is_refused(tmp_path):
    room = SOCKET_PATH_LIMIT - len("//ebbflow.sock")
    paths = Paths(Path("/" + "x" * room), tmp_path, tmp_path, tmp_path, tmp_path)
    assert len(paths.clients) == len("ipc://") + SOCKET_PATH_LIMIT
    too_long = Paths(Path("/" + "x" * (room + 1)), tmp_path, tmp_path, tmp_path, tmp_path)
    with pytest.raises(DaemonFailed, match="EBBFLOW_HOME"):
        _ = too_long.clients
    in_bytes = Paths(Path("/" + "ü" * (room // 2 + 1)), tmp_path, tmp_path, tmp_path, tmp_path)
    with pytest.raises(DaemonFailed):
        _ = in_bytes.clients


@pytest.mark.parametrize("name", ["a", "7", "TinyLlama-1.1B_v2.0", "x" * 64])
def test_names(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-x", "_x", "a/b", "a\\b", "a b", "a\n", "é", "x" * 65, "../a", "a\0"]
)
def test_bad_names(name):
    with pytest.raises(InvalidName, match="is not a model name"):
        check_name(name)
