"""`ebb service`: have systemd run the daemon, for this user."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
import platformdirs

from ...formats.errors import DaemonGone, ServiceFailed, storage_failed
from ...formats.settings import USUAL, expand_home
from ..client import Client
from ..launch import COMMAND
from ..unit import NAME, state, unit_text
from .output import json_option, note, write_fields, write_json
from .serve import daemon_flags, daemon_options

END_SECONDS: Final = 15.0  # after draining: worker and job leave
SHOWN: Final = ("LoadState", "UnitFileState", "ActiveState", "SubState", "MainPID", "StatusText")
SECONDS: Final = 60


@dataclass(frozen=True)
class Answer:
    """What systemctl said. `reached`: whether there was a service manager to hear it."""

    reached: bool
    ok: bool
    text: str


def systemctl(*arguments: str) -> Answer:
    """Ask this user's service manager. Raises nothing: where there is none, that is the answer."""
    program = shutil.which("systemctl")
    if program is None:
        return Answer(False, False, "there is no systemctl on this system")
    try:
        done = subprocess.run(
            [program, "--user", *arguments], capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Answer(False, False, str(error))
    text = (done.stdout if done.returncode == 0 else done.stderr).strip()
    return Answer("connect to bus" not in done.stderr, done.returncode == 0, text)


def unit_path() -> Path:
    """Where systemd looks for this user's own units."""
    return Path(platformdirs.user_config_dir()) / "systemd" / "user" / NAME


@click.group()
def service() -> None:
    """Have systemd start the daemon when you log in, watch over it and start it again when it fails."""


@service.command()
@click.option("--force", is_flag=True, help="Replace a unit file that was changed by hand, or is not ours.")
@daemon_options
def install(force: bool, **options: str | None) -> None:
    """Write a systemd user unit, enable and start it. The options are those of `ebb serve`."""
    path = unit_path()
    found = state(_read(path))
    if found in ("edited", "foreign") and not force:
        what = "was changed by hand" if found == "edited" else "is not ours"
        raise ServiceFailed(f"{path} {what}; --force replaces it, `systemctl --user edit ebbflow` would not need it")
    drain = options.get("drain_seconds")
    try:
        seconds = USUAL.drain_seconds if drain is None else float(drain)
    except ValueError as error:
        raise click.BadParameter(f"{drain!r} is not a number", param_hint="--drain-seconds") from error
    if log := options.get("log_file"):
        options["log_file"] = str(Path(expand_home(log)).absolute())
    _write(path, unit_text([*COMMAND, *daemon_flags(options)], _environment(), seconds + END_SECONDS))
    note(f"Wrote {path}.")
    reload = systemctl("daemon-reload")
    if not reload.reached:
        note(f"No service manager of this user can be reached from here ({reload.text}). In a login session, type:")
        note(f"    systemctl --user daemon-reload && systemctl --user enable --now {NAME}")
        return
    _expect(reload)
    _expect(systemctl("enable", NAME))
    if _other_daemon():
        note("A daemon runs already, outside of the service: `ebb stop`, then `systemctl --user start ebbflow`.")
        return
    _expect(systemctl("restart", NAME))
    note("The service runs. `loginctl enable-linger` keeps it running while you are logged out.")


@service.command()
@click.option("--force", is_flag=True, help="Remove a unit file that was changed by hand, or is not ours.")
def uninstall(force: bool) -> None:
    """Stop the service and remove its unit; the library stays."""
    path = unit_path()
    found = state(_read(path))
    if found == "absent":
        note("The service is not installed.")
        return
    if found != "ours" and not force:
        raise ServiceFailed(f"{path} is not as `ebb service install` wrote it; --force removes it all the same")
    stopped = systemctl("disable", "--now", NAME)
    if stopped.reached and not stopped.ok:
        raise ServiceFailed(f"{NAME} is still there: systemd says: {stopped.text}")
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise storage_failed(error, path) from error
    systemctl("daemon-reload")
    note(f"Removed {path}.")
    if not stopped.reached:
        note(f"No service manager can be reached from here ({stopped.text}); one that runs the daemon still does.")


@service.command()
@json_option
def status(as_json: bool) -> None:
    """Show whether the service is installed, enabled and active."""
    path = unit_path()
    answer = systemctl("show", NAME, f"--property={','.join(SHOWN)}")
    shown = dict(line.partition("=")[::2] for line in answer.text.splitlines()) if answer.ok else {}
    facts: dict[str, object] = {
        "unit": str(path),
        "file": state(_read(path)),
        "reachable": answer.reached,
        "enabled": shown.get("UnitFileState") or "unknown",
        "active": f"{shown.get('ActiveState', 'unknown')} ({shown.get('SubState', answer.text or 'unknown')})",
        "pid": int(shown.get("MainPID") or 0),
        "says": shown.get("StatusText", ""),
    }
    if as_json:
        write_json(facts)
    else:
        write_fields([(name, str(value)) for name, value in facts.items() if value not in ("", 0)])


def _expect(answer: Answer) -> None:
    if not answer.ok:
        raise ServiceFailed(f"{NAME} is written, but systemd says: {answer.text}; `ebb service status` has more")


def _environment() -> dict[str, str]:
    """What the daemon must know that a login session does not tell it."""
    home = os.environ.get("EBBFLOW_HOME")
    return {"EBBFLOW_HOME": str(Path(home).absolute())} if home else {}


def _other_daemon() -> bool:
    """Whether a daemon answers that the service manager did not start."""
    answer = systemctl("show", NAME, "--property=MainPID")
    try:
        with Client() as client:
            return f"MainPID={client.status().pid}" not in answer.text
    except DaemonGone:
        return False


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise storage_failed(error, path) from error


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise storage_failed(error, path) from error
