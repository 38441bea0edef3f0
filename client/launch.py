"""Starting a daemon in the background when none answers. Stopping it is a request (`Client.shutdown`)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ..formats.errors import AlreadyRunning, DaemonFailed, DaemonGone
from ..formats.paths import Paths, default_paths
from ..formats.settings import expand_home
from .address import elsewhere
from .client import Client

# -P: the daemon must not import from the folder the user happens to stand in.
COMMAND: Final = (sys.executable, "-P", "-m", "ebbflow.daemon.supervisor")
START_SECONDS: Final = 15.0
# What means the same to the daemon, which stands elsewhere, and how it is read.
_PATHS: Final = (("EBBFLOW_HOME", str), ("EBBFLOW_LOG_FILE", expand_home))
LOG_LINES: Final = 10
LOG_NBYTES: Final = 1_000_000  # a log larger than this is set aside when the next daemon starts


def ensure_daemon(*, seconds: float = START_SECONDS, command: Sequence[str] = COMMAND) -> bool:
    """Return when the daemon answers; start this user's in the background, with `command`, if none does.

    One that EBBFLOW_HOST names is never started, only asked: then this raises `NotRunning` or `DaemonGone`.

    Gives whether this call started it: any number of processes may do this at once, and one daemon wins.
    Raises `DaemonFailed`, with the last lines of its log, when it exits or does not answer within `seconds`; it is
    left running in the second case.
    """
    if elsewhere():
        with Client() as client:
            client.ping()
        return False
    paths = default_paths()
    with Client(paths.clients) as client:
        if answers(client):
            return False
        process = _start(client, paths, seconds, command)
        won = client.status().pid == process.pid
    if not won:
        process.terminate()  # still on its way to find the lock taken; without this it may find it free one day
    return won


def answers(client: Client) -> bool:
    """Whether a daemon answers; takes a few milliseconds, or up to the lease if there is one that hangs."""
    try:
        client.ping()
    except DaemonGone:
        return False
    return True


def _start(client: Client, paths: Paths, seconds: float, command: Sequence[str]) -> subprocess.Popen[bytes]:
    deadline = time.monotonic() + seconds
    _set_aside(paths.log)
    began = _size(paths.log)
    process = _spawn(paths, command)
    while not answers(client):  # each try takes as long as a refused connection
        code = process.poll()
        if code == AlreadyRunning.exit_code and time.monotonic() < deadline:
            # Another one is starting, or one is stopping: theirs will answer, or the next of ours.
            if not answers(client):
                process = _spawn(paths, command)
        elif code is not None and not answers(client):
            raise DaemonFailed(f"the daemon ended with code {code} before it answered{_tail(paths.log, began)}")
        elif time.monotonic() >= deadline:
            raise DaemonFailed(
                f"the daemon (process {process.pid}) has not answered within {seconds:g} s{_tail(paths.log, began)}"
            )
    return process


def _spawn(paths: Paths, command: Sequence[str]) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    for name, expand in _PATHS:
        if environment.get(name):
            environment[name] = str(Path(expand(environment[name])).absolute())
    try:
        paths.logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        with paths.log.open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,  # which the daemon knows and rotates, unless it was told to log elsewhere
                cwd="/",  # a daemon must not keep the user's folder busy
                env=environment,
                start_new_session=True,
            )
    except OSError as error:
        raise DaemonFailed(f"the daemon cannot be started: {error}") from error
    # Waited for in the background, so that it does not stay a zombie of a client that lives longer.
    threading.Thread(target=process.wait, name="ebbflow-reaper", daemon=True).start()
    return process


def _set_aside(log: Path) -> None:
    if _size(log) > LOG_NBYTES:
        with contextlib.suppress(OSError):  # another one did it, or the folder cannot be written: it only grows
            log.replace(log.with_suffix(".log.1"))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tail(path: Path, start: int) -> str:
    """What the log got since `start`: its last lines, as the end of a message."""
    with path.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()[-LOG_LINES:]
    if not lines:
        return f"; its log, {path}, says nothing"
    return "\n".join([f"; {path} ends with:", *(f"    {line}" for line in lines)])
