"""Every kernel beside its reference, with inputs for both. Drives tests/kernels and bench.

Inputs are drawn for given shapes, on request with what is nasty: both zeros, subnormals, the largest fp16. NaN and
infinity are never among them (but infinity among keys and values to be stored): `formats/blocks.check_finite` refuses
them before they are resident.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from . import (
    attention,
    elementwise,
    hadamard,
    instructions,
    matmul,
    nested,
    planes,
    quantize,
    reference,
    rounding,
    rows,
    signs,
)
from .attention import BLOCK_TOKENS

Array = NDArray[Any]
Arguments = list[Any]

LARGEST_HALF: Final = 65504.0
NASTY_HALF: Final = (0.0, -0.0, 6e-8, -6e-8, 6.0e-5, 6.2e-5, LARGEST_HALF, -LARGEST_HALF)
NASTY_KEY: Final = (0.0, -0.0, 6e-8, 6.2e-5, 30.0, -30.0)  # larger ones leave one position with all the weight
NASTY_STORED: Final = (*NASTY_HALF, 65519.0, -65520.0, 1e10, np.inf, -np.inf, 2.0**-25, 3 * 2.0**-25, 1 + 2.0**-11)
NASTY_SCALE: Final = (0.0, -0.0, 1e-30, -1e10)  # times the least fp16 still a normal float32
_INSTRUCTIONS: Final = instructions.NAMES
_PLANES: Final = {"plane": rows.PLANE, "shared_plane": rows.SHARED_PLANE}
NASTY_SINGLE: Final = (0.0, -0.0, 1e-45, -1e-39, 1.2e-38, 1e10, -1e10)


@dataclass(frozen=True)
class Entry:
    """One kernel. `arguments(draw, **shape)` draws its inputs; the array at `output` is what it writes.

    Kernel and reference may differ by `roundings` float32 roundings of `magnitude(*arguments)`: the largest, or each
    element's, sum of absolute terms.
    """

    name: str
    kernel: Callable[..., None]
    reference: Callable[..., None]
    arguments: Callable[..., Arguments]
    magnitude: Callable[..., Array | float]
    roundings: int
    output: int = -1


class Draw:
    """Where inputs come from: seeded, of ordinary size or `nasty`.

    Both are needed. The largest numbers hide the errors of all others; without them nothing is near an edge.
    """

    def __init__(self, seed: int, nasty: bool = False) -> None:
        self.rng, self.nasty = np.random.default_rng(seed), nasty

    def numbers(self, shape: tuple[int, ...], values: tuple[float, ...]) -> Array:
        """Normal numbers, if nasty with one in eight replaced by one of `values`; float64."""
        drawn = self.rng.standard_normal(shape)
        if not self.nasty:
            return drawn
        return np.where(self.rng.random(shape) < 0.125, self.rng.choice(values, shape), drawn)

    def singles(self, *shape: int) -> Array:
        """Float32."""
        return self.numbers(shape, NASTY_SINGLE).astype(np.float32)


def store_levels(draw: Draw, levels: tuple[str, ...], m: int, n: int) -> tuple[Array, Array]:
    """Memory holding one weight `[m, n]` and its block table.

    A level is a dtype, `signs:RANK`, `plane`, `shared_plane`, `mask:SHARE` (of all columns, in hundredths: how many a
    tier has; at least one), or `values:DTYPE`, which follows its mask.

    Between the blocks, and before the first, lies what must not be read as weights: NaN.
    """
    parts, table, at, left, count = [b"\xff" * 64], [], 64, n, 0
    for number, level in enumerate(levels):
        kind, _, rank = level.partition(":")
        if kind == "mask":
            if not left:
                break
            count = min(left, max(1, n * int(rank) // 100))
            payload, left = _mask_payload(draw, m, left, count), left - count
            table.append((rows.MASK, at, count))
        elif kind == "values":
            payload = _values_payload(draw, rank, m, count, first=number == 1)
            table.append((rows.VALUES_CODES[rank], at, count))
        else:
            payload = _payload(draw, kind, m, n, number if kind in _PLANES else int(rank or 0))
            table.append(((_PLANES | rows.CODES | {"signs": rows.SIGNS})[kind], at, int(rank or 0)))
        payload += b"\xff" * (64 + -len(payload) % 64)
        parts.append(payload)
        at += len(payload)
    stored = np.frombuffer(b"".join(parts), np.uint16).copy()
    return stored, np.array(table, np.int64).reshape(-1, 3)


def _mask_payload(draw: Draw, m: int, left: int, count: int) -> bytes:
    """`count` ones among the first `left` bits of every row; nasty: at the beginning or the end of half of them."""
    places = draw.rng.random((m, left)).argsort(axis=1)
    if draw.nasty:
        places[::4], places[1::4] = np.arange(left), np.arange(left)[::-1]
    bits = np.zeros((m, -(-left // 64) * 64), np.uint8)
    np.put_along_axis(bits, places[:, :count], 1, axis=1)
    return np.packbits(bits, axis=1, bitorder="little").tobytes()


def _values_payload(draw: Draw, dtype: str, m: int, count: int, first: bool) -> bytes:
    if dtype == "f16":
        return draw.numbers((m, count), NASTY_HALF).astype("<f2").tobytes()
    scales = draw.singles(m).tobytes() if first else b""
    if dtype == "i8":
        return scales + draw.rng.integers(-127, 128, (m, count)).astype(np.int8).tobytes()
    halves = np.zeros((m, -(-count // 2) * 2), np.int64)
    halves[:, :count] = draw.rng.integers(-7, 8, (m, count))
    return scales + (halves[:, ::2] & 15 | (halves[:, 1::2] & 15) << 4).astype(np.uint8).tobytes()


def _payload(draw: Draw, kind: str, m: int, n: int, rank: int) -> bytes:
    """`rank` is a plane's level."""
    match kind:
        case "plane" | "shared_plane":
            count = 2 if rank == 0 else 1
            bits = np.zeros((count, m, -(-n // 64) * 64), np.uint8)
            bits[:, :, :n] = draw.rng.integers(0, 2, (count, m, n))
            scale = (draw.numbers((m,), NASTY_SCALE).astype("<f4").view("<u4") >> 16).astype("<u2")
            levels = draw.rng.integers(-127, 128, (m if kind == "plane" else 1) << (rank + 2)).astype(np.int8)
            return np.packbits(bits, axis=2, bitorder="little").tobytes() + scale.tobytes() + levels.tobytes()
        case "signs":
            bits = np.zeros((m, -(-n // 64) * 64), np.uint8)
            bits[:, :n] = draw.rng.integers(0, 2, (m, n))
            factors = draw.numbers((rank * (m + n),), NASTY_HALF).astype("<f2")
            return np.packbits(bits, axis=1, bitorder="little").tobytes() + factors.tobytes()
        case "i8":
            return draw.singles(m).tobytes() + draw.rng.integers(-128, 128, (m, n)).astype(np.int8).tobytes()
        case "f16":
            return draw.numbers((m, n), NASTY_HALF).astype("<f2").tobytes()
        case "bf16":
            return (draw.singles(m, n).view(np.uint32) >> 16).astype("<u2").tobytes()
        case _:
            return draw.singles(m, n).tobytes()


def _matmul(draw: Draw, *, m: int, n: int, tokens: int, levels: tuple[str, ...], chunks: int = 2) -> Arguments:
    stored, table = store_levels(draw, levels, m, n)
    width = -(-n // 64) * 64
    x = np.zeros((tokens, width), np.float32)
    x[:, :n] = draw.singles(tokens, n)
    scratch = np.zeros((chunks, rows.ROWS, matmul.row_stride(width)), np.float32)
    return [stored, table, n, x, scratch, np.full((tokens, m), np.nan, np.float32)]


def _matmul_magnitude(stored: Array, table: Array, n: int, x: Array, scratch: Array, y: Array) -> Array:
    weight = _level_magnitudes(stored, table, y.shape[1], n)
    magnitude: Array = np.abs(x[:, :n].astype(np.float64)) @ weight.T
    return magnitude


def _level_magnitudes(stored: Array, table: Array, m: int, n: int) -> Array:
    """Sum of the absolute terms of every weight: factors' signs may cancel, so theirs are dropped first."""
    plain = stored.copy()
    for kind, at, rank in table:
        if kind == rows.SIGNS:
            first = at // 2 + m * -(-n // 64) * 4
            plain[first : first + rank * (m + n)] &= 0x7FFF
    parts = reference.reference_levels(plain, table, m, n)
    return sum((np.abs(part) for part in parts), np.zeros((m, n)))


def multiply_planes_arguments(
    draw: Draw, *, m: int, n: int, tokens: int, levels: tuple[str, ...], chunks: int = 2, instructions: str = "portable"
) -> Arguments:
    """Inputs of `multiply_planes`, its output last."""
    stored, table = store_levels(draw, levels, m, n)
    p, blocks = planes.padded(n), planes.padded(n) // planes.COLUMNS
    columns = np.zeros((tokens, p), np.int8)
    columns[:, :n] = draw.rng.integers(-127, 128, (tokens, n))
    x = columns.reshape(tokens, blocks, planes.COLUMNS)[:, :, planes.column_order()]
    scales = np.repeat(np.abs(draw.singles(tokens, p // planes.GROUP)), planes.SUMS // 2, axis=1)
    sums = x.reshape(tokens, blocks, planes.VECTORS, planes.SUMS, 4).astype(np.int32).sum((2, 4))
    corrections = np.ascontiguousarray(-128 * sums.reshape(scales.shape), np.int32)
    scratch = np.zeros((chunks, rows.ROWS, planes.level_stride(n)), np.uint8)
    code, y = _INSTRUCTIONS[instructions], np.full((tokens, m), np.nan, np.float32)
    return [
        code,
        stored.view(np.uint8),
        table,
        n,
        np.ascontiguousarray(x).reshape(tokens, p),
        scales,
        corrections,
        scratch,
        y,
    ]


def _multiply_planes_magnitude(
    instructions: int, stored: Array, table: Array, n: int, x: Array, scales: Array, *rest: Array
) -> Array:
    weight = np.abs(reference.reference_levels(stored.view(np.uint16), table, rest[-1].shape[1], n)[0])
    magnitude: Array = np.abs(reference.reference_inputs(x, scales)[:, :n]) @ weight.T
    return magnitude


def _quantize_inputs(draw: Draw, *, tokens: int, n: int) -> Arguments:
    x, signs, sizes, _ = _rotate_inputs(draw, tokens=tokens, n=n)
    p = planes.padded(n)
    scales, corrections = np.full((tokens, p // 32), np.nan, np.float32), np.full((tokens, p // 32), 7, np.int32)
    return [x, signs, sizes, np.full((tokens, p), 7, np.int8), scales, corrections]


def multiply_sum_arguments(
    draw: Draw, *, m: int, n: int, tokens: int, levels: tuple[str, ...], chunks: int = 2, instructions: str = "portable"
) -> Arguments:
    """Inputs of `multiply_sum`, its output last."""
    stored, table = store_levels(draw, levels, m, n)
    made = signs.prepare(stored, table, m, n) if signs.integral(table) else np.zeros(0, np.uint8)
    p, c = planes.padded(n), made[: 4 * n].view(np.float32)
    q = np.zeros((tokens, p), np.int8)
    scales, corrections = np.zeros((tokens, p // 32), np.float32), np.zeros((tokens, p // 32), np.int32)
    rounding.round_inputs(draw.singles(tokens, n), c, q, scales, corrections)
    scratch = np.zeros((chunks, rows.ROWS, planes.level_stride(n)), np.uint8)
    singles, y = np.zeros((chunks, rows.ROWS, n), np.float32), np.full((tokens, m), np.nan, np.float32)
    code = _INSTRUCTIONS[instructions]
    return [code, stored.view(np.uint8), table, made, n, q, scales, corrections, scratch, singles, y]


def _multiply_sum_magnitude(
    instructions: int, stored: Array, table: Array, made: Array, n: int, x: Array, scales: Array, *rest: Array
) -> Array:
    """What W may be rounded by a 256th of: in each column, c times the row's factors; or the row's largest."""
    m, inputs = rest[-1].shape[1], np.abs(reference.reference_sum_inputs(table, made, n, x, scales))
    halves, levels = stored.view(np.uint16), len(table)
    if not len(made):
        if table[:, 0].tolist() == [rows.I8] or (
            levels > 1 and table[1, 0] in (rows.VALUES_I8, rows.VALUES_I4)
        ):  # nothing is rounded
            return inputs @ _level_magnitudes(halves, table, m, n).T * 2.0**-10
        weight = sum(reference.reference_levels(halves, table, m, n), np.zeros((m, n)))
        # half a step of a row's 127, which is a little more than a 256th
        largest: Array = inputs.sum(1)[:, None] * np.maximum(np.abs(weight).max(1) * 256 / 254, 256 * quantize.LEAST)
        return largest
    units = made[signs.made_places(levels, n)[0] :][: 4 * levels].view("<f4").astype(np.float64)
    starts = table[:, 1] // 2 + m * -(-n // 64) * 4
    u = np.array([halves[start : start + m].view(np.float16) for start in starts], np.float64)
    factors = (np.abs(u) * units[:, None]).sum(0)
    # of its sum: 2 for the weight, 1 for the magnitudes, and 1 for each of the factors
    found: Array = (inputs @ made[: 4 * n].view("<f4").astype(np.float64))[:, None] * (
        (3 + levels) * factors + 256 * quantize.LEAST
    )
    return found


def _round_inputs(draw: Draw, *, tokens: int, n: int, scaled: bool) -> Arguments:
    p = planes.padded(n)
    scales, corrections = np.full((tokens, p // 32), np.nan, np.float32), np.full((tokens, p // 32), 7, np.int32)
    c = np.abs(draw.singles(n if scaled else 0))
    return [draw.singles(tokens, n), c, np.full((tokens, p), 7, np.int8), scales, corrections]


def _take_rows(draw: Draw, *, m: int, n: int, tokens: int, levels: tuple[str, ...]) -> Arguments:
    stored, table = store_levels(draw, levels, m, n)
    wanted = draw.rng.integers(0, m, tokens)
    wanted[:2] = (0, m - 1)[: len(wanted)]
    return [stored, table, m, wanted, np.full((tokens, n), np.nan, np.float32)]


def _take_rows_magnitude(stored: Array, table: Array, m: int, tokens: Array, y: Array) -> Array:
    return _level_magnitudes(stored, table, m, y.shape[1])[tokens]


def _rotate_inputs(draw: Draw, *, tokens: int, n: int) -> Arguments:
    sizes = [1 << bit for bit in range(n.bit_length() - 1, -1, -1) if n >> bit & 1]
    signs = draw.rng.choice(np.array([-1, 1], np.float32), n)
    return [draw.singles(tokens, n), signs, np.array(sizes), np.full((tokens, n), np.nan, np.float32)]


def _rotated_magnitude(x: Array, signs: Array, sizes: Array, y: Array) -> Array:
    blocks = np.split(np.abs(x.astype(np.float64)), np.cumsum(sizes)[:-1], axis=1)
    return np.concatenate([np.repeat(b.sum(1, keepdims=True), b.shape[1], axis=1) for b in blocks], axis=1)


def _feedback(draw: Draw, *, m: int, n: int, depth: int) -> Arguments:
    x, inverse = draw.rng.standard_normal((m, n)), np.triu(draw.rng.standard_normal((n, n)) / n, 1) + np.eye(n)
    blend = np.sort(draw.rng.standard_normal(1 << depth))
    floats = [np.ascontiguousarray(array, np.float32) for array in (x, inverse, blend, blend**2 + 0.01)]
    return [*floats, np.full((m, n), 255, np.uint8)]


def _metric(draw: Draw, n: int) -> Array:
    x = draw.rng.standard_normal((2 * n, n))
    return np.ascontiguousarray(x.T @ x / (2 * n), np.float32)


def _descend(draw: Draw, *, m: int, n: int, depth: int) -> Arguments:
    h, weight = _metric(draw, n), draw.rng.random((m, depth + 1)).astype(np.float32)
    weight[:, :2] = 0
    heap = np.zeros((m, 2 << depth), np.float32)
    index = draw.rng.integers(0, 1 << depth, (m, n)).astype(np.uint8)
    gradient, x = np.zeros((m, depth + 1, n), np.float32), draw.rng.standard_normal((m, n))
    for d in range(2, depth + 1):
        heap[:, 1 << d : 2 << d] = np.sort(draw.rng.standard_normal((m, 1 << d)), axis=1)
        values = np.take_along_axis(heap[:, 1 << d :], (index >> (depth - d)).astype(np.intp), axis=1)
        gradient[:, d] = (x - values) @ h
    return [h, heap, weight, gradient, draw.rng.permutation(n), index]


def _gather(draw: Draw, *, m: int, n: int, count: int) -> Arguments:
    index = draw.rng.integers(0, count, (m, n)).astype(np.uint8)
    x = draw.rng.standard_normal((m, n)).astype(np.float32)
    return [_metric(draw, n), x, index, np.zeros((m, count, count), np.float32), np.zeros((m, count), np.float32)]


def kv_step(
    draw: Draw,
    *,
    dtype: str,
    tokens: int,
    groups: int,
    width: int,
    context: int,
    sequences: int = 1,
    shared: int = 0,
) -> Arguments:
    """A KV array of two layers, block tables, and the last `tokens` positions of each sequence.

    The first sequence is a token behind the others; its first `shared` blocks are theirs too. Memory holds numbers at
    every position up to its sequence's last, and beyond that NaN; `attend`'s first arguments.
    """
    count, kind = -(-context // BLOCK_TOKENS), attention.KINDS[dtype]
    nbytes = attention.head_nbytes(kind, width)
    kv = np.full((sequences * count + 1, 2, 2, groups, nbytes), 0xFF, np.uint8)
    tables = draw.rng.permutation(sequences * count + 1)[: sequences * count].reshape(sequences, count)
    tables[1:, :shared] = tables[0, :shared]
    keys, values = attention.split(kind, kv, width)
    scales = attention.split_scales(kv) if dtype == "i8" else ()
    for number, blocks in enumerate(tables):
        behind = int(number == 0 and context > tokens)
        for place, block in enumerate(blocks):
            slots = min(BLOCK_TOKENS, context - behind - place * BLOCK_TOKENS)
            if dtype == "i8":
                keys[block, ..., :slots] = draw.rng.integers(-127, 128, (2, groups, width, slots))
                values[block, ..., :slots, :] = draw.rng.integers(-127, 128, (2, groups, slots, width))
                for those, nasty in zip(scales, (NASTY_KEY, NASTY_HALF), strict=True):
                    those[block, ..., :slots] = np.abs(draw.numbers((2, groups, slots), nasty)) / 127
                continue
            keys[block, ..., :slots] = draw.numbers((2, groups, width, slots), NASTY_KEY)
            values[block, ..., :slots, :] = draw.numbers((2, groups, slots, width), NASTY_HALF)
    sequence = np.repeat(np.arange(sequences), tokens)
    positions = np.tile(np.arange(context - tokens, context), sequences)
    positions[:tokens] -= context > tokens
    return [kind, kv, 1, tables, sequence, positions]


def _store_kv(draw: Draw, *, groups: int = 2, **step: Any) -> Arguments:
    arguments = kv_step(draw, groups=groups, **step)
    k, v = (draw.numbers((len(arguments[-1]), groups, step["width"]), NASTY_STORED).astype(np.float32) for _ in "kv")
    return [*arguments, k, v]


def _attend(draw: Draw, *, groups: int = 2, per_group: int = 2, window: int = 0, **step: Any) -> Arguments:
    arguments = kv_step(draw, groups=groups, **step)
    heads, width, tokens = groups * per_group, step["width"], len(arguments[-1])
    q = draw.rng.standard_normal((tokens, heads, width)).astype(np.float32) * 2
    scratch = np.full((3, attention.unit_floats(per_group, width)), np.nan, np.float32)
    return [*arguments, q, window, scratch, np.full((tokens, heads * width), np.nan, np.float32)]


def _attend_magnitude(kind: int, kv: Array, layer: int, *rest: Any) -> float:
    """The largest value; a score's error is a share of the score, and these are at most some hundred."""
    values = attention.numbers(kind, kv, rest[3].shape[2])[1][:, layer]
    return float(np.nanmax(np.abs(values)))


def _rms_norm(draw: Draw, *, tokens: int, n: int) -> Arguments:
    x = draw.singles(tokens, n)
    x[: tokens // 3] = 0  # only eps is left under the root
    return [x, draw.rng.standard_normal(n).astype(np.float32), 1e-5, np.full((tokens, n), np.nan, np.float32)]


def _rms_norm_magnitude(x: Array, weight: Array, eps: float, y: Array) -> Array:
    root = np.sqrt((x.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + eps)
    magnitude: Array = np.abs(x / root * weight)
    return magnitude


def _gated(draw: Draw, *, tokens: int, n: int) -> Arguments:
    gate = draw.numbers((tokens, n), (0.0, -0.0, 1e-45, 80.0, -80.0, 1e10)).astype(np.float32)
    return [gate, draw.rng.standard_normal((tokens, n)).astype(np.float32), np.full((tokens, n), np.nan, np.float32)]


def _rotate(draw: Draw, *, tokens: int, heads: int = 2, width: int, context: int = 50) -> Arguments:
    angles = draw.rng.random((context, width // 2)) * 6
    cosine, sine = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    x = draw.singles(tokens, heads, width)
    return [x, draw.rng.integers(0, context, tokens), cosine, sine, np.full_like(x, np.nan)]


def _add(draw: Draw, *, tokens: int, n: int, rows: int | None = None) -> Arguments:
    x = draw.singles(tokens, n)
    return [x, draw.singles(tokens if rows is None else rows, n), np.full_like(x, np.nan)]


def _pair_magnitude(x: Array, *_: Any) -> Array:
    half = x.shape[-1] // 2
    both = np.abs(x[..., :half]) + np.abs(x[..., half:])
    return np.concatenate([both, both], axis=-1)


TABLE: Final = (
    Entry("matmul", matmul.matmul, reference.reference_matmul, _matmul, _matmul_magnitude, 100),
    Entry(
        "multiply_planes",
        planes.multiply_planes,
        reference.reference_multiply_planes,
        multiply_planes_arguments,
        _multiply_planes_magnitude,
        100,
    ),
    # W is rounded to bytes: a share of its largest, 2^16 roundings being 1/256
    Entry(
        "multiply_sum",
        signs.multiply_sum,
        reference.reference_multiply_sum,
        multiply_sum_arguments,
        _multiply_sum_magnitude,
        2**16,
    ),
    # where two values lie beside a half, the bytes may differ by one
    Entry(
        "round_inputs",
        rounding.round_inputs,
        rounding.reference_round_inputs,
        _round_inputs,
        lambda *_: 2.0**24,
        1,
        output=2,
    ),
    Entry(
        "quantize_inputs",
        quantize.quantize_inputs,
        quantize.reference_quantize_inputs,
        _quantize_inputs,
        lambda *_: 2.0**24,
        1,
        output=3,
    ),
    Entry("take_rows", matmul.take_rows, reference.reference_take_rows, _take_rows, _take_rows_magnitude, 40),
    Entry("store_kv", attention.store_kv, attention.reference_store_kv, _store_kv, lambda *_: 0.0, 0, output=1),
    Entry("attend", attention.attend, attention.reference_attend, _attend, _attend_magnitude, 200),
    Entry(
        "rms_norm",
        elementwise.rms_norm,
        elementwise.reference_rms_norm,
        _rms_norm,
        _rms_norm_magnitude,
        4,
    ),
    Entry(
        "gated",
        elementwise.gated,
        elementwise.reference_gated,
        _gated,
        lambda gate, up, y: np.abs(gate.astype(np.float64) * up),
        8,
    ),
    Entry("rotate", elementwise.rotate, elementwise.reference_rotate, _rotate, _pair_magnitude, 4),
    Entry(
        "rotate_inputs",
        hadamard.rotate_inputs,
        hadamard.reference_rotate_inputs,
        _rotate_inputs,
        _rotated_magnitude,
        12,
    ),
    Entry(
        "unrotate_rows",
        hadamard.unrotate_rows,
        hadamard.reference_unrotate_rows,
        _rotate_inputs,
        _rotated_magnitude,
        12,
    ),
    Entry("feedback", nested.feedback, nested.reference_feedback, _feedback, lambda *_: 0.0, 0),
    Entry("descend", nested.descend, nested.reference_descend, _descend, lambda *_: 0.0, 0),
    Entry(
        "gather_moments",
        nested.gather_moments,
        nested.reference_gather_moments,
        _gather,
        lambda h, w, *_: np.abs(h).sum() * np.abs(w).max(),
        100,
    ),
    Entry("add", elementwise.add, elementwise.reference_add, _add, lambda *_: 0.0, 0),
)
