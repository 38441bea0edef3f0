"""e^x: near the truth, exact where it must be."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from ebbflow.kernels.exponential import LEAST, exponential, plain_exponential
from ebbflow.kernels.rows import JIT_OFF
from ebbflow.kernels.vectors import f32

from support.vector_code import by_vectors

F32 = NDArray[np.float32]
pytestmark = pytest.mark.skipif(JIT_OFF, reason="there are no vectors without the compiler")


def compiled(x: F32) -> F32:
    return by_vectors(exponential, f32, f32)(x)


def test_within_little_more_than_a_unit_in_the_last_place() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [
            np.linspace(LEAST, 88, 1_000_000),
            -(2.0 ** rng.uniform(-40, 6.4, 200_000)),
            np.arange(-125, 127) * np.log(2),
            (np.arange(-125, 126) + 0.5) * np.log(2),
        ]
    ).astype(np.float32)
    truth = np.exp(x.astype(np.float64))
    units = np.abs(compiled(x) - truth) / np.spacing(truth.astype(np.float32))
    assert units.max() < 1.1
    assert units.mean() < 0.3


def test_special_values() -> None:
    x = np.array(
        [0, -0.0, LEAST, np.nextafter(np.float32(LEAST), np.float32(-100)), -1e30, -np.inf, np.nan], np.float32
    )
    got = compiled(x)
    np.testing.assert_array_equal(got[[0, 1]], 1)
    assert got[2] >= np.finfo(np.float32).tiny
    np.testing.assert_array_equal(got[3:6], 0)
    assert np.isnan(got[6])
    assert not np.signbit(got[:6]).any()


def test_the_plain_twin_agrees() -> None:
    x = np.append(np.linspace(-100, 80, 9999), [0, -np.inf, np.nan]).astype(np.float32)
    np.testing.assert_allclose(compiled(x), plain_exponential(x), rtol=3e-7)
