"""What is scheduled: a request's tokens, and the pieces of them that a step computes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .prefixes import MIXED, Node


@dataclass(eq=False)
class Sequence:
    """One request's tokens: prompt and what was generated. `computed` of them have keys and values in `blocks`.

    `limit`: tokens at most, prompt included. `deadline`: by the caller's clock. One that does not sample is only
    computed. Of its blocks the first are those of `nodes`.
    """

    key: int
    tokens: list[int]
    limit: int
    namespace: str = ""
    exact: bool = False
    priority: int = 0
    owner: int = 0
    deadline: float = math.inf
    samples: bool = True
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    band: int = 0
    depth: int = MIXED
    arrival: int = -1
    overtaken: int = 0  # in parts of 1 / SIBLINGS
    path: list[Node] = field(default_factory=list)
    matched: int = 0
    prompt_tokens: int = 0
    reused: int | None = None  # tokens of the prompt that were there when it first ran
    shareable: int = 0
    preemptions: int = 0
    miss: str = ""

    @property
    def pending(self) -> int:
        """Tokens not computed yet; 1 means the sequence is decoding."""
        return len(self.tokens) - self.computed


@dataclass(slots=True)
class Piece:
    """Compute tokens `[start, start + count)` of a sequence; if that is its end, sample the next."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the piece reaches the end of what is known, and that is followed by something."""
        return self.sequence.samples and self.start + self.count == len(self.sequence.tokens)
