"""`ebb batch`: a file of prompts in, a file of answers out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Display

from ...formats.errors import storage_failed
from ...formats.units import format_seconds
from ..batch import WINDOW, BatchSummary
from .batch_file import Answers, Question, open_answers, read_questions
from .connect import connected
from .output import console, note
from .run import given, sampling_options

Notify = Callable[[BatchSummary], None]


@click.command()
@click.argument("name")
@click.argument("file")
@click.option("--output", "-o", required=True, metavar="OUT", help="Where answers go, a line for each; added to.")
@sampling_options
@click.option("--priority", type=int, metavar="N", help="Requests of a higher one go first (-1).")
@click.option("--window", type=int, metavar="N", default=WINDOW, help=f"Ask for N at a time ({WINDOW}).")
@click.pass_context
def batch(ctx: click.Context, /, name: str, file: str, output: str, window: int, **options: object) -> None:
    """Have the model NAME answer all prompts in FILE (`-`: stdin), with what they have in common computed once.

    A line of FILE is {"prompt": "..."}, {"chat": [{"role": "user", "content": "..."}]} or {"ids": [1, 2]}, and may have
    an "id", max_tokens and other options of its own. A line of OUT has the number of the line it answers (index, from
    0), its id, text, reason and tokens, or an error. The same command goes on where it was: it asks what OUT lacks.

    The exit code is 0 when all were answered, that of the errors when all that failed did so in the same way, else 1.
    """
    defaults = given(options)
    questions = read_questions(file, _read(file), name, defaults)
    with open_answers(Path(output), questions) as answers:
        missing = [question for question in questions if question.index not in answers.done]
        if answers.done:
            note(f"{len(answers.done)} of {len(questions)} are answered already")
        if not missing:
            note("nothing is left to ask")
            return
        codes = _run(name, missing, answers, window, defaults)
    if codes:
        ctx.exit(codes.pop() if len(codes) == 1 else 1)


def _run(name: str, missing: list[Question], answers: Answers, window: int, options: object) -> set[int]:
    """Ask what is missing; the exit codes of what failed."""
    codes: set[int] = set()
    with connected() as client, _progress(len(missing)) as notify:
        client.show(name)  # raises `UnknownModel` once, not for each of them
        texts = [question.ask for question in missing]
        with client.generate_batch(name, texts, window=window, on_progress=notify, **options) as results:  # type: ignore[arg-type]
            for result in results:
                answers.write(missing[result.index], result)
                if result.error is not None:
                    codes.add(result.error.exit_code)
            summary = results.summary
    _tell(summary)
    return codes


def _tell(summary: BatchSummary) -> None:
    rate = summary.tokens / summary.seconds if summary.seconds > 0 else 0.0
    note(
        f"{summary.prompts - summary.failures} answered, {summary.failures} failed, in "
        f"{format_seconds(summary.seconds)}: {summary.tokens} tokens written ({rate:.1f} tokens/s)"
    )
    if summary.prompt_tokens:
        bound = f", {summary.reused / summary.shareable:.0%} of what could be" if summary.shareable else ""
        share = summary.reused / summary.prompt_tokens
        note(f"of {summary.prompt_tokens} prompt tokens {summary.reused} ({share:.0%}) had been computed before{bound}")


def _read(file: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise storage_failed(error, file) from error


@contextmanager
def _progress(total: int) -> Iterator[Notify]:
    """A bar for a person, a line for each tenth for a file."""
    if not sys.stderr.isatty():
        yield _told_in_tenths()
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False))
    with Display(*columns, console=console(stderr=True), transient=True) as display:
        task = display.add_task("", total=total)
        yield lambda summary: display.update(task, completed=summary.ended, description=_detail(summary))


def _told_in_tenths() -> Notify:
    told = [0]

    def notify(summary: BatchSummary) -> None:
        tenth = 10 * summary.ended // summary.prompts
        if tenth != told[0]:
            told[0] = tenth
            note(f"{summary.ended} of {summary.prompts}{_detail(summary)}")

    return notify


def _detail(summary: BatchSummary) -> str:
    failed = f", {summary.failures} failed" if summary.failures else ""
    return failed + (f", {summary.tokens / summary.seconds:.0f} tokens/s" if summary.seconds > 0 else "")
