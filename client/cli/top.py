"""`ebb top`: the picture of `frame`, again and again, until q."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

import click
from rich.console import Console
from rich.live import Live

from ...formats.errors import DaemonGone, EbbflowError
from ...formats.manifest import CurvePoint
from ...formats.messages import Status
from ..client import Client
from ..exchange import Lease
from .frame import EDGES, View, frame
from .output import console

EVERY_SECONDS: Final = 0.33
LEASE: Final = Lease(silence_seconds=3.0, connect_seconds=1.0)  # a picture that hangs longer helps nobody
LEAVE: Final = frozenset(b"qQ\x1b\x04")


class Watch:
    """Looks at the daemon; remembers how good models are and where their edges were, also while there is no daemon."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._curves: dict[tuple[str, int], tuple[CurvePoint, ...]] = {}
        self._edges: dict[str, deque[int]] = {}

    def look(self) -> View:
        """What there is now. Raises nothing that a daemon may do to us."""
        try:
            return self._view(self._client.status())
        except DaemonGone as error:
            return View(None, f"{error}; trying again")

    def _view(self, status: Status) -> View:
        curves = {}
        for model in status.models:
            key = (model.model, model.total_nbytes)
            if key not in self._curves:
                self._curves[key] = self._measured(model.model)
            curves[model.model] = self._curves[key]
            self._edges.setdefault(model.model, deque(maxlen=EDGES)).append(model.nbytes)
        return View(status, "", curves, self._edges)

    def _measured(self, model: str) -> tuple[CurvePoint, ...]:
        try:
            return self._client.show(model).curve
        except DaemonGone:
            raise
        except EbbflowError:  # removed from the library while it is in memory, or by something we cannot read
            return ()


@click.command()
@click.option("--once", is_flag=True, help="Print one picture and end; so it is where there is no terminal.")
@click.option("--svg", type=click.Path(dir_okay=False, writable=True), help="Write one picture to that file and end.")
def top(once: bool, svg: str | None) -> None:
    """Watch memory, models and their edges move; q leaves."""
    with Client(lease=LEASE) as client:
        watch = Watch(client)
        if svg or once or not sys.stdout.isatty():
            client.ping()  # here, that there is no daemon is an error
            view = watch.look()
            if svg:
                _save(view, svg)
            else:
                console().print(frame(view))
        else:
            with _pressed() as pressed:
                show(watch.look, console(), lambda: pressed(EVERY_SECONDS))


def show(look: Callable[[], View], screen: Console, pause: Callable[[], bool]) -> None:
    """Draw what `look` sees until `pause`, which waits for the next picture, says that it is enough."""
    with Live(frame(look()), console=screen, screen=True, auto_refresh=False) as live:
        live.refresh()
        while not pause():
            live.update(frame(look()), refresh=True)


def _save(view: View, path: str) -> None:
    with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123 - not a file that is read or written
        recorder = Console(file=nowhere, record=True, width=120, markup=False, highlight=False, emoji=False)
        recorder.print(frame(view))
    recorder.save_svg(path, title="ebb top")


@contextlib.contextmanager
def _pressed() -> Iterator[Callable[[float], bool]]:
    """Gives what waits for so many seconds and tells whether a key was pressed that leaves, or Ctrl-C.

    That one is no exception here: in the middle of drawing, it would leave the terminal as no shell wants it.
    """
    interrupted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: interrupted.append(number))
    try:
        with _keys() as pressed:
            yield lambda seconds: bool(interrupted) or pressed(seconds) or bool(interrupted)
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    if not sys.stdin.isatty():

        def wait(seconds: float) -> bool:
            time.sleep(seconds)
            return False

        yield wait
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed(seconds: float) -> bool:
        readable, _, _ = select.select([descriptor], [], [], seconds)
        return bool(readable) and not LEAVE.isdisjoint(os.read(descriptor, 64) or LEAVE)

    try:
        tty.setcbreak(descriptor)
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
