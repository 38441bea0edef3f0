"""Every weight of a checkpoint -> blocks in a spool, each with its gain; in what order they come does not matter.

Linears of layers go through the codec, layer by layer as their moments arrive; everything else is stored dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import msgspec
import numpy as np
from torch import Tensor

from ...formats.architecture import Architecture, linear_shapes, weight_shapes, weight_uses
from ...formats.blocks import F32, pack_dense, unpack_dense
from ...formats.checkpoint import Checkpoint
from ...formats.kinds import payload_nbytes, signs_nbytes
from ...formats.stack import BlockEntry, content_hash, padded
from .calibrate import LinearMoments, layer_moments
from .encode_bitstack import choose_rank, encode_matrix, square_root
from .gain import GainEstimate
from .progress import Reporter
from .spool import Spool


@dataclass(frozen=True)
class EncodePlan:
    """What is to be encoded and how; `rank` None means by shape."""

    checkpoint: Checkpoint
    levels: int
    rank: int | None
    seed: int
    estimate: GainEstimate
    reporter: Reporter


def encode_model(plan: EncodePlan, tokens: Tensor, spool: Spool) -> None:
    """Encode everything, calibrated on `tokens [S, L]`. Raises `CorruptCheckpoint`, and `OSError` of a full disk."""
    _encode_dense(plan, spool)
    _encode_linears(plan, tokens, spool)


def expected_nbytes(a: Architecture, levels: int, rank: int | None) -> int:
    """The most bytes that a stack of these options can take, its header apart."""
    linears = layer_linears(a)
    total = 0
    for name, shape in weight_shapes(a).items():
        if name in linears:
            total += levels * padded(signs_nbytes(*linears[name], choose_rank(*linears[name], rank)))
        else:
            total += padded(payload_nbytes("dense", shape, dtype="i8" if len(shape) > 1 else "f32"))
    return total


def layer_linears(a: Architecture) -> dict[str, tuple[int, int]]:
    """Name and `[m, n]` of every linear that is encoded; all other weights are stored dense."""
    return {f"layers.{i}.{role}": shape for i in range(a.layers) for role, shape in linear_shapes(a).items()}


def dense_block(a: Architecture, name: str, weight: F32) -> tuple[BlockEntry, bytes]:
    """A matrix as i8, a vector as bf16 if that is exact and f32 if not."""
    if weight.ndim > 1:
        dtype, payload = "i8", pack_dense(weight, "i8")
    else:
        dtype, payload = "bf16", pack_dense(weight, "bf16")
        if not np.array_equal(unpack_dense(payload, weight.shape, "bf16"), weight):
            dtype, payload = "f32", pack_dense(weight, "f32")
    entry = BlockEntry(
        kind="dense",
        tensor=name,
        level=0,
        shape=weight.shape,
        nbytes=len(payload),
        gain=0.0,
        hash=content_hash(payload),
        uses=weight_uses(a, name),
        dtype=dtype,
    )
    return entry, payload


def _encode_dense(plan: EncodePlan, spool: Spool) -> None:
    linears = layer_linears(plan.checkpoint.architecture)
    for name in weight_shapes(plan.checkpoint.architecture):
        if name not in linears:
            spool.add(*dense_block(plan.checkpoint.architecture, name, plan.checkpoint.tensor(name).numpy()))


def _encode_linears(plan: EncodePlan, tokens: Tensor, spool: Spool) -> None:
    total = sum(prod(shape) for shape in layer_linears(plan.checkpoint.architecture).values())
    done = 0
    plan.reporter.begin("measuring activations")
    moments = layer_moments(plan.checkpoint, tokens, lambda what, i, n: plan.reporter.tick(), seed=plan.seed)
    for _, linears in moments:
        plan.reporter.enter("encoding")
        for name, weight, linear, probes in _with_probes(plan.checkpoint, linears):
            for level, share in _levels(plan, name, weight, linear, probes):
                spool.add(*level)
                plan.reporter.fraction(done + round(share * weight.numel()), total, name)
            done += weight.numel()
            plan.reporter.fraction(done, total, name)
        plan.reporter.enter("measuring activations")


def _with_probes(
    checkpoint: Checkpoint, linears: dict[str, LinearMoments]
) -> Iterator[tuple[str, Tensor, LinearMoments, Tensor]]:
    """Each linear's name, weight, moments and probes; linears that read the same activations share the probes."""
    known: dict[int, Tensor] = {}
    for name, linear in linears.items():
        if id(linear.inputs) not in known:
            known[id(linear.inputs)] = square_root(linear.inputs)
        yield name, checkpoint.tensor(name), linear, known[id(linear.inputs)]


def _levels(
    plan: EncodePlan, name: str, weight: Tensor, linear: LinearMoments, probes: Tensor
) -> Iterator[tuple[tuple[BlockEntry, bytes], float]]:
    """Each level's entry, with its gain, and payload; and the share of the tensor's work that is then done."""
    m, n = weight.shape
    levels = encode_matrix(
        name,
        weight,
        linear.scale,
        probes,
        uses=weight_uses(plan.checkpoint.architecture, name),
        levels=plan.levels,
        rank=choose_rank(m, n, plan.rank),
        seed=plan.seed,
    )
    for i, level in enumerate(levels):
        gain = plan.estimate(linear.gradient, level.before, level.after)
        yield (msgspec.structs.replace(level.entry, gain=gain), level.payload), (i + 1) / plan.levels
