"""Shared prefixes: how much is computed twice, and what that costs, on the demo and on the 1.1 B shape.

Workloads of seeded token ids (`workloads.py`): 16 sharers of 512 tokens, several such groups shuffled together, three
levels of prefixes, growing chats, heavy-tailed lengths of answers, random arrivals, nothing shared. Rows: our
scheduler; the same first come, first served, with plain LRU, where nobody waits for a prefix that is being computed;
that with the longest prefix first; llama.cpp's llama-server (16 slots, keys and values unified or not), prompts sorted
and as many at a time as serve it best. All in one process without a daemon, but for llama-server, which has as many
bytes of weights and as many threads. What could be saved at most is counted from the prompts: in whole blocks of 32
tokens, and in single tokens. What ours saved is what its steps did not compute, not what it says of itself.

Three bars more: a loss without sharing (the median of rounds in turn), the scheduler's time for a step with 32
requests, and one user who asks again and again beside a batch job of lower priority.

Needs the `bench` extra for llama.cpp's rows, and builds llama.cpp the first time; --quick measures the demo alone.
EBBFLOW_BENCH_LLAMA=no leaves llama.cpp out.

Run: .venv/bin/python bench/prefix.py [--quick] [--json FILE] [--check]
"""

from __future__ import annotations

import math
import os
import re
import statistics
import sys
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec

from ebbflow.daemon.engine.engine import Engine, EngineEvent
from ebbflow.daemon.engine.kv import KvCache, blocks_for
from ebbflow.daemon.engine.sequences import Piece, Sequence
from ebbflow.daemon.engine.waiting import Policy
from ebbflow.daemon.settings import DEFAULTS, WorkerSettings
from ebbflow.daemon.worker.processors import usable_threads
from ebbflow.daemon.worker.resident import Resident
from ebbflow.formats.manifest import STACK, read_manifest
from ebbflow.formats.messages import Failed, Finished, Generate
from ebbflow.formats.stack import read_stack
from ebbflow.formats.values import Sampling
from ebbflow.kernels.threads import set_threads

from llama_server import LlamaServer, llama_server
from outcomes import BLOCK, Answered, Outcome, Step
from places import demo_model, full_shape, restart_with_kernels
from report import Report, percentile
from workloads import Ask, Dice, alone, arriving, chats, heavy_tailed, in_turn, levels, longest, sharers, together

SHARED, OWN, TOKENS, MEMBERS = 512, 50, 25, 16
GROUP_BLOCKS: Final = SHARED // BLOCK + MEMBERS * (blocks_for(SHARED + OWN + TOKENS) - SHARED // BLOCK)
OURS, PLAIN = "ours", "first come, first served, LRU"
POLICIES: Final = {
    OURS: Policy(),
    "longest prefix first": Policy(longest_first=True, gate=False, wanted=False),
    PLAIN: Policy(longest_first=False, gate=False, wanted=False),
}
AT_ONCE: Final = (16, 4, 1)  # requests that llama-server has at a time
KIND: Final = "Q4_K_S"
OPEN: Final = 32  # requests, while the scheduler is timed
WITH_LLAMA: Final = os.environ.get("EBBFLOW_BENCH_LLAMA", "") != "no"


@dataclass(frozen=True)
class Amounts:
    """How large the workloads are, so that a model takes some minutes."""

    groups: int  # where there is room for two
    level_branches: tuple[int, int, int]
    alone: tuple[int, int]  # requests, tokens of a prompt
    rounds: int  # of those
    batch_groups: int  # beside the interactive user
    short: bool  # not all workloads, and not all rows


DEMO_AMOUNTS: Final = Amounts(16, (4, 4, 4), (48, 400), 12, 8, short=False)
FULL_AMOUNTS: Final = Amounts(8, (3, 3, 3), (16, 128), 6, 2, short=True)


