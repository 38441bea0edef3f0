from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from ebbflow.formats.blocks import (
    check_finite,
    pack_dense,
    pack_mask,
    pack_plane,
    pack_signs,
    pack_values,
    rotate_rows,
    sum_blocks,
    unpack_dense,
    unpack_mask,
    unpack_plane,
    unpack_signs,
    unpack_values,
    unrotate_rows,
)
from ebbflow.formats.errors import BadBlock, UnknownKind
from ebbflow.formats.index import BlockEntry
from ebbflow.formats.kinds import payload_nbytes, rotation_blocks, rotation_sign, signs_nbytes, words_per_row

from support import golden

# What rounding may do: half a unit in the last place, and below the smallest normal number half a step.
RELATIVE = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8}
ABSOLUTE = {"f32": 0.0, "f16": 2.0**-25, "bf16": 1e-38}


def entry(kind: str, shape: tuple[int, ...], **own) -> BlockEntry:
    nbytes = payload_nbytes(kind, shape, **own)
    return BlockEntry(kind=kind, tensor="t", level=0, shape=shape, nbytes=nbytes, gain=0.0, hash="", uses=("t",), **own)


# -- layouts, as literal bytes ------------------------------------------------------------------------------------


def test_dense_layouts():
    vector = np.array([1.0, -2.0], np.float32)
    assert pack_dense(vector, "f32") == golden.DENSE
    assert pack_dense(vector, "f16").hex() == "003c00c0"
    assert pack_dense(vector, "bf16").hex() == "803f00c0"
    assert pack_dense(np.array([127.0, -2.0], np.float32), "i8").hex() == "0000803f" + "7ffe"
    matrix = np.array([[127.0, -2.0], [0.0, 254.0]], np.float32)
    assert pack_dense(matrix, "i8").hex() == "0000803f" + "00000040" + "7ffe" + "007f"


def test_signs_layout():
    positive, u, v = unpack_signs(golden.SIGNS, 2, 3, 1)
    assert positive.tolist() == [[True, False, True], [False, True, True]]
    assert u.tolist() == [[0.5], [2.0]]
    assert v.tolist() == [[1.0, -1.0, 0.25]]
    assert pack_signs(positive, u, v) == golden.SIGNS


def test_signs_beyond_64_columns():
    positive = np.zeros((1, 65), np.bool_)
    positive[0, [0, 63, 64]] = True
    data = pack_signs(positive, np.ones((1, 1), np.float16), np.ones((1, 65), np.float16))
    assert data[:16].hex() == "0100000000000080" + "0100000000000000"


@pytest.mark.parametrize(("n", "words"), [(1, 1), (63, 1), (64, 1), (65, 2), (172, 3), (576, 9)])
def test_sizes(n, words):
    assert words_per_row(n) == words
    assert signs_nbytes(7, n, 3) == 7 * 8 * words + 2 * 3 * (7 + n)


@pytest.mark.parametrize(
    ("kind", "shape", "own"),
    [
        ("dense", (), {"dtype": "f32"}),
        ("dense", (3, 0), {"dtype": "f32"}),
        ("dense", (3,), {"dtype": "f8"}),
        ("signs", (3,), {"rank": 1}),
        ("signs", (3, 4), {"rank": 0}),
        ("signs", (3, 4), {"rank": 4}),
        ("plane", (3,), {"dtype": "i8"}),
        ("plane", (3, 4), {"dtype": "bf16"}),
        ("plane", (3, 4), {"dtype": "f16"}),
        ("plane", (3, 4), {"dtype": "i8", "level": 7}),
        ("plane", (3, 4), {"dtype": "i8", "level": -1}),
        ("mask", (4,), {"rank": 1}),
        ("mask", (3, 4), {"rank": 0}),
        ("mask", (3, 4), {"rank": 5}),
        ("mask", (3, 4), {"rank": 2, "filled": 3}),
        ("mask", (3, 4), {"rank": 1, "filled": 4}),
        ("mask", (3, 4), {"rank": 1, "dtype": "i8"}),
        ("values", (4,), {"rank": 1, "dtype": "i8"}),
        ("values", (3, 4), {"rank": 0, "dtype": "i8"}),
        ("values", (3, 4), {"rank": 2, "filled": 3, "dtype": "i8"}),
        ("values", (3, 4), {"rank": 1, "dtype": "bf16"}),
        ("values", (3, 4), {"rank": 1}),
        ("values", (3, 4), {"rank": 1, "dtype": "i8", "level": -1}),
    ],
)
def test_parameters_that_make_no_sense(kind, shape, own):
    with pytest.raises(BadBlock):
        payload_nbytes(kind, shape, **own)


