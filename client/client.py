"""`Client`: the daemon as an object, for programs that wait. `aio.AsyncClient` is its twin for coroutines."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from ..formats.errors import DaemonGone
from ..formats.keys import KeyPair
from ..formats.messages import ModelDetail, Resized, Status
from ..formats.units import SizeWish
from ..formats.values import ModelSummary, PinSummary
from . import asks, prompts
from .address import open_channel
from .asks import AddOptions, Terms
from .batch import WINDOW, BatchSummary, BatchText, Plan
from .batch_stream import BatchStream
from .exchange import Lease
from .prompts import GenerateOptions, Prompt, Text, Turn
from .stream import ProgressStream, Stream, TextStream, answer


class Client:
    """A connection to the daemon at `address` (default: this user's). Any thread may use it.

    Without `address` that is what EBBFLOW_HOST says, or else this user's own. A daemon on another machine is known by
    its `server_key` (or EBBFLOW_SERVER_KEY) and knows us by our `keys` (by default those of `ebb keys show`).

    Connects when first asked something; `launch.ensure_daemon` starts a daemon. Methods raise the typed errors of
    `ebbflow.client.errors`: `InvalidRequest` before anything is sent, `DaemonGone` when nobody answers.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        lease: Lease | None = None,
        server_key: str | None = None,
        keys: KeyPair | None = None,
    ) -> None:
        self._channel = open_channel(address, lease, server_key, keys)
        self._finalizer = weakref.finalize(self, self._channel.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every open request with `Cancelled` and disconnect. Idempotent."""
        self._finalizer()

    def generate(self, model: str, prompt: Prompt, **options: Unpack[GenerateOptions]) -> TextStream:
        """Continue `prompt`, a string or token ids; options are those of `GenerateOptions` and `Sampling`."""
        return TextStream(self._channel, prompts.generate(model, prompt, options))

    def chat(self, model: str, messages: Iterable[Turn], **options: Unpack[GenerateOptions]) -> TextStream:
        """Answer a conversation of `ChatMessage`s, or of mappings with `role` and `content`."""
        return TextStream(self._channel, prompts.chat(model, messages, options))

    def generate_batch(
        self,
        model: str,
        texts: Iterable[Text | BatchText],
        *,
        window: int = WINDOW,
        on_progress: Callable[[BatchSummary], None] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> BatchStream:
        """Have thousands of texts (strings, token ids, conversations, in any mix) answered: results as they end.

        Texts with a common beginning are asked for one after another, so that it is computed once; at most `window`
        are asked for at a time, by default with priority -1: after whatever somebody waits for. What may succeed later
        is tried again up to five times, after a pause; one that fails does not end the others. `on_progress` hears of
        each result. Raises `InvalidRequest`, with the text's number, before anything is sent.
        """
        plan = Plan(model, texts, options, window)
        return BatchStream(self._channel, plan, on_progress)

    def pin(self, model: str, name: str, text: Text, *, save: bool = False, namespace: str = "") -> PinSummary:
        """Compute the prefix `text` (a string, token ids or a conversation) once, and keep what was computed as `name`.

        Requests that begin with it then start there, while the model is in memory, and with `save` the next time too.
        """
        return answer(self._channel, prompts.pin(model, name, text, save, namespace))

    def unpin(self, model: str, name: str) -> tuple[PinSummary, ...]:
        """Let a pinned prefix go, and its file; those that are left."""
        return answer(self._channel, prompts.unpin(model, name))

    def pins(self, model: str) -> tuple[PinSummary, ...]:
        """The model's pinned prefixes."""
        return answer(self._channel, prompts.pins(model))

    def models(self) -> tuple[ModelSummary, ...]:
        """The library's models."""
        return answer(self._channel, asks.models())

    def show(self, model: str) -> ModelDetail:
        """Everything the library knows about a model, with its size/quality curve."""
        return answer(self._channel, asks.show(model))

    def add(self, source: str | Path, name: str | None = None, **options: Unpack[AddOptions]) -> ProgressStream:
        """Read the checkpoint in a folder (or a hub's `org/name`) into the library, as `name` or the folder's name."""
        return ProgressStream(self._channel, asks.add(source, name, options))

    def import_model(self, source: str | Path, name: str | None = None) -> ProgressStream:
        """Copy a model's folder into the library; it answers as soon as its base is there, and improves meanwhile.

        What was copied stays when this ends early, and the same call goes on from there.
        """
        return ProgressStream(self._channel, asks.import_model(source, name))

    def export_model(self, model: str, target: str | Path) -> ProgressStream:
        """Copy a model of the library to the new folder `target`."""
        return ProgressStream(self._channel, asks.export_model(model, target))

    def remove(self, model: str) -> None:
        """Delete a model from the library."""
        answer(self._channel, asks.remove(model))

    def resize(self, model: str, size: str | SizeWish, **terms: Unpack[Terms]) -> Resized:
        """Set how much of a model may be resident: `300MB`, `60%` of its stack, or `auto`.

        An automatic size stays between `floor` and `cap`; `priority` multiplies what the model's bytes are worth.
        """
        return answer(self._channel, asks.resize(model, size, terms))

    def yield_memory(self, size: str | int, duration: str | float = "1h") -> None:
        """Leave so much more memory free, for `20m` or so many seconds; 0 bytes ends it."""
        answer(self._channel, asks.yield_memory(size, duration))

    def pause(self) -> None:
        """Hold automatic models at their least, and unload idle ones, until `resume`."""
        answer(self._channel, asks.pause())

    def resume(self) -> None:
        """End `pause`."""
        answer(self._channel, asks.resume())

    def status(self) -> Status:
        """The daemon, its processes and what they hold."""
        return answer(self._channel, asks.status())

    def ping(self) -> None:
        """Return if the daemon answers."""
        answer(self._channel, asks.ping())

    def shutdown(self) -> None:
        """Stop the daemon; returns when it has gone."""
        with Stream(self._channel, asks.gone()) as gone:
            answer(self._channel, asks.shutdown())
            with contextlib.suppress(DaemonGone):
                gone.wait()
