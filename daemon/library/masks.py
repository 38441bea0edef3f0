"""One masks file for all models of the library that have the same masks: found, checked, and linked. No torch here.

A link is one more name of the same file, which goes when its last holder goes; what is in it never changes
(`formats/masks`). Whatever speaks against a link (another disk, no right, too many links already, a file that is not
whole any more) makes it a copy instead, which costs room and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from ...formats.errors import BadBlock, CorruptFile, UnsupportedVersion
from ...formats.files import open_plain
from ...formats.index import BlockEntry
from ...formats.manifest import MASKS, read_manifest
from ...formats.masks import check_masks, digest, mask_offsets, masks_beside, write_masks
from ...formats.stack import Stack
from .copying import holds


def link_masks(library: Path, blocks: Sequence[BlockEntry], folder: Path) -> bool:
    """Let `folder` share the masks file of these blocks with a model of the library; whether it does.

    A masks file that was in the folder is gone then.
    """
    there = find_masks(library, blocks)
    return there is not None and link(there, folder)


def link(masks: Path, folder: Path) -> bool:
    """Make that file the folder's masks file too; whether the system let us."""
    target = folder / MASKS
    try:
        target.unlink(missing_ok=True)
        os.link(masks, target, follow_symlinks=False)
    except OSError:
        return False
    return True


def find_masks(library: Path, blocks: Sequence[BlockEntry]) -> Path | None:
    """A masks file of these blocks that is in the library already, and whole: every hash was checked."""
    wanted = digest(blocks)
    if not wanted or not library.is_dir():
        return None
    homes = sorted(home for home in library.iterdir() if not home.name.startswith("."))
    return next((home / MASKS for home in homes if _masks_of(home) == wanted and is_whole(home / MASKS, blocks)), None)


def is_whole(path: Path, blocks: Sequence[BlockEntry]) -> bool:
    """Whether that is the masks file of these blocks, no link to one elsewhere, and every mask matches its hash."""
    try:
        check_masks(path, blocks)
        _, offsets = mask_offsets(blocks)
        with os.fdopen(open_plain(path), "rb") as file:
            for entry in masks_beside(blocks):
                file.seek(offsets[entry.hash])
                if not holds(entry, file, path):
                    return False
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except (CorruptFile, OSError):
        return False
    return True


def copy_masks(stack: Stack, folder: Path, tell: Callable[[int], None]) -> None:
    """Copy the masks file of `stack` to `folder`; `tell` hears how many bytes of masks are done.

    It has its name when it is whole. Raises `BadBlock`, `TruncatedStack`, or what `tell` or the disk raises.
    """
    assert stack.masks_path
    path, (_, offsets) = stack.masks_path, mask_offsets(stack.blocks)
    first = min(offsets.values())
    with os.fdopen(open_plain(path), "rb") as source:

        def write(entry: BlockEntry, file: BinaryIO) -> None:
            source.seek(offsets[entry.hash])
            if not holds(entry, source, path, file.write):
                raise BadBlock(f"the mask of {entry.tensor} level {entry.level} in {path} does not match its hash")
            tell(source.tell() - first)

        write_masks(folder / MASKS, stack.blocks, write)
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _masks_of(home: Path) -> str:
    """What its manifest says of its masks; nothing where that cannot be read."""
    try:
        return read_manifest(home).masks
    except (CorruptFile, UnsupportedVersion):
        return ""
