"""What memory there will be, and what has to be left free. Pure.

Readings, what was asked back and is still to come, what others are taking, what was yielded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from ...formats.units import format_seconds, format_size
from .reading import Reading
from .slope import Slope

TRIM_SECONDS: Final = 0.2  # caches that were asked for are there by then: a step, and a look
SLEEP_SECONDS: Final = 1.0  # suspended for longer, the machine is not what it was


@dataclass
class Outlook:
    """Bytes. `asked_back` is what models were told to give and have not given yet."""

    reserve: int
    battery_reserve: int = 0
    now: float = 0.0
    reading: Reading = field(default_factory=lambda: Reading(0, ""))
    known: bool = False  # whether there was a reading at all
    asked_back: int = 0
    slope: Slope = field(default_factory=Slope)
    _yielded: int = 0
    _yielded_until: float = float("-inf")
    _emergency: int = 0  # of ours, swapped out since the last look
    _trims: list[tuple[float, int]] = field(default_factory=list)

    def observe(self, now: float, reading: Reading, ours: int | None) -> bool:
        """Take a reading; `ours` is what stacks hold, unknown while a base is being read. Whether it can be compared
        with the one before: not after a sleep, and not when the battery came or went.
        """
        before, self.now, self.reading = self.reading, now, reading
        slept = self.known and reading.slept - before.slept > SLEEP_SECONDS
        self._emergency = max(0, reading.swapped - before.swapped) if self.known else 0
        self.known = True
        if slept or reading.available <= 0 or ours is None:
            self.slope.forget()
        else:
            self.slope.note(now, reading.available + ours)
        return not slept

    def replace(self, reading: Reading) -> None:
        """Take a reading between two looks."""
        self.reading, self.known = reading, True
        self.slope.forget()

    def concede(self, nbytes: int, until: float) -> None:
        """Leave so much more free until then."""
        self._yielded, self._yielded_until = nbytes, until

    def trim(self, nbytes: int) -> None:
        """So much was asked for that the worker only kept for later."""
        self._trims = [*self._coming_back(), (self.now, nbytes)]

    def _coming_back(self) -> list[tuple[float, int]]:
        return [(when, nbytes) for when, nbytes in self._trims if self.now - when < TRIM_SECONDS]

    @property
    def yielded(self) -> int:
        """What is left free at somebody's wish now."""
        return self._yielded if self.now < self._yielded_until else 0

    @property
    def yield_seconds(self) -> float:
        """For how much longer."""
        return self._yielded_until - self.now if self.yielded else 0.0

    @property
    def reserved(self) -> int:
        """What has to be left free now."""
        return self.reserve + self.yielded + (self.battery_reserve if self.reading.battery else 0)

    @property
    def expected(self) -> int:
        """What will be available once what was asked for is back and others have taken what they are taking.

        Being swapped out is an emergency: then so much is missing.
        """
        available = self.reading.available + self.asked_back - self.slope.coming
        available += sum(nbytes for _, nbytes in self._coming_back())
        return min(available, self.reserved - self._emergency) if self._emergency else available

    @property
    def room(self) -> int:
        """What will be available beyond what has to be left free; less than 0 when memory is short."""
        return self.expected - self.reserved

    def describe_shortage(self) -> str:
        """Why there is no room."""
        if self.yielded:
            left = f" for another {format_seconds(self.yield_seconds)}" if math.isfinite(self.yield_seconds) else ""
            return f"{format_size(self.yielded)} yielded{left}"
        battery = ", on battery" if self.reading.battery and self.battery_reserve else ""
        return f"memory is short ({self.reading.source}{battery})"
