"""Every weight of a checkpoint -> blocks in a spool, each with its gain; in what order they come does not matter.

Matrices go through the codec, layer by layer as their moments arrive; everything else is stored dense (with `bitstack`,
which would take more bytes for them than int8, embedding and head too; with `sparse` they are `nested`'s planes). The
codecs are `encode_nested`, `encode_bitstack` and `encode_sparse`; which there are, and what they are asked for, is told
apart only here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Final, TypeVar

import msgspec
import numpy as np
from torch import Tensor

from ...formats.architecture import Architecture, linear_shapes, weight_shapes, weight_uses
from ...formats.blocks import F32, pack_dense, unpack_dense
from ...formats.checkpoint import Checkpoint
from ...formats.container import content_hash, padded
from ...formats.errors import InvalidRequest, Unsupported
from ...formats.index import BlockEntry
from ...formats.kinds import payload_nbytes, plane_nbytes, signs_nbytes
from . import encode_bitstack, encode_nested, encode_sparse
from .calibrate import Gradients, LinearMoments, layer_moments, output_gradients
from .encode_bitstack import Level, choose_rank, encode_matrix, square_root
from .encode_nested import encode_planes, input_metric, level_dtype
from .encode_sparse import SparsePlan, encode_tiers, tier_nbytes
from .gain import GainEstimate
from .progress import Reporter
from .prune import inputs_of
from .spool import Spool

VOCABULARY: Final = ("embed", "head")
CODECS: Final = ("nested", "bitstack", "sparse")

S = TypeVar("S")


@dataclass(frozen=True)
class EncodePlan:
    """What is to be encoded and how; `rank` is `bitstack`'s, None means by shape; `sparse` is `sparse`'s."""

    checkpoint: Checkpoint
    codec: str
    levels: int
    rank: int | None
    seed: int
    estimate: GainEstimate
    reporter: Reporter
    sparse: SparsePlan | None = None


def choose_levels(codec: str, levels: int | None, rank: int | None) -> int:
    """How many levels `codec` shall store. Raises `Unsupported`, or `InvalidRequest` for what makes no sense."""
    match codec:
        case "nested" | "sparse":
            if rank is not None:
                raise InvalidRequest(f"rank belongs to the codec bitstack; the codec {codec} has none")
            return encode_nested.choose_levels(levels) if codec == "nested" else encode_sparse.choose_levels(levels)
        case "bitstack":
            choose_rank(1, 1, rank)
            return encode_bitstack.choose_levels(levels)
        case _:
            raise Unsupported(f"codec {codec!r}; this version knows {', '.join(CODECS)}")


def encode_model(plan: EncodePlan, tokens: Tensor, spool: Spool) -> None:
    """Encode everything that is not in the spool yet, calibrated on `tokens [S, L]`.

    Raises `CorruptCheckpoint`, and `OSError` of a full disk; what was finished stays in the spool.
    """
    plan.reporter.begin("measuring activations")
    _encode_dense(plan, spool)
    _encode_linears(plan, tokens, spool)


def expected_nbytes(
    a: Architecture, codec: str, levels: int, rank: int | None, sparse: SparsePlan | None = None
) -> int:
    """The most bytes that a stack of these options can take, its header apart."""
    linears = encoded_matrices(a, codec)
    total = 0
    for name, shape in weight_shapes(a).items():
        if name in linears:
            total += sum(map(padded, _levels_nbytes(codec, name, *linears[name], levels, rank, sparse)))
        else:
            total += padded(payload_nbytes("dense", shape, dtype="i8" if len(shape) > 1 else "f32"))
    return total


def _levels_nbytes(
    codec: str, name: str, m: int, n: int, levels: int, rank: int | None, sparse: SparsePlan | None
) -> list[int]:
    if codec == "bitstack":
        return levels * [signs_nbytes(m, n, choose_rank(m, n, rank))]
    if sparse is not None and name not in VOCABULARY:
        if sparse.given:
            return sparse.given.nbytes(name, sparse.pruning.values)
        return tier_nbytes(m, n, sparse.groups(name, n), levels, sparse.pruning.values)
    return [plane_nbytes(m, n, level, level_dtype(n, level)) for level in range(_planes(codec, levels))]


def _planes(codec: str, levels: int) -> int:
    """Levels of what is stored as planes: as asked for, or, beside tiers, as many as `nested` has."""
    return levels if codec == "nested" else encode_nested.DEFAULT_LEVELS


def layer_linears(a: Architecture) -> dict[str, tuple[int, int]]:
    """Name and `[m, n]` of every linear of a layer."""
    return {f"layers.{i}.{role}": shape for i in range(a.layers) for role, shape in linear_shapes(a).items()}


def encoded_matrices(a: Architecture, codec: str) -> dict[str, tuple[int, int]]:
    """What is not dense: the linears of layers; but with `bitstack`, embedding and head too."""
    shapes = layer_linears(a)
    if codec != "bitstack":
        shapes |= {name: (a.vocab, a.hidden) for name in VOCABULARY if name in weight_shapes(a)}
    return shapes


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
    linears = encoded_matrices(plan.checkpoint.architecture, plan.codec)
    if spool.load("dense"):
        return
    with spool.writing("dense"):
        for name in weight_shapes(plan.checkpoint.architecture):
            if name not in linears:
                spool.add(*dense_block(plan.checkpoint.architecture, name, plan.checkpoint.tensor(name).numpy()))


def _encode_linears(plan: EncodePlan, tokens: Tensor, spool: Spool) -> None:
    a, vocabulary = plan.checkpoint.architecture, plan.codec != "bitstack"
    parts = [_part(index) for index in range(a.layers + vocabulary)]
    first = next((index for index, part in enumerate(parts) if not spool.load(part)), len(parts))
    if first == len(parts):
        return
    sizes = {name: prod(shape) for name, shape in encoded_matrices(a, plan.codec).items()}
    whole = {entry.tensor for entry in spool.entries}
    done, total = sum(size for name, size in sizes.items() if name in whole), sum(sizes.values())
    plan.reporter.skip(done, total)
    for index, linears in _moments(plan, tokens, spool, first):
        plan.reporter.enter("encoding")
        with spool.writing(parts[index]):
            for name, count, levels in _encoded(plan, linears):
                for level in levels:
                    gain = plan.estimate(linears[name].gradient, level.before, level.after)
                    spool.add(msgspec.structs.replace(level.entry, gain=gain), level.payload)
                    plan.reporter.fraction(done + round((level.entry.level + 1) / count * sizes[name]), total, name)
                done += sizes[name]
                plan.reporter.fraction(done, total, name)
        plan.reporter.enter("measuring activations")


def _part(index: int) -> str:
    """The spool's name of layer `index`, or, one past the last, of the vocabulary."""
    return f"layer-{index:04}"


