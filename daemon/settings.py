"""How a worker computes, as the daemon's options say it and the worker's command line repeats it. Pure."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Final, Literal, get_args

KvType = Literal["f16", "i8"]
KV_TYPES: Final[tuple[KvType, ...]] = get_args(KvType)


@dataclass(frozen=True)
class WorkerSettings:
    """`kv` is how keys and values are stored; `exact` leaves the inputs of matrices floats, as a yardstick.

    No `threads` means as many as the machine has for us (`worker/processors`). Each model may hold `kv_limit` bytes of
    keys and values (0: as many as suit this machine), `kv_cached` of them for no running request.
    """

    kv: KvType = "f16"
    exact: bool = False
    threads: int | None = None
    kv_limit: int = 0
    kv_cached: int = 256_000_000

    def flags(self) -> tuple[str, ...]:
        """What `parse_settings` reads."""
        exact = ("--exact",) if self.exact else ()
        threads = () if self.threads is None else (f"--threads={self.threads}",)
        sizes = (f"--kv-limit={self.kv_limit}", f"--kv-cached={self.kv_cached}")
        return (f"--kv={self.kv}", *exact, *threads, *sizes)


DEFAULTS: Final = WorkerSettings()


def parse_settings(arguments: list[str]) -> WorkerSettings:
    """Of a worker's command line; leaves with exit code 2 when it is wrong."""
    parser = argparse.ArgumentParser("ebbflow-worker")
    parser.add_argument("--kv", choices=KV_TYPES, default="f16")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kv-limit", type=int, default=DEFAULTS.kv_limit)
    parser.add_argument("--kv-cached", type=int, default=DEFAULTS.kv_cached)
    given = parser.parse_args(arguments)
    return WorkerSettings(given.kv, given.exact, given.threads, given.kv_limit, given.kv_cached)
