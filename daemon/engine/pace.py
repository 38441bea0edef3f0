"""How many tokens a step may hold so that it stays short: learned from measured times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

STEP_SECONDS: Final = 0.15
MAX_TOKENS: Final = 512
_FORGET: Final = 0.9
_PROBE_EVERY: Final = 32  # steps of one size, before one token more is tried


@dataclass
class Pace:
    """Fits `seconds = fixed + slope * tokens` to recent steps, and says how many tokens fit in `target` seconds.

    The limit at most doubles with each step, so a first guess can be small and the fit never has to be trusted far
    from what was seen. Steps of one size (one request decoding) say nothing about the slope; the last known share of
    it in a one-token step is then used, and now and then one token more is allowed, so that no wrong guess is for ever.

    Where one token alone nearly fills the target, or breaks it, steps of one token would waste what is nearly free:
    then a step may take half as long again as its least, up to `STEP_SECONDS` where that is enough.
    """

    target: float = STEP_SECONDS * 0.8  # the rest is for what the fit does not see, such as longer contexts
    limit: int = 8
    _slope_share: float = 0.5
    _same: int = 0
    _aimed: float = 0.0
    _weight: float = 0.0
    _tokens: float = 0.0
    _seconds: float = 0.0
    _squares: float = 0.0
    _products: float = 0.0

    @property
    def known(self) -> bool:
        """Whether any step was measured."""
        return self._weight > 0

    def record(self, tokens: int, seconds: float) -> None:
        """A step of `tokens` tokens took `seconds`."""
        seconds = max(seconds, 1e-9)
        usual = self._seconds / self._weight if self._weight else seconds
        # after a step far longer than usual the machine is not what it was: nothing but the share is still believed
        surprised = seconds > max(1.25 * max(self.target, self._aimed), 1.5 * usual)
        keep = 0.0 if surprised else _FORGET
        self._weight = self._weight * keep + 1
        self._tokens = self._tokens * keep + tokens
        self._seconds = self._seconds * keep + seconds
        self._squares = self._squares * keep + tokens * tokens
        self._products = self._products * keep + tokens * seconds
        mean, mean_seconds = self._tokens / self._weight, self._seconds / self._weight
        variance = self._squares / self._weight - mean * mean
        seen = variance > 0.01 * mean * mean
        if seen:
            least = mean_seconds / mean / 100
            slope = max((self._products / self._weight - mean * mean_seconds) / variance, least)
            self._slope_share = min(1.0, slope / max(mean_seconds - slope * (mean - 1), slope))
            self._same = 0
        else:
            slope = self._slope_share * mean_seconds / (1 + self._slope_share * (mean - 1))
            self._same += 1
        fixed = mean_seconds - slope * mean
        # a fixed cost that is only guessed must not excuse long steps: go down and see (what one token takes is known)
        self._aimed = target = self._target(fixed + slope) if seen or mean < 1.01 else self.target
        room = (target - fixed) / slope
        if self._same and self._same % _PROBE_EVERY == 0:
            room = max(room, tokens + 1)
        if seconds > target:
            # one long step may be an accident: it cuts the limit, but no further than to half of what it suggests
            suggested = tokens * target / seconds
            room = min(max(room, suggested / 2), suggested)
        self.limit = int(max(1, min(room, 2 * max(self.limit, 1), MAX_TOKENS)))

    def _target(self, least: float) -> float:
        """Seconds that a step may take when a step of one token takes `least`."""
        longer = 1.5 * least
        return max(self.target, longer if least > self.target else min(STEP_SECONDS, longer))
