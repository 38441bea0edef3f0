"""Where the command line writes: data on stdout, everything else on stderr, and JSON for programs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Final

import click
import msgspec
from rich.console import Console
from rich.table import Table

from ...formats.units import SizeWish
from ...formats.wire import Message

UNLIMITED_WIDTH: Final = 1000  # a pipe has no width: nothing is cut
_CONTROLS: Final = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def console(*, stderr: bool = False) -> Console:
    """A console that shows text as it is, as wide as its terminal or, into a pipe, as the text."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else UNLIMITED_WIDTH
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


def note(text: str) -> None:
    """A line for the person, not for the pipe."""
    click.echo(harmless(text), err=True)


def harmless(text: str) -> str:
    """Text without control characters: what we did not write must not be able to drive the terminal."""
    return text.translate(_CONTROLS)


def write_text(text: str) -> None:
    """Generated text, at once; to a terminal only what is harmless there."""
    click.echo(harmless(text) if sys.stdout.isatty() else text, nl=False)


def write_json(value: object) -> None:
    """One JSON document on stdout."""
    click.echo(msgspec.json.format(msgspec.json.encode(plain(value)), indent=2))


def plain(value: object) -> object:
    """Messages as dictionaries without what only the wire needs; every field is there, wishes as people write them."""
    match value:
        case SizeWish():
            return str(value)
        case msgspec.Struct():
            hidden = {"id"} if isinstance(value, Message) else set()
            return {name: plain(getattr(value, name)) for name in value.__struct_fields__ if name not in hidden}
        case tuple() | list():
            return [plain(item) for item in value]
        case dict():
            return {name: plain(item) for name, item in value.items()}
        case _:
            return value


def write_table(titles: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """A table without lines; columns named in `right` are flush right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, justify="right" if title in right else "left", no_wrap=not sys.stdout.isatty())
    for row in rows:
        table.add_row(*(cell if hasattr(cell, "__rich_console__") else harmless(str(cell)) for cell in row))
    console().print(table)


def write_fields(fields: Iterable[tuple[str, object]]) -> None:
    """Names and values, one line each."""
    pairs = list(fields)
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        click.echo(f"{name:<{width}}  {harmless(str(value))}")


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
