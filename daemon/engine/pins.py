"""Prefixes that are kept by name, in memory and, if asked for, on disk.

A file `pins/NAME.safetensors` in the model's folder holds the tokens, their KV blocks as they lie in memory, and in its
metadata what they belong to. It is read back only if all of that is true of the model that is loaded; else it is as if
it were not there.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ...formats.errors import CorruptFile, InvalidRequest, storage_failed
from ...formats.manifest import Manifest
from ...formats.values import PinSummary
from ...kernels.attention import BLOCK_TOKENS
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
    """The pins of one model, whose files it reads at once. `array [blocks, ...]` is where `scheduler`'s blocks lie."""

    def __init__(self, folder: Path, manifest: Manifest, kv: str, scheduler: Scheduler, array: NDArray[Any]) -> None:
        self._folder, self._kv, self._scheduler = folder / FOLDER, kv, scheduler
        self._model = f"{manifest.source.checksum} {manifest.codec} {manifest.options} {manifest.nbytes}"
        self._bytes = array.view(np.uint8).reshape(len(array), -1)
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
            elif before is not None and before.saved:
                self._path(job.name).unlink(missing_ok=True)
        except OSError as error:
            self._scheduler.unpin(nodes)
            raise storage_failed(error, self._folder) from error
        if before is not None:
            self._scheduler.unpin(before.nodes)
        self._kept[job.name] = _Kept(sequence.tokens, sequence.namespace, nodes, job.save, sequence.band)

    def remove(self, name: str) -> None:
        """Let a pin and its file go. Raises `InvalidRequest` when there is none, `StorageFailed`."""
        kept = self._kept.get(name)
        if kept is None:
            raise InvalidRequest(f"nothing is pinned as {name!r}; there are {', '.join(self._kept) or 'no pins'}")
        try:
            self._path(name).unlink(missing_ok=True)
        except OSError as error:
            raise storage_failed(error, self._folder) from error
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
        """Write a pin's file, atomically."""
        self._folder.mkdir(exist_ok=True)
        blocks = self._bytes[sequence.blocks]
        label = _Label(VERSION, self._model, self._kv, sequence.namespace, sequence.band, sequence.depth, _hash(blocks))
        partial = self._path(name).with_suffix(".partial")
        save_file(
            {"tokens": np.array(sequence.tokens, np.int64), "blocks": blocks},
            partial,
            {"label": msgspec.json.encode(label).decode()},
        )
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(self._path(name))

    def _restore(self, path: Path) -> None:
        """Take a pin from its file. Raises `CorruptFile`, and whatever reading and parsing raise."""
        with safe_open(path, framework="numpy") as file:
            label = msgspec.json.decode((file.metadata() or {})["label"], type=_Label)
            if (label.version, label.model, label.kv) != (VERSION, self._model, self._kv):
                raise CorruptFile("it belongs to another model, or to keys and values of another type")
            tokens, blocks = file.get_tensor("tokens"), file.get_tensor("blocks")
        count = len(tokens) // BLOCK_TOKENS
        wanted = (count, self._bytes.shape[1])
        if not count or len(tokens) % BLOCK_TOKENS or blocks.dtype != np.uint8 or blocks.shape != wanted:
            raise CorruptFile("its shapes are not those of a pin of this model")
        if _hash(blocks) != label.blocks_hash:
            raise CorruptFile("its blocks do not match their hash")
        ids = [int(token) for token in tokens]
        restored = self._scheduler.restore(label.namespace, ids, label.band, label.depth)
        if restored is None:
            raise CorruptFile("there is no room for it")
        nodes, fresh = restored
        for index in fresh:
            self._bytes[nodes[index].block] = blocks[index]
        self._kept[path.name.removesuffix(SUFFIX)] = _Kept(ids, label.namespace, nodes, True, label.band)


def _hash(blocks: NDArray[np.uint8]) -> str:
    return hashlib.blake2b(np.ascontiguousarray(blocks).data, digest_size=16).hexdigest()
