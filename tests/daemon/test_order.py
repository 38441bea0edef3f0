from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.daemon.library.order import Candidate, Order, order_entries, stack_order
from ebbflow.formats.architecture import Architecture
from ebbflow.formats.errors import Unsupported
from ebbflow.formats.index import BlockEntry

gains = st.floats(-10, 1000, allow_nan=False) | st.integers(0, 3).map(float)


@st.composite
def models(draw) -> list[Candidate]:
    candidates = []
    for i in range(draw(st.integers(1, 4))):
        for level in range(draw(st.integers(1, 4))):
            candidates.append(Candidate(f"t{i}", level, 64 * draw(st.integers(1, 5)), draw(gains)))
    return candidates


def levels_in_order(candidates: list[Candidate], order: Order) -> bool:
    seen: dict[str, int] = {}
    for i in order.positions:
        tensor, level = candidates[i].tensor, candidates[i].level
        if level != seen.get(tensor, 0):
            return False
        seen[tensor] = level + 1
    return True


@given(models(), st.sampled_from(["gain", "paper"]))
def test_everything_once_levels_in_order_base_first(candidates, rule):
    order = stack_order(candidates, rule)
    assert sorted(order.positions) == list(range(len(candidates)))
    assert levels_in_order(candidates, order)
    base = order.positions[: order.base]
    assert list(base) == [i for i, c in enumerate(candidates) if c.level == 0]  # in network order


@given(models())
def test_no_choice_of_the_same_bytes_gains_more_at_the_edge_of_a_group(candidates):
    """The greedy prefix beats every other allowed set of blocks that is no larger, wherever worth per byte falls."""
    order = stack_order(candidates)
    best = _best_gains(candidates)
    nbytes, gain = 0, 0.0
    rest = order.positions[order.base :]
    groups = _groups(candidates, rest)
    for group in groups:
        if sum(candidates[i].gain for i in group) <= 0:
            break
        nbytes += sum(candidates[i].nbytes for i in group)
        gain += sum(candidates[i].gain for i in group)
        assert gain >= max(g for n, g in best if n <= nbytes) - 1e-6


def _groups(candidates: list[Candidate], positions: tuple[int, ...]) -> list[list[int]]:
    """Cut where all that may follow is worth less per byte than all that precedes: found by brute force."""
    cuts = [0]
    for k in range(1, len(positions)):
        left = [_worth(candidates, positions[j:k]) for j in range(cuts[-1], k)]
        right = [_worth(candidates, positions[k:j]) for j in range(k + 1, len(positions) + 1)]
        if min(left) > max(right):
            cuts.append(k)
    return [list(positions[a:b]) for a, b in itertools.pairwise([*cuts, len(positions)])]


def _worth(candidates: list[Candidate], positions: tuple[int, ...]) -> float:
    return sum(candidates[i].gain for i in positions) / sum(candidates[i].nbytes for i in positions)


def _best_gains(candidates: list[Candidate]) -> list[tuple[int, float]]:
    """Bytes and gain of every allowed set of later levels."""
    tensors: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        if candidate.level:
            tensors.setdefault(candidate.tensor, []).append(candidate)
    prefixes = [[levels[:k] for k in range(len(levels) + 1)] for levels in tensors.values()]
    chosen = [list(itertools.chain(*sets)) for sets in itertools.product(*prefixes)]
    return [(sum(c.nbytes for c in blocks), sum(c.gain for c in blocks)) for blocks in chosen]


def test_greedy_by_gain_per_byte():
    candidates = [
        Candidate("a", 0, 64, 0.0),
        Candidate("a", 1, 64, 1.0),
        Candidate("b", 0, 64, 0.0),
        Candidate("b", 1, 256, 8.0),
        Candidate("b", 2, 64, 1.5),
    ]
    assert stack_order(candidates) == Order(2, (0, 2, 3, 4, 1))


def test_a_poor_level_before_a_rich_one_is_weighed_with_it():
    candidates = [
        Candidate("a", 0, 64, 0.0),
        Candidate("a", 1, 64, 0.0),  # worth nothing by itself
        Candidate("a", 2, 64, 10.0),
        Candidate("b", 0, 64, 0.0),
        Candidate("b", 1, 64, 4.0),
        Candidate("b", 2, 64, 6.0),
        Candidate("b", 3, 64, 4.5),
    ]
    # b1 and b2 together equal a1 and a2: the network's order decides. b3 alone is worth less.
    assert stack_order(candidates) == Order(2, (0, 3, 1, 2, 4, 5, 6))


def test_paper_finishes_a_level_before_the_next():
    candidates = [
        Candidate("a", 0, 64, 0.0),
        Candidate("a", 1, 64, 1.0),
        Candidate("a", 2, 64, 100.0),
        Candidate("b", 0, 64, 0.0),
        Candidate("b", 1, 64, 2.0),
        Candidate("b", 2, 64, 1.0),
    ]
    assert stack_order(candidates, "paper") == Order(2, (0, 3, 4, 1, 2, 5))


@pytest.mark.parametrize("rule", ["gain", "paper"])
def test_a_mask_stays_with_its_values_even_where_they_do_harm(rule):
    candidates = [
        Candidate("a", 0, 64, 0.0),
        Candidate("a", 0, 64, 1.0),
        Candidate("a", 1, 64, 0.0),
        Candidate("a", 1, 64, -1.0),
        Candidate("b", 0, 64, 5.0),
        Candidate("b", 1, 64, 3.0),
        Candidate("b", 2, 64, 1.0),
        Candidate("c", 0, 64, 0.0),
        Candidate("c", 0, 64, 1.0),
        Candidate("c", 1, 64, 0.0),
        Candidate("c", 1, 64, 4.0),
    ]
    wanted = {"gain": (5, 9, 10, 6, 2, 3), "paper": (5, 9, 10, 2, 3, 6)}[rule]
    assert stack_order(candidates, rule) == Order(5, (0, 1, 4, 7, 8, *wanted))


def test_unknown_rule():
    with pytest.raises(Unsupported, match="gain and paper"):
        stack_order([], "random")


def test_entries_come_in_any_order():
    a = Architecture(
        family="llama",
        vocab=4,
        hidden=2,
        layers=1,
        heads=1,
        kv_heads=1,
        head_dim=2,
        intermediate=2,
        context=8,
        norm_eps=1e-5,
        rotary_theta=1e4,
        tied=True,
    )

    def entry(tensor: str, level: int, gain: float) -> BlockEntry:
        return BlockEntry(
            kind="signs", tensor=tensor, level=level, shape=(2, 2), nbytes=24, gain=gain, hash="", uses=("x",), rank=1
        )

    entries = [
        entry("final_norm", 0, 0.0),
        entry("layers.0.q", 1, 1.0),
        entry("layers.0.q", 0, 9.0),
        entry("embed", 0, 0.0),
        entry("layers.0.k", 0, 9.0),
        entry("layers.0.k", 1, 2.0),
    ]
    index, positions = order_entries(a, entries, "gain")
    assert positions == (3, 2, 4, 0, 5, 1)
    assert index.base == 4
    assert index.blocks == tuple(entries[i] for i in positions)


def test_is_pure():
    """No torch, no numpy: the decision can be read, and run, without them."""
    code = "import sys, ebbflow.daemon.library.order; sys.exit(bool({'torch', 'numpy', 'zmq'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
