"""The tokens a model is calibrated and judged on: a file's, or its own, sampled once and kept in the cache.

How they are sampled is in `calibrate`. Every eighth stream is held back from calibration and used to measure quality.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ...formats.checkpoint import Checkpoint
from ...formats.errors import InvalidRequest
from .calibrate import encode_calibration, sample_tokens
from .progress import Reporter

STREAMS: Final = 40
LENGTH: Final = 256
HOLD_BACK_EVERY: Final = 8


@dataclass(frozen=True)
class Texts:
    """Token ids `[S, L]`: what to calibrate on, and what to measure quality on."""

    calibration: Tensor
    held_back: Tensor


def file_texts(checkpoint: Checkpoint, path: Path) -> Texts:
    """The texts in a file. Raises `InvalidRequest`."""
    if not path.is_file():
        raise InvalidRequest(f"there is no calibration file {path}")
    length = min(LENGTH, checkpoint.architecture.context)
    return split(encode_calibration(checkpoint.folder, path, length, streams=STREAMS, bos=checkpoint.bos))


def sampled_texts(checkpoint: Checkpoint, checksum: str, seed: int, cache: Path, reporter: Reporter) -> Texts:
    """The model's own texts, from the cache if they are there. `checksum` is the checkpoint's."""
    made_from = f"2 {checksum} {checkpoint.bos} {checkpoint.eos} {STREAMS} {LENGTH} {seed}"
    key = hashlib.blake2b(made_from.encode(), digest_size=16).hexdigest()
    path = cache / "calibration" / f"{key}.npy"
    tokens = _read(path, checkpoint.architecture.vocab)
    if tokens is None:
        tokens = sample_tokens(
            checkpoint,
            streams=STREAMS,
            length=LENGTH,
            seed=seed,
            progress=lambda what, done, total: reporter.fraction(done, total),
        )
        _write(path, tokens)
    return split(tokens)


def split(tokens: Tensor) -> Texts:
    """Hold back every eighth stream; a single stream serves for both."""
    held = torch.arange(len(tokens)) % HOLD_BACK_EVERY == 0
    return Texts(tokens[~held], tokens[held]) if len(tokens) > 1 else Texts(tokens, tokens)


def _read(path: Path, vocab: int) -> Tensor | None:
    """The cached tokens, or None when they are not there or not usable."""
    try:
        tokens = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if tokens.ndim != 2 or tokens.dtype != np.int32 or not tokens.size or tokens.min() < 0 or tokens.max() >= vocab:
        return None
    return torch.from_numpy(tokens.astype(np.int64))


def _write(path: Path, tokens: Tensor) -> None:
    """Keep `tokens`; a cache that cannot be written costs time later, not this job."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                np.save(file, tokens.numpy().astype(np.int32), allow_pickle=False)
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
