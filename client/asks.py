"""What can be asked of the daemon: how each request is made and what its replies mean. Of text: `prompts`.

Pure, and shared by `Client` and `AsyncClient`: they differ only in how they wait. An `Ask` makes a request once it has
an id; a `Reader` turns the replies to it into pieces (text, progress), one result, or one typed error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypedDict, TypeVar

import msgspec

from ..formats.errors import Cancelled, InternalError, InvalidRequest, from_wire
from ..formats.messages import (
    Added,
    AddModel,
    Chunk,
    Done,
    ExportModel,
    Failed,
    GetStatus,
    ImportModel,
    ListModels,
    ModelDetail,
    ModelList,
    Pause,
    Ping,
    Progress,
    RemoveModel,
    Request,
    Resize,
    Resized,
    Resume,
    ShowModel,
    Shutdown,
    Started,
    Status,
    Terminal,
    YieldMemory,
)
from ..formats.paths import check_name
from ..formats.pruning import read_pruning
from ..formats.units import SizeWish, parse_seconds, parse_size, parse_wish
from ..formats.values import ModelSummary
from .exchange import Reply, Watch

Piece = TypeVar("Piece")
Result = TypeVar("Result")
T = TypeVar("T")


class AddOptions(TypedDict, total=False):
    """Keyword arguments of `add`; see `AddModel` for meanings and defaults."""

    codec: str
    levels: int | None
    rank: int | None
    order: str
    calibration: str | Path | None
    seed: int
    sparsity: float | None
    pattern: str | None
    method: str | None
    values: str | None
    masks_of: str | None


class Terms(TypedDict, total=False):
    """Keyword arguments of `resize`, each left as it was when absent; see `Resize`. Sizes as in `300MB`, 0 for none."""

    floor: str | int
    cap: str | int
    priority: float


@dataclass(frozen=True)
class Ask(Generic[Piece, Result]):
    """A request that lacks its id, what a reply on the way is worth, and what the terminal one means."""

    request: Callable[[int], Request | Watch]
    piece: Callable[[Reply], Piece | None]
    result: Callable[[Terminal], Result]


class Reader(Generic[Piece, Result]):
    """Reads the replies to one ask, in order."""

    def __init__(self, ask: Ask[Piece, Result]) -> None:
        self._ask = ask
        self.started: Started | None = None
        self.ended = False
        self.notify: Callable[[Progress], None] = nothing
        self._terminal: Terminal | None = None

    def read(self, reply: Reply) -> Piece | None:
        """The piece in a reply, if any. Raises the error that the daemon, or the connection, reports."""
        match reply:
            case Started():
                self.started = reply
                return None
            case Chunk() | Progress():
                piece = self._ask.piece(reply)
                if piece is None and isinstance(reply, Progress):
                    self.notify(reply)
                return piece
            case _:
                self.ended = True
                self._terminal = reply
                self.outcome()
                return None

    @property
    def result(self) -> Result | None:
        """The result, if that is how the request ended."""
        if self._terminal is None or isinstance(self._terminal, Failed):
            return None
        return self._ask.result(self._terminal)

    def outcome(self) -> Result:
        """The result, after the end. Raises the request's error, or `Cancelled` when its reader gave up before."""
        if self._terminal is None:
            raise Cancelled("closed before its end")
        if isinstance(self._terminal, Failed):
            raise from_wire(self._terminal.code, self._terminal.message)
        return self._ask.result(self._terminal)


def expect(kind: type[T]) -> Callable[[Terminal], T]:
    """What takes a terminal event of that kind and raises `InternalError` for any other."""

    def result(terminal: Terminal) -> T:
        if not isinstance(terminal, kind):
            raise InternalError(f"the daemon answered {type(terminal).__name__} where {kind.__name__} was wanted")
        return terminal

    return result


def nothing(_reply: Reply) -> None:
    """No piece."""


def text_of(reply: Reply) -> str | None:
    """The text that came, if any."""
    return reply.text if isinstance(reply, Chunk) and reply.text else None


def _progress(reply: Reply) -> Progress | None:
    return reply if isinstance(reply, Progress) else None


def check_names(options: Mapping[str, object], known: type) -> None:
    """Raises `InvalidRequest` for an option that there is not."""
    unknown = sorted(set(options) - set(known.__annotations__))
    if unknown:
        raise InvalidRequest(f"no option {', '.join(unknown)}; there are {', '.join(known.__annotations__)}")


def models() -> Ask[None, tuple[ModelSummary, ...]]:
    """The library's models."""
    listed = expect(ModelList)
    return Ask(lambda id_: ListModels(id=id_), nothing, lambda terminal: listed(terminal).models)


def show(model: str) -> Ask[None, ModelDetail]:
    """Everything the library knows about a model."""
    return Ask(lambda id_: ShowModel(id=id_, model=model), nothing, expect(ModelDetail))


