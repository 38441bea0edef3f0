"""How good the prefixes of a stack are: KL to the original model and perplexity, measured, not estimated.

The original runs once, layer by layer; the stack's blocks are read once, in order, into one float32 copy of the model
that is run at each size asked for. Prefixes are run dense: what serving rounds on its way is not in these figures.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
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
from ..engine.dense import DenseAttention, DenseLinear, DenseOps, build_network, dense_layer
from ..engine.network import Network, layer_forward
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


@torch.no_grad()
def measure_curve(
    checkpoint: Checkpoint, stack: Stack, tokens: Tensor, blocks: Sequence[int], progress: Progress = no_progress
) -> tuple[CurvePoint, ...]:
    """One point for each prefix length in `blocks`, in that order, on `tokens [S, L]` (a few thousand, L at least 2).

    Lengths lie between the stack's base and its number of blocks. Holds one float32 copy of the model, with a byte more
    for every weight stored as planes, its largest layer or head twice. Raises `BadBlock` or `TruncatedStack` when the
    stack cannot be read or makes no model.
    """
    original = Original(checkpoint, tokens)
    points: dict[int, CurvePoint] = {}
    for count, found in prefix_qualities(original, checkpoint, stack, blocks):
        points[count] = CurvePoint(count, stack.edges[count], found.mean_kl, found.perplexity)
        progress("measure", len(points), len(set(blocks)))
    return tuple(points[count] for count in blocks)


@torch.no_grad()
def prefix_qualities(
    original: Original, checkpoint: Checkpoint, stack: Stack, blocks: Sequence[int], exact: Container[str] = ()
) -> Iterator[tuple[int, Quality]]:
    """Each prefix length in `blocks`, ascending, and its quality token by token; tensors in `exact` stay original.

    See `measure_curve`.
    """
    assert all(stack.base <= count <= len(stack.blocks) for count in blocks)
    weights: dict[str, GrowingWeight] = {}

    def tensor(name: str) -> Tensor:
        return checkpoint.tensor(name) if name in exact else torch.from_numpy(weights[name].value())

    wanted = sorted(set(blocks))
    for position, (entry, payload) in enumerate(read_blocks(stack) if wanted else ()):
        if entry.tensor not in exact:
            weights.setdefault(entry.tensor, GrowingWeight()).add(entry, payload)
        count = position + 1
        if count in wanted:
            found = original.compare(build_network(checkpoint.architecture, tensor))
            if not bool(torch.isfinite(found.kl).all()):
                raise BadBlock(f"the first {count} blocks of {stack.path} make a model whose logits are not finite")
            yield count, found
        if count == wanted[-1]:
            break


class Original:
    """The original model's last hidden states on some tokens, and its head."""

    def __init__(self, checkpoint: Checkpoint, tokens: Tensor) -> None:
        a = checkpoint.architecture
        self._tokens = tokens
        x = functional.embedding(tokens.flatten(), checkpoint.tensor("embed"))
        for index in range(a.layers):
            # Not named: the last layer would stay while the next is read.
            x = layer_forward(a, DenseOps(), dense_layer(a, index, checkpoint.tensor), index, x, self._attention(a))
        x = DenseOps().rms_norm(x, checkpoint.tensor("final_norm"), a.norm_eps)
        self._hidden = self._with_target(x)
        self._head = DenseLinear(checkpoint.tensor("embed" if a.tied else "head"))

    def compare(self, network: Network[Tensor]) -> Quality:
        """Another model's quality on the same tokens, at every position that has a next token."""
        a = network.architecture
        hidden = self._with_target(network.forward(self._tokens.flatten(), self._attention(a)))
        rows = max(1, CHUNK_LOGITS // a.vocab)
        parts = [
            quality(self._head(reference), network.head(found), targets)
            for reference, found, targets in zip(
                self._hidden.split(rows), hidden.split(rows), self._tokens[:, 1:].flatten().split(rows), strict=True
            )
        ]
        return Quality(torch.cat([part.kl for part in parts]), torch.cat([part.loss for part in parts]))

    def _attention(self, a: Architecture) -> DenseAttention:
        return DenseAttention(a, *self._tokens.shape)

    def _with_target(self, hidden: Tensor) -> Tensor:
        """`[S * L, d] -> [S * (L - 1), d]`: the last token of a stream has no next one."""
        streams, length = self._tokens.shape
        return hidden.reshape(streams, length, -1)[:, :-1].flatten(0, 1)
