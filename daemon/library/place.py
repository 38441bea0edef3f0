"""Where a model is made and how it gets its place: nothing of a half-made model is ever seen in the library.

A model is made in `library/.adding-<name>-<pid>`, locked (flock) by its maker, and renamed to `library/<name>` when it
is complete and synced. The kernel drops the lock of a killed maker, so the next one knows which folders to remove.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
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


def check_room(wanted: Mapping[Path, int]) -> None:
    """Raises `DiskFull` when a disk has fewer bytes free than are wanted in these folders on it, which need not exist
    yet. Zero or less is nothing.
    """
    disks: dict[int, tuple[list[Path], int]] = {}
    for folder, nbytes in wanted.items():
        disk = _existing(folder).stat().st_dev
        folders, total = disks.get(disk, ([], 0))
        disks[disk] = ([*folders, folder], total + max(0, nbytes))
    for folders, total in disks.values():
        free = shutil.disk_usage(_existing(folders[0])).free
        if free < total:
            raise DiskFull(
                f"adding this model takes up to {format_size(total)} in {' and '.join(map(str, folders))} while it is "
                f"made; {format_size(free)} are free"
            )


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest one above that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


@contextlib.contextmanager
def making(place: Path, commit: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A folder to make a model in; on leaving without an error it becomes `place`, else it is removed.

    `commit` is called just before that, and may raise. Raises `ModelExists` when somebody else took the place.
    """
    folder = place.with_name(f"{ADDING}{place.name}-{os.getpid()}")
    place.parent.mkdir(parents=True, exist_ok=True)
    with locked(place.parent):
        _sweep(place.parent)
        folder.mkdir()
        lock = lock_folder(folder)
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
            lock = lock_folder(folder)
            try:
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`'s lock, waiting for it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def lock_folder(folder: Path) -> int:
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
