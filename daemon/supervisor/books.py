"""What each loaded model was told to hold and holds, and what could be had from it. Pure; `budget` decides about it.

Models may have blocks in common, which are in memory once (`worker/shared`). Sizes and targets are those of stacks all
the same; but what is shared was taken only once, so giving it back frees nothing until its last user does, and nothing
is promised on its account. What bases share they go on sharing, unless one of them is unloaded. Who shares with whom is
not reported: models of different `kin` do not, and those of the same may all share with each other.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field, replace

from .demand import Demand
from .pool import Claim
from .worth import Piece


@dataclass(frozen=True)
class Common:
    """What a model may have in common with others: with those of another `kin` nothing, and with those of the same
    `masks` (if it has any) `mask_nbytes` of its base, all of these that are large enough to be shared.
    """

    kin: Hashable = None
    masks: str = ""
    mask_nbytes: int = 0


@dataclass(frozen=True)
class Holding:
    """What the worker last reported of one model: bytes resident, and the target it works towards.

    `shared` of the resident bytes are in memory once for it and another model, and counted there; of these,
    `shared_base` are in its base. Of a damaged stack no more than `damaged_at` bytes can come.
    """

    nbytes: int
    target: int
    shared: int = 0
    shared_base: int = 0
    damaged_at: int | None = None


@dataclass
class Model:
    """Bytes of a loaded model's base and stack, what it was told to hold, and what its parts are worth.

    `there`: how much of its base was in memory before it was loaded, if all is as its manifest says.
    """

    base: int
    full: int
    target: int
    pieces: tuple[Piece, ...] = ()
    common: Common = Common()
    there: int = 0
    holding: Holding | None = None

    @property
    def settled(self) -> bool:
        """Whether it has given back what it was told to."""
        return self.holding is not None and self.holding.target == self.target and self.holding.nbytes <= self.target

    @property
    def held(self) -> int:
        """Bytes to count on: the resident ones once the worker knows the present target, until then the target."""
        known = self.holding is not None and self.holding.target == self.target
        return min(self.target, self.holding.nbytes) if known and self.holding else self.target

    @property
    def resident(self) -> int:
        """Bytes of its stack in memory, as last reported."""
        return self.holding.nbytes if self.holding else 0

    @property
    def placed(self) -> int:
        """Bytes that it needs no more room for."""
        return self.holding.nbytes if self.holding else self.there

    @property
    def shared(self) -> int:
        """Bytes of it that are, or will be, in memory once for it and another model, and counted there."""
        return self.holding.shared if self.holding else self.there

    @property
    def shared_base(self) -> int:
        """Bytes of its base of which that is so."""
        return self.holding.shared_base if self.holding else self.there

    @property
    def arriving(self) -> int:
        """Bytes this model may still take without being told anything new."""
        damaged_at = self.holding.damaged_at if self.holding else None
        return max(0, (self.target if damaged_at is None else min(self.target, damaged_at)) - self.placed)


@dataclass
class Books:
    """The loaded models, by name; how large each may be is as `demand` says."""

    demand: Demand
    models: dict[str, Model] = field(default_factory=dict)

    def note(self, holdings: Mapping[str, Holding]) -> None:
        """Take what the worker reported last."""
        for name, model in self.models.items():
            model.holding = holdings.get(name)

    def remove(self, name: str) -> int:
        """A model is unloaded; the bytes of its stack that were resident and surely nobody else's."""
        model = self.models.pop(name, None)
        if model is None:
            return 0
        shared = model.shared
        for other in self.models.values():
            if other.common.kin == model.common.kin:
                shared += other.shared
                if other.holding:  # what it shared may be counted with others now, who will say so
                    other.holding = replace(other.holding, shared=0, shared_base=0)
        twins = [other for other in self.models.values() if other.common.masks == model.common.masks]
        if not model.holding and twins and all(twin.there and not twin.holding for twin in twins):
            twins[0].there = 0  # it could not be loaded, and the next one reads what all count on
        return max(0, model.resident - shared)

    def retarget(self, targets: Mapping[str, int]) -> dict[str, int]:
        """Set targets and give back those that changed."""
        changed = {name: target for name, target in targets.items() if self.models[name].target != target}
        for name, target in changed.items():
            self.models[name].target = target
        return changed

    # -- sums -------------------------------------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Whether all have given back what they were told to."""
        return all(model.settled for model in self.models.values())

    @property
    def ours(self) -> int | None:
        """Bytes that all stacks take together; unknown while a base is being read."""
        if any(model.holding is None for model in self.models.values()):
            return None
        return sum(model.resident for model in self.models.values()) - self.shared

    @property
    def targets(self) -> int:
        """What all were told to hold."""
        return sum(model.target for model in self.models.values())

    @property
    def full(self) -> int:
        """Bytes of all their stacks."""
        return sum(model.full for model in self.models.values())

    @property
    def arriving(self) -> int:
        """Bytes that all may still take without being told anything new."""
        return sum(model.arriving for model in self.models.values())

    @property
    def shared(self) -> int:
        """By how much all stacks together take less than their sizes say."""
        return sum(model.shared for model in self.models.values())

    @property
    def shared_bases(self) -> int:
        """By how much their bases do."""
        return sum(model.shared_base for model in self.models.values())

    def free(self, spare: int, but: str = "") -> int:
        """Bytes that could be had for something new: what is `spare` and what automatic models can do without, less
        what fixed sizes and bases still take.
        """
        free, beyond = spare, 0
        for name, model in self.models.items():
            if name != but:
                held = model.placed - self.limits(name)[0]
                beyond += max(0, held) if self.is_automatic(name) else 0
                free += min(0, held) if self.is_automatic(name) else -model.arriving
        return free + max(0, beyond - (self.shared - self.shared_bases))

    def freed(self, victims: Collection[str]) -> int:
        """Bytes of their bases that unloading these would surely free, or as much for others of their kin to keep."""
        freed = 0
        for kin in {self.models[name].common.kin for name in victims}:
            family = [model for model in self.models.values() if model.common.kin == kin]
            bases = sum(self.limits(name)[0] for name in victims if self.models[name].common.kin == kin)
            freed += max(0, bases - sum(model.shared_base for model in family))
        return freed

    def there(self, common: Common, victims: Collection[str] = ()) -> int:
        """Bytes of a new model's base that are in memory already, also when the victims are gone."""
        twins = (name for name, model in self.models.items() if model.common.masks == common.masks)
        return common.mask_nbytes if common.masks and any(name not in victims for name in twins) else 0

    # -- each model -------------------------------------------------------------------------------------------------

    def is_automatic(self, name: str) -> bool:
        """Whether nobody asked for a size."""
        return self.demand.size(name).automatic

    def automatic(self) -> dict[str, Model]:
        """The models for which nobody asked for a size."""
        return {name: model for name, model in self.models.items() if self.is_automatic(name)}

    def limits(self, name: str) -> tuple[int, int]:
        """The smallest and the largest target of a loaded model."""
        return self.demand.limits(name, self.models[name].base, self.models[name].full)

    def claim(self, name: str, now: float, *, least: int | None = None, most: int | None = None) -> Claim:
        """A model's claim; `least` and `most` narrow what it may have."""
        low, high = self.limits(name)
        low = low if least is None else max(low, least)
        high = high if most is None else min(high, most)
        return Claim(low, max(low, high), self.models[name].pieces, self.demand.weight(name, now))

    def by_worth(self, names: Collection[str], now: float) -> list[str]:
        """The automatic ones among these models, least worth first."""
        weights = {name: self.demand.weight(name, now) for name in self.automatic() if name in names}
        return sorted(weights, key=lambda name: (weights[name], -self.models[name].resident, name))
