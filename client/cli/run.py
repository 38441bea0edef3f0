"""`ebb run`: ask a model something, once or in a conversation (`chat`)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Final

import click

from ..prompts import GenerateOptions
from .answer import Answer, speed
from .chat import Chat
from .connect import connected
from .output import note

_SAMPLING: Final = (
    click.option("--max-tokens", type=int, metavar="N", help="Stop after N tokens (256)."),
    click.option("--temperature", type=float, metavar="T", help="0, the default, always takes the likeliest token."),
    click.option("--top-k", type=int, metavar="K", help="Sample among the K likeliest tokens (0: all)."),
    click.option("--top-p", type=float, metavar="P", help="Sample among the likeliest tokens that make up P (1: all)."),
    click.option("--seed", type=int, metavar="N", help="Seed of the sampler."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times."),
)


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of `SamplingOptions`, to be given on as they are by `given`."""
    for option in reversed(_SAMPLING):
        command = option(command)
    return command


def given(options: Mapping[str, object]) -> GenerateOptions:
    """Those options that were given."""
    return {name: value for name, value in options.items() if value not in (None, ())}  # type: ignore[return-value]


@click.command()
@click.argument("name")
@click.argument("prompt", required=False)
@sampling_options
@click.option("--resume/--no-resume", default=True, help="Go on with the answer if the worker dies (the default).")
@click.option("--verbose", "-v", is_flag=True, help="Say how long it took, on stderr.")
def run(name: str, prompt: str | None, verbose: bool, resume: bool, **sampling: object) -> None:
    """Ask the model NAME; the answer streams to stdout.

    PROMPT is continued as it is; `-` reads it from stdin. Without one this is a conversation: Ctrl-C stops an answer,
    Ctrl-D or /bye leaves, /clear forgets what was said.
    """
    options = given({**sampling, "resume": resume})
    if prompt is None:
        Chat(name, options, verbose).loop()
        return
    text = sys.stdin.read() if prompt == "-" else prompt
    with connected() as client, client.generate(name, text, **options) as stream:
        finished = Answer().write(stream)
    if verbose and finished:
        note(speed(finished))
