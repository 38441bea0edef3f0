"""The engine with prefixes that are shared, kept and given up: nobody's answer changes, and less is computed."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ebbflow.daemon.engine.engine import Engine
from ebbflow.daemon.engine.pin_files import write_partial
from ebbflow.daemon.engine.pins import FOLDER
from ebbflow.daemon.settings import DEFAULTS, WorkerSettings
from ebbflow.daemon.worker.resident import Resident
from ebbflow.formats.errors import InvalidRequest
from ebbflow.formats.manifest import read_manifest
from ebbflow.formats.messages import Failed, Finished, Generate, Pin, Pinned
from ebbflow.formats.values import Sampling

from support.engines import Answers, engine_of, finish
from support.fake_line import FakeClock
from support.residents import load
from support.stacks import TINY, write_signs_model

BASE, BLOCKS = 21, 49
PREFIX = tuple((7 * i * i + 3) % 250 for i in range(96))  # three blocks
BLOCK_NBYTES = TINY.layers * 2 * TINY.kv_heads * 32 * TINY.head_dim * 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_signs_model(tmp_path / "model")


@pytest.fixture
def resident(folder: Path) -> Resident:
    return load(folder, BLOCKS)


def request(key: int, *own: int, tokens: int = 12, prefix: tuple[int, ...] = PREFIX, **fields: Any) -> Generate:
    sampling = Sampling(max_tokens=tokens, temperature=0.9, seed=key)
    return Generate(id=key, model="m", ids=(*prefix, *own), sampling=sampling, **fields)


def texts(engine: Engine, requests: list[Generate]) -> dict[int, str]:
    answers = Answers()
    for one in requests:
        answers.hear(engine.submit(one))
    finish(engine, answers)
    assert all(isinstance(found.end, Finished) for found in answers.by_id.values()), answers.by_id
    return {key: found.text for key, found in answers.by_id.items()}


def ends(engine: Engine, *requests: Generate) -> list[Finished]:
    answers = Answers()
    for one in requests:
        answers.hear(engine.submit(one))
    finish(engine, answers)
    found = [answers.by_id[one.id].end for one in requests]
    return [end for end in found if isinstance(end, Finished)]


def alone(folder: Path, resident: Resident, requests: list[Generate]) -> dict[int, str]:
    """What each gets in an engine of its own."""
    return {one.id: texts(engine_of(folder, resident), [one])[one.id] for one in requests}


def test_sharers_compute_their_prefix_once_and_answer_as_if_alone(folder: Path, resident: Resident) -> None:
    requests = [request(key, key, key + 1, key + 2) for key in range(1, 9)]
    engine = engine_of(folder, resident)
    assert texts(engine, requests) == alone(folder, resident, requests)
    totals = engine.scheduler.totals
    assert (totals.prompt, totals.reused) == (8 * 99, 7 * 96)
    assert totals.computed == 99 + 7 * 3 + 8 * 11


def test_what_a_request_says_of_its_reuse(folder: Path, resident: Resident) -> None:
    engine = engine_of(folder, resident, tick=0.01)
    first, second, short = (ends(engine, one)[0] for one in (request(1, 1), request(2, 2), request(3, prefix=(1, 2))))
    assert (first.reused_tokens, first.shareable_tokens, first.miss) == (0, 0, "new")
    assert (second.reused_tokens, second.shareable_tokens, second.miss) == (96, 96, "")
    assert (short.reused_tokens, short.miss) == (0, "short")
    assert 0 < second.queued_seconds < second.seconds_to_first
    assert 0 < second.longest_gap_seconds < second.seconds
    engine.trim(1 << 40)
    (again,) = ends(engine, request(4, 4))
    assert (again.reused_tokens, again.miss) == (0, "new")


def test_a_chat_that_grows_reuses_its_own_answers(folder: Path, resident: Resident) -> None:
    engine = engine_of(folder, resident)
    said: list[int] = []
    engine.submit(request(1, tokens=40))
    while engine.busy:
        engine.step()
        for sequence in engine.scheduler.running:
            said = list(sequence.tokens)
    (next_turn,) = ends(engine, Generate(id=2, model="m", ids=(*said, 1, 2, 3), sampling=Sampling(max_tokens=3)))
    assert len(said) >= 96 + 39
    assert next_turn.reused_tokens == len(said) // 32 * 32 == 128


def test_namespaces_share_nothing(folder: Path, resident: Resident) -> None:
    engine = engine_of(folder, resident)
    found = ends(engine, request(1, namespace="a"))
    found += ends(engine, request(2, namespace="b"))
    found += ends(engine, request(3, namespace="a"))
    assert [end.reused_tokens for end in found] == [0, 0, 64]  # the last token of a prompt is always computed


def test_a_prefix_of_a_worse_model_is_not_used_and_one_of_a_better_is(folder: Path) -> None:
    resident = load(folder, BASE)
    engine = engine_of(folder, resident)
    (worse,) = ends(engine, request(1, 1))
    resident.grow(BLOCKS)
    (better,) = ends(engine, request(2, 1))
    assert (better.reused_tokens, better.miss) == (0, "quality")
    resident.shrink(BASE)
    exact, shallow = (ends(engine, request(key, 1, exact_prefix=key == 3))[0] for key in (3, 4))
    assert (exact.reused_tokens, exact.miss) == (0, "size")
    assert (shallow.reused_tokens, shallow.miss) == (96, "")
    assert (worse.band, better.band, exact.band) == (0, 5, 0)


def test_an_exact_prefix_gives_the_very_same_answer_whatever_was_there(folder: Path) -> None:
    resident = load(folder, BLOCKS)
    engine = engine_of(folder, resident)
    ends(engine, request(1))
    resident.shrink(BASE)
    want = alone(folder, resident, [request(2)])
    assert texts(engine, [request(2, exact_prefix=True)]) == want


def test_a_deadline_ends_what_waits_and_what_runs(folder: Path, resident: Resident) -> None:
    engine, answers = engine_of(folder, resident, tick=0.01), Answers()
    answers.hear(engine.submit(request(1, tokens=300)))
    answers.hear(engine.submit(request(2, 2, tokens=300, deadline_seconds=0.5)))
    answers.hear(engine.submit(request(3, 3, tokens=2, deadline_seconds=1e-9)))
    answers.hear(engine.submit(request(4, 4, tokens=2, deadline_seconds=1e9)))
    finish(engine, answers)
    running, waiting = answers.by_id[2].end, answers.by_id[3].end
    assert isinstance(running, Failed)
    assert isinstance(waiting, Failed)
    assert running.code == waiting.code == "deadline_exceeded"
    assert "0.5 s" in running.message
    assert answers.by_id[3].started == 0
    assert isinstance(answers.by_id[4].end, Finished)
    assert engine.kv_nbytes == engine.kv_cached_nbytes


def test_with_little_room_requests_give_way_and_none_repeats_a_token(folder: Path, resident: Resident) -> None:
    whole = -(-TINY.context // 32)
    requests = [request(key, *[key] * (3 * key), tokens=150) for key in range(1, 9)]
    engine = engine_of(folder, resident, settings=WorkerSettings(kv_limit=1))
    assert engine.kv_limit_nbytes == whole * BLOCK_NBYTES
    assert texts(engine, requests) == alone(folder, resident, requests)
    assert engine.scheduler.totals.preemptions > 0


def test_a_quarter_of_the_room_in_the_middle_of_sixteen_streams(folder: Path, resident: Resident) -> None:
    requests = [request(key, *[key] * 40, tokens=60) for key in range(1, 17)]
    engine, answers = engine_of(folder, resident), Answers()
    for one in requests:
        answers.hear(engine.submit(one))
    while len(engine.scheduler.running) < 16 or engine.scheduler.totals.computed < 16 * 60:
        answers.hear(engine.step())
    held = engine.kv_nbytes
    engine.limit_kv(held // 4)
    assert engine.kv_nbytes <= held // 4
    assert 0 < len(engine.scheduler.running) < 16
    for _ in range(40):
        answers.hear(engine.step())
        assert engine.kv_nbytes <= held // 4
    engine.limit_kv(0)
    finish(engine, answers)
    assert {key: found.text for key, found in answers.by_id.items()} == alone(folder, resident, requests)
    assert engine.kv_nbytes == engine.kv_cached_nbytes


def test_a_step_without_memory_does_not_count(
    folder: Path, resident: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(key, key) for key in range(1, 7)]
    engine, answers, sizes = engine_of(folder, resident), Answers(), list[int]()
    compute = engine._forward

    def sometimes(pieces: Any) -> Any:
        sizes.append(len(pieces))
        logits = compute(pieces)
        if len(sizes) in (2, 5, 6) or (len(pieces) == 6 and sizes.count(6) == 2):
            raise MemoryError
        return logits

    monkeypatch.setattr(engine, "_forward", sometimes)
    for one in requests:
        answers.hear(engine.submit(one))
    while engine.busy:
        answers.hear(engine.step())
        engine.scheduler.check_integrity()
    assert {key: found.text for key, found in answers.by_id.items()} == alone(folder, resident, requests)
    assert engine.scheduler.totals.preemptions > 0


@pytest.mark.parametrize("ids", [(), (-1,), (5, TINY.vocab)])
def test_token_ids_that_are_none(folder: Path, resident: Resident, ids: tuple[int, ...]) -> None:
    (event,) = engine_of(folder, resident).submit(Generate(id=1, model="m", ids=ids))
    assert isinstance(event, Failed)
    assert event.code == "invalid_request"
    assert str(TINY.vocab - 1) in event.message


# -- pins -----------------------------------------------------------------------------------------------------------


def pin(key: int, name: str, ids: tuple[int, ...] = PREFIX, save: bool = False) -> Pin:
    return Pin(id=key, model="m", name=name, ids=ids, save=save)


def pinned(engine: Engine, message: Pin) -> Any:
    """The answer to a pin."""
    events = engine.pin(message)
    while engine.busy or engine.saving:
        events += engine.step() + engine.settle()
        engine.scheduler.check_integrity()
    (event,) = events
    return event


def test_a_pinned_prefix_outlives_everything(folder: Path, resident: Resident) -> None:
    engine = engine_of(folder, resident)
    event = pinned(engine, pin(1, "system", (*PREFIX, 1, 2)))
    assert isinstance(event, Pinned)
    assert (event.pin.name, event.pin.tokens, event.pin.nbytes) == ("system", 96, 3 * BLOCK_NBYTES)
    assert (event.pin.saved, event.pin.current) == (False, True)
    engine.trim(1 << 40)
    assert engine.kv_nbytes == engine.kv_pinned_nbytes == 3 * BLOCK_NBYTES
    (end,) = ends(engine, request(2, 5))
    assert end.reused_tokens == 96
    engine.unpin("system")
    engine.trim(1 << 40)
    assert engine.kv_nbytes == 0
    assert not (folder / FOLDER).exists()


def test_pins_may_overlap_and_be_replaced(folder: Path, resident: Resident) -> None:
    engine = engine_of(folder, resident)
    pinned(engine, pin(1, "a"))
    pinned(engine, pin(2, "b", PREFIX[:64]))
    pinned(engine, pin(3, "a", PREFIX[:32]))
    engine.trim(1 << 40)
    assert engine.kv_nbytes == 2 * BLOCK_NBYTES
    assert [one.tokens for one in engine.pin_summaries()] == [32, 64]
    engine.unpin("b")
    engine.trim(1 << 40)
    assert engine.kv_nbytes == BLOCK_NBYTES


def test_a_saved_pin_is_there_after_a_restart(folder: Path, resident: Resident) -> None:
    before = engine_of(folder, resident)
    pinned(before, pin(1, "system", save=True))
    want = texts(before, [request(2, 5)])
    after = engine_of(folder, resident)
    (summary,) = after.pin_summaries()
    assert (summary.name, summary.tokens, summary.saved, summary.current) == ("system", 96, True, True)
    assert texts(after, [request(2, 5)]) == want
    assert after.scheduler.totals.reused == 96
    after.unpin("system")
    assert engine_of(folder, resident).pin_summaries() == ()


def other_kv(file: Path, folder: Path, resident: Resident) -> Engine:
    return engine_of(folder, resident, settings=replace(DEFAULTS, kv="i8"))


def torn(file: Path, folder: Path, resident: Resident) -> Engine:
    file.write_bytes(file.read_bytes()[:-100])
    return engine_of(folder, resident)


def changed(file: Path, folder: Path, resident: Resident) -> Engine:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return engine_of(folder, resident)


def another(file: Path, folder: Path, resident: Resident) -> Engine:
    return engine_of(folder, resident, codec="other")


def rubbish(file: Path, folder: Path, resident: Resident) -> Engine:
    file.write_bytes(b"\x00" * 64)
    return engine_of(folder, resident)


def folded(file: Path, folder: Path, resident: Resident) -> Engine:
    """Tokens in two dimensions."""
    label, tensors = content_of(file)
    save_file({**tensors, "tokens": np.stack([tensors["tokens"]] * 2, 1)}, file, {"label": label})
    return engine_of(folder, resident)


def too_good(file: Path, folder: Path, resident: Resident) -> Engine:
    """A quality that there is not, and that would never be computed again."""
    label, tensors = content_of(file)
    assert '"band":5' in label
    save_file(tensors, file, {"label": label.replace('"band":5', '"band":99')})
    return engine_of(folder, resident)


def content_of(file: Path) -> tuple[str, dict[str, Any]]:
    with safe_open(file, framework="numpy") as opened:
        return opened.metadata()["label"], load_file(file)


@pytest.mark.parametrize("spoil", [other_kv, torn, changed, another, rubbish, folded, too_good])
def test_a_file_that_is_not_right_is_as_if_it_were_not_there(
    folder: Path, resident: Resident, spoil: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pinned(engine_of(folder, resident), pin(1, "system", save=True))
    (file,) = (folder / FOLDER).iterdir()
    engine = spoil(file, folder, resident)
    assert engine.pin_summaries() == ()
    assert engine.kv_nbytes == 0
    assert str(file) in caplog.text


def test_a_file_that_was_not_read_back_can_be_let_go_and_replaced(folder: Path, resident: Resident) -> None:
    pinned(engine_of(folder, resident), pin(1, "system", save=True))
    (file,) = (folder / FOLDER).iterdir()
    content = file.read_bytes()
    engine = engine_of(folder, resident, settings=replace(DEFAULTS, kv="i8"))
    engine.unpin("system")
    assert not file.exists()
    for name in ("system", "../pins/system"):
        with pytest.raises(InvalidRequest):
            engine.unpin(name)
    file.write_bytes(content)
    pinned(engine, pin(2, "system", PREFIX[:32]))  # not saved: what had its name is not to come back one day
    assert not file.exists()


def test_pins_are_read_back_as_far_as_there_is_memory(folder: Path, resident: Resident) -> None:
    before = engine_of(folder, resident)
    pinned(before, pin(1, "a", save=True))
    pinned(before, pin(2, "b", tuple(reversed(PREFIX)), save=True))
    for blocks, names in ((2, []), (5, ["a"]), (6, ["a", "b"])):
        nbytes = blocks * BLOCK_NBYTES
        engine = Engine(folder, read_manifest(folder), resident, 2, FakeClock(), pins_nbytes=nbytes)
        assert [one.name for one in engine.pin_summaries()] == names
        assert engine.kv_nbytes <= nbytes
        engine.scheduler.check_integrity()


def test_a_pin_that_cannot_be_computed_again_stays_as_it_is(folder: Path) -> None:
    resident = load(folder, BASE)
    engine = engine_of(folder, resident, settings=WorkerSettings(kv_limit=1))
    whole = -(-TINY.context // 32)
    first, more = 3 * whole // 8, whole // 4
    for key, (start, blocks) in enumerate(((7, first), (8, more), (9, whole // 8)), 1):
        assert isinstance(pinned(engine, pin(key, str(key), (start,) * (32 * blocks))), Pinned)
    assert first > whole - engine.kv_pinned_nbytes // BLOCK_NBYTES
    resident.grow(BLOCKS)
    finish(engine, Answers())
    assert [one.current for one in engine.pin_summaries()] == [False, True, True]


def test_a_pin_is_computed_again_when_the_model_is_better_and_nobody_waits(folder: Path) -> None:
    resident = load(folder, BASE)
    engine = engine_of(folder, resident)
    pinned(engine, pin(1, "system", save=True))
    assert not engine.busy
    resident.grow(BLOCKS)
    assert [one.current for one in engine.pin_summaries()] == [False]
    assert engine.busy
    finish(engine, Answers())
    assert [one.current for one in engine.pin_summaries()] == [True]
    (end,) = ends(engine, request(2, 5))
    assert end.reused_tokens == 96
    resident.shrink(BASE)
    assert not engine.busy
    assert settled(engine) == []  # nobody asked for it
    assert [one.current for one in engine_of(folder, load(folder, BLOCKS)).pin_summaries()] == [True]


def test_who_asks_does_not_wait_for_a_pin_that_is_computed_again(folder: Path) -> None:
    resident = load(folder, BASE)
    engine = engine_of(folder, resident)
    pinned(engine, pin(1, "system"))
    resident.grow(BLOCKS)
    engine.pace.limit = 8
    engine.step()
    assert [s.key for s in engine.scheduler.running] == [-1]
    (end,) = ends(engine, request(2, prefix=(5, 6, 7)))
    assert end.reason == "length"
    assert [one.current for one in engine.pin_summaries()] == [True]  # afterwards


@pytest.mark.parametrize("again", [False, True])
def test_a_pin_that_goes_while_it_is_renewed_does_not_come_back(folder: Path, again: bool) -> None:
    resident = load(folder, BASE)
    engine = engine_of(folder, resident)
    pinned(engine, pin(1, "system"))
    resident.grow(BLOCKS)
    engine.pace.limit = 8
    engine.step()
    assert [s.key for s in engine.scheduler.running] == [-1]
    if again:
        pinned(engine, pin(2, "system", PREFIX[:32]))
    else:
        engine.unpin("system")
    finish(engine, Answers())
    assert [one.tokens for one in engine.pin_summaries()] == ([32] if again else [])


def test_nobody_begins_with_what_gave_no_numbers(
    folder: Path, resident: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(folder, resident)
    ends(engine, request(1, prefix=PREFIX[:64]))
    compute = engine._forward
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_forward", lambda pieces: compute(pieces) * float("nan"))
        answers = Answers()
        answers.hear(engine.submit(request(2)))
        finish(engine, answers)
    broken = answers.by_id[2].end
    assert isinstance(broken, Failed)
    assert broken.code == "corrupt_file"
    (end,) = ends(engine, request(3, 9))
    assert end.reused_tokens == 64


def test_before_a_step_was_measured_one_request_runs(folder: Path, resident: Resident) -> None:
    """All that run have a token in every step: where that takes long, a burst would never get short ones."""
    engine = engine_of(folder, resident, tick=0.2)
    for key in range(1, 9):
        engine.submit(request(key, prefix=(key, key)))
    engine.step()
    assert len(engine.scheduler.running) == 1
    engine.step()
    assert len(engine.scheduler.running) <= engine.pace.limit


def test_pins_that_cannot_be(folder: Path, resident: Resident) -> None:
    engine = engine_of(folder, resident, settings=WorkerSettings(kv_limit=1))
    short = pinned(engine, pin(1, "short", PREFIX[:31]))
    assert isinstance(short, Failed)
    assert "32" in short.message
    answers = Answers()
    answers.hear(engine.submit(request(2, tokens=TINY.context)))  # wants all the room there is
    for _ in range(3):
        answers.hear(engine.step())
    said = engine.pin(pin(3, "more"))
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Failed | Pinned) and event.id == 3:
                said.append(event)
            else:
                answers.hear([event])
        engine.scheduler.check_integrity()
    (refused,) = said
    assert isinstance(refused, Failed)
    assert refused.code == "out_of_memory"
    assert isinstance(answers.by_id[2].end, Finished)
    assert engine.kv_pinned_nbytes == 0


def test_a_disk_that_does_not_take_a_pin(folder: Path, resident: Resident) -> None:
    (folder / FOLDER).write_text("not a folder")
    engine = engine_of(folder, resident)
    event = pinned(engine, pin(1, "system", save=True))
    assert isinstance(event, Failed)
    assert event.code == "storage_failed"
    assert (engine.kv_pinned_nbytes, engine.pin_summaries()) == (0, ())


def test_a_disk_that_is_full_in_the_middle_of_a_pin(
    folder: Path, resident: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(folder, resident)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    event = pinned(engine, pin(1, "system", save=True))
    assert isinstance(event, Failed)
    assert list((folder / FOLDER).iterdir()) == []
    assert (engine.kv_pinned_nbytes, engine.pin_summaries()) == (0, ())


def test_a_pin_for_which_there_is_no_thread_fails_alone(
    folder: Path, resident: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(folder, resident)
    assert isinstance(pinned(engine, pin(1, "system", PREFIX[:32])), Pinned)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        event = pinned(engine, pin(2, "system", save=True))
    assert isinstance(event, Failed)
    assert event.code == "out_of_memory"
    assert [(one.name, one.tokens) for one in engine.pin_summaries()] == [("system", 32)]
    assert isinstance(pinned(engine, pin(3, "system", save=True)), Pinned)
    assert [path.name for path in (folder / FOLDER).iterdir()] == ["system.safetensors"]


@pytest.mark.parametrize(("error", "code"), [(MemoryError, "out_of_memory"), (OSError, "storage_failed")])
def test_a_writer_that_fails_takes_nobody_with_it(
    folder: Path, resident: Resident, monkeypatch: pytest.MonkeyPatch, error: type[Exception], code: str
) -> None:
    def fail(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    engine = engine_of(folder, resident)
    event = pinned(engine, pin(1, "system", save=True))
    assert isinstance(event, Failed)
    assert event.code == code
    assert list((folder / FOLDER).iterdir()) == []
    assert engine.kv_pinned_nbytes == 0


def test_pins_that_wait_to_be_written_are_not_when_the_model_goes(
    folder: Path, resident: Resident, slow_disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Path] = []

    def write(path: Path, *more: Any) -> None:
        begun.append(path)
        write_partial(path, *more)

    monkeypatch.setattr("ebbflow.daemon.engine.pins.write_partial", write)
    engine = engine_of(folder, resident)
    for key in (1, 2, 3):
        begin_saving(engine, key, f"pin{key}", PREFIX[: 32 * key])
    assert {(event.id, event.code) for event in engine.close()} == {(key, "cancelled") for key in (1, 2, 3)}
    slow_disk.set()
    engine.pins.store._writer.join()
    assert len(begun) <= 1  # what the writer had in hand
    assert list(folder.glob(f"{FOLDER}/*")) == []


def test_a_pin_whose_file_cannot_be_made_fails_alone(folder: Path, resident: Resident) -> None:
    (folder / FOLDER / "system.safetensors").mkdir(parents=True)
    engine = engine_of(folder, resident)
    event = pinned(engine, pin(1, "system", save=True))
    assert isinstance(event, Failed)
    assert event.code == "storage_failed"
    assert engine.kv_pinned_nbytes == 0
    assert [path.name for path in (folder / FOLDER).iterdir()] == ["system.safetensors"]


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that takes nothing until the event is set."""
    sync, moves = os.fsync, threading.Event()

    def slow(descriptor: int) -> None:
        assert moves.wait(60)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    yield moves
    moves.set()


