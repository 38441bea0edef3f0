"""The last thing that is given back: keys and values of requests that run. Pure.

When every model is at its base, the job stands still, nobody is left to unload and memory is still short, the worker is
told to hold fewer keys and values: its youngest requests then give their places up and go on later. One limit holds for
each model, so those that hold most give first. It is raised again as far as there is room, after a quiet time that
doubles with each reversal, and lifted once nothing of what was held before would be in its way. A raise never uses up
the room that it sees, so that it cannot by itself cause the next squeeze.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from .quiet import Quiet

# Bytes, ascending.
KEPT_FREE: Final = 16_000_000  # of the room that a raise sees
EASE: Final = 32_000_000  # room from which on the limit is raised
LEAST: Final = 32_000_000  # of a limit: about one long context of a model of a billion weights

EVERY_SECONDS: Final = 0.5  # between two changes: what the worker was told has happened by then, and was seen


@dataclass
class Squeeze:
    """`limit` is what the worker was told last: bytes of keys and values for each model, 0 for no other than its own.

    One for each worker; the next worker has not heard of it.
    """

    limit: int = 0
    _peak: int = 0  # what the largest model held when it began
    _set_at: float = float("-inf")
    _quiet: Quiet = field(default_factory=Quiet)

    def update(self, now: float, room: int, held: Collection[int], last_resort: bool) -> int | None:
        """The limit to set now, if it is another one.

        `room` is what is available beyond what has to be left free, `held` the keys and values of each model that has
        any, in bytes. `last_resort`: whether nothing else is left to give back.
        """
        self._quiet.forgive(now)
        if room < 0 and (last_resort or self.limit):
            self._quiet.short(now)
        if now - self._set_at < EVERY_SECONDS:
            return None
        if room < 0 and last_resort:
            return self._tighten(now, -room, held)
        if self.limit and room >= EASE and self._quiet.left(now) <= 0:
            return self._ease(now, room, held)
        return None

    def _tighten(self, now: float, missing: int, held: Collection[int]) -> int | None:
        limit = max(LEAST, level_above(held, missing))
        largest = max(held, default=0)
        if limit >= largest or (self.limit and limit >= self.limit):
            return None
        self._peak = max(self._peak, largest)
        return self._set(now, limit)

    def _ease(self, now: float, room: int, held: Collection[int]) -> int | None:
        limit = level_below(held, room - KEPT_FREE)
        if limit >= self._peak:
            self._peak = limit = 0
        elif limit <= self.limit:
            return None
        self._quiet.grew()
        return self._set(now, limit)

    def _set(self, now: float, limit: int) -> int:
        self.limit, self._set_at = limit, now
        return limit


def level_above(sizes: Collection[int], excess: int) -> int:
    """The level above which `sizes` have `excess` bytes together; 0 where they have not so much."""
    falling = sorted(sizes, reverse=True)
    for count, following in enumerate([*falling[1:], 0], 1):
        level = (sum(falling[:count]) - excess) // count
        if level >= following:
            return max(0, level)
    return 0


def level_below(sizes: Collection[int], lack: int) -> int:
    """The level to which all of `sizes` can be filled up with `lack` bytes together."""
    rising = sorted(sizes)
    for count, following in enumerate([*rising[1:], None], 1):
        level = (sum(rising[:count]) + lack) // count
        if following is None or level <= following:
            return level
    return lack
