"""The `bitstack` codec: one matrix -> its `signs` blocks, most significant first.

The method is absolute-value decomposition (BitStack, arXiv 2410.23918, section 3). With R the weight not yet stored and
s the channels' activation norms, each level stores

    S = sign(R),    U V = the best rank-k approximation of |R| diag(s),    V <- V diag(1 / s)

and R loses  S * (U V)  as it was really stored, rounded to f16: a later level repairs the rounding of an earlier one.
Ours, not the paper's: the two factors of each rank are balanced, so that neither leaves f16's range, and the rank
follows the shape (`default_rank`): on narrow matrices the paper's 16 costs more than the signs, and a level's work when
serving grows with its rank. On the demo model, linears at 512 to 1280 wide, that is better per byte than 8 or 16 up to
half the source's bytes, and worse above (at 26 MB a KL of 0.021 against 0.014 with rank 8): `--rank` is there for that.

Levels: 14 where the paper has 16. The error falls by 0.6, 0.6, 0.67, 0.75 with the first four levels, then ever more
slowly, for what is left is a few large weights that a low-rank magnitude cannot follow (relative error 0.18 after 4
levels, 0.10 after 8, 0.074 after 14). KL on the demo, nats per token: 2.06 for the base, 0.030 with 10 levels, 0.025
with 12, 0.021 with 14, 0.018 with 16; but 16 levels are larger than the bf16 source, 14 the most that are not.

Which block goes where in the stack is `order`'s business, what a block's gain is `gain`'s; this file only reports the
error that each level leaves. Needs torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ...formats.blocks import pack_signs
from ...formats.container import content_hash
from ...formats.errors import CorruptCheckpoint, InvalidRequest
from ...formats.index import BlockEntry
from ...formats.kinds import signs_nbytes

DEFAULT_LEVELS: Final = 14
MAX_LEVELS: Final = 32
MAX_RANK: Final = 16  # of `default_rank`; the paper's

LARGEST_WEIGHT: Final = 1e6
F16_MAX: Final = 65504.0
OVERSAMPLING: Final = 8
POWER_ITERATIONS: Final = 2
EXACT_BELOW: Final = 128
PROBES: Final = 512
SMALLEST_SCALE: Final = 1e-3


@dataclass(frozen=True)
class Level:
    """One encoded level. `before`, `after [m]`: (E H E^T)_rr of each row's error E without and with this level."""

    entry: BlockEntry
    payload: bytes
    before: Tensor
    after: Tensor


def default_rank(m: int, n: int) -> int:
    """The largest power of two, at most 16 and at least 1, whose factors cost at most an eighth of the signs."""
    rank = MAX_RANK
    while rank > 1 and 2 * rank * (m + n) > m * n / 64:
        rank //= 2
    return rank


def choose_rank(m: int, n: int, wanted: int | None) -> int:
    """`wanted`, or the default, but no more than the matrix has. Raises `InvalidRequest` below 1."""
    if wanted is not None and wanted < 1:
        raise InvalidRequest(f"rank must be at least 1, not {wanted}")
    return min(m, n, default_rank(m, n) if wanted is None else wanted)


def choose_levels(wanted: int | None) -> int:
    """`wanted`, or the default. Raises `InvalidRequest` outside [1, 32]."""
    levels = DEFAULT_LEVELS if wanted is None else wanted
    if not 1 <= levels <= MAX_LEVELS:
        raise InvalidRequest(f"levels must be between 1 and {MAX_LEVELS}, not {levels}")
    return levels


def encode_matrix(
    tensor: str,
    weight: Tensor,
    scale: Tensor,
    probes: Tensor,
    *,
    uses: tuple[str, ...],
    levels: int,
    rank: int,
    seed: int,
) -> Iterator[Level]:
    """Encode `weight [m, n]`; yields one level at a time, fewer than `levels` if nothing is left to store.

    `scale [n]` > 0 are the channels' activation norms, `probes [n, p]` the `square_root` of their second moment H.
    Deterministic for one machine and number of threads. Raises `CorruptCheckpoint` for weights that are not finite, or
    beyond 1e6.
    """
    m, n = weight.shape
    rest = checked_weight(tensor, weight)
    scale = _usable_scale(tensor, scale)
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(tensor.encode()))
    before = row_errors(rest, probes)
    for level in range(levels):
        positive, u, v = _encode_level(rest, scale, rank, generator)
        payload = pack_signs(positive.numpy(), u.numpy(), v.numpy())
        after = row_errors(rest, probes)
        entry = BlockEntry(
            kind="signs",
            tensor=tensor,
            level=level,
            shape=(m, n),
            nbytes=signs_nbytes(m, n, rank),
            gain=0.0,
            hash=content_hash(payload),
            uses=uses,
            rank=rank,
        )
        yield Level(entry, payload, before, after)
        if not rest.any():
            return
        before = after


