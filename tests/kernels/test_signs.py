"""Weights that add up, in integers: one result, bit for bit, whatever computes it, and near the stored weight's."""

from __future__ import annotations

from itertools import product
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import pytest
from llvmlite import ir
from numpy.typing import NDArray

from ebbflow.kernels import signs
from ebbflow.kernels.instructions import available
from ebbflow.kernels.reference import reference_levels
from ebbflow.kernels.rounding import round_inputs
from ebbflow.kernels.rows import JIT_OFF
from ebbflow.kernels.signs import emit_decode_signs, integral, multiply_sum, prepare
from ebbflow.kernels.table import Draw, multiply_sum_arguments, store_levels
from ebbflow.kernels.vectors import Neon

LEVELS = (*(("signs:1",) * count for count in (1, 4, 5, 9)), ("i8",), ("signs:3", "f16"))


def result(arguments: list[Any]) -> NDArray[np.uint32]:
    arguments[-1][:] = np.nan
    multiply_sum(*arguments)
    assert not np.isnan(arguments[-1]).any()
    return arguments[-1].view(np.uint32).copy()


@pytest.mark.parametrize("n", (65,) if JIT_OFF else (1, 65, 300, 576, 1024))
@pytest.mark.parametrize("levels", LEVELS, ids="+".join)
def test_every_instruction_set_gives_the_same_bits(levels: tuple[str, ...], n: int) -> None:
    found = [
        result(multiply_sum_arguments(Draw(n), m=9, n=n, tokens=6, levels=levels, instructions=name))
        for name in available()
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


@pytest.mark.parametrize("levels", LEVELS[::2], ids="+".join)
@pytest.mark.parametrize("name", available())
def test_tokens_rows_chunks_and_threads_do_not_show(name: str, levels: tuple[str, ...]) -> None:
    n = 65 if JIT_OFF else 600
    whole = multiply_sum_arguments(Draw(3), m=11, n=n, tokens=9, levels=levels, instructions=name, chunks=1)
    want = result(whole)
    before = numba.get_num_threads()
    try:
        for threads, chunks in product(range(1, min(2, numba.config.NUMBA_NUM_THREADS) + 1), (1, 2, 5)):
            numba.set_num_threads(threads)
            scratch = [np.zeros((chunks, *array.shape[1:]), array.dtype) for array in whole[8:10]]
            for start, stop in ((0, 9), (0, 1), (3, 8), (8, 9)):
                part = [np.ascontiguousarray(value[start:stop]) for value in whole[5:8]]
                y = np.empty((stop - start, 11), np.float32)
                np.testing.assert_array_equal(result([*whole[:5], *part, *scratch, y]), want[start:stop])
    finally:
        numba.set_num_threads(before)


def relative_error(stored: Any, table: Any, m: int, n: int) -> float:
    """Of a product with a normal input whose columns differ a hundredfold in size."""
    rng = np.random.default_rng(0)
    made = prepare(stored, table, m, n) if integral(table) else np.zeros(0, np.uint8)
    x = (rng.standard_normal((4, n)) * 10 ** rng.uniform(-1, 1, n)).astype(np.float32)
    arguments = multiply_sum_arguments(Draw(0), m=m, n=n, tokens=4, levels=("i8",))
    arguments[1:4] = stored.view(np.uint8), table, made
    round_inputs(x, made[: 4 * n].view(np.float32), *arguments[5:8])
    result(arguments)
    want = x @ sum(reference_levels(stored, table, m, n)).T
    return float(np.linalg.norm(arguments[-1] - want) / np.linalg.norm(want))


@pytest.mark.parametrize("levels", [("signs:1",), ("signs:1",) * 4, ("signs:1",) * 8, ("signs:2",) * 3], ids=len)
def test_rounding_costs_about_a_hundredth(levels: tuple[str, ...]) -> None:
    assert relative_error(*store_levels(Draw(1), levels, 16, 96), 16, 96) < 0.02


def test_a_column_that_only_one_level_knows_coarsens_no_other() -> None:
    stored, table = store_levels(Draw(1), ("signs:1",) * 3, 16, 96)
    for level, at in enumerate(table[:, 1] // 2 + 16 * 2 * 4 + 16):
        stored[at + 5] = np.float16(0 if level != 1 else 300).view(np.uint16)
    assert relative_error(stored, table, 16, 96) < 0.02


def test_more_levels_than_a_sum_of_bytes_can_hold_go_the_plain_way() -> None:
    _, table = store_levels(Draw(0), ("signs:1",) * (signs.MOST_LEVELS + 1), 1, 1)
    assert integral(table[:-1])
    assert not integral(table)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_shows_in_the_scale(bad: float) -> None:
    x = np.ones((2, 300), np.float32)
    x[0, 7] = bad
    q, scales, corrections = np.zeros((2, 512), np.int8), np.zeros((2, 16), np.float32), np.zeros((2, 16), np.int32)
    round_inputs(x, np.zeros(0, np.float32), q, scales, corrections)
    assert np.isnan(scales[0]).tolist() == [s == 1 for s in range(16)]  # columns 4 to 7 of every 64
    assert np.isfinite(scales[1]).all()


def test_the_arm_kernel_is_made_of_the_instructions_it_is_meant_for() -> None:
    """LLVM compiles it for a processor that is not here; it never ran."""
    module = ir.Module()
    module.triple = "aarch64-unknown-linux-gnu"
    pointer, whole = ir.IntType(8).as_pointer(), ir.IntType(64)
    kind = ir.FunctionType(ir.VoidType(), [pointer, whole.as_pointer(), whole, whole, whole, pointer, pointer])
    function = ir.Function(module, kind, "decode")
    builder = ir.IRBuilder(function.append_basic_block())
    base, places, rows, words, groups, made, out = function.args
    emit_decode_signs(Neon(builder), base, places, (rows, words, groups), (made, made, made), out, words)
    builder.ret_void()
    llvmlite.binding.initialize_all_targets()
    llvmlite.binding.initialize_all_asmprinters()
    target = llvmlite.binding.Target.from_triple(module.triple)
    machine = target.create_target_machine(features="+neon,+dotprod", opt=2)
    code = machine.emit_assembly(llvmlite.binding.parse_assembly(str(module)))
    for name in ("smull", "smull2", "addp", "tbl", "zip1"):
        assert f"\t{name}\t" in code, name
