"""Prefixes that are kept by name, in memory and, if asked for, on disk.

A file `pins/NAME.safetensors` in the model's folder holds the tokens, their KV blocks as they lie in memory, and in its
metadata what they belong to. It is read back only if all of that is true of the model that is loaded; else it is as if
it were not there.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ...formats.errors import CorruptFile, InvalidRequest, storage_failed
from ...formats.manifest import Manifest
from ...formats.paths import check_name
from ...formats.values import PinSummary
from ...kernels.attention import BLOCK_TOKENS
from .bands import BANDS
from .prefixes import Node
from .scheduler import Scheduler, Sequence

log = logging.getLogger(__name__)

FOLDER: Final = "pins"
SUFFIX: Final = ".safetensors"
MOST_PINS: Final = 64
VERSION: Final = 1
RENEWAL_KEY: Final = -1  # of the one sequence that nobody asked for
RENEWAL_PRIORITY: Final = -1000


class _Label(msgspec.Struct, frozen=True):
    """What a file's blocks belong to and how good they are; `blocks_hash` is BLAKE2b-128 of their bytes."""

    version: int
    model: str
    kv: str
    namespace: str
    band: int
    depth: int
    blocks_hash: str


@dataclass
class _Kept:
    tokens: list[int]
    namespace: str
    nodes: list[Node]
    saved: bool
    tried: int  # the highest band in which it was computed, or should have been

    @property
    def band(self) -> int:
        return min(node.band for node in self.nodes)


@dataclass
class PinJob:
    """A prefix that is being computed in order to be kept; `asked`: somebody waits for that."""

    name: str
    sequence: Sequence
    save: bool
    asked: bool = True


