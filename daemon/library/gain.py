"""What a block is worth: the drop in expected KL, in nats per token, when it joins the blocks before it.

`second_order_gain` is the estimate of design section 4: to second order, errors E of a linear's weight move the
model's output by a KL of  1/2 sum_r G_r (E H E^T)_rr,  with H the second moment of the linear's inputs and G that of
the gradient of log-probability at its outputs, both from the original model. A better estimate is another function of
type `GainEstimate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...formats.errors import CorruptCheckpoint

GainEstimate = Callable[[Tensor, Tensor, Tensor], float]
"""`(G [m], error of each row before [m], after [m]) -> gain`."""


def second_order_gain(gradient: Tensor, before: Tensor, after: Tensor) -> float:
    """`1/2 sum_r G_r (before_r - after_r)`. Raises `CorruptCheckpoint` when activations or gradients overflowed."""
    gain = float(0.5 * torch.dot(gradient.double(), before.double() - after.double()))
    if not math.isfinite(gain):
        raise CorruptCheckpoint(
            "the model's activations or gradients are not finite on its own text: weights are broken"
        )
    return gain