def square_root(inputs: Tensor) -> Tensor:
    """`H [n, n]` -> P `[n, p]`, p <= 512, with `P P^T` = H; beyond 512 columns in expectation, by random signs.

    Rounding and few samples leave H slightly indefinite; the smallest ridge that makes it definite is added.
    Raises `CorruptCheckpoint` when H is not finite.
    """
    n = len(inputs)
    if not torch.isfinite(inputs).all():
        raise CorruptCheckpoint("the squares of the model's activations are not finite: its weights cannot be right")
    ridge = 1e-6 * max(float(inputs.diagonal().mean()), 1e-30)
    root: Tensor
    while True:
        definite = inputs.clone()
        definite.diagonal().add_(ridge)
        root, failed = torch.linalg.cholesky_ex(definite)
        if not failed:
            break
        ridge *= 10
    if n <= PROBES:
        return root
    signs = torch.randint(0, 2, (n, PROBES), generator=torch.Generator().manual_seed(n)).float().mul_(2).sub_(1)
    return root @ signs.div_(PROBES**0.5)


def row_errors(error: Tensor, probes: Tensor) -> Tensor:
    """(E H E^T)_rr of each row of E `[m, n]`: the squared error expected at each output, `-> [m]`."""
    errors: Tensor = (error @ probes).square_().sum(dim=1)
    return errors


def checked_weight(tensor: str, weight: Tensor) -> Tensor:
    """A float32 copy of `weight`. Raises `CorruptCheckpoint` for what is not finite, or beyond 1e6."""
    largest = float(weight.abs().max())
    if not largest <= LARGEST_WEIGHT:
        raise CorruptCheckpoint(f"{tensor} holds a weight of magnitude {largest}; at most {LARGEST_WEIGHT:g} is sane")
    return weight.float().clone()


def _usable_scale(tensor: str, scale: Tensor) -> Tensor:
    if not (torch.isfinite(scale).all() and (scale > 0).all()):
        raise CorruptCheckpoint(f"the activations that {tensor} reads are not finite: the weights before it are broken")
    # A channel that is (nearly) never active would make its column of V leave f16's range.
    return scale.float().clamp_min(SMALLEST_SCALE * float(scale.mean()))


def _encode_level(rest: Tensor, scale: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Signs `[m, n]`, U `[m, k]` and V `[k, n]` f16 of one level, which is subtracted from `rest` in place."""
    positive = rest >= 0
    magnitude = rest.abs().mul_(scale)
    u, v = _low_rank(magnitude, rank, generator)
    u, v = _balanced(u, v.div_(scale))
    stored = torch.mm(u.float(), v.float(), out=magnitude)
    rest.sub_(torch.where(positive, stored, stored.neg()))
    return positive, u, v


def _low_rank(a: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`U sqrt(Sigma) [m, k]` and `sqrt(Sigma) V^T [k, n]` of the rank-k SVD of `a`.

    Exact for small matrices, else randomised subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4).
    """
    m, n = a.shape
    if min(m, n) <= max(EXACT_BELOW, rank + OVERSAMPLING):
        u, sigma, v = torch.linalg.svd(a, full_matrices=False)
    else:
        basis = torch.linalg.qr(a @ torch.randn(n, rank + OVERSAMPLING, generator=generator)).Q
        for _ in range(POWER_ITERATIONS):
            basis = torch.linalg.qr(a @ torch.linalg.qr(a.T @ basis).Q).Q
        u, sigma, v = torch.linalg.svd(basis.T @ a, full_matrices=False)
        u = basis @ u
    root = sigma[:rank].sqrt()
    return u[:, :rank] * root, v[:rank] * root[:, None]


def _balanced(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The factors in f16, each rank's typical magnitudes made equal on both sides (which leaves `U V` as it is)."""
    ratio = _typical(v) / _typical(u.T)
    root = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0).sqrt_()
    u, v = u * root, v / root[:, None]
    return u.clamp_(-F16_MAX, F16_MAX).half(), v.clamp_(-F16_MAX, F16_MAX).half()


def _typical(rows: Tensor) -> Tensor:
    return rows.abs().median(dim=1).values
