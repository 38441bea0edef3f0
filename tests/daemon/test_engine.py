"""The engine: whatever runs beside a request, and however steps are cut, it gives the text it gives alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.daemon.engine.engine import Engine
from ebbflow.daemon.worker.resident import Resident
from ebbflow.formats.messages import Failed, Finished, Generate
from ebbflow.formats.values import ChatMessage, Sampling

from support.engines import Answer, Answers, engine_of, finish
from support.residents import load
from support.stacks import TINY, write_signs_model

PROMPTS = ("", "a", "Once upon a time", "x" * 31, "y" * 32, "é" * 40, "The quick brown fox. " * 9)
SAMPLINGS = (
    Sampling(max_tokens=12),
    Sampling(max_tokens=20, temperature=1.0, seed=7),
    Sampling(max_tokens=9, temperature=0.7, top_k=20, top_p=0.9, seed=2**62),
    Sampling(max_tokens=1),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_signs_model(tmp_path_factory.mktemp("engine") / "model")


@pytest.fixture(scope="module")
def resident(folder: Path) -> Resident:
    return load(folder, 49)


def request(key: int = 1, prompt: str | None = "Once", **sampling: Any) -> Generate:
    return Generate(id=key, model="m", prompt=prompt, sampling=Sampling(**({"max_tokens": 10} | sampling)))


def answer(engine: Engine, message: Generate) -> Answer:
    answers = Answers()
    answers.hear(engine.submit(message))
    finish(engine, answers)
    assert engine.kv_nbytes == engine.kv_cached_nbytes
    return answers.by_id[message.id]


@pytest.fixture(scope="module")
def alone(folder: Path, resident: Resident) -> dict[tuple[str, int], Answer]:
    """Each prompt with each sampling, in an engine of its own."""
    return {
        (prompt, i): answer(
            engine_of(folder, resident), Generate(id=1, model="m", prompt=prompt, sampling=SAMPLINGS[i])
        )
        for prompt in PROMPTS
        for i in range(len(SAMPLINGS))
    }


def test_texts_differ(alone: dict[Any, Answer]) -> None:
    """Else the comparisons below compare nothing."""
    assert len({found.text for found in alone.values()}) > len(alone) // 2


works = st.lists(
    st.tuples(st.sampled_from(PROMPTS), st.integers(0, len(SAMPLINGS) - 1), st.integers(0, 6)), min_size=1, max_size=20
)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(works, st.sampled_from([0.0, 0.001, 0.02, 0.5]))
def test_together_as_alone(
    folder: Path, resident: Resident, alone: dict[Any, Answer], work: list[tuple[str, int, int]], tick: float
) -> None:
    """Requests arrive while others run; slow clocks cut prompts into small pieces."""
    engine, answers = engine_of(folder, resident, tick), Answers()
    for key, (prompt, sampling, steps) in enumerate(work):
        answers.hear(engine.submit(Generate(id=key, model="m", prompt=prompt, sampling=SAMPLINGS[sampling])))
        for _ in range(steps):
            answers.hear(engine.step())
    finish(engine, answers)
    for key, (prompt, sampling, _) in enumerate(work):
        found, want = answers.by_id[key], alone[prompt, sampling]
        assert (found.text, found.tokens) == (want.text, want.tokens)
        assert isinstance(found.end, Finished)
    assert engine.kv_nbytes == engine.kv_cached_nbytes


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_counts_are_right(alone: dict[Any, Answer], prompt: str) -> None:
    for i, sampling in enumerate(SAMPLINGS):
        found = alone[prompt, i]
        assert isinstance(found.end, Finished)
        assert found.end.reason == "length"
        assert found.end.tokens == sampling.max_tokens
        assert found.end.prompt_tokens == 1 + len(prompt.encode())
        assert 0 < found.end.seconds_to_first <= found.end.seconds


def test_text_comes_as_it_is_made(folder: Path, resident: Resident) -> None:
    found = answer(engine_of(folder, resident), request(max_tokens=30, temperature=1.0))
    assert found.chunks > 5  # random bytes: some wait for the rest of a letter


def test_the_end_token_ends_and_is_not_counted_or_shown(folder: Path, resident: Resident) -> None:
    full = answer(engine_of(folder, resident), request(max_tokens=20, temperature=1.0))
    tokens = sampled(folder, resident)
    at = next(i for i in range(3, 20) if tokens[i] not in tokens[:i])
    found = answer(engine_of(folder, resident, eos=(300, tokens[at])), request(max_tokens=20, temperature=1.0))
    assert isinstance(found.end, Finished)
    assert (found.end.reason, found.end.tokens) == ("stop", at)
    assert full.text.startswith(found.text.rstrip("\ufffd"))


def sampled(folder: Path, resident: Resident) -> list[int]:
    """The tokens that `request(max_tokens=20, temperature=1.0)` generates."""
    engine, answers = engine_of(folder, resident), Answers()
    engine.submit(request(max_tokens=20, temperature=1.0))
    answers.hear(engine.step())
    (sequence,) = engine.scheduler.running
    finish(engine, answers)
    return sequence.tokens[-20:]


def test_an_end_token_at_once_is_an_empty_answer(folder: Path, resident: Resident) -> None:
    first = sampled(folder, resident)[0]
    found = answer(engine_of(folder, resident, eos=(first,)), request(max_tokens=20, temperature=1.0))
    assert isinstance(found.end, Finished)
    assert (found.text, found.end.reason, found.end.tokens) == ("", "stop", 0)


def test_a_stop_string_ends_the_text_before_it(folder: Path, resident: Resident) -> None:
    full = answer(engine_of(folder, resident), request(max_tokens=40, temperature=1.0)).text
    stop = next(full[i : i + 3] for i in range(5, len(full) - 3) if full[i : i + 3].isascii())
    found = answer(engine_of(folder, resident), request(max_tokens=40, temperature=1.0, stop=(stop, "never")))
    assert isinstance(found.end, Finished)
    assert found.end.reason == "stop"
    assert found.text == full[: full.index(stop)]
    assert found.end.tokens < 40


def test_a_prompt_that_leaves_no_room_is_refused(folder: Path, resident: Resident) -> None:
    engine = engine_of(folder, resident)
    found = answer(engine, request(prompt="x" * (TINY.context - 1)))
    assert isinstance(found.end, Failed)
    assert found.end.code == "prompt_too_long"
    assert str(TINY.context) in found.end.message
    assert found.started == 0
    longest = answer(engine, request(prompt="x" * (TINY.context - 2), max_tokens=50))
    assert isinstance(longest.end, Finished)
    assert (longest.end.reason, longest.end.tokens) == ("length", 1)


def test_a_conversation(folder: Path, resident: Resident) -> None:
    chat = (ChatMessage("user", "Hi"), ChatMessage("assistant", "Ho"), ChatMessage("user", "He"))
    engine = engine_of(folder, resident)
    found = answer(engine, Generate(id=1, model="m", chat=chat, sampling=Sampling(max_tokens=10)))
    assert found.text == answer(engine, request(prompt="Hi\nHo\nHe")).text


def test_a_template_that_refuses_or_says_nothing(folder: Path, resident: Resident) -> None:
    template = folder / "chat_template.jinja"
    chat = (ChatMessage("user", "Hi"),)
    try:
        template.write_text("{{ raise_exception('not so') }}")
        refused = answer(engine_of(folder, resident), Generate(id=1, model="m", chat=chat))
        template.write_text("")
        silent = answer(
            engine_of(folder, resident), Generate(id=1, model="m", chat=chat, sampling=Sampling(max_tokens=3))
        )
    finally:
        template.unlink()
    assert isinstance(refused.end, Failed)
    assert refused.end.code == "invalid_request"
    assert "not so" in refused.end.message
    assert isinstance(silent.end, Finished)
    assert silent.end.tokens == 3


def test_a_tokenizer_larger_than_the_model_is_found_out(folder: Path, resident: Resident) -> None:
    """Its tokens would be read from beyond the embedding."""
    smaller = {name: getattr(TINY, name) for name in TINY.__struct_fields__} | {"vocab": 100}
    engine = engine_of(folder, resident, architecture=type(TINY)(**smaller))
    found = answer(engine, request(prompt="\xff\xfe"))
    assert isinstance(found.end, Failed)
    assert found.end.code == "corrupt_file"


def test_cancel_in_every_state(folder: Path, resident: Resident, alone: dict[Any, Answer]) -> None:
    engine, answers = engine_of(folder, resident, tick=0.02), Answers()
    sampling = Sampling(max_tokens=100, temperature=1.0)
    long = PROMPTS[-1]
    answers.hear(engine.submit(Generate(id=0, model="m", prompt=long, sampling=SAMPLINGS[1])))
    answers.hear(engine.step())  # before one was measured, one request runs
    for key, steps in ((1, 0), (2, 1), (3, 2), (4, 12)):  # waiting; in its prompt; further; writing
        answers.hear(engine.submit(Generate(id=key, model="m", prompt=long, sampling=sampling, namespace=f"{key}")))
        for _ in range(steps):
            answers.hear(engine.step())
        answers.hear(engine.cancel(key))
        engine.scheduler.check_integrity()
    assert answers.by_id[1].started == 0
    assert answers.by_id[2].started == 1
    assert answers.by_id[2].tokens == 0
    for key in (1, 2, 3, 4):
        end = answers.by_id[key].end
        assert isinstance(end, Failed)
        assert end.code == "cancelled"
        assert engine.cancel(key) == []  # again: nothing
    assert engine.cancel(99) == []
    finish(engine, answers)
    assert answers.by_id[0].text == alone[long, 1].text
    assert engine.cancel(0) == []  # after the end: nothing
    assert engine.kv_nbytes == engine.kv_cached_nbytes


def test_cancelling_all(folder: Path, resident: Resident) -> None:
    engine, answers = engine_of(folder, resident), Answers()
    for key in range(30):  # more than run at once
        answers.hear(engine.submit(request(key, PROMPTS[-1])))
    answers.hear(engine.step())
    answers.hear(engine.cancel_all())
    assert {found.end.code for found in answers.by_id.values() if isinstance(found.end, Failed)} == {"cancelled"}
    assert len(answers.by_id) == 30
    assert not engine.busy
    assert engine.kv_nbytes == engine.kv_cached_nbytes


def test_keys_and_values_are_counted(folder: Path, resident: Resident) -> None:
    engine, answers = engine_of(folder, resident), Answers()
    engine.submit(request(prompt="x" * 30, max_tokens=10))
    assert engine.kv_nbytes == engine.kv_cached_nbytes
    answers.hear(engine.step())
    block = TINY.layers * 2 * TINY.kv_heads * 32 * TINY.head_dim * 4
    assert (engine.kv_nbytes, engine.kv_cached_nbytes) == (block, 0)
    while engine.kv_nbytes == block:
        answers.hear(engine.step())
    assert (engine.kv_nbytes, engine.kv_cached_nbytes) == (2 * block, 0)
    finish(engine, answers)
    assert (engine.kv_nbytes, engine.kv_cached_nbytes) == (block, block)  # whole blocks stay
    engine.trim(1)
    assert engine.kv_nbytes == 0


def test_speed_is_measured(folder: Path, resident: Resident) -> None:
    engine = engine_of(folder, resident, tick=0.01)
    answer(engine, request(max_tokens=60))
    assert 20 < engine.tokens_per_second < 101  # a few looks at the clock lie between a step's begin and its end


def test_a_prompt_far_too_long_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    engine = engine_of(folder, load(folder, 21))
    monkeypatch.setattr(engine._tokenizer, "encode", lambda text: pytest.fail("it was read"))
    (event,) = engine.submit(Generate(id=1, model="m", prompt="x" * (128 * TINY.context + 1)))
    assert isinstance(event, Failed)
    assert event.code == "prompt_too_long"
