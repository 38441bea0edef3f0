"""`ebb import` and `ebb export`: a model's folder into the library and out of it, with live progress."""

from __future__ import annotations

from collections.abc import Callable

import click

from ...formats.errors import Cancelled
from ...formats.units import format_size
from ...formats.values import ModelSummary
from ..client import Client
from ..stream import ProgressStream
from .add import cancel, follow, held_back
from .connect import connected
from .output import note

STAYS = "cancelled; what was copied stays, and the same command goes on from there"


@click.command("import")
@click.argument("folder")
@click.option("--name", help="Name in the library; by default that of the folder.")
def import_(folder: str, name: str | None) -> None:
    """Copy the model in FOLDER (made by `ebb export`, or another library's) into the library.

    It answers as soon as the first part of it is there, and gets better while the rest arrives.
    """
    summary = _run(lambda client: client.import_model(folder, name))
    note(f"{summary.name}: all {format_size(summary.nbytes)} are here")


@click.command()
@click.argument("name")
@click.argument("folder")
def export(name: str, folder: str) -> None:
    """Copy the model NAME of the library to the new folder FOLDER."""
    summary = _run(lambda client: client.export_model(name, folder))
    note(f"{summary.name}: {format_size(summary.nbytes)} copied to {folder}")


def _run(begin: Callable[[Client], ProgressStream]) -> ModelSummary:
    with connected() as client:
        stream = None
        try:
            with held_back():
                stream = begin(client)
            follow(stream)
            return stream.result()
        except KeyboardInterrupt:
            if stream is None:
                raise
            try:
                return cancel(stream)
            except Cancelled as error:
                raise Cancelled(STAYS) from error
