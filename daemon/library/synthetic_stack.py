"""A random model of the library, written directly: valid in every byte, fast, one block in memory at a time.

Weights are about 0.02 in size, like a fresh network's. Planes are random bits with the codebook's levels; signs are
random bits too, with factors positive and near each other, level l being about `+-0.02 / 2^l`. Tiers of a sparse one
are cut like real ones; rows of a mask are a few random ones, turned. `dense` stores what it is, in one block a tensor:
no codec makes such models, they are what others are compared with. Each block is a function of (seed, tensor, level,
kind), made once for its hash and again for the file; so sparse models of one seed and sparsity have the same masks, and
share the file, whatever their values are stored as.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from ...formats.architecture import Architecture, weight_shapes, weight_uses
from ...formats.container import content_hash
from ...formats.errors import InvalidRequest
from ...formats.index import BlockEntry, StackIndex, filled_before, prefix_edges
from ...formats.kinds import (
    ROW_LEVELS,
    VALUES_DTYPES,
    payload_nbytes,
    plane_depth,
    planes_nbytes,
    values_row_nbytes,
    words_per_row,
)
from ...formats.manifest import STACK, Manifest, Source, write_manifest
from ...formats.masks import digest, masks_nbytes
from ...formats.stack import write_stack
from .encode import layer_linears
from .encode_bitstack import choose_levels, choose_rank
from .encode_nested import choose_levels as choose_planes
from .encode_nested import gaussian_codebook, level_dtype
from .encode_sparse import tier_counts
from .masks import link_masks
from .order import order_entries
from .place import check_room, free_place, making
from .prune import Groups
from .synthetic_tokenizer import BOS, EOS, write_tokenizer

LEVELS: Final = {"nested": 5, "bitstack": 4, "sparse": 2, "dense": 1}  # 850, 661, 920, 1100 MB for TinyLlama's shape
DENSE_DTYPES: Final = ("f16", "i8")
SPARSITY: Final = 0.5
WEIGHT: Final = 0.02
INT8_DEVIATION: Final = 73.3  # of uniform numbers in [-127, 127]
INT4_DEVIATION: Final = 4.32  # in [-7, 7]
ROWS: Final = 61  # different rows of a mask


def write_random_stack(
    a: Architecture,
    library: Path,
    name: str,
    *,
    codec: str = "nested",
    seed: int = 0,
    levels: int | None = None,
    rank: int | None = None,
    sparsity: float | None = None,
    values: str = "i8",
) -> Manifest:
    """Put a random model of shape `a` into the library; `rank` is for `bitstack`, `sparsity` for `sparse`, the dtype of
    `values` for that and `dense`.

    Raises `InvalidName`, `InvalidRequest` (codec, levels, rank, sparsity, values), `ModelExists` or `DiskFull`.
    """
    if codec not in LEVELS:
        raise InvalidRequest(f"no codec {codec!r}; known: {', '.join(LEVELS)}")
    place, levels = free_place(library, name), levels or LEVELS[codec]
    match codec:
        case "nested":
            plain = list(_planes(a, choose_planes(levels)))
        case "bitstack":
            plain = list(_signs(a, choose_levels(levels), rank))
        case "dense":
            plain = list(_whole(a, levels, values))
        case _:
            plain = list(_tiers(a, levels, SPARSITY if sparsity is None else sparsity, values))
    check_room({library: prefix_edges(plain)[-1]})
    entries = [
        msgspec.structs.replace(entry, hash=content_hash(_payload(entry, seed, filled)))
        for entry, filled in zip(plain, filled_before(plain), strict=True)
    ]
    index, _ = order_entries(a, entries, "gain")
    filled = filled_before(index.blocks)
    with making(place) as folder:
        shared = link_masks(library, index.blocks, folder)
        write_stack(folder / STACK, index, lambda i: _payload(index.blocks[i], seed, filled[i]), masks_there=shared)
        write_tokenizer(folder, a.vocab)
        options: dict[str, str | int | float] = {"seed": seed, "levels": levels}
        if codec == "bitstack":
            options["rank"] = rank or "by shape"
        if codec == "sparse":
            options |= {"sparsity": SPARSITY if sparsity is None else sparsity, "values": values}
        if codec == "dense":
            options["values"] = values
        manifest = _manifest(a, name, codec, index, options)
        write_manifest(folder, manifest)
    return manifest


def _planes(a: Architecture, levels: int) -> Iterator[BlockEntry]:
    """Every block in network order, without hashes; gains fall by a factor of four from level to level."""
    shapes = weight_shapes(a)
    total = sum(prod(shape) for shape in shapes.values())
    for name, shape in shapes.items():
        if len(shape) == 1:
            yield _entry(a, "dense", name, 0, shape, 0.0, dtype="bf16")
            continue
        for level in range(levels):
            dtype = level_dtype(shape[1], level)
            yield _entry(a, "plane", name, level, shape, prod(shape) / total / 4**level, dtype=dtype)


def _signs(a: Architecture, levels: int, rank: int | None) -> Iterator[BlockEntry]:
    """The same; embedding and head are int8."""
    linears = layer_linears(a)
    total = sum(prod(shape) for shape in linears.values())
    for name, shape in weight_shapes(a).items():
        if name not in linears:
            yield _entry(a, "dense", name, 0, shape, 0.0, dtype="i8" if len(shape) > 1 else "bf16")
            continue
        chosen = choose_rank(*linears[name], rank)
        for level in range(levels):
            yield _entry(a, "signs", name, level, shape, prod(shape) / total / 4**level, rank=chosen)


def _whole(a: Architecture, levels: int, values: str) -> Iterator[BlockEntry]:
    """Every tensor as it is; embedding and head are int8."""
    if values not in DENSE_DTYPES or levels != 1:
        raise InvalidRequest(f"values {values!r}, {levels} levels of dense; want {' or '.join(DENSE_DTYPES)}, and one")
    linears = layer_linears(a)
    for name, shape in weight_shapes(a).items():
        dtype = values if name in linears else "i8" if len(shape) > 1 else "bf16"
        yield _entry(a, "dense", name, 0, shape, 0.0, dtype=dtype)


def _tiers(a: Architecture, levels: int, sparsity: float, values: str) -> Iterator[BlockEntry]:
    """Masks and values in turn; embedding and head are int8."""
    if not 0 <= sparsity < 1 or values not in VALUES_DTYPES or levels < 1:
        raise InvalidRequest(
            f"sparsity {sparsity}, values {values!r}, {levels} levels; want a sparsity from 0 and below 1, "
            f"{' or '.join(VALUES_DTYPES)}, and a level at least"
        )
    linears = layer_linears(a)
    total = sum(prod(shape) for shape in linears.values())
    for name, shape in weight_shapes(a).items():
        if name not in linears:
            yield _entry(a, "dense", name, 0, shape, 0.0, dtype="i8" if len(shape) > 1 else "bf16")
            continue
        n, filled = shape[1], 0
        kept = max(levels, round(n * (1 - sparsity)))
        if kept > n:
            raise InvalidRequest(f"{levels} levels are more than {name}'s {n} columns")
        for level, count in enumerate(tier_counts(n, Groups(n, kept), levels)):
            rank, gain = count - filled, prod(shape) / total / 4**level
            yield _entry(a, "mask", name, level, shape, 0.0, rank=rank, filled=filled)
            yield _entry(a, "values", name, level, shape, gain, dtype=values, rank=rank, filled=filled)
            filled += rank


def _entry(
    a: Architecture,
    kind: str,
    name: str,
    level: int,
    shape: tuple[int, ...],
    gain: float,
    *,
    dtype: str = "",
    rank: int = 0,
    filled: int = 0,
) -> BlockEntry:
    return BlockEntry(
        kind=kind,
        tensor=name,
        level=level,
        shape=shape,
        nbytes=payload_nbytes(kind, shape, dtype=dtype, rank=rank, level=level, filled=filled),
        gain=gain,
        hash="",
        uses=weight_uses(a, name),
        dtype=dtype,
        rank=rank,
        beside=kind == "mask",
    )


def _payload(entry: BlockEntry, seed: int, filled: int) -> bytes:
    generator = np.random.default_rng([seed, zlib.crc32(entry.tensor.encode()), entry.level])
    if entry.kind == "signs":
        return _signs_payload(entry, generator)
    if entry.kind == "plane":
        return _plane_payload(entry, generator)
    if entry.kind == "mask":
        return _mask_payload(entry, generator, filled)
    if entry.kind == "values":
        return _values_payload(entry, generator)
    if entry.dtype == "i8":
        scales = np.full(entry.shape[0], WEIGHT / INT8_DEVIATION, "<f4")
        return scales.tobytes() + generator.integers(-127, 128, entry.shape, np.int8).tobytes()
    if entry.dtype == "f16":
        return (generator.standard_normal(entry.shape, np.float32) * np.float32(WEIGHT)).astype("<f2").tobytes()
    value = 0.0 if entry.tensor.endswith(".bias") else 1.0
    return bytes((np.full(entry.shape, value, "<f4").view("<u4") >> 16).astype("<u2").tobytes())


def _signs_payload(entry: BlockEntry, generator: np.random.Generator) -> bytes:
    m, n = entry.shape
    typical = (WEIGHT / 2**entry.level / entry.rank) ** 0.5
    factors = generator.uniform(0.5 * typical, 1.5 * typical, entry.rank * (m + n)).astype("<f2")
    return _bits(8 * m * words_per_row(n), n, generator) + factors.tobytes()


def _plane_payload(entry: BlockEntry, generator: np.random.Generator) -> bytes:
    (m, n), depth = entry.shape, plane_depth(entry.level)
    curve = gaussian_codebook(depth)[1 << depth :]
    levels = np.rint(curve / np.abs(curve).max() * 127).astype(np.int8)
    scale = np.full(m, WEIGHT * np.abs(curve).max() / 127, "<f4")
    rows = m if entry.dtype == ROW_LEVELS else 1
    stored = (scale.view("<u4") >> 16).astype("<u2").tobytes() + np.tile(levels, rows).tobytes()
    return _bits(planes_nbytes(m, n, entry.level), n, generator) + stored


def _mask_payload(entry: BlockEntry, generator: np.random.Generator, filled: int) -> bytes:
    """Exactly `rank` ones in each row, of the columns that are left."""
    m, left = entry.shape[0], entry.shape[1] - filled
    few = generator.random((min(m, ROWS), left)).argsort(axis=1) < entry.rank
    # column j of a row that is turned by k is column j + k of a row written twice
    twice, turns = np.concatenate([few, few], axis=1), generator.integers(0, left, m)
    rows = np.lib.stride_tricks.sliding_window_view(twice, left, axis=1)
    bits = np.zeros((m, words_per_row(left) * 64), np.bool_)
    bits[:, :left] = rows[np.arange(m) % len(few), turns]
    return np.packbits(bits, axis=1, bitorder="little").tobytes()


def _values_payload(entry: BlockEntry, generator: np.random.Generator) -> bytes:
    (m, _), row = entry.shape, values_row_nbytes(entry.dtype, entry.rank)
    if entry.dtype == "f16":
        return (generator.standard_normal((m, entry.rank), np.float32) * np.float32(WEIGHT)).astype("<f2").tobytes()
    deviation = INT8_DEVIATION if entry.dtype == "i8" else INT4_DEVIATION
    scales = np.full(m, WEIGHT / deviation, "<f4").tobytes() if entry.level == 0 else b""
    if entry.dtype == "i8":
        return scales + generator.integers(-127, 128, (m, row), np.int8).tobytes()
    halves = generator.integers(-7, 8, (m, 2 * row), np.int8).view(np.uint8) & 15
    halves[:, entry.rank :] = 0
    return scales + (halves[:, ::2] | halves[:, 1::2] << 4).tobytes()


def _bits(nbytes: int, n: int, generator: np.random.Generator) -> bytes:
    """Random rows of n bits, each in whole words."""
    words: NDArray[np.uint64] = np.frombuffer(generator.bytes(nbytes), "<u8").reshape(-1, words_per_row(n))
    if n % 64:
        words = words.copy()
        words[:, -1] &= np.uint64((1 << n % 64) - 1)
    return words.tobytes()


def _manifest(
    a: Architecture, name: str, codec: str, index: StackIndex, options: dict[str, str | int | float]
) -> Manifest:
    edges = prefix_edges(index.blocks)
    hashes = "".join(entry.hash for entry in index.blocks)
    return Manifest(
        name=name,
        architecture=a,
        source=Source("synthetic", hashlib.blake2b(hashes.encode(), digest_size=16).hexdigest()),
        codec=codec,
        options=options,
        nbytes=edges[-1],
        base_nbytes=edges[index.base],
        blocks=len(index.blocks),
        original_nbytes=2 * sum(prod(shape) for shape in weight_shapes(a).values()),
        bos=BOS,
        eos=(EOS,),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        masks=digest(index.blocks),
        base_masks_nbytes=masks_nbytes(index.blocks[: index.base]),
    )
