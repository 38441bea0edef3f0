from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ebbflow.daemon.engine.dense import DenseAttention, build_network
from ebbflow.daemon.library import add, texts
from ebbflow.daemon.library import prune as prune_module
from ebbflow.daemon.library.add import add_model
from ebbflow.daemon.library.calibrate import layer_moments
from ebbflow.daemon.library.encode import expected_nbytes
from ebbflow.daemon.library.encode_bitstack import Level
from ebbflow.daemon.library.encode_sparse import (
    SparsePlan,
    Zeros,
    choose_levels,
    encode_tiers,
    find_zeros,
    round_values,
    tier_counts,
    tier_nbytes,
)
from ebbflow.daemon.library.gain import second_order_gain
from ebbflow.daemon.library.measure import measure_curve
from ebbflow.daemon.library.prune import Groups, Inputs, inputs_of, least_squares, objective, prune, wanda_scores
from ebbflow.daemon.library.synthetic import write_checkpoint
from ebbflow.formats.architecture import Architecture, weight_shapes
from ebbflow.formats.blocks import sum_blocks, unpack_mask, unpack_values
from ebbflow.formats.checkpoint import Checkpoint, open_checkpoint, source_name
from ebbflow.formats.container import content_hash
from ebbflow.formats.errors import CorruptCheckpoint, InvalidRequest, Unsupported
from ebbflow.formats.kinds import payload_nbytes
from ebbflow.formats.manifest import STACK, Manifest, read_manifest
from ebbflow.formats.messages import AddModel, Progress
from ebbflow.formats.pruning import METHODS, PATTERNS, VALUES, Pruning
from ebbflow.formats.stack import Stack, read_blocks, read_stack

from support.residents import load, logits, move

torch.set_num_threads(1)  # beside others on two cores, a second thread waits longer than it works

