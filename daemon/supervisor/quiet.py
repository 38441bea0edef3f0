"""How long to wait before growing: a quiet time that doubles with each reversal and is forgiven slowly. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# Seconds, ascending.
LEAST_SECONDS: Final = 2.0
MOST_SECONDS: Final = 60.0
FORGIVE_SECONDS: Final = 120.0  # without a reversal, after which the quiet time is halved again

_PRESSURE_SECONDS: Final = 0.05  # growing waits for so long after programs last waited for memory


@dataclass
class Quiet:
    """A shrink that answers a growth of ours is a reversal: then `seconds` doubles."""

    seconds: float = LEAST_SECONDS
    _since: float = float("-inf")  # when memory was last short
    _reversed_at: float = float("-inf")
    _grew_last: bool = False

    def short(self, now: float) -> None:
        """Memory is short."""
        if self._grew_last:
            self.seconds = min(MOST_SECONDS, self.seconds * 2)
            self._reversed_at, self._grew_last = now, False
        self._since = now

    def grew(self) -> None:
        """Something of ours grew."""
        self._grew_last = True

    def excuse(self) -> None:
        """The next shrink has a reason of its own, and is no neighbour's answer to our growth."""
        self._grew_last = False

    def begin(self, now: float) -> None:
        """Who knows what has changed: grow only after a quiet time."""
        self._since = now

    def pressed(self, now: float) -> None:
        """Programs wait for memory: do not grow just now."""
        self._since = max(self._since, now - self.seconds + _PRESSURE_SECONDS)

    def worst(self, now: float) -> None:
        """The kernel killed the worker."""
        self.seconds, self._since, self._reversed_at = MOST_SECONDS, now, now

    def forgive(self, now: float) -> None:
        """Asked every turn."""
        if now - max(self._reversed_at, self._since) >= FORGIVE_SECONDS and self.seconds > LEAST_SECONDS:
            self.seconds, self._reversed_at = max(LEAST_SECONDS, self.seconds / 2), now

    def left(self, now: float) -> float:
        """Seconds until it is over; 0 or less: it is."""
        return self._since + self.seconds - now
