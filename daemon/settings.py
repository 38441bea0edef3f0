"""How a worker computes, as the daemon's command line says it and the worker's repeats it. Pure."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Final, Literal, get_args

KvType = Literal["f16", "i8"]
KV_TYPES: Final[tuple[KvType, ...]] = get_args(KvType)


@dataclass(frozen=True)
class WorkerSettings:
    """`kv` is how keys and values are stored; `exact` leaves the inputs of matrices floats, as a yardstick.

    No `threads` means as many as the machine has for us (`worker/processors`).
    """

    kv: KvType = "f16"
    exact: bool = False
    threads: int | None = None

    def flags(self) -> tuple[str, ...]:
        """What `add_options` reads."""
        exact = ("--exact",) if self.exact else ()
        threads = () if self.threads is None else (f"--threads={self.threads}",)
        return (f"--kv={self.kv}", *exact, *threads)


DEFAULTS: Final = WorkerSettings()


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `settings_from` wants."""
    parser.add_argument("--kv", choices=KV_TYPES, default="f16", help="how keys and values are kept: i8 halves them")
    parser.add_argument("--exact", action="store_true", help="never round activations: slow, for comparisons")
    parser.add_argument("--threads", type=_count, metavar="N", help="threads that compute (one for each core we have)")


def settings_from(given: argparse.Namespace) -> WorkerSettings:
    """Of a parsed command line."""
    return WorkerSettings(given.kv, given.exact, given.threads)


def parse_settings(arguments: list[str]) -> WorkerSettings:
    """Of flags alone; leaves with exit code 2 when they are wrong."""
    parser = argparse.ArgumentParser("ebbflow-worker")
    add_options(parser)
    return settings_from(parser.parse_args(arguments))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, not {text!r}")
    return int(text)
