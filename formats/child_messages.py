"""What the supervisor and its own processes (worker, job) say to each other, besides the words of `messages`.

The supervisor passes clients' requests on with ids of its own, and hears their events.
"""

from __future__ import annotations

from typing import Final

import msgspec

from .messages import (
    Added,
    Cancel,
    Chunk,
    Failed,
    Finished,
    Generate,
    ListPins,
    Pin,
    Pinned,
    Pins,
    Progress,
    Resized,
    Started,
    Unpin,
)
from .values import Residency
from .wire import Message


class LoadModel(Message, frozen=True):
    """Open the model in `folder` and hold up to `target_nbytes` of its stack. Answered by `Report` or `LoadFailed`.

    Saved pins are read back as far as `pins_nbytes` go.
    """

    model: str
    folder: str
    target_nbytes: int
    pins_nbytes: int | None = None


class UnloadModel(Message, frozen=True):
    """Forget a model; its requests fail with `cancelled`."""

    model: str


class SetTarget(Message, frozen=True):
    """Move a model's edge at the next step boundary. `id` (if not 0) is answered by `Resized`."""

    model: str
    target_nbytes: int
    id: int = 0


class Continue(Message, frozen=True):
    """Go on with `request`, of which an earlier worker sampled the tokens `ids`, and their text is with the client."""

    request: Generate
    ids: tuple[int, ...]


class Trim(Message, frozen=True):
    """Give back what is kept only to be faster next time: work space, and then `nbytes` of finished requests' KV."""

    nbytes: int = 0


class LimitKv(Message, frozen=True):
    """Hold at most so many bytes of keys and values for each model (0: as many as the settings say), from now on.

    Running requests beyond that give their places up, youngest first, and go on when there is room.
    """

    nbytes: int


class Exit(Message, frozen=True):
    """Leave cleanly."""


class Ready(Message, frozen=True):
    """A child's first words: it is connected and, for a worker, no request will meet the compiler.

    `private_nbytes` is what the kernel says the process holds by itself, before any model.
    """

    pid: int
    private_nbytes: int = 0


class LoadFailed(Message, frozen=True):
    """A model could not be opened; its requests get this error."""

    model: str
    code: str
    message: str


class Report(Message, frozen=True):
    """What the worker holds; sent after each change of an edge and at most twice a second while busy."""

    models: tuple[Residency, ...]


ToWorker = (
    LoadModel | UnloadModel | SetTarget | Trim | LimitKv | Generate | Continue | Pin | Unpin | ListPins | Cancel | Exit
)
FromWorker = Ready | Progress | Report | LoadFailed | Resized | Started | Chunk | Finished | Pinned | Pins | Failed
FromJob = Ready | Progress | Added | Failed
to_worker_decoder: Final = msgspec.msgpack.Decoder(ToWorker)
from_child_decoder: Final = msgspec.msgpack.Decoder(FromWorker | FromJob)
