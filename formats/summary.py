"""The line of `ebb list` that a manifest amounts to."""

from __future__ import annotations

from .manifest import Manifest
from .values import ModelSummary


def summary(manifest: Manifest) -> ModelSummary:
    """A manifest's line of `ebb list`."""
    return ModelSummary(
        name=manifest.name,
        family=manifest.architecture.family,
        codec=manifest.codec,
        nbytes=manifest.nbytes,
        base_nbytes=manifest.base_nbytes,
        original_nbytes=manifest.original_nbytes,
        created=manifest.created,
    )
