"""The masks of a sparse model that the library has, for the values of another: `ebb add --masks-of`.

All tiers' masks are taken as they are. What is left to choose are the values: with `admm` those of the least squares on
these positions (`prune`), with every other method the weights themselves. Needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import torch
from torch import Tensor

from ...formats.blocks import check_finite, unpack_mask
from ...formats.container import padded
from ...formats.errors import InvalidRequest, NotArrived, UnknownModel
from ...formats.index import filled_before
from ...formats.kinds import mask_nbytes, values_nbytes
from ...formats.manifest import MANIFEST, STACK, read_manifest
from ...formats.masks import digest
from ...formats.paths import check_name
from ...formats.pruning import CODEC, PATTERNS, Pruning
from ...formats.stack import BlockReader, check_manifest, read_stack
from .prune import Inputs, Pruned, least_squares

ROUNDS: Final = 4  # of least squares: it begins at the weights, which are farther from it than what ADMM leaves


class GivenMasks:
    """The masks of the model `name`, whose files are kept open: it may be removed meanwhile. A context manager.

    `linkable_nbytes` of a model with just these masks are on the disk already, in a file that it can share.
    Raises `InvalidName`, `UnknownModel`, `InvalidRequest` when it has no masks, `NotArrived`, or `CorruptFile`.
    """

    def __init__(self, library: Path, name: str) -> None:
        folder = library / check_name(name)
        if not (folder / MANIFEST).is_file():
            raise UnknownModel(f"no model {name!r} in {library}, whose masks this one shall have")
        manifest, stack = read_manifest(folder), read_stack(folder / STACK)
        if stack.arriving:
            raise NotArrived(f"{name} is itself still arriving; wait until it is complete")
        check_manifest(stack, manifest)
        valued = {(entry.tensor, entry.level) for entry in stack.blocks if entry.kind == "values"}
        masks = [
            (position, entry)
            for position, entry in enumerate(stack.blocks)
            if entry.kind == "mask" and (entry.tensor, entry.level) in valued
        ]
        if manifest.codec != CODEC or not masks:
            raise InvalidRequest(f"{name} is of the codec {manifest.codec} and has no masks; name one of {CODEC}")
        self.name, self.pattern = name, str(manifest.options.get("pattern", "")) or None
        self.digest = digest([msgspec.structs.replace(entry, beside=True) for _, entry in masks])
        alone = manifest.masks == self.digest  # else they lie in a file with others, or inside the stack
        self.linkable_nbytes = sum(padded(entry.nbytes) for _, entry in masks) if alone else 0
        self._blocks, self._filled = stack.blocks, filled_before(stack.blocks)
        self._positions: dict[str, list[int]] = {}
        for position, entry in masks:
            self._positions.setdefault(entry.tensor, []).append(position)
        self._reader = BlockReader(stack)

    def __enter__(self) -> GivenMasks:
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.__exit__(*error)

    @property
    def levels(self) -> int:
        """The most tiers of a tensor."""
        return max(map(len, self._positions.values()))

    @property
    def sparsity(self) -> float:
        """The share of zeros in the linears."""
        kept = size = 0
        for tensor, positions in self._positions.items():
            m, n = self._blocks[positions[0]].shape
            kept, size = kept + m * self._kept(tensor), size + m * n
        return round(1 - kept / size, 4)

    def check(self, shapes: dict[str, tuple[int, int]], pruning: Pruning, levels: int | None) -> None:
        """Read all masks and see that they fit linears of these shapes, and what else was asked for.

        Raises `InvalidRequest`, or `BadBlock` and its like for masks that are damaged.
        """
        found = {tensor: self._blocks[positions[0]].shape for tensor, positions in self._positions.items()}
        if found != shapes:
            odd = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))[0]
            raise InvalidRequest(
                f"the masks of {self.name} are of another model: of {odd} it has {_matrix(found.get(odd))}, and the "
                f"checkpoint {_matrix(shapes.get(odd))}"
            )
        if levels not in (None, self.levels):
            raise InvalidRequest(f"{self.name} has {self.levels} tiers, and its masks are taken as they are: no levels")
        for tensor, (_, n) in shapes.items():
            group = pruning.group(tensor, n)
            asked = pruning.sparsity is not None or pruning.pattern is not None
            if asked and pruning.keep(group) * (n // group) != self._kept(tensor):
                raise InvalidRequest(
                    f"the masks of {self.name} leave {self._kept(tensor)} of {n} weights in every row of {tensor}, "
                    f"a sparsity of {1 - self._kept(tensor) / n:.4g}, not {pruning.wanted:g}; ask for none"
                )
            kept = self.kept(tensor)
            if pruning.pattern and (kept.unflatten(1, (-1, group)).sum(2) != PATTERNS[pruning.pattern][0]).any():
                raise InvalidRequest(f"the masks of {self.name} have not the pattern {pruning.pattern}; ask for none")

    def tiers(self, tensor: str) -> Iterator[Tensor]:
        """Where each tier has its values, `[m, n]`. Raises `BadBlock` or `TruncatedStack`."""
        m, n = self._blocks[self._positions[tensor][0]].shape
        before = np.zeros((m, n), np.bool_)
        for position in self._positions[tensor]:
            entry, payload = self._blocks[position], self._reader.read(position)
            check_finite(entry, np.frombuffer(payload, np.uint8), self._filled[position])
            tier = unpack_mask(payload, m, n, before)
            before |= tier
            yield torch.from_numpy(tier)

    def kept(self, tensor: str) -> Tensor:
        """Where any tier has values, `[m, n]`. Raises as `tiers`."""
        first, *rest = self.tiers(tensor)
        for tier in rest:
            first |= tier
        return first

    def nbytes(self, tensor: str, values: str) -> list[int]:
        """Bytes of every block: mask and values of tier 0, of tier 1, ..."""
        sizes = []
        for position in self._positions[tensor]:
            entry = self._blocks[position]
            m, n = entry.shape
            sizes += [mask_nbytes(m, n, self._filled[position]), values_nbytes(m, entry.level, values, entry.rank)]
        return sizes

    def _kept(self, tensor: str) -> int:
        """Weights of each row that are kept."""
        return sum(self._blocks[position].rank for position in self._positions[tensor])


def on_positions(weight: Tensor, inputs: Inputs, kept: Tensor, method: str, allowed: Tensor | None) -> Pruned:
    """Some rows `weight [m, n]`, of which just those `kept [m, n]` stay; those that are not `allowed` as zeros."""
    support = kept if allowed is None else kept & allowed
    if method != "admm":
        return Pruned(kept, weight * support)
    target = weight * inputs.norms
    found = target
    for _ in range(ROUNDS):
        found = least_squares(target, inputs.scaled, support, found)
    return Pruned(kept, found / inputs.norms)


def _matrix(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else " x ".join(map(str, shape))
