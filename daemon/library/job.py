"""`python -m ebbflow.daemon.library.job ADDRESS IDENTITY LIBRARY CACHE REQUEST`: adds or copies one model.

`REQUEST` is an `AddModel`, `ImportModel` or `ExportModel` as JSON. Says `Ready`, `Progress` ... and then `Added` or
`Failed`, each with the request's id, and exits with 0 whenever it could say so. SIGTERM cancels. What is added, and
how, is `add`'s business, what is copied `carry`'s; whoever reads a death without last words (kill -9, the kernel's
out-of-memory killer) is the supervisor.

`EBBFLOW_JOB_MEMORY` (a size such as 8GB) caps the process's own memory; beyond it the job fails with `OutOfMemory`.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Final

import msgspec

from ...formats.child_messages import Ready
from ...formats.errors import Cancelled, EbbflowError, InternalError, InvalidRequest, OutOfMemory
from ...formats.messages import Added, AddModel, ExportModel, ImportModel, JobRequest, Progress, failure
from ...formats.units import format_size, parse_size
from ...formats.wire import Message
from ...kernels.cache import use_cache
from ..channel import Child
from ..process import MEMORY_VARIABLE, die_with_parent, set_oom_score
from .carry import carry_model

OOM_SCORE: Final = 800  # before the worker: a job can be run again, an answer cannot
NICENESS: Final = 10
CANCELLED: Final = "adding the model was cancelled; the library is as it was"
USAGE: Final = "usage: python -m ebbflow.daemon.library.job ADDRESS IDENTITY LIBRARY CACHE REQUEST"

Send = Callable[[Message], None]


class Cancellation:
    """Turns SIGTERM into `Cancelled`, once, so that cleaning up is not interrupted by a second signal.

    What a signal handler raises may be lost in a callback of C code, or come out of it as another error (seen: a
    `ValueError` from torch about the shape of a storage). So `asked` is the truth, and `check` raises it again.
    """

    def __init__(self) -> None:
        self.asked = False

    def listen(self) -> None:
        """Take over the process's signals."""
        signal.signal(signal.SIGTERM, self._cancel)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the supervisor

    def check(self) -> None:
        """Raises `Cancelled` if somebody asked."""
        if self.asked:
            raise Cancelled(CANCELLED)

    def close(self) -> None:
        """From now on it is too late to cancel. Raises `Cancelled` if somebody asked before."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.check()

    def _cancel(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.asked = True
        self.check()


def main(arguments: list[str]) -> int:
    """Run one job; the process's exit code."""
    if len(arguments) != 5:
        print(USAGE, file=sys.stderr)  # noqa: T201 - it has no other way to say so
        return InvalidRequest.exit_code
    cancellation = Cancellation()
    cancellation.listen()
    die_with_parent(by=signal.SIGTERM)
    set_oom_score(OOM_SCORE)
    os.nice(NICENESS)
    address, identity, library, cache, text = arguments
    use_cache(Path(cache) / "encoding")  # not the worker's, which must find all of its kernels there or none
    request = msgspec.json.decode(text, type=JobRequest)
    channel = Child(address, identity)
    try:
        channel.send(Ready(pid=os.getpid()))
        channel.send(outcome(request, Path(library), Path(cache), channel.send, cancellation))
    finally:
        channel.close()
    return 0


def outcome(request: JobRequest, library: Path, cache: Path, send: Send, cancellation: Cancellation) -> Message:
    """Do it; `Added`, or `Failed` for whatever went wrong. An unexpected error's traceback goes to the log."""
    try:
        if isinstance(request, AddModel):
            return _add(request, library, cache, send, cancellation)
        return _carry(request, library, send, cancellation)
    except Exception as error:  # noqa: BLE001 - the last line of defence: every request gets a reply
        return failure(request.id, _named(error, request.name, cancellation.asked))


def _named(error: Exception, name: str, cancelled: bool) -> EbbflowError:
    """What the client is told about `error`."""
    if cancelled:
        return Cancelled(CANCELLED)
    if isinstance(error, EbbflowError):
        return error
    if isinstance(error, MemoryError) or _is_allocation_failure(error):
        return OutOfMemory(f"not enough memory to add this model: {error}")
    traceback.print_exception(error)
    return InternalError(f"adding {name} met a bug: {type(error).__name__}: {error}")


def _add(request: AddModel, library: Path, cache: Path, send: Send, cancellation: Cancellation) -> Message:
    begun = time.monotonic()
    _limit_memory()
    # Read when torch loads OpenMP. A low-priority thread that spins while it waits for another takes the processor the
    # other needs: with one busy neighbour on two cores, adding a tiny model took over 90 s instead of 12.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A second of import, during which SIGTERM and the memory cap hold already.
    try:
        import torch

        from .add import add_model
    except (ImportError, OSError) as error:
        raise _unloadable(error) from error
    torch.set_num_threads(len(os.sched_getaffinity(0)))

    def tell(progress: Progress) -> None:
        cancellation.check()
        send(progress)

    summary = add_model(request, library, cache, tell, commit=cancellation.close)
    return Added(id=request.id, summary=summary, seconds=time.monotonic() - begun)


def _carry(request: ImportModel | ExportModel, library: Path, send: Send, cancellation: Cancellation) -> Message:
    begun = time.monotonic()

    def tell(progress: Progress) -> None:
        cancellation.check()
        send(progress)

    return Added(id=request.id, summary=carry_model(request, library, tell), seconds=time.monotonic() - begun)


def _limit_memory() -> None:
    wish = os.environ.get(MEMORY_VARIABLE)
    if wish:
        nbytes = parse_size(wish)
        resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes))


def _unloadable(error: ImportError | OSError) -> Exception:
    """Libraries that find no room say so in many ways; under a cap that is the likely reason."""
    cap = os.environ.get(MEMORY_VARIABLE)
    return OutOfMemory(f"no room for torch in {format_size(parse_size(cap))}: {error}") if cap else error


def _is_allocation_failure(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
