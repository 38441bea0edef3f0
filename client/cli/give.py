"""`ebb yield`, `ebb pause`, `ebb resume`: memory for something else."""

from __future__ import annotations

import click

from ...formats.units import format_seconds, format_size, parse_seconds, parse_size
from .connect import connected
from .output import note


@click.command("yield")
@click.argument("size")
@click.option("--for", "duration", metavar="TIME", default="1h", help="45s, 20m, 2h (an hour, if not given).")
def yield_memory(size: str, duration: str) -> None:
    """Leave SIZE (2GB) more memory free for something else, for some time.

    `ebb yield 0` ends it; so does the end of the daemon.
    """
    nbytes, seconds = parse_size(size), parse_seconds(duration)
    with connected() as client:
        client.yield_memory(nbytes, seconds)
    if nbytes:
        note(f"{format_size(nbytes)} more are left free for {format_seconds(seconds)}; `ebb yield 0` ends it")
    else:
        note("nothing is yielded any more")


@click.command()
def pause() -> None:
    """Hold models at the least they can be, and unload idle ones, until `ebb resume`.

    Requests are still answered. Models with a size of their own (`ebb resize NAME 300MB`) keep it.
    """
    with connected() as client:
        client.pause()
    note("paused; `ebb resume` lets models grow again")


@click.command()
def resume() -> None:
    """End `ebb pause`."""
    with connected() as client:
        client.resume()
    note("models grow again as memory allows")
