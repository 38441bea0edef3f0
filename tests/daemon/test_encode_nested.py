from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from ebbflow.daemon.library import encode_nested
from ebbflow.daemon.library.encode_bitstack import Level
from ebbflow.daemon.library.encode_nested import choose_levels, encode_planes, gaussian_codebook, input_metric
from ebbflow.daemon.library.gain import second_order_gain
from ebbflow.formats.blocks import sum_blocks
from ebbflow.formats.container import content_hash
from ebbflow.formats.errors import CorruptCheckpoint, InvalidRequest
from ebbflow.formats.kinds import payload_nbytes

torch.set_num_threads(1)  # beside others on two cores, a second thread waits longer than it works


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moments(n: int, seed: int = 1, samples: float = 4) -> torch.Tensor:
    x = random(max(1, int(samples * n)), n, seed=seed) * (torch.arange(n) % 7 + 1)
    return x.T @ x / len(x)


def encode(weight: torch.Tensor, *, levels: int = 5, h: torch.Tensor | None = None, seed: int = 0) -> list[Level]:
    metric = input_metric(torch.eye(weight.shape[1]) if h is None else h)
    return list(encode_planes("t", weight, metric, uses=("t",), levels=levels, seed=seed))


def rebuilt(levels: list[Level]) -> torch.Tensor:
    return torch.from_numpy(sum_blocks((level.entry, level.payload) for level in levels)["t"])


def relative(weight: torch.Tensor, levels: list[Level]) -> float:
    return float((weight - rebuilt(levels)).norm() / weight.norm())


def errors(weight: torch.Tensor, levels: list[Level]) -> list[float]:
    return [relative(weight, levels[: k + 1]) for k in range(len(levels))]


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (3, 172), (15, 15), (172, 65), (20, 576), (70, 300)])
def test_levels_are_valid_blocks_that_come_ever_nearer(shape):
    weight = random(*shape) * 0.02
    levels = encode(weight)
    found = errors(weight, levels)
    assert all(later < 1.02 * earlier + 1e-2 for earlier, later in pairwise(found))
    assert found[-1] < 0.06
    for k, level in enumerate(levels):
        entry = level.entry
        assert (entry.kind, entry.tensor, entry.level, entry.shape, entry.uses) == ("plane", "t", k, shape, ("t",))
        assert entry.nbytes == len(level.payload) == payload_nbytes("plane", shape, dtype=entry.dtype, level=k)
        assert entry.hash == content_hash(level.payload)


def test_each_plane_quarters_the_squared_error_of_gaussian_weights():
    """Near the best there is: 0.118, 0.0345, 0.0095, 0.0025, 0.00064 for scalar quantisers of 2 to 6 bits."""
    weight = random(200, 256)
    squared = [error**2 for error in errors(weight, encode(weight))]
    assert all(
        found < 1.6 * best for found, best in zip(squared, (0.118, 0.0345, 0.0095, 0.0025, 0.00064), strict=True)
    )


@pytest.mark.parametrize("levels", range(1, 8))
def test_any_number_of_levels(levels):
    weight = random(24, 64)
    found = encode(weight, levels=levels)
    assert len(found) == levels
    assert relative(weight, found) < 0.5 * 0.62 ** (levels - 1)


def test_rows_of_wide_matrices_have_tables_of_their_own(monkeypatch):
    monkeypatch.setattr(encode_nested, "ROW_TABLE_COLUMNS", 16)
    weight = random(40, 128) * random(40, 1, seed=4).exp()
    own = encode(weight)
    assert [level.entry.dtype for level in own] == ["i8"] * 2 + ["i8-shared"] * 3
    monkeypatch.undo()
    shared = encode(weight)
    assert {level.entry.dtype for level in shared} == {"i8-shared"}
    assert errors(weight, own)[0] < errors(weight, shared)[0]
    assert errors(weight, own)[-1] < 0.06


def test_error_is_kept_out_of_the_directions_that_matter():
    weight, h = random(64, 96), moments(96, samples=0.5)
    ours, blind = encode(weight, h=h), encode(weight)
    for k in range(1, 6):
        error, plain = weight - rebuilt(ours[:k]), weight - rebuilt(blind[:k])
        assert torch.trace(error @ h @ error.T) < 0.8 * torch.trace(plain @ h @ plain.T)


def test_descent_helps_at_every_depth(monkeypatch):
    weight, h = random(64, 128), moments(128)
    after = [float(level.after.sum()) for level in encode(weight, h=h)]
    monkeypatch.setattr(encode_nested, "SWEEPS", 0)
    without = [float(level.after.sum()) for level in encode(weight, h=h)]
    assert all(a < b for a, b in zip(after, without, strict=True))


