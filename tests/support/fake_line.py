"""A supervisor that is a list: what the worker hears is scripted, what it says is kept."""

from __future__ import annotations

from collections import deque
from typing import Any

from ebbflow.formats.child_messages import ToWorker
from ebbflow.formats.wire import Message


class FakeLine:
    """`Line` of the worker's loop. Each `receive` gives the next batch of `script`, then nothing."""

    def __init__(self, *script: list[ToWorker]) -> None:
        self.script = deque(script)
        self.sent: list[Any] = []
        self.timeouts: list[float] = []

    def send(self, message: Message) -> None:
        self.sent.append(message)

    def receive(self, timeout_seconds: float) -> list[ToWorker]:
        self.timeouts.append(timeout_seconds)
        return self.script.popleft() if self.script else []

    def take(self) -> list[Any]:
        """What was said since the last call."""
        said, self.sent = self.sent, []
        return said


class FakeClock:
    """Each look at it takes `tick` seconds."""

    def __init__(self, tick: float = 0.001) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now
