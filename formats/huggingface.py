"""A Hugging Face configuration as an `Architecture`, or a typed refusal that names what was found.

Covers `config.json` and `generation_config.json`. Weights are `checkpoint`'s business, which also maps their names.
Both spellings of rotary settings are read: `rope_theta` with `rope_scaling`, and `rope_parameters` (transformers 5).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, TypeVar

import msgspec

from .architecture import Architecture, RotaryScaling
from .errors import CorruptCheckpoint, UnsupportedModel

CONFIG: Final = "config.json"
GENERATION_CONFIG: Final = "generation_config.json"
FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")
SUPPORTED: Final = (
    "this version runs Llama 2 and 3, TinyLlama and SmolLM (llama), Mistral (mistral), Qwen2 and Qwen2.5 (qwen2) and "
    "Qwen3 (qwen3), unquantized, with silu and plain, linear or llama3 rotary embedding"
)

S = TypeVar("S", bound=msgspec.Struct)

_Count = Annotated[int, msgspec.Meta(gt=0, le=2**24)]
_Layers = Annotated[int, msgspec.Meta(gt=0, le=10_000)]
_Positive = Annotated[float, msgspec.Meta(gt=0)]
_TokenId = Annotated[int, msgspec.Meta(ge=0)]


class _Family(msgspec.Struct):
    model_type: str = ""
    quantization_config: Any = None


class _Rope(msgspec.Struct):
    rope_type: str | None = None
    type: str | None = None
    rope_theta: _Positive | None = None
    factor: _Positive | None = None
    low_freq_factor: _Positive = 1.0
    high_freq_factor: _Positive = 4.0
    original_max_position_embeddings: _Count | None = None
    partial_rotary_factor: float | None = None


class _Config(msgspec.Struct):
    vocab_size: _Count
    hidden_size: _Count
    intermediate_size: _Count
    num_hidden_layers: _Layers
    num_attention_heads: _Count
    max_position_embeddings: _Count
    num_key_value_heads: _Count | None = None
    head_dim: _Count | None = None
    hidden_act: str = "silu"
    rms_norm_eps: _Positive = 1e-6
    rope_theta: _Positive | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    partial_rotary_factor: float | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    sliding_window: _Count | None = 4096
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: list[str] | None = None


class _Tokens(msgspec.Struct):
    bos_token_id: _TokenId | None = None
    eos_token_id: _TokenId | list[_TokenId] | None = None


def read_architecture(folder: Path) -> Architecture:
    """What `config.json` in `folder` describes. Raises `UnsupportedModel` or `CorruptCheckpoint`."""
    text = _read(folder / CONFIG)
    family = _decode(text, _Family, CONFIG)
    if family.model_type not in FAMILIES:
        _refuse(f"model_type {family.model_type!r}")
    if family.quantization_config is not None:
        _refuse("a quantized checkpoint (quantization_config)")
    config = _decode(text, _Config, CONFIG)
    if config.hidden_act != "silu":
        _refuse(f"activation {config.hidden_act!r}")
    return _architecture(family.model_type, config)


def read_special_tokens(folder: Path) -> tuple[int | None, tuple[int, ...]]:
    """`(bos, eos)` of the checkpoint in `folder`; `generation_config.json` wins over `config.json`.

    Raises `CorruptCheckpoint`.
    """
    found = [_decode(_read(folder / CONFIG), _Tokens, CONFIG)]
    if (folder / GENERATION_CONFIG).exists():
        found.insert(0, _decode(_read(folder / GENERATION_CONFIG), _Tokens, GENERATION_CONFIG))
    bos = next((tokens.bos_token_id for tokens in found if tokens.bos_token_id is not None), None)
    eos: int | list[int] = next((tokens.eos_token_id for tokens in found if tokens.eos_token_id is not None), [])
    return bos, (eos,) if isinstance(eos, int) else tuple(eos)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorruptCheckpoint(
            f"{path} cannot be read ({error.strerror}); a Hugging Face model folder is wanted"
        ) from error


def _decode(text: bytes, of: type[S], name: str) -> S:
    try:
        return msgspec.json.decode(text, type=of)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{name} is not a model's configuration: {error}") from error


def _refuse(found: str) -> NoReturn:
    raise UnsupportedModel(f"the checkpoint has {found}; {SUPPORTED}")


def _architecture(family: str, c: _Config) -> Architecture:
    heads = c.num_attention_heads
    kv_heads = c.num_key_value_heads or heads
    head_dim = c.head_dim or (128 if family == "qwen3" else c.hidden_size // heads)
    if heads % kv_heads:
        raise CorruptCheckpoint(f"{heads} heads cannot share {kv_heads} key/value heads evenly")
    if head_dim < 2 or head_dim % 2:
        _refuse(f"heads of width {head_dim}, where rotary embedding wants an even one")
    theta, scaling = _rotary(c)
    qkv_bias, output_bias, mlp_bias = _biases(family, c)
    return Architecture(
        family=family,
        vocab=c.vocab_size,
        hidden=c.hidden_size,
        layers=c.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=c.intermediate_size,
        context=c.max_position_embeddings,
        norm_eps=c.rms_norm_eps,
        rotary_theta=theta,
        rotary_scaling=scaling,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=family == "qwen3",
        window=_window(family, c),
        tied=c.tie_word_embeddings,
    )


def _biases(family: str, c: _Config) -> tuple[bool, bool, bool]:
    """Of q, k and v; of o; of the feed-forward."""
    match family:
        case "llama":
            return c.attention_bias, c.attention_bias, c.mlp_bias
        case "qwen3":
            return c.attention_bias, c.attention_bias, False
        case _:
            return family == "qwen2", False, False


def _window(family: str, c: _Config) -> int | None:
    if family == "llama" or c.sliding_window is None or (family != "mistral" and not c.use_sliding_window):
        return None
    sliding = c.num_hidden_layers if family == "mistral" else _sliding_layers(c)
    if 0 < sliding < c.num_hidden_layers:
        _refuse(f"a sliding window in {sliding} of its {c.num_hidden_layers} layers, where all or none is wanted")
    return c.sliding_window if sliding and c.sliding_window < c.max_position_embeddings else None


def _sliding_layers(c: _Config) -> int:
    if c.layer_types is not None:
        return c.layer_types.count("sliding_attention")
    return max(0, c.num_hidden_layers - max(0, c.max_window_layers))


def _rotary(c: _Config) -> tuple[float, RotaryScaling | None]:
    rope = c.rope_parameters or c.rope_scaling or _Rope(rope_type="default")
    theta = rope.rope_theta or c.rope_theta or 10_000.0
    kind = rope.rope_type or rope.type or ("default" if rope.rope_theta else None)
    if any(partial not in (None, 1.0) for partial in (rope.partial_rotary_factor, c.partial_rotary_factor)):
        _refuse("a rotary embedding of only part of each head (partial_rotary_factor)")
    if kind == "default":
        return theta, None
    if kind != "linear" and kind != "llama3":
        _refuse(f"rotary scaling {kind!r}" if kind else "rotary settings without a type, or one for each kind of layer")
    if rope.factor is None:
        raise CorruptCheckpoint(f"rotary scaling {kind!r} without a factor")
    if kind == "linear":
        return theta, RotaryScaling(kind="linear", factor=rope.factor)
    if rope.high_freq_factor <= rope.low_freq_factor:
        raise CorruptCheckpoint("rotary scaling 'llama3' whose high_freq_factor is not above its low_freq_factor")
    return theta, RotaryScaling(
        kind="llama3",
        factor=rope.factor,
        low_freq_factor=rope.low_freq_factor,
        high_freq_factor=rope.high_freq_factor,
        original_context=rope.original_max_position_embeddings or c.max_position_embeddings,
    )
