"""Where a model is made and how it gets its place: nothing of a half-made model is ever seen in the library.

A model is made in `library/.adding-<name>-<pid>`, locked (flock) by its maker, and renamed to `library/<name>` when it
is complete and synced. The kernel drops the lock of a killed maker, so the next one knows which folders to remove.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ...formats.errors import DiskFull, ModelExists
from ...formats.manifest import TOKENIZER_FILES
from ...formats.paths import ADDING, check_name
from ...formats.units import format_size


def free_place(library: Path, name: str) -> Path:
    """The folder that model `name` will have. Raises `InvalidName` or `ModelExists`."""
    place = library / check_name(name)
    if place.exists():
        raise ModelExists(f"the library already has a model {name}; choose another name or remove that one first")
    return place


def check_room(library: Path, wanted: int) -> None:
    """Raises `DiskFull` when the library's disk has fewer than `wanted` bytes free."""
    library.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(library).free
    if free < wanted:
        raise DiskFull(
            f"adding this model takes up to {format_size(wanted)} in {library} while it is made; "
            f"{format_size(free)} are free"
        )


@contextlib.contextmanager
def making(place: Path, commit: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A folder to make a model in; on leaving without an error it becomes `place`, else it is removed.

    `commit` is called just before that, and may raise. Raises `ModelExists` when somebody else took the place.
    """
    folder = place.with_name(f"{ADDING}{place.name}-{os.getpid()}")
    place.parent.mkdir(parents=True, exist_ok=True)
    with _locked(place.parent):
        _sweep(place.parent)
        folder.mkdir()
        lock = _lock(folder)
    try:
        yield folder
        _sync(folder)
        commit()
        _publish(folder, place)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, those that there are."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
            _sync(target / name)


def _publish(folder: Path, place: Path) -> None:
    try:
        folder.rename(place)
    except OSError as error:
        if place.exists():
            raise ModelExists(f"another job added a model {place.name} meanwhile; this one was not added") from error
        raise
    _sync(place.parent)


def _sweep(library: Path) -> None:
    """Remove what killed jobs left behind: folders that nobody holds a lock on."""
    for folder in library.glob(ADDING + "*"):
        with contextlib.suppress(OSError):
            lock = _lock(folder)
            try:
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold `folder`'s lock, waiting for it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int:
    """A descriptor that holds `folder`'s lock until closed. Raises `OSError` when another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
