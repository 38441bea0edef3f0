"""How good the prefixes of a stack are: KL to the original model and perplexity, measured, not estimated.

All prefixes go through the network side by side, a layer at a time: of each layer the weights of one prefix are made
from those of the prefix before, and the hidden states of every prefix are kept. So each block is read and decoded once
(those of a tied embedding twice), and memory holds one layer, not a model. Prefixes are run dense: what serving rounds
on its way is not in these figures.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from ...formats.architecture import Architecture
from ...formats.blocks import GrowingWeight
from ...formats.checkpoint import Checkpoint
from ...formats.errors import BadBlock
from ...formats.manifest import CurvePoint
from ...formats.stack import Stack, read_blocks
from ..engine.dense import DenseAttention, DenseLinear, DenseOps, dense_layer
from ..engine.network import Linear, Network, layer_forward
from .calibrate import Progress, no_progress

CHUNK_LOGITS: Final = 8_000_000  # numbers in one block of logits


@dataclass(frozen=True)
class Quality:
    """Of each token `[T]`, in nats: KL from the reference's distribution, and -log of the probability of the target."""

    kl: Tensor
    loss: Tensor

    @property
    def mean_kl(self) -> float:
        """Nats per token."""
        return float(self.kl.mean())

    @property
    def perplexity(self) -> float:
        """`exp` of the mean loss, cut at `exp(700)`: a manifest cannot hold infinity."""
        return math.exp(min(float(self.loss.mean()), 700.0))


def quality(reference_logits: Tensor, logits: Tensor, targets: Tensor) -> Quality:
    """Compare `logits [T, v]` with `reference_logits [T, v]` and the true next tokens `targets [T]`, in float64."""
    reference = reference_logits.double().log_softmax(-1)
    found = logits.double().log_softmax(-1)
    kl = functional.kl_div(found, reference, reduction="none", log_target=True).sum(-1)
    return Quality(kl.clamp(min=0.0), functional.nll_loss(found, targets, reduction="none"))


def curve_blocks(stack: Stack, points: int) -> list[int]:
    """Prefix lengths, in blocks, from the base to the whole: `points` of them, or all there are if those are fewer.

    Their sizes grow by about equal factors, because quality changes fastest where there is least of the model.
    """
    first, last = stack.base, len(stack.blocks)
    count = min(points, last - first + 1)
    ratio = stack.nbytes / stack.base_nbytes
    chosen: list[int] = []
    for i in range(count):
        wanted = stack.blocks_within(round(stack.base_nbytes * ratio ** (i / max(1, count - 1))))
        least = chosen[-1] + 1 if chosen else first
        chosen.append(min(max(wanted, least), last - (count - 1 - i)))
    return chosen


@torch.no_grad()
def measure_curve(
    checkpoint: Checkpoint, stack: Stack, tokens: Tensor, blocks: Sequence[int], progress: Progress = no_progress
) -> tuple[CurvePoint, ...]:
    """One point for each prefix length in `blocks`, in that order, on `tokens [S, L]` (a few thousand, L at least 2).

    Lengths lie between the stack's base and its number of blocks. Holds one layer in float32, with a byte more for
    every weight stored as planes (or the embedding or the head, and a copy or two while they are made), the original's
    logits, and the hidden states of every prefix. Raises `BadBlock` or `TruncatedStack` when the stack cannot be read
    or makes no model.
    """
    found = prefix_qualities(Original(checkpoint, tokens), checkpoint, stack, blocks, progress=progress)
    points = {count: CurvePoint(count, stack.edges[count], one.mean_kl, one.perplexity) for count, one in found}
    return tuple(points[count] for count in blocks)


