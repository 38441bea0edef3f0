"""What clients and the supervisor say to each other: one frozen type per message. How they travel is in `wire`.

Clients send a `Request` and hear `Event`s. `id` is chosen by the asker and unique among its open requests; every
request but `Cancel` and `Ping` is answered by any number of non-terminal events (`Started`, `Chunk`, `Progress`) and
then exactly one terminal event. The supervisor speaks to its worker in the same words, and in those of
`child_messages`.
"""

from __future__ import annotations

from typing import Final

import msgspec

from .architecture import Architecture
from .errors import EbbflowError
from .manifest import CurvePoint
from .units import SizeWish
from .values import ChatMessage, ModelSummary, PinSummary, ProcessMemory, Residency, Sampling
from .wire import Message

PING_SECONDS: Final = 2.0
LEASE_SECONDS: Final = 10.0
OPEN_PER_CLIENT: Final = 1024  # requests that one client may have open
ERROR_LETTERS: Final = 4_000  # of an error on the wire: it may quote what somebody sent, at any length


class Ping(Message, frozen=True):
    """Keeps the client's lease; answered by `Pong`.

    `open` are the requests that the client still waits for: each one that the daemon does not have (any more) gets
    `Failed(lease_lost)`. So a client that was stopped for longer than its lease hears of the end it slept through.
    """

    open: tuple[int, ...] = ()


class Generate(Message, frozen=True):
    """Continue `prompt`, or the token ids `ids`, or answer the conversation `chat`; exactly one of the three is given.

    `resume`: if the worker dies, the answer goes on in the next one where it was, instead of ending in an error.
    Of waiting requests those of higher `priority` go first, and may take the place of running ones of a lower, which
    go on later. A request that has not ended `deadline_seconds` after it arrived (0: no such limit) fails with
    `deadline_exceeded`. Computed prefixes are shared within a `namespace` only, and with those computed at another size
    of the model that is about as good, unless `exact_prefix` asks for the very same. `owner` is set by the supervisor:
    a number for each client, between which the engine is fair.
    """

    id: int
    model: str
    prompt: str | None = None
    chat: tuple[ChatMessage, ...] | None = None
    sampling: Sampling = Sampling()
    resume: bool = False
    ids: tuple[int, ...] | None = None
    priority: int = 0
    deadline_seconds: float = 0.0
    namespace: str = ""
    exact_prefix: bool = False
    owner: int = 0


class Pin(Message, frozen=True):
    """Compute the prefix `prompt`, `ids` or `chat` once and keep its keys and values as `name`, until `Unpin` or until
    the model is unloaded.

    `save`: on disk too, so that they are there when it is loaded again. A pin of that name is replaced. Answered by
    `Pinned`.
    """

    id: int
    model: str
    name: str
    prompt: str | None = None
    chat: tuple[ChatMessage, ...] | None = None
    ids: tuple[int, ...] | None = None
    namespace: str = ""
    save: bool = False


class Unpin(Message, frozen=True):
    """Let the prefix `name` go, and its file. Answered by `Pins`: those that are left."""

    id: int
    model: str
    name: str


class ListPins(Message, frozen=True):
    """Answered by `Pins`."""

    id: int
    model: str


class Cancel(Message, frozen=True):
    """End request `id` of the same sender, which then gets `Failed(cancelled)`; unknown ids are ignored."""

    id: int


class ListModels(Message, frozen=True):
    """Answered by `ModelList`."""

    id: int


class ShowModel(Message, frozen=True):
    """Answered by `ModelDetail`."""

    id: int
    model: str


class AddModel(Message, frozen=True):
    """Read the checkpoint at `source` (a folder, absolute, or a hub id) into the library. `Progress`, then `Added`.

    `rank` is for the codec `bitstack`; `sparsity`, `pattern`, `method` and `values` are for `sparse` (`pruning`), and
    `masks_of`: take the masks of that model of the library as they are, and choose the values only.
    """

    id: int
    source: str
    name: str
    codec: str = "nested"
    levels: int | None = None
    rank: int | None = None
    order: str = "gain"
    calibration: str | None = None
    seed: int = 0
    sparsity: float | None = None
    pattern: str | None = None
    method: str | None = None
    values: str | None = None
    masks_of: str | None = None


class ImportModel(Message, frozen=True):
    """Copy the model in the folder `source` (absolute; a library's or an exported one) into the library, as `name`.

    It answers as soon as its base is there. `Progress` (bytes of the stack), then `Added`. What was copied stays when
    it is cancelled or dies, and the same request goes on from there.
    """

    id: int
    source: str
    name: str


class ExportModel(Message, frozen=True):
    """Copy the model `name` to the new folder `target` (absolute). `Progress`, then `Added`, as for `ImportModel`."""

    id: int
    name: str
    target: str


class RemoveModel(Message, frozen=True):
    """Answered by `Done`."""

    id: int
    model: str


class Resize(Message, frozen=True):
    """Set how much of a model may be resident; remembered if it is not loaded. Answered by `Resized`.

    Absent terms stay as they are; a floor or cap of 0 is none. `priority` multiplies what the model's bytes are worth.
    """

    id: int
    model: str
    wish: SizeWish
    floor_nbytes: int | None = None
    cap_nbytes: int | None = None
    priority: float | None = None


class YieldMemory(Message, frozen=True):
    """Leave so many bytes more free for so many seconds; 0 bytes ends it. Answered by `Done`."""

    id: int
    nbytes: int
    seconds: float = 3600.0


class Pause(Message, frozen=True):
    """Hold automatic models at their least, and unload idle ones, until `Resume`. Answered by `Done`."""

    id: int


class Resume(Message, frozen=True):
    """End `Pause`. Answered by `Done`."""

    id: int


