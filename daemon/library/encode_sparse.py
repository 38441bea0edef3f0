"""The `sparse` codec: one matrix -> a `mask` and a `values` block for each density tier, the most important first.

Which weights stay, and as what, is decided once for all tiers (`prune`). The tiers then take them by falling score,
|w| times the norm of its channel, the same count from every group of every row: of three tiers half, three quarters and
all of what is kept. So any prefix is a sparser model, also in an N:M pattern, whose tiers are patterns themselves (2:4
is 1:4 and one more). Tiers cost: a tier's mask has a bit for every position that is still zero, so that half of 8-bit
weights take 5 bits a weight in one tier, 6.4 in three. Cuts between tiers are moved to where no bit of a mask is of
nothing.

Values of i8 and i4 have one scale a row, for all tiers, so that those that are resident add up to one row of integers:
the scale with the least error, weighted by the energy of the channels. What rounding costs is in the errors of the
tiers, from which gains are estimated.

Linears only: embedding and head are stored as planes (`encode_nested`). Rows of an embedding are read one at a time, by
rare tokens too, and no activations say which of its weights matter; and planes reach int8's quality in fewer bytes,
without all of them having to be in the base.

A checkpoint that was pruned before (`Zeros`) keeps its own zeros. Rows, or groups, with fewer weights than others are
filled up with zeros that are stored. Needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ...formats.blocks import pack_mask, pack_values
from ...formats.checkpoint import Checkpoint
from ...formats.container import content_hash
from ...formats.errors import InvalidRequest
from ...formats.index import BlockEntry
from ...formats.kinds import VALUES_LIMIT, mask_nbytes, values_nbytes
from ...formats.pruning import Pruning
from .encode_bitstack import Level, checked_weight
from .given import GivenMasks, on_positions
from .prune import Groups, Inputs, Pruned, objective, prune

DEFAULT_LEVELS: Final = 3
MAX_LEVELS: Final = 4
FIRST_SHARE: Final = 0.5  # of the kept weights, in the first of several tiers
PRUNED_SHARE: Final = 0.3  # zeros among the weights of all linears: fewer may be chance
CLIPPING: Final = {"i8": (1.0, 0.95, 0.9), "i4": tuple(1 - 0.05 * i for i in range(11))}
F16_MAX: Final = 65504.0
WORD: Final = 64  # bits of a mask
CUT_MOVES: Final = 6  # by one part in so many of what is kept, at most
ROWS_AT_ONCE: Final = 1024  # bounds the memory of what pruning keeps for each weight


@dataclass(frozen=True)
class Zeros:
    """What a checkpoint has pruned already: the share of zeros in its linears, and for each linear the most weights
    other than zero in a group of a row.
    """

    share: float
    most: dict[str, int]

    @property
    def text(self) -> str:
        """For people."""
        return f"the checkpoint's own zeros, {self.share:.0%} of its linears"


@dataclass(frozen=True)
class SparsePlan:
    """How the linears of one checkpoint are pruned; `zeros` is None unless it was pruned before. With masks that are
    `given`, nothing is left to choose but the values.
    """

    pruning: Pruning
    zeros: Zeros | None = None
    given: GivenMasks | None = None

    def groups(self, tensor: str, n: int) -> Groups:
        """How many weights of a linear with n columns are kept. Raises `InvalidRequest` as `Pruning.group` does.

        Never more than a pruned checkpoint has; just those, when nobody asked for a sparsity.
        """
        group = self.pruning.group(tensor, n)
        keep = self.pruning.keep(group)
        if self.zeros is not None:
            own = max(1, self.zeros.most[tensor])
            keep = own if self.pruning.sparsity is None and self.pruning.pattern is None else min(keep, own)
        return Groups(group, keep)


def choose_levels(wanted: int | None) -> int:
    """`wanted` tiers, or the default. Raises `InvalidRequest` outside [1, 4]."""
    levels = DEFAULT_LEVELS if wanted is None else wanted
    if not 1 <= levels <= MAX_LEVELS:
        raise InvalidRequest(f"sparse levels (tiers) must be between 1 and {MAX_LEVELS}, not {levels}")
    return levels


def find_zeros(checkpoint: Checkpoint, shapes: dict[str, tuple[int, int]], pruning: Pruning) -> Zeros | None:
    """What is zero already in the linears of these `shapes`, or None where that is little.

    Reads them all, a few rows at a time. Raises `CorruptCheckpoint`, or `InvalidRequest` when a pattern does not divide
    a row.
    """
    groups = {name: pruning.group(name, n) for name, (_, n) in shapes.items()}
    zeros, most = 0, {}
    for name, (m, n) in shapes.items():
        counts = [
            (rows != 0).unflatten(1, (-1, groups[name])).sum(2, dtype=torch.int32)
            for rows in checkpoint.mapped(name).split(ROWS_AT_ONCE)
        ]
        zeros += m * n - sum(int(part.sum()) for part in counts)
        most[name] = max(int(part.max()) for part in counts)
    share = zeros / sum(m * n for m, n in shapes.values())
    return Zeros(share, most) if share >= PRUNED_SHARE else None


def tier_counts(n: int, groups: Groups, levels: int) -> tuple[int, ...]:
    """How many of the kept weights of a group the first tiers hold together, in rows of n columns; fewer tiers where
    two would be the same.

    A cut moves a little, where that leaves a row whole words of positions for the next tier's mask.
    """
    keep, each = groups.keep, n // groups.group
    found: list[int] = []
    for i in range(levels - 1):
        wanted = max(1, round(keep * (FIRST_SHARE + (1 - FIRST_SHARE) * i / (levels - 1))))
        later = range(found[-1] + 1 if found else 1, keep)
        near = (count for count in later if CUT_MOVES * abs(count - wanted) <= keep)
        whole = [count for count in near if (groups.group - count) * each % WORD == 0]
        count = min(whole, key=lambda count: abs(count - wanted)) if whole else wanted
        if count in later:
            found.append(count)
    return (*found, keep)


def tier_nbytes(m: int, n: int, groups: Groups, levels: int, values: str) -> list[int]:
    """Bytes of every block of a matrix: mask and values of tier 0, of tier 1, ..."""
    sizes, filled = [], 0
    for level, count in enumerate(tier_counts(n, groups, levels)):
        rank = count * (n // groups.group) - filled
        sizes += [mask_nbytes(m, n, filled), values_nbytes(m, level, values, rank)]
        filled += rank
    return sizes


def encode_tiers(
    tensor: str,
    weight: Tensor,
    inputs: Inputs,
    plan: SparsePlan,
    *,
    uses: tuple[str, ...],
    levels: int,
) -> Iterator[Level]:
    """Encode `weight [m, n]` into a mask and values for each of at most `levels` tiers; a mask alone changes nothing.

    Raises `CorruptCheckpoint` for weights that are not finite, or beyond 1e6.
    """
    weight, pruning = checked_weight(tensor, weight), plan.pruning
    pruned = _given(tensor, weight, inputs, plan, plan.given) if plan.given else _pruned(tensor, weight, inputs, plan)
    stored = round_values(pruned.weight, inputs, pruning.values)
    tiers = (
        plan.given.tiers(tensor) if plan.given else _tiers(pruned, inputs, plan.groups(tensor, weight.shape[1]), levels)
    )
    held = torch.zeros_like(pruned.kept)
    before = _errors(weight, inputs)
    for level, fresh in enumerate(tiers):
        mask = pack_mask(fresh.numpy(), held.numpy())
        per_row = int(fresh[0].sum())
        held |= fresh
        after = _errors(weight - stored.weight * held, inputs)
        payload = pack_values(
            stored.weight[fresh].view(len(weight), per_row).numpy(),
            pruning.values,
            None if stored.scale is None else stored.scale.numpy(),
            first=level == 0,
        )
        for kind, data, left in (("mask", mask, before), ("values", payload, after)):
            entry = BlockEntry(
                kind=kind,
                tensor=tensor,
                level=level,
                shape=tuple(weight.shape),
                nbytes=len(data),
                gain=0.0,
                hash=content_hash(data),
                uses=uses,
                dtype=pruning.values if kind == "values" else "",
                rank=per_row,
                beside=kind == "mask",
            )
            yield Level(entry, data, before, left)
        before = after


def _pruned(tensor: str, weight: Tensor, inputs: Inputs, plan: SparsePlan) -> Pruned:
    """The matrix with the rows' weights chosen."""
    groups, method = plan.groups(tensor, weight.shape[1]), plan.pruning.method
    return _joined(
        prune(part, inputs, groups, method, None if plan.zeros is None else part != 0)
        for part in weight.split(ROWS_AT_ONCE)
    )