methods = pytest.mark.parametrize("method", METHODS)
kinds = pytest.mark.parametrize("values", VALUES)
groupings = pytest.mark.parametrize(
    "groups", [Groups(64, 32), Groups(64, 7), Groups(64, 64), Groups(4, 2), Groups(8, 4)]
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(n: int, seed: int = 1) -> Inputs:
    """Inputs of few directions, of which no channel is free of any."""
    x = random(4 * n, n, seed=seed) * 0.9 ** torch.arange(n) @ random(n, n, seed=seed + 1)
    return inputs_of(x.T @ x / len(x))


def encode(weight: torch.Tensor, *, levels: int = 3, zeros: Zeros | None = None, **options) -> list[Level]:
    plan = SparsePlan(Pruning(**options), zeros)
    inputs = correlated(weight.shape[1])
    return list(encode_tiers("t", weight, inputs, plan, uses=("t",), levels=levels))


def rebuilt(levels: list[Level]) -> torch.Tensor:
    return torch.from_numpy(sum_blocks((level.entry, level.payload) for level in levels)["t"])


def counts(kept: torch.Tensor, group: int) -> set[int]:
    return set(kept.unflatten(1, (-1, group)).sum(2).flatten().tolist())


# -- which weights stay -------------------------------------------------------------------------------------------


@methods
@groupings
def test_every_group_of_every_row_keeps_as_many(method, groups):
    weight = random(20, 64)
    found = prune(weight, correlated(64), groups, method)
    assert counts(found.kept, groups.group) == {groups.keep}
    assert not found.weight[~found.kept].any()
    if method not in ("admm", "sparsegpt"):  # which change what stays
        assert torch.equal(found.weight[found.kept], weight[found.kept])


@methods
def test_a_row_does_not_depend_on_the_others(method):
    weight, inputs, groups = random(9, 64), correlated(64), Groups(64, 20)
    whole = prune(weight, inputs, groups, method)
    for rows in (slice(0, 4), slice(4, 9)):
        part = prune(weight[rows], inputs, groups, method)
        assert torch.equal(part.kept, whole.kept[rows])
        torch.testing.assert_close(part.weight, whole.weight[rows], rtol=1e-3, atol=1e-4)


def test_magnitude_and_wanda_are_what_they_are_called():
    weight, inputs = random(6, 32), correlated(32)
    for method, scores in (("magnitude", weight.abs()), ("wanda", weight.abs() * inputs.h.diagonal().sqrt())):
        kept = prune(weight, inputs, Groups(32, 10), method).kept
        for row, mask in zip(scores, kept, strict=True):
            assert set(mask.nonzero()[:, 0].tolist()) == set(row.argsort(descending=True)[:10].tolist())


@pytest.mark.parametrize("groups", [Groups(64, 32), Groups(64, 13), Groups(4, 2), Groups(8, 4)])
def test_frank_wolfe_is_never_worse_than_wanda_in_any_row_and_better_in_all(groups):
    weight, inputs = random(64, 64), correlated(64)
    start, found = (prune(weight, inputs, groups, method).weight for method in ("wanda", "frankwolfe"))
    before, after = objective(weight - start, inputs.h), objective(weight - found, inputs.h)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.97 * before.sum()
    assert (after < 0.99 * before).float().mean() > 0.2


def test_frank_wolfe_on_inputs_that_have_nothing_to_do_with_each_other_is_wanda():
    """The objective falls apart into one square for each weight, and Wanda's top k is the best there is."""
    weight, inputs = random(16, 64), inputs_of(torch.diag(random(64, seed=3).square() + 0.1))
    start, found = (prune(weight, inputs, Groups(64, 32), method).kept for method in ("wanda", "frankwolfe"))
    assert torch.equal(start, found)


@pytest.mark.parametrize("groups", [Groups(64, 32), Groups(64, 20), Groups(4, 2), Groups(8, 4)])
def test_reconstruction_is_far_better_than_wanda_on_correlated_inputs(groups):
    weight, inputs = random(48, 64), correlated(64)
    errors = {
        method: float(objective(weight - prune(weight, inputs, groups, method).weight, inputs.h).sum())
        for method in METHODS
    }
    assert errors["admm"] < 0.3 * errors["frankwolfe"]
    assert errors["admm"] < errors["sparsegpt"] < 0.5 * errors["wanda"]
    assert errors["frankwolfe"] < errors["wanda"]


def one_pass(row: np.ndarray, h: np.ndarray, groups: Groups, block: int) -> np.ndarray:
    """SparseGPT from its definition: what goes takes the best change of all columns after it along, whose inverse is
    made anew for every column.
    """
    row, n = row.copy(), len(row)
    kept = np.zeros(n, bool)
    for start in range(0, n, block if groups.group == n else groups.group):
        stop = min(n, start + (block if groups.group == n else groups.group))
        end, left = (n, groups.keep - kept.sum()) if groups.group == n else (stop, groups.keep)
        inverses = [np.linalg.inv(h[j:, j:]) for j in range(start, end)]
        scores = [row[j] ** 2 / inverses[j - start][0, 0] for j in range(start, end)]
        best = start + np.argsort(scores)[::-1][:left]
        kept[best[best < stop]] = True
        for j in range(start, stop):
            if not kept[j]:
                row[j:] -= row[j] / inverses[j - start][0, 0] * inverses[j - start][0]
                row[j] = 0
    return row


@pytest.mark.parametrize("groups", [Groups(40, 20), Groups(40, 9), Groups(4, 2), Groups(8, 4)])
def test_sparsegpt_is_its_own_definition(groups, monkeypatch):
    """More columns than are decided together, which do not divide them."""
    monkeypatch.setattr(prune_module, "BLOCK", 16)
    weight, inputs = random(12, 40), correlated(40)
    found = prune(weight, inputs, groups, "sparsegpt")
    h, norms = inputs.scaled.double().numpy(), inputs.norms.double().numpy()
    for row, got in zip(weight.double().numpy(), found.weight, strict=True):
        wanted = one_pass(row * norms, h, groups, 16) / norms
        np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())


