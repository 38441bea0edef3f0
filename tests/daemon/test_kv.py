"""Blocks of keys and values: each has one owner, and what is freed is gone."""

from __future__ import annotations

from typing import Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.daemon.engine.kv import MAX_NBYTES, MAX_SEQUENCES, KvCache, KvStatistics

from support.stacks import TINY


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.integers(0, 40), st.integers(-5, -1)), max_size=40))
def test_no_block_has_two_owners(script: list[int]) -> None:
    """A number n >= 0 allocates n blocks; a negative one frees what some earlier one took."""
    kv, held = KvCache(TINY), list[tuple[int, ...]]()
    for step in script:
        if step < 0 and held:
            kv.free(held.pop(step % len(held)))
        elif 0 <= step <= kv.available:
            held.append(kv.allocate(step))
            assert len(held[-1]) == step
        blocks = [block for owner in held for block in owner]
        assert len(set(blocks)) == len(blocks)
        assert all(0 <= block < kv.capacity for block in blocks)
        assert kv.statistics() == KvStatistics(len(blocks), kv.available, len(blocks) * kv.block_nbytes)
        assert kv.available == kv.capacity - len(blocks)
        kv.check_integrity()


def test_a_freed_block_is_empty_and_its_neighbours_are_not() -> None:
    kv = KvCache(TINY)
    first, second, third = kv.allocate(3)
    kv.array[[first, second, third]] = 1
    kv.free((second,))
    assert not kv.array[second].any()
    assert kv.array[first].all()
    assert kv.array[third].all()


@pytest.mark.parametrize(("dtype", "size", "scale"), [("f16", 2, 0), ("f32", 4, 0), ("i8", 1, 4)])
def test_a_block_holds_32_tokens_of_every_layer(dtype: Literal["f16", "f32", "i8"], size: int, scale: int) -> None:
    kv = KvCache(TINY, dtype)
    padded = 32  # TINY's heads are 16 wide
    assert kv.array.shape == (kv.capacity, TINY.layers, 2, TINY.kv_heads, 32 * (padded + scale // size))
    assert kv.array.itemsize == size
    assert kv.array[0].nbytes == kv.block_nbytes == TINY.layers * 2 * TINY.kv_heads * 32 * (padded * size + scale)


@pytest.mark.parametrize(("context", "blocks"), [(32, 1), (33, 2), (512, 16)])
def test_every_running_sequence_can_have_its_whole_context(context: int, blocks: int) -> None:
    kv = KvCache(msgspec.structs.replace(TINY, context=context))
    assert kv.capacity == MAX_SEQUENCES * blocks


def test_one_whole_context_fits_however_large() -> None:
    huge = msgspec.structs.replace(TINY, context=131_072, layers=32, heads=8, kv_heads=8, head_dim=128)
    kv = KvCache(huge)
    assert kv.capacity * kv.block_nbytes > MAX_NBYTES
    assert kv.capacity == 131_072 // 32


def test_freeing_twice_is_noticed() -> None:
    kv = KvCache(TINY)
    blocks = kv.allocate(2)
    kv.free(blocks)
    kv.free(blocks)
    with pytest.raises(AssertionError):
        kv.check_integrity()
