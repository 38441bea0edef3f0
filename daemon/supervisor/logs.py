"""The daemon's log: one line an event, as text or JSON; a message that repeats is counted instead of written.

Texts end with what the call gave as `extra`, as `key=value`. JSON has that too, and the message's template, by which
lines of one kind are found. Into a file it is rotated by the standard library; what systemd keeps, systemd rotates.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Final

WINDOW_SECONDS: Final = 60.0
LINES_PER_WINDOW: Final = 30  # of one template
FILE_NBYTES: Final = 1_000_000
FILES: Final = 2
_USUAL: Final = vars(logging.makeLogRecord({})).keys() | {"message", "asctime", "repeats"}


@dataclass
class _Window:
    began: float
    lines: int = 0
    repeats: int = 0


class RateLimit(logging.Filter):
    """Lets a template pass so often in a minute; the first line after that says how many were left out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._windows: dict[tuple[str, int, str], _Window] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        now = self._clock()
        key = (record.name, record.levelno, str(record.msg))
        window = self._windows.get(key)
        if window is None or now - window.began >= WINDOW_SECONDS:
            record.repeats = window.repeats if window else 0
            self._forget(now)
            window = self._windows[key] = _Window(now)
        window.lines += 1
        if window.lines <= LINES_PER_WINDOW:
            return True
        window.repeats += 1
        return False

    def _forget(self, now: float) -> None:
        """Templates that nobody used lately, and that owe no count."""
        old = [
            key for key, window in self._windows.items() if not window.repeats and now - window.began >= WINDOW_SECONDS
        ]
        for key in old:
            del self._windows[key]


class TextFormatter(logging.Formatter):
    """`2026-11-21T17:00:00+0000 info worker: worker 12 started pid=12`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, with a traceback if there is one."""
        extra = "".join(f" {name}={_value(value)}" for name, value in _extra(record).items())
        repeats = getattr(record, "repeats", 0)
        more = f" (and {repeats} more like it)" if repeats else ""
        head = f"{_time(record)} {record.levelname.lower()} {_module(record)}: "
        line = head + _one_line(record.getMessage()) + extra + more
        return line + "\n" + self.formatException(record.exc_info) if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        fields = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "module": _module(record),
            "message": record.getMessage(),
            "template": str(record.msg),
            **_extra(record),
        }
        if repeats := getattr(record, "repeats", 0):
            fields["repeats"] = repeats
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)


class Logs:
    """Where the root logger writes, until `close`. Raises `OSError` when the file cannot be opened."""

    def __init__(self, level: str, form: str, file: str | None) -> None:
        self._handler: logging.Handler
        if file is None:
            self._handler = logging.StreamHandler(sys.stderr)
        else:
            self._handler = RotatingFileHandler(
                Path(file), maxBytes=FILE_NBYTES, backupCount=FILES, encoding="utf-8", errors="backslashreplace"
            )
        self._handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
        self._handler.addFilter(RateLimit())
        logging.getLogger().addHandler(self._handler)
        self.set_level(level)

    def set_level(self, level: str) -> None:
        """Write what is at least this important."""
        logging.getLogger().setLevel(level.upper())

    def reopen(self) -> None:
        """Write to a new file if somebody moved the old one away."""
        if isinstance(self._handler, RotatingFileHandler):
            self._release()  # the next line opens it again

    def close(self) -> None:
        """Write no more."""
        logging.getLogger().removeHandler(self._handler)
        self._release()

    def _release(self) -> None:
        with contextlib.suppress(OSError):  # the disk is full: what it could not take is lost, and no more than that
            self._handler.close()


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _USUAL}


def _time(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(record.created))


def _module(record: logging.LogRecord) -> str:
    return record.name.removeprefix("ebbflow.").rpartition(".")[2]


def _value(value: object) -> str:
    text = str(value)
    return text if text and not any(letter in ' "=\n' for letter in text) else json.dumps(text, ensure_ascii=False)


def _one_line(text: str) -> str:
    """Nobody who is quoted in a message begins a line of the log."""
    return text.replace("\r", "\\r").replace("\n", "\\n")
