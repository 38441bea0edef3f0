"""What became of a workload's requests, whoever answered them, and what a report says of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

from report import percentile
from workloads import Spoken, most_saved

BLOCK: Final = 32  # tokens; ours share whole blocks


@dataclass
class Answered:
    """One request. Times in seconds since the workload's beginning: when it was made, and when each token was there."""

    prompt: tuple[int, ...]
    asked: float
    interactive: bool = False
    answer: tuple[int, ...] = ()
    times: list[float] = field(default_factory=list)
    ended: float = math.nan
    reused: int = 0  # prompt tokens that need not be computed, as whoever answered says


@dataclass(frozen=True)
class Step:
    """One step of our engine; seconds."""

    ended: float
    took: float
    scheduling: float
    tokens: int
    requests: int  # waiting and running when it began


@dataclass
class Outcome:
    """A workload. `computed` tokens in all, prompts and answers, where that is known."""

    answered: list[Answered]
    computed: int | None = None
    peak_nbytes: int = 0
    steps: list[Step] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Until the last answer ended; that of the interactive user does not count."""
        return max(each.ended for each in self.batch())

    @property
    def per_second(self) -> float:
        """Requests."""
        return len(list(self.batch())) / self.seconds

    @property
    def saved(self) -> int:
        """Prompt tokens that were not computed: counted where steps can be, else as told."""
        if self.computed is None:
            return sum(each.reused for each in self.answered)
        return sum(len(each.prompt) + len(each.answer) - 1 for each in self.answered) - self.computed

    def batch(self) -> Iterator[Answered]:
        """All but the interactive user's."""
        return (each for each in self.answered if not each.interactive)

    def percent(self, grain: int = BLOCK) -> float | None:
        """Saved, of what could be; nothing where nothing could."""
        bound = most_saved((Spoken(each.prompt, each.answer) for each in self.answered), grain)
        return 100 * self.saved / bound if bound else None

    def firsts(self) -> list[float]:
        """Seconds to the first token."""
        return [each.times[0] - each.asked for each in self.answered]

    def gaps(self, *, interactive: bool = False) -> list[float]:
        """Seconds between two tokens of one answer; of the interactive user alone, or of everybody."""
        chosen = (each for each in self.answered if each.interactive or not interactive)
        return [after - before for each in chosen for before, after in pairwise(each.times)]

    def text(self) -> str:
        """A row."""
        firsts, gaps = self.firsts(), self.gaps() or [math.nan]
        bounds = ((self.percent(), "blocks"), (self.percent(1), "tokens"))
        shares = ", ".join(f"{percent:.1f} % of {what}" for percent, what in bounds if percent is not None)
        shared = f"{self.saved} tokens" + (f" ({shares})" if shares else "")
        told = sum(each.reused for each in self.answered)
        if told != self.saved:
            shared += f", told {told}"
        return (
            f"{self.per_second:.2f} requests/s, saved {shared}; first token p50 {percentile(firsts, 0.5):.2f} p99 "
            f"{percentile(firsts, 0.99):.2f} s, between tokens p99 {percentile(gaps, 0.99) * 1e3:.0f} ms; "
            f"keys and values {self.peak_nbytes / 1e6:.1f} MB"
        )

    def numbers(self) -> dict[str, Any]:
        """For the report's samples."""
        return {
            "seconds": self.seconds,
            "saved": self.saved,
            "percent": [self.percent(), self.percent(1)],
            "peak_nbytes": self.peak_nbytes,
            "requests": [[e.asked, *e.times, e.ended] for e in self.answered],
            "reused": [[len(e.prompt), e.reused] for e in self.answered],
            "steps": [[s.ended, s.took, s.scheduling, s.tokens, s.requests] for s in self.steps],
        }
