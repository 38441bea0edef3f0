"""The forward pass in torch with dense float32 weights: for calibration, gradients and as the oracle of serving.

Gradients flow through everything here. A step is a batch of B sequences of equal length L at equal positions, flattened
to T = B * L tokens, sequence by sequence. Serving from resident blocks is `serving`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from ...formats.architecture import Architecture
from .network import Layer, Network, build_layer
from .rotary import rotary_frequencies

MAPPED_WEIGHTS: Final = 2**19  # made float32 at once: 2 MB


class DenseOps:
    """`network.Ops` over torch tensors."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `network.Ops`."""
        return functional.rms_norm(x, weight.shape, weight, eps)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """See `network.Ops`."""
        return x + y

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """See `network.Ops`."""
        return functional.silu(gate) * up

    def heads(self, x: Tensor, head_dim: int) -> Tensor:
        """See `network.Ops`."""
        return x.reshape(len(x), -1, head_dim)


@dataclass(frozen=True)
class DenseLinear:
    """`network.Linear`: a matrix `[m, n]` and perhaps a bias `[m]`, both in float32."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """`x [T, n] -> [T, m]`."""
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class MappedLinear:
    """A linear whose matrix is in any number type, and made float32 a few rows at a time, in the processor's cache.

    With 40 tokens as fast as `DenseLinear`: reading half the bytes pays for converting them.
    """

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """`x [T, n] -> [T, m]`."""
        m, n = self.weight.shape
        result = torch.empty(len(x), m)
        count = max(1, MAPPED_WEIGHTS // n)
        for start in range(0, m, count):
            rows = slice(start, start + count)
            bias = None if self.bias is None else self.bias[rows]
            result[:, rows] = functional.linear(x, self.weight[rows].float(), bias)
        return result


@dataclass
class KVCache:
    """Keys and values of B sequences, one pair `[B, g, capacity, e]` a layer; `length` positions are filled.

    They are kept in `dtype`, and come out in float32.
    """

    architecture: Architecture
    batch: int
    capacity: int
    length: int = 0
    dtype: torch.dtype = torch.float32
    _layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        a = self.architecture
        shape = (self.batch, a.kv_heads, self.capacity, a.head_dim)
        self._layers = [
            (torch.empty(shape, dtype=self.dtype), torch.empty(shape, dtype=self.dtype)) for _ in range(a.layers)
        ]

    def step(self, length: int) -> DenseAttention:
        """The next `length` tokens of every sequence; their keys and values become part of the cache."""
        assert self.length + length <= self.capacity
        attention = DenseAttention(self.architecture, self.batch, length, self.length, self)
        self.length += length
        return attention

    def store(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put `k`, `v [B, g, L, e]` at positions from `start`; `->` all keys and values so far."""
        stop = start + k.shape[2]
        keys, values = self._layers[layer]
        keys[:, :, start:stop], values[:, :, start:stop] = k, v
        return keys[:, :, :stop].float(), values[:, :, :stop].float()


class DenseAttention:
    """`network.Attention` of B sequences at positions `[start, start + L)`; a `start` above 0 wants a cache."""

    def __init__(
        self, architecture: Architecture, batch: int, length: int, start: int = 0, cache: KVCache | None = None
    ) -> None:
        self._batch, self._length, self._start = batch, length, start
        self._window = architecture.window
        self._cache = cache
        frequencies = torch.tensor(rotary_frequencies(architecture), dtype=torch.float64)
        angles = torch.arange(start, start + length, dtype=torch.float64)[:, None] * frequencies
        # [T, 1, e / 2], the same for each sequence and head
        self._cos = angles.cos().float().repeat(batch, 1)[:, None]
        self._sin = angles.sin().float().repeat(batch, 1)[:, None]

    def rotate(self, x: Tensor) -> Tensor:
        """See `network.Attention`."""
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * self._cos - second * self._sin, second * self._cos + first * self._sin), dim=-1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `network.Attention`."""
        q, k, v = (x.unflatten(0, (self._batch, self._length)).transpose(1, 2) for x in (q, k, v))  # [B, heads, L, e]
        if self._cache is not None:
            k, v = self._cache.store(layer, self._start, k, v)
        mask = self._mask(k.shape[2])
        y = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return y.transpose(1, 2).reshape(self._batch * self._length, -1)

    def _mask(self, stop: int) -> Tensor | None:
        """Which of the keys `[0, stop)` each query may see, `[L, stop]`; None when it is plainly causal."""
        if self._start == 0 and (self._window is None or self._window >= stop):
            return None
        query = torch.arange(self._start, stop)[:, None]
        key = torch.arange(stop)
        seen = key <= query
        return seen if self._window is None else seen & (key > query - self._window)


def dense_layer(architecture: Architecture, index: int, tensor: Callable[[str], Tensor]) -> Layer[Tensor]:
    """One layer with the weights that `tensor` gives by stored name."""
    return build_layer(
        architecture,
        index,
        tensor,
        lambda name, bias: DenseLinear(tensor(name), tensor(bias) if bias is not None else None),
    )


def mapped_network(
    architecture: Architecture, tensor: Callable[[str], Tensor], mapped: Callable[[str], Tensor]
) -> Network[Tensor]:
    """A whole model, its vectors from `tensor` in float32, its matrices from `mapped` as they are stored."""
    embed = mapped("embed")

    def linear(name: str, bias: str | None) -> MappedLinear:
        return MappedLinear(mapped(name), tensor(bias) if bias is not None else None)

    return Network(
        architecture=architecture,
        ops=DenseOps(),
        embed=lambda tokens: functional.embedding(tokens, embed).float(),
        layers=tuple(build_layer(architecture, index, tensor, linear) for index in range(architecture.layers)),
        final_norm=tensor("final_norm"),
        head=MappedLinear(embed if architecture.tied else mapped("head")),
    )


def build_network(architecture: Architecture, tensor: Callable[[str], Tensor]) -> Network[Tensor]:
    """A whole model with the weights that `tensor` gives by stored name (`architecture.weight_shapes`), in float32."""
    embed = tensor("embed")
    return Network(
        architecture=architecture,
        ops=DenseOps(),
        embed=lambda tokens: functional.embedding(tokens, embed),
        layers=tuple(dense_layer(architecture, index, tensor) for index in range(architecture.layers)),
        final_norm=tensor("final_norm"),
        head=DenseLinear(embed if architecture.tied else tensor("head")),
    )
