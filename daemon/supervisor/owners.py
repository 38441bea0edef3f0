"""Numbers for clients, between which the engine is fair. Pure."""

from __future__ import annotations

from collections import OrderedDict
from itertools import count
from typing import Final

REMEMBERED: Final = 1_000


class Owners:
    """A client keeps its number until a thousand others have asked something since; no number is given twice."""

    def __init__(self) -> None:
        self._numbers: OrderedDict[bytes, int] = OrderedDict()
        self._next = count(1)

    def number(self, client: bytes) -> int:
        """From 1 on; 0 is nobody."""
        if client not in self._numbers:
            self._numbers[client] = next(self._next)
            if len(self._numbers) > REMEMBERED:
                self._numbers.popitem(last=False)
        self._numbers.move_to_end(client)
        return self._numbers[client]
