"""`ebb pin`: prefixes whose keys and values are kept."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ...formats.errors import InvalidRequest, storage_failed
from ...formats.units import format_size
from ...formats.values import PinSummary
from .connect import connected
from .output import json_option, note, write_json, write_table


@click.command()
@click.argument("name")
@click.argument("file", required=False)
@click.option("--as", "pin_name", metavar="PIN", help="What to call it; by default as FILE is called.")
@click.option("--save", is_flag=True, help="Keep it on disk too, for the next start.")
@click.option("--list", "listing", is_flag=True, help="Show the pinned prefixes of NAME.")
@click.option("--remove", metavar="PIN", help="Let that prefix go.")
@json_option
def pin(
    name: str, file: str | None, pin_name: str | None, save: bool, listing: bool, remove: str | None, as_json: bool
) -> None:
    """Compute the text in FILE (`-`: stdin) once with the model NAME, and keep what was computed.

    Prompts that begin with this text then start where it ends, whatever else was asked meanwhile. It is kept while NAME
    is in memory, where a model that nobody asks stays for `idle_seconds`; with --save it is there again the next time.
    """
    if [file is not None, listing, remove is not None].count(True) != 1:
        raise click.UsageError("give FILE, --list or --remove PIN, and one of them only")
    if file is None and (save or pin_name is not None):
        raise click.UsageError("--as and --save are for a FILE")
    if file is not None:
        text, called = _read(file), pin_name or (Path(file).stem if file != "-" else "")
        if not called:
            raise click.UsageError("what comes from stdin needs a name: --as PIN")
        with connected() as client:
            made = client.pin(name, called, text, save=save)
        how_long = "on disk too" if made.saved else f"while {name} is in memory (--save: on disk too)"
        note(f"{made.name}: {made.tokens} tokens are kept in {format_size(made.nbytes)}, {how_long}")
        return
    with connected() as client:
        pins = client.pins(name) if remove is None else client.unpin(name, remove)
    _show(pins, as_json)


def _show(pins: tuple[PinSummary, ...], as_json: bool) -> None:
    if as_json:
        write_json(pins)
    elif pins:
        rows = [(p.name, p.tokens, format_size(p.nbytes), "yes" if p.saved else "no", _state(p)) for p in pins]
        write_table(("PIN", "TOKENS", "SIZE", "SAVED", "STATE"), rows, right=("TOKENS", "SIZE"))
    else:
        click.echo("No prefix is pinned.")


def _state(summary: PinSummary) -> str:
    return "current" if summary.current else "computed when the model was smaller"


def _read(file: str) -> str:
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return content.decode("utf-8")
    except OSError as error:
        raise storage_failed(error, file) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{file} is not UTF-8 text: {error}") from error