def test_unknown_kind():
    with pytest.raises(UnknownKind, match="lattice"):
        payload_nbytes("lattice", (1, 1))


# -- round trips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@given(data=st.data())
def test_floats_round_trip(dtype, data):
    limit = 65504 if dtype == "f16" else 2.0**100
    weight = data.draw(arrays(np.float32, array_shapes(max_dims=3), elements=st.floats(-limit, limit, width=32)))
    payload = pack_dense(weight, dtype)
    assert len(payload) == payload_nbytes("dense", weight.shape, dtype=dtype)
    back = unpack_dense(payload, weight.shape, dtype)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, weight, rtol=RELATIVE[dtype], atol=ABSOLUTE[dtype])
    assert pack_dense(back, dtype) == payload


@given(arrays(np.float32, array_shapes(max_dims=2), elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_int8_is_within_half_a_step_of_each_row(weight):
    payload = pack_dense(weight, "i8")
    assert len(payload) == payload_nbytes("dense", weight.shape, dtype="i8")
    back = unpack_dense(payload, weight.shape, "i8")
    step = np.abs(np.atleast_2d(weight)).max(axis=1, keepdims=True) / 127
    assert (np.abs(np.atleast_2d(back - weight)) <= step * 0.501 + 1e-43).all()


def test_int8_of_denormals_does_not_wrap_around():
    weight = np.array([[190 * 2.0**-149, -190 * 2.0**-149]], np.float32)
    back = unpack_dense(pack_dense(weight, "i8"), weight.shape, "i8")
    assert back[0, 0] > 0 > back[0, 1]


@given(st.data())
def test_signs_round_trip(data):
    m, n = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 200))
    rank = data.draw(st.integers(1, min(m, n)))
    factors = st.floats(-65504, 65504, width=16)
    positive = data.draw(arrays(np.bool_, (m, n)))
    u, v = data.draw(arrays(np.float16, (m, rank), elements=factors)), np.ones((rank, n), np.float16)
    payload = pack_signs(positive, u, v)
    assert len(payload) == payload_nbytes("signs", (m, n), rank=rank)
    for found, put in zip(unpack_signs(payload, m, n, rank), (positive, u, v), strict=True):
        np.testing.assert_array_equal(found, put)


def test_blocks_of_a_tensor_add_up():
    signs, dense = entry("signs", (2, 3), rank=1), entry("dense", (2, 3), dtype="f32")
    ones = np.ones((2, 3), np.float32).tobytes()
    np.testing.assert_array_equal(sum_blocks([(signs, golden.SIGNS)])["t"], [[0.5, 0.5, 0.125], [-2, -2, 0.5]])
    found = sum_blocks([(signs, golden.SIGNS), (dense, ones)])
    np.testing.assert_array_equal(found["t"], [[1.5, 1.5, 1.125], [-1, -1, 1.5]])


# -- planes -------------------------------------------------------------------------------------------------------


def plane_entry(shape: tuple[int, ...], level: int, dtype: str) -> BlockEntry:
    nbytes = payload_nbytes("plane", shape, dtype=dtype, level=level)
    return BlockEntry(
        kind="plane", tensor="t", level=level, shape=shape, nbytes=nbytes, gain=0.0, hash="", uses=("t",), dtype=dtype
    )


