"""Kernels for GPUs, by Triton's interpreter: against the reference, and the same bits whatever is computed beside them.

On a machine that has one, `TRITON_INTERPRET=0 scripts/test tests/kernels/test_gpu.py` runs them on the GPU. What the
interpreter cannot say, whether compilers take them, is asked in a process that does not interpret.
"""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if sys.platform != "linux" or platform.machine() != "x86_64":
    pytest.skip("Triton is only made for Linux on x86-64 here", allow_module_level=True)

import torch

from ebbflow.kernels.gpu.sparse import multiply_sparse
from ebbflow.kernels.gpu.table import TABLE, device
from ebbflow.kernels.reference import reference_levels
from ebbflow.kernels.rows import VALUES_F16
from ebbflow.kernels.table import Draw, Entry

ROUNDING = 2.0**-24
UNDERFLOW = 1e-40  # absolute: products of subnormals
TIERS = (
    ("mask:50", "values:f16"),
    ("mask:50", "values:i8"),
    ("mask:50", "values:i4"),
    ("mask:100", "values:i8"),
    ("mask:30", "values:f16", "mask:20", "values:f16"),
    ("mask:1", "values:i4", "mask:49", "values:i4", "mask:13", "values:i4"),
    ("mask:40", "values:i8", "mask:9", "values:i8", "mask:10", "values:i8", "mask:100", "values:i8"),
    ("mask:40", "values:i8", "mask:9"),
    ("mask:40",),
)
SPARSE = TABLE[0]


