"""How many tokens a step may hold so that it stays short: learned from measured times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

STEP_SECONDS: Final = 0.15
MAX_TOKENS: Final = 512
_FORGET: Final = 0.9
_PROBE_EVERY: Final = 32  # steps of one size, before one token more is tried
_FORGET_ALL: Final = 0.1  # after a step far too long: the machine is not what it was


@dataclass
class Pace:
    """Fits `seconds = fixed + slope * tokens` to recent steps, and says how many tokens fit in `target` seconds.

    The limit at most doubles with each step, so a first guess can be small and the fit never has to be trusted far
    from what was seen. Steps of one size (one request decoding) say nothing about the slope; the last known share of
    it in a one-token step is then used, and now and then one token more is allowed, so that no wrong guess is for ever.
    """

    target: float = STEP_SECONDS * 0.8  # the rest is for what the fit does not see, such as longer contexts
    limit: int = 8
    _slope_share: float = 0.5
    _same: int = 0
    _weight: float = 0.0
    _tokens: float = 0.0
    _seconds: float = 0.0
    _squares: float = 0.0
    _products: float = 0.0

    def record(self, tokens: int, seconds: float) -> None:
        """A step of `tokens` tokens took `seconds`."""
        seconds = max(seconds, 1e-9)
        keep = _FORGET if seconds <= 1.25 * self.target else _FORGET_ALL
        self._weight = self._weight * keep + 1
        self._tokens = self._tokens * keep + tokens
        self._seconds = self._seconds * keep + seconds
        self._squares = self._squares * keep + tokens * tokens
        self._products = self._products * keep + tokens * seconds
        mean, mean_seconds = self._tokens / self._weight, self._seconds / self._weight
        variance = self._squares / self._weight - mean * mean
        if variance > 0.01 * mean * mean:
            least = mean_seconds / mean / 100
            slope = max((self._products / self._weight - mean * mean_seconds) / variance, least)
            self._slope_share = min(1.0, slope / max(mean_seconds - slope * (mean - 1), slope))
            self._same = 0
        else:
            slope = self._slope_share * mean_seconds / (1 + self._slope_share * (mean - 1))
            self._same += 1
        room = (self.target - (mean_seconds - slope * mean)) / slope
        if self._same and self._same % _PROBE_EVERY == 0:
            room = max(room, tokens + 1)
        if seconds > self.target:
            room = min(room, tokens * self.target / seconds)
        self.limit = int(max(1, min(room, 2 * max(self.limit, 1), MAX_TOKENS)))
