"""What can be asked at all: requests that no state of the daemon would make possible are refused here."""

from __future__ import annotations

from ...formats.errors import InvalidRequest, InvalidSize
from ...formats.manifest import Manifest
from ...formats.messages import Generate
from ...formats.units import SizeWish, format_size


def check_generate(message: Generate) -> None:
    """Raises `InvalidRequest` for a generation that cannot be asked for."""
    if (message.prompt is None) == (message.chat is None):
        raise InvalidRequest("give either a prompt or a chat, and not both")
    if message.chat is not None and not message.chat:
        raise InvalidRequest("the chat has no messages")
    message.sampling.check()


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
