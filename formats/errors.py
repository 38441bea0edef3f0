"""Every error a user or a program can meet, in one tree.

::

    EbbflowError
    ├── InvalidRequest            what was asked cannot be asked
    │   ├── InvalidName
    │   ├── InvalidSize
    │   ├── InvalidConfig
    │   ├── UnknownModel
    │   ├── ModelExists
    │   ├── ModelBusy
    │   └── PromptTooLong
    ├── Unsupported               understood, but not something this version does
    │   ├── UnsupportedModel
    │   └── UnsupportedVersion
    ├── CorruptFile               a file is not what it says it is
    │   ├── CorruptStack
    │   │   ├── TruncatedStack
    │   │   ├── BadHeader
    │   │   ├── BadOffsets
    │   │   ├── BadBlock
    │   │   └── UnknownKind
    │   ├── CorruptManifest
    │   └── CorruptCheckpoint
    ├── StorageFailed             the system does not let us read or write a file or folder
    ├── NotAllowed                the daemon does not let us in
    ├── Cancelled                 somebody asked for it to end
    ├── Retryable                 the same request may succeed later
    │   ├── OutOfMemory
    │   ├── DiskFull
    │   ├── TooBusy
    │   ├── WorkerDied
    │   ├── JobDied
    │   ├── LeaseLost
    │   ├── DeadlineExceeded
    │   ├── NotArrived
    │   └── DaemonGone
    │       └── NotRunning
    ├── DaemonFailed              the daemon could not start
    │   └── AlreadyRunning
    ├── ServiceFailed             the service manager did not do what it was asked
    └── InternalError             our bug

Each class carries `code`, its name on the wire, and `exit_code`, what the command line returns for it.
Messages say what was wanted, what was found and what to do.
"""

from __future__ import annotations

from typing import ClassVar


class EbbflowError(Exception):
    """Root of the tree; catch it to catch everything Ebbflow raises on purpose."""

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False


class InvalidRequest(EbbflowError):
    """The request itself is wrong; sending it again cannot help."""

    code = "invalid_request"
    exit_code = 2


class InvalidName(InvalidRequest):
    """A model name that is not letters, digits, dots, dashes and underscores."""

    code = "invalid_name"


class InvalidSize(InvalidRequest):
    """A size that cannot be parsed, or below what the model needs."""

    code = "invalid_size"


class InvalidConfig(InvalidRequest):
    """A setting that does not exist, or cannot have that value: on the command line, in a variable or a file."""

    code = "invalid_config"


class UnknownModel(InvalidRequest):
    """No model of that name is in the library."""

    code = "unknown_model"
    exit_code = 3


class ModelExists(InvalidRequest):
    """A model of that name is already in the library."""

    code = "model_exists"


class ModelBusy(InvalidRequest):
    """The model is being added, or answers requests, and cannot be changed now."""

    code = "model_busy"


class PromptTooLong(InvalidRequest):
    """The prompt and the tokens asked for do not fit in the model's context."""

    code = "prompt_too_long"


class Unsupported(EbbflowError):
    """Understood, but not something this version can do."""

    code = "unsupported"
    exit_code = 4


class UnsupportedModel(Unsupported):
    """A checkpoint of a family, or with a feature, that the engine does not run."""

    code = "unsupported_model"


class UnsupportedVersion(Unsupported):
    """A file or a peer speaks another version of a format."""

    code = "unsupported_version"


class CorruptFile(EbbflowError):
    """A file is not what it says it is."""

    code = "corrupt_file"
    exit_code = 5


class CorruptStack(CorruptFile):
    """A stack file breaks its specification."""

    code = "corrupt_stack"


class TruncatedStack(CorruptStack):
    """A stack file is shorter than its header says."""

    code = "truncated_stack"


class BadHeader(CorruptStack):
    """The header's length lies, or the header is not the JSON that the specification asks for."""

    code = "bad_header"


class BadOffsets(CorruptStack):
    """Offsets overlap, leave holes, run out of the file, or do not follow the blocks' names."""

    code = "bad_offsets"


class BadBlock(CorruptStack):
    """A block's shape, size, hash or numbers are not what its index entry says."""

    code = "bad_block"


class UnknownKind(CorruptStack):
    """A block kind that this version does not know."""

    code = "unknown_kind"


class CorruptManifest(CorruptFile):
    """A model's manifest cannot be read."""

    code = "corrupt_manifest"


class CorruptCheckpoint(CorruptFile):
    """A source checkpoint is incomplete, inconsistent or holds NaN or infinity."""

    code = "corrupt_checkpoint"


class StorageFailed(EbbflowError):
    """The system does not let us read or write a file or folder: no right, a read-only disk, a broken one."""

    code = "storage_failed"
    exit_code = 74


class NotAllowed(EbbflowError):
    """The daemon does not let this client in: no key, or not one that is allowed; made by the client itself."""

    code = "not_allowed"
    exit_code = 77


class Cancelled(EbbflowError):
    """The request was cancelled, by its client or because the daemon stops."""

    code = "cancelled"
    exit_code = 130


class Retryable(EbbflowError):
    """Nothing is wrong with the request: the same one may succeed later."""

    code = "retryable"
    exit_code = 75
    retryable = True


class OutOfMemory(Retryable):
    """Not enough memory now for the smallest form of what was asked."""

    code = "out_of_memory"


class DiskFull(Retryable):
    """The library's disk has no room; nothing was added."""

    code = "disk_full"


class TooBusy(Retryable):
    """A limit on waiting requests, or on what one client may leave unread, was reached."""

    code = "too_busy"


class WorkerDied(Retryable):
    """The process that held the model died; the next request starts another."""

    code = "worker_died"


class JobDied(Retryable):
    """The process that added a model died; the library is as it was."""

    code = "job_died"


class LeaseLost(Retryable):
    """The daemon heard nothing of this client for so long (it was stopped, perhaps) that it gave the request up."""

    code = "lease_lost"


class DeadlineExceeded(Retryable):
    """The request had not ended when its deadline was there."""

    code = "deadline_exceeded"


class NotArrived(Retryable):
    """The model is still being copied, and not even the least of it that makes a model is there."""

    code = "not_arrived"


class DaemonGone(Retryable):
    """The daemon stopped answering (then made by the client itself), or is about to."""

    code = "daemon_gone"
    exit_code = 69


class NotRunning(DaemonGone):
    """Nobody listens where the daemon would; made by the client itself."""

    code = "not_running"


class DaemonFailed(EbbflowError):
    """The daemon could not be started."""

    code = "daemon_failed"
    exit_code = 69


class AlreadyRunning(DaemonFailed):
    """Another daemon holds this runtime folder's lock."""

    code = "already_running"
    exit_code = 73  # its own, so that a client that lost the race to start one can tell


class ServiceFailed(EbbflowError):
    """The service manager is not there, or did not do what it was asked."""

    code = "service_failed"
    exit_code = 69


class InternalError(EbbflowError):
    """A bug of ours; the log has the traceback."""

    code = "internal"
    exit_code = 70


def _tree(root: type[EbbflowError]) -> dict[str, type[EbbflowError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


BY_CODE: dict[str, type[EbbflowError]] = _tree(EbbflowError)


def storage_failed(error: OSError, where: object) -> StorageFailed:
    """What the system said, of the file that it named or else of `where`."""
    return StorageFailed(f"{error.filename or where}: {error.strerror or error}")


def from_wire(code: str, message: str) -> EbbflowError:
    """The error that a peer named; an unknown code (a newer peer) becomes `EbbflowError` itself."""
    return BY_CODE.get(code, EbbflowError)(message)