def test_plane_layouts():
    """Two rows of three columns: indices 2 1 3 and 0 3 2 of two bits, then another bit each, levels shared."""
    own, shared = plane_entry((2, 3), 0, "i8"), plane_entry((2, 3), 1, "i8-shared")
    planes, scale, levels = unpack_plane(own, golden.PLANES)
    assert (2 * planes[0] + planes[1]).tolist() == [[2, 1, 3], [0, 3, 2]]
    assert scale.tolist() == [1.0, 0.5]
    assert levels.tolist() == [[-3, -1, 1, 3], [-127, -2, 2, 127]]
    assert pack_plane(planes, scale, levels) == golden.PLANES
    assert len(golden.PLANES) == own.nbytes
    planes, scale, levels = unpack_plane(shared, golden.SHARED_PLANE)
    assert planes.tolist() == [[[True, False, False], [False, False, True]]]
    assert scale.tolist() == [2.0, 1.0]
    assert levels.tolist() == [-4, -3, -2, -1, 1, 2, 3, 4]
    assert pack_plane(planes, scale, levels) == golden.SHARED_PLANE
    assert len(golden.SHARED_PLANE) == shared.nbytes


def test_deeper_levels_replace_those_before():
    """Signs of the rotation are + - - for the first columns; its blocks are of sizes 2 and 1."""
    assert [rotation_sign(j) for j in range(3)] == golden.ROTATION_SIGNS
    own, shared = plane_entry((2, 3), 0, "i8"), plane_entry((2, 3), 1, "i8-shared")
    first = sum_blocks([(own, golden.PLANES)])["t"]
    np.testing.assert_allclose(rotate_rows(first), [[1, -1, 3], [-63.5, 63.5, 1]], atol=1e-5)
    both = sum_blocks([(own, golden.PLANES), (shared, golden.SHARED_PLANE)])["t"]
    np.testing.assert_allclose(rotate_rows(both), [[4, -4, 6], [-4, 3, 2]], atol=1e-5)


# -- tiers --------------------------------------------------------------------------------------------------------


def tier_entries(shape: tuple[int, int], level: int, rank: int, dtype: str, filled: int) -> list[BlockEntry]:
    """A tier's mask and its values."""
    kinds = (("mask", ""), ("values", dtype))
    return [
        BlockEntry(
            kind=kind,
            tensor="t",
            level=level,
            shape=shape,
            nbytes=payload_nbytes(kind, shape, dtype=stored, rank=rank, level=level, filled=filled),
            gain=0.0,
            hash="",
            uses=("t",),
            dtype=stored,
            rank=rank,
        )
        for kind, stored in kinds
    ]


def golden_tiers(dtype: str) -> list[tuple[BlockEntry, bytes]]:
    entries = [*tier_entries((2, 5), 0, 2, dtype, 0), *tier_entries((2, 5), 1, 1, dtype, 2)]
    payloads = [payload for tier in zip(golden.MASKS, golden.VALUES[dtype], strict=True) for payload in tier]
    return list(zip(entries, payloads, strict=True))


@pytest.mark.parametrize("dtype", golden.VALUES)
def test_tier_layouts(dtype):
    blocks = golden_tiers(dtype)
    assert [entry.nbytes for entry, _ in blocks] == [len(payload) for _, payload in blocks]
    before, scale = np.zeros((2, 5), np.bool_), None
    columns = ([[1, 4], [0, 2]], [[3], [1]])
    for (_, mask), (values, stored), wanted in zip(blocks[::2], blocks[1::2], columns, strict=True):
        tier = unpack_mask(mask, 2, 5, before)
        assert [np.flatnonzero(row).tolist() for row in tier] == wanted
        assert pack_mask(tier, before) == mask
        numbers, scale = unpack_values(values, stored, scale)
        assert pack_values(numbers, dtype, scale, values.level == 0) == stored
        before |= tier
    np.testing.assert_array_equal(sum_blocks(blocks)["t"], golden.SPARSE[dtype])


def test_a_mask_without_its_values_counts_for_nothing():
    blocks = golden_tiers("i8")
    np.testing.assert_array_equal(sum_blocks(blocks[:3])["t"], sum_blocks(blocks[:2])["t"])


