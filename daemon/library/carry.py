"""Copying a model's folder into the library or out of it, so that it answers before all of it is there.

First the manifest, the tokenizer and the mark that says "still arriving" (`formats/stack`), then the masks file, if
there is one, then the stack from its beginning: any prefix of it is a smaller model. Every block is checked against its
hash on the way. What was copied stays when the copy ends early, whatever ends it, and the next one goes on after the
last block that is whole; masks are all there or not at all. An import does not copy masks that the library has
(`masks`).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from ...formats.errors import (
    BadBlock,
    DiskFull,
    InvalidRequest,
    ModelExists,
    NotArrived,
    TruncatedStack,
    storage_failed,
)
from ...formats.files import following_links, open_plain
from ...formats.manifest import MASKS, STACK, Manifest, read_manifest, write_manifest
from ...formats.messages import ExportModel, ImportModel, Progress
from ...formats.paths import check_name
from ...formats.stack import Stack, check_manifest, mark_of, read_stack
from ...formats.summary import summary
from ...formats.values import ModelSummary
from .copying import holds
from .masks import copy_masks, find_masks, is_whole, link
from .place import check_room, copy_tokenizer, making

STAGE: Final = "copying"
TELL_NBYTES: Final = 4_000_000  # copied between two words about it

Tell = Callable[[Progress], None]


def carry_model(request: ImportModel | ExportModel, library: Path, tell: Tell) -> ModelSummary:
    """Do what `request` asks for; `tell` hears how far it is, and may raise to end it.

    Raises `InvalidName`, `InvalidRequest`, `ModelExists`, `NotArrived` (the source is itself still arriving),
    `CorruptFile`, `DiskFull` or `StorageFailed`; what was copied stays.
    """
    home = library / check_name(request.name)
    if isinstance(request, ImportModel):
        source, place = Path(request.source), home
    else:
        source, place = home, Path(request.target)
        if not place.parent.is_dir():
            raise InvalidRequest(f"{place.parent} is not a folder")
        if place.resolve().is_relative_to(library.resolve()):
            raise InvalidRequest(f"{place} is in the library itself, which holds only what was added or imported")
    try:
        return _carry(request, source, place, library, tell)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"no room is left in {place}; what was copied stays, the same command goes on") from error
        raise storage_failed(error, place) from error


def _carry(request: ImportModel | ExportModel, source: Path, place: Path, library: Path, tell: Tell) -> ModelSummary:
    # what is imported may be a folder of links: a snapshot of Hugging Face, nix, git-annex
    reading = following_links if isinstance(request, ImportModel) else contextlib.nullcontext
    with reading():
        manifest, stack = read_manifest(source), read_stack(source / STACK)
    if stack.arriving:
        raise NotArrived(f"{source} is itself still arriving; wait until it is complete")
    check_manifest(stack, manifest)
    manifest = msgspec.structs.replace(manifest, name=request.name)
    if place.exists():
        _check_same(place, manifest)
    masks_there = is_whole(place / MASKS, stack.blocks)
    ours = find_masks(library, stack.blocks) if isinstance(request, ImportModel) and not masks_there else None
    there = (place / STACK).stat().st_size if (place / STACK).exists() else 0
    masks_nbytes = stack.masks_path.stat().st_size if stack.masks_path and not masks_there and not ours else 0
    check_room({place.parent: masks_nbytes + stack.data_start + stack.file_edges[-1] - there})
    if not place.exists():
        _make_place(request, source, place, manifest)

    def told(done: int) -> None:
        tell(Progress(id=request.id, stage=STAGE, done=done, total=stack.nbytes))

    before = stack.nbytes - stack.file_edges[-1]  # bytes of masks
    with reading():
        if stack.masks_path and not masks_there and not (ours and link(ours, place)):
            copy_masks(stack, place, told)
        _copy_stack(stack, place / STACK, lambda done: told(before + done))
    mark_of(place / STACK).unlink()
    _sync(place)
    return summary(manifest)


def _make_place(request: ImportModel | ExportModel, source: Path, place: Path, manifest: Manifest) -> None:
    if isinstance(request, ImportModel):
        with making(place) as folder:
            _begin(source, folder, manifest)
    else:  # somebody's own folder, in which there is nothing for us to clean up
        place.mkdir()
        _begin(source, place, manifest)


def _begin(source: Path, folder: Path, manifest: Manifest) -> None:
    mark_of(folder / STACK).touch()
    copy_tokenizer(source, folder)
    write_manifest(folder, manifest)


def _check_same(place: Path, manifest: Manifest) -> None:
    """Raises `ModelExists` unless what is in `place` is this model, half copied."""
    if mark_of(place / STACK).exists() and read_manifest(place) == manifest:
        return
    raise ModelExists(f"{place} exists; choose another name, or remove it first")


def _copy_stack(stack: Stack, target: Path, tell: Callable[[int], None]) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW  # a link in a half copied folder is nobody's we know
    with os.fdopen(open_plain(stack.path), "rb") as source, os.fdopen(os.open(target, flags, 0o666), "r+b") as file:
        whole = _whole_blocks(stack, source, file)
        file.seek(stack.data_start + stack.file_edges[whole])
        file.truncate()
        if not whole:
            source.seek(0)
            file.seek(0)
            file.write(source.read(stack.data_start))
        source.seek(file.tell())
        told = stack.file_edges[whole]
        tell(told)
        for position in range(whole, len(stack.blocks)):
            if stack.blocks[position].beside:
                continue
            if not _holds(stack, source, position, file.write):
                tensor = stack.blocks[position].tensor
                raise BadBlock(f"block {position} of {stack.path} ({tensor}) does not match its hash")
            file.flush()
            done = stack.file_edges[position + 1]
            if done - told >= TELL_NBYTES or done == stack.file_edges[-1]:
                told = done
                # a gigabyte passes through here: it shall not push out what other programs have in the page cache
                os.fdatasync(file.fileno())
                for passed in (source, file):
                    os.posix_fadvise(passed.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                tell(told)
        os.fsync(file.fileno())


def _whole_blocks(stack: Stack, source: BinaryIO, file: BinaryIO) -> int:
    """How many blocks an earlier copy left whole in `file`."""
    if file.read(stack.data_start) != source.read(stack.data_start):
        return 0
    for position in range(len(stack.blocks)):
        whole = stack.blocks[position].beside
        with contextlib.suppress(TruncatedStack):
            whole = whole or _holds(stack, file, position)
        if not whole:
            return position
    return len(stack.blocks)


def _holds(stack: Stack, file: BinaryIO, position: int, copy: Callable[[bytes], object] = len) -> bool:
    """Whether that block, with which `file` goes on, matches its hash; `copy` gets its bytes, with the padding.

    Raises `TruncatedStack`.
    """
    return holds(stack.blocks[position], file, stack.path, copy)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.ExitStack() as after:
        after.callback(os.close, descriptor)
        os.fsync(descriptor)
