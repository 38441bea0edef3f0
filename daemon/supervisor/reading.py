"""One reading of the machine's memory: made by `sensor`, judged by `budget`, shown by `ebb ps`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """Bytes that could be taken now before something breaks, and the name of what limits them.

    `swapped` counts our processes' bytes in swap; `slept` the seconds for which the machine was suspended since it
    started. `pressure`: programs wait for memory (PSI). `fixed_only`: this system cannot be followed, so models need a
    size of their own.
    """

    available: int
    source: str
    swapped: int = 0
    slept: float = 0.0
    pressure: bool = False
    battery: bool = False
    fixed_only: bool = False
