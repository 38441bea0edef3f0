"""Blocks of keys and values: none is given out twice, and what is freed is gone."""

from __future__ import annotations

from typing import Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.daemon.engine.kv import MAX_SEQUENCES, MOST_NBYTES, KvCache, blocks_for

from support.stacks import TINY


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.integers(0, 9), st.integers(-5, -1)), max_size=40))
def test_no_block_is_given_out_twice(script: list[int]) -> None:
    """A number n >= 0 allocates n blocks; a negative one frees what some earlier one took."""
    kv, held = KvCache(TINY, most_nbytes=0), list[tuple[int, ...]]()
    for step in script:
        if step < 0 and held:
            kv.free(held.pop(step % len(held)))
        elif 0 <= step <= kv.available:
            held.append(kv.allocate(step))
            assert len(held[-1]) == step
        blocks = [block for owner in held for block in owner]
        assert len(set(blocks)) == len(blocks)
        assert all(0 <= block < kv.most for block in blocks)
        assert kv.held == len(blocks)
        assert kv.available == kv.limit - len(blocks)
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
    assert kv.array.shape == (kv.most, TINY.layers, 2, TINY.kv_heads, 32 * (padded + scale // size))
    assert kv.array.itemsize == size
    assert kv.array[0].nbytes == kv.block_nbytes == TINY.layers * 2 * TINY.kv_heads * 32 * (padded * size + scale)


@pytest.mark.parametrize(("nbytes", "blocks"), [(0, 16), (16, 16), (17, 17), (40, 40)])
def test_they_take_what_is_said_but_one_whole_context_always_fits(nbytes: int, blocks: int) -> None:
    size = KvCache(TINY).block_nbytes
    kv = KvCache(TINY, most_nbytes=nbytes * size + size - 1)
    assert TINY.context == 16 * 32
    assert kv.most == kv.limit == kv.available == blocks


def test_by_default_they_take_two_gigabytes_unless_one_context_is_more() -> None:
    large = msgspec.structs.replace(TINY, context=4096, layers=32, heads=8, kv_heads=8, head_dim=128)
    assert KvCache(large).most == MOST_NBYTES // KvCache(large).block_nbytes
    assert KvCache(TINY).most == 2 * MAX_SEQUENCES * 16  # twice what all that may run could use
    huge = msgspec.structs.replace(TINY, context=131_072, layers=32, heads=8, kv_heads=8, head_dim=128)
    kv = KvCache(huge)
    assert kv.most * kv.block_nbytes > MOST_NBYTES
    assert kv.most == blocks_for(131_072) == 4096


def test_a_lower_limit_takes_nothing_away_and_gives_nothing_out() -> None:
    kv = KvCache(TINY)
    blocks = kv.allocate(5)
    kv.limit = 3
    assert (kv.held, kv.available) == (5, -2)
    with pytest.raises(AssertionError):
        kv.allocate(1)
    kv.free(blocks[:3])
    assert kv.available == 1
    kv.allocate(1)
    assert kv.held == 3


def test_freeing_twice_is_noticed() -> None:
    kv = KvCache(TINY)
    blocks = kv.allocate(2)
    kv.free(blocks)
    kv.free(blocks)
    with pytest.raises(AssertionError):
        kv.check_integrity()