def run(arguments: list[Any]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """The bits of a product."""
    arguments[-1][:] = np.nan
    SPARSE.kernel(*arguments)
    assert not np.isnan(arguments[-1]).any()
    return arguments[-1].view(np.uint32).copy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", [(5, 1, 3), (1, 63, 1), (3, 65, 3), (18, 130, 1), (3, 70, 17)], ids=str)
@pytest.mark.parametrize("levels", TIERS, ids="+".join)
@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_equals_the_reference(entry: Entry, levels: tuple[str, ...], shape: tuple[int, int, int]) -> None:
    m, n, tokens = shape
    seed = zlib.crc32(repr((levels, shape)).encode())
    arguments = entry.arguments(Draw(seed, nasty=seed % 2 == 1), m=m, n=n, tokens=tokens, levels=levels)
    mine, theirs = copy.deepcopy(arguments), copy.deepcopy(arguments)
    entry.kernel(*mine)
    entry.reference(*theirs)
    for now, before in zip(mine[:-1], arguments, strict=False):
        np.testing.assert_array_equal(now, before)
    got, want = mine[entry.output], theirs[entry.output]
    allowed = entry.roundings * ROUNDING * entry.magnitude(*arguments) + UNDERFLOW
    assert (np.abs(got.astype(np.float64) - want) <= allowed).all()


def test_the_comparison_sees_a_small_mistake() -> None:
    arguments = SPARSE.arguments(Draw(0), m=5, n=65, tokens=3, levels=TIERS[3])
    want, allowed = copy.deepcopy(arguments), SPARSE.roundings * ROUNDING * SPARSE.magnitude(*arguments)
    SPARSE.reference(*want)
    arguments[-2][:, 64] *= 1.001
    SPARSE.kernel(*arguments)
    assert (np.abs(arguments[-1] - want[-1]) > allowed).mean() > 0.5


@pytest.mark.parametrize("levels", [TIERS[0], TIERS[1], TIERS[5]], ids="+".join)
def test_other_tokens_do_not_show(levels: tuple[str, ...]) -> None:
    """Neither how many there are nor where a token stands, though tiles of 1, 4 and 16 tokens have each their code."""
    whole = SPARSE.arguments(Draw(3), m=5, n=100, tokens=17, levels=levels)
    want = run(whole)
    for cuts in ((0, 1, 4, 17), (0, 16, 17)):
        for start, stop in pairwise(cuts):
            part = [*whole[:4], whole[4][start:stop].copy(), np.empty((stop - start, 5), np.float32)]
            np.testing.assert_array_equal(run(part), want[start:stop])
    order = np.random.default_rng(0).permutation(17)
    np.testing.assert_array_equal(run([*whole[:4], whole[4][order], whole[5]]), want[order])


@pytest.mark.parametrize("levels", [TIERS[0], TIERS[4]], ids="+".join)
def test_additions_are_made_in_the_order_that_is_documented(levels: tuple[str, ...]) -> None:
    """Factors so short that their products are exact: what is left to differ is the order."""
    kind, stored, table, n, x, y = SPARSE.arguments(Draw(4), m=5, n=500, tokens=2, levels=levels)
    x[:] = (x.view(np.uint32) & 0xFFFFE000).view(np.float32)
    weight = np.zeros((5, 512), np.float32)
    weight[:, :n] = reference_levels(stored.view(np.uint16), table, 5, n)[0]
    inputs = np.zeros((2, 512), np.float32)
    inputs[:, :n] = x
    lanes = np.zeros((2, 5, 64), np.float32)
    for word in range(8):
        lanes += weight[None, :, 64 * word :][..., :64] * inputs[:, None, 64 * word :][..., :64]
    while lanes.shape[-1] > 1:
        lanes = lanes[..., ::2] + lanes[..., 1::2]
    assert (lanes[..., 0] != (inputs @ weight.T)).any()  # another order is seen
    np.testing.assert_array_equal(run([kind, stored, table, n, x, y]), lanes[..., 0].view(np.uint32))


def test_rows_whose_scale_is_zero_are_zero() -> None:
    arguments = SPARSE.arguments(Draw(5), m=6, n=70, tokens=3, levels=TIERS[6])
    arguments[1][arguments[2][1, 1] :][:24].view(np.float32)[::2] = 0
    found = run(arguments).view(np.float32)
    assert (found[:, ::2] == 0).all()
    assert (found[:, 1::2] != 0).all()


def test_a_last_mask_without_its_values_counts_for_nothing() -> None:
    arguments = SPARSE.arguments(Draw(6), m=5, n=130, tokens=2, levels=TIERS[7])
    with_it = run(arguments)
    np.testing.assert_array_equal(run([*arguments[:2], arguments[2][:2].copy(), *arguments[3:]]), with_it)


def test_halves_as_inputs_are_what_they_are_as_singles() -> None:
    arguments = SPARSE.arguments(Draw(7), m=5, n=130, tokens=3, levels=TIERS[1])
    halves = arguments[4].astype(np.float16)
    want = run([*arguments[:4], halves.astype(np.float32), arguments[5]])
    np.testing.assert_array_equal(run([*arguments[:4], halves, arguments[5]]), want)


@pytest.mark.parametrize("tokens", [0, 1, 5, 17])
def test_nothing_but_the_product_is_written(tokens: int) -> None:
    kind, stored, table, n, x, _ = SPARSE.arguments(Draw(8), m=9, n=65, tokens=tokens, levels=TIERS[0])
    memory, blocks, inputs = (torch.from_numpy(array).to(device()) for array in (stored, table, x))
    around = torch.full(((tokens + 2) * 9,), 7.0, device=device())
    multiply_sparse(kind, memory, blocks, n, inputs, around[9:-9].view(tokens, 9))
    assert (around[:9] == 7).all()
    assert (around[-9:] == 7).all()
    assert (around[9:-9] != 7).all()


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from ebbflow.kernels.gpu.sparse import _TILES, _multiply
numbers = dict.fromkeys(("m", "n", "tokens", "tiers"), "i32")
constants = dict.fromkeys(("SCALED", "HALVES", "SLOTS", "ROWS", "TOKENS"), "constexpr")
floats = dict(scales="*fp32", blocks="*i64", x="*fp32", y="*fp32")
targets = ((GPUTarget("cuda", 80, 32), "ptx"), (GPUTarget("hip", "gfx942", 64), "amdgcn"))
for values, slots, (tile, rows) in zip(("*fp16", "*i8", "*u8"), (1, 2, 4), _TILES.items(), strict=True):
    signature = dict(words="*u64", values=values, **floats, **numbers, **constants)
    given = dict(SCALED=values != "*fp16", HALVES=values == "*u8", SLOTS=slots, ROWS=rows, TOKENS=tile)
    for target, wanted in targets[: 1 if tile < 16 else 2]:
        text = compile(ASTSource(_multiply, signature, given), target=target).asm[wanted]
        print(wanted, "atom" in text, "popc" in text or "bcnt" in text)
"""


def test_compilers_take_it(tmp_path: Path) -> None:
    """No device is needed for that; counting bits has become an instruction, and nothing is atomic."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["ptx False True"] * 3 + ["amdgcn False True"]


def test_one_tier_of_everything_is_a_dense_product_to_the_bit() -> None:
    """fp16 in tiers of any cut: the columns' lanes do not know which tier their value came from."""
    kind, stored, table, n, x, y = SPARSE.arguments(Draw(9), m=4, n=130, tokens=2, levels=TIERS[4])
    weight = reference_levels(stored.view(np.uint16), table, 4, n)[0].astype("<f2")
    bits = np.zeros((4, 192), np.uint8)
    bits[:, :n] = 1
    payload = np.packbits(bits, axis=1, bitorder="little").tobytes() + weight.tobytes()
    memory = np.frombuffer(payload, np.uint8).copy()
    whole = np.array([(table[0, 0], 0, n), (VALUES_F16, 96, n)], np.int64)
    np.testing.assert_array_equal(run([kind, stored, table, n, x, y]), run([kind, memory, whole, n, x, y]))