@pytest.mark.parametrize(
    ("kind", "own", "nbytes"),
    [
        ("mask", {"rank": 30}, 7 * 8 * 3),
        ("mask", {"rank": 30, "level": 1, "filled": 44}, 7 * 8 * 2),
        ("mask", {"rank": 30, "level": 1, "filled": 142}, 7 * 8),
        ("values", {"rank": 31, "dtype": "f16"}, 7 * 62),
        ("values", {"rank": 31, "dtype": "i8"}, 7 * (4 + 31)),
        ("values", {"rank": 31, "dtype": "i8", "level": 1, "filled": 44}, 7 * 31),
        ("values", {"rank": 31, "dtype": "i4"}, 7 * (4 + 16)),
    ],
)
def test_sizes_of_tiers(kind, own, nbytes):
    assert payload_nbytes(kind, (7, 172), **own) == nbytes


@given(st.data())
def test_tiers_round_trip(data):
    m, n = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 200))
    dtype, rng = data.draw(st.sampled_from(["f16", "i8", "i4"])), np.random.default_rng(data.draw(st.integers(0, 99)))
    before, weight, scale = np.zeros((m, n), np.bool_), np.zeros((m, n), np.float32), np.full(m, 0.375, np.float32)
    blocks, filled, limit = [], 0, {"f16": 600, "i8": 127, "i4": 7}[dtype]
    for level in range(3):
        if filled == n:
            break
        rank = data.draw(st.integers(1, n - filled))
        places = np.where(before, 2.0, rng.random((m, n))).argsort(axis=1)[:, :rank]
        tier = np.zeros((m, n), np.bool_)
        np.put_along_axis(tier, places, True, axis=1)
        weight[tier] = 0.375 * rng.integers(-limit, limit + 1, m * rank)
        values = weight[tier].reshape(m, rank)
        payloads = pack_mask(tier, before), pack_values(values, dtype, None if dtype == "f16" else scale, level == 0)
        for tiers, payload in zip(tier_entries((m, n), level, rank, dtype, filled), payloads, strict=True):
            assert len(payload) == tiers.nbytes
            check_finite(tiers, aligned(payload), filled)
            blocks.append((tiers, payload))
        before, filled = before | tier, filled + rank
    np.testing.assert_array_equal(sum_blocks(blocks)["t"], weight)


def test_integers_are_rounded_and_cut_off():
    values, scale = np.array([[0.74, 0.76, -80.0, 80.0]], np.float32), np.full(1, 0.5, np.float32)
    entry_ = tier_entries((1, 4), 0, 4, "i8", 0)[1]
    found, _ = unpack_values(entry_, pack_values(values, "i8", scale, True))
    np.testing.assert_array_equal(found, [[0.5, 1.0, -63.5, 63.5]])
    nothing = pack_values(values, "i4", np.zeros(1, np.float32), True)
    assert nothing[:4] == bytes(4)


def test_tiers_refuse():
    full = np.ones((2, 3), np.bool_)
    one, uneven = np.array([[1, 0, 0]] * 2, np.bool_), np.array([[1, 0, 0], [1, 1, 0]], np.bool_)
    for tier, before in ((uneven, ~full), (one, uneven), (~full, one)):
        with pytest.raises(BadBlock, match="different numbers"):
            pack_mask(tier, before)
    with pytest.raises(BadBlock, match="earlier"):
        pack_mask(one, full)
    values, scale = np.ones((2, 3), np.float32), np.ones(2, np.float32)
    for dtype in ("f16", "i8", "i4"):
        with pytest.raises(BadBlock, match="NaN or infinity"):
            pack_values(values * np.float32(np.nan), dtype, scale, True)
    with pytest.raises(BadBlock, match="NaN or infinity"):
        pack_values(values, "i8", scale * np.float32(np.inf), True)
    with pytest.raises(BadBlock, match="too large"):
        pack_values(values * np.float32(65520), "f16", None, True)


