"""The daemon's command: options, folders, signals, and the loop until it ends."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ...formats.errors import EbbflowError
from ...formats.messages import from_child_decoder, request_decoder
from ...formats.paths import Paths, default_paths
from ...formats.units import format_size, parse_size
from ..channel import Hub, Limits
from .children import CommandLauncher, Launcher
from .library import Library
from .runtime import locked, prepare
from .sensor import Sensor
from .server import Outside, Server

log = logging.getLogger(__name__)

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
RESERVE_FRACTION: Final = 0.05
RESERVE_LEAST: Final = 256_000_000
RESERVE_MOST: Final = 1_000_000_000
CHILD_LIMITS: Final = Limits(nbytes=64_000_000, messages=20_000)
LEVELS: Final = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class Options:
    """What can be set on the command line. Sizes in bytes; no `reserve` means the default for this machine."""

    idle_seconds: float = 300.0
    reserve: int | None = None
    cap: int | None = None
    log_level: str = "info"
    battery_reserve: int | None = None


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line; leaves with exit code 2 when it is wrong. Raises `InvalidSize`."""
    parser = argparse.ArgumentParser("ebbflow-daemon", description="Serves models within the memory there is.")
    parser.add_argument("--idle-seconds", type=float, default=300.0, help="stop the worker after this time unused")
    parser.add_argument("--reserve", metavar="SIZE", help="memory to leave free (5%% of it, 256MB to 1GB)")
    parser.add_argument(
        "--battery-reserve", metavar="SIZE", help="memory to leave free beyond that on battery (as much)"
    )
    parser.add_argument("--cap", metavar="SIZE", help="the most memory to use, whatever there is")
    parser.add_argument("--log-level", choices=LEVELS, default="info")
    given = parser.parse_args(arguments)
    if not given.idle_seconds >= 0:  # nor is it a number
        parser.error(f"--idle-seconds must be 0 or more, not {given.idle_seconds:g}")
    reserve = None if given.reserve is None else parse_size(given.reserve)
    cap = None if given.cap is None else parse_size(given.cap)
    battery = None if given.battery_reserve is None else parse_size(given.battery_reserve)
    return Options(given.idle_seconds, reserve, cap, given.log_level, battery)


def default_reserve(total: int) -> int:
    """Bytes to leave free on a machine with `total` bytes of memory."""
    return max(RESERVE_LEAST, min(RESERVE_MOST, int(total * RESERVE_FRACTION)))


def serve(options: Options, paths: Paths, launcher: Launcher) -> None:
    """Run the daemon until it is told to stop. Raises `AlreadyRunning` or `DaemonFailed`."""
    os.umask(0o077)
    prepare(paths)
    with locked(paths.lock), _signals() as signals, _outside(options, paths, launcher) as outside:
        reserve = default_reserve(outside.sensor.total()) if options.reserve is None else options.reserve
        server = Server(
            outside,
            Library(paths.library),
            reserve=reserve,
            battery_reserve=reserve if options.battery_reserve is None else options.battery_reserve,
            idle_seconds=options.idle_seconds,
            now=time.monotonic(),
        )
        log.info("serving on %s, leaving %s free", paths.clients, format_size(reserve))
        while not server.finished:
            server.sleep([signals])
            if _received(signals):
                server.stop(time.monotonic())
            server.turn(time.monotonic())
    log.info("stopped")


@contextlib.contextmanager
def _outside(options: Options, paths: Paths, launcher: Launcher) -> Iterator[Outside]:
    with (
        contextlib.closing(Hub(paths.children, from_child_decoder, CHILD_LIMITS, explain=False)) as children,
        contextlib.closing(Hub(paths.clients, request_decoder)) as clients,
    ):
        yield Outside(clients, children, launcher, Sensor(cap=options.cap))


@contextlib.contextmanager
def _signals() -> Iterator[int]:
    """A descriptor that becomes readable when a stop signal arrives. Until the end, such signals do nothing else."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
    try:
        yield reader
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(reader)
        os.close(writer)


def _received(signals: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        return any(number in STOP_SIGNALS for number in os.read(signals, 4096))
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m ebbflow.daemon.supervisor`; gives the exit code."""
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        logging.basicConfig(
            level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
        )
        paths = default_paths()
        serve(options, paths, CommandLauncher(paths))
    except EbbflowError as error:
        sys.stderr.write(f"ebbflow: {error}\n")
        return error.exit_code
    return 0
