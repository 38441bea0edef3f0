"""The settings in force: the command line, then `EBBFLOW_…` variables, then the user's `config.toml`.

`formats/settings` is the schema of all three. A key that is not in it is an error that names the key; of the variables
only these are looked at.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from ...formats.errors import InvalidConfig, InvalidSize
from ...formats.settings import HELP, SIZES, Settings, expand_home, flag
from ...formats.units import parse_size

VARIABLE: Final = "EBBFLOW_"


def gather(arguments: Sequence[str], environment: Mapping[str, str], file: Path) -> Settings:
    """The settings in force. Raises `InvalidConfig` or `InvalidSize`, naming what is wrong where.

    Leaves with exit code 2 when the command line has what no setting is called.
    """
    return Settings(**_file(file) | _environment(environment) | _command_line(arguments))


def _command_line(arguments: Sequence[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser("ebbflow-daemon", description="Serves models within the memory there is.")
    for name, (_, text) in HELP.items():
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if name == "exact" else {}
        parser.add_argument(flag(name), help=text.replace("%", "%%"), **switch)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    return _checked(given, flag, strict=False)


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
        values["log_file"] = str(path.parent / values["log_file"])
    return values


def _checked(given: dict[str, Any], call: Callable[[str], str], strict: bool) -> dict[str, Any]:
    """The values with their right types; `call` gives the name under which a person knows a setting."""
    values = {}
    for name, value in given.items():
        plain = _size(call(name), value) if name in SIZES else value
        try:
            values[name] = getattr(msgspec.convert({name: plain}, Settings, strict=strict), name)
        except msgspec.ValidationError as error:
            raise InvalidConfig(f"{call(name)} cannot be {value!r}: {str(error).partition(' - at')[0]}") from error
    if values.get("log_file"):
        values["log_file"] = expand_home(values["log_file"])
    return values


def _size(name: str, value: object) -> object:
    """In bytes, if it is text or a number at all."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return value
    try:
        return parse_size(str(value))
    except InvalidSize as error:
        raise InvalidSize(f"{name}: {error}") from error


def _variable(name: str) -> str:
    return VARIABLE + name.upper()