class PinStore:
    """The pins of one model, whose files it reads at once, up to `most_nbytes` of blocks.

    `array [blocks, ...]` is where `scheduler`'s blocks lie.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        kv: str,
        scheduler: Scheduler,
        array: NDArray[Any],
        most_nbytes: int | None = None,
    ) -> None:
        self._folder, self._kv, self._scheduler = folder / FOLDER, kv, scheduler
        self._model = f"{manifest.source.checksum} {manifest.codec} {manifest.options} {manifest.nbytes}"
        self._bytes = array.view(np.uint8).reshape(len(array), -1)
        self._room = len(array) if most_nbytes is None else most_nbytes // self._bytes.shape[1]  # blocks
        self._kept: dict[str, _Kept] = {}
        self.jobs: dict[int, PinJob] = {}  # by the key of their sequences
        for path in sorted(self._folder.glob("*" + SUFFIX))[:MOST_PINS]:
            try:
                self._restore(path)
            except (OSError, SafetensorError, msgspec.MsgspecError, CorruptFile, KeyError, ValueError) as error:
                log.warning("%s is not used: %s", path, error)

    def begin(self, key: int, name: str, tokens: list[int], namespace: str, save: bool) -> PinJob:
        """What to compute for a pin; submit its sequence. Raises `InvalidRequest`."""
        whole = len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS
        if not whole:
            raise InvalidRequest(f"the prefix has {len(tokens)} tokens; only blocks of {BLOCK_TOKENS} can be kept")
        if name not in self._kept and len(self._kept) >= MOST_PINS:
            raise InvalidRequest(f"{MOST_PINS} prefixes are pinned; unpin one first")
        sequence = Sequence(key, tokens[:whole], whole, namespace=namespace, samples=False)
        return PinJob(name, sequence, save)

    def stale(self, band: int) -> str | None:
        """A pin to compute again because the model is better now; each is tried once for a band."""
        if RENEWAL_KEY in self.jobs:
            return None
        return next((name for name, kept in self._kept.items() if kept.band < band and kept.tried < band), None)

    def renew(self, name: str, band: int) -> PinJob:
        """How to compute a stale pin again."""
        kept = self._kept[name]
        kept.tried = band
        tokens = list(kept.tokens)
        sequence = Sequence(RENEWAL_KEY, tokens, len(tokens), kept.namespace, priority=RENEWAL_PRIORITY, samples=False)
        return PinJob(name, sequence, kept.saved, asked=False)

    def postpone(self) -> Sequence | None:
        """Somebody asks for something: what is computed again for nobody has time, and keeps what it has done."""
        job = self.jobs.pop(RENEWAL_KEY, None)
        if job is None:
            return None
        if job.name in self._kept:
            self._kept[job.name].tried = self._kept[job.name].band
        return job.sequence

    def keep(self, job: PinJob) -> None:
        """Keep what was computed, instead of what had that name.

        Raises `OutOfMemory` when there is no room for it beside requests, `StorageFailed` when it cannot be saved;
        then all is as before.
        """
        sequence, before = job.sequence, self._kept.get(job.name)
        nodes = list(sequence.nodes)
        self._scheduler.pin(nodes)
        try:
            if job.save:
                self._save(job.name, sequence)
            else:  # also one that was never read back, which would have this name again some day
                self._path(job.name).unlink(missing_ok=True)
        except OSError as error:
            self._scheduler.unpin(nodes)
            raise storage_failed(error, self._folder) from error
        if before is not None:
            self._scheduler.unpin(before.nodes)
        self._kept[job.name] = _Kept(sequence.tokens, sequence.namespace, nodes, job.save, sequence.band)

    def remove(self, name: str) -> None:
        """Let a pin and its file go, or a file that was not read back.

        Raises `InvalidRequest` when there is neither, `InvalidName`, `StorageFailed`.
        """
        kept = self._kept.get(name)
        if kept is None and not self._path(check_name(name, "pin")).exists():
            raise InvalidRequest(f"nothing is pinned as {name!r}; there are {', '.join(self._kept) or 'no pins'}")
        try:
            self._path(name).unlink(missing_ok=True)
        except OSError as error:
            raise storage_failed(error, self._folder) from error
        if kept is not None:
            del self._kept[name]
            self._scheduler.unpin(kept.nodes)

    def summaries(self, band: int) -> tuple[PinSummary, ...]:
        """What is kept, for people; `band` is the model's present one."""
        return tuple(
            PinSummary(
                name=name,
                tokens=len(kept.tokens),
                nbytes=len(kept.nodes) * self._bytes.shape[1],
                saved=kept.saved,
                current=kept.band >= band,
            )
            for name, kept in self._kept.items()
        )

    def _path(self, name: str) -> Path:
        return self._folder / (name + SUFFIX)

    def _save(self, name: str, sequence: Sequence) -> None:
        """Write a pin's file, atomically, block by block: there may be no memory for a copy of them."""
        self._folder.mkdir(exist_ok=True)
        tokens = np.array(sequence.tokens, "<i8").tobytes()
        blocks = [self._bytes[block] for block in sequence.blocks]
        label = _Label(VERSION, self._model, self._kv, sequence.namespace, sequence.band, sequence.depth, _hash(blocks))
        end = len(tokens) + len(blocks) * self._bytes.shape[1]
        header = {
            "__metadata__": {"label": msgspec.json.encode(label).decode()},
            "tokens": {"dtype": "I64", "shape": [len(sequence.tokens)], "data_offsets": [0, len(tokens)]},
            "blocks": {"dtype": "U8", "shape": [len(blocks), len(blocks[0])], "data_offsets": [len(tokens), end]},
        }
        encoded = msgspec.json.encode(header)
        encoded += b" " * (-len(encoded) % 8)
        partial = self._path(name).with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                file.write(len(encoded).to_bytes(8, "little") + encoded + tokens)
                for block in blocks:
                    file.write(block.data)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(self._path(name))
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def _restore(self, path: Path) -> None:
        """Take a pin from its file. Raises `CorruptFile`, and whatever reading and parsing raise."""
        with safe_open(path, framework="numpy") as file:
            label = msgspec.json.decode((file.metadata() or {})["label"], type=_Label)
            if (label.version, label.model, label.kv) != (VERSION, self._model, self._kv):
                raise CorruptFile("it belongs to another model, or to keys and values of another type")
            tokens, blocks = file.get_slice("tokens"), file.get_slice("blocks")
            count = blocks.get_shape()[0] if blocks.get_shape() else 0
            found = (tokens.get_dtype(), tokens.get_shape(), blocks.get_dtype(), blocks.get_shape())
            if not count or found != ("I64", [count * BLOCK_TOKENS], "U8", [count, self._bytes.shape[1]]):
                raise CorruptFile("its shapes are not those of a pin of this model")
            if not 0 <= label.band < BANDS:
                raise CorruptFile(f"there is no quality band {label.band}")
            if count > self._room:
                raise CorruptFile("there is no memory for it now")
            if _hash(blocks[index : index + 1] for index in range(count)) != label.blocks_hash:
                raise CorruptFile("its blocks do not match their hash")
            ids = [int(token) for token in tokens[:]]
            restored = self._scheduler.restore(label.namespace, ids, label.band, label.depth)
            if restored is None:
                raise CorruptFile("there is no room for it")
            nodes, fresh = restored
            self._room -= len(fresh)
            for index in fresh:
                self._bytes[nodes[index].block] = blocks[index : index + 1]
        self._kept[path.name.removesuffix(SUFFIX)] = _Kept(ids, label.namespace, nodes, True, label.band)


def _hash(blocks: Iterable[NDArray[np.uint8]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for block in blocks:
        digest.update(block.data)
    return digest.hexdigest()
