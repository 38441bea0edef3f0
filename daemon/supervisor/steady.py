"""A clock for which time stands still while this process cannot run. Pure but for the clock it is given.

Every patience of the supervisor (a client's lease, a worker's silence, the time a child has to get ready) asks how long
somebody else has been silent. After Ctrl-Z, a debugger or a jump of the machine's clock, the others have had no chance
to be heard: what passed then is taken out, here, once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

JUMP_SECONDS: Final = 5.0  # between two looks, when the loop turns at least once a second: it did not run


class SteadyClock:
    """Seconds, from any point, that pass only while somebody looks."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen = clock()
        self._lost = 0.0

    def __call__(self) -> float:
        """The time now."""
        now = self._clock()
        if not 0 <= now - self._seen <= JUMP_SECONDS:
            self._lost += now - self._seen
        self._seen = now
        return now - self._lost
