"""One reading of the machine's memory: made by `sensor`, judged by `budget`, shown by `ebb ps`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """Bytes that could be taken now before something breaks, and the name of what limits them."""

    available: int
    source: str
