"""The integer product: one result, bit for bit, whatever computes it, from the nearest bytes."""

from __future__ import annotations

from itertools import product
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import pytest
from llvmlite import ir
from numpy.typing import NDArray

from ebbflow.kernels import instructions, planes, quantize
from ebbflow.kernels.instructions import NAMES, available
from ebbflow.kernels.planes import (
    column_order,
    emit_decode,
    emit_dot,
    emit_single,
    emit_turn,
    multiply_planes,
    padded,
    stored_bytes,
)
from ebbflow.kernels.table import Draw, multiply_planes_arguments
from ebbflow.kernels.vectors import Neon, number

DEPTHS = [("plane",) * 2 + ("shared_plane",) * more for more in range(6)]
F32 = NDArray[np.float32]


def result(arguments: list[Any]) -> NDArray[np.uint32]:
    arguments[-1][:] = np.nan
    multiply_planes(*arguments)
    assert not np.isnan(arguments[-1]).any()
    return arguments[-1].view(np.uint32).copy()


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("n", [1, 65, 300, 576, 1024])
@pytest.mark.parametrize("levels", DEPTHS, ids=len)
def test_every_instruction_set_gives_the_same_bits(levels: tuple[str, ...], n: int, tokens: int) -> None:
    found = [
        result(multiply_planes_arguments(Draw(n), m=9, n=n, tokens=tokens, levels=levels, instructions=name))
        for name in available()
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


@pytest.mark.parametrize("name", available())
def test_tokens_rows_chunks_and_threads_do_not_show(name: str) -> None:
    whole = multiply_planes_arguments(
        Draw(3), m=11, n=600, tokens=9, levels=("plane",) * 3 + ("shared_plane",), instructions=name, chunks=1
    )
    want = result(whole)
    before = numba.get_num_threads()
    try:
        for threads, chunks in product(range(1, min(2, numba.config.NUMBA_NUM_THREADS) + 1), (1, 2, 5)):
            numba.set_num_threads(threads)
            scratch = np.zeros((chunks, *whole[7].shape[1:]), np.uint8)
            for start, stop in ((0, 9), (0, 1), (3, 8), (8, 9)):
                part = [np.ascontiguousarray(value[start:stop]) for value in whole[4:7]]
                y = np.empty((stop - start, 11), np.float32)
                np.testing.assert_array_equal(result([*whole[:4], *part, scratch, y]), want[start:stop])
    finally:
        numba.set_num_threads(before)


def quantized(x: F32) -> tuple[NDArray[np.int8], F32, NDArray[np.int32]]:
    """By a rotation that only changes nothing's size: blocks of one column."""
    tokens, n = x.shape
    q, p = np.empty((tokens, padded(n)), np.int8), padded(n) // 32
    scales, corrections = np.empty((tokens, p), np.float32), np.empty((tokens, p), np.int32)
    signs, sizes = np.ones(n, np.float32), np.ones(n, np.int64)
    quantize.quantize_inputs(np.ascontiguousarray(x), signs, sizes, q, scales, corrections)
    return q, scales, corrections


def in_order(q: NDArray[np.int8]) -> NDArray[np.int8]:
    columns = np.empty((len(q), q.shape[1] // 512, 512), np.int8)
    columns[:, :, column_order()] = q.reshape(columns.shape)
    return columns.reshape(q.shape)


def test_bytes_are_the_nearest_and_the_largest_is_127() -> None:
    x = np.random.default_rng(0).standard_normal((3, 600)).astype(np.float32)
    x[1, 256:512] *= 1000  # does not coarsen the other groups
    q, scales, corrections = quantized(x)
    columns, scale = in_order(q), np.repeat(scales[:, ::8], 256, axis=1)
    assert (np.abs(columns[:, :600] * scale[:, :600] - x) <= scale[:, :600] * 0.5001).all()
    assert not columns[:, 600:].any()
    groups = np.abs(columns.reshape(3, -1, 256)).max(2)
    assert (groups[:, :3] == 127).all()
    assert not groups[:, 3:].any()
    sums = q.reshape(3, -1, 8, 16, 4).astype(np.int64).sum((2, 4)).reshape(3, -1)
    np.testing.assert_array_equal(corrections, -128 * sums)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_shows_in_the_result(bad: float) -> None:
    x = np.ones((2, 300), np.float32)
    x[0, 7] = bad
    _, scales, _ = quantized(x)
    assert np.isnan(scales[0, :8]).all()
    assert np.isfinite(scales[0, 8:]).all()
    assert np.isfinite(scales[1]).all()


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38])
def test_almost_nothing_is_nothing(size: float) -> None:
    q, scales, corrections = quantized(np.full((1, 10), size, np.float32))
    assert not q.any()
    assert not scales.any()
    assert not corrections.any()


def test_a_set_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(instructions.VARIABLE, raising=False)
    assert instructions.choose() == NAMES[available()[0]]
    assert instructions.compiled() == tuple(dict.fromkeys((available()[0], "portable")))
    monkeypatch.setenv(instructions.VARIABLE, instructions.EVERY)
    assert instructions.choose() == NAMES[available()[0]]
    assert instructions.compiled() == available()
    monkeypatch.setenv(instructions.VARIABLE, "portable")
    assert instructions.choose() == instructions.PORTABLE
    assert instructions.compiled() == ("portable",)
    monkeypatch.setenv(instructions.VARIABLE, "sse9")
    with pytest.raises(ValueError, match=r"sse9.*portable"):
        instructions.choose()


def test_the_arm_kernel_is_made_of_the_instructions_it_is_meant_for() -> None:
    """LLVM compiles it for a processor that is not here; it never ran."""
    module = ir.Module()
    module.triple = "aarch64-unknown-linux-gnu"
    pointer, whole = ir.IntType(8).as_pointer(), ir.IntType(64)
    for depth in planes.DEPTHS:
        kind = ir.FunctionType(ir.VoidType(), [pointer, whole.as_pointer(), whole, whole, pointer])
        function = ir.Function(module, kind, f"decode_{depth}")
        builder = ir.IRBuilder(function.append_basic_block())
        base, offsets, rows, words, out = function.args
        emit_decode(Neon(builder), base, offsets, depth, rows, (words, number(0), words), base, out)
        scales = builder.bitcast(out, ir.FloatType().as_pointer())
        emit_single(Neon(builder), base, offsets, depth, rows, (words, words), base, (out, out, words, scales), scales)
        emit_turn(Neon(builder), out, words, out, out)
        builder.ret_void()
    floats, sums = ir.FloatType().as_pointer(), ir.IntType(32).as_pointer()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer, pointer, whole, floats, sums]), "dot")
    builder = ir.IRBuilder(function.append_basic_block())
    w, x, step, scales, corrections = function.args
    of = Neon(builder)
    emit_dot(of, stored_bytes(of, w, step), x, step, scales, corrections, 1, scales)
    builder.ret_void()
    llvmlite.binding.initialize_all_targets()
    llvmlite.binding.initialize_all_asmprinters()
    target = llvmlite.binding.Target.from_triple(module.triple)
    machine = target.create_target_machine(features="+neon,+dotprod", opt=2)
    code = machine.emit_assembly(llvmlite.binding.parse_assembly(str(module)))
    for name in ("sdot", "tbl", "zip1"):
        assert f"\t{name}\t" in code, name
