"""`ebb add`: read a checkpoint into the library, with live progress."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Display

from ...formats.errors import Cancelled
from ...formats.messages import Progress
from ...formats.pruning import METHODS, PATTERNS, VALUES
from ...formats.units import format_seconds, format_size
from ...formats.values import ModelSummary
from ..stream import ProgressStream
from .connect import connected
from .output import console, note


@click.command()
@click.argument("source")
@click.option("--name", help="Name in the library; by default that of the folder.")
@click.option("--codec", help="How weights become blocks: nested, bitstack or sparse.")
@click.option("--levels", type=int, metavar="N", help="Blocks of each matrix.")
@click.option("--rank", type=int, metavar="K", help="Rank of the factors of bitstack; by default chosen by shape.")
@click.option("--sparsity", type=float, metavar="X", help="Share of weights that sparse makes zero; by default 0.5.")
@click.option("--pattern", type=click.Choice(list(PATTERNS)), help="What sparse keeps of neighbours in a row.")
@click.option("--method", type=click.Choice(METHODS), help="How sparse chooses what to keep; by default admm.")
@click.option("--values", type=click.Choice(VALUES), help="How sparse stores what it keeps; by default i8.")
@click.option("--masks-of", metavar="MODEL", help="Take the masks of this sparse model; both share them.")
@click.option("--order", type=click.Choice(["gain", "paper"]), help="How blocks are ordered.")
@click.option("--calibration", metavar="FILE", help="Text to calibrate with, instead of the model's own.")
@click.option("--seed", type=int, metavar="N", help="Seed of the model's own calibration text.")
def add(source: str, name: str | None, **options: object) -> None:
    """Add the model in SOURCE, a Hugging Face folder or the id of one (org/name), to the library.

    Ctrl-C cancels; the library is untouched until all is done, and the same command goes on after the last layer done.
    """
    given = {key: value for key, value in options.items() if value is not None}
    with connected() as client:
        stream = None
        try:
            with held_back():
                stream = client.add(source, name, **given)  # type: ignore[arg-type]
            follow(stream)
            summary = stream.result()
        except KeyboardInterrupt:
            if stream is None:
                raise
            summary = _cancel(stream)
    note(f"{summary.name}: {_sizes(summary)}; `ebb run {summary.name}` asks it something")


def _sizes(summary: ModelSummary) -> str:
    full, original = format_size(summary.nbytes), format_size(summary.original_nbytes)
    return f"added, {format_size(summary.base_nbytes)} to {full} (the original has {original})"


@contextmanager
def held_back() -> Iterator[None]:
    """Ctrl-C counts only at the end of the block, where there is something to cancel."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def cancel(stream: ProgressStream) -> ModelSummary:
    """Ask for the end and wait for the daemon's word; it may have been done before it heard us. Raises `Cancelled`."""
    note("\nCancelling ...")
    stream.cancel()
    return stream.result()


def _cancel(stream: ProgressStream) -> ModelSummary:
    try:
        return cancel(stream)
    except Cancelled as error:
        raise Cancelled("cancelled; the library is untouched, and the same command would go on from here") from error


def follow(stream: ProgressStream) -> None:
    """Show how far it is until it ends: a bar for a person, lines for a file."""
    if sys.stderr.isatty():
        _draw(stream)
    else:
        _tell(stream)


def _draw(stream: ProgressStream) -> None:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    with Display(*columns, console=console(stderr=True), transient=True) as display:
        task = display.add_task("starting", total=None, detail="")
        for progress in stream:
            total = progress.total or None
            display.update(
                task, description=progress.stage, completed=progress.done, total=total, detail=_detail(progress)
            )


def _tell(stream: ProgressStream) -> None:
    """A line for each stage and each tenth of it."""
    told: tuple[str, int] | None = None
    for progress in stream:
        mark = (progress.stage, 10 * progress.done // progress.total if progress.total else 0)
        if mark != told:
            told = mark
            note(f"{progress.stage}: {_detail(progress)}".rstrip(": "))


def _detail(progress: Progress) -> str:
    parts = []
    if progress.total:
        parts.append(f"{format_size(progress.done)} of {format_size(progress.total)}")
    if progress.eta_seconds is not None:
        parts.append(f"{format_seconds(progress.eta_seconds)} left")
    if progress.tensor:
        parts.append(progress.tensor)
    return ", ".join(parts)
