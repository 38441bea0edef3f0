"""Attention's edges: what must not be read, what is not a number, and what fp16 and int8 cost."""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numpy as np
import pytest
from llvmlite import ir
from numba import njit
from numba.core.runtime import _nrt_python, rtsys
from numba.extending import intrinsic
from numpy.typing import NDArray

from ebbflow.kernels import attention
from ebbflow.kernels.attention import BLOCK_TOKENS, KINDS, attend, numbers, reference_attend, split_scales, store_kv
from ebbflow.kernels.exponential import exponential
from ebbflow.kernels.halves import narrow
from ebbflow.kernels.rows import JIT_OFF
from ebbflow.kernels.vectors import vector

F32 = NDArray[np.float32]
GROUPS, PER_GROUP, WIDTH = 2, 3, 24
TABLES = np.array([[2, 0]])


class Sequence:
    """Tokens `[0, count)` of one sequence, in memory that otherwise holds `fill`."""

    def __init__(self, count: int, dtype: str = "f16", fill: int = 0xFF, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.kind, self.positions = KINDS[dtype], np.arange(count)
        self.rows = np.zeros(count, np.int64)
        self.kv = np.full((3, 1, 2, GROUPS, attention.head_nbytes(self.kind, WIDTH)), fill, np.uint8)
        self.k, self.v = (rng.standard_normal((count, GROUPS, WIDTH)).astype(np.float32) for _ in "kv")
        self.q = rng.standard_normal((count, GROUPS * PER_GROUP, WIDTH)).astype(np.float32)

    def store(self) -> None:
        store_kv(self.kind, self.kv, 0, TABLES, self.rows, self.positions, self.k, self.v)

    def attend(self, window: int = 0, kernel: Any = attend) -> F32:
        scratch = np.full((2, attention.unit_floats(PER_GROUP, WIDTH)), np.nan, np.float32)
        y = np.full((len(self.rows), GROUPS * PER_GROUP * WIDTH), np.nan, np.float32)
        kernel(self.kind, self.kv, 0, TABLES, self.rows, self.positions, self.q, window, scratch, y)
        return y


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("dtype", KINDS)
def test_what_memory_held_before_does_not_matter(dtype: str, window: int) -> None:
    outputs = []
    for fill in (0x00, 0x7B, 0xFF):  # zeros, large numbers, NaN
        sequence = Sequence(40, dtype, fill)
        sequence.store()
        outputs.append(sequence.attend(window))
    for other in outputs[1:]:
        np.testing.assert_array_equal(other.view(np.uint32), outputs[0].view(np.uint32))


@pytest.mark.parametrize("dtype", ["f16", "i8"])
@pytest.mark.parametrize("bad", [np.nan, 3e38])
def test_a_broken_token_does_not_reach_those_before_it(bad: float, dtype: str) -> None:
    whole = Sequence(40, dtype)
    whole.store()
    want = whole.attend()
    whole.k[37], whole.v[37], whole.q[37] = bad, bad, bad
    whole.store()
    np.testing.assert_array_equal(whole.attend()[:37].view(np.uint32), want[:37].view(np.uint32))


@pytest.mark.parametrize("dtype", ["f16", "i8"])
@pytest.mark.parametrize("what", ["q", "k", "v"])
def test_nan_stays_nan(what: str, dtype: str) -> None:
    """One number of each head is enough: it says that something overflowed."""
    sequence = Sequence(40, dtype)
    getattr(sequence, what)[35, :, 7 if what == "k" else slice(None)] = np.nan
    sequence.store()
    assert np.isnan(sequence.attend()[35]).all()
    assert np.isnan(sequence.attend()[36:]).all() == (what != "q")


def test_a_token_alone_with_itself_gets_its_value() -> None:
    sequence = Sequence(40)
    sequence.store()
    got = sequence.attend(window=1).reshape(40, GROUPS, PER_GROUP, WIDTH)
    want = sequence.v.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(got, np.repeat(want[:, :, None], PER_GROUP, axis=2))


@pytest.mark.parametrize("dtype", ["f16", "i8"])
@pytest.mark.parametrize("large", [1e6, np.inf])
def test_values_too_large_for_fp16_are_cut_not_infinite(large: float, dtype: str) -> None:
    sequence = Sequence(40, dtype)
    sequence.v[:, :, 3] *= np.float32(large)
    sequence.store()
    _, values = numbers(sequence.kind, sequence.kv, WIDTH)
    assert np.abs(values[2]).max() == pytest.approx(65504, rel=1e-6)
    assert np.isfinite(sequence.attend()).all()


@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-31])
def test_as_int8_heads_of_nothing_are_zero(tiny: float) -> None:
    sequence = Sequence(40, "i8")
    sequence.k[:, 0], sequence.v[:, 1] = tiny, -tiny
    sequence.store()
    for place, scales in enumerate(split_scales(sequence.kv)):
        assert not scales[2, 0, place].any()
        assert (scales[2, 0, 1 - place] > 0).all()
    got = sequence.attend().reshape(40, GROUPS, -1)
    assert not got[:, 1].any()
    assert got[:, 0].any()


