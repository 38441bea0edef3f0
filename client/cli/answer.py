"""Writing one answer to the terminal while it arrives."""

from __future__ import annotations

import contextlib
import sys

import click

from ...formats.messages import Finished
from ..stream import TextStream
from .output import console, note, write_text


class Answer:
    """One answer being written; `text` is what came so far, also after it was cut short."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, stream: TextStream) -> Finished | None:
        """Write the pieces as they come, and end the line whatever happens. Raises like iterating `stream`."""
        stream.on_progress(lambda progress: note(f"{progress.stage} ..."))
        try:
            with _patience():
                first = next(stream, "")
            self._write(first)
            for piece in stream:
                self._write(piece)
        finally:
            if self.text and not self.text.endswith("\n"):
                click.echo()
        return stream.result

    def _write(self, piece: str) -> None:
        self.text += piece
        write_text(piece)


def _patience() -> contextlib.AbstractContextManager[object]:
    """A sign of life until the first token: the model may have to be loaded."""
    if sys.stderr.isatty() and sys.stdout.isatty():
        return console(stderr=True).status("")
    return contextlib.nullcontext()


def speed(finished: Finished) -> str:
    """How fast an answer was."""
    decode = finished.seconds - finished.seconds_to_first
    rate = f", {(finished.tokens - 1) / decode:.1f} tokens/s" if finished.tokens > 1 and decode > 0 else ""
    reused = f" ({finished.reused_tokens} of them computed before)" if finished.reused_tokens else ""
    return (
        f"{finished.prompt_tokens} tokens read{reused}, {finished.tokens} written ({finished.reason}), "
        f"{finished.seconds_to_first:.2f} s to the first{rate}"
    )