def begin_saving(engine: Engine, key: int, name: str = "system", ids: tuple[int, ...] = PREFIX) -> None:
    """Have a pin computed whose file is then being written."""
    assert engine.pin(pin(key, name, ids, save=True)) == []
    while engine.busy:
        assert engine.step() == []
    assert engine.saving


def settled(engine: Engine) -> list[Any]:
    events = []
    while engine.saving:
        events += engine.settle()
    engine.scheduler.check_integrity()
    return events


def test_nobody_waits_for_a_slow_disk(folder: Path, resident: Resident, slow_disk: threading.Event) -> None:
    engine = engine_of(folder, resident)
    begin_saving(engine, 1)
    (end,) = ends(engine, request(2, 9))
    assert isinstance(end, Finished)
    assert end.reused_tokens == 96
    assert engine.settle() == []
    assert engine.pin_summaries() == ()  # not before it is on disk
    assert engine.kv_pinned_nbytes == 3 * BLOCK_NBYTES  # but nothing takes its blocks
    slow_disk.set()
    (event,) = settled(engine)
    assert isinstance(event, Pinned)
    assert event.pin.saved
    assert [one.name for one in engine_of(folder, resident).pin_summaries()] == ["system"]


@pytest.mark.parametrize("how", ["cancel", "unpin", "replace", "unload"])
def test_a_pin_that_is_not_wanted_any_more_while_it_is_written(
    folder: Path, resident: Resident, slow_disk: threading.Event, how: str
) -> None:
    engine, events = engine_of(folder, resident), []
    begin_saving(engine, 1)
    match how:
        case "cancel":
            events += engine.cancel(1)
        case "unpin":
            engine.unpin("system")
        case "replace":
            engine.pin(pin(2, "system", PREFIX[:32]))
            while engine.busy:
                engine.step()
        case "unload":
            events += engine.close()
    slow_disk.set()
    (event,) = events + settled(engine)
    assert isinstance(event, Failed)
    assert (event.id, event.code) == (1, "cancelled")
    engine.close()
    engine.pins.store._writer.join()  # an engine that was closed does not wait for it
    assert list(folder.glob(f"{FOLDER}/*")) == []
    assert [one.tokens for one in engine.pin_summaries()] == ([32] if how == "replace" else [])


