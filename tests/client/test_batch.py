"""Thousands of prompts: in what order, how many at a time, what is tried again, and what the iterators promise."""

from __future__ import annotations

import asyncio
import gc
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from queue import Empty
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.client import AsyncClient, BatchSummary, BatchText, Client, batch, errors
from ebbflow.client.batch import ATTEMPTS, LONGEST_WAIT_SECONDS, WINDOW_MOST, WINDOW_NBYTES, BatchResult, Plan
from ebbflow.client.prompts import contents, request
from ebbflow.formats.messages import Cancel, Chunk, Failed, Finished, Generate, Request, Started
from ebbflow.formats.values import ChatMessage

from support.fake_daemon import VANISH, FakeDaemon, Item, silent


def finished(id_: int = 0, **more: int) -> Finished:
    return Finished(id=id_, reason="stop", prompt_tokens=10, tokens=2, seconds_to_first=0, seconds=0, **more)


def failed(code: str, id_: int = 0) -> Failed:
    return Failed(id=id_, code=code, message="this and that")


def plan(texts: Iterable[Any], window: int = 256, **options: Any) -> Plan:
    return Plan("tiny", texts, options, window, clock=iter(range(10**9)).__next__)  # type: ignore[arg-type]


def taken(planned: Plan) -> list[int]:
    return [index for index, _ in planned.take()]


# -- what to ask --------------------------------------------------------------------------------------------------


def test_texts_with_a_common_beginning_are_neighbours():
    texts = ["b long", "a1", [7, 8, 1], "b", "a2", [7, 9], [7, 8], "b lo"]
    order = taken(plan(texts))
    assert [texts[index] for index in order] == [[7, 8], [7, 8, 1], [7, 9], "a1", "a2", "b", "b lo", "b long"]


def test_what_may_not_be_shared_is_not_mixed():
    texts = [BatchText(text, {"namespace": space}) for text in ("a", "b") for space in ("x", "y")]
    assert taken(plan(texts)) == [0, 2, 1, 3]


def test_any_mix_of_texts_becomes_requests_of_a_low_priority():
    chat = [{"role": "user", "content": "hi"}]
    texts = ["a", (1, 2), chat, BatchText("b", {"priority": 3, "max_tokens": 9})]
    requests = dict(plan(texts, temperature=0.5, deadline="2m").take())
    assert (requests[0].prompt, requests[1].ids, requests[2].chat) == ("a", (1, 2), (ChatMessage("user", "hi"),))
    assert [requests[index].priority for index in range(4)] == [-1, -1, -1, 3]
    assert requests[3].sampling.max_tokens == 9
    assert {(r.sampling.temperature, r.deadline_seconds) for r in requests.values()} == {(0.5, 120.0)}


@pytest.mark.parametrize(
    "text", [[], [-1], [1, "a"], [1.5], [True], [{"role": "user"}], [{"role": 1, "content": ""}], 7]
)
def test_a_text_that_is_none_is_named_before_anything_is_sent(text):
    with pytest.raises(errors.InvalidRequest, match="text 1: "):
        plan(["fine", text])


@pytest.mark.parametrize(
    "options",
    [
        {"deadline": -1},
        {"deadline": float("nan")},
        {"deadline": "soon"},
        {"priority": 0.5},
        {"namespace": 3},
        {"exact_prefix": 1},
        {"resume": 1},
        {"urgency": 1},
        {"stop": 7},
    ],
)
def test_options_that_are_none_are_refused(options):
    with pytest.raises(errors.InvalidRequest):
        request("tiny", contents("a"), options)


@pytest.mark.parametrize("window", [0, -1, WINDOW_MOST + 1])
def test_a_window_is_as_large_as_the_daemon_allows(window):
    with pytest.raises(errors.InvalidRequest, match="window"):
        plan(["a"], window)


# -- how many at a time -------------------------------------------------------------------------------------------


def test_only_a_window_is_open():
    planned = plan([f"{number:03}" for number in range(100)], window=10)
    assert taken(planned) == [*range(10)]
    assert taken(planned) == []
    planned.hear(3, finished())
    assert taken(planned) == [10]


