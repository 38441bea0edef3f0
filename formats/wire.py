"""How a message travels: two frames, `HEADER` and a msgpack body. What there is to say is in `messages`.

`HEADER` is magic and protocol version, so that a stranger is refused politely. The body is a map tagged with the type's
name. Unknown fields are ignored; optional fields may be added at any time.
"""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec

from .errors import InvalidRequest, UnsupportedVersion

PROTOCOL: Final = 1
MAGIC: Final = b"EBB"
HEADER: Final = MAGIC + bytes([PROTOCOL])
MAX_MESSAGE: Final = 2_000_000


class Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, kw_only=True):
    """Root of everything on the wire."""


M = TypeVar("M")
_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> list[bytes]:
    """A message's two frames. Raises `InvalidRequest` when the body exceeds `MAX_MESSAGE` bytes."""
    body = _encoder.encode(message)
    if len(body) > MAX_MESSAGE:
        raise InvalidRequest(f"a message of {len(body)} bytes; at most {MAX_MESSAGE} can be sent")
    return [HEADER, body]


def decode(decoder: msgspec.msgpack.Decoder[M], frames: list[bytes]) -> M:
    """The message in `frames`. Raises `UnsupportedVersion` or `InvalidRequest`; never anything else."""
    if len(frames) != 2 or len(frames[0]) != len(HEADER) or not frames[0].startswith(MAGIC):
        raise InvalidRequest("not an ebbflow message")
    if frames[0] != HEADER:
        raise UnsupportedVersion(f"protocol version {frames[0][-1]}; this side speaks {PROTOCOL}")
    try:
        return decoder.decode(frames[1])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"message not understood: {error}") from error