def test_an_old_pin_is_not_renewed_while_another_of_its_name_is_written(
    folder: Path, slow_disk: threading.Event
) -> None:
    resident = load(folder, BASE)
    engine = engine_of(folder, resident)
    pinned(engine, pin(1, "system"))
    resident.grow(BLOCKS)
    begin_saving(engine, 2, ids=PREFIX[:32])
    finish(engine, Answers())
    slow_disk.set()
    (event,) = settled(engine)
    assert isinstance(event, Pinned)
    assert [(one.tokens, one.saved, one.current) for one in engine.pin_summaries()] == [(32, True, True)]


def test_what_a_killed_worker_was_writing_is_taken_away(folder: Path, resident: Resident) -> None:
    (folder / FOLDER).mkdir()
    (folder / FOLDER / "system.7.partial").write_bytes(b"half")
    engine_of(folder, resident)
    assert list((folder / FOLDER).iterdir()) == []


def test_cancelling_a_pin(folder: Path, resident: Resident) -> None:
    engine = engine_of(folder, resident)
    engine.pin(pin(1, "system"))
    engine.step()
    (event,) = engine.cancel(1)
    assert isinstance(event, Failed)
    assert event.code == "cancelled"
    assert not engine.busy
    assert engine.kv_nbytes == engine.kv_cached_nbytes
    assert engine.pin_summaries() == ()


