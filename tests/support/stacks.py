"""Small library models written straight from weights, without a job: exact ones, and ones with many levels."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from ebbflow.formats.architecture import Architecture, weight_shapes, weight_uses
from ebbflow.formats.blocks import pack_dense, pack_mask, pack_plane, pack_signs, pack_values
from ebbflow.formats.container import content_hash
from ebbflow.formats.index import BlockEntry, StackIndex
from ebbflow.formats.kinds import ROW_LEVELS, SHARED_LEVELS, VALUES_LIMIT, plane_depth
from ebbflow.formats.manifest import (
    MANIFEST,
    MASKS,
    STACK,
    TOKENIZER_FILES,
    Manifest,
    Source,
    read_manifest,
    write_manifest,
)
from ebbflow.formats.masks import digest
from ebbflow.formats.stack import read_blocks, read_stack, write_stack

from support.tiny_models import write_tokenizer

TINY = Architecture(
    family="llama",
    vocab=258,
    hidden=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    intermediate=96,
    context=512,
    norm_eps=1e-5,
    rotary_theta=10000.0,
)


def write_model(
    folder: Path, a: Architecture, blocks: list[tuple[BlockEntry, bytes]], base: int, eos: tuple[int, ...] = ()
) -> Path:
    """A model folder holding these blocks in this order, with a byte-level tokenizer."""
    folder.mkdir(parents=True)
    index = StackIndex(base, tuple(entry for entry, _ in blocks))
    write_stack(folder / STACK, index, lambda position: blocks[position][1])
    stack = read_stack(folder / STACK)
    manifest = Manifest(
        name=folder.name,
        architecture=a,
        source=Source("a test", ""),
        codec="bitstack",
        options={},
        nbytes=stack.nbytes,
        base_nbytes=stack.base_nbytes,
        blocks=len(blocks),
        original_nbytes=stack.nbytes,
        bos=0,
        eos=eos,
        masks=digest(stack.blocks),
    )
    write_manifest(folder, manifest)
    write_tokenizer(folder)
    return folder


def dense_entry(a: Architecture, name: str, weight: NDArray[np.float32], dtype: str) -> tuple[BlockEntry, bytes]:
    """One tensor as one dense block."""
    payload = pack_dense(weight, dtype)
    entry = BlockEntry(
        kind="dense",
        tensor=name,
        level=0,
        shape=weight.shape,
        nbytes=len(payload),
        gain=0.0,
        hash=content_hash(payload),
        uses=weight_uses(a, name),
        dtype=dtype,
    )
    return entry, payload


def write_exact_model(folder: Path, a: Architecture, tensor: Callable[[str], NDArray[np.float32]]) -> Path:
    """Every weight as it is, in float32: what serving computes can be compared with any other implementation."""
    blocks = [dense_entry(a, name, tensor(name), "f32") for name in weight_shapes(a)]
    return write_model(folder, a, blocks, len(blocks))


def write_signs_model(folder: Path, a: Architecture = TINY, levels: int = 3, rank: int = 2, seed: int = 0) -> Path:
    """Random weights as `levels` shrinking sign levels; level 0 of everything is the base."""
    rng = np.random.default_rng(seed)
    base: list[tuple[BlockEntry, bytes]] = []
    rest: list[tuple[BlockEntry, bytes]] = []
    for name, shape in weight_shapes(a).items():
        if len(shape) == 1:
            base.append(dense_entry(a, name, np.ones(shape, np.float32), "f32"))
        elif name in ("embed", "head"):
            base.append(dense_entry(a, name, rng.standard_normal(shape).astype(np.float32), "i8"))
        else:
            for level in range(levels):
                (base if level == 0 else rest).append(_signs(a, name, shape, level, rank, rng))
    rest.sort(key=lambda block: block[0].level)
    return write_model(folder, a, base + rest, len(base))


def _signs(
    a: Architecture, name: str, shape: tuple[int, ...], level: int, rank: int, rng: np.random.Generator
) -> tuple[BlockEntry, bytes]:
    m, n = shape
    size = 0.6**level / (rank * n**0.5)
    u = (rng.random((m, rank)) + 0.5).astype(np.float16)
    v = ((rng.random((rank, n)) + 0.5) * size * 2).astype(np.float16)
    payload = pack_signs(rng.random((m, n)) < 0.5, u, v)
    entry = BlockEntry(
        kind="signs",
        tensor=name,
        level=level,
        shape=shape,
        nbytes=len(payload),
        gain=size * size,
        hash=content_hash(payload),
        uses=weight_uses(a, name),
        rank=rank,
    )
    return entry, payload


def write_planes_model(folder: Path, a: Architecture = TINY, levels: int = 4, seed: int = 0) -> Path:
    """Random indices that get longer by a bit with every level, embedding and head included."""
    rng = np.random.default_rng(seed)
    base: list[tuple[BlockEntry, bytes]] = []
    rest: list[tuple[BlockEntry, bytes]] = []
    for name, shape in weight_shapes(a).items():
        if len(shape) == 1:
            base.append(dense_entry(a, name, np.ones(shape, np.float32), "f32"))
        else:
            for level in range(levels):
                (rest if level else base).append(_plane(a, name, shape, level, rng))
    rest.sort(key=lambda block: block[0].level)
    return write_model(folder, a, base + rest, len(base))


def _plane(
    a: Architecture, name: str, shape: tuple[int, ...], level: int, rng: np.random.Generator
) -> tuple[BlockEntry, bytes]:
    """Levels of rows' own and shared ones in turn."""
    m, n = shape
    planes = rng.random((1 if level else 2, m, n)) < 0.5
    dtype, count = (SHARED_LEVELS, ROW_LEVELS)[level % 2], 2 ** plane_depth(level)
    if dtype == ROW_LEVELS:
        levels = rng.integers(-127, 128, (m, count)).astype(np.int8)
    else:
        levels = np.linspace(-127, 127, count).round().astype(np.int8)
    scale = np.full(m, 2.0**-6 / n**0.5, np.float32)
    scale = (scale.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    payload = pack_plane(planes, scale, levels)
    entry = BlockEntry(
        kind="plane",
        tensor=name,
        level=level,
        shape=shape,
        nbytes=len(payload),
        gain=0.5**level,
        hash=content_hash(payload),
        uses=weight_uses(a, name),
        dtype=dtype,
    )
    return entry, payload


def write_sparse_model(
    folder: Path,
    a: Architecture = TINY,
    dtype: str = "i8",
    shares: tuple[int, ...] = (30, 15, 25),
    seed: int = 0,
    beside: bool = True,
) -> Path:
    """Random linears of which each tier has a share of the columns, in hundredths; embedding and head are int8. Masks
    lie `beside` the stack; the same seed gives the same, whatever the values' dtype.
    """
    rng = np.random.default_rng(seed)
    base: list[tuple[BlockEntry, bytes]] = []
    rest: list[tuple[BlockEntry, bytes]] = []
    for name, shape in weight_shapes(a).items():
        if len(shape) == 1:
            base.append(dense_entry(a, name, np.ones(shape, np.float32), "f32"))
        elif name in ("embed", "head"):
            base.append(dense_entry(a, name, rng.standard_normal(shape).astype(np.float32), "i8"))
        else:
            blocks = _tiers(a, name, rng, shape, dtype, shares, beside)
            base += blocks[:2]
            rest += blocks[2:]
    rest.sort(key=lambda block: block[0].level)
    return write_model(folder, a, base + rest, len(base))


def _tiers(
    a: Architecture,
    name: str,
    rng: np.random.Generator,
    shape: tuple[int, ...],
    dtype: str,
    shares: tuple[int, ...],
    beside: bool,
) -> list[tuple[BlockEntry, bytes]]:
    """Masks and values in turn, tier after tier, large weights first."""
    m, n = shape
    weight = rng.standard_normal((m, n)).astype(np.float32) / np.float32(n**0.5)
    scale = np.abs(weight).max(axis=1) / VALUES_LIMIT[dtype] if dtype in VALUES_LIMIT else None
    places, before, blocks, start = np.argsort(-np.abs(weight)), np.zeros((m, n), np.bool_), [], 0
    for level, share in enumerate(shares):
        rank = max(1, n * share // 100)
        tier = np.zeros((m, n), np.bool_)
        np.put_along_axis(tier, places[:, start : start + rank], True, axis=1)
        values = pack_values(weight[tier].reshape(m, rank), dtype, scale, level == 0)
        for kind, own, payload in (("mask", "", pack_mask(tier, before)), ("values", dtype, values)):
            entry = BlockEntry(
                kind=kind,
                tensor=name,
                level=level,
                shape=shape,
                nbytes=len(payload),
                gain=0.5**level if own else 0.0,
                hash=content_hash(payload),
                uses=weight_uses(a, name),
                dtype=own,
                rank=rank,
                beside=beside and kind == "mask",
            )
            blocks.append((entry, payload))
        before, start = before | tier, start + rank
    return blocks


def write_variant(source: Path, target: Path) -> Path:
    """A sparse model of int8 values with the masks (and all else) of another, and other values: every sign turned."""
    stack, blocks = read_stack(source / STACK), []
    for entry, data in read_blocks(stack):
        if entry.kind == "values":
            scales = 4 * entry.shape[0] if entry.level == 0 else 0
            data = data[:scales] + (-np.frombuffer(data, np.int8)[scales:]).tobytes()
        blocks.append((msgspec.structs.replace(entry, hash=content_hash(data)), data))
    return write_model(target, read_manifest(source).architecture, blocks, stack.base)


def copy_model(source: Path, target: Path) -> Path:
    """A second copy of a model folder."""
    target.mkdir(parents=True)
    for name in (MANIFEST, STACK, MASKS, *TOKENIZER_FILES):
        if (source / name).exists():
            shutil.copy(source / name, target / name)
    return target
