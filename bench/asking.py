"""A model behind a daemon, and how fast it answers prompts of so many tokens, as a client sees it."""

from __future__ import annotations

from itertools import count

from ebbflow.client import Client
from ebbflow.formats.messages import Finished

NAMESPACES = count()


def held(client: Client, model: str, size: str) -> int:
    """Resize; the bytes that are resident then."""
    residency = client.resize(model, size).residency
    assert residency is not None
    return residency.nbytes


class Ours:
    """One model behind a daemon, asked with prompts of so many tokens; models of one tokenizer may share `prompts`."""

    def __init__(self, client: Client, model: str, prompts: dict[int, str] | None = None) -> None:
        self._client, self._model = client, model
        self._prompts = {} if prompts is None else prompts

    def decode(self, context: int, tokens: int) -> float:
        """Tokens per second after the first."""
        done = self._ask(self._prompt(context), tokens)
        return (done.tokens - 1) / (done.seconds - done.seconds_to_first)

    def prefill(self, prompt: int) -> float:
        """Prompt tokens per second until the first token is there."""
        done = self._ask(self._prompt(prompt), 1)
        return done.prompt_tokens / done.seconds_to_first

    def _ask(self, prompt: str, tokens: int) -> Finished:
        """One answer, for which nothing is reused of the answers before."""
        with self._client.generate(self._model, prompt, max_tokens=tokens, namespace=f"{next(NAMESPACES)}") as stream:
            stream.text()
        assert stream.result is not None
        return stream.result

    def _prompt(self, tokens: int) -> str:
        """Text of just so many tokens, or one more: found by asking."""
        if tokens not in self._prompts:
            line, count = "x = 1\n", tokens
            for _ in range(6):
                text = (line * tokens)[:count]
                found = self._ask(text, 1).prompt_tokens
                if 0 <= found - tokens <= 1:
                    break
                count += tokens - found
            self._prompts[tokens] = text
        return self._prompts[tokens]
