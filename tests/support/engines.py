"""An engine over a whole stack, with no loop around it; and what was told to whom."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ebbflow.daemon.engine.engine import Engine, EngineEvent
from ebbflow.daemon.settings import DEFAULTS, WorkerSettings
from ebbflow.daemon.worker.resident import Resident
from ebbflow.formats.manifest import read_manifest
from ebbflow.formats.messages import Chunk, Failed, Finished, Started

from support.fake_line import FakeClock


@dataclass
class Answer:
    """All that was said about one request, and whether it was said in order."""

    text: str = ""
    tokens: int = 0
    chunks: int = 0
    started: int = 0
    end: Finished | Failed | None = None

    def hear(self, event: EngineEvent) -> None:
        assert self.end is None, f"{event} after the end"
        match event:
            case Started():
                self.started += 1
                assert self.started == 1
            case Chunk():
                assert self.started
                assert event.text
                assert event.tokens >= self.tokens
                self.text, self.tokens, self.chunks = self.text + event.text, event.tokens, self.chunks + 1
            case Finished():
                assert self.started
                assert event.tokens >= self.tokens
                self.end, self.tokens = event, event.tokens
            case Failed():
                self.end = event


@dataclass
class Answers:
    """Answers by request."""

    by_id: defaultdict[int, Answer] = field(default_factory=lambda: defaultdict(Answer))

    def hear(self, events: list[Any]) -> None:
        """Take what was said; events about no request are left out."""
        for event in events:
            if isinstance(event, Started | Chunk | Finished | Failed):
                self.by_id[event.id].hear(event)


def engine_of(
    folder: Path, resident: Resident, tick: float = 0.001, settings: WorkerSettings = DEFAULTS, **manifest: Any
) -> Engine:
    """An engine for the model in `folder`, some of its manifest's fields replaced."""
    read = msgspec.structs.replace(read_manifest(folder), **manifest)
    return Engine(folder, read, resident, 2, FakeClock(tick), settings)


def finish(engine: Engine, answers: Answers, steps: int = 5000) -> None:
    """Step until nothing is left to do."""
    for _ in range(steps):
        if not engine.busy:
            break
        answers.hear(engine.step())
        engine.scheduler.check_integrity()
    assert not engine.busy
