"""One model being served: requests in, events out, one step at a time.

Everything here happens between or inside steps, on the step loop's thread. What the steps hold is decided by
`scheduler`, how large they may be by `pace`, pins are `pin_requests`' affair; where the weights are is
`worker/resident`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...formats.errors import (
    Cancelled,
    CorruptFile,
    DeadlineExceeded,
    EbbflowError,
    InvalidRequest,
    OutOfMemory,
    PromptTooLong,
)
from ...formats.manifest import Manifest
from ...formats.messages import Chunk, Failed, Finished, Generate, Pin, Pinned, Started, failure
from ...formats.values import PinSummary
from ..settings import DEFAULTS, WorkerSettings
from .bands import Bands
from .batch import Batch
from .kv import MAX_SEQUENCES, MOST_NBYTES, KvCache
from .pace import Pace
from .pin_requests import PinRequests
from .pins import PinStore
from .sampler import sample
from .scheduler import Scheduler
from .sequences import Piece, Sequence
from .serving import ServingNetwork
from .tokenizer import TextStream, Tokenizer
from .waiting import Policy
from .weights import Weights

_MOST_PER_TOKEN: Final = 128  # characters; the longest tokens in use are runs of so many spaces

EngineEvent = Started | Chunk | Finished | Failed | Pinned


@dataclass(eq=False)
class _Job:
    """A request that was accepted, and where its answer stands."""

    request: Generate
    sequence: Sequence
    prompt_tokens: int
    text: TextStream
    accepted: float
    began: float | None = None
    first: float | None = None
    last: float = 0.0  # when its last token was sampled
    longest_gap: float = 0.0
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

    Of the saved pins `pins_nbytes` are read back. Raises `CorruptFile` when the tokenizer cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        weights: Weights,
        threads: int,
        clock: Callable[[], float],
        settings: WorkerSettings = DEFAULTS,
        policy: Policy | None = None,
        pins_nbytes: int | None = None,
    ) -> None:
        self._manifest, self._clock, self._weights = manifest, clock, weights
        self._tokenizer = Tokenizer(folder, manifest.bos)
        self._network = ServingNetwork(manifest.architecture, weights, threads, settings.exact)
        self._threads = threads
        self._kv = KvCache(manifest.architecture, settings.kv, settings.kv_limit or MOST_NBYTES)
        self._jobs: dict[int, _Job] = {}
        self._bands = Bands(manifest.curve, weights.blocks, manifest.blocks)
        self._most = MAX_SEQUENCES  # that may run; fewer after a step for which there was no memory
        self.scheduler = Scheduler(self._kv, policy, settings.kv_cached // self._kv.block_nbytes)
        store = PinStore(folder, manifest, settings.kv, self.scheduler, self._kv.array, pins_nbytes)
        self.pins = PinRequests(store, self.scheduler)
        self.pace = Pace()
        self.scheduler_seconds = 0.0  # spent on deciding, so far
        self.tokens_per_second = 0.0
        self.step_seconds = 0.0  # of the last step

    @property
    def busy(self) -> bool:
        """Whether a step would compute anything."""
        return self.scheduler.busy or self.pins.stale(self._band)

    @property
    def _band(self) -> int:
        """The quality that the model has now."""
        return self._bands.of(self._weights.blocks)

    @property
    def kv_nbytes(self) -> int:
        """Bytes of keys and values held."""
        return self._kv.held * self._kv.block_nbytes

    @property
    def kv_limit_nbytes(self) -> int:
        """Bytes of them that may be held now."""
        return self._kv.limit * self._kv.block_nbytes

    @property
    def kv_cached_nbytes(self) -> int:
        """Bytes of them that no running request uses and no pin keeps."""
        return self.scheduler.prefixes.evictable * self._kv.block_nbytes

    @property
    def kv_pinned_nbytes(self) -> int:
        """Bytes of them that pins keep."""
        return self.scheduler.prefixes.pinned * self._kv.block_nbytes

    @property
    def work_nbytes(self) -> int:
        """Bytes of work space held."""
        return self._network.work_nbytes

    @property
    def cache_nbytes(self) -> int:
        """Bytes that `trim` would give back: no work space while a step is due, which would only make it again."""
        return self.kv_cached_nbytes + (0 if self.busy else self._network.cache_nbytes)

    def trim(self, nbytes: int = 0) -> None:
        """Give back what is kept only to be faster next time: work space, and so much of finished requests' KV."""
        if not self.busy:
            self._network.trim()
        self.scheduler.trim(-(-nbytes // self._kv.block_nbytes))

    def limit_kv(self, nbytes: int) -> None:
        """Hold at most so many bytes of keys and values (0: as many as the settings say)."""
        self.scheduler.set_limit(nbytes // self._kv.block_nbytes if nbytes else self._kv.most)

    def submit(self, request: Generate, ids: Ids[int] = ()) -> list[EngineEvent]:
        """Accept a request, or answer at once with why not.

        `ids`: tokens sampled for it by an earlier worker, whose text has been told (`Chunk.ids`); it goes on after
        them as if it had never stopped, but does not count their time.
        """
        try:
            tokens = self._tokens(request)
            context, now = self._manifest.architecture.context, self._clock()
            sequence = Sequence(
                request.id,
                list(tokens),
                min(context, len(tokens) + request.sampling.max_tokens),
                namespace=request.namespace,
                exact=request.exact_prefix,
                priority=request.priority,
                owner=request.owner,
                deadline=now + request.deadline_seconds if request.deadline_seconds else math.inf,
            )
            # an answer begins a text of its own; a continuation may begin with a space
            stream = self._tokenizer.stream(request.sampling.stop, () if request.chat is not None else tokens)
            job = _Job(request, sequence, len(tokens), stream, now)
            self._replay(job, ids)
            if not job.ended:
                self.pins.postpone()
                self.scheduler.submit(job.sequence)
        except EbbflowError as error:
            return [failure(request.id, error)]
        self._jobs[request.id] = job
        return [self._finish(job, job.ended)] if job.ended else []

    def pin(self, request: Pin) -> list[EngineEvent]:
        """Have a prefix computed and kept; answered when it is, or at once with why not."""
        try:
            self.pins.begin(request, self._tokens(request))
        except EbbflowError as error:
            return [failure(request.id, error)]
        return []

    def unpin(self, name: str) -> None:
        """Let a pin go. Raises what `PinStore.remove` raises."""
        self.pins.unpin(name)

    def pin_summaries(self) -> tuple[PinSummary, ...]:
        """The prefixes that are kept."""
        return self.pins.summaries(self._band)

    def cancel(self, key: int) -> list[EngineEvent]:
        """End a request; an unknown one was answered already. A pin that is being written is answered afterwards."""
        self.pins.store.cancel_saving(key)
        return self._end(key, Cancelled("the request was cancelled"))

    def cancel_all(self) -> list[EngineEvent]:
        """End every request but those for pins that are being written."""
        return [event for key in [*self._jobs, *self.pins.keys] for event in self.cancel(key)]

    def close(self) -> list[EngineEvent]:
        """End every request, because the model goes."""
        return [*self.cancel_all(), *self.pins.close(Cancelled("the model was unloaded"))]

    @property
    def saving(self) -> bool:
        """Whether pins are being written, whose end `settle` will tell."""
        return self.pins.saving

    def settle(self) -> list[EngineEvent]:
        """What has been written since, to tell whoever asked for it."""
        return [*self.pins.settle(self._band)]

    def step(self) -> list[EngineEvent]:
        """Admit, compute one step, sample; what to tell whom."""
        asked = self._clock()
        self.scheduler.set_quality(self._band, self._weights.blocks)
        events = self._expire(asked)
        if not self.scheduler.busy:
            self.pins.renew(self._band)
        # before anything was measured one alone: what is admitted has its token in every step
        admitted = self.scheduler.admit(min(self.pace.limit, self._most) if self.pace.known else 1)
        pieces = self.scheduler.plan(self.pace.limit)
        began = self._clock()
        for job in (self._jobs[s.key] for s in admitted if s.key in self._jobs):
            if job.began is None:
                job.began = began
                events.append(Started(id=job.sequence.key, prompt_tokens=job.prompt_tokens))
        self.scheduler_seconds += began - asked
        if not pieces:
            return events
        try:
            logits = self._forward(pieces)
        except MemoryError:
            return events + self._make_do(pieces)
        computed = self._clock()
        self.scheduler.complete(pieces)
        self.scheduler_seconds += self._clock() - computed
        self._most = min(self._most + 1, MAX_SEQUENCES)
        for row, piece in enumerate(p for p in pieces if p.samples):
            events += self._take(self._jobs[piece.sequence.key], logits[row])
        for piece in pieces:
            events += self.pins.computed(piece.sequence, self._band)
        self.step_seconds = seconds = self._clock() - began
        self.pace.record(sum(piece.count for piece in pieces), seconds)
        if len(logits):
            self.tokens_per_second += 0.2 * (len(logits) / max(seconds, 1e-9) - self.tokens_per_second)
        return events

    def _expire(self, now: float) -> list[EngineEvent]:
        """End what has taken longer than it was given."""
        return [
            event
            for sequence in self.scheduler.expired(now)
            for event in self._end(
                sequence.key,
                DeadlineExceeded(
                    f"not done after {self._jobs[sequence.key].request.deadline_seconds:g} s, as was asked; "
                    f"{self._jobs[sequence.key].generated} tokens were generated"
                ),
            )
        ]

    def _end(self, key: int, error: EbbflowError) -> list[EngineEvent]:
        """Close a request with an error, if it is open."""
        job, waits = self._jobs.pop(key, None), self.pins.end(key)
        if job is not None:
            self.scheduler.finish(job.sequence)
        return [failure(key, error)] if job or waits else []

    def _make_do(self, pieces: list[Piece]) -> list[EngineEvent]:
        """There was no memory for a step of these pieces, and nothing of it counts.

        The next one is smaller; where that cannot be, its request ends.
        """
        self._network.trim()
        self.scheduler.trim(self._kv.most)
        running = self.scheduler.running
        self._most = max(1, len(running) // 2)
        tokens = sum(piece.count for piece in pieces)
        self.pace.limit = max(1, tokens // 2)
        if tokens == 1:
            short = OutOfMemory("no memory for the next step; try again, or make the model smaller")
            return self._end(pieces[0].sequence.key, short)
        for sequence in sorted(running, key=lambda s: s.arrival)[self._most :]:
            self.scheduler.preempt(sequence)
        return []

    def _tokens(self, request: Generate | Pin) -> list[int]:
        a, name = self._manifest.architecture, self._manifest.name
        written = len(request.prompt or "") + sum(len(turn.content) for turn in request.chat or ())
        if written > _MOST_PER_TOKEN * a.context:
            # said before the text is cut into tokens, which for megabytes takes seconds that others wait
            raise PromptTooLong(f"the prompt has {written} characters, more than {name} can ever read")
        if request.ids is not None:
            tokens = list(request.ids)
            if not tokens or min(tokens) < 0 or max(tokens) >= a.vocab:
                raise InvalidRequest(f"token ids are between 0 and {a.vocab - 1} for {name}, and there is one at least")
        elif request.chat is not None:
            tokens = self._tokenizer.render_chat(request.chat)
        else:
            tokens = self._tokenizer.encode(request.prompt or "")
        tokens = tokens or [self._manifest.bos or 0]
        if not (min(tokens) >= 0 and max(tokens) < a.vocab):
            raise CorruptFile(f"{name}'s tokenizer knows tokens that the model does not; add it again")
        if len(tokens) >= a.context:
            raise PromptTooLong(
                f"the prompt has {len(tokens)} tokens; {name} can read {a.context - 1} and answer in what is left: "
                "shorten it"
            )
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
        now = self._clock()
        if job.first is None:
            job.first = now
        else:
            job.longest_gap = max(job.longest_gap, now - job.last)
        job.last = now
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
        self.scheduler.spoil(job.sequence)
        self.scheduler.finish(job.sequence)
        name = self._manifest.name
        return failure(job.sequence.key, CorruptFile(f"{name}'s weights give numbers that overflow; add it again"))

    def _finish(self, job: _Job, reason: str) -> Finished:
        del self._jobs[job.sequence.key]
        self.scheduler.finish(job.sequence)
        now, sequence = self._clock(), job.sequence
        return Finished(
            id=sequence.key,
            reason=reason,
            prompt_tokens=job.prompt_tokens,
            tokens=job.generated,
            seconds_to_first=(now if job.first is None else job.first) - job.accepted,
            seconds=now - job.accepted,
            queued_seconds=(now if job.began is None else job.began) - job.accepted,
            longest_gap_seconds=job.longest_gap,
            reused_tokens=min(sequence.reused or 0, job.prompt_tokens),
            shareable_tokens=min(sequence.shareable, job.prompt_tokens),
            miss=sequence.miss,
            band=sequence.band,
            preemptions=sequence.preemptions,
        )
