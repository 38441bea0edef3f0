"""Going on where an earlier job was killed, cancelled or failed: whose leftovers are used, and how long they are kept.

A job works in `cache/adding/<key>`, locked (flock). The key is a hash over everything that its blocks depend on: the
checkpoint, the tokens, the codec and its options, our own code and its libraries, the number of threads. So a later job
of the same key would make the same bytes, and takes what is there; `spool` has the hashes that find out damage. The
folder goes when the model is in the library, or can never be.

Disk: one copy of the stack's blocks for each leftover; at most two that are not in use are kept, for two weeks after
their last part, and none where a job would not have enough room otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import time
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Final

import msgspec
import torch
from torch import Tensor

from ...formats.errors import CorruptFile
from .place import lock_folder, locked

ROOT: Final = "adding"
KEPT: Final = 2
KEPT_SECONDS: Final = 14 * 24 * 3600
# Folders of our code on which the bytes of a block may depend.
_CODE: Final = ("daemon/library", "daemon/engine", "formats", "kernels")
_LIBRARIES: Final = ("torch", "numpy", "numba")


def work_key(checksum: str, tokens: Tensor, *options: str | int | None) -> str:
    """The name of the work of encoding the checkpoint `checksum`, calibrated on `tokens`, with `options`."""
    digest = hashlib.blake2b(digest_size=16)
    machine = (platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
    digest.update(msgspec.json.encode([checksum, list(tokens.shape), options, machine, _code()]))
    digest.update(tokens.contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def resumable(cache: Path, key: str, wanted: int) -> Iterator[Path]:
    """The folder of the work `key`, with what earlier jobs left there, for a job that writes up to `wanted` bytes.

    Removed when the block ends well or finds the checkpoint broken (`CorruptFile`); kept after any other error, and
    after a kill. Where another process is at the same work, this is a new folder that nobody goes on from.
    """
    root = cache / ROOT
    root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        folder, lock = _take(root, key)
        _sweep(root)
        if shutil.disk_usage(root).free + _nbytes(folder) < wanted:
            _sweep(root, kept=0)
    try:
        yield folder
    except CorruptFile:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def leftover_nbytes(cache: Path) -> int:
    """Bytes of all work that is not in use: what a job would go on from, or may remove."""
    return sum(_nbytes(folder) for folder in _unused(cache / ROOT))


def _take(root: Path, key: str) -> tuple[Path, int]:
    for folder in (root / key, root / f"{key}-{os.getpid()}"):
        folder.mkdir(exist_ok=True)
        try:
            return folder, lock_folder(folder)
        except BlockingIOError:
            continue
    raise AssertionError("two jobs in one process at the same work")


def _sweep(root: Path, kept: int = KEPT) -> None:
    """Remove work that is not in use: all but the latest `kept` that a job could go on from, and those when old."""
    unused = _unused(root)
    usable = sorted((folder for folder in unused if "-" not in folder.name), key=_last_used, reverse=True)
    young = [folder for folder in usable[:kept] if _last_used(folder) > time.time() - KEPT_SECONDS]
    for folder in unused:
        if folder not in young:
            shutil.rmtree(folder, ignore_errors=True)


def _unused(root: Path) -> list[Path]:
    """Folders that nobody holds a lock on."""
    found = []
    for folder in root.glob("*"):
        with contextlib.suppress(OSError):
            os.close(lock_folder(folder))
            found.append(folder)
    return found


def _last_used(folder: Path) -> float:
    """When its last part was finished, in seconds since 1970; 0 when it is gone."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def _nbytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


@cache
def _code() -> str:
    """A hash over our code and the versions of what it calls."""
    digest = hashlib.blake2b(" ".join(version(name) for name in _LIBRARIES).encode(), digest_size=16)
    for folder in _CODE:
        for source in sorted((Path(__file__).parents[2] / folder).glob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()
