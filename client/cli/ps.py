"""`ebb ps`: what is in memory, and why it is as large as it is."""

from __future__ import annotations

from collections.abc import Sequence

import click

from ...formats.messages import ProcessMemory, Residency
from ...formats.units import format_size
from .connect import connected
from .output import json_option, write_json, write_table
from .serve import memory

TITLES = ("MODEL", "RESIDENT", "OF STACK", "", "BLOCKS", "KV", "RUN/WAIT", "TOK/S", "WISH", "WHY")
RIGHT = ("RESIDENT", "OF STACK", "", "BLOCKS", "KV", "RUN/WAIT", "TOK/S", "WISH")


@click.command()
@json_option
def ps(as_json: bool) -> None:
    """Show the models in memory: size, speed, and the reason for the size."""
    with connected(start=False) as client:
        answer = client.status()
    if as_json:
        write_json(answer)
        return
    if answer.models:
        write_table(TITLES, [_row(model) for model in answer.models], right=RIGHT)
    else:
        click.echo("No model is loaded.")
    click.echo()
    click.echo(f"private memory, as the kernel counts it: {_processes(answer.processes)}")
    click.echo(f"memory: {memory(answer)}")


def _row(model: Residency) -> tuple[str, ...]:
    return (
        model.model,
        format_size(model.nbytes),
        format_size(model.total_nbytes),
        f"{model.nbytes / max(model.total_nbytes, 1):.0%}",
        f"{model.blocks}/{model.total_blocks}",
        format_size(model.kv_nbytes),
        f"{model.running}/{model.waiting}",
        f"{model.tokens_per_second:.1f}",
        str(model.wish),
        model.reason,
    )


def _processes(processes: Sequence[ProcessMemory]) -> str:
    return ", ".join(_process(process) for process in processes) or "unknown"


def _process(process: ProcessMemory) -> str:
    swapped = f" (and {format_size(process.swapped_nbytes)} swapped out)" if process.swapped_nbytes else ""
    return f"{process.role} {format_size(process.private_nbytes)}{swapped}"
