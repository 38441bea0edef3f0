"""Two models and a neighbour, by simulation: one pool for the most valuable bytes, against whole models.

The real controller (`supervisor/budget`) and the real curve of size against KL (the demo's, stretched to two stacks of
832 MB) on a made-up machine: a neighbour's memory walks by 50 to 400 MB, requests come at random, four of five for the
first model. The peer does what model servers do: a model is loaded whole when it is asked for, the least recently used
one is unloaded when memory is short; what cannot be loaded is refused. Both read the disk at 600 MB/s, and both leave
the same reserve. An answer is worth exp(-KL to the original), a refused one nothing. Seeded; no clock, no processes.

Run: .venv/bin/python bench/sharing.py [--json FILE] [--check]
"""

from __future__ import annotations

import math
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import numpy as np

from ebbflow.daemon.supervisor.books import Holding
from ebbflow.daemon.supervisor.budget import Budget
from ebbflow.daemon.supervisor.demand import Demand
from ebbflow.daemon.supervisor.outlook import Outlook
from ebbflow.daemon.supervisor.reading import Reading
from ebbflow.formats.errors import EbbflowError
from ebbflow.formats.manifest import CurvePoint, read_manifest

from places import demo_model
from report import Report

FULL, RESERVE, RUNTIME = 832_000_000, 256_000_000, 110_000_000
MACHINES = (1_400_000_000, 2_000_000_000, 2_800_000_000)  # bytes, the neighbour's included
SECONDS, TICK, DISK = 3600.0, 0.25, 600e6
EVERY = 4.0  # seconds between requests, on average
NAMES, SHARES = ("first", "second"), (0.8, 0.2)


@dataclass
class Score:
    """What became of the requests."""

    losses: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    refused: int = 0
    read: float = 0.0  # bytes from disk

    def worth(self) -> float:
        """The mean over all requests."""
        return sum(math.exp(-loss) for loss in self.losses) / (len(self.losses) + self.refused)

    def text(self) -> str:
        """One line."""
        return (
            f"worth {self.worth():.3f}; mean KL {statistics.fmean(self.losses or [math.nan]):.4f}, {self.refused} of "
            f"{len(self.losses) + self.refused} refused, waited {statistics.fmean(self.waits or [0]):.2f} s on average "
            f"and {max(self.waits, default=0):.1f} s at most, {self.read / 1e9:.0f} GB read"
        )


def trace(memory: int, seed: int) -> Iterator[tuple[float, int, str | None]]:
    """Time, what the neighbour leaves of the machine, and the model that is asked for, if one is."""
    dice, neighbour = random.Random(seed), 0
    for tick in range(int(SECONDS / TICK)):
        if dice.random() < TICK / 5.0:
            neighbour += dice.choice((-1, 1)) * dice.randrange(50_000_000, 400_000_000)
            neighbour = max(0, min(memory * 3 // 4, neighbour))
        asked = dice.choices(NAMES, SHARES)[0] if dice.random() < TICK / EVERY else None
        yield tick * TICK, memory - neighbour, asked


class Loss:
    """KL by resident bytes: a straight line in its logarithm between measured sizes."""

    def __init__(self, curve: tuple[CurvePoint, ...]) -> None:
        self._sizes = np.array([point.nbytes for point in curve], np.float64)
        self._logs = np.log([point.kl for point in curve])

    def __call__(self, nbytes: float) -> float:
        """In nats."""
        return float(np.exp(np.interp(nbytes, self._sizes, self._logs)))


def one_pool(memory: int, seed: int, curve: tuple[CurvePoint, ...]) -> Score:
    """Ours."""
    score, loss, base = Score(), Loss(curve), curve[0].nbytes
    budget, held = Budget(Outlook(RESERVE), Demand()), dict[str, float]()
    for now, left, asked in trace(memory, seed):

        def reading(left: int = left) -> Reading:
            return Reading(max(0, int(left - RUNTIME - sum(held.values()))), "system memory")

        budget.update(
            now, reading(), {name: Holding(int(nbytes), budget.target(name) or 0) for name, nbytes in held.items()}
        )
        while victim := budget.evict([name for name in held if name != asked]):
            budget.unload(victim)
            del held[victim]
        for name in held:
            target = budget.target(name) or 0
            grown = min(target, held[name] + DISK * TICK)
            score.read += max(0.0, grown - held[name])
            held[name] = grown
        if asked is None:
            continue
        budget.demand.use(asked, now)
        wait = 0.0
        if asked not in held:
            try:
                for victim in budget.make_room(asked, base, reading(), list(held)):
                    budget.unload(victim)
                    del held[victim]
            except EbbflowError:
                score.refused += 1
                continue
            for name, target in budget.load(asked, base, FULL, reading(), curve).items():
                held[name] = min(held.get(name, base), target)
            wait, score.read = base / DISK, score.read + base
        score.losses.append(loss(held[asked]))
        score.waits.append(wait)
    return score


def whole_models(memory: int, seed: int, curve: tuple[CurvePoint, ...]) -> Score:
    """The peer."""
    score, loss, used = Score(), Loss(curve), dict[str, float]()
    for now, left, asked in trace(memory, seed):

        def fit(count: int, left: int = left) -> bool:
            return left - RUNTIME - RESERVE >= count * FULL

        while used and not fit(len(used)):
            del used[min(used, key=lambda name: used[name])]
        if asked is None:
            continue
        wait = 0.0
        if asked not in used:
            while used and not fit(len(used) + 1):
                del used[min(used, key=lambda name: used[name])]
            if not fit(len(used) + 1):
                score.refused += 1
                continue
            wait, score.read = FULL / DISK, score.read + FULL
        used[asked] = now
        score.losses.append(loss(FULL))
        score.waits.append(wait)
    return score


def main() -> int:
    """Simulate and compare."""
    report = Report("Two models and a neighbour (simulated)")
    points = read_manifest(demo_model()).curve
    scale = FULL / points[-1].nbytes
    curve = tuple(msgspec.structs.replace(point, nbytes=round(point.nbytes * scale)) for point in points)
    for memory in MACHINES:
        ours, peer = one_pool(memory, 1, curve), whole_models(memory, 1, curve)
        size = f"{memory / 1e9:.1f} GB"
        report.note(f"{size}: one pool", ours.text())
        report.note(f"{size}: whole models", peer.text())
        report.bar(f"worth_by_whole_models_{memory // 10**6}", ours.worth() / peer.worth(), ">=", 1.0)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