def test_as_int8_a_head_is_rounded_to_127ths_of_its_largest() -> None:
    sequence = Sequence(BLOCK_TOKENS, "i8")
    sequence.k *= np.exp(np.random.default_rng(1).standard_normal((BLOCK_TOKENS, GROUPS, 1)) * 4).astype(np.float32)
    sequence.store()
    keys, values = numbers(sequence.kind, sequence.kv, WIDTH)
    for stored, x in ((keys[2, 0].transpose(2, 0, 1), sequence.k), (values[2, 0].transpose(1, 0, 2), sequence.v)):
        step = np.abs(x).max(axis=2, keepdims=True) / 127
        assert (np.abs(stored - x) <= 0.5001 * step).all()
        assert (np.abs(stored - x) > 0.4 * step).any()


def test_int8_takes_about_half_of_fp16() -> None:
    assert attention.head_nbytes(KINDS["i8"], 64) == BLOCK_TOKENS * (64 + 4)
    for width in (64, 128):
        assert attention.head_nbytes(KINDS["i8"], width) <= 0.54 * attention.head_nbytes(KINDS["f16"], width)


def test_scores_of_hundreds_do_not_overflow() -> None:
    sequence = Sequence(40, "f32")
    sequence.q *= 100
    sequence.store()
    got = sequence.attend()
    np.testing.assert_allclose(got, sequence.attend(kernel=reference_attend), atol=2e-4)


@pytest.mark.parametrize(("dtype", "bits"), [("f16", 11), ("i8", 7)])
def test_rounding_costs_little(dtype: str, bits: int) -> None:
    """It moves outputs of order one by a few of their roundings."""
    outputs = []
    for each in (dtype, "f32"):
        sequence = Sequence(40, each)
        sequence.store()
        outputs.append(sequence.attend())
    error = np.abs(outputs[0] - outputs[1])
    assert 2.0 ** (-bits - 3) < error.max() < 2.0 ** (2 - bits)
    assert error.mean() < 2.0 ** (-bits - 1)


@pytest.mark.skipif(JIT_OFF, reason="there are no vectors without the compiler")
@pytest.mark.parametrize("dtype", KINDS)
def test_how_many_results_registers_hold_does_not_matter(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence, kind = Sequence(BLOCK_TOKENS, dtype), KINDS[dtype]
    sequence.store()
    memory, found = sequence.kv.reshape(-1), []
    for registers in (1, 4, 16):
        monkeypatch.setattr(attention, "_VECTORS", registers)
        scores = intrinsic(attention._typed_scores)

        @njit
        def run(kind: int, memory: Any, scratch: F32) -> None:
            scores(kind, 4, memory, 0, 0, WIDTH, scratch, 0, WIDTH, 4 * WIDTH)  # noqa: B023

        scratch = np.zeros(4 * (WIDTH + BLOCK_TOKENS), np.float32)
        scratch[: 4 * WIDTH] = sequence.q[0].reshape(-1)[: 4 * WIDTH]
        run(kind, memory, scratch)
        found.append(scratch[4 * WIDTH :].view(np.uint32))
    assert found[0].any()
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


@pytest.mark.skipif(JIT_OFF, reason="numpy allocates for everything")
@pytest.mark.parametrize("dtype", KINDS)
def test_units_of_work_allocate_nothing(dtype: str) -> None:
    """A thread that found no memory would leave the others waiting for ever."""
    _nrt_python.memsys_enable_stats()
    counts = []
    for tokens in (1, 64):  # of 2 groups: 2 units, and 4
        sequence = Sequence(tokens, dtype)
        sequence.store()
        before = rtsys.get_allocation_stats().alloc
        sequence.attend()
        counts.append(rtsys.get_allocation_stats().alloc - before)
    _nrt_python.memsys_disable_stats()
    assert counts[0] == counts[1] > 0  # `cut_units`, before threads go their own ways


@pytest.mark.parametrize(("dtype", "names"), [("f16", ("fcvtl", "fcvtn", "fmla")), ("i8", ("scvtf", "fmla"))])
def test_the_arm_code_is_made_of_the_instructions_it_is_meant_for(
    dtype: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLVM compiles it for a processor that is not here; it never ran."""
    monkeypatch.setattr(attention, "_VECTORS", 4)
    module = ir.Module()
    module.triple = "aarch64-unknown-linux-gnu"
    floats, whole = ir.FloatType().as_pointer(), ir.IntType(64)
    kind = ir.FunctionType(ir.VoidType(), [floats, floats, ir.IntType(8).as_pointer(), whole, ir.FloatType()])
    builder = ir.IRBuilder(ir.Function(module, kind, "product").append_basic_block())
    a, c, b, count, factor = builder.function.args
    attention._emit_product(builder, KINDS[dtype], 4, a, (count, count, count), (b, b), count, c, a)
    source = builder.bitcast(a, vector(ir.FloatType(), 16).as_pointer())
    weights = exponential(builder, builder.load(source, align=4))
    stored = narrow(builder, weights, able=True) if dtype == "f16" else attention._rounded(builder, weights, factor)
    builder.store(stored, builder.bitcast(b, stored.type.as_pointer()), align=1)
    builder.ret_void()
    llvmlite.binding.initialize_all_targets()
    llvmlite.binding.initialize_all_asmprinters()
    target = llvmlite.binding.Target.from_triple(module.triple)
    code = target.create_target_machine(features="+neon", opt=2).emit_assembly(
        llvmlite.binding.parse_assembly(str(module))
    )
    for name in names:
        assert f"\t{name}\t" in code, name
    assert "\tbl\t" not in code  # calls nothing