def test_same_seed_same_bytes_whatever_the_threads(monkeypatch):
    weight, h = random(70, 96), moments(96)
    payloads = [[level.payload for level in encode(weight, h=h, seed=seed)] for seed in (5, 5, 6)]
    assert payloads[0] == payloads[1] != payloads[2]


def test_rows_worked_on_in_parts_are_the_same(monkeypatch):
    weight, h = random(50, 96), moments(96)
    whole = rebuilt(encode(weight, h=h))
    monkeypatch.setattr(encode_nested, "ROWS_AT_ONCE", 16)
    torch.testing.assert_close(rebuilt(encode(weight, h=h)), whole, rtol=0.1, atol=0.2)


def test_the_codebook_is_a_tree_for_gaussian_numbers():
    heap = gaussian_codebook(3)
    np.testing.assert_allclose(heap[2:4], [-0.798, 0.798], atol=1e-3)
    for node in range(2, 8):
        assert heap[2 * node] < heap[node] < heap[2 * node + 1]


# -- nasty matrices -----------------------------------------------------------------------------------------------


def test_all_zero_matrix():
    assert not rebuilt(encode(torch.zeros(20, 30))).any()


def test_no_activations_at_all():
    weight = random(20, 30)
    assert relative(weight, encode(weight, h=torch.zeros(30, 30))) < 0.06


@pytest.mark.parametrize("samples", [0, 1])  # 0: one sample, a matrix of rank one
def test_singular_moments(samples):
    weight = random(20, 172)
    h = moments(172, samples=0) if samples == 0 else moments(172)
    assert relative(weight, encode(weight, h=h)) < 0.12


def test_slightly_indefinite_moments():
    h = moments(30)
    h[0, 0] = -1e-4 * h.diagonal().mean()
    assert relative(random(10, 30), encode(random(10, 30), h=h)) < 0.2


def test_dead_rows_and_columns():
    weight, h = random(40, 172), moments(172)
    weight[3:9], weight[:, 7] = 0, 0
    h[7], h[:, 7] = 0, 0
    found = encode(weight, h=h)
    assert relative(weight, found) < 0.15
    assert not rebuilt(found)[3:9].any()


def test_one_weight_a_hundred_times_its_row():
    weight = random(30, 576)
    weight[4, 77] = 100 * weight[4].square().mean().sqrt()
    found = rebuilt(encode(weight))
    assert found[4, 77] == pytest.approx(float(weight[4, 77]), rel=0.05)
    others = torch.arange(30) != 4
    assert (found - weight)[others].norm() < 0.06 * weight[others].norm()


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e3, 1e5])
@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e6])
def test_any_size_of_weights_and_activations(size, spread):
    weight, h = random(20, 64) * size, moments(64) * spread
    found = encode(weight, h=h)
    assert relative(weight, found) < 0.1
    assert all(torch.isfinite(level.after).all() for level in found)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e7])
def test_insane_weights(bad):
    weight = random(8, 8)
    weight[2, 3] = bad
    with pytest.raises(CorruptCheckpoint, match="t holds a weight of magnitude"):
        encode(weight)


def test_insane_activations():
    with pytest.raises(CorruptCheckpoint, match="not finite"):
        input_metric(torch.full((4, 4), torch.inf))


def test_the_weight_itself_is_not_changed():
    weight = random(20, 20)
    before = weight.clone()
    encode(weight)
    assert torch.equal(weight, before)


def test_chosen_levels():
    assert [choose_levels(wanted) for wanted in (None, 1, 7)] == [5, 1, 7]
    for wanted in (0, 8):
        with pytest.raises(InvalidRequest, match="levels"):
            choose_levels(wanted)


# -- errors and gains ---------------------------------------------------------------------------------------------


def test_errors_are_those_of_what_is_stored():
    weight, h = random(10, 24), moments(24)
    levels = encode(weight, h=h)
    error = weight
    for k, level in enumerate(levels):
        torch.testing.assert_close(level.before, torch.diag(error @ h @ error.T), rtol=1e-3, atol=1e-4)
        error = weight - rebuilt(levels[: k + 1])
        torch.testing.assert_close(level.after, torch.diag(error @ h @ error.T), rtol=1e-3, atol=1e-4)


def test_gains_of_all_levels_add_up_to_the_whole_drop():
    weight, h, gradient = random(10, 24), moments(24), random(10, seed=3).square()
    levels = encode(weight, h=h)
    total = sum(second_order_gain(gradient, level.before, level.after) for level in levels)
    error = weight - rebuilt(levels)
    wanted = 0.5 * (gradient * (torch.diag(weight @ h @ weight.T) - torch.diag(error @ h @ error.T))).sum()
    assert total == pytest.approx(float(wanted), rel=1e-3)
