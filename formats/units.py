"""Sizes and durations as people write them. The only place that parses or prints either."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

import msgspec

from .errors import InvalidRequest, InvalidSize

LARGEST: Final = 2**63 - 1

_FACTORS: Final = {
    "": 1,
    "B": 1,
    "K": 10**3,
    "KB": 10**3,
    "M": 10**6,
    "MB": 10**6,
    "G": 10**9,
    "GB": 10**9,
    "T": 10**12,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)
_TIME: Final = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([smhd]?)\s*", re.ASCII | re.IGNORECASE)
_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_FRACTION: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*", re.ASCII)


class SizeWish(msgspec.Struct, frozen=True, omit_defaults=True):
    """How large a model shall be: exactly one of `nbytes`, `fraction` of its stack, or (neither) automatic."""

    nbytes: int | None = None
    fraction: float | None = None

    @property
    def automatic(self) -> bool:
        """Whether the budget decides."""
        return self.nbytes is None and self.fraction is None

    def resolve(self, full: int) -> int:
        """Bytes asked for from a stack of `full` bytes; an automatic wish asks for all of it."""
        if self.nbytes is not None:
            return min(self.nbytes, full)
        return int(full * (1.0 if self.fraction is None else self.fraction))

    def __str__(self) -> str:
        if self.nbytes is not None:
            return format_size(self.nbytes)
        return "auto" if self.fraction is None else f"{self.fraction:.0%}"


AUTO: Final = SizeWish()


def parse_size(text: str) -> int:
    """`300MB`, `1.5 GiB`, `4096` -> bytes. Decimal units are powers of 1000, binary ones of 1024.

    Raises `InvalidSize`.
    """
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise InvalidSize(f"{text!r} is not a size; write for example 300MB, 1.5GiB or 4096")
    nbytes = int(Decimal(match[1]) * factor)
    if nbytes > LARGEST:
        raise InvalidSize(f"{text!r} is more than the {LARGEST} bytes that can be counted")
    return nbytes


def parse_wish(text: str) -> SizeWish:
    """`300MB`, `60%` or `auto` -> what was asked for. Raises `InvalidSize`."""
    if text.strip().lower() == "auto":
        return AUTO
    match = _FRACTION.fullmatch(text)
    if match is None:
        return SizeWish(nbytes=parse_size(text))
    fraction = float(match[1]) / 100
    if not 0 < fraction <= 1:
        raise InvalidSize(f"{text!r} is not between 0 and 100 percent of the model")
    return SizeWish(fraction=fraction)


def format_size(nbytes: int) -> str:
    """Bytes -> at most four significant characters and a decimal unit: `0 B`, `12.3 MB`, `615 MB`."""
    size = float(abs(nbytes))
    sign = "-" if nbytes < 0 else ""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{sign}{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{sign}{size:.1f} {unit}"
        size /= 1000
    return f"{sign}{size:.1f} TB"


def parse_seconds(text: str) -> float:
    """`90`, `45s`, `20m`, `1.5h`, `2d` -> seconds. Raises `InvalidRequest`."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise InvalidRequest(f"{text!r} is not a time; write for example 45s, 20m or 1.5h")
    return float(match[1]) * _SECONDS[match[2].lower()]


def format_seconds(seconds: float) -> str:
    """Seconds -> `45 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
