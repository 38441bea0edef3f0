"""Tiers of masks and values times activations, straight from the stored bytes: y = x W^T, and W is never in memory.

Method: a program takes a few rows of W and a few tokens, and goes along the rows a word of 64 columns at a time. The
next bits of a tier's mask belong to the columns that tiers before it have left, in their order, so a column's bit is
found by counting the free columns below it, and its value by counting the ones below that bit. All counts are of words
in registers; what goes on from word to word is how many values each tier has placed in the row.

A lane for each of the 64 columns adds up its products along the row in float32, word after word, and the lanes are
then added in pairs, in pairs of pairs, and so on. So nothing depends on the tile, on what other tokens are there, or on
how the compiler lays a tile out over threads; there are no atomics. Integers are multiplied with the row's scale, once,
when all is added up.

What is not here: matrix units. Weights are expanded again for every tile of 16 tokens, so this is for decoding, where
what counts is the bytes that are read. It was run by Triton's interpreter and compiled for NVIDIA and AMD, but no
speed was ever measured.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from ..rows import VALUES_F16, VALUES_I4, VALUES_I8

_VALUES: Final = {VALUES_F16: torch.float16, VALUES_I8: torch.int8, VALUES_I4: torch.uint8}
_TILES: Final = {1: 16, 4: 16, 16: 4}  # tokens: rows of W beside them


@triton.jit
def _ones(word: tl.tensor) -> tl.tensor:
    """How many bits of a word are set; compilers know this sequence as one instruction."""
    word = word - ((word >> 1) & 0x5555555555555555)
    word = (word & 0x3333333333333333) + ((word >> 2) & 0x3333333333333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (word * 0x0101010101010101) >> 56


# a value of 1 or a multiple of 16 is not worth a compilation of its own
@triton.jit(do_not_specialize=["m", "n", "tokens", "tiers"])
def _multiply(
    words: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    blocks: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    tokens: tl.tensor,
    tiers: tl.tensor,
    SCALED: tl.constexpr,
    HALVES: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """`words`, `values` and `scales` are the same memory, in u64, in what the values are (two to a byte with HALVES)
    and in f32; `tiers <= SLOTS`, a power of two.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    lane = tl.arange(0, 64)
    here = lane.to(tl.uint64)[None, :]
    one = tl.full([1, 1], 1, tl.uint64)
    slot = tl.arange(0, SLOTS)[None, :]
    placed = tl.full([ROWS, SLOTS], 0, tl.int64)  # values of each tier in the words so far
    total = tl.full([TOKENS, ROWS, 64], 0, tl.float32)
    for start in range(0, n, 64):
        column = start + lane
        free = (row < m)[:, None] & (column < n)[None, :]
        weight = tl.full([ROWS, 64], 0, tl.float32)
        begin = tl.full([ROWS], 0, tl.int64) + start  # in the tier's row of bits: columns so far that were left to it
        left = n
        for tier in range(tiers):
            mask = tl.load(blocks + 6 * tier + 1) // 8
            rank = tl.load(blocks + 6 * tier + 2)
            at = tl.load(blocks + 6 * tier + 4)
            if SCALED:
                at += tl.where(tier == 0, 4 * m, 0)
            width = (left + 63) // 64
            own = tl.sum(tl.where(slot == tier, placed, 0), axis=1)

            first = begin // 64
            there = words + mask + row * width + first
            low = tl.load(there, mask=(row < m) & (first < width), other=0)
            high = tl.load(there + 1, mask=(row < m) & (first + 1 < width), other=0)
            by = (begin % 64).to(tl.uint64)
            bits = ((low >> by) | ((high << 1) << (63 - by)))[:, None]  # a shift by 64 has no meaning

            known = tl.sum(free.to(tl.uint64) << here, axis=1)[:, None]
            bit = _ones(known & ((one << here) - 1))
            chosen = free & (((bits >> bit) & 1) != 0)
            place = own[:, None] + _ones(bits & ((one << bit) - 1)).to(tl.int64)
            if HALVES:
                line = values + at + row[:, None] * ((rank + 1) // 2)
                both = tl.load(line + place // 2, mask=chosen, other=0).to(tl.int32)
                number = (((both >> (4 * (place % 2)).to(tl.int32)) & 15) ^ 8) - 8
            elif SCALED:
                number = tl.load(values + at + row[:, None] * rank + place, mask=chosen, other=0)
            else:
                number = tl.load(values + at // 2 + row[:, None] * rank + place, mask=chosen, other=0)
            weight = tl.where(chosen, number.to(tl.float32), weight)

            free = free & (chosen == 0)
            count = tl.sum(chosen.to(tl.int64), axis=1)
            placed = tl.where(slot == tier, placed + count[:, None], placed)
            begin -= own
            left -= rank.to(tl.int32)
        given = tl.load(
            x + token[:, None] * n + column[None, :], mask=(token < tokens)[:, None] & (column < n)[None, :], other=0
        )
        # fused by name: tiles are compiled one by one, and might differ in what the compiler fuses
        total = tl.fma(weight[None, :, :], given.to(tl.float32)[:, None, :], total)

    for half in tl.static_range(6):
        total = tl.sum(tl.reshape(total, [TOKENS, ROWS, 32 >> half, 2]), axis=3)
    total = tl.reshape(total, [TOKENS, ROWS])
    if SCALED:
        total *= tl.load(scales + tl.load(blocks + 4) // 4 + row, mask=row < m, other=0)[None, :]
    tl.store(y + token[:, None] * m + row[None, :], total, mask=(token < tokens)[:, None] & (row < m)[None, :])


def multiply_sparse(
    kind: int, stored: torch.Tensor, blocks: torch.Tensor, n: int, x: torch.Tensor, y: torch.Tensor
) -> None:
    """`y = x W^T` for a weight `[m, n]` of tiers; the same bits for any number of tokens.

    On one device: `stored` u8, a multiple of 8 bytes, `blocks [levels, 3]` i64 as `rows.decode_rows` has them (masks
    and values in turn, a last mask without values counts for nothing), x `[T, n]` f16 or f32, y `[T, m]` f32, all
    contiguous. `kind` is the code of the values.
    """
    (tokens, m), tiers = y.shape, len(blocks) // 2
    if tokens == 0:
        return
    tile = next((tile for tile in _TILES if tile >= tokens), max(_TILES))
    grid = (triton.cdiv(m, _TILES[tile]), triton.cdiv(tokens, tile))
    _multiply[grid](
        stored.view(torch.uint64),
        stored.view(_VALUES[kind]),
        stored.view(torch.float32),
        blocks,
        x,
        y,
        m,
        n,
        tokens,
        tiers,
        SCALED=kind != VALUES_F16 and tiers > 0,
        HALVES=kind == VALUES_I4,
        SLOTS=triton.next_power_of_2(max(1, tiers)),
        ROWS=_TILES[tile],
        TOKENS=tile,
    )
