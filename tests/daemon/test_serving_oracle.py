"""Serving with exact weights equals transformers, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ebbflow.daemon.engine.batch import Batch
from ebbflow.daemon.engine.kv import KvCache
from ebbflow.daemon.engine.sequences import Piece, Sequence
from ebbflow.daemon.engine.serving import ServingNetwork
from ebbflow.daemon.worker.resident import Resident
from ebbflow.formats.checkpoint import open_checkpoint
from ebbflow.formats.manifest import STACK
from ebbflow.formats.stack import read_stack

from support.stacks import write_exact_model
from support.tiny_models import FAMILIES, write_tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    import transformers

    source = write_tiny_model(tmp_path / "source", family)
    checkpoint = open_checkpoint(source)
    a = checkpoint.architecture
    folder = write_exact_model(tmp_path / "model", a, lambda name: checkpoint.tensor(name).numpy())
    resident = Resident(read_stack(folder / STACK))
    while resident.blocks < resident.stack.base:
        resident.grow(resident.stack.base)
    network = ServingNetwork(a, resident, threads=2)
    tokens = np.random.default_rng(0).integers(0, a.vocab, 41).tolist()
    caches = KvCache(a, "f32"), KvCache(a)
    logits: tuple[list[Any], list[Any]] = [], []
    for kv, parts in zip(caches, logits, strict=True):
        sequence = Sequence(0, tokens, len(tokens), blocks=kv.allocate(2))
        for start, count in ((0, 1), (1, 37), (38, 3)):  # in uneven pieces, across a KV block's edge
            batch = Batch([Piece(sequence, start, count)], kv.array, a, 2)
            parts.append(network.logits(batch, list(range(count))))
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    exact, rounded = (np.concatenate(parts) for parts in logits)
    np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-4)
    error = np.abs(rounded - expected)  # keys and values as fp16, the default
    assert 1e-4 < error.max() < 0.01
    assert error.mean() < 0.001
    resident.close()