class Stepping:
    """An engine under a workload, watched from outside: which tokens its steps compute, and when."""

    def __init__(self, engine: Engine, asks: list[Ask]) -> None:
        self._engine, self._asks, self._began = engine, asks, time.perf_counter()
        self._answered = [Answered(ask.prompt, ask.at, ask.interactive) for ask in asks]
        self._due = {number for number, ask in enumerate(asks) if ask.after is None}  # not submitted yet
        self._open = {number for number, ask in enumerate(asks) if not ask.interactive}
        self._sequences: dict[int, Sequence] = {}
        self._pieces: list[Piece] = []
        plan = engine.scheduler.plan

        def watched(limit: int) -> list[Piece]:
            self._pieces = plan(limit)
            return self._pieces

        engine.scheduler.plan = watched  # type: ignore[method-assign]

    def run(self) -> Outcome:
        """Until all but the interactive user are answered."""
        engine, steps, peak = self._engine, list[Step](), 0
        self._began = time.perf_counter()
        while self._open:
            self._submit()
            if not engine.busy:
                time.sleep(0.0005)
                continue
            requests = len(engine.scheduler.waiting) + len(engine.scheduler.running)
            before, scheduling, self._pieces = self._now(), engine.scheduler_seconds, []
            events = engine.step()
            now = self._now()
            tokens = sum(piece.count for piece in self._pieces)
            steps.append(Step(now, now - before, engine.scheduler_seconds - scheduling, tokens, requests))
            peak = max(peak, engine.kv_nbytes)
            self._look(now)
            for event in events:
                self._hear(event, now)
        engine.cancel_all()
        answered = [each for each in self._answered if each.times]
        for each in answered:
            if math.isnan(each.ended):  # the interactive user, cut off
                each.answer = (0,) * len(each.times)
        return Outcome(answered, sum(step.tokens for step in steps), peak, steps)

    def _now(self) -> float:
        return time.perf_counter() - self._began

    def _submit(self) -> None:
        """Whatever is due."""
        now = self._now()
        for number in sorted(self._due):
            ask = self._asks[number]
            if ask.at > now:
                continue
            self._due.remove(number)
            request = Generate(
                id=number,
                model="",
                ids=self._answered[number].prompt,
                sampling=Sampling(max_tokens=ask.tokens),
                owner=1 if ask.interactive else 2,
                priority=ask.priority,
            )
            for event in self._engine.submit(request):
                self._hear(event, now)

    def _look(self, now: float) -> None:
        """At the sequences of the step: tokens that were not there before were sampled in it."""
        self._sequences |= {piece.sequence.key: piece.sequence for piece in self._pieces}
        for piece in self._pieces:
            answered = self._answered[piece.sequence.key]
            count = len(piece.sequence.tokens) - len(answered.prompt)
            answered.times += [now] * (count - len(answered.times))

    def _hear(self, event: EngineEvent, now: float) -> None:
        assert not isinstance(event, Failed), event
        if not isinstance(event, Finished):
            return
        mine = self._answered[event.id]
        mine.answer = tuple(self._sequences[event.id].tokens[len(mine.prompt) :])
        mine.ended, mine.reused = now, event.reused_tokens
        assert len(mine.times) == len(mine.answer) == event.tokens == self._asks[event.id].tokens
        self._open.discard(event.id)
        for number, ask in enumerate(self._asks):
            if ask.after == event.id:
                self._due.add(number)
                self._answered[number].asked = now
                if ask.continues:
                    self._answered[number].prompt = mine.prompt + mine.answer + ask.prompt


class Served:
    """A model of which `nbytes` at most are resident, and engines for it, each of which knows nothing yet."""

    def __init__(self, folder: Path, threads: int, nbytes: int | None = None) -> None:
        self._folder, self.threads = folder, threads
        # an end token would make answers shorter than the workloads say
        self._manifest = msgspec.structs.replace(read_manifest(folder), eos=())
        self._resident = Resident(read_stack(folder / STACK))
        blocks = len(self._resident.stack.blocks) if nbytes is None else self._resident.stack.blocks_within(nbytes)
        while self._resident.blocks < blocks:
            self._resident.grow(blocks)
        self.architecture, self.nbytes = self._manifest.architecture, self._resident.nbytes
        self.block_nbytes = KvCache(self.architecture).block_nbytes

    def settings(self, blocks: int) -> WorkerSettings:
        """Room for so many blocks of keys and values."""
        return replace(DEFAULTS, kv_limit=blocks * self.block_nbytes)

    def run(self, asks: list[Ask], policy: Policy = POLICIES[OURS], settings: WorkerSettings = DEFAULTS) -> Outcome:
        """A workload on a new engine, that has answered something of no use to it."""
        manifest, clock = self._manifest, time.perf_counter
        engine = Engine(self._folder, manifest, self._resident, self.threads, clock, settings, policy)
        Stepping(engine, [Ask((2,) * 40, 12)]).run()
        return Stepping(engine, asks).run()


