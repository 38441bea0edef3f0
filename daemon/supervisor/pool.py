"""One pool of bytes for all models: the next byte goes where it is worth most, the first to go is worth least. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .worth import Piece


@dataclass(frozen=True)
class Claim:
    """One model's part in the pool, at least `least` bytes and at most `most`; `weight` multiplies its gains."""

    least: int
    most: int
    pieces: tuple[Piece, ...]
    weight: float = 1.0

    def parts(self) -> Iterator[tuple[float, int, int]]:
        """`(gain, start, stop)` of what lies between least and most, best first."""
        start = self.least
        for piece in self.pieces:
            stop = min(piece.stop, self.most)
            if stop > start:
                yield piece.gain * self.weight, start, stop
                start = stop

    def last_gain(self, nbytes: int) -> float:
        """What a byte is worth that would be dropped at that size; 0 at the least."""
        return next((gain for gain, start, _ in reversed(list(self.parts())) if start < nbytes), 0.0)

    def next_gain(self, nbytes: int) -> float:
        """What a byte is worth that would be added at that size; 0 at the most."""
        return next((gain for gain, _, stop in self.parts() if stop > nbytes), 0.0)


def divide(total: int, claims: Mapping[str, Claim]) -> dict[str, int]:
    """Shares of `total` bytes, each within its claim, that together save the most KL.

    They add up to `total`, unless the least amounts need more or the most amounts less.
    """
    shares = {name: claim.least for name, claim in claims.items()}
    left = total - sum(shares.values())
    parts = [(-gain, name, start, stop) for name, claim in claims.items() for gain, start, stop in claim.parts()]
    for _, name, start, stop in sorted(parts):
        if left <= 0:
            break
        shares[name] += min(left, stop - start)
        left -= min(left, stop - start)
    return shares
