"""Every kernel of the table equals its reference, over sizes around the vectors' edges and nasty values."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest

from ebbflow.kernels.instructions import available
from ebbflow.kernels.rows import JIT_OFF, half_to_float
from ebbflow.kernels.table import TABLE, Draw, Entry

ROUNDING = 2.0**-24
UNDERFLOW = 1e-40  # absolute: products of subnormals
TIERS = (
    ("mask:50", "values:f16"),
    ("mask:50", "values:i8"),
    ("mask:50", "values:i4"),
    ("mask:100", "values:i8"),
    ("mask:1", "values:f16"),
    ("mask:30", "values:f16", "mask:20", "values:f16"),
    ("mask:1", "values:i4", "mask:49", "values:i4", "mask:13", "values:i4"),
    ("mask:40", "values:i8", "mask:9", "values:i8", "mask:100", "values:i8"),
    ("mask:40", "values:i8", "mask:9"),
    ("mask:40",),
)
LEVELS = (
    (),
    ("f32",),
    ("f16",),
    ("bf16",),
    ("i8",),
    ("signs:1",),
    ("signs:2",),
    ("signs:5",),
    ("signs:16",),
    ("signs:5", "signs:2", "signs:16"),
    ("i8", "signs:1", "f16", "signs:3", "bf16", "f32"),
    ("plane",),
    ("plane", "plane", "plane"),
    ("shared_plane",),
    ("shared_plane", "plane"),
    ("plane", "shared_plane"),
    ("plane", "plane", "shared_plane", "plane", "shared_plane", "shared_plane", "shared_plane"),
    *TIERS,
)
PLANES = (
    ("plane",),
    ("shared_plane", "plane"),
    *(("plane",) * 2 + ("shared_plane",) * more for more in range(6)),
)
SUMS = (
    ("i8",),
    ("f32",),
    ("signs:2",),
    ("i8", "signs:1", "f16", "signs:3", "bf16"),
    *(("signs:1",) * count for count in (1, 2, 3, 4, 5, 9)),
    *TIERS,
)
# plain Python takes microseconds for each multiplication
COLUMNS = (1, 65) if JIT_OFF else (1, 63, 64, 65, 172, 576)
WIDE = (65,) if JIT_OFF else (1, 65, 172, 512, 576)
ROWS = (5,) if JIT_OFF else (1, 3, 4, 5, 67)
TOKENS = (5,) if JIT_OFF else (0, 1, 2, 3, 4, 5, 16)
FEW = (1, 3) if JIT_OFF else (1, 3, 16, 17)
CONTEXTS = (33,) if JIT_OFF else (5, 32, 33, 100)
KV = ("f32", "f16", "i8")
HEADS = (20,) if JIT_OFF else (2, 16, 20, 24, 64, 80, 96)
PER_GROUP = (2,) if JIT_OFF else (1, 2, 5, 8, 19)
MANY = (5,) if JIT_OFF else (11, 40, 99)

Shape = dict[str, Any]


def each(**choices: tuple[Any, ...]) -> list[Shape]:
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


WEIGHTS = each(levels=LEVELS, n=COLUMNS)
SHAPES: dict[str, list[Shape]] = {
    "matmul": WEIGHTS,
    "take_rows": WEIGHTS,
    "multiply_planes": each(instructions=available(), levels=PLANES, n=WIDE),
    "multiply_sum": each(instructions=available(), levels=SUMS, n=WIDE),
    "round_inputs": each(tokens=FEW, n=WIDE, scaled=(False, True)),
    "quantize_inputs": each(tokens=FEW, n=WIDE),
    "store_kv": each(dtype=KV, groups=(1, 2), width=HEADS, tokens=(1, 5), context=CONTEXTS, sequences=(1, 2)),
    "attend": each(dtype=KV, width=HEADS, per_group=PER_GROUP, tokens=(1, 3), context=CONTEXTS, window=(0, 1, 7))
    + each(dtype=KV, width=(20,), per_group=(3,), tokens=MANY, context=(100,), window=(0, 40), sequences=(1, 2))
    + each(dtype=KV, width=(20,), tokens=(1, 5), context=(100,), window=(0, 40), sequences=(4,), shared=(1, 3)),
    "rms_norm": each(tokens=FEW, n=COLUMNS),
    "gated": each(tokens=FEW, n=COLUMNS),
    "rotate": each(tokens=FEW, width=(2, 16, 64)),
    "rotate_inputs": each(tokens=FEW, n=COLUMNS),
    "unrotate_rows": each(tokens=FEW, n=COLUMNS),
    "feedback": each(m=(1, 9), n=(1, 20), depth=(2, 5)),
    "descend": each(m=(1, 9), n=(1, 20), depth=(2, 5)),
    "gather_moments": each(m=(1, 9), n=(1, 20), count=(4, 16)),
    "add": each(tokens=FEW, n=COLUMNS) + each(tokens=FEW, n=COLUMNS, rows=(1,)),
}


def inner(name: str, shape: Shape) -> Iterator[Shape]:
    """Rows and tokens are cheap to vary within one test; the rest names it."""
    if name not in ("matmul", "take_rows", "multiply_planes", "multiply_sum"):
        yield shape
        return
    for rows, tokens in product(ROWS, TOKENS):
        yield shape | {"m": rows, "tokens": tokens}


def draw(shape: Shape) -> Draw:
    seed = zlib.crc32(repr(shape).encode())
    return Draw(seed, nasty=seed % 2 == 1)


def both(entry: Entry, arguments: list[Any]) -> tuple[Any, Any]:
    mine, theirs = copy.deepcopy(arguments), copy.deepcopy(arguments)
    entry.kernel(*mine)
    entry.reference(*theirs)
    for place, (now, before) in enumerate(zip(mine, arguments, strict=True)):
        if isinstance(now, np.ndarray) and place not in (entry.output % len(mine), *scratch(entry)):
            np.testing.assert_array_equal(now, before, err_msg=f"{entry.name} changed its argument {place}")
    return mine[entry.output], theirs[entry.output]


def scratch(entry: Entry) -> tuple[int, ...]:
    return {
        "matmul": (4,),
        "multiply_planes": (7,),
        "multiply_sum": (8, 9),
        "round_inputs": (3, 4),
        "quantize_inputs": (4, 5),
        "attend": (8,),
        "feedback": (0,),
        "descend": (3,),
        "gather_moments": (3,),
    }.get(entry.name, ())


@pytest.mark.parametrize(
    ("entry", "shape"),
    [
        pytest.param(entry, shape, id=f"{entry.name}-{'-'.join(str(value) for value in shape.values())}")
        for entry in TABLE
        for shape in SHAPES[entry.name]
    ],
)
def test_equals_the_reference(entry: Entry, shape: Shape) -> None:
    for whole in inner(entry.name, shape):
        arguments = entry.arguments(draw(whole), **whole)
        got, want = both(entry, arguments)
        allowed = entry.roundings * ROUNDING * entry.magnitude(*arguments) + (UNDERFLOW if entry.roundings else 0)
        wrong = ~(np.abs(got.astype(np.float64) - want) <= allowed)
        assert not wrong.any(), f"{whole}: {got[wrong][:5]} where the reference has {want[wrong][:5]}"


def test_the_comparison_sees_a_small_mistake() -> None:
    """The bound is not so wide that everything passes: one of 65 columns off by a thousandth must show."""
    entry = next(entry for entry in TABLE if entry.name == "matmul")
    arguments = entry.arguments(Draw(0), m=5, n=65, tokens=3, levels=("signs:2", "signs:2"))
    got, _ = both(entry, arguments)
    arguments[3][:, 64] *= 1.001
    _, want = both(entry, arguments)
    allowed = entry.roundings * ROUNDING * entry.magnitude(*arguments)
    assert (np.abs(got.astype(np.float64) - want) > allowed).mean() > 0.5


def test_half_to_float_is_exact_for_every_finite_half() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[(bits & 0x7C00) != 0x7C00][:: 251 if JIT_OFF else 1]
    found = np.array([half_to_float(half) for half in bits], np.float32)
    np.testing.assert_array_equal(found.view(np.uint32), bits.view(np.float16).astype(np.float32).view(np.uint32))


@pytest.mark.skipif(JIT_OFF, reason="Python's math.exp raises where the compiled one gives infinity")
def test_a_gate_far_below_zero_is_shut_not_nan() -> None:
    entry = next(entry for entry in TABLE if entry.name == "gated")
    gate = np.array([[-89.0, -1e10, -3e38]], np.float32)
    y = np.full((1, 3), np.nan, np.float32)
    entry.kernel(gate, np.ones((1, 3), np.float32), y)
    np.testing.assert_allclose(y, 0, atol=1e-36)


def narrower(value: Any) -> Any:
    wrong = {"f": np.float64, "i": np.int16, "u": np.uint32}[value.dtype.kind]
    return value.astype(wrong)


@pytest.mark.skipif(JIT_OFF, reason="signatures belong to the compiler")
@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_another_dtype_or_layout_is_refused_not_compiled(entry: Entry) -> None:
    *_, shape = inner(entry.name, SHAPES[entry.name][-1])
    arguments = entry.arguments(Draw(0), **shape)
    for place, value in enumerate(arguments):
        if isinstance(value, np.ndarray) and value.size:  # what is empty has any layout
            for wrong in (narrower(value), np.repeat(value, 2, axis=-1)[..., ::2]):
                with pytest.raises(TypeError):
                    entry.kernel(*arguments[:place], wrong, *arguments[place + 1 :])
    assert len(entry.kernel.signatures) == 1  # type: ignore[attr-defined]