def test_least_squares_is_the_solution_of_the_normal_equations():
    inputs, target, kept = correlated(40), random(5, 40), random(5, 40, seed=7) > 0
    found = least_squares(target, inputs.scaled, kept, torch.zeros_like(target))
    assert not found[~kept].any()
    for row, mask, want in zip(found, kept, target, strict=True):
        h = inputs.scaled.double()
        exact = torch.linalg.solve(h[mask][:, mask], h[mask] @ want.double())
        torch.testing.assert_close(row[mask].double(), exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))


@methods
def test_what_is_forbidden_stays_zero_and_groups_are_filled_up_with_it(method):
    weight, allowed = random(12, 64), random(12, 64, seed=9) > 0.8
    found = prune(weight * allowed, correlated(64), Groups(8, 4), method, allowed)
    assert counts(found.kept, 8) == {4}
    assert not found.weight[~allowed].any()
    few = allowed.unflatten(1, (-1, 8)).sum(2, keepdim=True) <= 4
    assert found.kept[(allowed.unflatten(1, (-1, 8)) & few).flatten(1)].all()


def test_channels_that_are_never_active_are_pruned_first():
    h = correlated(64).h.clone()
    h[:, ::2], h[::2] = 0, 0
    for method in METHODS[1:]:
        assert not prune(random(8, 64), inputs_of(h), Groups(64, 32), method).kept[:, ::2].any()


def test_moments_that_are_no_numbers():
    with pytest.raises(CorruptCheckpoint, match="not finite"):
        inputs_of(torch.full((3, 3), torch.nan))


# -- what is stored -----------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (3, 172), (65, 64), (20, 129)])
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_blocks_are_valid_and_read_back_as_what_errors_were_told_of(values, shape, levels):
    weight = random(*shape) * 0.02
    m, n = shape
    found = encode(weight, values=values, levels=levels)
    plan, inputs = SparsePlan(Pruning(values=values)), correlated(n)
    tiers = tier_counts(n, plan.groups("t", n), levels)
    assert len(found) == 2 * len(tiers)
    before, scale = torch.zeros(shape, dtype=torch.bool), None
    for i, level in enumerate(found):
        entry, filled = level.entry, int(before[0].sum())
        assert (entry.kind, entry.level, entry.tensor, entry.uses) == (("mask", "values")[i % 2], i // 2, "t", ("t",))
        assert entry.hash == content_hash(level.payload)
        assert entry.nbytes == len(level.payload)
        assert entry.nbytes == payload_nbytes(
            entry.kind, shape, dtype=entry.dtype, rank=entry.rank, level=entry.level, filled=filled
        )
        if entry.kind == "mask":
            tier = torch.from_numpy(unpack_mask(level.payload, m, n, before.numpy()))
            assert not (tier & before).any()
            assert torch.equal(level.before, level.after)
            continue
        numbers, scale = unpack_values(entry, level.payload, scale)
        assert numbers.shape == (m, int(tier[0].sum()))
        before |= tier
        assert counts(before, n) == {tiers[entry.level]}
        left = objective(weight - rebuilt(found[: i + 1]), inputs.h)
        torch.testing.assert_close(level.after, left, rtol=1e-4, atol=1e-7)
    assert [level.entry.nbytes for level in found] == tier_nbytes(m, n, plan.groups("t", n), levels, values)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_hold_at_every_tier(pattern):
    keep, group = PATTERNS[pattern]
    found = encode(random(12, 64), pattern=pattern)
    tiers = tier_counts(64, Groups(group, keep), 3)
    assert tiers == {2: (1, 2), 4: (2, 3, 4)}[keep]
    for level, count in enumerate(tiers):
        assert counts(rebuilt(found[: 2 * level + 2]) != 0, group) <= set(range(count + 1))
        assert found[2 * level].entry.rank == (count - (tiers[level - 1] if level else 0)) * 64 // group
    assert max(counts(rebuilt(found) != 0, group)) == keep


def test_tiers_take_the_important_weights_first():
    weight, inputs = random(16, 64), correlated(64)
    found = encode(weight, method="wanda", values="f16")
    tiers = [rebuilt(found[: 2 * i + 2]) != 0 for i in range(3)]
    scores = wanda_scores(weight, inputs)
    for smaller, larger in pairwise(tiers):
        fresh = larger & ~smaller
        assert (smaller <= larger).all()
        for row in range(len(weight)):
            assert scores[row][smaller[row]].min() >= 0.999 * scores[row][fresh[row]].max()


def test_errors_fall_with_every_tier_and_gains_are_of_values_alone():
    found = encode(random(32, 64))
    gains = [second_order_gain(torch.ones(32), level.before, level.after) for level in found]
    assert gains[::2] == [0, 0, 0]
    assert min(gains[1::2]) > 0


def test_values_are_rounded_to_the_nearest_and_the_scale_may_clip_where_that_is_better():
    inputs, value = correlated(64), random(32, 64)
    value[:, ::2] = 0
    exact = round_values(value, inputs, "f16").weight
    torch.testing.assert_close(exact, value, rtol=1e-3, atol=1e-6)
    eight = round_values(value, inputs, "i8")
    assert float((eight.weight - value).norm() / value.norm()) < 0.01
    four = round_values(value, inputs, "i4")
    widest = value.abs().amax(1)
    plain = (value / (widest / 7)[:, None]).round() * (widest / 7)[:, None]
    energy = inputs.norms.square()
    assert ((four.weight - value).square() * energy).sum() < 0.95 * ((plain - value).square() * energy).sum()
    assert not eight.weight[:, ::2].any() and not four.weight[:, ::2].any()


@kinds
def test_all_zero_matrix_and_tiny_and_huge_rows(values):
    assert not rebuilt(encode(torch.zeros(5, 64), values=values)).any()
    weight = random(3, 64) * torch.tensor([1e-30, 0, 1e3])[:, None]
    found = rebuilt(encode(weight, values=values, method="wanda"))
    assert not found[1].any()
    assert float((found[2] - weight[2]).norm() / weight[2].norm()) < 0.5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e7])