def _given(tensor: str, weight: Tensor, inputs: Inputs, plan: SparsePlan, given: GivenMasks) -> Pruned:
    """The matrix on the positions that another model has."""
    parts = zip(weight.split(ROWS_AT_ONCE), given.kept(tensor).split(ROWS_AT_ONCE), strict=True)
    return _joined(
        on_positions(part, inputs, kept, plan.pruning.method, None if plan.zeros is None else part != 0)
        for part, kept in parts
    )


def _joined(parts: Iterable[Pruned]) -> Pruned:
    found = list(parts)
    return Pruned(torch.cat([part.kept for part in found]), torch.cat([part.weight for part in found]))


def _tiers(pruned: Pruned, inputs: Inputs, groups: Groups, levels: int) -> Iterator[Tensor]:
    """Which weights each tier has, `[m, n]`: those that count most first."""
    ranks, held = _ranks(pruned, inputs, groups), 0
    for count in tier_counts(pruned.kept.shape[1], groups, levels):
        yield (ranks >= held) & (ranks < count)
        held = count


@dataclass(frozen=True)
class Stored:
    """The `weight [m, n]` as it will be read back, and the `scale [m]` of its rows (None with f16)."""

    weight: Tensor
    scale: Tensor | None


def round_values(value: Tensor, inputs: Inputs, dtype: str) -> Stored:
    """`value [m, n]` as it can be stored."""
    if dtype == "f16":
        return Stored(value.clamp(-F16_MAX, F16_MAX).half().float(), None)
    largest, energy = VALUES_LIMIT[dtype], inputs.norms.square()
    widest = value.abs().amax(1) / largest
    best, scale = torch.full_like(widest, torch.inf), widest
    for share in CLIPPING[dtype]:
        error = ((value - _rounded(value, share * widest, largest)).square() * energy).sum(1)
        scale = torch.where(error < best, share * widest, scale)
        best = torch.minimum(best, error)
    return Stored(_rounded(value, scale, largest), scale)


def _rounded(value: Tensor, scale: Tensor, largest: int) -> Tensor:
    steps = (value / torch.where(scale > 0, scale, 1.0)[:, None]).round_().clamp_(-largest, largest)
    return steps * scale[:, None]


def _ranks(pruned: Pruned, inputs: Inputs, groups: Groups) -> Tensor:
    """The place of each kept weight among those of its group, `[m, n]`; beyond them for all others."""
    scores = torch.where(pruned.kept, pruned.weight.abs() * inputs.norms, -1.0)
    return torch.cat([groups.ranks(part) for part in scores.split(ROWS_AT_ONCE)])


def _errors(error: Tensor, inputs: Inputs) -> Tensor:
    return torch.cat([objective(part, inputs.h) for part in error.split(ROWS_AT_ONCE)])
