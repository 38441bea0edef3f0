"""Shapes of real models by name, for `synthetic` models and benchmarks."""

from __future__ import annotations

from typing import Final

from ...formats.architecture import Architecture, RotaryScaling
from ...formats.errors import InvalidRequest

SHAPES: Final[dict[str, Architecture]] = {
    "tiny": Architecture(
        family="llama",
        vocab=512,
        hidden=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate=172,
        context=512,
        norm_eps=1e-5,
        rotary_theta=10000.0,
    ),
    "smollm-135m": Architecture(
        family="llama",
        vocab=49152,
        hidden=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        intermediate=1536,
        context=2048,
        norm_eps=1e-5,
        rotary_theta=10000.0,
        tied=True,
    ),
    "tinyllama-1.1b": Architecture(
        family="llama",
        vocab=32000,
        hidden=2048,
        layers=22,
        heads=32,
        kv_heads=4,
        head_dim=64,
        intermediate=5632,
        context=2048,
        norm_eps=1e-5,
        rotary_theta=10000.0,
    ),
    "llama-3.2-1b": Architecture(
        family="llama",
        vocab=128256,
        hidden=2048,
        layers=16,
        heads=32,
        kv_heads=8,
        head_dim=64,
        intermediate=8192,
        context=131072,
        norm_eps=1e-5,
        rotary_theta=500000.0,
        rotary_scaling=RotaryScaling("llama3", factor=32.0),
        tied=True,
    ),
}


def find_shape(name: str) -> Architecture:
    """The shape of that name. Raises `InvalidRequest`."""
    if name not in SHAPES:
        raise InvalidRequest(f"no shape is named {name!r}; there are {', '.join(SHAPES)}")
    return SHAPES[name]
