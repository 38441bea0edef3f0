"""One loaded model: its resident prefix, its engine, and the edge it moves towards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...formats.architecture import Architecture, weight_shapes
from ...formats.errors import BadBlock, CorruptStack, NotArrived, OutOfMemory
from ...formats.manifest import STACK, read_manifest
from ...formats.stack import Stack, check_manifest, read_stack
from ...formats.units import format_size
from ...formats.values import Residency
from ..engine.engine import Engine
from ..mapping import private_nbytes
from ..settings import DEFAULTS, WorkerSettings
from .resident import Resident
from .shared import SharedBlocks

LOOK_SECONDS: Final = 0.5  # between two looks at a file that is still arriving


@dataclass(frozen=True)
class Waiting:
    """Somebody who wants to know when the edge has arrived."""

    id: int
    began: float
    private_nbytes: int


@dataclass(frozen=True)
class Damage:
    """So many blocks are whole; what is wrong with the next, and what to do."""

    blocks: int
    text: str


class Served:
    """The model in `folder`, opened and with its base in memory; what is in `shared` it has in common with others.

    Raises every error of opening, reading and checking its files; then nothing is held. While its file is arriving, the
    edge follows what is there: `NotArrived` is raised only when that is less than the base.
    """

    def __init__(
        self,
        folder: Path,
        target_nbytes: int,
        threads: int,
        clock: Callable[[], float],
        settings: WorkerSettings = DEFAULTS,
        pins_nbytes: int | None = None,
        shared: SharedBlocks | None = None,
    ) -> None:
        self.manifest = read_manifest(folder)
        self._clock = clock
        stack = read_stack(folder / STACK)
        check_manifest(stack, self.manifest)
        self.resident = Resident(_fitting(stack, self.manifest.architecture), shared)
        self._looked = clock()
        try:
            while self.resident.blocks < self.resident.stack.base:
                self.resident.grow(self.resident.stack.base)
            self.engine = Engine(
                folder, self.manifest, self.resident, threads, clock, settings, pins_nbytes=pins_nbytes
            )
        except BaseException:
            self.resident.close()
            raise
        self.waiting: Waiting | None = None
        self.damage: Damage | None = None
        self.aim(target_nbytes)

    def aim(self, target_nbytes: int) -> None:
        """Set where the edge shall be: as many whole blocks as fit and are there, never fewer than the base.

        What was found damaged is tried once more: somebody may have mended it.
        """
        self.target_nbytes = target_nbytes
        self.target = min(self.resident.stack.blocks_within(target_nbytes), self.resident.present)

    @property
    def arrived(self) -> bool:
        """Whether the edge is where it shall be."""
        return self.resident.blocks == self.target

    def move(self, seconds: float) -> bool:
        """Shrink at once, or grow for about `seconds`; whether the edge moved.

        Raises `CorruptStack` or one of its kind, of which `damage` tells from then on, or `OutOfMemory`; the edge then
        stays where it got to until `aim` is called again.
        """
        news = self._look()
        if self.arrived:
            return news
        if self.target < self.resident.blocks:
            self.resident.shrink(self.target)
            return True
        began = self._clock()
        while not self.arrived and self._clock() - began < seconds:
            try:
                self.resident.grow(self.target)
            except NotArrived:
                self.aim(self.target_nbytes)  # as far as is there
            except CorruptStack as error:
                self.target = self.resident.blocks
                whole = f"{self.manifest.name} is whole up to {format_size(self.resident.nbytes)}"
                self.damage = Damage(self.target, f"{error}; {whole}: add or import it again")
                raise type(error)(self.damage.text) from error
            except MemoryError as error:
                self.target = self.resident.blocks
                raise OutOfMemory("no memory to check what was read; try again") from error
            if self.damage and self.resident.blocks > self.damage.blocks:
                self.damage = None
        return True

    def _look(self) -> bool:
        """See now and then what more of the file has arrived; whether that was the last of it."""
        if not self.resident.arriving or self._clock() - self._looked < LOOK_SECONDS:
            return False
        self.resident.look()
        self.aim(self.target_nbytes)
        self._looked = self._clock()
        return not self.resident.arriving

    def wait(self, id: int) -> None:  # noqa: A002 - the wire's own word
        """Remember who asked for the current target."""
        self.waiting = Waiting(id, self._clock(), private_nbytes())

    def residency(self, name: str) -> Residency:
        """What is held now."""
        statistics, scheduler = self.resident.statistics(), self.engine.scheduler
        return Residency(
            model=name,
            blocks=statistics.blocks,
            total_blocks=statistics.total_blocks,
            nbytes=statistics.nbytes,
            total_nbytes=statistics.total_nbytes,
            shared_nbytes=statistics.shared_nbytes,
            shared_base_nbytes=statistics.shared_base_nbytes,
            base_nbytes=self.resident.stack.base_nbytes,
            target_nbytes=self.target_nbytes,
            kv_nbytes=self.engine.kv_nbytes,
            work_nbytes=self.engine.work_nbytes,
            cache_nbytes=self.engine.cache_nbytes,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            arrived_nbytes=self.resident.stack.edges[self.resident.present] if self.resident.arriving else None,
            kv_limit_nbytes=self.engine.kv_limit_nbytes,
            kv_cached_nbytes=self.engine.kv_cached_nbytes,
            kv_pinned_nbytes=self.engine.kv_pinned_nbytes,
            prompt_tokens=scheduler.totals.prompt,
            reused_tokens=scheduler.totals.reused,
            preemptions=scheduler.totals.preemptions,
            damage=self.damage.text if self.damage else "",
            damaged_at_nbytes=self.resident.stack.edges[self.damage.blocks] if self.damage else None,
            tokens_per_second=round(self.engine.tokens_per_second, 1) if scheduler.running else 0.0,
        )

    def close(self) -> None:
        """Give all memory back that no other model uses. The engine's requests must have been ended."""
        self.resident.close()


def _fitting(stack: Stack, a: Architecture) -> Stack:
    """The stack, if its base holds every weight of the network in its right shape, and it holds nothing else.

    Kernels trust shapes and presence. Raises `BadBlock`.
    """
    shapes = weight_shapes(a)
    for block in stack.blocks:
        if block.tensor not in shapes or (len(block.shape) == 1 and block.level):
            raise BadBlock(f"{stack.path} holds {block.tensor} level {block.level}, which the network does not read")
    # a mask without its values is nothing
    base = {entry.tensor: entry for entry in stack.blocks[: stack.base] if entry.kind != "mask"}
    for name, shape in shapes.items():
        entry = base.get(name)
        if entry is None or entry.shape != shape or (len(shape) == 1 and entry.kind != "dense"):
            found = "nothing" if entry is None else f"{entry.kind} {list(entry.shape)}"
            raise BadBlock(f"{stack.path} holds {found} as {name}; the manifest's network wants {list(shape)}")
    return stack
