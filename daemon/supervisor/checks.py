"""What can be asked at all: requests that no state of the daemon would make possible are refused here."""

from __future__ import annotations

import math
from typing import Final

from ...formats.errors import InvalidRequest, InvalidSize
from ...formats.manifest import Manifest
from ...formats.messages import Generate, Pin, Resize, YieldMemory
from ...formats.paths import check_name
from ...formats.units import LARGEST, SizeWish, format_size
from .terms import Terms

PRIORITY_MOST: Final = 1000.0  # of a model
URGENCY_MOST: Final = 100  # of a request, either way
NAMESPACE_LETTERS: Final = 200


def check_generate(message: Generate) -> None:
    """Raises `InvalidRequest` for a generation that cannot be asked for."""
    _check_text(message)
    if not -URGENCY_MOST <= message.priority <= URGENCY_MOST:
        raise InvalidRequest(f"a priority is between -{URGENCY_MOST} and {URGENCY_MOST}, not {message.priority}")
    if not (message.deadline_seconds >= 0 and math.isfinite(message.deadline_seconds)):
        raise InvalidRequest(f"a deadline is some seconds from now, or 0, not {message.deadline_seconds:g}")
    message.sampling.check()


def check_pin(message: Pin) -> None:
    """Raises `InvalidName` or `InvalidRequest` for a prefix that cannot be pinned."""
    check_name(message.name, "pin")
    _check_text(message)


def _check_text(message: Generate | Pin) -> None:
    given = [value for value in (message.prompt, message.ids, message.chat) if value is not None]
    if len(given) != 1:
        raise InvalidRequest("give a prompt, its token ids or a chat, and exactly one of them")
    if message.chat is not None and not message.chat:
        raise InvalidRequest("the chat has no messages")
    if message.ids is not None and not message.ids:
        raise InvalidRequest("there are no token ids")
    if message.ids is not None and min(message.ids) < 0:
        raise InvalidRequest(f"token ids are 0 or more, not {min(message.ids)}")
    if len(message.namespace) > NAMESPACE_LETTERS:
        raise InvalidRequest(f"a namespace of {len(message.namespace)} letters; it may have {NAMESPACE_LETTERS}")


def check_wish(wish: SizeWish, manifest: Manifest) -> None:
    """Raises `InvalidSize` when the model cannot have that size."""
    if wish.nbytes is not None and wish.fraction is not None:
        raise InvalidSize("a size is either bytes or a fraction, not both")
    if wish.fraction is not None and not 0 < wish.fraction <= 1:
        raise InvalidSize(f"{wish.fraction} is not between 0 and 1 of the model")
    if wish.resolve(manifest.nbytes) < manifest.base_nbytes:
        raise InvalidSize(
            f"{wish} of {manifest.name} is less than its base: it needs {format_size(manifest.base_nbytes)} "
            f"({manifest.base_nbytes} bytes) of its {format_size(manifest.nbytes)}"
        )


def check_terms(terms: Terms, manifest: Manifest) -> None:
    """Raises `InvalidSize` or `InvalidRequest` when the model cannot be held on these terms."""
    check_wish(terms.size, manifest)
    if terms.floor < 0 or terms.floor > manifest.nbytes:
        raise InvalidSize(f"a floor of {format_size(terms.floor)}; {manifest.name} has {format_size(manifest.nbytes)}")
    least = max(terms.floor, manifest.base_nbytes)
    if terms.cap and terms.cap < least:
        raise InvalidSize(f"a cap of {format_size(terms.cap)}; {manifest.name} needs at least {format_size(least)}")
    if not 0 < terms.priority <= PRIORITY_MOST:
        raise InvalidRequest(f"a priority is above 0 and at most {PRIORITY_MOST:.0f}, not {terms.priority:g}")


def changed_terms(before: Terms, message: Resize) -> Terms:
    """The terms after a `Resize`: what it leaves out stays."""
    return Terms(
        size=message.wish,
        floor=before.floor if message.floor_nbytes is None else message.floor_nbytes,
        cap=before.cap if message.cap_nbytes is None else message.cap_nbytes,
        priority=before.priority if message.priority is None else message.priority,
    )


def check_yield(message: YieldMemory) -> None:
    """Raises `InvalidSize` or `InvalidRequest` for memory that cannot be yielded."""
    if not 0 <= message.nbytes <= LARGEST:
        raise InvalidSize(f"{message.nbytes} bytes cannot be left free")
    if not (message.seconds > 0 and math.isfinite(message.seconds)):
        raise InvalidRequest(f"memory is yielded for some seconds, not for {message.seconds:g}")
