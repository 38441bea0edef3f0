"""`ebb resize`: move a model's edge and say what the kernel gave or got back."""

from __future__ import annotations

import click

from ...formats.messages import Resized
from ...formats.units import format_size, parse_wish
from ...formats.values import Residency
from ..asks import Terms
from ..client import Client
from .connect import connected
from .output import json_option, write_json


@click.command()
@click.argument("name")
@click.argument("size")
@click.option("--floor", metavar="SIZE", help="An automatic size never goes below (0: the model's base).")
@click.option("--cap", metavar="SIZE", help="An automatic size never goes above (0: no cap).")
@click.option("--priority", type=float, metavar="N", help="How much more than others its quality counts (1).")
@json_option
def resize(name: str, size: str, as_json: bool, **given: str | float | None) -> None:
    """Set how much of a model is kept in memory, also while it answers; remembered until it is removed.

    SIZE is bytes (300MB, 1.5GiB), a share of the model (60%), or `auto` to follow the memory there is. Options that are
    not given stay as they were.
    """
    wish = parse_wish(size)
    terms: Terms = {key: value for key, value in given.items() if value is not None}  # type: ignore[assignment]
    with connected() as client:
        before = _residency(client, name)
        resized = client.resize(name, wish, **terms)
    if as_json:
        write_json(resized)
    else:
        click.echo(_sentence(name, size, before, resized))


def _residency(client: Client, name: str) -> Residency | None:
    return next((model for model in client.status().models if model.model == name), None)


def _sentence(name: str, size: str, before: Residency | None, resized: Resized) -> str:
    after = resized.residency
    if after is None:
        return f"{name}: not loaded; {size} will apply when it is"
    start = f"{format_size(before.nbytes)} -> " if before else ""
    change = "less" if resized.released_nbytes >= 0 else "more"
    return (
        f"{name}: {start}{format_size(after.nbytes)} (of {format_size(after.total_nbytes)}); the kernel counts "
        f"{format_size(abs(resized.released_nbytes))} {change} private memory, after {resized.seconds * 1000:.0f} ms"
    )
