"""`ebb serve`, `ebb stop`, `ebb status`: the daemon itself."""

from __future__ import annotations

import os

import click

from ...formats.errors import NotRunning
from ...formats.messages import Status
from ...formats.units import format_seconds, format_size
from ..launch import COMMAND
from .connect import connected
from .output import json_option, note, write_fields, write_json


@click.command()
@click.option("--idle-seconds", metavar="N", help="Stop the worker after N seconds without a request.")
@click.option("--reserve", metavar="SIZE", help="Memory to leave to everything else, for example 1GB.")
@click.option("--battery-reserve", metavar="SIZE", help="Memory to leave free beyond that while on battery.")
@click.option("--cap", metavar="SIZE", help="The most memory to use, whatever there is.")
@click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")
def serve(**options: str | None) -> None:
    """Run the daemon in the foreground until Ctrl-C or `ebb stop`.

    Other commands start one in the background when they need it.
    """
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    os.execv(COMMAND[0], [*COMMAND, *flags])


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
