"""The forward pass, written once: executes an `Architecture` over any array type.

What multiplies (a `Linear`), what computes in between (`Ops`) and where keys and values live (`Attention`) are given:
torch with dense weights for calibration, gradients and the oracle (`dense`), numba kernels over resident blocks for
serving (`serving`). Which tokens are in a step is the scheduler's business, which row is sampled the loop's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from ...formats.architecture import Architecture, has_bias

A = TypeVar("A")


class Linear(Protocol[A]):
    """A weight matrix `[m, n]`, with its bias if it has one."""

    def __call__(self, x: A) -> A:
        """`x [T, n] -> [T, m]`."""
        ...


class Ops(Protocol[A]):
    """What happens between linears. No method changes its arguments."""

    def rms_norm(self, x: A, weight: A, eps: float) -> A:
        """`x / sqrt(mean(x^2) + eps) * weight` over the last axis."""
        ...

    def add(self, x: A, y: A) -> A:
        """`x + y`."""
        ...

    def gated(self, gate: A, up: A) -> A:
        """`silu(gate) * up`."""
        ...

    def heads(self, x: A, head_dim: int) -> A:
        """`[T, heads * e] -> [T, heads, e]`."""
        ...


class Attention(Protocol[A]):
    """The sequences of one step: their positions, and the keys and values of what came before."""

    def rotate(self, x: A) -> A:
        """Rotary position embedding of `x [T, heads, e]` at this step's positions (halves convention)."""
        ...

    def attend(self, layer: int, q: A, k: A, v: A) -> A:
        """Store `k`, `v [T, g, e]`, attend causally with `q [T, h, e]`; `-> [T, h * e]`."""
        ...


@dataclass(frozen=True)
class Layer(Generic[A]):
    """One transformer layer's weights."""

    attention_norm: A
    mlp_norm: A
    q_norm: A | None
    k_norm: A | None
    q: Linear[A]
    k: Linear[A]
    v: Linear[A]
    o: Linear[A]
    gate: Linear[A]
    up: Linear[A]
    down: Linear[A]


@dataclass(frozen=True)
class Network(Generic[A]):
    """A whole model over arrays of type `A`. `embed` maps token ids `[T]` (an array of integers) to `[T, d]`."""

    architecture: Architecture
    ops: Ops[A]
    embed: Callable[[Any], A]
    layers: tuple[Layer[A], ...]
    final_norm: A
    head: Linear[A]

    def forward(self, tokens: Any, attention: Attention[A]) -> A:
        """Token ids `[T]` -> final normalised hidden states `[T, d]`; `head` turns the rows one wants into logits."""
        x = self.embed(tokens)
        for index, layer in enumerate(self.layers):
            x = layer_forward(self.architecture, self.ops, layer, index, x, attention)
        return self.ops.rms_norm(x, self.final_norm, self.architecture.norm_eps)


def layer_forward(a: Architecture, ops: Ops[A], layer: Layer[A], index: int, x: A, attention: Attention[A]) -> A:
    """One layer: `x [T, d] -> [T, d]`."""
    y = ops.rms_norm(x, layer.attention_norm, a.norm_eps)
    q, k, v = (ops.heads(linear(y), a.head_dim) for linear in (layer.q, layer.k, layer.v))
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = ops.rms_norm(q, layer.q_norm, a.norm_eps), ops.rms_norm(k, layer.k_norm, a.norm_eps)
    x = ops.add(x, layer.o(attention.attend(index, attention.rotate(q), attention.rotate(k), v)))
    y = ops.rms_norm(x, layer.mlp_norm, a.norm_eps)
    return ops.add(x, layer.down(ops.gated(layer.gate(y), layer.up(y))))


def build_layer(
    a: Architecture, index: int, vector: Callable[[str], A], linear: Callable[[str, str | None], Linear[A]]
) -> Layer[A]:
    """One layer from its stored tensors: `vector(name)` and `linear(name, name of its bias or None)` fetch them."""
    at = f"layers.{index}."

    def line(role: str) -> Linear[A]:
        return linear(at + role, f"{at}{role}.bias" if has_bias(a, role) else None)  # type: ignore[arg-type]

    return Layer(
        attention_norm=vector(at + "attention_norm"),
        mlp_norm=vector(at + "mlp_norm"),
        q_norm=vector(at + "q_norm") if a.qk_norm else None,
        k_norm=vector(at + "k_norm") if a.qk_norm else None,
        q=line("q"),
        k=line("k"),
        v=line("v"),
        o=line("o"),
        gate=line("gate"),
        up=line("up"),
        down=line("down"),
    )
