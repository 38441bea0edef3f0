"""Which weights of a matrix stay when the others become zero, and what those that stay become. Pure.

For a weight W `[m, n]` whose inputs have the second moment H. The columns of a row come in groups, all n or those of an
N:M pattern, and of every group in every row the same number is kept.

    magnitude    the largest |W|.
    wanda        the largest |W_ij| sqrt(H_jj) of each output row (arXiv 2306.11695).
    frankwolfe   masks M in [0, 1] that minimise (W - M∘W) H (W - M∘W)^T of each row: from Wanda's masks, steps of
                 2 / (t + 2) towards the vertex that the gradient likes best (its top k), then the top k of M (arXiv
                 2510.13713). A row whose start was better keeps that, so it is never worse than Wanda. W stays.
                 Ours: a step ends where the error would rise again, which a quadratic says. On correlated inputs 20
                 such steps do what 200 plain ones do, of which the first alone, of length 1, forgets the start.
    admm         masks and values together (arXiv 2401.02938): columns scaled to unit norm, so that magnitude is Wanda's
                 score; W = (H + rho)^-1 (H W_0 + rho (Z - U)), Z = W + U pruned, a little more in each round until
                 `GROWING_ROUNDS`. Then least squares on what is kept: conjugate gradients, from there.
    sparsegpt    one pass over the columns (arXiv 2301.00774), scaled likewise: with U the upper Cholesky factor of
                 H^-1, a weight that goes takes w_j / U_jj times row j of U from those after it. Which go is chosen for
                 some columns at a time, by w_j^2 / U_jj^2: those of an N:M group, or the next `BLOCK`. The paper cuts
                 a block's scores for all rows at one threshold; as our rows have equal counts, each row keeps those of
                 its block that are among the best of all its columns to come, as many as it has not kept yet.

Weights that `allowed` forbids (zeros of a checkpoint that was pruned before) are kept only where a group has too few
others, as zeros. Every row is alone in its sums, so rows may come in any parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from ...formats.errors import CorruptCheckpoint

DAMPING: Final = 0.02  # of the scaled H's diagonal, which is 1
BLOCK: Final = 128  # columns that SparseGPT decides on together
PENALTY: Final = 1.0  # ADMM's rho, by the same
ROUNDS: Final = 20
GROWING_ROUNDS: Final = 15
FRANK_WOLFE_STEPS: Final = 32
DESCENT_STEPS: Final = 24
DESCENT_STOPS: Final = 1e-8  # of the squared residual it began with
LEAST_NORM: Final = 1e-4  # of the mean: a channel that is never active is ranked by magnitude among its like


@dataclass(frozen=True)
class Inputs:
    """What all linears that read one input share: `h [n, n]`, H as it was measured."""

    h: Tensor

    @cached_property
    def norms(self) -> Tensor:
        """The root mean square of every channel, `[n]`, above zero."""
        norms = self.h.diagonal().clamp_min(0).sqrt()
        return norms.clamp_min(max(LEAST_NORM * float(norms.mean()), 1e-30))

    @cached_property
    def scaled(self) -> Tensor:
        """H of inputs scaled to unit norm, damped."""
        scaled = self.h / self.norms / self.norms[:, None]
        scaled.diagonal().fill_(1.0 + DAMPING)
        return scaled

    @cached_property
    def inverse(self) -> Tensor:
        """`(scaled + rho I)^-1`."""
        ridged = self.scaled.clone()
        ridged.diagonal().add_(PENALTY)
        inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(ridged))
        return inverse

    @cached_property
    def factor(self) -> Tensor:
        """The upper Cholesky factor of `scaled^-1`."""
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.scaled))
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
        return factor


@dataclass(frozen=True)
class Groups:
    """Of every `group` neighbours in a row, `keep` are kept."""

    group: int
    keep: int

    def best(self, scores: Tensor, keep: int | None = None) -> Tensor:
        """A mask `[m, n]` of the `keep` highest scores of each group; of equal ones, any."""
        grouped = scores.unflatten(1, (-1, self.group))
        chosen = grouped.topk(self.keep if keep is None else keep, dim=2, sorted=False).indices
        return torch.zeros_like(grouped, dtype=torch.bool).scatter_(2, chosen, True).flatten(1)

    def ranks(self, scores: Tensor) -> Tensor:
        """The place of each weight in its group, by falling score, `[m, n]` from 0."""
        grouped = scores.unflatten(1, (-1, self.group))
        order = grouped.argsort(dim=2, descending=True, stable=True)
        places = torch.arange(self.group).expand_as(order)
        return torch.empty_like(order).scatter_(2, order, places).flatten(1).int()


@dataclass(frozen=True)
class Pruned:
    """`kept [m, n]`, in every group as many as were asked for, and the `weight [m, n]`, zero elsewhere."""

    kept: Tensor
    weight: Tensor


def inputs_of(h: Tensor) -> Inputs:
    """From `H [n, n]`. Raises `CorruptCheckpoint` when it is not finite."""
    if not torch.isfinite(h).all():
        raise CorruptCheckpoint("the squares of the model's activations are not finite: its weights cannot be right")
    return Inputs(h)


def prune(weight: Tensor, inputs: Inputs, groups: Groups, method: str, allowed: Tensor | None = None) -> Pruned:
    """Prune some rows `weight [m, n]`; `allowed [m, n]` are the only ones that may be kept (None: all)."""
    allowed = torch.ones_like(weight, dtype=torch.bool) if allowed is None else allowed
    if method == "admm":
        return _reconstructed(weight, inputs, groups, allowed)
    if method == "sparsegpt":
        return _one_pass(weight, inputs, groups, allowed)
    if method == "magnitude":
        kept = groups.best(_only(allowed, weight.abs()))
    else:
        kept = groups.best(_only(allowed, wanda_scores(weight, inputs)))
        if method == "frankwolfe":
            kept = _frank_wolfe(weight, inputs, groups, kept, allowed)
    return Pruned(kept, weight * (kept & allowed))


def wanda_scores(weight: Tensor, inputs: Inputs) -> Tensor:
    """|W_ij| times the norm of channel j."""
    return weight.abs() * inputs.norms


def objective(error: Tensor, h: Tensor) -> Tensor:
    """(E H E^T)_rr of each row of E `[m, n]`, `-> [m]`."""
    return ((error @ h) * error).sum(dim=1).clamp_(min=0)


def _only(allowed: Tensor, scores: Tensor) -> Tensor:
    return torch.where(allowed, scores, -torch.inf)


def _frank_wolfe(weight: Tensor, inputs: Inputs, groups: Groups, start: Tensor, allowed: Tensor) -> Tensor:
    """Masks `[m, n]`, of which no row has a larger error than with `start`."""
    mask = start.float()
    seen = (weight - mask * weight) @ inputs.h  # times the weight: minus half of the gradient
    for t in range(FRANK_WOLFE_STEPS):
        way = groups.best(_only(allowed, weight * seen)).float() - mask
        change = way * weight
        change_seen = change @ inputs.h
        lowest = (change * seen).sum(1) / (change * change_seen).sum(1).clamp_min(1e-30)
        step = lowest.clamp_(0, 2 / (t + 2))[:, None]
        mask += step * way
        seen -= step * change_seen
    found = groups.best(_only(allowed, mask))
    before, after = (objective(weight * ~(kept & allowed), inputs.h) for kept in (start, found))
    return torch.where((after < before)[:, None], found, start)


def _reconstructed(weight: Tensor, inputs: Inputs, groups: Groups, allowed: Tensor) -> Pruned:
    """ADMM, then least squares; in between, inputs have unit norm."""
    target = weight * inputs.norms
    seen = target @ inputs.scaled
    w, u = target, torch.zeros_like(target)
    for keep in _shrinking(groups):
        wanted = w + u
        kept = groups.best(_only(allowed, wanted.abs()), keep)
        z = wanted * (kept & allowed)
        u = wanted - z
        w = (seen + PENALTY * (z - u)) @ inputs.inverse
    return Pruned(kept, least_squares(target, inputs.scaled, kept & allowed, z) / inputs.norms)


def _one_pass(weight: Tensor, inputs: Inputs, groups: Groups, allowed: Tensor) -> Pruned:
    """SparseGPT; in between, inputs have unit norm."""
    w, factor, n = weight * inputs.norms, inputs.factor, weight.shape[1]
    kept, sizes = torch.zeros_like(allowed), factor.diagonal()
    step = BLOCK if groups.group == n else groups.group
    for start in range(0, n, BLOCK):
        stop = min(n, start + BLOCK)
        errors = torch.zeros_like(w[:, start:stop])
        for j in range(start, stop):
            if (j - start) % step == 0:
                _choose(w, sizes, groups, kept, allowed, j, min(n, j + step))
            error = torch.where(kept[:, j] & allowed[:, j], 0.0, w[:, j] / sizes[j])
            errors[:, j - start] = error
            w[:, j:stop].addr_(error, factor[j, j:stop], alpha=-1)
        w[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return Pruned(kept, w * (kept & allowed) / inputs.norms)


def _choose(w: Tensor, sizes: Tensor, groups: Groups, kept: Tensor, allowed: Tensor, start: int, stop: int) -> None:
    """Mark which of the columns from `start` to `stop` are kept; those before are decided."""
    whole = groups.group == w.shape[1]
    end = w.shape[1] if whole else stop
    scores = _only(allowed[:, start:end], (w[:, start:end] / sizes[start:end]).square())
    places = Groups(end - start, 1).ranks(scores)[:, : stop - start]
    left = groups.keep - kept[:, :start].sum(1, keepdim=True) if whole else groups.keep
    kept[:, start:stop] = places < left


def _shrinking(groups: Groups) -> Iterator[int]:
    """How many of a group are kept in each round: fewer and fewer, by the cube of what is left to go."""
    for i in range(ROUNDS):
        rest = max(0.0, 1 - (i + 1) / GROWING_ROUNDS) ** 3
        yield groups.keep + int(rest * (groups.group - groups.keep))


def least_squares(target: Tensor, h: Tensor, kept: Tensor, start: Tensor) -> Tensor:
    """w, zero where not `kept [m, n]`, that makes (w - target) H (w - target)^T of each row least; never worse than
    `start [m, n]`. Conjugate gradients on all rows together; H is definite and has a nearly constant diagonal.
    """
    w = start * kept
    residual = ((target - w) @ h) * kept
    direction = residual.clone()
    square = residual.square().sum(1)
    enough = DESCENT_STOPS * square
    for _ in range(DESCENT_STEPS):
        if bool((square <= enough).all()):
            break
        seen = (direction @ h) * kept
        step = square / (direction * seen).sum(1).clamp_min(1e-30)
        w += step[:, None] * direction
        residual -= step[:, None] * seen
        before, square = square, residual.square().sum(1)
        direction.mul_((square / before.clamp_min(1e-30))[:, None]).add_(residual)
    return w
