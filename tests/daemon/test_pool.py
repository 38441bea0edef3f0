"""Worth of bytes and the pool: the curve decides, and greed is right."""

from __future__ import annotations

import math
from itertools import pairwise, product

from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.daemon.supervisor.pool import Claim, divide
from ebbflow.daemon.supervisor.slope import HORIZON_SECONDS, MOST, STALE_SECONDS, Slope
from ebbflow.daemon.supervisor.worth import TYPICAL_KL, Piece, pieces
from ebbflow.formats.manifest import CurvePoint

POINTS = st.lists(
    st.tuples(st.integers(0, 12_000), st.one_of(st.floats(0, 50), st.sampled_from([math.nan, math.inf]))), max_size=20
)


def curve(*points):
    return tuple(CurvePoint(1, nbytes, kl, 1.0) for nbytes, kl in points)


@settings(derandomize=True)
@given(st.integers(0, 9_000), st.integers(1, 10_000), POINTS)
def test_pieces_cover_the_stack_and_gains_fall_whatever_the_curve(base, full, points):
    cut = pieces(base, full, curve(*points))
    edges = [base, *(piece.stop for piece in cut)]
    assert edges == sorted(edges)
    assert edges[-1] == max(base, full) if full > base else not cut
    assert all(before.gain >= after.gain > 0 for before, after in pairwise(cut))


def test_gains_add_up_to_the_kl_that_was_measured():
    cut = pieces(100, 1000, curve((100, 2.0), (300, 0.5), (1000, 0.1)))
    edges = [100, *(piece.stop for piece in cut)]
    saved = {stop: piece.gain * (stop - start) for (start, stop), piece in zip(pairwise(edges), cut, strict=True)}
    assert math.isclose(sum(saved.values()), 1.9, rel_tol=0.01)
    assert math.isclose(sum(gain for stop, gain in saved.items() if stop <= 300), 1.5, rel_tol=0.01)


def test_without_a_curve_a_typical_one_is_taken():
    cut = pieces(0, 1000, ())
    assert math.isclose(cut[0].gain / cut[-1].gain, (TYPICAL_KL[0] / TYPICAL_KL[1]) ** (7 / 8), rel_tol=0.1)


CLAIMS = st.dictionaries(
    st.sampled_from("abc"),
    st.builds(
        lambda base, more, cut, weight: Claim(base + cut[0], base + max(cut), _steps(base, more), weight),
        st.integers(0, 30),
        st.lists(st.tuples(st.integers(1, 20), st.integers(1, 50)), min_size=1, max_size=3),
        st.tuples(st.integers(0, 5), st.integers(0, 60)),
        st.sampled_from([0.5, 1.0, 4.0]),
    ),
    min_size=1,
)


def _steps(base, more):
    at, made = base, []
    for width, gain in sorted(more, key=lambda step: -step[1]):
        at += width
        made.append(Piece(at, float(gain)))
    return tuple(made)


def worth(claim, nbytes):
    return sum(gain * (min(stop, nbytes) - start) for gain, start, stop in claim.parts() if start < nbytes)


@settings(derandomize=True)
@given(st.integers(-10, 250), CLAIMS)
def test_shares_stay_within_their_claims_and_use_what_there_is(total, claims):
    shares = divide(total, claims)
    ends = {name: max([claim.least, *(stop for _, _, stop in claim.parts())]) for name, claim in claims.items()}
    assert all(claims[name].least <= share <= ends[name] for name, share in shares.items())
    assert sum(shares.values()) == min(max(total, sum(c.least for c in claims.values())), sum(ends.values()))


@settings(derandomize=True, max_examples=50)
@given(st.integers(0, 120), CLAIMS)
def test_no_other_division_is_worth_more(total, claims):
    claims = dict(list(claims.items())[:2])
    best = sum(worth(claims[name], share) for name, share in divide(total, claims).items())
    for sizes in product(*(range(c.least, max(c.least, c.most) + 1) for c in claims.values())):
        if sum(sizes) <= total:
            assert sum(map(worth, claims.values(), sizes)) <= best + 1e-9


def test_what_would_go_and_come_next():
    claim = Claim(10, 40, (Piece(20, 5.0), Piece(30, 3.0), Piece(50, 1.0)), 2.0)
    assert [claim.last_gain(n) for n in (10, 11, 20, 21, 40)] == [0.0, 10.0, 10.0, 6.0, 2.0]
    assert [claim.next_gain(n) for n in (10, 20, 29, 30, 40)] == [10.0, 6.0, 6.0, 2.0, 0.0]


# -- slope --------------------------------------------------------------------------------------------------------


def seen(*looks):
    slope = Slope()
    for now, nbytes in looks:
        slope.note(now, nbytes)
    return slope.coming


def test_only_a_fall_that_lasts_is_believed_and_as_the_slower_one():
    assert seen((0.0, 10**9), (0.1, 9 * 10**8)) == 0
    assert seen((0.0, 10**9), (0.1, 10**9), (0.2, 10**8)) == 0
    assert seen((0.0, 10**9), (0.1, 9 * 10**8), (0.2, 9 * 10**8)) == 0
    assert math.isclose(seen((0.0, 10**9), (0.1, 99 * 10**7), (0.2, 9 * 10**8)), 1e8 * HORIZON_SECONDS, rel_tol=1e-6)
    assert seen((0.0, 10**12), (0.1, 9 * 10**11), (0.2, 8 * 10**11)) == MOST
    assert seen((0.0, 0), (0.1, 100), (0.2, 200)) == 0


def test_old_looks_and_hasty_ones_say_nothing():
    falling = [(0.0, 10**9), (0.1, 9 * 10**8)]
    assert seen(*falling, (0.2 + STALE_SECONDS, 8 * 10**8)) == 0
    assert seen(*falling, (0.1001, 0)) == 0
