"""`ebb serve`, `ebb stop`, `ebb status`: the daemon itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Final

import click

from ...formats.errors import NotRunning
from ...formats.messages import Status
from ...formats.units import format_seconds, format_size
from ..launch import COMMAND
from .connect import connected
from .output import json_option, note, write_fields, write_json

_OPTIONS: Final = (
    ("--idle-seconds", "N", "Stop the worker after N seconds without a request (300)."),
    ("--reserve", "SIZE", "Memory to leave to everything else, for example 1GB (5% of it, 256MB to 1GB)."),
    ("--battery-reserve", "SIZE", "Memory to leave free beyond that while on battery (as much again)."),
    ("--cap", "SIZE", "The most memory to use, whatever there is."),
    ("--log-level", "LEVEL", "debug, info, warning or error (info)."),
    ("--log-format", "FORMAT", "text or json (text)."),
    ("--log-file", "FILE", "Write the log there, and rotate it, instead of to stderr."),
    ("--drain-seconds", "N", "When told to end, let running requests finish for N seconds (10)."),
    ("--listen", "ADDRESS", "Serve tcp://HOST:PORT too; beyond loopback only to the keys of `ebb keys`."),
    ("--kv", "TYPE", "How keys and values of contexts are kept: f16, or i8 in half the memory (f16)."),
    ("--kv-limit", "SIZE", "Most bytes of keys and values for one model (2GB, or an eighth of memory if less)."),
    ("--kv-cached", "SIZE", "How much of that may belong to no running request (256MB)."),
    ("--threads", "N", "Threads that compute (as many as there are free cores)."),
)


def daemon_options(command: Callable[..., None]) -> Callable[..., None]:
    """What the daemon understands; it checks the values itself."""
    exact = "Never round activations to bytes: slow, a yardstick for comparisons."
    command = click.option("--exact", is_flag=True, flag_value="true", default=None, help=exact)(command)
    for flag, metavar, text in reversed(_OPTIONS):
        command = click.option(flag, metavar=metavar, help=text)(command)
    return command


def daemon_flags(options: Mapping[str, str | None]) -> list[str]:
    """The options that were given, as the daemon's command line wants them."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]


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