def test_weights_beyond_all_sense(bad):
    weight = random(4, 8)
    weight[1, 2] = bad
    with pytest.raises(CorruptCheckpoint, match="at most"):
        encode(weight)


def test_the_same_bytes_again():
    first, second = (encode(random(40, 64), method="admm") for _ in range(2))
    assert [level.payload for level in first] == [level.payload for level in second]


def test_levels_that_make_no_sense():
    assert [choose_levels(wanted) for wanted in (None, 1, 4)] == [3, 1, 4]
    for wanted in (0, -1, 5):
        with pytest.raises(InvalidRequest, match=f"between 1 and 4, not {wanted}"):
            choose_levels(wanted)


@pytest.mark.parametrize("groups", [Groups(2048, keep) for keep in (1, 2, 3, 7, 256, 1000)] + [Groups(8, 4)])
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_tiers_grow_to_the_whole(groups, levels):
    found = tier_counts(2048, groups, levels)
    assert list(found) == sorted(set(found))
    assert 1 <= len(found) <= levels
    assert (min(found) >= 1, found[-1]) == (True, groups.keep)


@pytest.mark.parametrize(
    ("n", "groups", "wanted"),
    [
        (2048, Groups(2048, 819), (384, 640, 819)),  # not 410 and 614
        (100, Groups(100, 66), (36, 50, 66)),  # not 33; 64 positions are left, and there are no other 64
        (172, Groups(172, 52), (26, 44, 52)),  # 44 is far from 26
        (512, Groups(8, 4), (2, 3, 4)),
        (96, Groups(8, 4), (2, 3, 4)),  # 72 and 60 positions
        (96, Groups(4, 2), (1, 2)),
        (40, Groups(40, 20), (10, 15, 20)),
    ],
)
def test_cuts_leave_whole_words_of_positions_where_they_can(n, groups, wanted):
    assert tier_counts(n, groups, 3) == wanted


