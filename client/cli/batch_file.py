"""The two files of `ebb batch`: what to ask, and what became of it so far.

What to ask: a JSON object a line, with `prompt`, `chat` or `ids`, an `id` if wanted, and options. What became of it: a
JSON object a line, written when it is there; `input` is a hash of the line that it answers, the model and how it was
sampled, so that answers to another file, or of another model, are never taken for this one's. A line is written in one
go: only the last one can be torn by a kill, and it is taken away at the next start, as are failures, which are tried
again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Final

import msgspec

from ...formats.errors import EbbflowError, InvalidRequest, storage_failed
from ...formats.messages import Finished
from ...formats.values import ChatMessage
from ..batch import PRIORITY, BatchResult, BatchText
from ..prompts import GenerateOptions, SamplingOptions, contents, request

Id = str | int
BEGINNING: Final = b'{"index":'  # of each line of ours
SHOWN: Final = 10  # wrong lines that are named


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    prompt: str | msgspec.UnsetType = msgspec.UNSET
    chat: list[ChatMessage] | msgspec.UnsetType = msgspec.UNSET
    ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    id: Id | msgspec.UnsetType = msgspec.UNSET
    max_tokens: int | msgspec.UnsetType = msgspec.UNSET
    temperature: float | msgspec.UnsetType = msgspec.UNSET
    top_k: int | msgspec.UnsetType = msgspec.UNSET
    top_p: float | msgspec.UnsetType = msgspec.UNSET
    seed: int | msgspec.UnsetType = msgspec.UNSET
    stop: str | list[str] | msgspec.UnsetType = msgspec.UNSET
    priority: int | msgspec.UnsetType = msgspec.UNSET
    deadline: float | str | msgspec.UnsetType = msgspec.UNSET
    namespace: str | msgspec.UnsetType = msgspec.UNSET
    exact_prefix: bool | msgspec.UnsetType = msgspec.UNSET


class Failure(msgspec.Struct):
    """An error, as a line has it."""

    code: str
    message: str


class Written(msgspec.Struct, omit_defaults=True):
    """A line of what became of it: `text` and how it ended, or `error`."""

    index: int
    input: str
    id: Id | None = None
    text: str | None = None
    reason: str | None = None
    tokens: int | None = None
    prompt_tokens: int | None = None
    reused_tokens: int | None = None
    error: Failure | None = None


@dataclass(frozen=True)
class Question:
    """A line of what to ask: its number among them (from 0), its id if it has one, a hash of it and of what answers."""

    index: int
    id: Id | None
    input: str
    ask: BatchText


_TEXTS: Final = ("prompt", "chat", "ids")
_lines: Final = msgspec.json.Decoder(_Line)
_written: Final = msgspec.json.Decoder(Written)


def read_questions(file: str, content: bytes, model: str, options: GenerateOptions) -> list[Question]:
    """All lines but empty ones, to ask `model`. Raises `InvalidRequest`, naming each line that cannot be asked."""
    questions: list[Question] = []
    wrong: list[str] = []
    known: dict[Id, int] = {}
    sampled = sorted((name, value) for name, value in options.items() if name in SamplingOptions.__annotations__)
    answerer = msgspec.json.encode([model, sampled])
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            question = _question(len(questions), line.strip(), options, answerer)
        except InvalidRequest as error:
            wrong.append(f"line {number}: {error}")
            continue
        if question.id is not None and question.id in known:
            wrong.append(f"line {number}: the id {question.id!r} is that of line {known[question.id]}, too")
        elif question.id is not None:
            known[question.id] = number
        questions.append(question)
    if wrong:
        more = f"\n... and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise InvalidRequest("\n".join([f"{file} has lines that cannot be asked", *wrong[:SHOWN]]) + more)
    return questions


def _question(index: int, line: bytes, options: GenerateOptions, answerer: bytes) -> Question:
    try:
        line.decode("utf-8")
        parsed = _lines.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"{error}") from error
    given: dict[str, Any] = {
        name: value for name in parsed.__struct_fields__ if (value := getattr(parsed, name)) is not msgspec.UNSET
    }
    id_ = given.pop("id", None)
    texts = [given.pop(name) for name in _TEXTS if name in given]
    if len(texts) != 1 or texts[0] == []:
        raise InvalidRequest("give a prompt, a chat or ids, not empty, and exactly one of them")
    ask = BatchText(texts[0], given)  # type: ignore[arg-type]
    request("", contents(ask.text), {"priority": PRIORITY, **options, **ask.options})
    return Question(index, id_, hashlib.blake2b(answerer + line, digest_size=8).hexdigest(), ask)


class Answers:
    """The file of answers, open for more. `done`: numbers of the questions that are answered."""

    def __init__(self, file: FileIO, path: Path, done: frozenset[int]) -> None:
        self._file, self._path = file, path
        self.done = done

    def write(self, question: Question, result: BatchResult) -> None:
        """Add a line, at once and in one go. Raises `StorageFailed`."""
        line = msgspec.json.encode(_line(question, result.text, result.finished, result.error)) + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise storage_failed(error, self._path) from error


def _line(question: Question, text: str | None, finished: Finished | None, error: EbbflowError | None) -> Written:
    line = Written(question.index, question.input, question.id)
    if finished is not None:
        line.text, line.reason, line.tokens = text, finished.reason, finished.tokens
        line.prompt_tokens, line.reused_tokens = finished.prompt_tokens, finished.reused_tokens
    if error is not None:
        line.error = Failure(error.code, str(error))
    return line


@contextmanager
def open_answers(path: Path, questions: Sequence[Question]) -> Iterator[Answers]:
    """The answers so far, and nobody else's hands on them. Raises `StorageFailed`, or `InvalidRequest` when the file
    is not one of answers to these questions, or is being written; it then stays as it is.
    """
    try:
        file, done = _opened(path, questions)
    except OSError as error:
        raise storage_failed(error, path) from error
    with file:
        yield Answers(file, path, done)


def _opened(path: Path, questions: Sequence[Question]) -> tuple[FileIO, frozenset[int]]:
    file = path.open("ab+", buffering=0)
    try:
        _lock(file, path)
        file.seek(0)
        kept, done, whole = _keep(path, file.readall() or b"", questions)
        return file if whole else _replaced(file, path, kept), done
    except BaseException:
        file.close()
        raise


def _lock(file: FileIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InvalidRequest(f"{path} is being written by another `ebb batch`") from error


def _keep(path: Path, content: bytes, questions: Sequence[Question]) -> tuple[bytes, frozenset[int], bool]:
    """The lines to keep, whose they are, and whether those are all that there is."""
    by_id: Mapping[Id, Question] = {question.id: question for question in questions if question.id is not None}
    done: set[int] = set()
    kept: list[bytes] = []
    *lines, torn = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            written = _written.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRequest(f"{path}, line {number} is no answer of `ebb batch`: {error}") from error
        question = by_id.get(written.id) if written.id is not None else _at(questions, written.index)
        if question is None or question.input != written.input:
            raise InvalidRequest(
                f"{path}, line {number} answers another question, or for another model or sampling; name another file "
                "with -o"
            )
        if written.error is None and question.index not in done:
            done.add(question.index)
            kept.append(line + b"\n")
    if not (torn.startswith(BEGINNING) or BEGINNING.startswith(torn)):
        raise InvalidRequest(f"{path} is no file of answers; name another one with -o")
    return b"".join(kept), frozenset(done), not torn and len(kept) == len(lines)


def _at(questions: Sequence[Question], index: int) -> Question | None:
    found = questions[index] if 0 <= index < len(questions) else None
    return found if found and found.id is None else None


def _replaced(before: FileIO, path: Path, content: bytes) -> FileIO:
    """The file with that content only; whatever happens, it has the old content or the new one."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_bytes(content)
    file = temporary.open("ab", buffering=0)
    _lock(file, path)
    temporary.replace(path)
    before.close()
    return file
