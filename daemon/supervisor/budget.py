"""How large each model shall be: the memory controller, pure. No clock, no process, no message.

Fed with what the sensor reads and what the worker reports, it answers with targets (bytes of each model's stack) and
with the reason for each. How one number is divided among models is in `shares`; where the numbers come from, in
`sensor`; who is told, in `worker`.

The method. A model whose wish is a size keeps that size. All others, the automatic ones, share what is left in
proportion to their full sizes. They shrink in the very turn in which memory gets short, by as much as is missing; they
grow only after a quiet time, in bounded steps, and only as far as leaves the reserve and half of a dead band untouched.
A step of ours can therefore never by itself cause the next shrink. A neighbour that takes whatever we leave can: each
such reversal doubles the quiet time, so that growing and shrinking in turns gets rare instead of fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from ...formats.units import AUTO, SizeWish, format_seconds
from .reading import Reading
from .shares import divide

# Thresholds on available memory, ascending. Bytes; RESERVE is given by the caller.
#
#   below RESERVE                     shrink at once, up to RESERVE + SHRINK_MARGIN
#   RESERVE .. RESERVE + DEAD_BAND    change nothing
#   above RESERVE + DEAD_BAND         grow after a quiet time, down to RESERVE + DEAD_BAND / 2
SHRINK_MARGIN: Final = 16_000_000
DEAD_BAND: Final = 64_000_000
GROW_STEP_LEAST: Final = 32_000_000
GROW_STEP_FRACTION: Final = 1 / 16  # of the full sizes of all automatic models

# Times, ascending. Seconds.
GROW_EVERY_SECONDS: Final = 0.5  # between two steps of one growth
PATIENCE_SECONDS: Final = 1.0  # how long a change counts as under way before it is judged by what is there
QUIET_LEAST_SECONDS: Final = 2.0
QUIET_MOST_SECONDS: Final = 60.0
FORGIVE_SECONDS: Final = 120.0  # without a reversal, after which the quiet time is halved again

OOM_FACTOR: Final = 0.8  # of its last target is what a model gets after the kernel killed the worker


@dataclass(frozen=True)
class Holding:
    """What the worker last reported of one model: bytes resident, and the target it works towards."""

    nbytes: int
    target: int


@dataclass
class _Model:
    base: int
    full: int
    target: int
    holding: Holding | None = None

    @property
    def settled(self) -> bool:
        return self.holding is not None and self.holding.target == self.target and self.holding.nbytes <= self.target

    @property
    def held(self) -> int:
        """Bytes to count on: the resident ones once the worker knows the present target, until then the target."""
        known = self.holding is not None and self.holding.target == self.target
        return min(self.target, self.holding.nbytes) if known and self.holding else self.target

    @property
    def arriving(self) -> int:
        """Bytes this model may still take without being told anything new."""
        return max(0, self.target - (self.holding.nbytes if self.holding else 0))


@dataclass(frozen=True)
class Statistics:
    """Bytes: kept free, wanted by all models together, available at the last reading. Seconds: the quiet time."""

    reserve: int
    targets: int
    available: int
    quiet_seconds: float


@dataclass
class Budget:
    """The controller's state: wishes live as long as the daemon, everything else as long as a worker."""

    reserve: int
    _wishes: dict[str, SizeWish] = field(default_factory=dict)
    _ceilings: dict[str, int] = field(default_factory=dict)
    _models: dict[str, _Model] = field(default_factory=dict)
    _reading: Reading = field(default_factory=lambda: Reading(0, ""))
    _now: float = 0.0
    _quiet: float = QUIET_LEAST_SECONDS
    _short_at: float = float("-inf")  # when memory was last short
    _grown_at: float = float("-inf")
    _reversed_at: float = float("-inf")
    _grew_last: bool = False
    _asked_back: int = 0
    _asked_at: float = float("-inf")

    # -- wishes -----------------------------------------------------------------------------------------------------

    def wish(self, name: str) -> SizeWish:
        """What was asked for; automatic when nothing was."""
        return self._wishes.get(name, AUTO)

    def set_wish(self, name: str, wish: SizeWish) -> None:
        """Remember a wish; a size is the model's target from now on, an automatic one begins where the model is."""
        self._wishes[name] = wish
        self._ceilings.pop(name, None)
        model = self._models.get(name)
        if model and not wish.automatic:
            model.target = max(model.base, wish.resolve(model.full))

    def forget(self, name: str) -> None:
        """The model is no longer in the library."""
        self.unload(name)
        self._wishes.pop(name, None)
        self._ceilings.pop(name, None)

    # -- models come and go -----------------------------------------------------------------------------------------

    def load(self, name: str, base: int, full: int, reading: Reading) -> dict[str, int]:
        """Targets, the new model's among them, with which `name` (sizes of its base and stack) can be loaded.

        Automatic models already there may have to make room; none of them grows.
        """
        self._reading = reading
        room = (
            reading.available
            - self.reserve
            - sum(model.arriving for other, model in self._models.items() if not self.wish(other).automatic)
        )
        self._models[name] = _Model(base, full, 0)
        targets = {}
        if self.wish(name).automatic:
            held = {other: model for other, model in self._automatic().items() if other != name}
            total = room + sum(model.target - model.arriving for model in held.values())
            shares = self._divide(total)
            targets = {other: min(model.target, shares[other]) for other, model in held.items()}
            targets[name] = shares[name]
        else:
            targets[name] = self.wish(name).resolve(full)
        targets[name] = max(base, min(targets[name], self._ceilings.get(name, full)))
        if self.wish(name).automatic:
            self._ceilings.pop(name, None)
        return {name: targets[name]} | self._retarget(targets)

    def unload(self, name: str) -> None:
        """The worker no longer holds that model."""
        self._models.pop(name, None)

    def worker_gone(self, now: float, out_of_memory: bool) -> None:
        """The worker holds nothing any more; if the kernel killed it for memory, the next one gets less."""
        if out_of_memory:
            self._ceilings |= {name: int(model.target * OOM_FACTOR) for name, model in self._models.items()}
            self._quiet, self._short_at, self._reversed_at = QUIET_MOST_SECONDS, now, now
        self._models.clear()

    # -- the controller ---------------------------------------------------------------------------------------------

    def update(self, now: float, reading: Reading, holdings: Mapping[str, Holding]) -> dict[str, int]:
        """One turn: the targets that changed."""
        self._now, self._reading = now, reading
        for name, model in self._models.items():
            model.holding = holdings.get(name)
        if now - max(self._reversed_at, self._short_at) >= FORGIVE_SECONDS and self._quiet > QUIET_LEAST_SECONDS:
            self._quiet, self._reversed_at = max(QUIET_LEAST_SECONDS, self._quiet / 2), now
        if self._settled(now):
            self._asked_back = 0
        if reading.available + self._asked_back < self.reserve:
            return self._shrink(now)
        if self._may_grow(now):
            return self._grow(now)
        return {}

    def spare(self, reading: Reading) -> int:
        """Bytes that another process of ours may take: what is free, and what automatic models would give back for it.

        What models have been promised and not yet taken (fixed sizes, and the bases of automatic ones) is not spare.
        """
        room = reading.available - self.reserve
        for name, model in self._models.items():
            if self.wish(name).automatic:
                room += (model.holding.nbytes if model.holding else 0) - model.base
            else:
                room -= model.arriving
        return max(0, room)

    def target(self, name: str) -> int | None:
        """What a loaded model was last told to hold."""
        model = self._models.get(name)
        return model.target if model else None

    def reason(self, name: str) -> str:
        """Why a loaded model is as large as it is."""
        model, wish = self._models[name], self.wish(name)
        if name in self._ceilings and not wish.automatic:
            return f"asked for {wish}; less since the kernel killed the worker for memory"
        if not wish.automatic:
            return f"asked for {wish}"
        if model.target >= model.full:
            return "all of it fits"
        if self._reading.available <= self.reserve + DEAD_BAND:
            least = "; this is the least it can be" if model.target <= model.base else ""
            return f"memory is short ({self._reading.source}){least}"
        due = self._short_at + self._quiet - self._now
        return f"growing again in {format_seconds(max(1, due))}" if due > 0 else "growing"

    def statistics(self) -> Statistics:
        """The controller's state in figures."""
        targets = sum(model.target for model in self._models.values())
        return Statistics(self.reserve, targets, self._reading.available, self._quiet)

    def _settled(self, now: float) -> bool:
        """Whether the worker has done what it was told, or had the time for it."""
        told = max(self._asked_at, self._grown_at)
        return now - told >= PATIENCE_SECONDS or all(model.settled for model in self._models.values())

    def _automatic(self) -> dict[str, _Model]:
        return {name: model for name, model in self._models.items() if self.wish(name).automatic}

    def _divide(self, total: int) -> dict[str, int]:
        return divide(total, {name: (model.base, model.full) for name, model in self._automatic().items()})

    def _retarget(self, targets: dict[str, int]) -> dict[str, int]:
        """Set targets and give back those that changed."""
        changed = {name: target for name, target in targets.items() if self._models[name].target != target}
        for name, target in changed.items():
            self._models[name].target = target
        return changed

    def _shrink(self, now: float) -> dict[str, int]:
        missing = self.reserve + SHRINK_MARGIN - self._reading.available - self._asked_back
        if self._grew_last:
            self._quiet = min(QUIET_MOST_SECONDS, self._quiet * 2)
            self._reversed_at, self._grew_last = now, False
        self._short_at = now
        before = sum(model.held for model in self._automatic().values())
        changed = self._retarget(self._divide(before - missing))
        after = sum(model.target for model in self._automatic().values())
        if changed:
            self._asked_back, self._asked_at = self._asked_back + before - after, now
        return changed

    def _may_grow(self, now: float) -> bool:
        return (
            self._reading.available > self.reserve + DEAD_BAND
            and now - self._short_at >= self._quiet
            and now - self._grown_at >= GROW_EVERY_SECONDS
            and self._settled(now)
        )

    def _grow(self, now: float) -> dict[str, int]:
        automatic = self._automatic().values()
        arriving = sum(model.arriving for model in self._models.values())
        room = self._reading.available - self.reserve - DEAD_BAND // 2 - arriving
        step = max(GROW_STEP_LEAST, int(GROW_STEP_FRACTION * sum(model.full for model in automatic)))
        if room <= 0:
            return {}
        changed = self._retarget(self._divide(sum(model.target for model in automatic) + min(room, step)))
        if changed:
            self._grown_at, self._grew_last = now, True
        return changed