@pytest.mark.parametrize(
    ("at", "bits", "message"),
    [(0, 0x10, "not 2 ones"), (0, 0x32, "not 2 ones"), (8, 0x21, "past its last"), (15, 0x80, "not 2 ones")],
)
def test_a_mask_that_kernels_could_not_follow(at, bits, message):
    (mask, payload), *_ = golden_tiers("i8")
    spoilt = payload[:at] + bytes([bits]) + payload[at + 1 :]
    with pytest.raises(BadBlock, match=message):
        check_finite(mask, aligned(spoilt))


def test_ones_past_the_columns_that_are_left():
    mask, payload = golden_tiers("i8")[2]
    check_finite(mask, aligned(payload), 2)
    with pytest.raises(BadBlock, match="past its last"):
        check_finite(mask, aligned(payload.replace(b"\x04", b"\x08", 1)), 2)


@given(st.data())
def test_planes_round_trip(data):
    m, n, level = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 200)), data.draw(st.integers(0, 6))
    dtype = data.draw(st.sampled_from(["i8", "i8-shared"]))
    planes = data.draw(arrays(np.bool_, (1 if level else 2, m, n)))
    shape = (m, 2 ** (level + 2)) if dtype == "i8" else (2 ** (level + 2),)
    levels = data.draw(arrays(np.int8, shape, elements=st.integers(-127, 127)))
    payload = pack_plane(planes, np.full(m, 0.75, np.float32), levels)
    stored = plane_entry((m, n), level, dtype)
    assert len(payload) == stored.nbytes
    for found, put in zip(unpack_plane(stored, payload), (planes, np.full(m, 0.75), levels), strict=True):
        np.testing.assert_array_equal(found, put)


@pytest.mark.parametrize(
    ("n", "sizes"), [(1, (1,)), (64, (64,)), (172, (128, 32, 8, 4)), (576, (256, 256, 64)), (1280, (256,) * 5)]
)
def test_a_rotation_keeps_lengths_and_can_be_undone(n, sizes):
    assert rotation_blocks(n) == sizes
    x = np.random.default_rng(0).standard_normal((5, n)).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(rotate_rows(x), axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)
    np.testing.assert_allclose(unrotate_rows(rotate_rows(x)), x, atol=1e-5)


def test_a_rotation_spreads_one_outlier_over_its_block():
    x = np.zeros((1, 576), np.float32)
    x[0, 300] = 16
    np.testing.assert_allclose(np.abs(rotate_rows(x))[0], np.repeat([0, 1, 0], [256, 256, 64]), atol=1e-5)


def test_signs_of_the_rotation_are_mixed():
    signs = [rotation_sign(j) for j in range(4096)]
    assert abs(sum(signs)) < 200
    assert abs(sum(a * b for a, b in pairwise(signs))) < 200


# -- numbers that are none ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "i8"])
def test_dense_refuses(bad, dtype):
    with pytest.raises(BadBlock, match="NaN or infinity"):
        pack_dense(np.array([1.0, bad], np.float32), dtype)


@pytest.mark.parametrize(("dtype", "value"), [("f16", 65520.0), ("f16", -1e6), ("bf16", 3.4e38), ("bf16", -3.4e38)])
def test_dense_refuses_what_would_round_to_infinity(dtype, value):
    with pytest.raises(BadBlock, match="too large"):
        pack_dense(np.array([1.0, value], np.float32), dtype)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_signs_refuse_bad_factors(bad):
    good = np.ones((2, 1), np.float16)
    for u, v in ((good * np.float16(bad), good.T), (good, good.T * np.float16(bad))):
        with pytest.raises(BadBlock, match="NaN or infinity"):
            pack_signs(np.ones((2, 2), np.bool_), u, v)


@dataclass(frozen=True)
class Stored:
    """A good block, and where in it a NaN of which bytes does harm."""

    entry: BlockEntry
    payload: bytes
    at: tuple[int, ...]
    nan: bytes


