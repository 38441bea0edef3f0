"""A network's description as the program that `kernels/step` runs: its phases, matrices and vectors. Pure.

A new family is a new description: what differs between families is which phases there are, and their fields.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...formats.architecture import Architecture, has_bias, linear_shapes
from ...formats.blocks import rotation_signs
from ...formats.kinds import rotation_blocks
from ...kernels import step

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Program:
    """What `step.run_step` wants to know of a network, but for the blocks that are resident.

    `names` are the matrices' tensors, in the order of `shapes [matrices, 7]`, whose columns that depend on resident
    blocks are 0.
    """

    phases: I64
    names: tuple[str, ...]
    shapes: I64
    vectors: F32
    signs: F32
    sizes: I64


def build_program(a: Architecture, vector: Callable[[str], F32]) -> Program:
    """`vector(name)` fetches norms and biases."""
    return _Builder(a, vector).build()


class _Builder:
    def __init__(self, a: Architecture, vector: Callable[[str], F32]) -> None:
        self._a, self._vector = a, vector
        self._phases: list[tuple[int, ...]] = []
        self._names: list[str] = []
        self._shapes: list[tuple[int, ...]] = []
        self._vectors: list[F32] = []
        self._begins = 0

    def build(self) -> Program:
        a = self._a
        for layer in range(a.layers):
            self._layer(layer)
        name = "embed" if a.tied else "head"
        self._norm("final_norm", only_wanted=1)
        self._multiply([(name, (a.vocab, a.hidden), None)], step.TARGET_LOGITS, only_wanted=1)
        widths = (a.hidden, a.heads * a.head_dim, a.intermediate)
        signs = np.zeros((len(widths), max(widths)), np.float32)
        sizes = np.zeros((len(widths), max(len(rotation_blocks(n)) for n in widths)), np.int64)
        for row, n in enumerate(widths):
            signs[row, :n] = rotation_signs(n)
            sizes[row, : len(rotation_blocks(n))] = rotation_blocks(n)
        return Program(
            np.array(self._phases, np.int64),
            tuple(self._names),
            np.array(self._shapes, np.int64),
            np.concatenate(self._vectors),
            signs,
            sizes,
        )

    def _layer(self, layer: int) -> None:
        a, at, shapes = self._a, f"layers.{layer}.", linear_shapes(self._a)

        def matrices(*roles: str) -> list[tuple[str, tuple[int, int], str | None]]:
            return [
                (at + role, shapes[role], f"{at}{role}.bias" if has_bias(a, role) else None)  # type: ignore[index, arg-type]
                for role in roles
            ]

        self._norm(at + "attention_norm")
        self._multiply(matrices("q", "k", "v"), step.TARGET_HEADS)
        norms = [self._keep(at + name) if a.qk_norm else -1 for name in ("q_norm", "k_norm")]
        self._phases.append((step.HEADS, layer, *norms, 0))
        self._phases.append((step.ATTEND, layer, 0, 0, 0))
        self._phases.append((step.MIX, 0, len(self._names), 0, 0))
        self._multiply(matrices("o"), step.TARGET_HIDDEN)
        self._norm(at + "mlp_norm")
        self._multiply(matrices("gate", "up"), step.TARGET_WIDE)
        self._phases.append((step.GATE, 0, len(self._names), 0, 0))
        self._multiply(matrices("down"), step.TARGET_HIDDEN)

    def _norm(self, name: str, only_wanted: int = 0) -> None:
        self._phases.append((step.NORM, self._keep(name), len(self._names), 0, only_wanted))

    def _multiply(
        self, matrices: list[tuple[str, tuple[int, int], str | None]], target: int, only_wanted: int = 0
    ) -> None:
        """One phase for matrices that read the same input; their outputs lie side by side in the target."""
        self._phases.append((step.MULTIPLY, len(self._names), len(matrices), target, only_wanted))
        column = 0
        for name, (m, n), bias in matrices:
            self._names.append(name)
            self._shapes.append((m, n, 0, self._keep(bias) if bias else -1, column, 0, 0))
            column += m

    def _keep(self, name: str) -> int:
        """Where a vector begins among all of them."""
        vector, begins = self._vector(name), self._begins
        self._vectors.append(vector.astype(np.float32).reshape(-1))
        self._begins += vector.size
        return begins
