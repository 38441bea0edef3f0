"""A random model of the library, written directly: valid in every byte, fast, one block in memory at a time.

Signs are random bits; a level's factors are positive and near each other, so that its weights are about
`+-0.02 / 2^level`, like a fresh network's. Each block is a function of (seed, tensor, level), made once for its hash
and again for the file.
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
from ...formats.kinds import payload_nbytes, words_per_row
from ...formats.manifest import STACK, Manifest, Source, write_manifest
from ...formats.stack import BlockEntry, StackIndex, content_hash, prefix_edges, write_stack
from .encode import layer_linears
from .encode_bitstack import choose_levels, choose_rank
from .order import order_entries
from .place import check_room, free_place, making
from .synthetic_tokenizer import BOS, EOS, write_tokenizer

LEVELS: Final = 4  # 661 MB for TinyLlama's shape
WEIGHT: Final = 0.02
INT8_DEVIATION: Final = 73.3  # of uniform numbers in [-127, 127]


def write_random_stack(
    a: Architecture, library: Path, name: str, *, seed: int = 0, levels: int = LEVELS, rank: int | None = None
) -> Manifest:
    """Put a random model of shape `a` into the library.

    Raises `InvalidName`, `InvalidRequest` (levels, rank), `ModelExists` or `DiskFull`.
    """
    place = free_place(library, name)
    plain = list(_entries(a, choose_levels(levels), rank))
    check_room({library: prefix_edges(plain)[-1]})
    entries = [msgspec.structs.replace(entry, hash=content_hash(_payload(entry, seed))) for entry in plain]
    index, _ = order_entries(a, entries, "gain")
    with making(place) as folder:
        write_stack(folder / STACK, index, lambda i: _payload(index.blocks[i], seed))
        write_tokenizer(folder, a.vocab)
        manifest = _manifest(a, name, index, {"seed": seed, "levels": levels, "rank": rank or "by shape"})
        write_manifest(folder, manifest)
    return manifest


def _entries(a: Architecture, levels: int, rank: int | None) -> Iterator[BlockEntry]:
    """Every block in network order, without hashes; gains fall by a factor of four from level to level."""
    linears = layer_linears(a)
    total = sum(prod(shape) for shape in linears.values())
    for name, shape in weight_shapes(a).items():
        if name not in linears:
            yield _entry(a, "dense", name, 0, shape, 0.0, dtype="i8" if len(shape) > 1 else "bf16")
            continue
        chosen = choose_rank(*linears[name], rank)
        for level in range(levels):
            yield _entry(a, "signs", name, level, shape, prod(shape) / total / 4**level, rank=chosen)


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
) -> BlockEntry:
    return BlockEntry(
        kind=kind,
        tensor=name,
        level=level,
        shape=shape,
        nbytes=payload_nbytes(kind, shape, dtype=dtype, rank=rank),
        gain=gain,
        hash="",
        uses=weight_uses(a, name),
        dtype=dtype,
        rank=rank,
    )


def _payload(entry: BlockEntry, seed: int) -> bytes:
    generator = np.random.default_rng([seed, zlib.crc32(entry.tensor.encode()), entry.level])
    if entry.kind == "signs":
        return _signs(entry, generator)
    if entry.dtype == "i8":
        scales = np.full(entry.shape[0], WEIGHT / INT8_DEVIATION, "<f4")
        return scales.tobytes() + generator.integers(-127, 128, entry.shape, np.int8).tobytes()
    value = 0.0 if entry.tensor.endswith(".bias") else 1.0
    return bytes((np.full(entry.shape, value, "<f4").view("<u4") >> 16).astype("<u2").tobytes())


def _signs(entry: BlockEntry, generator: np.random.Generator) -> bytes:
    m, n = entry.shape
    words: NDArray[np.uint64] = np.frombuffer(generator.bytes(8 * m * words_per_row(n)), "<u8").reshape(m, -1)
    if n % 64:
        words = words.copy()
        words[:, -1] &= np.uint64((1 << n % 64) - 1)
    typical = (WEIGHT / 2**entry.level / entry.rank) ** 0.5
    factors = generator.uniform(0.5 * typical, 1.5 * typical, entry.rank * (m + n)).astype("<f2")
    return words.tobytes() + factors.tobytes()


def _manifest(a: Architecture, name: str, index: StackIndex, options: dict[str, str | int | float]) -> Manifest:
    edges = prefix_edges(index.blocks)
    hashes = "".join(entry.hash for entry in index.blocks)
    return Manifest(
        name=name,
        architecture=a,
        source=Source("synthetic", hashlib.blake2b(hashes.encode(), digest_size=16).hexdigest()),
        codec="bitstack",
        options=options,
        nbytes=edges[-1],
        base_nbytes=edges[index.base],
        blocks=len(index.blocks),
        original_nbytes=2 * sum(prod(shape) for shape in weight_shapes(a).values()),
        bos=BOS,
        eos=(EOS,),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
