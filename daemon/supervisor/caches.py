"""What the worker keeps only to be faster next time, and how much of that it was asked for already. Pure.

Reports are half a second old, and looks at memory are not: what was asked for must not be counted as there to be asked
for again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final

from ...formats.values import Residency

TRIM_SECONDS: Final = 1.0  # after which a report says what an order has left


class Caches:
    """Bytes: work space, which goes as a whole, and keys and values that belong to no running request."""

    def __init__(self) -> None:
        self._all = self._kv = 0
        self._asked: deque[tuple[float, int]] = deque()

    def note(self, residencies: Iterable[Residency]) -> None:
        """What all models have, as the worker last reported it."""
        known = tuple(residencies)
        self._all = sum(residency.cache_nbytes for residency in known)
        self._kv = min(self._all, sum(residency.kv_cached_nbytes for residency in known))

    def left(self, now: float) -> int:
        """What can still be asked for."""
        self._forget(now)
        return max(0, self._all - sum(nbytes for _, nbytes in self._asked))

    def ask(self, now: float, nbytes: int) -> bool:
        """So many bytes are wanted; whether to say so: not again while an order is on its way and nothing is left."""
        left = self.left(now)
        if self._asked and not left:
            return False
        self._asked.append((now, max(0, min(left, nbytes + self._all - self._kv))))
        return True

    def _forget(self, now: float) -> None:
        while self._asked and now - self._asked[0][0] >= TRIM_SECONDS:
            self._asked.popleft()
