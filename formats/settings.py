"""What can be set of a daemon: names, types, defaults and what they mean, in one place.

`idle_seconds` is `--idle-seconds` of `ebb serve` and of the daemon's own command line, `EBBFLOW_IDLE_SECONDS`, and
`idle_seconds = 60` in `config.toml`. Reading these, and which wins, is `daemon/supervisor/options`.
"""

from __future__ import annotations

import os
from typing import Annotated, Final, Literal, get_args

import msgspec

KvType = Literal["f16", "i8"]
KV_TYPES: Final[tuple[KvType, ...]] = get_args(KvType)
Seconds = Annotated[float, msgspec.Meta(ge=0)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a daemon runs with; sizes in bytes. Where `None` or 0 stands, the daemon takes what suits the machine."""

    idle_seconds: Seconds = 300.0
    reserve: int | None = None
    battery_reserve: int | None = None
    cap: int | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    log_file: str | None = None
    drain_seconds: Seconds = 10.0
    listen: str | None = None
    kv: KvType = "f16"
    kv_limit: int = 0
    kv_cached: int = 256_000_000
    threads: Annotated[int, msgspec.Meta(ge=1)] | None = None
    exact: bool = False


USUAL: Final = Settings()
SIZES: Final = ("reserve", "battery_reserve", "cap", "kv_limit", "kv_cached")  # a person may write `1GB`
HELP: Final = {  # what it is called, and what it is for
    "idle_seconds": ("N", f"Stop the worker after N seconds without a request ({USUAL.idle_seconds:g})."),
    "reserve": ("SIZE", "Memory to leave to everything else, for example 1GB (5% of it, 256MB to 1GB)."),
    "battery_reserve": ("SIZE", "Memory to leave free beyond that while on battery (as much again)."),
    "cap": ("SIZE", "The most memory to use, whatever there is (no cap)."),
    "log_level": ("LEVEL", f"debug, info, warning or error ({USUAL.log_level})."),
    "log_format": ("FORMAT", f"text or json ({USUAL.log_format})."),
    "log_file": ("FILE", "Write the log there, and rotate it, instead of to stderr."),
    "drain_seconds": ("N", f"When told to end, let running requests finish for N seconds ({USUAL.drain_seconds:g})."),
    "listen": ("ADDRESS", "Serve tcp://HOST:PORT too; beyond loopback only to the keys of `ebb keys` (no)."),
    "kv": ("TYPE", f"How keys and values of contexts are kept: f16, or i8 in half the memory ({USUAL.kv})."),
    "kv_limit": ("SIZE", "Most bytes of keys and values for one model (2GB, or an eighth of memory if less)."),
    "kv_cached": ("SIZE", f"How much of that may belong to no running request ({USUAL.kv_cached // 10**6}MB)."),
    "threads": ("N", "Threads that compute (one for each core that is ours)."),
    "exact": ("", "Never round activations to bytes: slow, a yardstick for comparisons."),
}


def flag(name: str) -> str:
    """A setting on the command line."""
    return "--" + name.replace("_", "-")


def expand_home(file: str) -> str:
    """A `log_file` with the folder that `~` stands for, wherever it was set: shells see only to some of them."""
    return os.path.expanduser(file)  # noqa: PTH111 - which leaves the home of nobody as it is