ONES = np.ones((3, 4), np.float32)
STORED = {
    "f32": Stored(entry("dense", (3, 4), dtype="f32"), pack_dense(ONES, "f32"), (0, 44), b"\0\0\xc0\x7f"),
    "f16": Stored(entry("dense", (3, 4), dtype="f16"), pack_dense(ONES, "f16"), (0, 22), b"\0\xfc"),
    "bf16": Stored(entry("dense", (3, 4), dtype="bf16"), pack_dense(ONES, "bf16"), (0, 22), b"\x80\xff"),
    "i8": Stored(entry("dense", (3, 4), dtype="i8"), pack_dense(ONES, "i8"), (0, 8), b"\0\0\x80\x7f"),
    "i8 vector": Stored(entry("dense", (4,), dtype="i8"), pack_dense(ONES[0], "i8"), (0,), b"\0\0\x80\xff"),
    "plane": Stored(plane_entry((2, 3), 0, "i8"), golden.PLANES, (32, 34), b"\x80\x7f"),
    "shared plane": Stored(plane_entry((2, 3), 1, "i8-shared"), golden.SHARED_PLANE, (16, 18), b"\xc0\xff"),
    "values f16": Stored(tier_entries((2, 5), 0, 2, "f16", 0)[1], golden.VALUES["f16"][0], (0, 6), b"\0\xfc"),
    "values i8": Stored(tier_entries((2, 5), 0, 2, "i8", 0)[1], golden.VALUES["i8"][0], (0, 4), b"\0\0\xc0\x7f"),
    "values i4": Stored(tier_entries((2, 5), 0, 2, "i4", 0)[1], golden.VALUES["i4"][0], (0, 4), b"\0\0\x80\xff"),
    "signs": Stored(entry("signs", (2, 3), rank=1), golden.SIGNS, (16, 18, 20, 24), b"\x01\x7c"),
}


def aligned(payload: bytes) -> np.ndarray:
    """As a resident block lies: padded with what would be NaN anywhere."""
    return np.frombuffer(payload.ljust(-(-len(payload) // 64) * 64, b"\xff"), np.uint8)


@pytest.mark.parametrize("name", STORED)
def test_check_finite(name):
    stored = STORED[name]
    check_finite(stored.entry, aligned(stored.payload))
    for at in stored.at:
        spoilt = stored.payload[:at] + stored.nan + stored.payload[at + len(stored.nan) :]
        with pytest.raises(BadBlock, match=r"t level \d holds NaN or infinity"):
            check_finite(stored.entry, aligned(spoilt))


@pytest.mark.parametrize(("name", "at"), [("plane", 36), ("plane", 43), ("shared plane", 20), ("shared plane", 27)])
def test_check_finite_refuses_what_integer_kernels_could_not_negate(name, at):
    stored = STORED[name]
    spoilt = stored.payload[:at] + b"\x80" + stored.payload[at + 1 :]
    with pytest.raises(BadBlock, match=r"t level \d holds a level of -128"):
        check_finite(stored.entry, aligned(spoilt))


@pytest.mark.parametrize(
    ("dtype", "at", "byte", "value"),
    [("i8", 8, 0x80, -128), ("i8", 11, 0x80, -128), ("i4", 8, 0x18, -8), ("i4", 9, 0x81, -8)],
)
def test_check_finite_refuses_values_that_integer_kernels_could_not_negate(dtype, at, byte, value):
    _, (values, payload), *_ = golden_tiers(dtype)
    with pytest.raises(BadBlock, match=f"a value of {value}"):
        check_finite(values, aligned(payload[:at] + bytes([byte]) + payload[at + 1 :]))


def test_plane_refuses():
    planes, levels = np.zeros((2, 1, 3), np.bool_), np.zeros(4, np.int8)
    with pytest.raises(BadBlock, match="NaN or infinity"):
        pack_plane(planes, np.full(1, np.inf, np.float32), levels)
    with pytest.raises(BadBlock, match="-128"):
        pack_plane(planes, np.ones(1, np.float32), levels - np.int8(127) - np.int8(1))


def test_check_finite_does_not_take_signs_or_integers_for_numbers():
    full = np.ones((1, 64), np.bool_)
    payload = pack_signs(full, np.ones((1, 1), np.float16), np.ones((1, 64), np.float16))
    check_finite(entry("signs", (1, 64), rank=1), aligned(payload))
    check_finite(entry("dense", (4,), dtype="i8"), aligned(pack_dense(-ONES[0], "i8")))
