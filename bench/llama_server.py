"""llama.cpp's own server under the workloads of `prefix.py`: prompts as token ids, what it reused read back."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from llama import programs
from outcomes import Answered, Outcome
from workloads import Ask

SLOTS: Final = 16
START_SECONDS, ANSWER_SECONDS = 120.0, 600.0
_GRAIN: Final = 256  # tokens: it rounds each slot's context up to that


class LlamaServer:
    """A server that listens on `port`, and the bytes of keys and values that it holds all the time."""

    def __init__(self, port: int, kv_nbytes: int) -> None:
        self._port, self._kv_nbytes = port, kv_nbytes

    def run(self, asks: list[Ask], at_once: int) -> Outcome:
        """All of `asks`, at most `at_once` at a time, in their order."""
        done = [threading.Event() for _ in asks]
        answered = [Answered(ask.prompt, ask.at, ask.interactive) for ask in asks]
        began = time.perf_counter()

        def work(number: int) -> None:
            ask, mine = asks[number], answered[number]
            if ask.after is not None:
                done[ask.after].wait()
                mine.asked = time.perf_counter() - began
                if ask.continues:
                    before = answered[ask.after]
                    mine.prompt = before.prompt + before.answer + ask.prompt
            time.sleep(max(0.0, ask.at - (time.perf_counter() - began)))
            self._answer(ask, mine, began)
            done[number].set()

        with ThreadPoolExecutor(at_once) as pool:
            for finished in [pool.submit(work, number) for number in range(len(asks))]:
                finished.result()
        return Outcome(answered, peak_nbytes=self._kv_nbytes)

    def _answer(self, ask: Ask, mine: Answered, began: float) -> None:
        body = {
            "prompt": mine.prompt,
            "n_predict": ask.tokens,
            "cache_prompt": True,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "return_tokens": True,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=ANSWER_SECONDS)
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        answer: list[int] = []
        for line in response:
            if not line.startswith(b"data: "):
                continue
            said: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
            assert "error" not in said, said
            now = time.perf_counter() - began
            mine.times += [now] * len(said["tokens"])
            answer += said["tokens"]
            if said["stop"]:
                mine.reused = said["timings"]["cache_n"]
        connection.close()
        assert len(answer) == ask.tokens, f"{len(answer)} tokens of {ask.tokens}"
        mine.answer, mine.ended = tuple(answer), mine.times[-1]


@contextmanager
def llama_server(path: Path, threads: int, context: int, token_nbytes: int, *, unified: bool) -> Iterator[LlamaServer]:
    """A server for the model at `path` with SLOTS slots, warm, and room for `context` tokens in each.

    `unified`: one pool of that size instead. It is written at the start; a token's keys and values (fp16) take
    `token_nbytes` of it.
    """
    pool = SLOTS * -(-context // _GRAIN) * _GRAIN
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kind = "--kv-unified" if unified else "--no-kv-unified"
    flags = ["-m", path, "-t", threads, "-tb", threads, "-np", SLOTS, "-c", pool, "--port", port, kind]
    command = [str(part) for part in (programs() / "llama-server", *flags)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(process, port)
        server = LlamaServer(port, pool * token_nbytes)
        server.run([Ask((5, 6, 7), 4)], 1)  # a prompt that no workload begins with
        yield server
    finally:
        process.terminate()
        process.wait(20)


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    """Until it answers. Raises `TimeoutError` when it does not, `ChildProcessError` when it ended instead."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ChildProcessError(f"llama-server ended with exit code {process.returncode}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise TimeoutError(f"llama-server did not answer within {START_SECONDS:.0f} s")
