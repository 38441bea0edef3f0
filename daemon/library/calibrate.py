"""Calibration: tokens to judge a model by, and what its linears see and feel on them.

Works offline: the model writes its own calibration text (`sample_tokens`), or a file is encoded. Moments are collected
with one layer's weights in memory at a time: a forward pass and a backward pass over a subset for the gradients, then a
forward pass over everything for the inputs. What is done with them is the encoders' and `order`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, get_args

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from ...formats.architecture import Architecture, Role, linear_shapes
from ...formats.checkpoint import Checkpoint
from ...formats.errors import CorruptCheckpoint, InvalidRequest
from ..engine.dense import DenseAttention, DenseLinear, DenseOps, KVCache, dense_layer, mapped_network
from ..engine.network import Layer, Linear, layer_forward
from ..engine.tokenizer import load_tokenizer

Progress = Callable[[str, int, int], None]  # what, done, total

_InputMoments = tuple[Tensor, Tensor]

MAX_TOKENS: Final = 32_768
MIN_FILE_TOKENS: Final = 1024
MAX_FILE_CHARACTERS: Final = 4_000_000
GRADIENT_TOKENS: Final = 4096
# The first tokens of each stream are drawn hotter: streams that begin alike would tell the same story 64 times.
HOT_TOKENS: Final = 4
HOT_TEMPERATURE: Final = 1.5
# Rows worked on at once, and numbers in one block of logits: bounds on the memory of activations.
CHUNK_TOKENS: Final = 2048
CHUNK_LOGITS: Final = 8_000_000
SCALE_FLOOR: Final = 1e-3  # BitStack, arXiv 2410.23918
# Linears that read the same activations share one second moment, kept under the first one's role.
_READS: Final[dict[Role, Role]] = {
    "q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down",
}  # fmt: skip


@dataclass(frozen=True)
class LinearMoments:
    """What one linear `[m, n]` sees and how much its output matters.

    `inputs [n, n]` is `H = E[x xᵀ]` over tokens (one tensor object for linears that read the same activations);
    `scale [n]` is the mean over streams of each channel's l2 norm, + 1e-3 (BitStack); `gradient [m]` is
    `G_r = E[g_r²]`, g the gradient of the log-probability of tokens drawn from the model at the linear's output.
    So `½ Σ_r G_r (E H Eᵀ)_rr` estimates the KL per token, in nats, of adding an error E to the weights.
    """

    inputs: Tensor
    scale: Tensor
    gradient: Tensor


def no_progress(what: str, done: int, total: int) -> None:
    """A `Progress` that tells nobody."""


@torch.no_grad()
def sample_tokens(
    checkpoint: Checkpoint, *, streams: int = 64, length: int = 256, seed: int = 0, progress: Progress = no_progress
) -> Tensor:
    """Token ids `[streams, length]` that the model writes itself, at temperature 1; the same for the same seed.

    Streams begin with bos, or a random token where there is none, and contain no other bos or eos. `length` is cut to
    the model's context, `streams` to `MAX_TOKENS` in all. Holds the KV cache, in bf16; weights stay in the
    checkpoint's pages. Raises `CorruptCheckpoint` when the model's logits are not finite.
    """
    a = checkpoint.architecture
    length = min(length, a.context, MAX_TOKENS)
    streams = min(streams, MAX_TOKENS // length)
    generator = torch.Generator().manual_seed(seed)
    network = mapped_network(a, checkpoint.tensor, checkpoint.mapped)
    cache = KVCache(a, streams, length, dtype=torch.bfloat16)
    tokens = torch.empty((streams, length), dtype=torch.int64)
    tokens[:, 0] = _first_tokens(checkpoint, streams, generator)
    special = [token for token in {checkpoint.bos, *checkpoint.eos} if token is not None]
    for position in range(1, length):
        logits = network.head(network.forward(tokens[:, position - 1], cache.step(1)))
        _check_finite(logits, "logits")
        logits[:, special] = -torch.inf
        temperature = HOT_TEMPERATURE if position <= HOT_TOKENS else 1.0
        tokens[:, position] = _draw(logits / temperature, generator)
        progress("sample", position + 1, length)
    return tokens


def encode_calibration(folder: Path, path: Path, length: int = 256, *, streams: int = 64, bos: int | None) -> Tensor:
    """The text file `path`, encoded with the tokenizer in `folder`: token ids `[at most streams, length]`.

    Streams lie evenly over the file's first 4 million characters, each with `bos` (unless None) in front.
    Raises `InvalidRequest` when the file cannot be read as UTF-8 text or gives too few tokens, `CorruptFile` when the
    tokenizer cannot be read.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_FILE_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"calibration file {path} cannot be read as UTF-8 text: {error}") from error
    ids = load_tokenizer(folder).encode(text, add_special_tokens=False).ids
    prefix = [] if bos is None else [bos]
    fresh = length - len(prefix)
    least = max(MIN_FILE_TOKENS, fresh)
    if len(ids) < least:
        raise InvalidRequest(f"calibration file {path} gives {len(ids)} tokens; at least {least} are wanted")
    count = max(1, min(streams, MAX_TOKENS // length, len(ids) // fresh))
    starts = [(len(ids) - fresh) * i // max(1, count - 1) for i in range(count)]
    return torch.tensor([prefix + ids[start : start + fresh] for start in starts])


def layer_moments(
    checkpoint: Checkpoint,
    tokens: Tensor,
    progress: Progress = no_progress,
    *,
    seed: int = 0,
    vocabulary: bool = False,
    gradients: Gradients | None = None,
    first: int = 0,
) -> Iterator[tuple[int, dict[str, LinearMoments]]]:
    """Every layer's moments on `tokens [S, L]`, by stored name (`layers.0.q`), layer by layer from `first` on.

    `gradients` are those of `output_gradients`, which is called when they are not given. Holds one layer's weights and
    moments (or the head's weights), and the hidden states of all tokens. Raises `CorruptCheckpoint` when activations
    overflow. With `vocabulary`, what `vocabulary_moments` gives comes last, as if it were one layer more.
    """
    a = checkpoint.architecture
    if gradients is None:
        gradients = output_gradients(checkpoint, tokens, seed, progress)
    hidden = _embed(checkpoint, tokens)
    for index in range(min(first, a.layers)):
        hidden = _forward(a, dense_layer(a, index, checkpoint.tensor), index, hidden)
        progress("moments", index + 1, a.layers)
    for index in range(first, a.layers):
        hidden, found = _layer_inputs(checkpoint, index, hidden)
        progress("moments", index + 1, a.layers)
        yield (
            index,
            {
                f"layers.{index}.{role}": LinearMoments(*found[_READS[role]], gradients.layers[index][role])
                for role in _READS
            },
        )
        del found  # before the next layer's moments are made
    if vocabulary:
        yield a.layers, vocabulary_moments(checkpoint, hidden, gradients)


@dataclass(frozen=True)
class Gradients:
    """Second moments of the gradient of log-probability: `layers` has `G [m]` of every linear, by layer; `embedding
    [d, d]` is that at the embedding's output, `logits` that at a logit, in the mean over the vocabulary.
    """

    layers: list[dict[Role, Tensor]]
    embedding: Tensor
    logits: float

    def to_bytes(self) -> bytes:
        """All of it, exactly."""
        layers = [{str(role): total.numpy().tobytes() for role, total in layer.items()} for layer in self.layers]
        return msgspec.msgpack.encode(_StoredGradients(layers, self.embedding.numpy().tobytes(), self.logits))

    @classmethod
    def from_bytes(cls, data: bytes) -> Gradients:
        """The inverse, on the same machine."""
        stored = msgspec.msgpack.decode(data, type=_StoredGradients)
        layers = [{role: _numbers(layer[role]) for role in get_args(Role)} for layer in stored.layers]
        embedding = _numbers(stored.embedding)
        return cls(layers, embedding.view(math.isqrt(len(embedding)), -1), stored.logits)


class _StoredGradients(msgspec.Struct):
    layers: list[dict[str, bytes]]
    embedding: bytes
    logits: float


def _numbers(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32)


@torch.no_grad()
def vocabulary_moments(checkpoint: Checkpoint, hidden: Tensor, gradients: Gradients) -> dict[str, LinearMoments]:
    """Moments of the embedding and the head, `[v, d]`, from the last layer's output `hidden [S, L, d]`.

    The head is a linear like others. A row of the embedding is read for one token in v, so an error E of it costs
    `E Gamma E^T / 2v`, Gamma the gradient's second moment there. A tied embedding costs both. All rows count alike.
    """
    a = checkpoint.architecture
    x = DenseOps().rms_norm(hidden.flatten(0, 1), checkpoint.tensor("final_norm"), a.norm_eps)
    _check_finite(x, "final activations")
    head, embed = gradients.logits * (x.T @ x) / len(x), gradients.embedding / a.vocab
    parts = {"embed": head + embed} if a.tied else {"embed": embed, "head": head}
    ones = torch.ones(a.vocab)
    return {name: LinearMoments(h, h.diagonal().clamp_min(0).sqrt() + SCALE_FLOOR, ones) for name, h in parts.items()}


def _subset(tokens: Tensor) -> Tensor:
    count = max(1, GRADIENT_TOKENS // tokens.shape[1])
    return tokens[:: -(-len(tokens) // count), :GRADIENT_TOKENS]


def _layer_inputs(checkpoint: Checkpoint, index: int, hidden: Tensor) -> tuple[Tensor, dict[Role, _InputMoments]]:
    """`hidden [S, L, d]` after the layer, and `(H, scale)` of its linears' inputs. Forgets the weights on return."""
    a = checkpoint.architecture
    streams, length, _ = hidden.shape
    shapes = linear_shapes(a)
    sums = {role: _InputSums(shapes[role][1]) for role in set(_READS.values())}
    layer = _watched(dense_layer(a, index, checkpoint.tensor), partial(_sum_inputs, sums, length))
    return _forward(a, layer, index, hidden), {
        role: total.means(streams * length, streams) for role, total in sums.items()
    }


class _InputSums:
    """Sums over the inputs of the linears that read the same activations."""

    def __init__(self, n: int) -> None:
        self.outer = torch.zeros(n, n)
        self.norms = torch.zeros(n)

    def means(self, tokens: int, streams: int) -> _InputMoments:
        """`(H, scale)`; call once."""
        return self.outer.div_(tokens), self.norms.div_(streams).add_(SCALE_FLOOR)


def _sum_inputs(sums: dict[Role, _InputSums], length: int, role: Role, x: Tensor, y: Tensor) -> None:
    if role in sums:
        sums[role].outer.addmm_(x.T, x)
        sums[role].norms += x.unflatten(0, (-1, length)).norm(dim=1).sum(0)


@dataclass(frozen=True)
class _Watched:
    """A linear whose inputs and outputs somebody looks at."""

    linear: Linear[Tensor]
    watch: Callable[[Tensor, Tensor], None]

    def __call__(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.watch(x, y)
        return y


def _watched(layer: Layer[Tensor], watch: Callable[[Role, Tensor, Tensor], None]) -> Layer[Tensor]:
    linears = {role: _Watched(getattr(layer, role), partial(watch, role)) for role in get_args(Role)}
    return replace(layer, **linears)  # type: ignore[arg-type]


@torch.no_grad()
def _forward(a: Architecture, layer: Layer[Tensor], index: int, hidden: Tensor) -> Tensor:
    """`hidden [S, L, d]` through one layer, some streams at a time."""
    outputs = [_run(a, layer, index, part) for part in _parts(hidden)]
    result = torch.cat(outputs)
    _check_finite(result, f"activations after layer {index}")
    return result


def _run(a: Architecture, layer: Layer[Tensor], index: int, x: Tensor) -> Tensor:
    """One layer on whole streams: `x [S, L, d] -> [S, L, d]`."""
    attention = DenseAttention(a, x.shape[0], x.shape[1])
    return layer_forward(a, DenseOps(), layer, index, x.flatten(0, 1), attention).view_as(x)


def _parts(hidden: Tensor) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = hidden.split(max(1, CHUNK_TOKENS // hidden.shape[1]))
    return parts


def output_gradients(checkpoint: Checkpoint, tokens: Tensor, seed: int, progress: Progress) -> Gradients:
    """All second moments: each layer's input is kept on the way up, the layer run again on the way down.

    `tokens [S, L]`, of which evenly chosen streams are used, at most `GRADIENT_TOKENS` tokens. Targets are drawn from
    the model's own distribution at every position, so that this is the true Fisher information on any tokens, sampled
    or not. Raises `CorruptCheckpoint` when activations overflow.
    """
    a = checkpoint.architecture
    inputs = [_embed(checkpoint, _subset(tokens))]
    for index in range(a.layers):
        inputs.append(_forward(a, dense_layer(a, index, checkpoint.tensor), index, inputs[-1]))
        progress("gradients", index + 1, 2 * a.layers)
    gradient, logits = _head_gradient(checkpoint, inputs.pop(), torch.Generator().manual_seed(seed))
    found: list[dict[Role, Tensor]] = []
    for index in reversed(range(a.layers)):
        gradient, squares = _layer_gradients(checkpoint, index, inputs.pop(), gradient)
        found.append(squares)
        progress("gradients", 2 * a.layers - index, 2 * a.layers)
    rows = gradient.flatten(0, 1)
    return Gradients(found[::-1], rows.T @ rows / len(rows), logits)


def _layer_gradients(
    checkpoint: Checkpoint, index: int, hidden: Tensor, gradient: Tensor
) -> tuple[Tensor, dict[Role, Tensor]]:
    """The gradient at the layer's input, given that at its output, and `G` of its linears."""
    a = checkpoint.architecture
    squares: dict[Role, Tensor] = {role: torch.zeros(shape[0]) for role, shape in linear_shapes(a).items()}
    layer = _watched(dense_layer(a, index, checkpoint.tensor), partial(_square_gradients, squares))
    gradient = _backward(a, layer, index, hidden, gradient)
    streams, length, _ = hidden.shape
    return gradient, {role: total / (streams * length) for role, total in squares.items()}


def _square_gradients(squares: dict[Role, Tensor], role: Role, x: Tensor, y: Tensor) -> None:
    def add(gradient: Tensor) -> None:
        squares[role] += gradient.square().sum(0)

    y.register_hook(add)


def _backward(a: Architecture, layer: Layer[Tensor], index: int, hidden: Tensor, gradient: Tensor) -> Tensor:
    """The gradient at a layer's output -> at its input `hidden`, both `[S, L, d]`."""
    results = []
    for x, upper in zip(_parts(hidden), _parts(gradient), strict=True):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = _run(a, layer, index, x)
        results.append(torch.autograd.grad(y, x, upper)[0])
    return torch.cat(results)


def _head_gradient(checkpoint: Checkpoint, hidden: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """Gradient at the last layer's output `[S, L, d]` of the log-probability of tokens drawn at every position; and its
    second moment at a logit, whose expectation is `p (1 - p)`, in the mean over tokens and vocabulary.
    """
    a = checkpoint.architecture
    norm, head = checkpoint.tensor("final_norm"), DenseLinear(checkpoint.tensor("embed" if a.tied else "head"))
    results, squares = [], 0.0
    for rows in hidden.flatten(0, 1).split(max(1, CHUNK_LOGITS // a.vocab)):
        x = rows.detach().requires_grad_()
        with torch.enable_grad():
            logits = head(DenseOps().rms_norm(x, norm, a.norm_eps))
            targets = _draw(logits.detach(), generator)
            squares += float((1 - logits.detach().softmax(-1).square().sum(1)).sum())
            loss = functional.cross_entropy(logits, targets, reduction="sum")
        results.append(-torch.autograd.grad(loss, x)[0])
    return torch.cat(results).view_as(hidden), squares / (hidden.shape[0] * hidden.shape[1] * a.vocab)


def _embed(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    return functional.embedding(tokens, checkpoint.tensor("embed"))


def _first_tokens(checkpoint: Checkpoint, streams: int, generator: torch.Generator) -> Tensor:
    if checkpoint.bos is not None:
        return torch.full((streams,), checkpoint.bos)
    return torch.randint(checkpoint.architecture.vocab, (streams,), generator=generator)


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token id a row of `logits [T, v]`."""
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _check_finite(x: Tensor, what: str) -> None:
    if not bool(torch.isfinite(x).all()):
        raise CorruptCheckpoint(f"the model's {what} are not finite: its weights cannot be right")
