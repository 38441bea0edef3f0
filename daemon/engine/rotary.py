"""Rotary frequencies, for every implementation of the forward pass. Plain Python: no torch, no numpy."""

from __future__ import annotations

import math

from ...formats.architecture import Architecture, RotaryScaling


def rotary_frequencies(a: Architecture) -> tuple[float, ...]:
    """Radians per position of each of the `head_dim / 2` pairs, scaling applied.

    Pair i is columns i and `head_dim / 2 + i` of a head (halves convention); its plain frequency is `theta^(-2i / e)`.
    """
    plain = (a.rotary_theta ** (-2 * pair / a.head_dim) for pair in range(a.head_dim // 2))
    scaling = a.rotary_scaling
    if scaling is None:
        return tuple(plain)
    if scaling.kind == "linear":
        return tuple(frequency / scaling.factor for frequency in plain)
    return tuple(_llama3(frequency, scaling) for frequency in plain)


def _llama3(frequency: float, s: RotaryScaling) -> float:
    """Pairs that turn often within the original context stay, those that turn rarely are divided by `factor`.

    `turns` of `high_freq_factor` and more stay, of `low_freq_factor` and less are divided; linear in between.
    """
    turns = s.original_context * frequency / (2 * math.pi)
    keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    keep = min(1.0, max(0.0, keep))
    return keep * frequency + (1 - keep) * frequency / s.factor