# -- a whole model ------------------------------------------------------------------------------------------------

SHAPE = Architecture(
    family="llama", vocab=258, hidden=64, layers=2, heads=2, kv_heads=1, head_dim=32, intermediate=96, context=64,
    norm_eps=1e-5, rotary_theta=1e4,
)  # fmt: skip
LINEARS = {name: shape for name, shape in weight_shapes(SHAPE).items() if "layers" in name and len(shape) == 2}


class Place:
    """A checkpoint, and the library it is added to."""

    def __init__(self, root: Path) -> None:
        self.source, self.library, self.cache = root / "source", root / "library", root / "cache"
        self.told: list[Progress] = []

    def write(self, prune_to: float = 0.0, shape: Architecture = SHAPE) -> None:
        """Random weights; the smallest `prune_to` of every linear become zero."""
        write_checkpoint(shape, self.source)
        path = self.source / "model.safetensors"
        stored = {name: value if value.ndim == 1 else 10 * value for name, value in load_file(path).items()}
        for name in LINEARS:
            weight = stored[source_name(name)]
            least = weight.float().abs().flatten().kthvalue(max(1, int(prune_to * weight.numel()))).values
            stored[source_name(name)] = weight * (weight.abs() > least) if prune_to else weight
        save_file(stored, path, {"format": "pt"})

    def add(self, **options) -> tuple[Stack, Manifest]:
        self.told = []
        request = AddModel(id=1, source=str(self.source), name="m", codec="sparse", **options)
        add_model(request, self.library, self.cache, self.told.append, clock=iter(range(10**9)).__next__)
        return read_stack(self.library / "m" / STACK), read_manifest(self.library / "m")

    @property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.source)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    monkeypatch.setattr(texts, "STREAMS", 16)
    monkeypatch.setattr(texts, "LENGTH", 32)
    monkeypatch.setattr(add, "CURVE_POINTS", 4)
    return Place(tmp_path)


def weights_of(stack: Stack, count: int | None = None) -> dict[str, torch.Tensor]:
    blocks = read_blocks(stack, range(len(stack.blocks) if count is None else count))
    return {name: torch.from_numpy(weight) for name, weight in sum_blocks(blocks).items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sparsity": 0.7, "method": "wanda", "values": "i4", "levels": 4},
        {"pattern": "2:4", "method": "frankwolfe", "values": "f16"},
        {"pattern": "4:8", "method": "magnitude", "order": "paper"},
    ],
)
def test_adds_a_model(place, options):
    place.write()
    stack, manifest = place.add(seed=3, **options)
    pruning = Pruning(**{key: options[key] for key in ("sparsity", "pattern", "method", "values") if key in options})
    assert manifest.codec == "sparse"
    assert manifest.options == {
        "levels": options.get("levels", 3),
        "sparsity": pruning.wanted,
        **({"pattern": pruning.pattern} if pruning.pattern else {}),
        "method": pruning.method,
        "values": pruning.values,
        "order": options.get("order", "gain"),
        "calibration": "sampled",
        "seed": 3,
    }
    found, checkpoint = weights_of(stack), place.checkpoint
    assert set(found) == set(weight_shapes(SHAPE))
    for name, (_, n) in LINEARS.items():
        groups = SparsePlan(pruning).groups(name, n)
        assert max(counts(found[name] != 0, groups.group)) <= groups.keep
        assert float((found[name] != 0).float().mean()) > 0.9 * groups.keep / groups.group
    for name in ("embed", "head"):
        assert float((found[name] - checkpoint.tensor(name)).norm() / checkpoint.tensor(name).norm()) < 0.1
    assert {entry.kind for entry in stack.blocks} == {"mask", "values", "plane", "dense"}
    curve = manifest.curve
    assert [point.blocks for point in curve][::3] == [stack.base, len(stack.blocks)]
    assert curve[-1].kl < curve[0].kl
    most = expected_nbytes(SHAPE, "sparse", options.get("levels", 3), None, SparsePlan(pruning))
    assert 0.99 * most <= stack.nbytes <= most


