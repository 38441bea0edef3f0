"""Stacks in memory, without a worker around them: load to a depth, compute with what is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ebbflow.daemon.engine.batch import Batch
from ebbflow.daemon.engine.kv import KvCache, blocks_for
from ebbflow.daemon.engine.sequences import Piece, Sequence
from ebbflow.daemon.engine.serving import ServingNetwork
from ebbflow.daemon.worker.resident import Resident
from ebbflow.formats.architecture import Architecture
from ebbflow.formats.manifest import STACK
from ebbflow.formats.stack import read_stack

from support.stacks import TINY


def load(folder: Path, blocks: int) -> Resident:
    """A fresh load of the model in `folder`, with its edge at `blocks`."""
    resident = Resident(read_stack(folder / STACK))
    move(resident, blocks)
    return resident


def move(resident: Resident, blocks: int) -> None:
    """Move the edge to `blocks`, up or down."""
    resident.shrink(blocks)
    while resident.blocks < blocks:
        resident.grow(blocks)


def logits(resident: Resident, tokens: list[int], a: Architecture = TINY, exact: bool = False) -> NDArray[np.float32]:
    """Logits `[T, v]` of a sequence, by the resident prefix."""
    network, kv = ServingNetwork(a, resident, 2, exact), KvCache(a, "f32" if exact else "f16")
    sequence = Sequence(0, tokens, len(tokens), blocks=kv.allocate(blocks_for(len(tokens))))
    batch = Batch([Piece(sequence, 0, len(tokens))], kv.array, a, 2)
    return network.logits(batch, list(range(len(tokens))))


def run_child(module: str, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """`python -m support.MODULE`, in a process of its own: for what must not happen to pytest itself."""
    command = [sys.executable, "-P", "-m", f"support.{module}", *arguments]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