def test_only_so_much_text_is_open_but_one_always_is():
    large = "x" * (WINDOW_NBYTES // 2)
    planned = plan([large + "1", large + "2", large * 4, "\U0001f40b" * (WINDOW_NBYTES // 4)])
    for expected in ([0], [1], [2], [3]):
        assert taken(planned) == expected
        planned.hear(expected[0], finished())
    assert planned.ended


# -- what is tried again ------------------------------------------------------------------------------------------


def test_what_may_succeed_later_is_tried_again_first_and_after_a_pause():
    planned = plan(["a", "b", "c"], window=2)
    assert taken(planned) == [0, 1]
    assert planned.hear(0, Chunk(id=0, text="half", tokens=1)) == []
    assert planned.hear(0, failed("worker_died")) == []
    assert planned.hear(1, failed("worker_died")) == []
    assert planned.pause() == 0.5
    assert planned.pause() == 0.0  # a second later
    assert taken(planned) == [0]  # the window has closed
    planned.hear(0, Chunk(id=0, text="whole", tokens=1))
    [result] = planned.hear(0, finished())
    assert (result.text, result.attempts) == ("whole", 2)
    assert taken(planned) == [1, 2]  # and opens again
    assert planned.summary.retries == 2


def test_a_pause_ends_when_its_time_is_over_whatever_is_heard_meanwhile():
    now = 100.0
    planned = Plan("tiny", ["a", "b", "c"], {}, clock=lambda: now)
    taken(planned)
    planned.hear(0, failed("worker_died"))
    assert planned.pause() == 0.5
    now += 0.25
    planned.hear(1, failed("worker_died"))  # of the same round: it is waited for already
    assert planned.pause() == 0.25
    planned.hear(2, finished())
    now += 0.25
    assert planned.pause() == 0
    assert taken(planned) == [0, 1]


def test_attempts_are_bounded_and_waits_grow():
    planned = plan(["a"])
    waits = []
    results: list[BatchResult] = []
    while not planned.ended:
        waits.append(planned.pause())
        [index] = taken(planned)
        results += planned.hear(index, failed("out_of_memory"))
    assert waits == [0, 0.5, 1, 2, 4, LONGEST_WAIT_SECONDS]
    [result] = results
    assert isinstance(result.error, errors.OutOfMemory)
    assert result.attempts == ATTEMPTS


@pytest.mark.parametrize("code", ["prompt_too_long", "deadline_exceeded", "internal", "unknown_model"])
def test_what_cannot_succeed_or_is_too_late_is_not_tried_again(code):
    planned = plan(["a"])
    taken(planned)
    [result] = planned.hear(0, failed(code))
    assert result.error is not None
    assert result.error.code == code
    assert planned.pause() == 0
    assert planned.summary.failures == 1


@pytest.mark.parametrize("poison", [0, 7, 39])
def test_a_text_that_kills_every_worker_takes_no_other_with_it(poison):
    planned = plan([f"{number:02}" for number in range(40)], window=16)
    results: list[BatchResult] = []
    opened: list[int] = []
    while not planned.ended:
        planned.pause()
        opened += taken(planned)
        if poison in opened:  # all that is open dies
            for index in opened:
                results += planned.hear(index, failed("worker_died"))
            opened = []
        else:
            results += planned.hear(opened.pop(0), finished())
    assert [result.index for result in results if result.error] == [poison]
    assert len(results) == 40


def test_a_daemon_that_is_gone_ends_everything_at_once():
    planned = plan([f"{number:02}" for number in range(20)], window=3)
    taken(planned)
    results = planned.hear(1, failed("daemon_gone"))
    assert sorted(result.index for result in results) == [1, *range(3, 20)]
    assert all(isinstance(result.error, errors.DaemonGone) for result in results)
    [late] = planned.hear(0, finished())  # had answered before it went
    assert late.error is None
    planned.hear(2, failed("daemon_gone"))
    assert planned.ended


@settings(deadline=None)
@given(
    count=st.integers(0, 30),
    window=st.integers(1, 12),
    replies=st.lists(st.sampled_from(["worker_died", "too_busy", "corrupt_stack", "", ""]), max_size=200),
    choices=st.randoms(use_true_random=False),
)
def test_every_text_has_exactly_one_result_whatever_happens(count, window, replies, choices):
    planned = plan([f"{number}" for number in range(count)], window=window)
    opened: list[int] = []
    results: Counter[int] = Counter()
    while not planned.ended:
        planned.pause()
        opened += taken(planned)
        assert 0 < len(opened) <= window
        index = opened.pop(choices.randrange(len(opened)))
        code = replies.pop() if replies else ""
        results.update(result.index for result in planned.hear(index, failed(code) if code else finished()))
    assert results == dict.fromkeys(range(count), 1)
    assert planned.summary.ended == count


def test_the_summary_counts_what_was_saved_against_the_bound():
    planned = plan(["a", "b", "c"])
    taken(planned)
    planned.hear(0, finished())
    planned.hear(1, finished(reused_tokens=6, shareable_tokens=8))
    planned.hear(2, failed("prompt_too_long"))
    assert planned.summary == BatchSummary(
        prompts=3, ended=3, failures=1, tokens=4, prompt_tokens=20, reused=6, shareable=8, seconds=1
    )


# -- the iterators ------------------------------------------------------------------------------------------------


@pytest.fixture
def address() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="ebb") as folder:
        yield f"ipc://{folder}/s"


def echo(request_: Request) -> Iterable[Item]:
    assert isinstance(request_, Generate)
    yield Started(id=request_.id, prompt_tokens=10)
    yield Chunk(id=request_.id, text=f"<{request_.prompt}", tokens=1)
    yield Chunk(id=request_.id, text=">", tokens=2)
    yield finished(request_.id)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Pauses between attempts, which are too short to notice; 1 is the first."""
    monkeypatch.setattr(batch, "FIRST_WAIT_SECONDS", 0.001)
    begun: list[float] = []
    pause = Plan.pause

    def noted(planned: Plan) -> float:
        seconds = pause(planned)
        begun.extend([1000 * seconds] if seconds else [])
        return seconds

    monkeypatch.setattr(Plan, "pause", noted)
    yield begun


def test_two_thousand_prompts_one_of_which_fails(address: str):
    def script(request_: Request) -> Iterable[Item]:
        assert isinstance(request_, Generate)
        return [failed("prompt_too_long", request_.id)] if request_.prompt == "7" else echo(request_)

    heard: list[BatchSummary] = []
    with FakeDaemon(address, script), Client(address) as client:
        stream = client.generate_batch("tiny", map(str, range(2000)), on_progress=heard.append)
        results = {result.index: result for result in stream}
    assert {index: result.text for index, result in results.items() if index != 7} == {
        index: f"<{index}>" for index in range(2000) if index != 7
    }
    assert isinstance(results[7].error, errors.PromptTooLong)
    assert (stream.summary.ended, stream.summary.failures, stream.summary.tokens) == (2000, 1, 2 * 1999)
    assert [summary.ended for summary in heard] == [*range(1, 2001)]


def test_a_retry_waits_and_succeeds(address: str, pauses: list[float]):
    seen: Counter[str | None] = Counter()

    def script(request_: Request) -> Iterable[Item]:
        assert isinstance(request_, Generate)
        seen[request_.prompt] += 1
        return [failed("worker_died", request_.id)] if seen[request_.prompt] == 1 else echo(request_)

    with FakeDaemon(address, script), Client(address) as client:
        results = list(client.generate_batch("tiny", ["a", "b", "c"]))
    assert sorted(result.text or "" for result in results) == ["<a>", "<b>", "<c>"]
    assert pauses
    assert set(seen.values()) == {2}


def test_results_are_not_held_back_by_a_retry_that_waits(address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(batch, "FIRST_WAIT_SECONDS", 1000.0)
    monkeypatch.setattr(batch, "LONGEST_WAIT_SECONDS", 1000.0)
    paused = threading.Event()
    pause = Plan.pause

    def noted(planned: Plan) -> float:
        seconds = pause(planned)
        if seconds:
            paused.set()
        return seconds

    def script(request_: Request) -> Iterable[Item]:
        assert isinstance(request_, Generate)
        if request_.prompt == "a":
            return [failed("worker_died", request_.id)]
        return [lambda: paused.wait(10), *echo(request_)]

    async def main() -> None:
        async with AsyncClient(address) as client, client.generate_batch("tiny", ["a", "b", "c"]) as results:
            assert [(await anext(results)).text for _ in "bc"] == ["<b>", "<c>"]

    monkeypatch.setattr(Plan, "pause", noted)
    with FakeDaemon(address, script):
        with Client(address) as client, client.generate_batch("tiny", ["a", "b", "c"]) as results:
            assert [next(results).text for _ in "bc"] == ["<b>", "<c>"]
            assert results.summary.retries == 1
        paused.clear()
        asyncio.run(main())


def test_a_daemon_that_dies_in_the_middle(address: str):
    def script(request_: Request) -> Iterable[Item]:
        assert isinstance(request_, Generate)
        yield from echo(request_)
        if request_.prompt == "03":
            yield VANISH

    with FakeDaemon(address, script), Client(address) as client:
        results = list(client.generate_batch("tiny", [f"{i:02}" for i in range(50)], window=2))
    assert sorted(result.index for result in results) == [*range(50)]
    assert {result.index for result in results if result.error is None} >= {0, 1, 2, 3}
    assert {type(result.error) for result in results if result.error} <= {errors.DaemonGone, errors.NotRunning}
    assert len([result for result in results if result.error]) > 40


def test_closing_and_forgetting_cancel_what_is_open(address: str):
    with FakeDaemon(address, silent) as daemon, Client(address) as client:

        def half(request_: Request) -> Iterable[Item]:
            return echo(request_) if getattr(request_, "prompt", "") == "a" else []

        daemon.script = half
        batch = client.generate_batch("tiny", ["a", "b", "c"])
        assert next(batch).text == "<a>"
        batch.close()
        assert list(batch) == []
        assert {daemon.wait_for(Cancel).id for _ in range(2)} == {2, 3}
        forgotten = client.generate_batch("tiny", ["a", "b"])
        next(forgotten)
        del forgotten
        gc.collect()
        assert daemon.wait_for(Cancel).id == 5


def test_an_interrupted_batch_does_not_hang(address: str):
    def interrupted(_summary: BatchSummary) -> None:
        raise KeyboardInterrupt

    with FakeDaemon(address, echo), Client(address) as client:
        batch = client.generate_batch("tiny", ["a", "b"], window=1, on_progress=interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(batch)
        assert list(batch) == []


@pytest.mark.parametrize("error", [Empty, TimeoutError])
def test_what_on_progress_raises_is_not_taken_for_our_own_waiting(address: str, error: type[Exception]):
    def failing(_summary: BatchSummary) -> None:
        raise error

    def script(request_: Request) -> Iterable[Item]:  # one reply: the one that was waited for
        return [failed("prompt_too_long", request_.id)]

    async def main() -> None:
        async with AsyncClient(address) as client:
            batch = client.generate_batch("tiny", ["a", "b"], window=1, on_progress=failing)
            with pytest.raises(error):
                await anext(batch)
            assert [result async for result in batch] == []

    with FakeDaemon(address, script):
        with Client(address) as client:
            batch = client.generate_batch("tiny", ["a", "b"], window=1, on_progress=failing)
            with pytest.raises(error):
                next(batch)
        asyncio.run(main())


def test_no_prompts_are_no_results(address: str):
    with Client(address) as client:  # and nobody is asked
        batch = client.generate_batch("tiny", [])
        assert list(batch) == []
        assert batch.summary == BatchSummary(prompts=0)


def test_coroutines_have_the_same(address: str, pauses: list[float]):
    seen: Counter[str | None] = Counter()

    def script(request_: Request) -> Iterable[Item]:
        assert isinstance(request_, Generate)
        seen[request_.prompt] += 1
        if request_.prompt == "1" and seen["1"] == 1:
            return [failed("too_busy", request_.id)]
        return [] if request_.prompt == "stuck" else echo(request_)

    async def main() -> None:
        async with AsyncClient(address) as client:
            batch = client.generate_batch("tiny", map(str, range(300)), window=20)
            results = {result.index: result.text async for result in batch}
            assert results == {index: f"<{index}>" for index in range(300)}
            assert batch.summary.retries == 1
            assert await anext(batch, None) is None
            async with client.generate_batch("tiny", ["a", "stuck"]) as left:
                assert (await anext(left)).text == "<a>"

    with FakeDaemon(address, script) as daemon:
        asyncio.run(main())
        daemon.wait_for(Cancel)
    assert pauses[0] == 1
