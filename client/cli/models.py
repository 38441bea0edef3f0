"""`ebb list`, `ebb show`, `ebb rm`: the library."""

from __future__ import annotations

import click

from ...formats.messages import ModelDetail
from ...formats.units import format_size
from ...formats.values import ModelSummary
from .chart import write_curve
from .connect import connected
from .output import json_option, note, write_fields, write_json, write_table


@click.command("list")
@json_option
def list_models(as_json: bool) -> None:
    """List the models of the library."""
    with connected() as client:
        models = client.models()
    if as_json:
        write_json(models)
    elif not models:
        note("The library is empty; `ebb add SOURCE` adds a model.")
    else:
        rows = [
            (m.name, m.family, m.codec, format_size(m.base_nbytes), format_size(m.nbytes), _added(m)) for m in models
        ]
        write_table(("NAME", "FAMILY", "CODEC", "SMALLEST", "FULL", "ADDED"), rows, right=("SMALLEST", "FULL"))
        for model in models:
            if model.shares and model.name < min(model.shares):  # each file once
                note(f"{model.name} shares {_shared(model)}")


def _shared(model: ModelSummary) -> str:
    return f"{format_size(model.shared_nbytes)} of masks with {', '.join(model.shares)}"


def _added(model: ModelSummary) -> str:
    if model.arrived_nbytes is None:
        return model.created
    return f"arriving {model.arrived_nbytes / max(model.nbytes, 1):.0%}"


@click.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show what is known about a model, and how good it is at which size."""
    with connected() as client:
        detail = client.show(name)
    if as_json:
        write_json(detail)
        return
    write_fields(_fields(detail))
    if detail.curve:
        click.echo()
        write_curve(detail.curve, detail.summary.nbytes)


def _fields(detail: ModelDetail) -> list[tuple[str, str]]:
    summary, network = detail.summary, detail.architecture
    options = ", ".join(f"{name} {value}" for name, value in detail.options.items())
    return [
        ("name", summary.name),
        ("family", f"{network.family}, {network.layers} layers, width {network.hidden}, vocabulary {network.vocab}"),
        ("context", f"{network.context} tokens"),
        ("codec", f"{summary.codec} ({options})" if options else summary.codec),
        ("size", f"{format_size(summary.base_nbytes)} to {format_size(summary.nbytes)}, {detail.blocks} blocks"),
        *([("shares", _shared(summary))] if summary.shares else []),
        ("original", format_size(summary.original_nbytes)),
        ("source", detail.source),
        ("checksum", detail.checksum),
        ("added", summary.created),
        *([("damaged", detail.damage)] if detail.damage else []),
    ]


@click.command()
@click.argument("name")
def rm(name: str) -> None:
    """Delete a model from the library."""
    with connected() as client:
        client.remove(name)
    note(f"{name} is no longer in the library.")
