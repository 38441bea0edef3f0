from __future__ import annotations

import numpy as np
import pytest
import torch

from ebbflow.daemon.library import encode_bitstack
from ebbflow.daemon.library.encode_bitstack import (
    Level,
    choose_levels,
    choose_rank,
    default_rank,
    encode_matrix,
    row_errors,
    square_root,
)
from ebbflow.daemon.library.gain import second_order_gain
from ebbflow.formats.blocks import sum_blocks, unpack_signs
from ebbflow.formats.container import content_hash
from ebbflow.formats.errors import CorruptCheckpoint, InvalidRequest
from ebbflow.formats.kinds import payload_nbytes

torch.set_num_threads(1)  # beside others on two cores, a second thread waits longer than it works


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moments(n: int, seed: int = 1) -> torch.Tensor:
    x = random(4 * n, n, seed=seed) * (torch.arange(n) % 7 + 1)
    return x.T @ x / len(x)


def encode(weight: torch.Tensor, *, levels: int = 4, rank: int | None = None, seed: int = 0, **own) -> list[Level]:
    m, n = weight.shape
    scale = own.get("scale", torch.ones(n))
    probes = own.get("probes", torch.eye(n))
    rank = choose_rank(m, n, rank)
    return list(encode_matrix("t", weight, scale, probes, uses=("t",), levels=levels, rank=rank, seed=seed))


def rebuilt(levels: list[Level]) -> torch.Tensor:
    return torch.from_numpy(sum_blocks((level.entry, level.payload) for level in levels)["t"])


def relative(weight: torch.Tensor, levels: list[Level]) -> float:
    return float((weight - rebuilt(levels)).norm() / weight.norm())


# -- what is stored -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (3, 172), (15, 15), (172, 65), (64, 576), (200, 300)])
def test_levels_are_valid_blocks_that_come_ever_nearer(shape):
    weight = random(*shape) * 0.02
    levels = encode(weight, levels=5)
    errors = [relative(weight, levels[: k + 1]) for k in range(len(levels))]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2
    for b, level in enumerate(levels):
        entry = level.entry
        assert (entry.kind, entry.tensor, entry.level, entry.shape, entry.uses) == ("signs", "t", b, shape, ("t",))
        assert entry.nbytes == len(level.payload) == payload_nbytes("signs", shape, rank=entry.rank)
        assert entry.hash == content_hash(level.payload)


def test_first_level_is_the_absolute_value_decomposition_of_the_paper():
    """Section 3: the signs of W and the truncated SVD of |W diag(s)|, with 1 / s folded back into V."""
    weight, scale = random(40, 60), random(60, seed=2).abs() + 0.5
    level = encode(weight, levels=1, rank=3, scale=scale)[0]
    positive, u, v = unpack_signs(level.payload, 40, 60, 3)
    assert (torch.from_numpy(positive) == (weight >= 0)).all()
    left, sigma, right = torch.linalg.svd((weight * scale).abs())
    wanted = (left[:, :3] * sigma[:3]) @ right[:3] / scale
    np.testing.assert_allclose(u.astype(np.float32) @ v.astype(np.float32), wanted, rtol=0, atol=2e-3)


def test_residual_is_of_what_was_really_stored():
    """The second level encodes W minus the f16 factors of the first, not minus the exact ones."""
    weight = random(24, 32)
    first, second = encode(weight, levels=2)
    positive = unpack_signs(second.payload, 24, 32, second.entry.rank)[0]
    assert (torch.from_numpy(positive) == (weight - rebuilt([first]) >= 0)).all()


def test_heavy_channels_are_kept_better():
    weight, scale = random(64, 64), torch.ones(64)
    scale[:4] = 100.0
    plain, scaled = rebuilt(encode(weight, levels=2)), rebuilt(encode(weight, levels=2, scale=scale))
    assert (weight - scaled)[:, :4].norm() < 0.8 * (weight - plain)[:, :4].norm()


def test_randomised_decomposition_is_nearly_as_good_as_the_exact_one(monkeypatch):
    weight = random(256, 320)
    fast = encode(weight, levels=4, rank=8)
    monkeypatch.setattr(encode_bitstack, "EXACT_BELOW", 1000)
    exact = encode(weight, levels=4, rank=8)
    assert relative(weight, fast) < 1.03 * relative(weight, exact)


def test_same_seed_same_bytes():
    weight = random(200, 300)
    payloads = [[level.payload for level in encode(weight, levels=2, seed=seed)] for seed in (5, 5, 6)]
    assert payloads[0] == payloads[1] != payloads[2]


# -- nasty matrices -----------------------------------------------------------------------------------------------


def test_all_zero_matrix_needs_one_level():
    levels = encode(torch.zeros(20, 30), levels=5)
    assert len(levels) == 1
    assert not rebuilt(levels).any()


