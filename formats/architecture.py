"""The layer description: what a model's network is made of, as data.

A family (Llama, Qwen, ...) is a way of filling this in, never code of its own. `checkpoint` fills it from a source's
configuration, the manifest stores it, `daemon/engine/network` executes it. Letters used for shapes throughout:

    T tokens in a step   n columns (inputs)   m rows (outputs)   k rank
    d hidden width       h heads              g key/value heads  e head width   f feed-forward width   v vocabulary
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

_MOST: Final = 2**24  # more than any network has of anything; keeps products in 64 bits

Role = Literal["q", "k", "v", "o", "gate", "up", "down"]


class RotaryScaling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How rotary frequencies are stretched beyond the trained context.

    `linear` divides every frequency by `factor`; `llama3` divides only the slow ones, and blends in between.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        """Raises `ValueError` for a scaling that divides by zero."""
        if not (self.factor > 0 and 0 < self.low_freq_factor < self.high_freq_factor and self.original_context > 0):
            raise ValueError("rotary scaling needs factors above 0, high_freq_factor above low_freq_factor")


class Architecture(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One decoder-only transformer: pre-norm RMSNorm, rotary grouped-query attention, gated feed-forward."""

    family: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    context: int
    norm_eps: float
    rotary_theta: float
    rotary_scaling: RotaryScaling | None = None
    activation: Literal["silu"] = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    tied: bool = False

    def __post_init__(self) -> None:
        """Raises `ValueError` (a decoding error, when it comes from a file) for a network that cannot exist."""
        counts = (self.vocab, self.hidden, self.layers, self.heads, self.kv_heads, self.head_dim, self.intermediate)
        if min(counts) < 1 or max(counts) > _MOST or not 1 < self.context <= _MOST:
            raise ValueError("a width, a count of layers or heads, or the context is not sane")
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError("heads must be a multiple of kv_heads, and of even width")
        if not (self.norm_eps > 0 and self.rotary_theta > 0 and (self.window is None or self.window > 0)):
            raise ValueError("norm_eps, rotary_theta and window must be above 0")


def linear_shapes(a: Architecture) -> dict[Role, tuple[int, int]]:
    """`[m, n]` of each linear of a layer."""
    wide, narrow = a.heads * a.head_dim, a.kv_heads * a.head_dim
    return {
        "q": (wide, a.hidden),
        "k": (narrow, a.hidden),
        "v": (narrow, a.hidden),
        "o": (a.hidden, wide),
        "gate": (a.intermediate, a.hidden),
        "up": (a.intermediate, a.hidden),
        "down": (a.hidden, a.intermediate),
    }


def has_bias(a: Architecture, role: Role) -> bool:
    """Whether that linear adds a bias."""
    if role in ("q", "k", "v"):
        return a.qkv_bias
    return a.output_bias if role == "o" else a.mlp_bias


def weight_shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Every stored tensor's name and shape, in network order.

    Names: `embed`, `layers.3.attention_norm`, `layers.3.q`, `layers.3.q.bias`, ..., `final_norm`, `head` (untied only).
    """
    shapes: dict[str, tuple[int, ...]] = {"embed": (a.vocab, a.hidden)}
    for layer in range(a.layers):
        at = f"layers.{layer}."
        shapes[at + "attention_norm"] = (a.hidden,)
        shapes[at + "mlp_norm"] = (a.hidden,)
        if a.qk_norm:
            shapes[at + "q_norm"] = (a.head_dim,)
            shapes[at + "k_norm"] = (a.head_dim,)
        for role, shape in linear_shapes(a).items():
            shapes[at + role] = shape
            if has_bias(a, role):
                shapes[f"{at}{role}.bias"] = shape[:1]
    shapes["final_norm"] = (a.hidden,)
    if not a.tied:
        shapes["head"] = (a.vocab, a.hidden)
    return shapes


def weight_uses(a: Architecture, name: str) -> tuple[str, ...]:
    """The places that read a stored tensor: a tied embedding is also the head."""
    return ("embed", "head") if name == "embed" and a.tied else (name,)
