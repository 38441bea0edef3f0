"""The mapping's own arithmetic: which pages go, which stay. What the kernel says of it is in test_traps."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.daemon.mapping import PAGE, Mapping, private_nbytes
from ebbflow.formats.errors import Unsupported


def test_pages_that_are_needed_in_part_are_kept() -> None:
    memory = Mapping(10 * PAGE + 100)
    for start, stop, first, last in (
        (1, 2 * PAGE - 1, 0, 0),
        (1, 3 * PAGE + 1, PAGE, 3 * PAGE),
        (2 * PAGE, 4 * PAGE, 2 * PAGE, 4 * PAGE),
        (5 * PAGE, 5 * PAGE, 0, 0),
        (7 * PAGE + 5, memory.nbytes, 8 * PAGE, memory.nbytes),
        (10 * PAGE + 50, memory.nbytes, 0, 0),
        (0, memory.nbytes, 0, memory.nbytes),
    ):
        memory.bytes[:] = 7
        memory.release(start, stop)
        gone = np.flatnonzero(memory.bytes[: memory.nbytes] == 0)
        assert (gone[0], gone[-1] + 1) == (first, last) if len(gone) else first == last, (start, stop)
        assert len(gone) == last - first


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 5 * PAGE), st.integers(0, 6 * PAGE), st.integers(0, 6 * PAGE))
def test_nothing_outside_what_is_released_changes(nbytes: int, start: int, length: int) -> None:
    memory = Mapping(nbytes)
    memory.bytes[:] = 7
    memory.release(start, start + length)
    kept = np.ones(nbytes, bool)
    kept[start : start + length] = False
    assert (memory.bytes[:nbytes][kept] == 7).all()
    whole = [page for page in range(0, nbytes, PAGE) if start <= page and page + PAGE <= min(nbytes, start + length)]
    assert not any(memory.bytes[page : page + PAGE].any() for page in whole)


def test_released_memory_can_be_used_again() -> None:
    memory = Mapping(4 * PAGE)
    memory.bytes[:] = 7
    memory.release(0, memory.nbytes)
    memory.bytes[PAGE : PAGE + 10] = 9
    assert memory.bytes[: memory.nbytes].sum() == 90


def test_new_memory_is_zero_and_where_it_says() -> None:
    memory = Mapping(3 * PAGE)
    assert not memory.bytes.any()
    assert memory.address() % PAGE == 0
    assert memory.address() == memory.bytes.ctypes.data


def test_private_memory_is_what_was_written() -> None:
    memory, before = Mapping(16 << 20), private_nbytes()
    assert private_nbytes() - before < 1 << 20
    memory.bytes[:] = 1
    assert abs(private_nbytes() - before - (16 << 20)) < 1 << 20


def test_another_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(Unsupported, match="Linux"):
        Mapping(PAGE)


def test_an_empty_mapping() -> None:
    memory = Mapping(0)
    memory.release(0, 0)
