"""Whether this process holds so much that somebody must be filling it up. Pure.

All that clients may have us hold is bounded but for what ZeroMQ keeps of messages that we have not heard: that is so
much for each connection, and without end if a message has no end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MOST_NBYTES: Final = 512_000_000  # beyond what it holds by itself: twice what requests and answers may take together


@dataclass
class Swelling:
    """Looked at from time to time. What is left after a swelling went down counts as ours."""

    _own: int | None = 0

    def update(self, nbytes: int) -> bool:
        """Whether holding so many bytes is too much; then whoever causes it has to be cut off."""
        if self._own is None:
            self._own = nbytes
        if nbytes <= self._own + MOST_NBYTES:
            return False
        self._own = None
        return True
