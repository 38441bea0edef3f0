from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from ebbflow.formats.errors import InvalidConfig, StorageFailed
from ebbflow.formats.keys import KeyPair, check_key, is_loopback, own_pair, read_allowed, write_allowed

A, B, C = "a" * 40, "B" * 40, "#0-:+=^!/*?&<>()[]{}@%$" + "c" * 17


def test_a_pair_is_made_once_and_only_its_owner_can_read_it(tmp_path):
    path = tmp_path / "keys" / "client"
    assert own_pair(path, lambda: KeyPair(A, B)) == KeyPair(A, B)
    assert own_pair(path, lambda: KeyPair(B, A)) == KeyPair(A, B)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [file.name for file in path.parent.iterdir()] == ["client"]
    assert B not in repr(own_pair(path, lambda: KeyPair(A, B)))


def test_of_two_that_make_one_at_once_one_wins(tmp_path):
    path = tmp_path / "client"
    numbers = count(1)

    def make() -> KeyPair:
        made = KeyPair(A, f"{next(numbers):040}")
        if not path.exists():  # the other one is faster
            path.touch(0o600)
            path.write_text(f"public {C}\nsecret {C}\n")
        return made

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(own_pair, path, make).result() == KeyPair(C, C)


def test_a_pair_that_is_none_or_not_secret_is_refused(tmp_path):
    path = tmp_path / "client"
    own_pair(path, lambda: KeyPair(A, B))
    path.chmod(0o640)
    with pytest.raises(InvalidConfig, match="mode 640"):
        own_pair(path, lambda: KeyPair(A, B))
    path.chmod(0o600)
    for text in ("", f"public {A}\n", f"public {A}\nsecret short\n", "\xff"):
        path.write_text(text, encoding="latin1")
        with pytest.raises(InvalidConfig, match="not a pair"):
            own_pair(path, lambda: KeyPair(A, B))
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageFailed):
        own_pair(path, lambda: KeyPair(A, B))


def test_who_is_allowed(tmp_path):
    path = tmp_path / "keys" / "allowed"
    assert read_allowed(path) == {}
    write_allowed(path, {A: "my laptop\nand more", C: ""})
    assert read_allowed(path) == {A: "my laptop and more", C: ""}
    path.write_text("nonsense laptop\n")
    with pytest.raises(InvalidConfig, match="not a key"):
        read_allowed(path)


@pytest.mark.parametrize("text", ["", "a" * 39, "a" * 41, "a" * 39 + " ", "a" * 39 + '"', "a" * 40 + "\n"])
def test_what_is_no_key(text):
    assert check_key(C) == C
    with pytest.raises(InvalidConfig):
        check_key(text)


def test_loopback():
    for address in ("tcp://127.0.0.1:1", "tcp://127.8.0.1:1", "tcp://[::1]:5", "tcp://localhost:5"):
        assert is_loopback(address)
    for address in (
        "tcp://0.0.0.0:1",
        "tcp://*:1",
        "tcp://eth0:1",
        "tcp://10.0.0.1:1",
        "tcp://[::]:1",
        "tcp://:1",
        "tcp://127.0.0.1.example:1",
    ):
        assert not is_loopback(address), address
