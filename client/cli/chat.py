"""A conversation in the terminal: `ebb run NAME` without a prompt."""

from __future__ import annotations

import contextlib
import sys
from typing import Final

from ...formats.errors import EbbflowError
from ...formats.values import ChatMessage
from ..prompts import GenerateOptions
from .answer import Answer, speed
from .connect import connected
from .output import note

LEAVE: Final = ("/bye", "/exit", "/quit")


class Chat:
    """What was said so far, and with which options answers are sampled.

    A person at a terminal is told about errors and goes on; a script fails with the first one.
    """

    def __init__(self, model: str, options: GenerateOptions, verbose: bool = False) -> None:
        self._model = model
        self._options = options
        self._verbose = verbose
        self.history: list[ChatMessage] = []

    @property
    def interactive(self) -> bool:
        """Whether a person types."""
        return sys.stdin.isatty()

    def loop(self) -> None:
        """Read lines and answer them until Ctrl-D, the end of the input, or `/bye`."""
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives `input` its line editing
            self._check()
            note("Ctrl-C stops an answer; Ctrl-D or /bye leaves; /clear forgets what was said.")
        while (line := self._read()) is not None and line not in LEAVE:
            if line == "/clear":
                self.history.clear()
            elif line:
                self._answer_or_tell(line)

    def _check(self) -> None:
        """Know of a missing model before anything is typed. Raises `UnknownModel`."""
        with connected() as client:
            client.show(self._model)

    def _read(self) -> str | None:
        while True:
            try:
                return input(">>> " if self.interactive else "").strip()
            except EOFError:
                return None
            except KeyboardInterrupt:
                note("\nCtrl-D or /bye leaves.")

    def _answer_or_tell(self, line: str) -> None:
        try:
            self._answer(line)
        except EbbflowError as error:
            if not self.interactive:
                raise
            note(f"ebb: {error}")

    def _answer(self, line: str) -> None:
        """One turn; it becomes history as far as it came, unless it failed."""
        turn = ChatMessage("user", line)
        answer = Answer()
        finished = None
        try:
            with connected() as client, client.chat(self._model, [*self.history, turn], **self._options) as stream:
                finished = answer.write(stream)
        except KeyboardInterrupt:
            note("(stopped)")
        if answer.text or finished:
            self.history += [turn, ChatMessage("assistant", answer.text)]
        if self._verbose and finished:
            note(speed(finished))
