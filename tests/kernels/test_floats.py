"""Stored numbers become the floats they are, exactly: in vectors, in what is left of a row, anywhere in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ebbflow.kernels.floats import LANES
from ebbflow.kernels.instructions import NAMES, available
from ebbflow.kernels.matmul import take_rows
from ebbflow.kernels.reference import reference_levels
from ebbflow.kernels.rows import JIT_OFF
from ebbflow.kernels.table import Draw, store_levels
from ebbflow.kernels.tiers import decode_tiers, values_floats

COLUMNS = (1, 65) if JIT_OFF else (1, LANES - 1, LANES, LANES + 1, 63, 64, 65, 130, 172)
TIERS = (
    ("mask:50", "values:f16"),
    ("mask:100", "values:i8"),
    ("mask:50", "values:i4"),
    ("mask:30", "values:f16", "mask:20", "values:f16", "mask:1"),
    ("mask:1", "values:i4", "mask:33", "values:i4", "mask:100", "values:i4"),
    ("mask:40",),
)


def taken(levels: tuple[str, ...], m: int, n: int) -> tuple[Any, Any]:
    """All rows, and what they are, of nasty numbers."""
    stored, table = store_levels(Draw(n, nasty=True), levels, m, n)
    y = np.full((m, n), np.nan, np.float32)
    take_rows(stored, table, m, np.arange(m), y)
    return y, [part.astype(np.float32) for part in reference_levels(stored, table, m, n)]


@pytest.mark.parametrize("n", COLUMNS)
@pytest.mark.parametrize("form", ["f32", "f16", "bf16", "i8"])
def test_dense_rows_are_exact(form: str, n: int) -> None:
    y, [want] = taken((form,), 3, n)
    np.testing.assert_array_equal(y.view(np.uint32), (want + np.float32(0)).view(np.uint32))  # 0 + -0 is 0


@pytest.mark.parametrize("n", COLUMNS)
def test_dense_levels_add_up_in_their_order(n: int) -> None:
    y, parts = taken(("i8", "f16", "bf16", "f32"), 3, n)
    want = np.zeros((3, n), np.float32)
    for part in parts:
        want += part
    np.testing.assert_array_equal(y.view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("n", COLUMNS)
@pytest.mark.parametrize("levels", TIERS, ids="+".join)
def test_tiers_are_exact_and_nothing_else_is_written(levels: tuple[str, ...], n: int, name: str) -> None:
    m, first, count = 7, 2, 3
    stored, table = store_levels(Draw(n, nasty=True), levels, m, n)
    want = reference_levels(stored, table, m, n)[0].astype(np.float32)
    w = np.full((5, n), np.nan, np.float32)
    w[count] = w[count + 1] = 7
    filled, values = np.full(-(-n // 64), 2**63, np.uint64), np.full((1, values_floats(n)), np.nan, np.float32)
    decode_tiers(NAMES[name], stored, table, m, n, first, count, filled, values, w)
    np.testing.assert_array_equal(w[:count].view(np.uint32), want[first : first + count].view(np.uint32))
    assert (w[count:] == 7).all()