def test_a_prompt_never_fits_is_told_the_numbers(folder: Path, resident: Resident) -> None:
    engine = engine_of(folder, resident, settings=WorkerSettings(kv_limit=1))
    pinned(engine, pin(1, "system"))
    (event,) = engine.submit(request(2, prefix=(9,) * (TINY.context - 5)))
    assert isinstance(event, Failed)
    assert event.code == "prompt_too_long"
    whole = -(-TINY.context // 32)
    assert f"{whole} blocks" in event.message
    assert "pins keep 3" in event.message


def test_a_band_for_each_part_of_the_curve(folder: Path) -> None:
    from ebbflow.daemon.engine.bands import BANDS, Bands
    from ebbflow.formats.manifest import CurvePoint

    kls = (0.5, 0.25, 0.09, 0.02, 0.009, 0.001)
    curve = tuple(CurvePoint(blocks=10 * i, nbytes=i, kl=kl, perplexity=1.0) for i, kl in enumerate(kls, 1))
    bands = Bands(curve, 5, 100)
    assert [bands.of(blocks) for blocks in (5, 10, 19, 20, 30, 40, 50, 60, 100)] == [0, 0, 0, 1, 2, 3, 4, 5, 5]
    plain = Bands((), 10, 100)
    assert [plain.of(blocks) for blocks in (10, 24, 25, 99, 100)] == [0, 0, 1, 5, 5]
    assert BANDS == 6
