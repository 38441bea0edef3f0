"""What processes say to each other: one frozen type per message, msgpack on the wire.

A message travels as two frames: `HEADER` (magic and protocol version, so that a stranger is refused politely) and the
msgpack body, a map tagged with the type's name. Unknown fields are ignored; optional fields may be added at any time.

Clients and the supervisor speak `Request` and `Event`. `id` is chosen by the asker and unique among its open requests;
every request but `Cancel` and `Ping` is answered by any number of non-terminal events (`Started`, `Chunk`, `Progress`)
and then exactly one terminal event. The supervisor speaks to its worker in the same words, with ids of its own, plus
the `ToWorker`, `FromWorker` and `FromJob` types below.
"""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec

from .architecture import Architecture
from .errors import EbbflowError, InvalidRequest, UnsupportedVersion
from .manifest import CurvePoint
from .units import AUTO, SizeWish

PROTOCOL: Final = 1
MAGIC: Final = b"EBB"
HEADER: Final = MAGIC + bytes([PROTOCOL])
MAX_MESSAGE: Final = 2_000_000
PING_SECONDS: Final = 2.0
LEASE_SECONDS: Final = 10.0
ERROR_LETTERS: Final = 4_000  # of an error on the wire: it may quote what somebody sent, at any length


class Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, kw_only=True):
    """Root of everything on the wire."""


# -- values inside messages ---------------------------------------------------------------------------------------


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn of a conversation; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How the next token is chosen. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 switch those filters off."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises `InvalidRequest` naming the first value out of range."""
        limits = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1"),
            ("stop", len(self.stop) <= 16 and all(self.stop), "at most 16 strings, none empty"),
        )
        for name, valid, wanted in limits:
            if not valid:
                raise InvalidRequest(f"{name} must be {wanted}, not {getattr(self, name)!r}")


class Residency(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker holds of one model. All sizes in bytes; `reason` says why it is this size and not another.

    `arrived_nbytes`: how much of the stack is on disk, while its file is still arriving.
    `prompt_tokens` were asked for since the model was loaded, of which `reused_tokens` had been computed before, and
    `preemptions` times a request gave its place to another and went on later. Of `kv_nbytes`, which stay within
    `kv_limit_nbytes`, `kv_cached_nbytes` belong to no running request; `kv_pinned_nbytes` to pins.
    Beside the stack (`nbytes`) these are keys and values, the work space of steps, and of that the part that is kept
    only so that the next step finds it (`cache_nbytes`). An automatic size stays between floor and cap (0: none).
    """

    model: str
    blocks: int
    total_blocks: int
    nbytes: int
    total_nbytes: int
    base_nbytes: int
    target_nbytes: int
    kv_nbytes: int = 0
    running: int = 0
    waiting: int = 0
    tokens_per_second: float = 0.0
    arrived_nbytes: int | None = None
    wish: SizeWish = AUTO
    reason: str = ""
    work_nbytes: int = 0
    cache_nbytes: int = 0
    floor_nbytes: int = 0
    cap_nbytes: int = 0
    priority: float = 1.0
    kv_limit_nbytes: int = 0
    kv_cached_nbytes: int = 0
    kv_pinned_nbytes: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    preemptions: int = 0


class PinSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A prefix whose keys and values are kept: `tokens` of it are (whole blocks only), in `nbytes` bytes.

    `saved`: on disk too, for the next start. `current`: computed at no less than the quality that the model has now; a
    pin that is not is computed again when nothing else is to do.
    """

    name: str
    tokens: int
    nbytes: int
    saved: bool = False
    current: bool = True


class ProcessMemory(msgspec.Struct, frozen=True, kw_only=True):
    """One of our processes as the kernel counts it (smaps_rollup): private bytes and bytes swapped out."""

    role: str
    pid: int
    private_nbytes: int
    swapped_nbytes: int = 0


class ModelSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A line of `ebb list`. `arrived_nbytes`: what is there of a stack whose file is still arriving."""

    name: str
    family: str
    codec: str
    nbytes: int
    base_nbytes: int
    original_nbytes: int
    created: str
    arrived_nbytes: int | None = None


# -- client to supervisor (and, with its own ids, supervisor to worker) -------------------------------------------


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
    """Compute the prefix `prompt`, `ids` or `chat` once and keep its keys and values as `name`, until `Unpin`.

    `save`: on disk too, so that they are there after a restart. A pin of that name is replaced. Answered by `Pinned`.
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
    """Read the checkpoint at `source` (a folder, absolute, or a hub id) into the library. `Progress`, then `Added`."""

    id: int
    source: str
    name: str
    codec: str = "nested"
    levels: int | None = None
    rank: int | None = None
    order: str = "gain"
    calibration: str | None = None
    seed: int = 0


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


# -- supervisor to client (and worker or job to supervisor) -------------------------------------------------------


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
    """Terminal answer to `ShowModel`."""

    id: int
    summary: ModelSummary
    architecture: Architecture
    source: str
    checksum: str
    options: dict[str, str | int | float]
    blocks: int
    curve: tuple[CurvePoint, ...]


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


# -- supervisor to worker, worker and job to supervisor -----------------------------------------------------------


class LoadModel(Message, frozen=True):
    """Open the model in `folder` and hold up to `target_nbytes` of its stack. Answered by `Report` or `LoadFailed`."""

    model: str
    folder: str
    target_nbytes: int


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

TERMINAL: Final = (Finished, Failed, Pinned, Pins, ModelList, ModelDetail, Added, Resized, Status, Done)

M = TypeVar("M")

_encoder = msgspec.msgpack.Encoder()
request_decoder: Final = msgspec.msgpack.Decoder(Request)
event_decoder: Final = msgspec.msgpack.Decoder(Event)
to_worker_decoder: Final = msgspec.msgpack.Decoder(ToWorker)
from_child_decoder: Final = msgspec.msgpack.Decoder(FromWorker | FromJob)


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


def failure(id: int, error: EbbflowError) -> Failed:  # noqa: A002 - the wire's own word
    """The terminal event for an error. It can always be sent."""
    return Failed(id=id, code=error.code, message=in_short(error))


def in_short(error: EbbflowError) -> str:
    """An error's message, cut where it is so long that it might not fit in one of ours."""
    text = str(error)
    return text if len(text) <= ERROR_LETTERS else text[:ERROR_LETTERS] + " ..."