def _moments(
    plan: EncodePlan, tokens: Tensor, spool: Spool, first: int
) -> Iterator[tuple[int, dict[str, LinearMoments]]]:
    """The moments of every layer from `first` on; gradients are those in the spool, if they are there."""

    def tick(what: str, i: int, n: int) -> None:
        plan.reporter.tick()

    kept = spool.kept("gradients")
    gradients = (
        output_gradients(plan.checkpoint, tokens, plan.seed, tick) if kept is None else Gradients.from_bytes(kept)
    )
    if kept is None:
        spool.keep("gradients", gradients.to_bytes())
    vocabulary = plan.codec != "bitstack"
    return layer_moments(
        plan.checkpoint, tokens, tick, seed=plan.seed, vocabulary=vocabulary, gradients=gradients, first=first
    )


def _encoded(plan: EncodePlan, linears: dict[str, LinearMoments]) -> Iterator[tuple[str, int, Iterator[Level]]]:
    """Each linear's name, the most levels it can have, and these, encoded as they are asked for."""
    if plan.codec == "bitstack":
        yield from _as_signs(plan, linears)
    elif plan.sparse is not None and not linears.keys() & set(VOCABULARY):
        yield from _as_tiers(plan, plan.sparse, linears)
    else:
        yield from _as_planes(plan, linears)


def _as_planes(plan: EncodePlan, linears: dict[str, LinearMoments]) -> Iterator[tuple[str, int, Iterator[Level]]]:
    a, tensor, levels = plan.checkpoint.architecture, plan.checkpoint.tensor, _planes(plan.codec, plan.levels)
    for name, _, metric in _per_input(linears, input_metric):
        uses = weight_uses(a, name)
        yield name, levels, encode_planes(name, tensor(name), metric, uses=uses, levels=levels, seed=plan.seed)


def _as_tiers(
    plan: EncodePlan, sparse: SparsePlan, linears: dict[str, LinearMoments]
) -> Iterator[tuple[str, int, Iterator[Level]]]:
    a, tensor, levels = plan.checkpoint.architecture, plan.checkpoint.tensor, plan.levels
    for name, _, inputs in _per_input(linears, inputs_of):
        uses = weight_uses(a, name)
        yield name, levels, encode_tiers(name, tensor(name), inputs, sparse, uses=uses, levels=levels)


def _as_signs(plan: EncodePlan, linears: dict[str, LinearMoments]) -> Iterator[tuple[str, int, Iterator[Level]]]:
    for name, moments, probes in _per_input(linears, square_root):
        weight = plan.checkpoint.tensor(name)
        levels = encode_matrix(
            name,
            weight,
            moments.scale,
            probes,
            uses=weight_uses(plan.checkpoint.architecture, name),
            levels=plan.levels,
            rank=choose_rank(weight.shape[0], weight.shape[1], plan.rank),
            seed=plan.seed,
        )
        yield name, plan.levels, levels


def _per_input(
    linears: dict[str, LinearMoments], prepare: Callable[[Tensor], S]
) -> Iterator[tuple[str, LinearMoments, S]]:
    """Each linear's name, moments and `prepare(H)`, which linears that read the same activations share."""
    known: dict[int, S] = {}
    for name, moments in linears.items():
        if id(moments.inputs) not in known:
            known[id(moments.inputs)] = prepare(moments.inputs)
        yield name, moments, known[id(moments.inputs)]
