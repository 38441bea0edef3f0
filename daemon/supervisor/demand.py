"""What is wanted of each model: terms that people gave, recent use, and what both make its bytes worth. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from ...formats.units import SizeWish
from .terms import Terms

HALF_USE_SECONDS: Final = 300.0  # a request counts half after that
UNUSED_WORTH: Final = 0.2  # of a model without requests, where each recent one adds 1
OOM_FACTOR: Final = 0.8  # of its last target is what a model gets after the kernel killed the worker


@dataclass
class Demand:
    """`terms` lasts longer than the daemon, the rest as long as it does."""

    terms: dict[str, Terms] = field(default_factory=dict)
    ceilings: dict[str, int] = field(default_factory=dict)  # after the kernel killed a worker
    _uses: dict[str, tuple[float, float]] = field(default_factory=dict)  # requests, and when that was counted

    def of(self, name: str) -> Terms:
        """All that was asked for a model."""
        return self.terms.get(name, Terms())

    def size(self, name: str) -> SizeWish:
        """The size that was asked for; automatic when none was."""
        return self.of(name).size

    def set(self, name: str, terms: Terms) -> None:
        """Remember what is asked; a ceiling is forgotten."""
        self.terms[name] = terms
        if terms == Terms():
            del self.terms[name]
        self.ceilings.pop(name, None)

    def use(self, name: str, now: float) -> None:
        """A request asks for that model."""
        self._uses[name] = (self._use(name, now) + 1, now)

    def weight(self, name: str, now: float) -> float:
        """What multiplies the worth of its bytes; infinite for a size of its own."""
        if not self.size(name).automatic:
            return math.inf
        return self.of(name).priority * (UNUSED_WORTH + self._use(name, now))

    def lower(self, name: str, target: int) -> None:
        """The kernel killed the worker that worked towards this target."""
        self.ceilings[name] = int(target * OOM_FACTOR)

    def limits(self, name: str, base: int, full: int) -> tuple[int, int]:
        """The smallest and the largest target of a model with such a stack."""
        terms, ceiling = self.of(name), max(base, self.ceilings.get(name, full))
        if terms.size.automatic:
            least = terms.least(base, full)
            return least, max(least, min(terms.most(base, full), ceiling))
        return base, max(base, min(terms.size.resolve(full), ceiling))

    def forget(self, name: str) -> None:
        """The model is no longer in the library."""
        for known in (self.terms, self.ceilings, self._uses):
            known.pop(name, None)

    def _use(self, name: str, now: float) -> float:
        count, at = self._uses.get(name, (0.0, now))
        return count * math.exp2(-max(0.0, now - at) / HALF_USE_SECONDS)
