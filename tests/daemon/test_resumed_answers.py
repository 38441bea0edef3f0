"""An answer whose worker dies goes on in the next one: no token is lost and none repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ebbflow.daemon.engine.engine import Engine
from ebbflow.daemon.supervisor.kept import RESUMES, ROOM_SECONDS, Kept
from ebbflow.daemon.supervisor.worker import RESTARTING, WAITING_FOR_MEMORY
from ebbflow.daemon.worker.resident import Resident
from ebbflow.formats.child_messages import Continue
from ebbflow.formats.errors import from_wire
from ebbflow.formats.messages import Cancel, Chunk, Failed, Finished, Generate, Ping, Progress, Started
from ebbflow.formats.values import ChatMessage, Sampling

from support.engines import engine_of
from support.house import GB, House, finished
from support.models import write_model
from support.residents import load
from support.stacks import write_signs_model

# -- the engine: whatever was told before, the rest is what an undisturbed answer would have said -------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_signs_model(tmp_path_factory.mktemp("resume") / "model")


@pytest.fixture(scope="module")
def resident(folder: Path) -> Resident:
    return load(folder, 49)


def told(engine: Engine, request: Generate, ids: tuple[int, ...] = ()) -> list[Any]:
    """Everything that is said about a request."""
    events = engine.submit(request, ids)
    for _ in range(300):
        if not engine.busy:
            return events
        events += engine.step()
    raise AssertionError("still busy")


def text(events: list[Any]) -> str:
    return "".join(event.text for event in events if isinstance(event, Chunk))


REQUESTS = {
    "greedy": Generate(id=1, model="m", prompt="Once", sampling=Sampling(max_tokens=16), resume=True),
    "seeded": Generate(
        id=1, model="m", prompt="é" * 9, sampling=Sampling(max_tokens=40, temperature=1.5, seed=3), resume=True
    ),
    "chat": Generate(
        id=1,
        model="m",
        chat=(ChatMessage("user", "hello"),),
        sampling=Sampling(max_tokens=24, temperature=1.0, top_k=40, seed=8),
        resume=True,
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("ending", ["length", "end token", "stop string"])
def test_from_every_chunk_on_the_answer_is_the_same(folder: Path, resident: Resident, name: str, ending: str) -> None:
    request, eos = REQUESTS[name], ()
    whole = told(engine_of(folder, resident), request)
    ids = [id_ for event in whole if isinstance(event, Chunk) for id_ in event.ids]
    if ending == "end token":
        eos = (ids[-1],)
    elif ending == "stop string":
        sampling = {"max_tokens": 64, "stop": (text(whole)[-3:], text(whole)[-2:] + "never")}
        request = Generate(
            **{f: getattr(request, f) for f in ("id", "model", "prompt", "chat", "resume")},
            sampling=Sampling(
                **{f: getattr(request.sampling, f) for f in ("temperature", "top_k", "seed")}, **sampling
            ),
        )
    whole = told(engine_of(folder, resident, eos=eos), request)
    assert whole[-1].reason == ("length" if ending == "length" else "stop")
    chunks = [event for event in whole if isinstance(event, Chunk)]
    for count in range(len(chunks) + 1):  # the worker died after so many
        known = tuple(id_ for chunk in chunks[:count] for id_ in chunk.ids)
        rest = told(engine_of(folder, resident, eos=eos), request, known)
        assert text(chunks[:count]) + text(rest) == text(whole)
        end, ends = rest[-1], [event for event in rest if isinstance(event, Finished | Failed)]
        assert ends == [end]
        assert (end.reason, end.tokens, end.prompt_tokens) == (
            whole[-1].reason,
            whole[-1].tokens,
            whole[-1].prompt_tokens,
        )
        assert all(event.prompt_tokens == end.prompt_tokens for event in rest if isinstance(event, Started))


def test_without_resume_no_ids_are_told(folder: Path, resident: Resident) -> None:
    events = told(engine_of(folder, resident), Generate(id=1, model="m", prompt="x", sampling=Sampling(max_tokens=9)))
    assert text(events)
    assert not any(event.ids for event in events if isinstance(event, Chunk))


@pytest.mark.parametrize("ids", [(-1,), (258,), (5,) * 17])
def test_tokens_that_no_worker_can_have_said_are_refused(
    folder: Path, resident: Resident, ids: tuple[int, ...]
) -> None:
    engine = engine_of(folder, resident)
    (failed,) = engine.submit(REQUESTS["greedy"], ids)
    assert (failed.id, failed.code) == (1, "invalid_request")
    assert not engine.busy


# -- what is kept ---------------------------------------------------------------------------------------------------


def test_times_count_from_the_beginning_and_started_is_told_once() -> None:
    kept, end = Kept(10.0), Finished(id=1, reason="stop", prompt_tokens=1, tokens=2, seconds_to_first=9, seconds=9)
    assert kept.hear(end, 50.0) == end
    assert kept.hear(Started(id=1, prompt_tokens=3), 11.0)
    assert kept.hear(Chunk(id=1, text="a", tokens=1, ids=(7, 8)), 12.0)
    kept.resume(3.0)
    assert kept.hear(Started(id=1, prompt_tokens=3), 19.0) is None
    told_ = kept.hear(end, 30.0)
    assert isinstance(told_, Finished)
    assert (told_.seconds_to_first, told_.seconds) == (2.0, 20.0)
    assert list(kept.ids) == [7, 8]


# -- the supervisor -------------------------------------------------------------------------------------------------


@pytest.fixture
def house(tmp_path):
    write_model(tmp_path, "demo")
    house = House(tmp_path)
    yield house
    house.close()


def ask(number: int = 1, *, resume: bool = True) -> Generate:
    return Generate(id=number, model="demo", prompt=f"p{number}", resume=resume)


def die(house: House, code: int = -9) -> None:
    house.launcher.workers[-1].code = code
    house.turn()
    house.turn(0.2)


def test_a_dead_workers_streams_go_on_in_the_next_and_the_others_end(house) -> None:
    client = house.client()
    client.say(ask(1), ask(2, resume=False), ask(3))
    house.turn()
    worker = house.ready_worker()
    ids = {m.prompt: m.id for m in worker.hear() if isinstance(m, Generate)}
    for id_ in ids.values():
        worker.say(Started(id=id_, prompt_tokens=4), Chunk(id=id_, text="a", tokens=1, ids=(10,)))
    worker.say(Chunk(id=ids["p1"], text="b", tokens=3, ids=(11, 12)))
    house.turn()
    assert not any(event.ids for event in client.hear() if isinstance(event, Chunk))  # ours alone
    die(house)
    heard = client.hear()
    assert [(e.id, e.code) for e in heard if isinstance(e, Failed)] == [(2, "worker_died")]
    assert {(e.id, e.stage) for e in heard if isinstance(e, Progress)} == {(1, RESTARTING), (3, RESTARTING)}
    again = house.ready_worker()
    _, first, third = again.hear()
    assert (first, third.ids) == (Continue(request=first.request, ids=(10, 11, 12)), (10,))
    assert (first.request.id, first.request.prompt, third.request.id) == (ids["p1"], "p1", ids["p3"])
    again.say(
        Started(id=ids["p1"], prompt_tokens=4), Chunk(id=ids["p1"], text="c", tokens=4, ids=(13,)), finished(ids["p1"])
    )
    house.turn(1.0)
    heard = client.hear()
    assert [type(event) for event in heard] == [Chunk, Finished]
    assert (heard[0].text, heard[1].seconds) == ("c", pytest.approx(1.2))


def test_after_the_kernel_killed_for_memory_streams_go_on_in_a_smaller_one(house) -> None:
    client = house.client()
    client.say(ask(1), ask(2, resume=False))
    house.turn()
    worker = house.ready_worker()
    load, first, _ = worker.hear()
    worker.say(Chunk(id=first.id, text="a", tokens=1, ids=(10,)))
    house.turn()
    house.sensor.kills += 1
    die(house)
    (failed,) = [event for event in client.hear() if isinstance(event, Failed)]
    assert (failed.id, failed.code) == (2, "worker_died")
    assert "for memory" in failed.message
    assert from_wire(failed.code, failed.message).retryable
    smaller, again = house.ready_worker().hear()
    assert smaller.target_nbytes == int(0.8 * load.target_nbytes)
    assert again.ids == (10,)


def test_a_stream_that_had_said_nothing_begins_again(house) -> None:
    client = house.client()
    client.say(ask())
    house.turn()
    worker = house.ready_worker()
    _, sent = worker.hear()
    die(house)
    _, again = house.ready_worker().hear()
    assert again == sent


def test_a_request_that_kills_every_worker_ends_with_the_typed_error(house) -> None:
    client = house.client()
    client.say(ask())
    house.turn()
    for _ in range(RESUMES + 1):
        assert not [event for event in client.hear() if isinstance(event, Failed)]
        house.ready_worker()
        die(house)
    (failed,) = client.hear()
    assert (failed.id, failed.code) == (1, "worker_died")
    assert len(house.launcher.workers) == RESUMES + 1
    assert len(house.server.requests) == 0


def test_a_cancelled_stream_does_not_come_back(house) -> None:
    client = house.client()
    client.say(ask(1), ask(2), ask(3))
    house.turn()
    house.ready_worker()
    client.say(Cancel(id=1))
    house.turn()
    house.launcher.workers[-1].code = -9
    client.say(Cancel(id=2))  # to a worker that is dead, which nobody knows yet
    house.turn()
    house.turn(0.2)
    client.say(Cancel(id=3))  # while the next one starts
    house.turn()
    heard = [(event.id, event.code) for event in client.hear() if isinstance(event, Failed)]
    assert heard == [(1, "cancelled"), (2, "cancelled"), (3, "cancelled")]
    assert len(house.server.requests) == 0


def test_a_stream_whose_worker_hung_goes_on(house) -> None:
    client = house.client()
    client.say(ask())
    house.turn()
    house.ready_worker()
    for _ in range(130):
        client.say(Ping())
        house.turn(1.0)
    assert house.launcher.workers[0].signals == ["KILL"]
    assert len(house.launcher.workers) == 2
    assert not [event for event in client.hear() if isinstance(event, Failed)]


def test_when_no_worker_starts_any_more_a_resumed_stream_ends_too(house) -> None:
    client = house.client()
    client.say(ask())
    house.turn()
    house.ready_worker()
    for _ in range(4):
        die(house, 1)
    (failed,) = [event for event in client.hear() if isinstance(event, Failed)]
    assert failed.code == "worker_died"


def test_what_a_starting_worker_is_at_is_told_to_all_that_wait(house) -> None:
    client = house.client()
    client.say(ask(1))
    house.turn()
    worker = house.child(house.launcher.workers[-1])
    worker.say(Progress(id=0, stage="compiling"))
    house.turn()
    client.say(ask(2))
    house.turn()
    assert client.hear() == [Progress(id=1, stage="compiling"), Progress(id=2, stage="compiling")]


def test_a_stream_whose_model_finds_no_room_in_the_next_worker_waits_for_it(house) -> None:
    client = house.client()
    client.say(ask(1), ask(2))
    house.turn()
    worker = house.ready_worker()
    _, first, second = worker.hear()
    for id_ in (first.id, second.id):
        worker.say(Chunk(id=id_, text="a", tokens=1, ids=(10,)))
    house.turn()
    client.hear()
    house.sensor.available = 0
    die(house)
    again = house.ready_worker()
    client.say(ask(3))  # nothing of this one can be lost yet: it is refused
    house.turn()
    heard = client.hear()
    assert [(e.id, e.code) for e in heard if isinstance(e, Failed)] == [(3, "out_of_memory")]
    assert {(e.id, e.stage) for e in heard if isinstance(e, Progress)} >= {(1, WAITING_FOR_MEMORY)}
    client.say(Cancel(id=2))
    for _ in range(20):
        client.say(Ping())
        house.turn(1.0)
    heard = client.hear()
    assert [(e.id, e.code) for e in heard if isinstance(e, Failed)] == [(2, "cancelled")]
    assert not [e for e in heard if isinstance(e, Progress)]  # it was told once
    assert not any(isinstance(message, Continue) for message in again.hear())
    house.sensor.available = 10 * GB
    house.turn(1.0)
    assert [message.ids for message in again.hear() if isinstance(message, Continue)] == [(10,)]


def test_it_does_not_wait_for_ever(house) -> None:
    client = house.client()
    client.say(ask(1))
    house.turn()
    house.ready_worker()
    house.sensor.available = 0
    die(house)
    house.ready_worker()
    for _ in range(int(ROOM_SECONDS) + 2):
        client.say(Ping())
        house.turn(1.0)
    assert [event.code for event in client.hear() if isinstance(event, Failed)] == ["out_of_memory"]
    assert len(house.server.requests) == 0