@torch.no_grad()
def prefix_qualities(
    original: Original,
    checkpoint: Checkpoint,
    stack: Stack,
    blocks: Sequence[int],
    exact: Container[str] = (),
    progress: Progress = no_progress,
) -> list[tuple[int, Quality]]:
    """Each prefix length in `blocks`, ascending, and its quality token by token; tensors in `exact` stay original.

    See `measure_curve`.
    """
    assert all(stack.base <= count <= len(stack.blocks) for count in blocks)
    a, counts, tokens = checkpoint.architecture, sorted(set(blocks)), original.tokens
    total = (a.layers + 1) * len(counts)
    growing = _GrowingTensors(checkpoint, stack, exact)
    attention = DenseAttention(a, *tokens.shape)
    hidden = [functional.embedding(tokens.flatten(), growing.at(count, "embed")) for count in counts]
    for index in range(a.layers):
        growing = _GrowingTensors(checkpoint, stack, exact)  # forgets what the layer before needed
        for i, count in enumerate(counts):
            # Not named: one prefix's weights would stay while the next one's are made.
            hidden[i] = layer_forward(
                a, DenseOps(), dense_layer(a, index, partial(growing.at, count)), index, hidden[i], attention
            )
            progress("measure", index * len(counts) + i + 1, total)
    growing, qualities = _GrowingTensors(checkpoint, stack, exact), []
    for i, count in enumerate(counts):
        x = DenseOps().rms_norm(hidden[i], growing.at(count, "final_norm"), a.norm_eps)
        found = original.against(x, DenseLinear(growing.at(count, "embed" if a.tied else "head")))
        if not bool(torch.isfinite(found.kl).all()):
            raise BadBlock(f"the first {count} blocks of {stack.path} make a model whose logits are not finite")
        qualities.append((count, found))
        progress("measure", a.layers * len(counts) + i + 1, total)
    return qualities


class _GrowingTensors:
    """Tensors of a stack at ever longer prefixes. Blocks are read when they are first needed, and never again; a value
    is made once for all prefixes that share it. Those in `exact` are the checkpoint's.
    """

    def __init__(self, checkpoint: Checkpoint, stack: Stack, exact: Container[str]) -> None:
        self._checkpoint, self._stack, self._exact = checkpoint, stack, exact
        self._positions: dict[str, list[int]] = {}
        for position, entry in enumerate(stack.blocks):
            self._positions.setdefault(entry.tensor, []).append(position)
        self._weights: dict[str, GrowingWeight] = {}
        self._values: dict[str, Tensor] = {}

    def at(self, count: int, name: str) -> Tensor:
        """The tensor as the first `count` blocks have it; no fewer than when it was last asked for."""
        if name in self._exact:
            return self._checkpoint.tensor(name)
        positions = self._positions[name]
        fresh = [position for position in positions if position < count]
        if fresh:
            self._values.pop(name, None)  # before the next one is made
            weight = self._weights.setdefault(name, GrowingWeight())
            for entry, payload in read_blocks(self._stack, fresh):
                weight.add(entry, payload)
            self._values[name] = torch.from_numpy(weight.value())
            del positions[: len(fresh)]
        return self._values[name]


class Original:
    """The original model's logits on `tokens [S, L]`, at every position that has a next token; others against them."""

    def __init__(self, checkpoint: Checkpoint, tokens: Tensor) -> None:
        a = checkpoint.architecture
        self.tokens = tokens
        x = functional.embedding(tokens.flatten(), checkpoint.tensor("embed"))
        for index in range(a.layers):
            # Not named: the last layer would stay while the next is read.
            x = layer_forward(a, DenseOps(), dense_layer(a, index, checkpoint.tensor), index, x, self._attention(a))
        x = DenseOps().rms_norm(x, checkpoint.tensor("final_norm"), a.norm_eps)
        self._rows = max(1, CHUNK_LOGITS // a.vocab)
        head = DenseLinear(checkpoint.tensor("embed" if a.tied else "head"))
        self._logits = [head(rows) for rows in self._with_target(x).split(self._rows)]

    def compare(self, network: Network[Tensor]) -> Quality:
        """Another model's quality on the same tokens."""
        a = network.architecture
        return self.against(network.forward(self.tokens.flatten(), self._attention(a)), network.head)

    def against(self, hidden: Tensor, head: Linear[Tensor]) -> Quality:
        """The quality of a model whose final normalised hidden states on the same tokens are `hidden [S * L, d]`."""
        targets = self.tokens[:, 1:].flatten().split(self._rows)
        rows = self._with_target(hidden).split(self._rows)
        parts = [quality(*part) for part in zip(self._logits, map(head, rows), targets, strict=True)]
        return Quality(torch.cat([part.kl for part in parts]), torch.cat([part.loss for part in parts]))

    def _attention(self, a: Architecture) -> DenseAttention:
        return DenseAttention(a, *self.tokens.shape)

    def _with_target(self, hidden: Tensor) -> Tensor:
        """`[S * L, d] -> [S * (L - 1), d]`: the last token of a stream has no next one."""
        streams, length = self.tokens.shape
        return hidden.reshape(streams, length, -1)[:, :-1].flatten(0, 1)
