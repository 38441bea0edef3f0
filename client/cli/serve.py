"""`ebb serve`, `ebb stop`, `ebb status`: the daemon itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import click

from ...formats.errors import NotRunning
from ...formats.messages import Status
from ...formats.settings import HELP, flag
from ...formats.units import format_seconds, format_size
from ..launch import COMMAND
from .connect import connected
from .output import json_option, note, write_fields, write_json


def daemon_options(command: Callable[..., None]) -> Callable[..., None]:
    """What the daemon understands; it checks the values itself."""
    for name, (metavar, text) in reversed(HELP.items()):
        switch: dict[str, Any] = (
            {"metavar": metavar} if metavar else {"is_flag": True, "flag_value": "true", "default": None}
        )
        command = click.option(flag(name), help=text, **switch)(command)
    return command


def daemon_flags(options: Mapping[str, str | None]) -> list[str]:
    """The options that were given, as the daemon's command line wants them."""
    return [f"{flag(name)}={value}" for name, value in options.items() if value is not None]


@click.command()
@daemon_options
def serve(**options: str | None) -> None:
    """Run the daemon in the foreground until Ctrl-C (twice: at once) or `ebb stop`.

    Other commands start one in the background when they need it; `ebb service` has the system do it. What is not given
    here comes from EBBFLOW_IDLE_SECONDS and so on, then from config.toml (idle_seconds = 60), which is read again on
    SIGHUP by a daemon in the background.
    """
    os.execv(COMMAND[0], [*COMMAND, *daemon_flags(options)])


@click.command()
def stop() -> None:
    """Stop the daemon and its models."""
    with connected(start=False) as client:
        try:
            client.shutdown()
        except NotRunning:
            note("The daemon is not running.")
        else:
            note("The daemon has stopped.")


@click.command()
@json_option
def status(as_json: bool) -> None:
    """Show whether the daemon runs and what memory there is."""
    with connected(start=False) as client:
        answer = client.status()
    if as_json:
        write_json(answer)
    else:
        write_fields(_fields(answer))


def _fields(answer: Status) -> list[tuple[str, str]]:
    models = [f"{model.model} ({format_size(model.nbytes)})" for model in answer.models]
    return [
        ("version", answer.version),
        ("process", f"{answer.pid}, up {format_seconds(answer.uptime_seconds)}"),
        ("memory", memory(answer)),
        ("loaded", ", ".join(models) or "nothing"),
        ("adding", ", ".join(answer.adding) or "nothing"),
    ]


def memory(answer: Status) -> str:
    """What memory there is, who says so, and what is left alone."""
    available = f"{format_size(answer.available_nbytes)} available ({answer.available_source})"
    yielded = format_size(answer.yielded_nbytes)
    still = f" ({yielded} for another {format_seconds(answer.yield_seconds)})" if answer.yielded_nbytes else ""
    paused = "; paused" if answer.paused else ""
    return f"{available}, {format_size(answer.reserve_nbytes)} of it left to everything else{still}{paused}"