def test_masks_come_right_before_their_values_and_the_base_has_both(place):
    place.write()
    stack, _ = place.add(levels=4)
    for i, entry in enumerate(stack.blocks):
        if entry.kind == "mask":
            after = stack.blocks[i + 1]
            assert (after.kind, after.tensor, after.level) == ("values", entry.tensor, entry.level)
            assert (entry.gain, after.gain > 0) == (0, True)
    assert {entry.tensor for entry in stack.blocks[: stack.base]} == set(weight_shapes(SHAPE))
    assert stack.blocks[stack.base - 1].kind != "mask"


def test_a_prefix_is_a_sparser_model_and_a_mask_alone_changes_nothing(place):
    place.write()
    stack, _ = place.add()
    checkpoint = place.checkpoint
    tokens = torch.randint(0, 258, (4, 32), generator=torch.Generator().manual_seed(0))
    mask = next(i for i in range(stack.base, len(stack.blocks)) if stack.blocks[i].kind == "mask")
    points = measure_curve(checkpoint, stack, tokens, [mask, mask + 1, mask + 2, len(stack.blocks)])
    assert points[0].kl == points[1].kl != points[2].kl
    name = stack.blocks[mask].tensor
    smaller, larger = weights_of(stack, mask + 1)[name], weights_of(stack, mask + 2)[name]
    assert torch.equal(larger[smaller != 0], smaller[smaller != 0])
    assert (larger != 0).sum() > (smaller != 0).sum()


def test_each_linear_is_pruned_for_its_own_inputs(place):
    """Of the original model: the same masks and values as from moments measured here."""
    place.write()
    stack, _ = place.add(method="admm", values="f16")
    found, checkpoint = weights_of(stack), place.checkpoint
    tokens = torch.from_numpy(np.load(next((place.cache / "calibration").glob("*.npy"))).astype(np.int64))
    for _, linears in layer_moments(checkpoint, texts.split(tokens).calibration):
        for name, moments in linears.items():
            inputs = inputs_of(moments.inputs)
            weight = checkpoint.tensor(name)
            wanted = prune(weight, inputs, SparsePlan(Pruning()).groups(name, weight.shape[1]), "admm").weight
            torch.testing.assert_close(found[name], wanted, rtol=2e-2, atol=2e-3 * float(wanted.abs().max()))


