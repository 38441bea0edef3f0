"""The models that the worker was told to load, and what it last said of each."""

from __future__ import annotations

from collections.abc import Iterable

from ...formats.values import Residency
from .books import Holding


class Loaded:
    """By name; of one that is still being loaded nothing is known yet."""

    def __init__(self) -> None:
        self._models: dict[str, Residency | None] = {}

    def __contains__(self, model: str) -> bool:
        return model in self._models

    def __len__(self) -> int:
        return len(self._models)

    def get(self, model: str) -> Residency | None:
        """What is known of this one, if anything is."""
        return self._models.get(model)

    @property
    def names(self) -> set[str]:
        """All of them."""
        return set(self._models)

    @property
    def loading(self) -> bool:
        """Whether one of them has not been reported yet."""
        return None in self._models.values()

    @property
    def residencies(self) -> list[Residency]:
        """What is known, in the order in which they were loaded."""
        return [residency for residency in self._models.values() if residency]

    @property
    def holdings(self) -> dict[str, Holding]:
        """The same, as the budget wants it."""
        return {
            r.model: Holding(r.nbytes, r.target_nbytes, r.shared_nbytes, r.shared_base_nbytes, r.damaged_at_nbytes)
            for r in self.residencies
        }

    @property
    def kv_nbytes(self) -> list[int]:
        """Keys and values of each model that has any."""
        return [residency.kv_nbytes for residency in self.residencies if residency.kv_nbytes]

    def add(self, model: str) -> None:
        """It was told to load this one."""
        self._models[model] = None

    def remove(self, model: str) -> None:
        """It does not hold that one any more, if it ever did."""
        self._models.pop(model, None)

    def clear(self) -> None:
        """It holds nothing any more."""
        self._models.clear()

    def note(self, residencies: Iterable[Residency]) -> None:
        """Take what it says; of models that it was told to forget meanwhile, nothing."""
        for residency in residencies:
            if residency.model in self._models:
                self._models[residency.model] = residency