class Bench:
    """The rows of one model, against the file `gguf` of as many bytes, if there is one."""

    def __init__(self, report: Report, name: str, served: Served, amounts: Amounts, gguf: Path | None) -> None:
        self._report, self._name, self._served, self._amounts, self._gguf = report, name, served, amounts, gguf
        self._seed = 0
        self._best = (False, AT_ONCE[0])  # how llama-server was at its best: unified, requests at a time

    def all(self) -> None:
        """Every workload."""
        amounts = self._amounts
        self._one_group()
        self._two_groups()
        self._shared("three levels", levels(self._dice(), (256, 128, 96), amounts.level_branches))
        if not amounts.short:
            dice = self._dice()
            self._shared("growing chats", chats(dice, 8, 4))
            self._shared("heavy-tailed answers", heavy_tailed(dice, sharers(dice, 4), 256))
            self._shared("random arrivals", arriving(dice, sharers(dice, 4), 30.0))
        self._nothing_shared()
        self._interactive()
        if not amounts.short:
            self._scheduler()

    def _dice(self) -> Dice:
        """For the next workload."""
        self._seed += 1
        return Dice(self._served.architecture.vocab, self._seed)

    def _note(self, what: str, row: str, outcome: Outcome) -> Outcome:
        self._report.note(f"{self._name}, {what}: {row}", outcome.text(), outcome.numbers())
        return outcome

    def _bar(self, what: str, value: float, comparison: str, target: float) -> None:
        self._report.bar("_".join(re.findall(r"\w+", f"{self._name} {what}")), value, comparison, target)

    def _rows(
        self, what: str, asks: list[Ask], rows: Iterable[str], settings: WorkerSettings = DEFAULTS
    ) -> dict[str, Outcome]:
        """A shared workload under some policies; the share of the bound that ours reaches."""
        found = {row: self._note(what, row, self._served.run(asks, POLICIES[row], settings)) for row in rows}
        self._bar(f"{what} percent_of_blocks_bound", found[OURS].percent() or 0.0, ">=", 98)
        return found

    def _shared(self, what: str, asks: list[Ask]) -> None:
        """One more shared workload; llama-server as it was best with one group."""
        self._rows(what, asks, (OURS,) if self._amounts.short else POLICIES)
        if self._gguf is not None and not self._amounts.short:
            free = all(ask.at == 0 and ask.after is None for ask in asks)
            unified, at_once = self._best if free else (self._best[0], AT_ONCE[0])
            order = sorted(asks, key=lambda ask: ask.prompt) if free else asks
            with self._llama(asks, unified) as server:
                self._note(what, llama_row(unified, at_once), server.run(order, at_once))

    def _llama(self, asks: list[Ask], unified: bool) -> AbstractContextManager[LlamaServer]:
        assert self._gguf is not None
        served = self._served
        return llama_server(self._gguf, served.threads, longest(asks), served.block_nbytes // BLOCK, unified=unified)

    def _one_group(self) -> None:
        """16 sharers, against llama-server at its best."""
        what, asks = "16 sharers", sharers(self._dice(), 1)
        ours = self._rows(what, asks, (OURS, PLAIN))[OURS]
        if self._gguf is None:
            return
        peers = dict[tuple[bool, int], float]()
        for unified in (False, True):
            with self._llama(asks, unified) as server:
                for at_once in AT_ONCE:
                    # other tokens each time: what the server has kept must not help
                    fresh = sorted(sharers(self._dice(), 1), key=lambda ask: ask.prompt)
                    outcome = self._note(what, llama_row(unified, at_once), server.run(fresh, at_once))
                    peers[unified, at_once] = outcome.per_second
        self._best = max(peers, key=lambda key: peers[key])
        self._bar("requests_by_llama", ours.per_second / peers[self._best], ">=", 2)

    def _two_groups(self) -> None:
        """Many groups with room for two."""
        asks, what = sharers(self._dice(), self._amounts.groups), f"{self._amounts.groups} groups, room for 2"
        rows = (OURS, PLAIN) if self._amounts.short else POLICIES
        found = self._rows(what, asks, rows, self._served.settings(2 * GROUP_BLOCKS))
        self._bar("requests_by_lru", found[OURS].per_second / found[PLAIN].per_second, ">=", 2)

    def _nothing_shared(self) -> None:
        """What it costs to look for what is not there."""
        count, prompt = self._amounts.alone
        ratios = []
        for number in range(self._amounts.rounds):
            asks = alone(self._dice(), count, prompt)
            found = {}
            for row in sorted((OURS, PLAIN), reverse=number % 2 == 1):  # the machine may be quicker for who comes first
                outcome = self._note(f"nothing shared, round {number + 1}", row, self._served.run(asks, POLICIES[row]))
                found[row] = outcome.per_second
            ratios.append(found[OURS] / found[PLAIN])
        self._bar("loss_without_sharing_percent", 100 * (1 - statistics.median(ratios)), "<=", 3)

    def _interactive(self) -> None:
        """One user who asks again and again beside a batch job of lower priority."""
        dice = self._dice()
        batch = [replace(ask, priority=-1) for ask in sharers(dice, self._amounts.batch_groups)]
        user = [replace(ask, interactive=True) for ask in in_turn(alone(dice, 500, 48, 64), 1)]
        solo = self._note("batch job", "by itself", self._served.run(batch))
        both = self._note("batch job", "beside a user", self._served.run(together(batch, user)))
        gap, step = percentile(both.gaps(interactive=True), 0.99), statistics.median(s.took for s in both.steps)
        text = f"p99 {gap * 1e3:.0f} ms between tokens, a step {step * 1e3:.0f} ms"
        self._report.note(f"{self._name}, the user beside it", text, [gap, step])
        self._bar("gap_p99_less_one_step_ms", (gap - step) * 1e3, "<=", 150)
        self._bar("batch_job_by_itself", both.per_second / solo.per_second, ">=", 0.7)

    def _scheduler(self) -> None:
        """Its time for a step, while so many are waiting or running that change all the time."""
        outcome = self._served.run(in_turn(sharers(self._dice(), 8), OPEN))
        times = [step.scheduling * 1e6 for step in outcome.steps if step.requests == OPEN]
        text = (
            f"mean {statistics.fmean(times):.0f}, p50 {percentile(times, 0.5):.0f}, p99 {percentile(times, 0.99):.0f}"
        )
        self._report.note(f"scheduler, {OPEN} requests", f"{text} us for a step, {len(times)} steps", times)
        self._report.bar(f"scheduler_us_for_a_step_at_{OPEN}", statistics.fmean(times), "<=", 200)


def llama_row(unified: bool, at_once: int) -> str:
    """A row's name."""
    return f"llama-server{', unified' if unified else ''}, {at_once} at a time"


def peer(name: str) -> tuple[Path, int]:
    """llama.cpp's file of a model, and the bytes of its tensors."""
    from llama_speed import demo_gguf, full_gguf, tensor_nbytes  # the `bench` extra

    path = {"demo": demo_gguf, "full": full_gguf}[name](KIND)
    return path, tensor_nbytes(path)


def main() -> int:
    """Measure and report."""
    restart_with_kernels()
    report = Report("Shared prefixes", quick="the demo alone")
    threads = set_threads(usable_threads())
    models = [("demo", demo_model, DEMO_AMOUNTS), ("full", full_shape, FULL_AMOUNTS)]
    for name, folder, amounts in models[:1] if report.given("quick") else models:
        path, nbytes = peer(name) if WITH_LLAMA else (None, None)
        served = Served(folder(), threads, nbytes)
        theirs = f"; llama.cpp {nbytes / 1e6:.1f} MB" if nbytes else ""
        report.note(f"{name}, bytes of the model", f"{served.nbytes / 1e6:.1f} MB{theirs}", [served.nbytes, nbytes])
        Bench(report, name, served, amounts, path).all()
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