def add(source: str | Path, name: str | None, options: AddOptions) -> Ask[Progress, ModelSummary]:
    """Read a checkpoint into the library; a folder is made absolute and, without `name`, gives its own.

    Raises `InvalidRequest` when `source` looks like a folder and is none or options make no sense, `Unsupported` for
    names of methods and the like that there are not, `InvalidName` when the name is unusable.
    """
    check_names(options, AddOptions)
    location = locate(source)
    chosen = check_name(name if name is not None else location.rstrip("/").rpartition("/")[2])
    calibration = options.get("calibration")
    plain = {**options, "calibration": None if calibration is None else str(_file(Path(calibration)))}
    fields = {"type": "AddModel", "id": 0, "source": location, "name": chosen, **plain}
    try:
        request = msgspec.convert(fields, AddModel)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"options of add: {error}") from error
    read_pruning(request.codec, request.sparsity, request.pattern, request.method, request.values, request.masks_of)
    return Ask(lambda id_: msgspec.structs.replace(request, id=id_), _progress, _summary)


def import_model(source: str | Path, name: str | None) -> Ask[Progress, ModelSummary]:
    """Copy a model's folder into the library, as `name` or as the folder is called.

    Raises `InvalidRequest` when `source` is no folder, `InvalidName` when the name is unusable.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise InvalidRequest(f"{source} is not a folder; give one that `ebb export` made, or one of a library")
    folder = folder.resolve()
    chosen = check_name(name if name is not None else folder.name)
    return Ask(lambda id_: ImportModel(id=id_, source=str(folder), name=chosen), _progress, _summary)


def export_model(model: str, target: str | Path) -> Ask[Progress, ModelSummary]:
    """Copy a model of the library to a new folder."""
    folder = str(Path(target).expanduser().absolute())
    return Ask(lambda id_: ExportModel(id=id_, name=model, target=folder), _progress, _summary)


def _summary(terminal: Terminal) -> ModelSummary:
    return expect(Added)(terminal).summary


def locate(source: str | Path) -> str:
    """An existing folder -> its absolute path; `org/name` as it is. Raises `InvalidRequest` for a missing folder."""
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path.resolve())
    text = str(source)
    if isinstance(source, Path) or path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise InvalidRequest(f"{source} is not a folder; give a Hugging Face model folder or the id of one, org/name")
    return text


def _file(path: Path) -> Path:
    path = path.expanduser()
    if not path.is_file():
        raise InvalidRequest(f"{path} is not a file; calibration wants a text file")
    return path.resolve()


def remove(model: str) -> Ask[None, None]:
    """Delete a model from the library."""
    return Ask(lambda id_: RemoveModel(id=id_, model=model), nothing, _done)


def resize(model: str, size: str | SizeWish, terms: Terms) -> Ask[None, Resized]:
    """Set how much of a model may be resident. Raises `InvalidSize`, or `InvalidRequest` for terms that are none."""
    check_names(terms, Terms)
    wish = size if isinstance(size, SizeWish) else parse_wish(size)
    floor, cap, priority = terms.get("floor"), terms.get("cap"), terms.get("priority")
    if not isinstance(priority, int | float | None):
        raise InvalidRequest(f"a priority is a number, not {priority!r}")
    request = Resize(
        id=0,
        model=model,
        wish=wish,
        floor_nbytes=None if floor is None else _nbytes(floor),
        cap_nbytes=None if cap is None else _nbytes(cap),
        priority=priority,
    )
    return Ask(lambda id_: msgspec.structs.replace(request, id=id_), nothing, expect(Resized))


def _nbytes(size: str | int) -> int:
    return size if isinstance(size, int) else parse_size(size)


def yield_memory(size: str | int, duration: str | float) -> Ask[None, None]:
    """Leave memory free for something else. Raises `InvalidSize` or `InvalidRequest`."""
    nbytes = _nbytes(size)
    seconds = parse_seconds(duration) if isinstance(duration, str) else float(duration)
    return Ask(lambda id_: YieldMemory(id=id_, nbytes=nbytes, seconds=seconds), nothing, _done)


def pause() -> Ask[None, None]:
    """Hold models at their least."""
    return Ask(lambda id_: Pause(id=id_), nothing, _done)


def resume() -> Ask[None, None]:
    """End `pause`."""
    return Ask(lambda id_: Resume(id=id_), nothing, _done)


def status() -> Ask[None, Status]:
    """The daemon, its processes and what they hold."""
    return Ask(lambda id_: GetStatus(id=id_), nothing, expect(Status))


def shutdown() -> Ask[None, None]:
    """Stop the daemon."""
    return Ask(lambda id_: Shutdown(id=id_), nothing, _done)


def ping() -> Ask[None, None]:
    """Hear one word of the daemon."""
    return Ask(lambda _id: Ping(), nothing, _done)


def gone() -> Ask[None, None]:
    """Wait until the connection ends; raises `DaemonGone` then, for that is how its only reply reads."""
    return Ask(lambda _id: Watch(), nothing, _done)


def _done(terminal: Terminal) -> None:
    expect(Done)(terminal)
