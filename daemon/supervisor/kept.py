"""What is kept of an answer that shall survive its worker (`resume=True`): the tokens that its client has.

Pure. Text is held back at stop strings and torn characters, so text alone does not say where an answer stands; the ids
of its tokens do. The next worker computes keys and values of prompt and ids, puts the ids through the same text stream,
whose words the client has already, and goes on: the sampler depends on nothing but the seed and the position.
"""

from __future__ import annotations

from array import array
from typing import Final

import msgspec

from ...formats.child_messages import Continue
from ...formats.messages import Chunk, Failed, Finished, Generate, Started

RESUMES: Final = 3  # of one request; one that kills each worker it meets ends then
ROOM_SECONDS: Final = 60.0  # for which it waits, after a death, until its model can be loaded again

Word = Started | Chunk | Finished | Failed


class Kept:
    """One answer so far. Times are the supervisor's."""

    def __init__(self, now: float) -> None:
        self.ids = array("I")  # a quarter of what a list takes, in the process that must stay small
        self.resumes = 0
        self._began = now
        self._first: float | None = None
        self._started = False
        self._died = float("-inf")
        self.waits = False  # for memory, since its worker died

    @property
    def may_resume(self) -> bool:
        """Whether another worker shall try."""
        return self.resumes < RESUMES

    def resume(self, now: float) -> None:
        """Its worker died."""
        self.resumes += 1
        self._died, self.waits = now, False

    def may_wait(self, now: float) -> bool:
        """Whether it shall wait for memory: what took it from its worker may need it for a moment only."""
        return now - self._died < ROOM_SECONDS

    def message(self, request: Generate) -> Generate | Continue:
        """What to send to the worker."""
        return Continue(request=request, ids=tuple(self.ids)) if self.ids else request

    def hear(self, word: Word, now: float) -> Word | None:
        """Take a worker's word; what of it the client shall hear. Times in `Finished` count from the very beginning."""
        match word:
            case Started():
                told, self._started = self._started, True
                return None if told else word
            case Chunk():
                self._first = now if self._first is None else self._first
                self.ids.extend(word.ids)
            case Finished() if self.resumes:
                first = now if self._first is None else self._first
                return msgspec.structs.replace(word, seconds_to_first=first - self._began, seconds=now - self._began)
            case _:
                pass
        return word
