"""How fast memory is being taken by others: what is still there when a shrink that begins now can be seen. Pure."""

from __future__ import annotations

from typing import Final

# Seconds, ascending.
SHORTEST_SECONDS: Final = 0.02  # between two looks; one that comes sooner is left out
HORIZON_SECONDS: Final = 0.25  # until an order is heard, carried out between two steps, and seen
STALE_SECONDS: Final = 1.0  # after which an earlier look says nothing

MOST: Final = 256_000_000  # bytes; a wrong guess must not cost a whole model


class Slope:
    """Remembers three looks. A fall is believed when both intervals between them fell, as the slower of the two: one
    program that has just taken a gigabyte is not about to take another.
    """

    def __init__(self) -> None:
        self._looks: list[tuple[float, int]] = []

    def note(self, now: float, nbytes: int) -> None:
        """So much was there, not counting what we ourselves took or gave."""
        if self._looks and now - self._looks[-1][0] > STALE_SECONDS:
            self._looks.clear()
        if not self._looks or now - self._looks[-1][0] >= SHORTEST_SECONDS:
            self._looks = [*self._looks[-2:], (now, nbytes)]

    def forget(self) -> None:
        """What was seen says nothing about what comes."""
        self._looks.clear()

    @property
    def coming(self) -> int:
        """Bytes that others will have taken within the horizon; 0 when they take none."""
        if len(self._looks) < 3:
            return 0
        (t0, a), (t1, b), (t2, c) = self._looks
        rate = min((a - b) / (t1 - t0), (b - c) / (t2 - t1))
        return max(0, min(MOST, int(rate * HORIZON_SECONDS)))
