"""fp16 and back: by the processor and in integers the same, and what numpy does."""

from __future__ import annotations

import numpy as np
import pytest

from ebbflow.kernels.halves import ABLE, LARGEST, narrow, widen
from ebbflow.kernels.rows import JIT_OFF
from ebbflow.kernels.vectors import f32, i16

from support.vector_code import by_vectors

pytestmark = pytest.mark.skipif(JIT_OFF, reason="there are no vectors without the compiler")
WAYS = (False, True) if ABLE else (False,)
HALVES = np.arange(1 << 16, dtype=np.uint16)


@pytest.mark.parametrize("able", WAYS)
def test_every_half_becomes_what_it_is(able: bool) -> None:
    got = by_vectors(lambda builder, x: widen(builder, x, able), i16, f32)(HALVES)
    want = HALVES.view(np.float16).astype(np.float32)
    number = ~np.isnan(want)
    np.testing.assert_array_equal(got[number].view(np.uint32), want[number].view(np.uint32))
    assert np.isnan(got[~number]).all()


@pytest.mark.parametrize("able", WAYS)
def test_singles_become_the_nearest_half(able: bool) -> None:
    """Every half, its neighbours among singles, and the middle between two halves with its neighbours."""
    finite = HALVES[(HALVES & 0x7C00) != 0x7C00].view(np.float16).astype(np.float32)
    middles = (np.sort(finite)[1:] + np.sort(finite)[:-1]) / 2
    exact = np.concatenate([finite, middles, [1e-45, -1e-45, 1e-38, 2.0**-25, 65519.9]]).astype(np.float32)
    x = np.concatenate([exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))])
    got = by_vectors(lambda builder, x: narrow(builder, x, able), f32, i16)(x)
    np.testing.assert_array_equal(got, x.clip(-LARGEST, LARGEST).astype(np.float16).view(np.uint16))


@pytest.mark.parametrize("able", WAYS)
def test_what_is_too_large_is_cut_and_nan_stays(able: bool) -> None:
    x = np.array([65520, 1e30, np.inf, -65520, -1e30, -np.inf, np.nan, -np.nan], np.float32)
    got = by_vectors(lambda builder, x: narrow(builder, x, able), f32, i16)(x).view(np.float16)
    np.testing.assert_array_equal(got[:6], [LARGEST] * 3 + [-LARGEST] * 3)
    assert np.isnan(got[6:]).all()
