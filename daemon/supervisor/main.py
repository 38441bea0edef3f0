"""The daemon's command: folders, signals, and the loop until it ends. What can be set is in `options`."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Final

from ...formats.child_messages import from_child_decoder
from ...formats.errors import DaemonFailed, EbbflowError
from ...formats.messages import request_decoder
from ...formats.paths import Paths, default_paths
from ...formats.settings import Settings
from ...formats.units import format_size
from ..channel import Hub
from ..outboxes import Limits
from ..process import allow_files, set_oom_score
from ..settings import WorkerSettings, worker_settings
from .children import CommandLauncher, Launcher
from .door import listen
from .library import Library
from .logs import Logs
from .notify import Notifier, forget
from .options import gather
from .runtime import locked, prepare
from .sensor import Sensor
from .server import Outside, Server
from .signals import caught, hangup_means_reload
from .steady import SteadyClock

log = logging.getLogger(__name__)

RESERVE_FRACTION: Final = 0.05
RESERVE_LEAST: Final = 256_000_000
RESERVE_MOST: Final = 1_000_000_000
KV_FRACTION: Final = 1 / 8  # of memory, for one model's keys and values
KV_MOST: Final = 2_000_000_000
CHILD_LIMITS: Final = Limits(nbytes=64_000_000, messages=20_000, unheard=1_000, total=256_000_000)
FIXED: Final = ("listen", "log_format", "log_file", *(field.name for field in fields(WorkerSettings)))  # by a reload
OOM_SCORE: Final = -900  # where the kernel allows it (root); children raise theirs
OPEN_FILES: Final = 16_384  # each client is one, and the usual 1,024 is soon reached


def default_reserve(total: int) -> int:
    """Bytes to leave free on a machine with `total` bytes of memory."""
    return max(RESERVE_LEAST, min(RESERVE_MOST, int(total * RESERVE_FRACTION)))


def suited(settings: WorkerSettings, total: int) -> WorkerSettings:
    """What was left open, as it suits a machine with `total` bytes of memory."""
    return replace(settings, kv_limit=settings.kv_limit or min(KV_MOST, int(total * KV_FRACTION)))


class Daemon:
    """One daemon's life after it holds the lock. `reread` gives the options anew; it may raise `EbbflowError`."""

    def __init__(
        self,
        options: Settings,
        outside: Outside,
        library: Library,
        reread: Callable[[], Settings],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options = options
        self._outside = outside
        self._reread = reread
        self._clock = clock
        self._reloads = hangup_means_reload()
        self._notifier = Notifier()
        forget()
        self._server = Server(
            outside,
            library,
            reserve=self._reserve(),
            battery_reserve=self._battery_reserve(),
            idle_seconds=options.idle_seconds,
            now=clock(),
        )

    def run(self) -> None:
        """Serve until told to end."""
        with caught() as inbox, contextlib.closing(self._server):  # a signal cuts off nothing that is being written
            self._notifier.ready(f"leaving {format_size(self._reserve())} to everything else")
            while not self._server.finished:
                self._server.sleep([inbox.descriptor], self._notifier.watchdog_seconds)
                for number in inbox.take():
                    self._obey(number)
                now = self._clock()
                self._server.turn(now)
                self._notifier.feed(time.monotonic())  # the watchdog's clock does not stand still when we do

    def _obey(self, number: int) -> None:
        if number == signal.SIGHUP and self._reloads:
            self._reload()
            return
        log.info("told to end by signal %d", number)
        self._notifier.stopping(self._options.drain_seconds + 10)
        self._server.drain(self._clock(), self._options.drain_seconds)

    def _reload(self) -> None:
        """Take the settings anew; with a mistake in them, everything stays as it is."""
        self._notifier.reloading(time.monotonic())  # systemd's clock, whatever ours is
        try:
            options = self._reread()
        except EbbflowError as error:
            log.error("not reloaded: %s", error)
        else:
            fixed = [name for name in FIXED if getattr(self._options, name) != getattr(options, name)]
            if fixed:
                log.warning("%s will change at the next start only", ", ".join(fixed))
            self._options = options
            self._server.configure(
                reserve=self._reserve(),
                battery_reserve=self._battery_reserve(),
                cap=options.cap,
                idle_seconds=options.idle_seconds,
            )
            log.info("reloaded: leaving %s free", format_size(self._reserve()))
        self._notifier.ready(f"leaving {format_size(self._reserve())} to everything else")

    def _reserve(self) -> int:
        if self._options.reserve is not None:
            return self._options.reserve
        return default_reserve(self._outside.sensor.total())

    def _battery_reserve(self) -> int:
        given = self._options.battery_reserve
        return self._reserve() if given is None else given


def serve(options: Settings, paths: Paths, launcher: Launcher, reread: Callable[[], Settings] | None = None) -> None:
    """Run the daemon until it is told to stop. Raises `AlreadyRunning` or `DaemonFailed`."""
    set_oom_score(OOM_SCORE)
    allow_files(OPEN_FILES)
    prepare(paths)
    with locked(paths.lock), _outside(options, paths, launcher) as outside:
        clock = SteadyClock(time.monotonic)
        daemon = Daemon(options, outside, Library(paths.library), reread or (lambda: options), clock)
        log.info("serving on %s", paths.clients)
        daemon.run()
    log.info("stopped")


@contextlib.contextmanager
def _outside(options: Settings, paths: Paths, launcher: Launcher) -> Iterator[Outside]:
    with (
        contextlib.closing(Hub(paths.children, from_child_decoder, CHILD_LIMITS, explain=False)) as children,
        contextlib.closing(Hub(paths.clients, request_decoder)) as clients,
    ):
        if options.listen is not None:
            listen(clients, options.listen, paths)
        yield Outside(clients, children, launcher, Sensor(cap=options.cap))


def parse(arguments: Sequence[str], paths: Paths) -> Settings:
    """The options in force for these arguments. Raises `InvalidConfig` or `InvalidSize`."""
    return gather(arguments, os.environ, paths.settings)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m ebbflow.daemon.supervisor`; gives the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    os.umask(0o077)
    try:
        paths = default_paths()
        options = parse(given, paths)
        with contextlib.closing(_logs(options, paths)) as logs:

            def reread() -> Settings:
                logs.reopen()
                options = parse(given, paths)
                logs.set_level(options.log_level)
                return options

            settings = suited(worker_settings(options), Sensor().total())
            serve(options, paths, CommandLauncher(paths, settings=settings), reread)
    except EbbflowError as error:
        sys.stderr.write(f"ebbflow: {error}\n")
        return error.exit_code
    return 0


def _logs(options: Settings, paths: Paths) -> Logs:
    file = options.log_file or (str(paths.log) if _is_our_stderr(paths.log) else None)
    try:
        return Logs(options.log_level, options.log_format, file)
    except OSError as error:
        raise DaemonFailed(f"the log {file} cannot be written: {error.strerror}") from error


def _is_our_stderr(log: Path) -> bool:
    """Whether what we write to standard error lands there already, as in a daemon that a client started."""
    try:
        return os.path.samestat(os.fstat(sys.stderr.fileno()), log.stat())
    except (OSError, AttributeError, ValueError):  # no such file, no standard error, or none of the system's
        return False
