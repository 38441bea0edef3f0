"""Attention's edges: what must not be read, what is not a number, and what fp16 costs."""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numpy as np
import pytest
from llvmlite import ir
from numba import njit
from numba.extending import intrinsic
from numpy.typing import NDArray

from ebbflow.kernels import attention
from ebbflow.kernels.attention import BLOCK_TOKENS, KINDS, attend, reference_attend, split, store_kv
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
@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_what_memory_held_before_does_not_matter(dtype: str, window: int) -> None:
    outputs = []
    for fill in (0x00, 0x7B, 0xFF):  # zeros, large numbers, NaN
        sequence = Sequence(40, dtype, fill)
        sequence.store()
        outputs.append(sequence.attend(window))
    for other in outputs[1:]:
        np.testing.assert_array_equal(other.view(np.uint32), outputs[0].view(np.uint32))


@pytest.mark.parametrize("bad", [np.nan, 3e38])
def test_a_broken_token_does_not_reach_those_before_it(bad: float) -> None:
    whole = Sequence(40)
    whole.store()
    want = whole.attend()
    whole.k[37], whole.v[37], whole.q[37] = bad, bad, bad
    whole.store()
    np.testing.assert_array_equal(whole.attend()[:37].view(np.uint32), want[:37].view(np.uint32))


@pytest.mark.parametrize("what", ["q", "k", "v"])
def test_nan_stays_nan(what: str) -> None:
    sequence = Sequence(40)
    getattr(sequence, what)[35] = np.nan
    sequence.store()
    assert np.isnan(sequence.attend()[35]).all()
    assert np.isnan(sequence.attend()[36:]).all() == (what != "q")


def test_a_token_alone_with_itself_gets_its_value() -> None:
    sequence = Sequence(40)
    sequence.store()
    got = sequence.attend(window=1).reshape(40, GROUPS, PER_GROUP, WIDTH)
    want = sequence.v.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(got, np.repeat(want[:, :, None], PER_GROUP, axis=2))


def test_values_too_large_for_fp16_are_cut_not_infinite() -> None:
    sequence = Sequence(40)
    sequence.v *= np.float32(1e6)
    sequence.store()
    _, values = split(sequence.kind, sequence.kv, WIDTH)
    assert np.abs(values[2]).max() == 65504
    assert np.isfinite(sequence.attend()).all()


def test_scores_of_hundreds_do_not_overflow() -> None:
    sequence = Sequence(40, "f32")
    sequence.q *= 100
    sequence.store()
    got = sequence.attend()
    np.testing.assert_allclose(got, sequence.attend(kernel=reference_attend), atol=2e-4)


def test_fp16_costs_little() -> None:
    """Rounding keys and values to 11 bits moves outputs of order one by a few of their roundings."""
    outputs = []
    for dtype in ("f16", "f32"):
        sequence = Sequence(40, dtype)
        sequence.store()
        outputs.append(sequence.attend())
    error = np.abs(outputs[0] - outputs[1])
    assert 2**-14 < error.max() < 2**-9
    assert error.mean() < 2**-12


@pytest.mark.skipif(JIT_OFF, reason="there are no vectors without the compiler")
@pytest.mark.parametrize("dtype", ["f16", "f32"])
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


def test_the_arm_code_is_made_of_the_instructions_it_is_meant_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM compiles it for a processor that is not here; it never ran."""
    monkeypatch.setattr(attention, "_VECTORS", 4)
    module = ir.Module()
    module.triple = "aarch64-unknown-linux-gnu"
    floats, whole = ir.FloatType().as_pointer(), ir.IntType(64)
    kind = ir.FunctionType(ir.VoidType(), [floats, floats, ir.IntType(8).as_pointer(), whole])
    builder = ir.IRBuilder(ir.Function(module, kind, "product").append_basic_block())
    a, c, b, count = builder.function.args
    attention._emit_product(builder, KINDS["f16"], 4, a, (count, count, count), (b, b), count, c, a)
    source = builder.bitcast(a, vector(ir.FloatType(), 16).as_pointer())
    halves = narrow(builder, exponential(builder, builder.load(source, align=4)), able=True)
    builder.store(halves, builder.bitcast(b, halves.type.as_pointer()), align=2)
    builder.ret_void()
    llvmlite.binding.initialize_all_targets()
    llvmlite.binding.initialize_all_asmprinters()
    target = llvmlite.binding.Target.from_triple(module.triple)
    code = target.create_target_machine(features="+neon", opt=2).emit_assembly(
        llvmlite.binding.parse_assembly(str(module))
    )
    for name in ("fcvtl", "fcvtn", "fmla"):
        assert f"\t{name}\t" in code, name
    assert "\tbl\t" not in code  # calls nothing
