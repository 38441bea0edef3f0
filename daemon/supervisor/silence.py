"""When a worker counts as hung. Pure: told what happens and when; who kills it is `worker`.

A busy worker reports twice a second, whatever it does, except while it loads a model: then it reads the base in one
go. One that nobody waits for may be silent for ever.
"""

from __future__ import annotations

from typing import Final

# Seconds, ascending.
ASLEEP_SECONDS: Final = 5.0  # between two looks: this process was stopped, and could not have heard anything
HUNG_SECONDS: Final = 30.0
LOADING_SECONDS: Final = 120.0


class Silence:
    """For how long the worker has owed us a word."""

    def __init__(self) -> None:
        self._since = self._looked = float("-inf")

    def broken(self, now: float) -> None:
        """The worker said something."""
        self._since = now

    def too_long(self, now: float, *, owing: bool, loading: bool) -> bool:
        """Whether the worker hangs; asked every turn. `owing`: a request is its to answer."""
        if not owing or now - self._looked > ASLEEP_SECONDS:
            self._since = now
        self._looked = now
        return now - self._since >= (LOADING_SECONDS if loading else HUNG_SECONDS)
