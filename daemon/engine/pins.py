"""Prefixes that are kept by name, in memory and, if asked for, on disk.

Kept on disk means a file `pins/NAME.safetensors` in the model's folder (`pin_files`), which is read back only if it
belongs to the model that is loaded; else it is as if it were not there. A file is written by a thread of its own
(`pin_writer`), from blocks that do not change as long as they are pinned: a slow disk holds up nobody's step.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from ...formats.errors import Cancelled, CorruptFile, EbbflowError, InvalidRequest, OutOfMemory, storage_failed
from ...formats.manifest import Manifest
from ...formats.paths import check_name
from ...formats.values import PinSummary
from ...kernels.attention import BLOCK_TOKENS
from .pin_files import VERSION, Label, open_pin, write_partial
from .pin_writer import PinWriter
from .prefixes import Node
from .scheduler import Scheduler
from .sequences import Sequence

log = logging.getLogger(__name__)

FOLDER: Final = "pins"
SUFFIX: Final = ".safetensors"
PARTIAL: Final = ".partial"
MOST_PINS: Final = 64
_NUMBERS: Final = count()  # of partial files: an engine that was closed may still be writing one


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


@dataclass
class _Saving:
    """A pin whose file is being written, as `partial`; `dropped`: nobody wants it any more, for that reason."""

    job: PinJob
    nodes: list[Node]
    partial: Path
    written: Future[None]
    dropped: str = ""


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
        self._saving: list[_Saving] = []  # in the order in which they are written
        self._writer = PinWriter()
        for left in self._folder.glob("*" + PARTIAL):
            _forget(left)
        for path in sorted(self._folder.glob("*" + SUFFIX))[:MOST_PINS]:
            try:
                if not path.is_file():
                    raise CorruptFile("it is no file")
                self._restore(path)
            except (OSError, SafetensorError, msgspec.MsgspecError, CorruptFile, KeyError, ValueError) as error:
                log.warning("%s is not used: %s", path, error)

    def begin(self, key: int, name: str, tokens: list[int], namespace: str, save: bool) -> PinJob:
        """What to compute for a pin; submit its sequence. Raises `InvalidRequest`."""
        whole = len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS
        if not whole:
            raise InvalidRequest(f"the prefix has {len(tokens)} tokens; only blocks of {BLOCK_TOKENS} can be kept")
        names = {*self._kept, *(saving.job.name for saving in self._saving)}
        if name not in names and len(names) >= MOST_PINS:
            raise InvalidRequest(f"{MOST_PINS} prefixes are pinned; unpin one first")
        sequence = Sequence(key, tokens[:whole], whole, namespace=namespace, samples=False)
        return PinJob(name, sequence, save)

    def stale(self, band: int) -> str | None:
        """A pin to compute again because the model is better now; each is tried once for a band."""
        written = {saving.job.name for saving in self._saving}  # and will be here instead
        old = (name for name, kept in self._kept.items() if kept.band < band and kept.tried < band)
        return next((name for name in old if name not in written), None)

    def renew(self, name: str, band: int, key: int, priority: int) -> PinJob:
        """How to compute a stale pin again."""
        kept = self._kept[name]
        kept.tried = band
        tokens = list(kept.tokens)
        sequence = Sequence(key, tokens, len(tokens), kept.namespace, priority=priority, samples=False)
        return PinJob(name, sequence, kept.saved, asked=False)

    def postpone(self, name: str) -> None:
        """It is not computed again now; some other time."""
        if name in self._kept:
            self._kept[name].tried = self._kept[name].band

    @property
    def saving(self) -> bool:
        """Whether a file is being written; `settled` will say how that ended."""
        return bool(self._saving)

    def keep(self, job: PinJob) -> None:
        """Keep what was computed, instead of what had that name; once it is saved, if it is to be (`settled`).

        Raises `OutOfMemory` when there is no room for it beside requests, or for the thread that would write it,
        `StorageFailed` when a file of that name cannot be removed; then all is as before.
        """
        nodes = list(job.sequence.nodes)
        self._scheduler.pin(nodes)
        try:
            saving = self._begin_saving(job, nodes) if job.save else None
            if saving is None:  # also one that was never read back, which would have this name again some day
                self._path(job.name).unlink(missing_ok=True)
        except OSError as error:
            self._scheduler.unpin(nodes)
            raise storage_failed(error, self._folder) from error
        except OutOfMemory:
            self._scheduler.unpin(nodes)
            raise
        self._drop(job.name, "another prefix was pinned by that name")
        if saving is None:
            self._enter(job, nodes)
        else:
            self._saving.append(saving)

    def settled(self) -> Iterator[tuple[PinJob, EbbflowError | None]]:
        """Those that are saved now, and kept, and those that are not, with the reason; for these all is as before."""
        while self._saving and self._saving[0].written.done():
            saving = self._saving.pop(0)
            error = self._end_saving(saving)
            if error is None:
                self._enter(saving.job, saving.nodes)
            else:
                self._scheduler.unpin(saving.nodes)
            yield saving.job, error

    def cancel_saving(self, key: int) -> None:
        """The request of that key is over."""
        for saving in self._saving:
            if saving.job.sequence.key == key:
                saving.dropped = "the request was cancelled"

    def close(self) -> list[PinJob]:
        """The model goes: nothing that is being written will be kept. Those of which that is true; nobody waits for
        the disk.
        """
        for saving in self._saving:
            saving.written.add_done_callback(partial(_forget, saving.partial))
        self._writer.close()
        ended, self._saving = [saving.job for saving in self._saving], []
        return ended

    def _enter(self, job: PinJob, nodes: list[Node]) -> None:
        before = self._kept.get(job.name)
        if before is not None:
            self._scheduler.unpin(before.nodes)
        sequence = job.sequence
        self._kept[job.name] = _Kept(sequence.tokens, sequence.namespace, nodes, job.save, sequence.band)

    def _drop(self, name: str, why: str) -> bool:
        """Whether there was something by that name being written, of which nothing will be kept."""
        found = [saving for saving in self._saving if saving.job.name == name and not saving.dropped]
        for saving in found:
            saving.dropped = why
        return bool(found)

    def _begin_saving(self, job: PinJob, nodes: list[Node]) -> _Saving:
        s = job.sequence
        label = Label(VERSION, self._model, self._kv, s.namespace, s.band, s.depth)
        path = self._folder / f"{job.name}.{next(_NUMBERS)}{PARTIAL}"
        blocks = [self._bytes[block] for block in s.blocks]
        try:
            written = self._writer.submit(partial(write_partial, path, label, list(s.tokens), blocks))
        except RuntimeError as error:
            raise OutOfMemory(f"no memory for a thread that writes {job.name}; try again") from error
        return _Saving(job, nodes, path, written)

    def _end_saving(self, saving: _Saving) -> EbbflowError | None:
        """Give a written file its name, or take it away; what went wrong."""
        try:
            saving.written.result()
            if not saving.dropped:
                saving.partial.rename(self._path(saving.job.name))
                return None
        except (OSError, MemoryError) as error:
            _forget(saving.partial)
            if isinstance(error, OSError):
                return storage_failed(error, self._folder)
            return OutOfMemory(f"no memory to write {saving.job.name}; try again")
        _forget(saving.partial)
        return Cancelled(f"{saving.job.name} was not kept: {saving.dropped}")

    def remove(self, name: str) -> None:
        """Let a pin and its file go, or a file that was not read back.

        Raises `InvalidRequest` when there is neither, `InvalidName`, `StorageFailed`.
        """
        kept = self._kept.get(name)
        dropped = self._drop(name, "it was let go")
        if kept is None and not dropped and not self._path(check_name(name, "pin")).exists():
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

    def _restore(self, path: Path) -> None:
        """Take a pin from its file. Raises `CorruptFile`, and whatever reading and parsing raise."""
        with open_pin(path, self._model, self._kv, self._bytes.shape[1]) as file:
            if file.count > self._room:
                raise CorruptFile("there is no memory for it now")
            file.check_blocks()
            label = file.label
            restored = self._scheduler.restore(label.namespace, file.tokens, label.band, label.depth)
            if restored is None:
                raise CorruptFile("there is no room for it")
            nodes, fresh = restored
            self._room -= len(fresh)
            for index in fresh:
                self._bytes[nodes[index].block] = file.blocks[index : index + 1]
        self._kept[path.name.removesuffix(SUFFIX)] = _Kept(file.tokens, label.namespace, nodes, True, label.band)


def _forget(path: Path, _: object = None) -> None:
    """Take away a file that nobody reads; where that cannot be, it is tried again when the model is loaded."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
