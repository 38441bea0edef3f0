"""How large each model shall be: the memory controller, pure. No clock, no process, no message.

Fed with what the sensor reads and what the worker reports, it answers with targets (bytes of each model's stack) and
with the reason for each. How bytes are divided among models is in `pool`, what they are worth in `worth`; where the
numbers come from, in `sensor`; who is told, in `following`.

The method. A model whose wish is a size keeps that size. All others, the automatic ones, share one pool: when memory is
short they drop what is worth least, anywhere, in the very turn in which it gets short, by as much as is missing or will
be before it can be seen; they grow only after a quiet time, in bounded steps, and only as far as leaves the reserve and
half of a dead band untouched. A step of ours can therefore never by itself cause the next shrink. A neighbour that
takes whatever we leave can: each such reversal doubles the quiet time, so that growing and shrinking in turns gets rare
instead of fast.

What is given back, in order, each measured before the next: what the worker keeps for later (`caches`), residual
blocks, the job's further growth (`strangled`), idle models' bases (`evict`), and at last new requests (`refusal`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from ...formats.errors import OutOfMemory, Unsupported
from ...formats.manifest import CurvePoint
from ...formats.units import SizeWish, format_seconds, format_size
from .pool import Claim, divide
from .reading import Reading
from .slope import Slope
from .terms import Terms
from .worth import Piece, pieces

# Thresholds on available memory, ascending. Bytes; R is the reserve, with what was yielded and what a battery adds.
#
#   below R                 shrink at once, up to R + SHRINK_MARGIN; when all are at their least, the steps above
#   R .. R + DEAD_BAND      change nothing; a job that was stopped goes on from R + DEAD_BAND / 2
#   above R + DEAD_BAND     grow after a quiet time, down to R + DEAD_BAND / 2
#   above R + CALM          look less often
SHRINK_MARGIN: Final = 16_000_000
DEAD_BAND: Final = 64_000_000
CALM: Final = 512_000_000  # what a neighbour can take between two calm looks, at 2 GB/s
GROW_STEP_LEAST: Final = 32_000_000
GROW_STEP_FRACTION: Final = 1 / 16  # of the full sizes of all models

# Times, ascending. Seconds.
LOOK_SECONDS: Final = 0.05
CALM_LOOK_SECONDS: Final = 0.25
GROW_EVERY_SECONDS: Final = 0.25  # between two steps of one growth
TRIM_SECONDS: Final = 0.2  # caches that were asked for are there by then: a step, and a look
EVICT_EVERY_SECONDS: Final = 0.5  # an unloaded model's memory is there by then
PATIENCE_SECONDS: Final = 1.0  # how long a change counts as under way before it is judged by what is there
SLEEP_SECONDS: Final = 1.0  # suspended for longer, the machine is not what it was
QUIET_LEAST_SECONDS: Final = 2.0
MOVE_EVERY_SECONDS: Final = 5.0  # from one model to another
QUIET_MOST_SECONDS: Final = 60.0
FORGIVE_SECONDS: Final = 120.0  # without a reversal, after which the quiet time is halved again
HALF_USE_SECONDS: Final = 300.0  # a request counts half after that

# Factors.
OOM_FACTOR: Final = 0.8  # of its last target is what a model gets after the kernel killed the worker
UNUSED_WORTH: Final = 0.2  # of a model without requests, where each recent one adds 1
MOVE_FACTOR: Final = 2.0  # by how much bytes must be worth more elsewhere before they move


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
    pieces: tuple[Piece, ...] = ()
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
    def resident(self) -> int:
        return self.holding.nbytes if self.holding else 0

    @property
    def arriving(self) -> int:
        """Bytes this model may still take without being told anything new."""
        return max(0, self.target - self.resident)


@dataclass
class _Use:
    """Requests for a model, each counting half after `HALF_USE_SECONDS`."""

    count: float = 0.0
    at: float = 0.0

    def now(self, now: float) -> float:
        return self.count * math.exp2(-max(0.0, now - self.at) / HALF_USE_SECONDS)


@dataclass(frozen=True)
class Statistics:
    """Bytes: kept free, yielded, wanted by all models together, available at the last reading. Seconds: the quiet time,
    and how long what was yielded stays so.
    """

    reserve: int
    yielded: int
    targets: int
    available: int
    quiet_seconds: float
    yield_seconds: float


@dataclass
class Budget:
    """The controller's state: terms and use live as long as the daemon, everything else as long as a worker.

    `battery_reserve` bytes more are left free while the machine runs on its battery.
    """

    reserve: int
    battery_reserve: int = 0
    terms: dict[str, Terms] = field(default_factory=dict)
    paused: bool = False
    giving_back: bool = False  # whether the last look found memory short: caches have to go
    _ceilings: dict[str, int] = field(default_factory=dict)
    _uses: dict[str, _Use] = field(default_factory=dict)
    _models: dict[str, _Model] = field(default_factory=dict)
    _reading: Reading = field(default_factory=lambda: Reading(0, ""))
    _read: bool = False
    _caches: int = 0
    _trimmed: int = 0
    _trimmed_at: float = float("-inf")
    _emergency: int = 0  # bytes of ours that were swapped out since the last look
    _slope: Slope = field(default_factory=Slope)
    _now: float = 0.0
    _yielded: int = 0
    _yielded_until: float = float("-inf")
    _quiet: float = QUIET_LEAST_SECONDS
    _short_at: float = float("-inf")  # when memory was last short
    _grown_at: float = float("-inf")
    _moved_at: float = float("-inf")
    _reversed_at: float = float("-inf")
    _evicted_at: float = float("-inf")
    _grew_last: bool = False
    _asked_back: int = 0
    _asked_at: float = float("-inf")

    # -- what people ask --------------------------------------------------------------------------------------------

    def wish(self, name: str) -> SizeWish:
        """The size that was asked for; automatic when none was."""
        return self.terms_of(name).size

    def terms_of(self, name: str) -> Terms:
        """All that was asked for a model."""
        return self.terms.get(name, Terms())

    def set_wish(self, name: str, wish: SizeWish) -> None:
        """Remember a size, and leave the other terms as they are."""
        terms = self.terms_of(name)
        self.set_terms(name, Terms(size=wish, floor=terms.floor, cap=terms.cap, priority=terms.priority))

    def set_terms(self, name: str, terms: Terms) -> None:
        """Remember what is asked; a size is the model's target from now on, as far as it fits; an automatic one begins
        where the model is.
        """
        self.terms[name] = terms
        if terms == Terms():
            del self.terms[name]
        self._ceilings.pop(name, None)
        model = self._models.get(name)
        if model is None:
            return
        low, high = self._limits(name)
        if terms.size.automatic:
            model.target = max(low, min(model.target, high))
        else:
            room = max(0, self._free(self._reading, but=name)) if self._read else high
            model.target = max(model.base, min(high, model.resident + room))

    def concede(self, nbytes: int, until: float) -> None:
        """Leave so many bytes more free until then; 0 ends it."""
        self._yielded, self._yielded_until = nbytes, until
        self._grew_last = False  # the next shrink is not a neighbour's answer to our growth

    def pause(self) -> None:
        """Hold all automatic models at their least until `resume`."""
        self.paused, self._grew_last = True, False

    def resume(self) -> None:
        """End `pause`; growing begins after the quiet time."""
        self.paused = False

    def use(self, name: str, now: float) -> None:
        """A request asks for that model."""
        self._uses[name] = _Use(self._use(name, now) + 1, now)

    def forget(self, name: str) -> None:
        """The model is no longer in the library."""
        self.unload(name)
        self.terms.pop(name, None)
        self._ceilings.pop(name, None)
        self._uses.pop(name, None)

    # -- models come and go -----------------------------------------------------------------------------------------

    def make_room(self, name: str, base: int, reading: Reading, idle: Collection[str]) -> list[str]:
        """Models among the idle ones to unload, so that `name` can be loaded with its base.

        Raises `OutOfMemory` when even that would not do, `Unsupported` where an automatic size cannot be followed.
        """
        if reading.fixed_only and self.wish(name).automatic:
            raise Unsupported(
                f"this system does not say what memory it can spare; give {name} a size (`ebb resize {name} 60%`)"
            )
        room = self._free(reading, but=name)
        victims: list[str] = []
        for victim in self._by_worth(idle):
            if room >= base:
                break
            if victim != name:
                room += self._least(victim)
                victims.append(victim)
        if room < base:
            raise OutOfMemory(
                f"{name} needs {format_size(base)} for its base, of which {format_size(max(0, room))} can be had now "
                f"({reading.source}, {format_size(self._reserved)} left to everything else); end other programs or "
                "make a model smaller (`ebb resize`), and try again"
            )
        return victims

    def load(
        self, name: str, base: int, full: int, reading: Reading, curve: Sequence[CurvePoint] = ()
    ) -> dict[str, int]:
        """Targets, the new model's among them, with which `name` (sizes of its base and stack) can be loaded.

        Automatic models already there may have to make room; none of them grows. `make_room` was asked before.
        """
        self._reading, self._read = reading, True
        self._slope.forget()
        self._models[name] = model = _Model(base, full, 0, pieces(base, full, curve))
        held = {other: model.held for other, model in self._automatic().items() if other != name}
        claims = {other: self._claim(other, most=nbytes) for other, nbytes in held.items()}
        claims[name] = self._claim(name, most=base if self.paused and self.wish(name).automatic else None)
        targets = divide(self._free(reading, but=name) + sum(map(self._least, held)), claims)
        if self.wish(name).automatic:
            self._ceilings.pop(name, None)
        model.target = -1  # so that it is among the changed ones
        return self._retarget(targets)

    def unload(self, name: str) -> int:
        """The worker no longer holds that model; the bytes of its stack that were resident."""
        model = self._models.pop(name, None)
        self._slope.forget()
        return model.resident if model else 0

    def worker_gone(self, now: float, out_of_memory: bool) -> None:
        """The worker holds nothing any more; if the kernel killed it for memory, the next one gets less."""
        if out_of_memory:
            self._ceilings |= {name: int(model.target * OOM_FACTOR) for name, model in self._models.items()}
            self._quiet, self._short_at, self._reversed_at = QUIET_MOST_SECONDS, now, now
        self._models.clear()
        self._slope.forget()

    # -- the controller ---------------------------------------------------------------------------------------------

    def update(self, now: float, reading: Reading, holdings: Mapping[str, Holding], caches: int = 0) -> dict[str, int]:
        """One turn: the targets that changed. `caches` bytes the worker can drop without making anything worse."""
        self._observe(now, reading, holdings, caches)
        self.giving_back = False
        if now - max(self._reversed_at, self._short_at) >= FORGIVE_SECONDS and self._quiet > QUIET_LEAST_SECONDS:
            self._quiet, self._reversed_at = max(QUIET_LEAST_SECONDS, self._quiet / 2), now
        if self._settled:
            self._asked_back = 0
        if self.paused:
            return self._retarget({name: min(m.target, self._least(name)) for name, m in self._automatic().items()})
        if self._expected < self._reserved:
            return self._shrink()
        if self._may_grow:
            return self._grow()
        if self._may_move:
            return self._move()
        return {}

    @property
    def short(self) -> bool:
        """Whether memory was short at the last reading."""
        return self._read and self._expected < self._reserved

    @property
    def strangled(self) -> bool:
        """Whether memory is short though every automatic model is at its least and had time to get there."""
        return self.short and self._settled and all(m.target <= self._least(n) for n, m in self._automatic().items())

    @property
    def eased(self) -> bool:
        """Whether there is room again for what was stopped."""
        return self._expected >= self._reserved + DEAD_BAND // 2

    def evict(self, idle: Collection[str]) -> str | None:
        """The model among the idle ones that has to go now, if one has to; at most one for each look at what it gave.

        The caller unloads it, and tells `unload`.
        """
        if self._now - self._evicted_at < EVICT_EVERY_SECONDS or not (self.strangled or self.paused):
            return None
        name = next(iter(self._by_worth(idle)), None)
        if name is not None:
            self._evicted_at = self._now
        return name

    def refusal(self) -> OutOfMemory | None:
        """Why a new request cannot be admitted now, if it cannot."""
        if not self.strangled or not self._models:
            return None
        return OutOfMemory(
            f"memory is short ({self._reading.source}) and the models are at their least; try again in a moment, or "
            "end other programs"
        )

    def look_seconds(self) -> float:
        """When to look again: often while memory moves or is near the threshold."""
        room = self._expected - self._reserved
        moving = self._slope.coming > 0 or any(
            not m.settled or m.arriving > SHRINK_MARGIN for m in self._models.values()
        )
        return LOOK_SECONDS if moving or room < CALM else CALM_LOOK_SECONDS

    def spare(self, reading: Reading) -> int:
        """Bytes that another process of ours may take: what is free, and what automatic models would give back for it.

        What models have been promised and not yet taken (fixed sizes, and the bases of automatic ones) is not spare.
        """
        return max(0, self._free(reading))

    def target(self, name: str) -> int | None:
        """What a loaded model was last told to hold."""
        model = self._models.get(name)
        return model.target if model else None

    def reason(self, name: str) -> str:
        """Why a loaded model is as large as it is."""
        model, terms = self._models[name], self.terms_of(name)
        low, high = self._limits(name)
        if not terms.size.automatic:
            if name in self._ceilings:
                return f"asked for {terms.size}; less since the kernel killed the worker for memory"
            return f"asked for {terms.size}" + ("" if model.target >= high else "; more does not fit now")
        if self.paused:
            return "paused (`ebb resume` ends it)"
        if model.target >= model.full:
            return "all of it fits"
        if model.target >= high:
            return f"at its cap of {format_size(terms.cap)}"
        if self._reading.available <= self._reserved + DEAD_BAND:
            least = "; this is the least it can be" if model.target <= low else ""
            return f"{self._why_short()}{least}"
        if self._reading.pressure:
            return "not growing while programs wait for memory"
        due = self._short_at + self._quiet - self._now
        return f"growing again in {format_seconds(max(1, due))}" if due > 0 else "growing"

    def statistics(self, now: float) -> Statistics:
        """The controller's state in figures."""
        self._now = max(self._now, now)
        return Statistics(
            self._reserved,
            self._conceded,
            sum(model.target for model in self._models.values()),
            self._reading.available,
            self._quiet,
            max(0.0, self._yielded_until - self._now) if self._conceded else 0.0,
        )

    # -- what is seen -----------------------------------------------------------------------------------------------

    def _observe(self, now: float, reading: Reading, holdings: Mapping[str, Holding], caches: int) -> None:
        before, self._now, self._reading, self._caches = self._reading, now, reading, caches
        for name, model in self._models.items():
            model.holding = holdings.get(name)
        if self._read and reading.slept - before.slept > SLEEP_SECONDS:
            self._slope.forget()
            self._short_at = now  # who knows what has changed: grow only after a quiet time
        if reading.battery != before.battery:
            self._grew_last = False
        if reading.pressure:
            self._short_at = max(self._short_at, now - self._quiet + LOOK_SECONDS)
        self._emergency = max(0, reading.swapped - before.swapped) if self._read else 0
        if reading.available <= 0 or any(model.holding is None for model in self._models.values()):
            self._slope.forget()  # no figure at all; or a base is being read, and what is taken is ours
        else:
            self._slope.note(now, reading.available + sum(model.resident for model in self._models.values()))
        self._read = True

    @property
    def _conceded(self) -> int:
        return self._yielded if self._now < self._yielded_until else 0

    @property
    def _reserved(self) -> int:
        """Bytes to leave free now."""
        return self.reserve + self._conceded + (self.battery_reserve if self._reading.battery else 0)

    @property
    def _expected(self) -> int:
        """What will be available once what was asked for is back and others have taken what they are taking."""
        available = self._reading.available + self._asked_back - self._slope.coming
        if self._now - self._trimmed_at < TRIM_SECONDS:
            available += self._trimmed
        return min(available, self._reserved - self._emergency) if self._emergency else available

    @property
    def _settled(self) -> bool:
        """Whether the worker has done what it was told, or had the time for it."""
        told = max(self._asked_at, self._grown_at)
        return self._now - told >= PATIENCE_SECONDS or all(model.settled for model in self._models.values())

    def _why_short(self) -> str:
        if self._conceded:
            left = format_seconds(self._yielded_until - self._now) if math.isfinite(self._yielded_until) else ""
            return f"{format_size(self._conceded)} yielded" + (f" for another {left}" if left else "")
        battery = ", on battery" if self._reading.battery and self.battery_reserve else ""
        return f"memory is short ({self._reading.source}{battery})"

    # -- who may have what ------------------------------------------------------------------------------------------

    def _automatic(self) -> dict[str, _Model]:
        return {name: model for name, model in self._models.items() if self.wish(name).automatic}

    def _limits(self, name: str) -> tuple[int, int]:
        """The smallest and the largest target of a loaded model."""
        model, terms = self._models[name], self.terms_of(name)
        ceiling = max(model.base, self._ceilings.get(name, model.full))
        if terms.size.automatic:
            return terms.least(model.base, model.full), min(terms.most(model.base, model.full), ceiling)
        return model.base, max(model.base, min(terms.size.resolve(model.full), ceiling))

    def _least(self, name: str) -> int:
        return self._limits(name)[0]

    def _use(self, name: str, now: float) -> float:
        use = self._uses.get(name)
        return use.now(now) if use else 0.0

    def _weight(self, name: str) -> float:
        return self.terms_of(name).priority * (UNUSED_WORTH + self._use(name, self._now))

    def _claim(self, name: str, *, least: int | None = None, most: int | None = None) -> Claim:
        """A model's claim; `least` and `most` narrow what it may have."""
        low, high = self._limits(name)
        low = low if least is None else max(low, least)
        high = high if most is None else min(high, most)
        weight = self._weight(name) if self.wish(name).automatic else math.inf
        return Claim(low, max(low, high), self._models[name].pieces, weight)

    def _by_worth(self, names: Collection[str]) -> list[str]:
        """The automatic ones among these models, least worth first."""
        found = [name for name in self._automatic() if name in names]
        return sorted(found, key=lambda name: (self._weight(name), -self._models[name].resident, name))

    def _free(self, reading: Reading, but: str = "") -> int:
        """Bytes that could be had for something new: what is free and what automatic models can do without, less what
        fixed sizes and bases still take.
        """
        free = reading.available - self._reserved
        for name, model in self._models.items():
            if name != but:
                free += model.resident - self._least(name) if self.wish(name).automatic else -model.arriving
        return free

    def _retarget(self, targets: Mapping[str, int]) -> dict[str, int]:
        """Set targets and give back those that changed."""
        changed = {name: target for name, target in targets.items() if self._models[name].target != target}
        for name, target in changed.items():
            self._models[name].target = target
        return changed

    # -- moving -----------------------------------------------------------------------------------------------------

    def _shrink(self) -> dict[str, int]:
        now = self._now
        if self._caches:  # they go first
            self._trimmed, self._trimmed_at = self._caches, now
        missing = self._reserved + SHRINK_MARGIN - self._expected
        if self._grew_last:
            self._quiet = min(QUIET_MOST_SECONDS, self._quiet * 2)
            self._reversed_at, self._grew_last = now, False
        self._short_at, self.giving_back = now, True
        if missing <= 0:
            return {}
        models = self._automatic()
        before = sum(model.held for model in models.values())
        changed = self._retarget(
            divide(before - missing, {name: self._claim(name, most=model.held) for name, model in models.items()})
        )
        after = sum(model.target for model in models.values())
        if changed:
            self._asked_back, self._asked_at = self._asked_back + max(0, before - after), now
        return changed

    @property
    def _may_grow(self) -> bool:
        return (
            self._expected > self._reserved + DEAD_BAND
            and self._now - self._short_at >= self._quiet
            and self._now - self._grown_at >= GROW_EVERY_SECONDS
            and self._settled
        )

    def _grow(self) -> dict[str, int]:
        models = self._models.values()
        room = self._expected - self._reserved - DEAD_BAND // 2 - sum(model.arriving for model in models)
        if room <= 0:
            return {}
        total = sum(model.target for model in models) + min(room, self._step())
        changed = self._retarget(
            divide(total, {name: self._claim(name, least=m.target) for name, m in self._models.items()})
        )
        if changed:
            self._grown_at, self._grew_last = self._now, True
        return changed

    def _step(self) -> int:
        return max(GROW_STEP_LEAST, int(GROW_STEP_FRACTION * sum(model.full for model in self._models.values())))

    @property
    def _may_move(self) -> bool:
        quiet = max(
            self._short_at + self._quiet, self._grown_at + GROW_EVERY_SECONDS, self._moved_at + MOVE_EVERY_SECONDS
        )
        return len(self._models) > 1 and self._now >= quiet and self._settled

    def _move(self) -> dict[str, int]:
        """Make room in the model whose bytes are worth least, if they are worth far more in another, which then grows.

        One step, and more than the dead band, or nobody could grow.
        """
        claims = {name: self._claim(name) for name in self._automatic()}
        losses = {n: c.last_gain(self._models[n].target) for n, c in claims.items() if self._models[n].target > c.least}
        gains = {n: c.next_gain(self._models[n].target) for n, c in claims.items()}
        if not losses or not gains:
            return {}
        loser, winner = min(losses, key=lambda n: losses[n]), max(gains, key=lambda n: gains[n])
        if loser == winner or gains[winner] < MOVE_FACTOR * losses[loser]:
            return {}
        self._moved_at = self._now
        model = self._models[loser]
        return self._retarget({loser: max(claims[loser].least, model.target - max(self._step(), 2 * DEAD_BAND))})
