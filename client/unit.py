"""The systemd user unit: its text, and whether a file with it is still as we wrote it. `cli/service` installs it.

The daemon is not killed for its worker (OOMPolicy), is never swapped out, and is started again when it fails, unless
another one runs (73) or its settings are wrong (2). Sandboxing that needs privileges is left out: user units have none.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Final, Literal

NAME: Final = "ebbflow.service"
_MARK: Final = "# Written by `ebb service install`; change it by `systemctl --user edit ebbflow`. Content: "
_SPECIAL: Final = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "%": "%%"})

State = Literal["absent", "ours", "edited", "foreign"]


def unit_text(command: Sequence[str], environment: Mapping[str, str], stop_seconds: float) -> str:
    """The whole file. `command` begins with an absolute path; `stop_seconds` is what an orderly end may take."""
    variables = "".join(f"Environment={_quoted(f'{name}={value}')}\n" for name, value in environment.items())
    body = f"""\
[Unit]
Description=Ebbflow, local language models within the memory there is
StartLimitIntervalSec=60
StartLimitBurst=5

[Service]
Type=notify
NotifyAccess=main
ExecStart={" ".join(_argument(word) for word in command)}
ExecReload=/bin/kill -HUP $MAINPID
{variables}WatchdogSec=30
Restart=on-failure
RestartSec=2
RestartPreventExitStatus=2 73
KillMode=mixed
TimeoutStopSec={stop_seconds:g}
OOMPolicy=continue
MemorySwapMax=0
UMask=0077
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native

[Install]
WantedBy=default.target
"""
    return f"{_MARK}{_digest(body)}\n{body}"


def state(text: str | None) -> State:
    """Whether a file is there, and still as one of our versions wrote it."""
    if text is None:
        return "absent"
    first, _, body = text.partition("\n")
    if not first.startswith(_MARK):
        return "foreign"
    return "ours" if first == _MARK + _digest(body) else "edited"


def _digest(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"


def _quoted(text: str) -> str:
    return f'"{text.translate(_SPECIAL)}"'


def _argument(word: str) -> str:
    """A word of a command line: there, `$` would begin a variable."""
    return _quoted(word).replace("$", "$$")
