"""Keys for tcp (CURVE): how they are written, kept and checked. Making them and using them is the two `channel`s'.

A key is 40 letters of Z85. `<config>/keys` has `daemon` and `client`, a pair each (0600, made on first need), and
`allowed`, a line for each client that may come: its public key and, after a space, a name for people.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from .errors import InvalidConfig, storage_failed

_KEY: Final = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_PAIR: Final = re.compile(rf"public ({_KEY.pattern})\nsecret ({_KEY.pattern})\n")


@dataclass(frozen=True)
class KeyPair:
    """A public key and the secret that proves it."""

    public: str
    secret: str = field(repr=False)


def check_key(text: str) -> str:
    """`text`, if it can be a key. Raises `InvalidConfig`."""
    if not _KEY.fullmatch(text):
        raise InvalidConfig(f"{text!r} is not a key; `ebb keys show` prints one, 40 letters and signs")
    return text


def own_pair(path: Path, make: Callable[[], KeyPair]) -> KeyPair:
    """The pair in the file `path`, made now if there is none.

    Raises `InvalidConfig` for one that others can read or that is none, `StorageFailed` where it cannot be kept.
    """
    try:
        if not path.exists():
            _keep(path, make())
        status, text = path.stat(), path.read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise storage_failed(error, path) from error
    if status.st_mode & 0o077 or status.st_uid != os.geteuid():
        mode = stat.S_IMODE(status.st_mode)
        raise InvalidConfig(f"{path} has mode {mode:o}; it is a secret, and must be yours with mode 600")
    match = _PAIR.fullmatch(text)
    if match is None:
        raise InvalidConfig(f"{path} is not a pair of keys; delete it to get a new one")
    return KeyPair(match[1], match[2])


def read_allowed(path: Path) -> dict[str, str]:
    """Public keys that may come, and their names. Raises `InvalidConfig` or `StorageFailed`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise InvalidConfig(f"{path} is not text: {error}") from error
    except OSError as error:
        raise storage_failed(error, path) from error
    entries = (line.strip().partition(" ") for line in lines if line.strip())
    return {check_key(key): name.strip() for key, _, name in entries}


def write_allowed(path: Path, allowed: dict[str, str]) -> None:
    """Replace the file. Raises `StorageFailed`."""
    text = "".join(f"{key} {' '.join(name.split())}".rstrip() + "\n" for key, name in allowed.items())
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise storage_failed(error, path) from error


def is_loopback(address: str) -> bool:
    """Whether `tcp://HOST:PORT` is reachable from this machine only; anything unclear is not."""
    import ipaddress  # only who uses tcp waits for it

    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _keep(path: Path, pair: KeyPair) -> None:
    """Write a new pair; when another process was first, theirs stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(f"public {pair.public}\nsecret {pair.secret}\n")
    with contextlib.suppress(FileExistsError):
        path.hardlink_to(temporary)
    temporary.unlink()
