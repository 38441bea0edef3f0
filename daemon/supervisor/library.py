"""The library index: which models there are, what their manifests say, and taking one away.

Adding is a job's work (`daemon/library/job`), in a folder that gets its proper name only when it is complete; this
file cleans up after jobs that did not get that far. Stacks are never opened here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from ...formats.errors import CorruptFile, CorruptManifest, UnknownModel, UnsupportedVersion, storage_failed
from ...formats.manifest import MASKS, STACK, Manifest, read_manifest
from ...formats.messages import ModelDetail
from ...formats.paths import ADDING
from ...formats.stack import mark_of
from ...formats.summary import summary
from ...formats.values import ModelSummary

log = logging.getLogger(__name__)

REMOVING: Final = ".removing-"


def delete_behind(folder: Path) -> None:
    """Delete a folder in a thread of its own: unlinking gigabytes takes longer than a loop may stand still."""
    threading.Thread(target=delete, args=(folder,), name=f"delete {folder.name}").start()


def delete(folder: Path) -> None:
    """Delete a folder now; what cannot be deleted is logged and tried again at the next start."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        log.warning("%s cannot be deleted completely", folder)


class Library:
    """The models below one folder. A model whose manifest cannot be read is logged once and left out."""

    def __init__(self, root: Path, delete: Callable[[Path], None] = delete_behind) -> None:
        self._root = root
        self._delete = delete
        self._models: dict[str, Manifest] = {}
        self._complained: dict[str, str] = {}

    @property
    def root(self) -> Path:
        """The folder of all models."""
        return self._root

    def scan(self) -> None:
        """Look at the disk again."""
        found = {}
        for folder in self._folders():
            try:
                found[folder.name] = self._read(folder)
                self._complained.pop(folder.name, None)
            except (CorruptFile, UnsupportedVersion) as error:
                self._complain(folder.name, str(error))
        self._models = found

    def get(self, name: str) -> Manifest:
        """The manifest of a model; one put there by hand is found when it is asked for. Raises `UnknownModel`."""
        if name not in self._models:
            self.scan()
        if name not in self._models:
            raise UnknownModel(
                f"no model {name!r} in {self._root}; there is {', '.join(sorted(self._models)) or 'none'}"
            )
        return self._models[name]

    def folder(self, name: str) -> Path:
        """Where a model's files are. Raises `UnknownModel`."""
        self.get(name)
        return self._root / name

    def exists(self, name: str) -> bool:
        """Whether the name is taken, be it by something that cannot be read."""
        return name in self._models or os.path.lexists(self._root / name)

    def arriving(self, name: str) -> bool:
        """Whether that model's stack is still being copied, or was left half copied."""
        return mark_of(self._root / name / STACK).exists()

    def summaries(self) -> tuple[ModelSummary, ...]:
        """One line for each model that is there now, by name."""
        self.scan()
        return tuple(self.summary(name) for name in sorted(self._models))

    def summary(self, name: str) -> ModelSummary:
        """The line of one model. Raises `UnknownModel`."""
        line = summary(self.get(name))
        shares, nbytes = self._shared(name)
        line = msgspec.structs.replace(line, shares=shares, shared_nbytes=nbytes)
        if not self.arriving(name):
            return line
        # headers, not a hundredth of it, are counted too
        size = sum(found.st_size for found in (self._file(name, STACK), self._file(name, MASKS)) if found)
        return msgspec.structs.replace(line, arrived_nbytes=min(size, line.nbytes))

    def detail(self, id: int, name: str, damage: str = "") -> ModelDetail:  # noqa: A002 - the wire's own word
        """Everything a manifest says, and the model's line, as `ebb show` wants it; `damage` is passed on.

        Raises `UnknownModel`.
        """
        manifest = self.get(name)
        return ModelDetail(
            id=id,
            summary=self.summary(name),
            architecture=manifest.architecture,
            source=manifest.source.location,
            checksum=manifest.source.checksum,
            options=manifest.options,
            blocks=manifest.blocks,
            curve=manifest.curve,
            damage=damage,
        )

    def _shared(self, name: str) -> tuple[tuple[str, ...], int]:
        """The models that have their masks in the same file as this one, and its bytes."""
        masks, own = self._models[name].masks, self._file(name, MASKS)
        if not masks or own is None:
            return (), 0
        alike = sorted(other for other, manifest in self._models.items() if manifest.masks == masks and other != name)
        shares = [
            other for other in alike if (found := self._file(other, MASKS)) is not None and os.path.samestat(found, own)
        ]
        return tuple(shares), own.st_size if shares else 0

    def _file(self, name: str, file: str) -> os.stat_result | None:
        """What the system knows of a file of a model, if it is there."""
        try:
            return (self._root / name / file).stat()
        except OSError:
            return None

    def remove(self, name: str) -> None:
        """Take a model out: at once for everybody who looks, on the disk a moment later.

        Raises `UnknownModel`, or `StorageFailed`; the model is then still there.
        """
        folder = self.folder(name)
        trash = self._root / f"{REMOVING}{name}-{os.getpid()}"
        if trash.exists():  # an earlier one of the same name is still being deleted
            trash = trash.with_name(f"{REMOVING}{name}.{len(self._folders(hidden=True))}-{os.getpid()}")
        try:
            folder.rename(trash)
        except OSError as error:
            raise storage_failed(error, folder) from error
        del self._models[name]
        self._delete(trash)

    def discard(self, name: str, pid: int) -> None:
        """Delete what the job of process `pid` left of adding `name`; nothing, if it finished."""
        folder = self._root / f"{ADDING}{name}-{pid}"
        if folder.exists():
            self._delete(folder)

    def clean(self) -> None:
        """Delete what processes that no longer live left half added or half removed."""
        for folder in self._folders(hidden=True):
            if folder.name.startswith((ADDING, REMOVING)) and not _owner_lives(folder.name):
                log.info("deleting left-over %s", folder)
                self._delete(folder)
            elif folder.name.startswith(ADDING):
                _wake(folder.name)

    def _folders(self, hidden: bool = False) -> list[Path]:
        try:
            return [path for path in self._root.iterdir() if path.name.startswith(".") == hidden and path.is_dir()]
        except OSError as error:
            log.warning("the library %s cannot be read: %s", self._root, error)
            return []

    def _read(self, folder: Path) -> Manifest:
        _refuse_links(folder)
        manifest = read_manifest(folder)
        if manifest.name != folder.name:
            raise CorruptManifest(f"the manifest in {folder} names {manifest.name!r}; rename the folder")
        return manifest

    def _complain(self, name: str, message: str) -> None:
        if self._complained.get(name) != message:
            self._complained[name] = message
            log.warning("%s", message)


