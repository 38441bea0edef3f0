"""`ebb ps`: what is in memory, and why it is as large as it is."""

from __future__ import annotations

from collections.abc import Sequence

import click

from ...formats.messages import Status
from ...formats.units import format_size
from ...formats.values import ProcessMemory, Residency
from .connect import connected
from .output import harmless, json_option, write_json, write_table
from .serve import memory

TITLES = ("MODEL", "RESIDENT", "OF STACK", "", "BLOCKS", "KV", "WORK", "RUN/WAIT", "TOK/S", "WISH", "WHY")
RIGHT = ("RESIDENT", "OF STACK", "", "BLOCKS", "KV", "WORK", "RUN/WAIT", "TOK/S", "WISH")


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
    for model in answer.models:
        if model.damage:
            click.echo(f"{harmless(model.model)}: {harmless(model.damage)}")
        if model.shared_nbytes:
            shared = format_size(model.shared_nbytes)
            click.echo(f"{harmless(model.model)}: {shared} in common with other models, and counted there")
        if model.kv_limit_nbytes:
            click.echo(f"{harmless(model.model)}: {_prefixes(model)}")
    if answer.models:
        click.echo(f"held by the worker: {_ledger(answer)}")
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
        format_size(model.work_nbytes),
        f"{model.running}/{model.waiting}",
        f"{model.tokens_per_second:.1f}",
        _wish(model),
        model.reason,
    )


def _prefixes(model: Residency) -> str:
    """What there is of keys and values, and what keeping them saved."""
    words = [f"keys and values {format_size(model.kv_nbytes)} of at most {format_size(model.kv_limit_nbytes)}"]
    if model.kv_cached_nbytes:
        words.append(f"{format_size(model.kv_cached_nbytes)} of it of requests that have ended")
    if model.kv_pinned_nbytes:
        words.append(f"{format_size(model.kv_pinned_nbytes)} pinned")
    if model.prompt_tokens:
        share = model.reused_tokens / model.prompt_tokens
        words.append(f"{share:.0%} of {model.prompt_tokens} prompt tokens were computed before")
    if model.preemptions:
        words.append(f"{model.preemptions} times a request gave its place up for a while")
    return ", ".join(words)


def _wish(model: Residency) -> str:
    floor = f", at least {format_size(model.floor_nbytes)}" if model.floor_nbytes else ""
    cap = f", at most {format_size(model.cap_nbytes)}" if model.cap_nbytes else ""
    priority = f", priority {model.priority:g}" if model.priority != 1 else ""
    return f"{model.wish}{floor}{cap}{priority}"


def _ledger(answer: Status) -> str:
    """What the worker says that it holds, by what it is for."""
    parts = [
        ("stacks", sum(model.nbytes - model.shared_nbytes for model in answer.models)),
        ("keys and values", sum(model.kv_nbytes for model in answer.models)),
        ("work space", sum(model.work_nbytes for model in answer.models)),
        ("runtime", answer.runtime_nbytes),
    ]
    total = sum(nbytes for _, nbytes in parts)
    return f"{format_size(total)}: " + ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in parts)


def _processes(processes: Sequence[ProcessMemory]) -> str:
    return ", ".join(_process(process) for process in processes) or "unknown"


def _process(process: ProcessMemory) -> str:
    swapped = f" (and {format_size(process.swapped_nbytes)} swapped out)" if process.swapped_nbytes else ""
    return f"{process.role} {format_size(process.private_nbytes)}{swapped}"
