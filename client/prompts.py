"""Asks that have text in them: generations and pins. Text is a string, its token ids, or a conversation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypedDict, TypeVar

import msgspec

from ..formats.errors import InvalidRequest
from ..formats.messages import Finished, Generate, ListPins, Pin, Pinned, Pins, Unpin
from ..formats.paths import check_name
from ..formats.units import parse_seconds
from ..formats.values import ChatMessage, PinSummary, Sampling
from .asks import Ask, check_names, expect, nothing, text_of

T = TypeVar("T")

Turn = ChatMessage | Mapping[str, str]
Prompt = str | Sequence[int]
Text = Prompt | Sequence[Turn]


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen; see `Sampling` for meanings and defaults."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: str | Iterable[str]


class GenerateOptions(SamplingOptions, total=False):
    """Keyword arguments of `generate` and `chat`.

    `resume=True`: if the process that holds the model dies (killed, out of memory, hung), the answer goes on in the
    next one, without a word lost or repeated, up to three times. Otherwise it ends with `WorkerDied`.

    `priority` (-100 to 100, 0): of waiting requests the higher go first, and running ones of a lower give their places
    up. `deadline`, in seconds or as `20s`: what has not ended by then fails with `DeadlineExceeded`. Computed prefixes
    are shared within a `namespace` only; `exact_prefix=True` takes none that was computed at another size of the model.
    """

    resume: bool
    priority: int
    deadline: float | str
    namespace: str
    exact_prefix: bool


def generate(model: str, prompt: Prompt, options: GenerateOptions) -> Ask[str, Finished]:
    """Continue `prompt`, a string or token ids. Raises `InvalidRequest`."""
    return _generation(request(model, _prompt(prompt), options))


def chat(model: str, messages: Iterable[Turn], options: GenerateOptions) -> Ask[str, Finished]:
    """Answer a conversation. Raises `InvalidRequest`."""
    return _generation(request(model, {"chat": _turns(messages)}, options))


def pin(model: str, name: str, text: Text, save: bool, namespace: str) -> Ask[None, PinSummary]:
    """Keep what is computed of a prefix. Raises `InvalidName` or `InvalidRequest`."""
    fields = {"name": check_name(name, "pin"), "save": save, "namespace": namespace, **contents(text)}
    message = _convert({"type": "Pin", "id": 0, "model": model, **fields}, Pin)
    pinned = expect(Pinned)
    return Ask(lambda id_: msgspec.structs.replace(message, id=id_), nothing, lambda terminal: pinned(terminal).pin)


def unpin(model: str, name: str) -> Ask[None, tuple[PinSummary, ...]]:
    """Let a pinned prefix go."""
    left = expect(Pins)
    return Ask(lambda id_: Unpin(id=id_, model=model, name=name), nothing, lambda terminal: left(terminal).pins)


def pins(model: str) -> Ask[None, tuple[PinSummary, ...]]:
    """A model's pinned prefixes."""
    listed = expect(Pins)
    return Ask(lambda id_: ListPins(id=id_, model=model), nothing, lambda terminal: listed(terminal).pins)


def contents(text: Text) -> dict[str, Any]:
    """The field of a request that `text` belongs in, and its value. Raises `InvalidRequest`."""
    if isinstance(text, str):
        return {"prompt": text}
    if isinstance(text, Sequence) and text and not isinstance(text[0], int):
        return {"chat": _turns(text)}  # type: ignore[arg-type]
    return _prompt(text)  # type: ignore[arg-type]


def request(model: str, text: Mapping[str, Any], options: GenerateOptions) -> Generate:
    """The request for `text` (of `contents`), still without an id. Raises `InvalidRequest`."""
    check_names(options, GenerateOptions)
    others: dict[str, Any] = {name: options[name] for name in _OTHERS if name in options}
    deadline = options.get("deadline", 0.0)
    others["deadline_seconds"] = parse_seconds(deadline) if isinstance(deadline, str) else deadline
    message = _convert({"type": "Generate", "id": 0, "model": model, **text, **others}, Generate)
    if not 0 <= message.deadline_seconds < math.inf:
        raise InvalidRequest(f"a deadline is some seconds from now, not {deadline!r}")
    return msgspec.structs.replace(message, sampling=_sampling(options))


_OTHERS: Final = ("resume", "priority", "namespace", "exact_prefix")


def _generation(message: Generate) -> Ask[str, Finished]:
    return Ask(lambda id_: msgspec.structs.replace(message, id=id_), text_of, expect(Finished))


def _sampling(options: GenerateOptions) -> Sampling:
    """Checked sampling parameters. Raises `InvalidRequest`."""
    plain: dict[str, Any] = {name: options[name] for name in SamplingOptions.__annotations__ if name in options}  # type: ignore[literal-required]
    stop = plain.get("stop", ())
    try:
        sampling = msgspec.convert({**plain, "stop": (stop,) if isinstance(stop, str) else tuple(stop)}, Sampling)
    except (msgspec.ValidationError, TypeError) as error:
        raise InvalidRequest(f"sampling options: {error}") from error
    sampling.check()
    return sampling


def _prompt(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    try:
        ids = msgspec.convert(list(prompt), tuple[int, ...])
    except (msgspec.ValidationError, TypeError) as error:
        raise InvalidRequest(f"a prompt is a string or token ids: {error}") from error
    if not ids or min(ids) < 0:
        raise InvalidRequest("token ids are one or more numbers, none below 0")
    return {"ids": ids}


def _turns(messages: Iterable[Turn]) -> tuple[ChatMessage, ...]:
    try:
        return msgspec.convert(list(messages), tuple[ChatMessage, ...])
    except (msgspec.ValidationError, TypeError) as error:
        raise InvalidRequest(f"messages are role and content, both text: {error}") from error


def _convert(fields: dict[str, Any], kind: type[T]) -> T:
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"options: {error}") from error