@kinds
def test_what_was_added_serves_and_resizes(place, values):
    """Tiers beside planes: as the dense reading of the same blocks, at every size, and on the way back too."""
    place.write()
    stack, _ = place.add(values=values)
    tokens = np.random.default_rng(0).integers(0, SHAPE.vocab, 40).tolist()
    sizes = [stack.base, (stack.base + len(stack.blocks)) // 2, len(stack.blocks)]
    resident, found = load(place.library / "m", sizes[0]), {}
    for count in (*sizes, *sizes[::-1]):
        move(resident, count)
        resident.check_integrity()
        served = logits(resident, tokens, SHAPE, exact=True)
        np.testing.assert_array_equal(served, found.setdefault(count, served))
    for count in sizes:
        weights = weights_of(stack, count)
        network = build_network(SHAPE, weights.__getitem__)
        expected = network.head(network.forward(torch.tensor(tokens), DenseAttention(SHAPE, 1, len(tokens)))).numpy()
        np.testing.assert_allclose(found[count], expected, rtol=0, atol=1e-4 * float(np.abs(expected).max()))
    resident.close()


# -- a checkpoint that was pruned before --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["wanda", "admm"])
def test_a_pruned_checkpoint_keeps_its_own_zeros_and_all_else(place, method):
    place.write(prune_to=0.6)
    stack, manifest = place.add(method=method, values="f16")
    assert manifest.options["sparsity"] == "as it came"
    assert manifest.options["kept"] == "the checkpoint's own zeros, 60% of its linears"
    assert any("keeping the checkpoint's own zeros, 60%" in progress.stage for progress in place.told)
    found = weights_of(stack)
    for name in LINEARS:
        original = place.checkpoint.tensor(name)
        assert torch.equal(found[name] != 0, original != 0)
        torch.testing.assert_close(found[name], original, rtol=2e-3, atol=1e-4)


@methods
def test_a_pruned_checkpoint_is_pruned_further_when_asked(place, method):
    place.write(prune_to=0.4)
    stack, manifest = place.add(method=method, sparsity=0.75)
    assert (manifest.options["sparsity"], "40%" in str(manifest.options["kept"])) == (0.75, True)
    found = weights_of(stack)
    for name, (_, n) in LINEARS.items():
        assert not found[name][place.checkpoint.tensor(name) == 0].any()
        assert max(counts(found[name] != 0, n)) <= round(0.25 * n)


def test_fewer_zeros_than_there_are_asks_for_nothing(place):
    """A sparsity of 0.1 would store zeros of a checkpoint that has 60 %."""
    place.write(prune_to=0.6)
    stack, _ = place.add(method="wanda", sparsity=0.1)
    pruning = Pruning(0.1)
    zeros = find_zeros(place.checkpoint, LINEARS, pruning)
    assert zeros is not None
    for name, (_, n) in LINEARS.items():
        stored = sum(entry.rank for entry in stack.blocks if entry.tensor == name and entry.kind == "values")
        most = int((place.checkpoint.tensor(name) != 0).sum(1).max())
        assert stored == zeros.most[name] == most <= SparsePlan(pruning).groups(name, n).keep


def test_a_few_zeros_are_chance(place):
    place.write(prune_to=0.2)
    assert find_zeros(place.checkpoint, LINEARS, Pruning()) is None


# -- what cannot be asked -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"sparsity": 0.0}, InvalidRequest, "above 0 and below 1, not 0.0"),
        ({"sparsity": 1.0}, InvalidRequest, "above 0 and below 1, not 1.0"),
        ({"sparsity": -0.5}, InvalidRequest, "above 0 and below 1"),
        ({"sparsity": float("nan")}, InvalidRequest, "above 0 and below 1"),
        ({"pattern": "3:5"}, Unsupported, "2:4, 4:8"),
        ({"pattern": "2:4", "sparsity": 0.6}, InvalidRequest, "one of the two"),
        ({"method": "obs"}, Unsupported, "magnitude, wanda, admm, sparsegpt, frankwolfe"),
        ({"values": "i2"}, Unsupported, "i8, f16, i4"),
        ({"rank": 4}, InvalidRequest, "the codec sparse has none"),
        ({"levels": 9}, InvalidRequest, "between 1 and 4"),
        ({"codec": "nested", "sparsity": 0.5}, InvalidRequest, "sparsity belong.* codec sparse; the codec nested"),
        ({"codec": "bitstack", "pattern": "2:4", "values": "i8"}, InvalidRequest, "pattern and values"),
    ],
)
def test_options_that_make_no_sense(place, options, error, said):
    place.write()
    with pytest.raises(error, match=said):
        request = AddModel(id=1, source=str(place.source), name="m", **{"codec": "sparse", **options})
        add_model(request, place.library, place.cache, lambda progress: None)
    assert not (place.library / "m").exists()


def test_a_pattern_that_does_not_divide_a_width(place):
    shape = Architecture(
        family="llama", vocab=258, hidden=64, layers=1, heads=2, kv_heads=1, head_dim=32, intermediate=100, context=64,
        norm_eps=1e-5, rotary_theta=1e4,
    )  # fmt: skip
    write_checkpoint(shape, place.source)
    with pytest.raises(InvalidRequest, match=r"4:8 does not divide the 100 columns of layers\.0\.down"):
        place.add(pattern="4:8")
    stack, _ = place.add(pattern="2:4", method="wanda")
    assert counts(weights_of(stack)["layers.0.down"] != 0, 4) <= {0, 1, 2}
