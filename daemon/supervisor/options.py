"""What can be set, and where from: the command line, then `EBBFLOW_…` variables, then the user's `config.toml`.

One table, `Settings`, is the schema of all three: `idle_seconds` is `--idle-seconds`, `EBBFLOW_IDLE_SECONDS` and
`idle_seconds = 60`. A key that is not in it is an error that names the key; of the variables only these are looked at.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from ...formats.errors import InvalidConfig, InvalidSize
from ...formats.units import parse_size
from ..settings import DEFAULTS, KvType, WorkerSettings

VARIABLE: Final = "EBBFLOW_"
_SIZES: Final = ("reserve", "battery_reserve", "cap", "kv_limit", "kv_cached")
_WORKERS: Final = tuple(field.name for field in fields(WorkerSettings))
Seconds = Annotated[float, msgspec.Meta(ge=0)]
HELP: Final = {
    "idle_seconds": "stop the worker after this time unused (300)",
    "reserve": "memory to leave to everything else (5% of it, 256MB to 1GB)",
    "battery_reserve": "memory to leave free beyond that on battery (as much again)",
    "cap": "the most memory to use, whatever there is (no cap)",
    "log_level": "debug, info, warning or error (info)",
    "log_format": "text or json (text)",
    "log_file": "write the log here, and rotate it (standard error)",
    "drain_seconds": "when told to end, how long running requests may take to finish (10)",
    "listen": "also serve tcp://ADDRESS:PORT; beyond loopback only to the keys allowed by `ebb keys allow` (no)",
    "kv": "how keys and values of contexts are kept: f16, or i8 in half the memory (f16)",
    "kv_limit": "most bytes of keys and values for one model (2 GB, or an eighth of memory if that is less)",
    "kv_cached": "how much of that may belong to no running request (256MB)",
    "threads": "threads that compute (one for each core we have)",
    "exact": "never round activations: slow, a yardstick for comparisons (false)",
}


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Values as a person writes them; sizes as text (`1GB`) or bytes."""

    idle_seconds: Seconds = 300.0
    reserve: str | int | None = None
    battery_reserve: str | int | None = None
    cap: str | int | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    log_file: str | None = None
    drain_seconds: Seconds = 10.0
    listen: str | None = None
    kv: KvType = "f16"
    kv_limit: str | int | None = None
    kv_cached: str | int | None = None
    exact: bool = False
    threads: Annotated[int, msgspec.Meta(ge=1)] | None = None


@dataclass(frozen=True)
class Options:
    """What the daemon runs with. Sizes in bytes; no `reserve` means the default for this machine."""

    idle_seconds: float = 300.0
    reserve: int | None = None
    battery_reserve: int | None = None
    cap: int | None = None
    log_level: str = "info"
    log_format: str = "text"
    log_file: str | None = None
    drain_seconds: float = 10.0
    listen: str | None = None
    worker: WorkerSettings = DEFAULTS


def gather(arguments: Sequence[str], environment: Mapping[str, str], file: Path) -> Options:
    """The options in force. Raises `InvalidConfig` or `InvalidSize`, naming what is wrong where.

    Leaves with exit code 2 when the command line has what no option is called.
    """
    values = _file(file) | _environment(environment) | _command_line(arguments)
    values |= {name: _size(name, values[name]) for name in _SIZES if name in values}
    worker = WorkerSettings(**{name: values.pop(name) for name in _WORKERS if name in values})
    return Options(**values, worker=worker)


def _command_line(arguments: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser("ebbflow-daemon", description="Serves models within the memory there is.")
    for name, text in HELP.items():
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if name == "exact" else {}
        parser.add_argument(_flag(name), help=text.replace("%", "%%"), **switch)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    return _checked(given, _flag, strict=False)


def _environment(environment: Mapping[str, str]) -> dict[str, Any]:
    given = {name: text for name in HELP if (text := environment.get(_variable(name)))}
    return _checked(given, _variable, strict=False)


def _file(path: Path) -> dict[str, Any]:
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InvalidConfig(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise InvalidConfig(f"{path} is not TOML: {error}") from error
    unknown = sorted(given.keys() - HELP.keys())
    if unknown:
        raise InvalidConfig(f"{path}: {unknown[0]!r} cannot be set; what can is {', '.join(sorted(HELP))}")
    values = _checked(given, lambda name: f"{path}: {name}", strict=True)
    if values.get("log_file"):  # beside this file, wherever the daemon is started
        values["log_file"] = str(path.parent / Path(values["log_file"]).expanduser())
    return values


def _checked(given: dict[str, Any], call: Any, strict: bool) -> dict[str, Any]:
    """The values with their right types; `call` gives the name under which a person knows a setting."""
    values = {}
    for name, value in given.items():
        try:
            values[name] = getattr(msgspec.convert({name: value}, Settings, strict=strict), name)
        except msgspec.ValidationError as error:
            raise InvalidConfig(f"{call(name)} cannot be {value!r}: {str(error).partition(' - at')[0]}") from error
        if name in _SIZES:
            _size(call(name), values[name])
    return values


def _size(name: str, value: str | int | None) -> int | None:
    if value is None:
        return None
    try:
        return parse_size(str(value))
    except InvalidSize as error:
        raise InvalidSize(f"{name}: {error}") from error


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _variable(name: str) -> str:
    return VARIABLE + name.upper()
