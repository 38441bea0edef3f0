"""Models as the library index sees them: a folder with a manifest. There are no weights."""

from __future__ import annotations

from pathlib import Path

from ebbflow.formats.architecture import Architecture
from ebbflow.formats.manifest import Manifest, Source, write_manifest

ARCHITECTURE = Architecture(
    family="llama",
    vocab=64,
    hidden=32,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=16,
    intermediate=64,
    context=128,
    norm_eps=1e-5,
    rotary_theta=10_000.0,
)


def write_model(
    library: Path,
    name: str,
    *,
    full: int = 1_000_000_000,
    base: int = 200_000_000,
    masks: str = "",
    base_masks: int = 0,
) -> Manifest:
    """A model folder below `library` whose manifest claims these sizes and masks."""
    manifest = Manifest(
        name=name,
        architecture=ARCHITECTURE,
        source=Source("/somewhere", "00"),
        codec="bitstack",
        options={"levels": 4},
        nbytes=full,
        base_nbytes=base,
        blocks=10,
        original_nbytes=2 * full,
        created="2025-01-01",
        masks=masks,
        base_masks_nbytes=base_masks,
    )
    (library / name).mkdir(parents=True, exist_ok=True)
    write_manifest(library / name, manifest)
    return manifest