def _refuse_links(folder: Path) -> None:
    """Raises `CorruptFile` when the folder, or a file in it, is a link: what we read, and delete, is in the library.

    So too for a pipe or a device, at which whoever reads it would wait for ever.
    """
    try:
        found = (folder, *folder.iterdir())
        links = [path for path in found if path.is_symlink()]
        odd = [path for path in found if not (path.is_file() or path.is_dir() or path.is_symlink())]
    except OSError as error:
        raise CorruptFile(f"{folder} cannot be read: {error.strerror}") from error
    if links:
        raise CorruptFile(f"{links[0]} is a link, and the library takes files and folders only; copy what it names")
    if odd:
        raise CorruptFile(f"{odd[0]} is neither a file nor a folder, and a model has nothing else")


def _wake(name: str) -> None:
    """A job whose daemon was killed while it stood still (`adding`) was told to end, and hears it when it goes on.

    To anything else that has that number by now, this means nothing.
    """
    with contextlib.suppress(OSError):
        os.kill(int(name.rpartition("-")[2]), signal.SIGCONT)


def _owner_lives(name: str) -> bool:
    """Whether the process whose id ends a left-over's name exists and is not this one."""
    _, _, digits = name.rpartition("-")
    if not digits.isdecimal() or int(digits) == os.getpid():
        return False
    try:
        os.kill(int(digits), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return not _is_zombie(digits)


def _is_zombie(pid: str) -> bool:
    """Whether a process has ended and only waits to be reaped, which for an orphan may take its new parent a while."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False  # gone since, or a system without /proc
