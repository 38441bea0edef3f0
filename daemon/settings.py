"""How a worker computes, as the daemon's settings say it and the worker's command line repeats it. Pure."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import Final

from ..formats.settings import KV_TYPES, USUAL, KvType, Settings

__all__ = ["DEFAULTS", "KV_TYPES", "KvType", "WorkerSettings", "parse_settings", "worker_settings"]


@dataclass(frozen=True)
class WorkerSettings:
    """`kv` is how keys and values are stored; `exact` leaves the inputs of matrices floats, as a yardstick.

    No `threads` means as many as the machine has for us (`worker/processors`). Each model may hold `kv_limit` bytes of
    keys and values (0: as many as suit this machine), `kv_cached` of them for no running request.
    """

    kv: KvType = USUAL.kv
    exact: bool = USUAL.exact
    threads: int | None = USUAL.threads
    kv_limit: int = USUAL.kv_limit
    kv_cached: int = USUAL.kv_cached

    def flags(self) -> tuple[str, ...]:
        """What `parse_settings` reads."""
        exact = ("--exact",) if self.exact else ()
        threads = () if self.threads is None else (f"--threads={self.threads}",)
        sizes = (f"--kv-limit={self.kv_limit}", f"--kv-cached={self.kv_cached}")
        return (f"--kv={self.kv}", *exact, *threads, *sizes)


DEFAULTS: Final = WorkerSettings()


def worker_settings(settings: Settings) -> WorkerSettings:
    """What of a daemon's settings its workers are told."""
    return WorkerSettings(**{field.name: getattr(settings, field.name) for field in fields(WorkerSettings)})


def parse_settings(arguments: list[str]) -> WorkerSettings:
    """Of a worker's command line; leaves with exit code 2 when it is wrong."""
    parser = argparse.ArgumentParser("ebbflow-worker")
    parser.add_argument("--kv", choices=KV_TYPES)
    parser.add_argument("--exact", action="store_true")
    for name in ("--threads", "--kv-limit", "--kv-cached"):
        parser.add_argument(name, type=int)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    return WorkerSettings(**given)
