"""A source checkpoint: a Hugging Face folder of safetensors weights, read one tensor at a time under our names.

`open_checkpoint` checks everything that can be checked without reading a weight: configuration, tokenizer, every
tensor's presence, shape and number type. What a configuration means is in `huggingface`. Needs torch; the client and
the supervisor never import this.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import warnings
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from .architecture import Architecture, weight_shapes
from .errors import CorruptCheckpoint, UnsupportedModel
from .huggingface import CONFIG, read_architecture, read_special_tokens

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROWS_NBYTES: Final = 2**22  # looked at together: what the search for NaN allocates

_SHARD_NAME: Final = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack")
_LAYER_PARTS: Final = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_OUTER_PARTS: Final = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}


@dataclass(frozen=True)
class _Place:
    """Where one tensor lies: its name in the source, its file, and its bytes there."""

    source: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint. `nbytes` are the bytes of the weights that are used, `eos` may be empty."""

    folder: Path
    architecture: Architecture
    bos: int | None
    eos: tuple[int, ...]
    nbytes: int
    files: tuple[Path, ...]
    _places: dict[str, _Place]

    def tensor(self, name: str) -> torch.Tensor:
        """The weights of `name` (see `architecture.weight_shapes`) in float32, in memory of their own.

        Raises `CorruptCheckpoint` when they cannot be read, or one is NaN or infinite.
        """
        return self.mapped(name).to(torch.float32, copy=True)

    def mapped(self, name: str) -> torch.Tensor:
        """The same in the number type and the pages of the file, which the system may drop and read again.

        Not to be written to. Raises `CorruptCheckpoint` like `tensor`.
        """
        place = self._places[name]
        try:
            weights = _map(place)
        except (ValueError, OSError) as error:
            raise CorruptCheckpoint(f"{place.source} cannot be read from {place.file}: {error}") from error
        for rows in weights.split(max(1, ROWS_NBYTES // weights[:1].nbytes)):
            if not bool(torch.isfinite(rows).all()):
                raise CorruptCheckpoint(f"{place.source} in {place.file} holds NaN or infinity")
        return weights

    def checksum(self) -> str:
        """BLAKE2b-128, as hexadecimal digits, of the names and digests of the configuration and weight files."""
        total = hashlib.blake2b(digest_size=16)
        for path in self.files:
            try:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            except OSError as error:
                raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}") from error
            total.update(f"{path.name} {digest.hexdigest()}\n".encode())
        return total.hexdigest()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open and check the checkpoint in `folder`; no weight is read.

    Raises `UnsupportedModel` for a model that the engine does not run, `CorruptCheckpoint` for a folder that is
    incomplete or contradicts itself.
    """
    architecture = read_architecture(folder)
    bos, eos = read_special_tokens(folder)
    if bos is not None and bos >= architecture.vocab:
        raise CorruptCheckpoint(f"bos_token_id {bos} is outside the vocabulary of {architecture.vocab}")
    if not (folder / "tokenizer.json").is_file():
        raise UnsupportedModel(
            f"{folder} has no tokenizer.json, the only tokenizer format this version reads; transformers writes it "
            "with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    shards = _shards(folder)
    places = _find_tensors(architecture, shards)
    index = [folder / INDEX] if (folder / INDEX).is_file() else []
    return Checkpoint(
        folder=folder,
        architecture=architecture,
        bos=bos,
        eos=tuple(token for token in eos if token < architecture.vocab),
        nbytes=sum(place.nbytes for place in places.values()),
        files=(folder / CONFIG, *index, *shards),
        _places=places,
    )


def source_name(name: str) -> str:
    """Our name of a tensor -> its name in a Hugging Face checkpoint."""
    stem, suffix = (name.removesuffix(".bias"), ".bias") if name.endswith(".bias") else (name, ".weight")
    if stem in _OUTER_PARTS:
        return _OUTER_PARTS[stem] + suffix
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_LAYER_PARTS[part]}{suffix}"


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _shards(folder: Path) -> tuple[Path, ...]:
    """The weight files of the folder, in order of name."""
    if (folder / INDEX).is_file():
        names = sorted(set(_read_index(folder / INDEX).weight_map.values()))
    elif (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        other = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if other:
            raise UnsupportedModel(f"{folder} has its weights in {other[0]}; only safetensors files are read")
        raise CorruptCheckpoint(f"{folder} has neither {WEIGHTS} nor {INDEX}")
    for name in names:
        if not _SHARD_NAME.fullmatch(name):
            raise CorruptCheckpoint(f"{INDEX} names the file {name!r}; want a plain name ending in .safetensors")
        if not (folder / name).is_file():
            raise CorruptCheckpoint(f"{folder} lacks {name}, which {INDEX} names")
    return tuple(folder / name for name in names)


def _read_index(path: Path) -> _Index:
    try:
        index = msgspec.json.decode(path.read_bytes(), type=_Index)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptCheckpoint(f"{path} is not an index of weights: {error}") from error
    if not index.weight_map:
        raise CorruptCheckpoint(f"{path} lists no tensors")
    return index


def _find_tensors(architecture: Architecture, shards: tuple[Path, ...]) -> dict[str, _Place]:
    shapes = weight_shapes(architecture)
    wanted = {source_name(name): name for name in shapes}
    places: dict[str, _Place] = {}
    for path in shards:
        try:
            # Not as "pt": that maps all of the file as if to write to it, which counts against the job's memory cap.
            with safe_open(path, framework="np") as file:
                starts = _starts(path)
                for source in file.keys():  # noqa: SIM118 (not a dict)
                    if source in wanted:
                        name = wanted[source]
                        dtype = _check(path, source, file.get_slice(source), shapes[name])
                        nbytes = prod(shapes[name]) * dtype.itemsize
                        places[name] = _Place(source, path, dtype, shapes[name], starts[source], nbytes)
                    elif not _ignorable(source, architecture):
                        raise UnsupportedModel(f"{path} holds {source}, which {architecture.family} models do not have")
        except (SafetensorError, OSError) as error:
            raise CorruptCheckpoint(f"{path} is not a whole safetensors file: {error}") from error
    missing = [source for source, name in wanted.items() if name not in places]
    if missing:
        raise CorruptCheckpoint(f"{len(missing)} tensors are in no weight file, the first of them {missing[0]}")
    return places


class _Stored(msgspec.Struct):
    data_offsets: tuple[int, int]


def _starts(path: Path) -> dict[str, int]:
    """Where in a file, which `safe_open` found whole, each tensor begins."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
    header.pop("__metadata__", None)
    return {name: 8 + length + msgspec.json.decode(raw, type=_Stored).data_offsets[0] for name, raw in header.items()}


def _map(place: _Place) -> torch.Tensor:
    """The tensor, in pages of its file that cannot be written to. Raises `OSError`, or `ValueError` when it is cut."""
    before = place.start % mmap.ALLOCATIONGRANULARITY  # where a map begins must be a multiple of it
    with place.file.open("rb") as file:
        pages = mmap.mmap(file.fileno(), before + place.nbytes, access=mmap.ACCESS_READ, offset=place.start - before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, that it has no tensors which cannot be written to
        flat = torch.frombuffer(pages, dtype=place.dtype, count=prod(place.shape), offset=before)
    return flat.view(place.shape)


def _check(path: Path, source: str, stored: Any, shape: tuple[int, ...]) -> torch.dtype:
    """The tensor's number type, if that is one that is read, and the shape is right."""
    found, dtype = tuple(stored.get_shape()), stored.get_dtype()
    if dtype not in DTYPES:
        raise UnsupportedModel(f"{source} in {path} is stored as {dtype}; supported are {', '.join(DTYPES)}")
    if found != shape:
        raise CorruptCheckpoint(f"{source} in {path} has shape {list(found)}; the configuration says {list(shape)}")
    return DTYPES[dtype]


def _ignorable(source: str, architecture: Architecture) -> bool:
    return source.endswith("rotary_emb.inv_freq") or (source == "lm_head.weight" and architecture.tied)
