"""One picture of `ebb top`: machine memory, each stack with its edge, speed, and why. Pure: what is seen in, text out.

::

    tiny      ▓▓▓▓██████████████┃░░░░░░░░░░░░   base, the rest in memory, where the edge shall be, whole stack
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from ...formats.manifest import CurvePoint
from ...formats.messages import Status
from ...formats.units import format_seconds, format_size
from ...formats.values import Residency
from .output import harmless
from .quality import quality_at

BAR: Final = 48  # letters
MARGIN: Final = 10  # letters before a bar, or as many as the longest name wants
EDGES: Final = 60  # pictures that the line of past edges goes back
MOVING: Final = 0.03  # of the stack; nearer than that, the next block does not fit
BASE, HELD, FREE, TARGET = "▓", "█", "░", "┃"
_HEIGHTS: Final = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class View:
    """What is known: of the daemon, of how good models are, and where their edges were, the latest last (bytes)."""

    status: Status | None
    trouble: str = ""
    curves: Mapping[str, Sequence[CurvePoint]] = field(default_factory=dict)
    edges: Mapping[str, Sequence[int]] = field(default_factory=dict)


def frame(view: View) -> RenderableType:
    """The picture."""
    if view.status is None:
        return Text.assemble(("ebbflow  ", "bold"), ("no daemon ", "bold red"), harmless(view.trouble))
    status = view.status
    margin = max([MARGIN, *(len(model.model) + 1 for model in status.models)])
    parts: list[RenderableType] = [_head(status, margin), _machine(status, margin), Text()]
    for model in status.models:
        parts += [*_model(model, view, margin), Text()]
    if not status.models:
        parts += [Text("no model is in memory", "dim"), Text()]
    if status.adding:
        parts.append(Text("adding".ljust(margin) + harmless(", ".join(status.adding))))
    parts.append(_processes(status, margin))
    return Group(*parts)


def _head(status: Status, margin: int) -> Text:
    running, waiting = (sum(getattr(model, name) for model in status.models) for name in ("running", "waiting"))
    speed = sum(model.tokens_per_second for model in status.models)
    text = f"up {format_seconds(status.uptime_seconds)}   {running} running, {waiting} waiting   {speed:.1f} tokens/s"
    return Text.assemble(("ebbflow".ljust(margin), "bold"), text)


def _machine(status: Status, margin: int) -> Text:
    """All memory: what is used, what we may still take, and what is left alone."""
    spare = max(0, status.available_nbytes - status.reserve_nbytes)
    reserve = status.available_nbytes - spare
    whole = max(status.total_nbytes, status.available_nbytes, 1)
    cells = _cells([whole - status.available_nbytes, spare, reserve], whole)
    available = f"{format_size(status.available_nbytes)} of {format_size(whole)} available"
    left = f"{format_size(status.reserve_nbytes)} left to everything else"
    words = f"  {available} ({harmless(status.available_source)}), {left}"
    return Text.assemble(
        ("memory".ljust(margin), "bold"),
        (HELD * cells[0], "yellow"),
        (FREE * cells[1], "green"),
        (BASE * cells[2], "dim"),
        words,
    )


def _model(model: Residency, view: View, margin: int) -> list[RenderableType]:
    name = Text.assemble((harmless(model.model).ljust(margin), "bold"), *_stack(model))
    share = model.nbytes / max(model.total_nbytes, 1)
    sizes = f"  {format_size(model.nbytes)} of {format_size(model.total_nbytes)} ({share:.0%})"
    name.append(sizes)
    target = min(model.target_nbytes, model.total_nbytes)
    if abs(target - model.nbytes) > MOVING * model.total_nbytes:
        name.append(f" -> {format_size(target)}", "cyan")
    quality = quality_at(view.curves.get(model.model, ()), model.nbytes)
    shared = [f"{format_size(model.shared_nbytes)} shared"] if model.shared_nbytes else []
    limit = f" of {format_size(model.kv_limit_nbytes)}" if model.kv_limit_nbytes else ""
    reused = f", {model.reused_tokens / model.prompt_tokens:.0%} reused" if model.prompt_tokens else ""
    facts = [
        str(quality) if quality else "quality not measured",
        *shared,
        f"KV {format_size(model.kv_nbytes)}{limit}{reused}",
        f"{model.running} running, {model.waiting} waiting",
        f"{model.tokens_per_second:.1f} tokens/s",
    ]
    lines: list[RenderableType] = [name, Text(" " * margin + "   ".join(facts))]
    past = _past(view.edges.get(model.model, ()), model.total_nbytes)
    wish = f"{model.wish}: {harmless(model.reason)}" if model.reason else str(model.wish)
    lines.append(Text.assemble(" " * margin, (past, "green"), "  " if past else "", (wish, "dim")))
    return lines


def _stack(model: Residency) -> list[tuple[str, str]]:
    """The bar of one stack; the cell where the edge shall be is its mark."""
    base = min(model.base_nbytes, model.nbytes)
    held = model.nbytes - base
    cells = _cells([base, held, max(0, model.total_nbytes - model.nbytes)], max(model.total_nbytes, 1))
    letters = BASE * cells[0] + HELD * cells[1] + FREE * cells[2]
    styles = ["blue"] * cells[0] + ["green"] * cells[1] + ["dim"] * cells[2]
    at = min(BAR - 1, max(0, round(BAR * model.target_nbytes / max(model.total_nbytes, 1))))
    marked = [*zip(letters, styles, strict=True)]
    marked[at] = (TARGET, "bold cyan")
    return marked


def _cells(parts: Sequence[int], whole: int) -> list[int]:
    """How many of `BAR` letters each part of the whole gets; together all of them."""
    ends, total = [0], 0
    for part in parts:
        total += part
        ends.append(min(BAR, max(ends[-1], round(BAR * total / whole))))
    ends[-1] = BAR
    return [stop - start for start, stop in pairwise(ends)]


def _past(edges: Sequence[int], whole: int) -> str:
    top = len(_HEIGHTS) - 1
    return "".join(_HEIGHTS[min(top, round(top * edge / max(whole, 1)))] for edge in edges)


def _processes(status: Status, margin: int) -> Text:
    words = []
    for process in status.processes:
        swapped = f" (and {format_size(process.swapped_nbytes)} swapped out)" if process.swapped_nbytes else ""
        words.append(f"{process.role} {format_size(process.private_nbytes)}{swapped}")
    return Text("processes".ljust(margin) + (", ".join(words) or "unknown"))