@pytest.mark.parametrize("size", [40, 200])  # exact and randomised
def test_dead_rows_and_columns(size):
    weight = random(size, size)
    weight[3:9], weight[:, 7] = 0, 0
    scale = torch.ones(size)
    scale[7] = 1e-3  # what `calibrate` gives for a channel that is never active
    levels = encode(weight, levels=4, scale=scale)
    assert relative(weight, levels) < 0.25
    assert rebuilt(levels)[3:9].abs().max() < 0.05


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e3, 9e5])
@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e6])
def test_factors_stay_in_the_range_of_f16(size, spread):
    weight, scale = random(48, 64) * size / 5, torch.ones(64)
    scale[:5] = spread
    levels = encode(weight, levels=4, scale=scale)
    assert relative(weight, levels) < (0.5 if size < 1e-5 else 0.25) or spread == 1e6
    assert torch.isfinite(rebuilt(levels)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e7])
def test_insane_weights(bad):
    weight = random(8, 8)
    weight[2, 3] = bad
    with pytest.raises(CorruptCheckpoint, match="t holds a weight of magnitude"):
        encode(weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_insane_activations(bad):
    scale = torch.ones(8)
    scale[2] = bad
    with pytest.raises(CorruptCheckpoint, match="activations that t reads"):
        encode(random(8, 8), scale=scale)


def test_the_weight_itself_is_not_changed():
    weight = random(20, 20)
    before = weight.clone()
    encode(weight)
    assert torch.equal(weight, before)


# -- choices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "n", "rank"),
    [
        (2048, 2048, 8),
        (256, 2048, 1),
        (5632, 2048, 8),
        (512, 512, 2),
        (1280, 512, 2),
        (4096, 4096, 16),
        (9000, 9000, 16),
    ],
)
def test_default_rank_costs_at_most_an_eighth_of_the_signs(m, n, rank):
    assert default_rank(m, n) == rank
    assert rank == 1 or 2 * rank * (m + n) <= m * n / 8 / 8


def test_chosen_rank_and_levels():
    assert [choose_rank(5, 3, wanted) for wanted in (None, 2, 99)] == [1, 2, 3]
    assert [choose_levels(wanted) for wanted in (None, 1, 32)] == [14, 1, 32]
    with pytest.raises(InvalidRequest, match="rank"):
        choose_rank(5, 3, 0)
    for wanted in (0, 33):
        with pytest.raises(InvalidRequest, match="levels"):
            choose_levels(wanted)


# -- errors and gains ---------------------------------------------------------------------------------------------


def test_errors_are_those_of_what_is_stored():
    weight, h = random(10, 24), moments(24)
    levels = encode(weight, probes=square_root(h))
    error = weight.clone()
    for level in levels:
        torch.testing.assert_close(level.before, torch.diag(error @ h @ error.T), rtol=1e-3, atol=1e-4)
        error -= rebuilt([level])
        torch.testing.assert_close(level.after, torch.diag(error @ h @ error.T), rtol=1e-3, atol=1e-4)


def test_gains_of_all_levels_add_up_to_the_whole_drop():
    weight, h, gradient = random(10, 24), moments(24), random(10, seed=3).square()
    levels = encode(weight, probes=square_root(h))
    total = sum(second_order_gain(gradient, level.before, level.after) for level in levels)
    error = weight - rebuilt(levels)
    wanted = 0.5 * (gradient * (torch.diag(weight @ h @ weight.T) - torch.diag(error @ h @ error.T))).sum()
    assert total == pytest.approx(float(wanted), rel=1e-3)


@pytest.mark.parametrize("rows", [3, 40, 4000])  # fewer samples than columns: singular
def test_square_root(rows):
    x = random(rows, 40)
    h = x.T @ x / rows
    root = square_root(h)
    torch.testing.assert_close(root @ root.T, h, rtol=0, atol=1e-2 * float(h.diagonal().mean()))


def test_square_root_of_slightly_indefinite_moments():
    h = moments(30)
    h[0, 0] = -1e-4 * h.diagonal().mean()
    assert torch.isfinite(square_root(h)).all()
    assert square_root(torch.zeros(5, 5)).max() < 1e-15


def test_square_root_of_what_overflowed():
    with pytest.raises(CorruptCheckpoint, match="not finite"):
        square_root(torch.full((4, 4), torch.inf))


def test_wide_square_root_is_right_on_average(monkeypatch):
    monkeypatch.setattr(encode_bitstack, "PROBES", 128)
    h, error = moments(200), random(300, 200)
    root = square_root(h)
    assert root.shape == (200, 128)
    assert float(row_errors(error, root).sum()) == pytest.approx(float(torch.trace(error @ h @ error.T)), rel=0.1)


def test_gain_that_is_no_number():
    with pytest.raises(CorruptCheckpoint, match="not finite"):
        second_order_gain(torch.tensor([torch.inf]), torch.ones(1), torch.zeros(1))
