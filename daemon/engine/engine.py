"""One model being served: requests in, events out, one step at a time.

Everything here happens between or inside steps, on the step loop's thread. What the steps hold is decided by
`scheduler`, how large they may be by `pace`; where the weights are is `worker/resident`'s business.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...formats.errors import Cancelled, CorruptFile, EbbflowError, InvalidRequest, PromptTooLong
from ...formats.manifest import Manifest
from ...formats.messages import Chunk, Failed, Finished, Generate, Started, failure
from ..settings import DEFAULTS, WorkerSettings
from .batch import Batch
from .kv import KvCache
from .pace import Pace
from .sampler import sample
from .scheduler import Piece, Scheduler, Sequence
from .serving import ServingNetwork
from .tokenizer import TextStream, Tokenizer
from .weights import Weights

_MOST_PER_TOKEN: Final = 128  # characters; the longest tokens in use are runs of so many spaces

EngineEvent = Started | Chunk | Finished | Failed


@dataclass(eq=False)
class _Job:
    """A request that was accepted, and where its answer stands."""

    request: Generate
    sequence: Sequence
    prompt_tokens: int
    text: TextStream
    accepted: float
    first: float | None = None
    untold: list[int] = field(default_factory=list)  # sampled since the last chunk, for a request that may be resumed
    ended: str = ""  # the reason why a resumed one has nothing left to sample

    @property
    def generated(self) -> int:
        return len(self.sequence.tokens) - self.prompt_tokens

    def chunk(self, text: str) -> list[EngineEvent]:
        """The chunk that tells `text` and the tokens behind it; nothing where there is no text."""
        if not text:
            return []
        ids, self.untold = tuple(self.untold), []
        return [Chunk(id=self.sequence.key, text=text, tokens=self.generated, ids=ids)]


class Engine:
    """Serves the model in `folder` from `weights`, whose base is resident.

    Raises `CorruptFile` when the tokenizer cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        weights: Weights,
        threads: int,
        clock: Callable[[], float],
        settings: WorkerSettings = DEFAULTS,
    ) -> None:
        self._manifest, self._clock = manifest, clock
        self._tokenizer = Tokenizer(folder, manifest.bos)
        self._network = ServingNetwork(manifest.architecture, weights, threads, settings.exact)
        self._threads = threads
        self._kv = KvCache(manifest.architecture, settings.kv)
        self._jobs: dict[int, _Job] = {}
        self.scheduler = Scheduler(self._kv)
        self.pace = Pace()
        self.tokens_per_second = 0.0
        self.step_seconds = 0.0  # of the last step

    @property
    def busy(self) -> bool:
        """Whether a step would compute anything."""
        return self.scheduler.busy

    @property
    def kv_nbytes(self) -> int:
        """Bytes of keys and values held."""
        return self._kv.statistics().nbytes

    @property
    def work_nbytes(self) -> int:
        """Bytes of work space held."""
        return self._network.work_nbytes

    @property
    def cache_nbytes(self) -> int:
        """Bytes of it that `trim` would give back: none while a step is due, which would only make it again."""
        return 0 if self.busy else self._network.cache_nbytes

    def trim(self) -> None:
        """Give back what is kept only to be faster next time."""
        if not self.busy:
            self._network.trim()

    def submit(self, request: Generate, ids: Ids[int] = ()) -> list[EngineEvent]:
        """Accept a request, or answer at once with why not.

        `ids`: tokens sampled for it by an earlier worker, whose text has been told (`Chunk.ids`); it goes on after
        them as if it had never stopped, but does not count their time.
        """
        try:
            tokens = self._tokens(request)
            context = self._manifest.architecture.context
            if len(tokens) >= context:
                raise PromptTooLong(
                    f"the prompt has {len(tokens)} tokens; {self._manifest.name} can read {context - 1} and answer in "
                    "what is left: shorten it"
                )
            limit = min(context, len(tokens) + request.sampling.max_tokens)
            # an answer begins a text of its own; a continuation may begin with a space
            stream = self._tokenizer.stream(request.sampling.stop, () if request.chat is not None else tokens)
            job = _Job(request, Sequence(request.id, list(tokens), limit), len(tokens), stream, self._clock())
            self._replay(job, ids)
            if not job.ended:
                self.scheduler.submit(job.sequence)
        except EbbflowError as error:
            return [failure(request.id, error)]
        self._jobs[request.id] = job
        return [self._finish(job, job.ended)] if job.ended else []

    def cancel(self, key: int) -> list[EngineEvent]:
        """End a request; an unknown one was answered already."""
        job = self._jobs.pop(key, None)
        if job is None:
            return []
        self.scheduler.finish(job.sequence)
        return [failure(key, Cancelled("the request was cancelled"))]

    def cancel_all(self) -> list[EngineEvent]:
        """End every request, because the model goes."""
        return [event for key in list(self._jobs) for event in self.cancel(key)]

    def step(self) -> list[EngineEvent]:
        """Admit, compute one step, sample; what to tell whom."""
        admitted = self.scheduler.admit()
        events: list[EngineEvent] = [Started(id=s.key, prompt_tokens=self._jobs[s.key].prompt_tokens) for s in admitted]
        pieces = self.scheduler.plan(self.pace.limit)
        if not pieces:
            return events
        began = self._clock()
        logits = self._forward(pieces)
        for row, piece in enumerate(p for p in pieces if p.samples):
            events += self._take(self._jobs[piece.sequence.key], logits[row])
        for piece in pieces:
            piece.sequence.computed = piece.start + piece.count
        self.step_seconds = seconds = self._clock() - began
        self.pace.record(sum(piece.count for piece in pieces), seconds)
        if len(logits):
            self.tokens_per_second += 0.2 * (len(logits) / max(seconds, 1e-9) - self.tokens_per_second)
        return events

    def _tokens(self, request: Generate) -> list[int]:
        written = len(request.prompt or "") + sum(len(turn.content) for turn in request.chat or ())
        if written > _MOST_PER_TOKEN * self._manifest.architecture.context:
            # said before the text is cut into tokens, which for megabytes takes seconds that others wait
            raise PromptTooLong(f"the prompt has {written} characters, more than {self._manifest.name} can ever read")
        if request.chat is not None:
            tokens = self._tokenizer.render_chat(request.chat)
        else:
            tokens = self._tokenizer.encode(request.prompt or "")
        tokens = tokens or [self._manifest.bos or 0]
        if not (min(tokens) >= 0 and max(tokens) < self._manifest.architecture.vocab):
            raise CorruptFile(f"{self._manifest.name}'s tokenizer knows tokens that the model does not; add it again")
        return tokens

    def _forward(self, pieces: list[Piece]) -> Any:
        """Logits `[pieces that sample, v]`."""
        batch = Batch(pieces, self._kv.array, self._manifest.architecture, self._threads)
        rows = [int(last) for last, piece in zip(batch.last, pieces, strict=True) if piece.samples]
        return self._network.logits(batch, rows)

    def _take(self, job: _Job, logits: Any) -> list[EngineEvent]:
        """Sample one token for a request; its text, and its end if this was it."""
        sequence = job.sequence
        if not np.isfinite(logits).all():
            return [self._break(job)]
        token = sample(logits, job.request.sampling, len(sequence.tokens))
        job.first = job.first or self._clock()
        if job.request.resume:
            job.untold.append(token)
        text, reason = self._append(job, token)
        if reason:
            text += job.text.finish()
        events = job.chunk(text)
        if reason:
            events.append(self._finish(job, reason))
        return events

    def _append(self, job: _Job, token: int) -> tuple[str, str]:
        """Put a sampled token where it belongs: the text it makes certain, and the reason to end, if there is one."""
        sequence = job.sequence
        if token in self._manifest.eos:
            return "", "stop"
        sequence.tokens.append(token)
        text = job.text.push(token)
        return text, "stop" if job.text.stopped else "length" if len(sequence.tokens) >= sequence.limit else ""

    def _replay(self, job: _Job, ids: Ids[int]) -> None:
        """Bring a request to where an earlier worker had it. Raises `InvalidRequest` for impossible tokens."""
        for token in ids:
            if job.ended or not 0 <= token < self._manifest.architecture.vocab:
                raise InvalidRequest("the request cannot be resumed: these are not the tokens of its answer")
            _, job.ended = self._append(job, token)

    def _break(self, job: _Job) -> Failed:
        """Finite weights can be so large that what they give is not: there is no token to choose."""
        del self._jobs[job.sequence.key]
        self.scheduler.finish(job.sequence)
        name = self._manifest.name
        return failure(job.sequence.key, CorruptFile(f"{name}'s weights give numbers that overflow; add it again"))

    def _finish(self, job: _Job, reason: str) -> Finished:
        del self._jobs[job.sequence.key]
        self.scheduler.finish(job.sequence)
        now = self._clock()
        return Finished(
            id=job.sequence.key,
            reason=reason,
            prompt_tokens=job.prompt_tokens,
            tokens=job.generated,
            seconds_to_first=(job.first or now) - job.accepted,
            seconds=now - job.accepted,
        )
