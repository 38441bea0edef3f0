"""The manifest: what the library knows about a model without opening its stack."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgspec

from .architecture import Architecture
from .errors import CorruptManifest, UnsupportedVersion
from .files import open_plain

MANIFEST: Final = "manifest.json"
STACK: Final = "stack.safetensors"
MASKS: Final = "masks.safetensors"
VERSION: Final = 1
MOST_NBYTES: Final = 1_000_000  # of a manifest; the supervisor, which must stay small, reads that of every model
TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


class CurvePoint(msgspec.Struct, frozen=True):
    """Quality of one prefix, measured on calibration text: KL to the original (nats per token) and perplexity."""

    blocks: int
    nbytes: int
    kl: float
    perplexity: float


class Source(msgspec.Struct, frozen=True):
    """Where the weights came from. `checksum` is BLAKE2b-128 over the weight files."""

    location: str
    checksum: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One model of the library. `nbytes` and `base_nbytes` are the stack's and its base's.

    `masks` names what is in the masks file (`masks.digest`): of models with the same name it is the same. Nothing where
    there is no such file. `base_masks_nbytes` of the base are such masks; 0 in manifests that do not say.
    """

    version: int = VERSION
    name: str
    architecture: Architecture
    source: Source
    codec: str
    options: dict[str, str | int | float]
    nbytes: int
    base_nbytes: int
    blocks: int
    original_nbytes: int
    bos: int | None = None
    eos: tuple[int, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    created: str = ""
    masks: str = ""
    base_masks_nbytes: int = 0


class _Versioned(msgspec.Struct):
    version: int


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the model in `folder`. Raises `CorruptManifest` or `UnsupportedVersion`."""
    path = folder / MANIFEST
    try:
        with os.fdopen(open_plain(path), "rb") as file:
            text = file.read(MOST_NBYTES + 1)
        if len(text) > MOST_NBYTES:
            raise CorruptManifest(f"{path} is larger than the {MOST_NBYTES} bytes that a manifest may have")
        version = msgspec.json.decode(text, type=_Versioned).version
        if version != VERSION:
            raise UnsupportedVersion(f"{path} is manifest version {version}; this ebbflow reads version {VERSION}")
        return msgspec.json.decode(text, type=Manifest)
    except OSError as error:
        raise CorruptManifest(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptManifest(f"{path} is not a manifest: {error}") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into `folder`, atomically."""
    path = folder / MANIFEST
    temporary = path.with_name(MANIFEST + ".partial")
    with temporary.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