class GetStatus(Message, frozen=True):
    """Answered by `Status`."""

    id: int


class Shutdown(Message, frozen=True):
    """Stop the daemon; answered by `Done` before it goes."""

    id: int


JobRequest = AddModel | ImportModel | ExportModel
Request = (
    Ping
    | Generate
    | Pin
    | Unpin
    | ListPins
    | Cancel
    | ListModels
    | ShowModel
    | JobRequest
    | RemoveModel
    | Resize
    | YieldMemory
    | Pause
    | Resume
    | GetStatus
    | Shutdown
)


class Pong(Message, frozen=True):
    """The daemon is there."""


class Started(Message, frozen=True):
    """Request `id` was admitted; its prompt has this many tokens."""

    id: int
    prompt_tokens: int


class Chunk(Message, frozen=True):
    """More text of request `id`, and how many tokens were generated up to and including it.

    `ids`, from worker to supervisor only: the tokens sampled since the last chunk, the end token among them. All ids of
    an answer in order, decoded again, give exactly the text that its chunks gave.
    """

    id: int
    text: str
    tokens: int
    ids: tuple[int, ...] = ()


class Progress(Message, frozen=True):
    """How far a job is. `done` and `total` count bytes of source weights; `eta_seconds` is absent while unknown.

    A generation gets them too, without figures, when it has to wait for something out of the ordinary (`stage`).
    """

    id: int
    stage: str
    tensor: str = ""
    done: int = 0
    total: int = 0
    eta_seconds: float | None = None


class Finished(Message, frozen=True):
    """Terminal: a generation ended. `reason` is `stop` (end token or stop string) or `length`.

    `queued_seconds` passed before it first ran, `longest_gap_seconds` at most between two of its tokens. Of the
    prompt, `reused_tokens` had been computed for other requests, and `shareable_tokens` could have been, had nothing
    been forgotten. `miss` says why there were not more: `new` (nobody had them), `evicted`, `quality` (computed at a
    smaller size of the model), `size` (an exact prefix was wanted), `short` (less than a block), or nothing. `band` is
    the quality band it ended in, `preemptions` how often it gave its place to another and went on later.
    """

    id: int
    reason: str
    prompt_tokens: int
    tokens: int
    seconds_to_first: float
    seconds: float
    queued_seconds: float = 0.0
    longest_gap_seconds: float = 0.0
    reused_tokens: int = 0
    shareable_tokens: int = 0
    miss: str = ""
    band: int = 0
    preemptions: int = 0


class Pinned(Message, frozen=True):
    """Terminal answer to `Pin`."""

    id: int
    pin: PinSummary


class Pins(Message, frozen=True):
    """Terminal answer to `ListPins` and `Unpin`."""

    id: int
    pins: tuple[PinSummary, ...]


class Failed(Message, frozen=True):
    """Terminal: the request ended with the error of that code (see `errors`)."""

    id: int
    code: str
    message: str


class ModelList(Message, frozen=True):
    """Terminal answer to `ListModels`."""

    id: int
    models: tuple[ModelSummary, ...]


class ModelDetail(Message, frozen=True):
    """Terminal answer to `ShowModel`. `damage`: what was found to be wrong with it since it was loaded."""

    id: int
    summary: ModelSummary
    architecture: Architecture
    source: str
    checksum: str
    options: dict[str, str | int | float]
    blocks: int
    curve: tuple[CurvePoint, ...]
    damage: str = ""


class Added(Message, frozen=True):
    """Terminal: the model is in the library, or where it was to be exported to."""

    id: int
    summary: ModelSummary
    seconds: float


class Resized(Message, frozen=True):
    """Terminal answer to `Resize`.

    `residency` is absent when the model is not loaded (the wish is kept). `released_nbytes` is what the kernel says
    this worker's private memory shrank by (negative: grew), `seconds` from the request to that reading.
    """

    id: int
    residency: Residency | None = None
    released_nbytes: int = 0
    seconds: float = 0.0


class Status(Message, frozen=True):
    """Terminal answer to `GetStatus`. Memory in bytes; `available_source` names what limits `available_nbytes`.

    `reserve_nbytes` is what is left free now, of which `yielded_nbytes` for `yield_seconds` more. `runtime_nbytes` is
    what the worker held before it loaded anything.
    """

    id: int
    version: str
    pid: int
    uptime_seconds: float
    available_nbytes: int
    available_source: str
    reserve_nbytes: int
    models: tuple[Residency, ...] = ()
    processes: tuple[ProcessMemory, ...] = ()
    adding: tuple[str, ...] = ()
    total_nbytes: int = 0  # all the memory that this machine, or container, has
    yielded_nbytes: int = 0
    yield_seconds: float = 0.0
    paused: bool = False
    runtime_nbytes: int = 0


class Done(Message, frozen=True):
    """Terminal: it was done and there is nothing more to say."""

    id: int


Terminal = Finished | Failed | Pinned | Pins | ModelList | ModelDetail | Added | Resized | Status | Done
Event = Pong | Started | Chunk | Progress | Terminal
TERMINAL: Final = (Finished, Failed, Pinned, Pins, ModelList, ModelDetail, Added, Resized, Status, Done)
request_decoder: Final = msgspec.msgpack.Decoder(Request)
event_decoder: Final = msgspec.msgpack.Decoder(Event)


def failure(id: int, error: EbbflowError) -> Failed:  # noqa: A002 - the wire's own word
    """The terminal event for an error. It can always be sent."""
    return Failed(id=id, code=error.code, message=in_short(error))


def in_short(error: EbbflowError) -> str:
    """An error's message, cut where it is so long that it might not fit in one of ours."""
    text = str(error)
    return text if len(text) <= ERROR_LETTERS else text[:ERROR_LETTERS] + " ..."
