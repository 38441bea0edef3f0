"""Text to tokens and back: a model's own tokenizer file, its chat template, and streams of text that never tear a
character or leak a stop string.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import tokenizers

from ...formats.errors import CorruptFile, InvalidRequest
from ...formats.units import format_size
from ...formats.values import ChatMessage
from ...formats.wire import MAX_MESSAGE
from .bounds import TookTooLong, bounded
from .template import template_environment

_CONTEXT: Final = 8
_SPECIAL: Final = ("bos_token", "eos_token", "unk_token", "pad_token")
TEMPLATE_SECONDS: Final = 0.5  # of processor time, in which nobody else is answered
TEMPLATE_NBYTES: Final = 64_000_000
TEMPLATE_LETTERS: Final = 2 * MAX_MESSAGE
_REPLACEMENT: Final = "\ufffd"  # what a character that is not complete decodes to


def load_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """`tokenizer.json` of `folder`, without the truncation and padding that training may have left in it.

    Raises `CorruptFile`.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise CorruptFile(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class Tokenizer:
    """The tokenizer of the model in `folder`. Raises `CorruptFile` when its files cannot be read."""

    def __init__(self, folder: Path, bos: int | None) -> None:
        self._tokenizer = load_tokenizer(folder)
        self._config = _read_config(folder)
        self._bos = bos
        self._template = _read_template(folder, self._config)

    def encode(self, text: str) -> list[int]:
        """A prompt's tokens, with the beginning-of-text token first if the model has one."""
        tokens = list(self._tokenizer.encode(text).ids)
        if self._bos is not None and self._config.get("add_bos_token") and tokens[:1] != [self._bos]:
            tokens.insert(0, self._bos)
        return tokens

    def render_chat(self, chat: Sequence[ChatMessage]) -> list[int]:
        """A conversation's tokens by the model's own template; without one, its turns as plain lines.

        Raises `InvalidRequest` when the template refuses the conversation, or takes too long or too much memory for it.
        """
        if self._template is None:
            return self.encode("\n".join(message.content for message in chat))
        turns = [{"role": message.role, "content": message.content} for message in chat]
        special = {name: _token_text(self._config.get(name)) for name in _SPECIAL}
        try:
            with bounded(TEMPLATE_SECONDS, TEMPLATE_NBYTES):
                text = (
                    template_environment()
                    .from_string(self._template)
                    .render(messages=turns, add_generation_prompt=True, tools=None, documents=None, **special)
                )
        except (TookTooLong, MemoryError) as error:
            limits = f"{TEMPLATE_SECONDS:g} s and {format_size(TEMPLATE_NBYTES)}"
            raise InvalidRequest(f"the model's chat template takes more than {limits} for this conversation") from error
        except Exception as error:  # the template is a program that came with the model: it may raise anything
            raise InvalidRequest(f"the model's chat template refuses this conversation: {error}") from error
        if len(text) > TEMPLATE_LETTERS:
            raise InvalidRequest(f"the model's chat template makes {len(text)} letters of this conversation")
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def stream(self, stops: Sequence[str], after: Sequence[int] = ()) -> TextStream:
        """A new stream of generated text, which continues the tokens `after`."""
        return TextStream(self._tokenizer, stops, after)


class TextStream:
    """Generated tokens in, text out.

    Text is held back while it could still become a stop string; when one is complete, `stopped` is set and the text
    before it is the last. The library's own stream is not used: where bytes are tokens of their own (Llama 2, Mistral)
    it raises at the first torn character.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, stops: Sequence[str], after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        # the last tokens that gave text: a decoder looks at neighbours, and removes the space before a first word
        self._known = self._whole(after[-_CONTEXT:])
        self._open: list[int] = []  # tokens after them that have given none yet
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token makes certain; often none."""
        self._open.append(token)
        piece = self._decode_open()
        if not piece or piece.endswith(_REPLACEMENT):
            return ""
        self._known, self._open = self._open, []
        return self._release(self._held + piece)

    def finish(self) -> str:
        """What was held back, and any character the last tokens left unfinished (as the replacement character)."""
        if self.stopped:
            return ""
        text = self._release(self._held + self._decode_open())
        rest, self._held, self._open = self._held, "", []
        return text if self.stopped else text + rest

    def _whole(self, tokens: Sequence[int]) -> list[int]:
        """The tokens from the first that begins a character: a torn one would spoil all bytes after it."""
        starts = (list(tokens[at:]) for at in range(len(tokens)))
        decoded = ((rest, self._tokenizer.decode(rest, skip_special_tokens=True)) for rest in starts)
        return next((rest for rest, text in decoded if not text.startswith(_REPLACEMENT)), [])

    def _decode_open(self) -> str:
        before = self._tokenizer.decode(self._known, skip_special_tokens=True)
        return str(self._tokenizer.decode(self._known + self._open, skip_special_tokens=True)[len(before) :])

    def _release(self, text: str) -> str:
        found = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.stopped, self._held = True, ""
            return text[:found]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptFile(f"{path} cannot be read: {error}") from error
    return config if isinstance(config, dict) else {}


def _read_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    try:
        if path.exists():
            return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CorruptFile(f"{path} cannot be read: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        entries = (entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default")
        template = next(entries, {}).get("template")
    return template if isinstance(template, str) else None


def _token_text(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")
