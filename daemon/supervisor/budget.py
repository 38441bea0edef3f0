"""How large each model shall be: the memory controller, pure. No clock, no process, no message.

Fed with what the sensor reads and what the worker reports, it answers with targets (bytes of each model's stack) and
with the reason for each. What models hold, and what could be had from them, is in `books`; what will be there is judged
in `outlook`, what is wanted in `demand`, how bytes are divided in `pool`, when to grow in `quiet`; who is told, in
`following`.

The method. A model whose wish is a size keeps that size. All others, the automatic ones, share one pool: when memory is
short they drop what is worth least, anywhere, in the very turn in which it gets short, by as much as is missing or will
be before it can be seen; they grow only after a quiet time, in bounded steps, and only as far as leaves the reserve and
half of a dead band untouched. A step of ours can therefore never by itself cause the next shrink. A neighbour that
takes whatever we leave can: each such reversal doubles the quiet time, so that growing and shrinking in turns gets rare
instead of fast.

What is given back, in order, each measured before the next: what the worker keeps for later (`caches`), residual
blocks, the job's further growth (`strangled`), idle models' bases (`evict`), keys and values of the youngest requests
(`squeeze`), and at last new requests (`refusal`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from ...formats.errors import OutOfMemory, Unsupported
from ...formats.manifest import CurvePoint
from ...formats.units import format_seconds, format_size
from .books import Books, Common, Holding, Model
from .demand import Demand
from .outlook import Outlook
from .pool import Claim, divide
from .quiet import Quiet
from .reading import Reading
from .squeeze import Squeeze
from .terms import Terms
from .worth import pieces

# Thresholds on available memory, ascending. Bytes; R is the reserve, with what was yielded and what a battery adds.
#
#   below reserve / 2       when all are at their least, admit no new request
#   below R                 shrink at once, up to R + SHRINK_MARGIN; when all are at their least, stop the job, and then
#                           unload idle models, and then take places from requests; load none whose base does not fit
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
EVICT_EVERY_SECONDS: Final = 0.5  # an unloaded model's memory is there by then
PATIENCE_SECONDS: Final = 1.0  # how long a change counts as under way before it is judged by what is there
MOVE_EVERY_SECONDS: Final = 5.0  # from one model to another

MOVE_FACTOR: Final = 2.0  # by how much bytes must be worth more elsewhere before they move

ALONE: Final = Common()


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
    """The controller's state: demand lives as long as the daemon, everything else as long as a worker."""

    outlook: Outlook
    demand: Demand = field(default_factory=Demand)
    paused: bool = False
    missing: int = 0  # bytes that the last look found missing, before anybody was told
    squeeze: Squeeze = field(default_factory=Squeeze)
    _quiet: Quiet = field(default_factory=Quiet)
    _grown_at: float = float("-inf")
    _moved_at: float = float("-inf")
    _evicted_at: float = float("-inf")
    _asked_at: float = float("-inf")

    def __post_init__(self) -> None:
        self._books = Books(self.demand)

    # -- what people ask --------------------------------------------------------------------------------------------

    def set_terms(self, name: str, terms: Terms) -> None:
        """Remember what is asked; a size is the model's target from now on, as far as it fits; an automatic one begins
        where the model is.
        """
        self.demand.set(name, terms)
        model = self._books.models.get(name)
        if model is None:
            return
        low, high = self._books.limits(name)
        if terms.size.automatic:
            model.target = max(low, min(model.target, high))
        else:
            room = max(0, self._free(self.outlook.reading, but=name)) if self.outlook.known else high
            model.target = max(low, min(high, model.resident + room))

    def keep_free(self, reserve: int, battery_reserve: int) -> None:
        """Leave so much free from now on, and so much beyond that on battery."""
        self.outlook.reserve, self.outlook.battery_reserve = reserve, battery_reserve
        self._quiet.excuse()

    def concede(self, nbytes: int, until: float) -> None:
        """Leave so many bytes more free until then; 0 ends it."""
        self.outlook.concede(nbytes, until)
        self._quiet.excuse()

    def pause(self) -> None:
        """Hold all automatic models at their least until `resume`."""
        self.paused = True
        self._quiet.excuse()

    def resume(self) -> None:
        """End `pause`."""
        self.paused = False

    def forget(self, name: str) -> None:
        """The model is no longer in the library."""
        self.unload(name)
        self.demand.forget(name)

    # -- models come and go -----------------------------------------------------------------------------------------

    def make_room(
        self, name: str, base: int, reading: Reading, idle: Collection[str], common: Common = ALONE
    ) -> list[str]:
        """Models among the idle ones to unload, so that `name` can be loaded with its base.

        Raises `OutOfMemory` when even that would not do, `Unsupported` where an automatic size cannot be followed.
        """
        if reading.fixed_only and self._books.is_automatic(name):
            raise Unsupported(
                f"this system does not say what memory it can spare; give {name} a size (`ebb resize {name} 60%`)"
            )
        free = room = self._free(reading, but=name)
        needed = base - self._books.there(common)
        victims: list[str] = []
        for victim in self._books.by_worth(idle, self.outlook.now):
            if room >= needed:
                break
            if victim != name:
                victims.append(victim)
                room = free + self._books.freed(victims)
                needed = base - self._books.there(common, victims)
        if room < needed:
            raise OutOfMemory(
                f"{name} needs {format_size(needed)} to begin with, of which {format_size(max(0, room))} can be had "
                f"now ({reading.source}, {format_size(self.outlook.reserved)} left to everything else); end other "
                "programs or make a model smaller (`ebb resize`), and try again"
            )
        return victims

    def there(self, common: Common) -> int:
        """Bytes of the base of a model that is not loaded which are in memory all the same, with another one."""
        return self._books.there(common)

    def load(
        self,
        name: str,
        base: int,
        full: int,
        reading: Reading,
        curve: Sequence[CurvePoint] = (),
        common: Common = ALONE,
    ) -> dict[str, int]:
        """Targets, the new model's among them, with which `name` (sizes of its base and stack) can be loaded.

        Automatic models already there may have to make room; none of them grows. `make_room` was asked before.
        """
        self.outlook.replace(reading)
        there = self._books.there(common)
        self._books.models[name] = model = Model(base, full, 0, pieces(base, full, curve), common, there)
        held = {other: model.held for other, model in self._books.automatic().items() if other != name}
        claims = {other: self._claim(other, most=nbytes) for other, nbytes in held.items()}
        automatic = self._books.is_automatic(name)
        claims[name] = self._claim(name, most=base if self.paused and automatic else None)
        least = sum(self._books.limits(other)[0] for other in held)
        targets = divide(self._free(reading, but=name) + there + least, claims)
        if automatic:
            self.demand.ceilings.pop(name, None)
        model.target = -1  # so that it is among the changed ones
        return self._books.retarget(targets)

    def unload(self, name: str) -> int:
        """The worker no longer holds that model; the bytes of its stack that were resident and nobody else's."""
        self.outlook.slope.forget()
        return self._books.remove(name)

    def worker_gone(self, now: float, out_of_memory: bool) -> None:
        """The worker holds nothing any more; if the kernel killed it for memory, the next one gets less."""
        if out_of_memory:
            for name, model in self._books.models.items():
                self.demand.lower(name, model.target)
            self._quiet.worst(now)
        self._books.models.clear()
        self.squeeze = Squeeze()
        self.outlook.slope.forget()

    # -- the controller ---------------------------------------------------------------------------------------------

    def update(self, now: float, reading: Reading, holdings: Mapping[str, Holding], caches: int = 0) -> dict[str, int]:
        """One turn: the targets that changed. `caches` bytes the worker can drop without making anything worse."""
        self._observe(now, reading, holdings)
        self.missing = SHRINK_MARGIN - self.outlook.room if self.short else 0
        if self.paused:
            if self.short:
                self._quiet.short(now)
            automatic = self._books.automatic().items()
            return self._books.retarget(
                {name: min(model.target, self._books.limits(name)[0]) for name, model in automatic}
            )
        if self.short:
            return self._shrink(caches)
        if self._may_grow:
            return self._grow()
        if self._may_move:
            return self._move()
        return {}

    @property
    def short(self) -> bool:
        """Whether memory is short, or will be."""
        return self.outlook.known and self.outlook.room < 0

    @property
    def strangled(self) -> bool:
        """Whether memory is short though every automatic model is at its least and had time to get there."""
        automatic = self._books.automatic().items()
        at_least = all(model.target <= self._books.limits(name)[0] for name, model in automatic)
        return self.short and at_least and self._settled

    @property
    def eased(self) -> bool:
        """Whether there is room again for what was stopped."""
        return self.outlook.room >= DEAD_BAND // 2

    def evict(self, idle: Collection[str]) -> str | None:
        """The model among the idle ones that has to go now, if one has to; at most one for each look at what it gave.

        The caller unloads it, and tells `unload`.
        """
        if self.outlook.now - self._evicted_at < EVICT_EVERY_SECONDS or not (self.strangled or self.paused):
            return None
        name = next(iter(self._books.by_worth(idle, self.outlook.now)), None)
        if name is not None:
            self._evicted_at = self.outlook.now
        return name

    def last_resort(self, idle: Collection[str]) -> bool:
        """Whether nothing is left to give back but what requests use; what was unloaded just now is waited for."""
        waited = self.outlook.now - self._evicted_at >= EVICT_EVERY_SECONDS
        return waited and self.strangled and not self._books.by_worth(idle, self.outlook.now)

    def refusal(self) -> OutOfMemory | None:
        """Why a new request cannot be admitted now, if it cannot."""
        if not self.strangled or not self._books.models or self.outlook.expected >= self.outlook.reserve // 2:
            return None
        return OutOfMemory(
            f"{self.outlook.describe_shortage()} and the models are at their least; try again in a moment, or end "
            "other programs"
        )

    def look_seconds(self) -> float:
        """When to look again: often while memory moves or is near the threshold."""
        moving = any(not model.settled or model.arriving > SHRINK_MARGIN for model in self._books.models.values())
        return LOOK_SECONDS if moving or self.outlook.slope.coming or self.outlook.room < CALM else CALM_LOOK_SECONDS

    def spare(self, reading: Reading) -> int:
        """Bytes that another process of ours may take: what is free, and what automatic models would give back for it.

        What models have been promised and not yet taken (fixed sizes, and the bases of automatic ones) is not spare.
        """
        return max(0, self._free(reading))

    def target(self, name: str) -> int | None:
        """What a loaded model was last told to hold."""
        model = self._books.models.get(name)
        return model.target if model else None

    def reason(self, name: str) -> str:
        """Why a loaded model is as large as it is."""
        model, terms = self._books.models[name], self.demand.of(name)
        low, high = self._books.limits(name)
        if not terms.size.automatic:
            if name in self.demand.ceilings:
                return f"asked for {terms.size}; less since the kernel killed the worker for memory"
            return f"asked for {terms.size}" + ("" if model.target >= high else "; more does not fit now")
        if self.paused:
            return "paused (`ebb resume` ends it)"
        if model.target >= model.full:
            return "all of it fits"
        if model.target >= high:
            return f"at its cap of {format_size(terms.cap)}"
        if self.outlook.reading.available <= self.outlook.reserved + DEAD_BAND:
            least = "; this is the least it can be" if model.target <= low else ""
            return f"{self.outlook.describe_shortage()}{least}"
        if self.outlook.reading.pressure:
            return "not growing while programs wait for memory"
        due = self._quiet.left(self.outlook.now)
        return f"growing again in {format_seconds(max(1, due))}" if due > 0 else "growing"

    def statistics(self, now: float) -> Statistics:
        """The controller's state in figures."""
        outlook = self.outlook
        outlook.now = max(outlook.now, now)
        available, quiet = outlook.reading.available, self._quiet.seconds
        return Statistics(
            outlook.reserved, outlook.yielded, self._books.targets, available, quiet, outlook.yield_seconds
        )

    # -- what is there ----------------------------------------------------------------------------------------------

    def _observe(self, now: float, reading: Reading, holdings: Mapping[str, Holding]) -> None:
        if reading.battery != self.outlook.reading.battery:
            self._quiet.excuse()
        self._books.note(holdings)
        if not self.outlook.observe(now, reading, self._books.ours):
            self._quiet.begin(now)
        if reading.pressure:
            self._quiet.pressed(now)
        self._quiet.forgive(now)
        if self._settled:
            self.outlook.asked_back = 0

    @property
    def _settled(self) -> bool:
        """Whether the worker has done what it was told, or had the time for it."""
        told = max(self._asked_at, self._grown_at)
        return self.outlook.now - told >= PATIENCE_SECONDS or self._books.settled

    def _free(self, reading: Reading, but: str = "") -> int:
        """Bytes that could be had for something new."""
        return self._books.free(reading.available - self.outlook.reserved, but)

    def _claim(self, name: str, *, least: int | None = None, most: int | None = None) -> Claim:
        return self._books.claim(name, self.outlook.now, least=least, most=most)

    # -- moving -----------------------------------------------------------------------------------------------------

    def _shrink(self, caches: int) -> dict[str, int]:
        self._quiet.short(self.outlook.now)
        if caches:  # they go first
            self.outlook.trim(min(caches, self.missing))
        missing = SHRINK_MARGIN - self.outlook.room
        if missing <= 0:
            return {}
        models = self._books.automatic()
        before = sum(model.held for model in models.values())
        claims = {name: self._claim(name, most=model.held) for name, model in models.items()}
        frees = self._freed_share(claims)
        changed = self._books.retarget(divide(before - int(missing / frees), claims))
        if changed:
            after = sum(model.target for model in models.values())
            self.outlook.asked_back += int(max(0, before - after) * frees)
            self._asked_at = self.outlook.now
        return changed

    def _freed_share(self, claims: Mapping[str, Claim]) -> float:
        """How much of what these give back, beyond their least, is free then: all, but for what they share."""
        beyond = sum(claim.most - claim.least for claim in claims.values())
        shared = self._books.shared - self._books.shared_bases
        return max(1 - shared / beyond, 1 / len(self._books.models)) if beyond and shared else 1.0

    @property
    def _may_grow(self) -> bool:
        now = self.outlook.now
        quiet = self._quiet.left(now) <= 0 and now - self._grown_at >= GROW_EVERY_SECONDS
        return quiet and self.outlook.room > DEAD_BAND and self._settled and not self.squeeze.limit

    def _grow(self) -> dict[str, int]:
        room = self.outlook.room - DEAD_BAND // 2 - self._books.arriving
        if room <= 0:
            return {}
        total = self._books.targets + min(room, self._step())
        claims = {name: self._claim(name, least=model.target) for name, model in self._books.models.items()}
        changed = self._books.retarget(divide(total, claims))
        if changed:
            self._grown_at = self.outlook.now
            self._quiet.grew()
        return changed

    def _step(self) -> int:
        return max(GROW_STEP_LEAST, int(GROW_STEP_FRACTION * self._books.full))

    @property
    def _may_move(self) -> bool:
        now = self.outlook.now
        due = max(self._grown_at + GROW_EVERY_SECONDS, self._moved_at + MOVE_EVERY_SECONDS)
        return len(self._books.models) > 1 and now >= due and self._quiet.left(now) <= 0 and self._settled

    def _move(self) -> dict[str, int]:
        """Make room in the model whose bytes are worth least, if they are worth far more in another, which then grows.

        One step, and more than the dead band, or nobody could grow.
        """
        claims = {name: self._claim(name) for name in self._books.automatic()}
        sizes = {name: self._books.models[name].target for name in claims}
        losses = {name: claim.last_gain(sizes[name]) for name, claim in claims.items() if sizes[name] > claim.least}
        gains = {name: claim.next_gain(sizes[name]) for name, claim in claims.items()}
        if not losses:
            return {}
        loser, winner = min(losses, key=lambda name: losses[name]), max(gains, key=lambda name: gains[name])
        if loser == winner or gains[winner] < MOVE_FACTOR * losses[loser]:
            return {}
        self._moved_at = self.outlook.now
        return self._books.retarget({loser: max(claims[loser].least, sizes[loser] - max(self._step(), 2 * DEAD_BAND))})
