"""llama.cpp's speed: the full shape in its file types, timed by its own `llama-bench`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf

from ebbflow.formats.checkpoint import open_checkpoint

from llama import programs
from llama_weights import write_gguf
from places import CACHE, DEMO, full_source


def full_gguf(kind: str) -> Path:
    """The random model of the 1.1B shape in one file type, without an importance matrix; made once."""
    return _quantised("full-gguf", full_source, kind)


def demo_gguf(kind: str) -> Path:
    """The same of the demo."""
    return _quantised("demo-gguf", lambda: DEMO, kind)


def _quantised(name: str, checkpoint: Callable[[], Path], kind: str) -> Path:
    folder = CACHE / name
    path = folder / f"{kind}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        source, partial = folder / "source.gguf", path.with_suffix(".partial")
        if not source.exists():
            unfinished = source.with_suffix(".partial")
            write_gguf(open_checkpoint(checkpoint()), unfinished)
            unfinished.rename(source)
        subprocess.run([programs() / "llama-quantize", source, partial, kind], check=True, capture_output=True)
        partial.rename(path)
    return path


def tensor_nbytes(path: Path) -> int:
    """Bytes of all tensors' data in a file."""
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


def tokens_per_second(
    path: Path, threads: int, *, prompt: int = 0, generate: int = 0, depth: int = 0, avx512: bool = True
) -> float:
    """Of a prompt of `prompt` tokens, or of `generate` tokens after `depth` others."""
    flags = ["-m", path, "-t", threads, "-p", prompt, "-n", generate, "-d", depth, "-r", 1, "-o", "json"]
    command = [str(part) for part in (programs(avx512=avx512) / "llama-bench", *flags)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    return float(json.loads(done.stdout)[0]["avg_ts"])
