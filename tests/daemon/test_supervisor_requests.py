"""What clients ask and what becomes of it, with a fake worker's line in the test's hand."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from ebbflow.daemon.supervisor.swelling import MOST_NBYTES
from ebbflow.formats.child_messages import LoadFailed, LoadModel, Ready, UnloadModel
from ebbflow.formats.messages import (
    LEASE_SECONDS,
    OPEN_PER_CLIENT,
    AddModel,
    Cancel,
    Chunk,
    Failed,
    Generate,
    GetStatus,
    ListModels,
    ModelDetail,
    ModelList,
    Ping,
    Pong,
    RemoveModel,
    Resize,
    ShowModel,
    Started,
    Status,
    event_decoder,
)
from ebbflow.formats.units import SizeWish
from ebbflow.formats.values import ChatMessage, Sampling

from support.house import GB, MB, House, finished, generate, holds
from support.models import write_model


@pytest.fixture
def house(tmp_path):
    write_model(tmp_path, "demo")
    write_model(tmp_path, "other")
    house = House(tmp_path)
    yield house
    house.close()


def codes(messages) -> list[tuple[int, str]]:
    return [(message.id, message.code) for message in messages if isinstance(message, Failed)]


def test_a_ping_is_answered(house):
    client = house.client()
    client.say(Ping())
    house.turn()
    assert client.hear() == [Pong()]
    assert house.launcher.workers == []


def test_a_generation_goes_to_a_worker_and_its_words_come_back(house):
    client = house.client()
    client.say(generate(7, prompt="hi"))
    house.turn()
    assert len(house.launcher.workers) == 1
    worker = house.ready_worker()
    load, forwarded = worker.hear()
    wanted = LoadModel(model="demo", folder=str(house.root / "demo"), target_nbytes=GB, pins_nbytes=load.pins_nbytes)
    assert load == wanted
    assert (forwarded.model, forwarded.prompt) == ("demo", "hi")
    worker.say(
        holds(load),
        Started(id=forwarded.id, prompt_tokens=2),
        Chunk(id=forwarded.id, text="ho", tokens=1),
        finished(forwarded.id),
        Chunk(id=forwarded.id, text="after the end", tokens=2),
    )
    house.turn()
    assert client.hear() == [Started(id=7, prompt_tokens=2), Chunk(id=7, text="ho", tokens=1), finished(7)]
    assert len(house.server.requests) == 0


def test_nothing_is_sent_before_the_worker_is_ready_and_a_model_is_loaded_once(house):
    client = house.client()
    client.say(generate(1), generate(2), generate(3, model="other"))
    house.turn()
    worker = house.child(house.launcher.workers[0])
    house.turn(1)
    assert worker.hear() == []
    worker.say(Ready(pid=1), Ready(pid=1))
    house.turn()
    heard = worker.hear()
    assert [type(message).__name__ for message in heard] == [
        "LoadModel",
        "Generate",
        "Generate",
        "LoadModel",
        "Generate",
    ]
    assert len({message.id for message in heard if isinstance(message, Generate)}) == 3
    client.say(generate(4))
    house.turn()
    assert [type(message).__name__ for message in worker.hear()] == ["Generate"]


def test_two_clients_may_use_the_same_id(house):
    one, two = house.client(), house.client()
    one.say(generate(1, prompt="one"))
    two.say(generate(1, prompt="two"))
    house.turn()
    worker = house.ready_worker()
    ids = {message.prompt: message.id for message in worker.hear() if isinstance(message, Generate)}
    worker.say(Chunk(id=ids["two"], text="2", tokens=1), Chunk(id=ids["one"], text="1", tokens=1))
    house.turn()
    assert one.hear() == [Chunk(id=1, text="1", tokens=1)]
    assert two.hear() == [Chunk(id=1, text="2", tokens=1)]


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Generate(id=5, model="demo"), "invalid_request"),
        (Generate(id=5, model="demo", prompt="a", chat=(ChatMessage("user", "b"),)), "invalid_request"),
        (Generate(id=5, model="demo", chat=()), "invalid_request"),
        (Generate(id=5, model="demo", prompt="a", sampling=Sampling(top_p=0)), "invalid_request"),
        (Generate(id=5, model="nobody", prompt="a"), "unknown_model"),
        (Generate(id=5, model="../demo", prompt="a"), "unknown_model"),
        (ShowModel(id=5, model="nobody"), "unknown_model"),
        (RemoveModel(id=5, model="nobody"), "unknown_model"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_once_and_starts_nothing(house, request_, code):
    client = house.client()
    client.say(request_)
    house.turn()
    assert codes(client.hear()) == [(5, code)]
    assert house.launcher.workers == []
    assert len(house.server.requests) == 0


def test_reading_the_library(house):
    client = house.client()
    write_model(house.root, "third")
    client.say(ListModels(id=1), ShowModel(id=2, model="third"))
    house.turn()
    models, detail = client.hear()
    assert isinstance(models, ModelList)
    assert [model.name for model in models.models] == ["demo", "other", "third"]
    assert isinstance(detail, ModelDetail)
    assert (detail.source, detail.blocks, detail.options) == ("/somewhere", 10, {"levels": 4})


def test_cancel_before_the_worker_is_ready_is_answered_here(house):
    client = house.client()
    client.say(generate(1), generate(2))
    house.turn()
    client.say(Cancel(id=1), Cancel(id=1), Cancel(id=99))
    house.turn()
    assert codes(client.hear()) == [(1, "cancelled")]
    worker = house.ready_worker()
    assert sum(isinstance(message, Generate) for message in worker.hear()) == 1


def test_cancel_of_what_runs_is_the_workers_to_answer(house):
    client = house.client()
    client.say(generate(1))
    house.turn()
    worker = house.ready_worker()
    _, forwarded = worker.hear()
    client.say(Cancel(id=1))
    house.turn()
    assert worker.hear() == [Cancel(id=forwarded.id)]
    assert client.hear() == []
    worker.say(Failed(id=forwarded.id, code="cancelled", message="stopped"))
    house.turn()
    assert client.hear() == [Failed(id=1, code="cancelled", message="stopped")]


def test_a_model_that_does_not_load_fails_its_own_requests_only(house):
    client = house.client()
    client.say(generate(1), generate(2), generate(3, model="other"))
    house.turn()
    worker = house.ready_worker()
    worker.hear()
    worker.say(LoadFailed(model="demo", code="truncated_stack", message="too short"))
    house.turn()
    assert client.hear() == [Failed(id=n, code="truncated_stack", message="too short") for n in (1, 2)]
    assert len(house.server.requests) == 1
    client.say(generate(4))
    house.turn()
    assert isinstance(worker.hear()[0], LoadModel)  # another try, as the file may be another


def test_a_client_may_have_so_many_open_requests(house):
    client, other = house.client(), house.client()
    client.say(*(generate(number) for number in range(1, OPEN_PER_CLIENT + 3)))
    other.say(generate(1))
    for _ in range(OPEN_PER_CLIENT // 50):
        house.turn()
    assert codes(client.hear()) == [(OPEN_PER_CLIENT + 1, "too_busy"), (OPEN_PER_CLIENT + 2, "too_busy")]
    assert other.hear() == []
    client.say(Cancel(id=1), generate(5000))
    house.turn()
    assert codes(client.hear()) == [(1, "cancelled")]


def test_an_id_in_use_is_refused_without_ending_the_request_that_has_it(house):
    client = house.client()
    client.say(generate(1), generate(1))
    house.turn()
    assert codes(client.hear()) == [(0, "invalid_request")]
    assert len(house.server.requests) == 1


def test_a_lost_lease_is_a_cancel(house):
    client, alive = house.client(), house.client()
    client.say(generate(1))
    alive.say(generate(1, prompt="alive"))
    house.turn()
    worker = house.ready_worker()
    ids = {message.prompt: message.id for message in worker.hear() if isinstance(message, Generate)}
    for _ in range(6):
        alive.say(Ping())
        house.turn(LEASE_SECONDS / 5)
    assert worker.hear() == [Cancel(id=ids["hello"])]
    assert len(house.server.requests) == 1
    worker.say(finished(ids["hello"]))
    house.turn()
    assert client.hear() == []


def test_a_client_that_vanished_is_noticed_at_the_next_word_for_it(house):
    client = house.client()
    client.say(generate(1))
    house.turn()
    worker = house.ready_worker()
    _, forwarded = worker.hear()
    client.close()
    heard = []
    while not heard:  # until ZeroMQ's own thread has seen to the closed socket
        worker.say(Chunk(id=forwarded.id, text="?", tokens=1))
        house.turn()
        heard = worker.hear()
    assert heard == [Cancel(id=forwarded.id)]
    assert len(house.server.requests) == 0


def test_a_client_that_does_not_read_is_cut_off_and_told(house):
    client = house.client(rcvhwm=1)
    client.say(generate(1))
    house.turn()
    worker = house.ready_worker()
    _, forwarded = worker.hear()
    while len(house.server.requests):
        worker.say(*(Chunk(id=forwarded.id, text="x" * 10_000, tokens=1) for _ in range(100)))
        house.turn()
    assert worker.hear() == [Cancel(id=forwarded.id)]
    heard = client.hear()
    while house.clients.pending:
        house.turn()
        heard += client.hear()
    assert codes(heard) == [(1, "too_busy")]
    assert isinstance(heard[-1], Failed)
    client.say(Ping())
    house.turn()
    assert client.hear() == [Pong()]


def test_clients_that_fill_the_supervisor_up_are_cut_off_and_their_requests_end(house, monkeypatch):
    cuts = []
    monkeypatch.setattr(house.clients, "start_over", lambda: cuts.append(house.now))
    client = house.client()
    client.say(generate(1), AddModel(id=2, source="/s", name="n"))
    house.turn(1)
    worker = house.ready_worker()
    _, forwarded = worker.hear()
    house.sensor.own += MOST_NBYTES - 20 * MB
    house.turn(1)
    assert not cuts
    house.sensor.own += 1
    house.turn(1)
    assert cuts == [house.now]
    assert worker.hear() == [Cancel(id=forwarded.id)]
    assert house.launcher.jobs[0].signals == ["TERM"]
    assert len(house.server.requests) == 0
    for _ in range(3):  # what is left now is ours
        house.turn(1)
    assert len(cuts) == 1
    house.sensor.own += MOST_NBYTES + 1
    house.turn(1)
    assert len(cuts) == 2


def test_an_address_that_could_not_be_bound_is_served_as_soon_as_it_is_free(house):
    house.clients._unbound.append(("inproc://late", None))
    house.turn(1)
    client = house._peer("inproc://late", event_decoder)
    client.say(Ping())
    house.turn()
    assert client.hear() == [Pong()]


def test_a_model_in_use_is_not_removed(house):
    client = house.client()
    client.say(generate(1), RemoveModel(id=2, model="demo"), RemoveModel(id=3, model="other"))
    house.turn()
    busy, done = client.hear()
    assert (busy.id, busy.code) == (2, "model_busy")
    assert done.id == 3
    assert (house.root / "demo").exists()
    assert not (house.root / "other").exists()


def test_a_model_that_cannot_be_removed_stays_as_it_is(house, monkeypatch):
    def refuse(path, target):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    client = house.client()
    client.say(Resize(id=1, model="demo", wish=SizeWish(fraction=0.5)), generate(2))
    house.turn()
    worker = house.ready_worker()
    load, forwarded = worker.hear()
    worker.say(holds(load), finished(forwarded.id))
    house.turn()
    client.hear()
    monkeypatch.setattr(Path, "rename", refuse)
    client.say(RemoveModel(id=3, model="demo"), GetStatus(id=4))
    house.turn()
    failed, status = client.hear()
    assert failed.code == "storage_failed"
    assert failed.message == f"{house.root / 'demo'}: Read-only file system"
    assert worker.hear() == []
    assert [model.wish for model in status.models] == [SizeWish(fraction=0.5)]


def test_what_the_system_refuses_is_told_without_a_traceback(house, monkeypatch, caplog):
    def refuse(name):
        raise PermissionError(errno.EACCES, "Permission denied", "/library/new")

    monkeypatch.setattr(house.library, "exists", refuse)
    client = house.client()
    client.say(AddModel(id=1, source="/x", name="new"))
    house.turn()
    [failed] = client.hear()
    assert (failed.code, failed.message) == ("storage_failed", "/library/new: Permission denied")
    assert "Traceback" not in caplog.text


def test_removing_a_loaded_model_unloads_it(house):
    client = house.client()
    client.say(generate(1))
    house.turn()
    worker = house.ready_worker()
    load, forwarded = worker.hear()
    worker.say(holds(load), finished(forwarded.id))
    house.turn()
    client.say(RemoveModel(id=2, model="demo"), generate(3))
    house.turn()
    assert worker.hear() == [UnloadModel(model="demo")]
    assert list(house.root.iterdir()) == [house.root / "other"]
    assert codes(client.hear()) == [(3, "unknown_model")]


def test_status_adds_what_the_worker_does_not_know(house):
    client = house.client()
    client.say(generate(1))
    house.turn()
    worker = house.ready_worker()
    load, _ = worker.hear()
    worker.say(holds(load))
    house.turn(3)
    client.say(GetStatus(id=2))
    house.turn()
    [status] = client.hear()
    assert isinstance(status, Status)
    assert [(model.model, model.reason) for model in status.models] == [("demo", "all of it fits")]
    assert [process.role for process in status.processes] == ["supervisor", "worker"]
    assert status.processes[1].pid == house.launcher.workers[0].pid
    assert (status.available_nbytes, status.available_source, status.uptime_seconds) == (10 * GB, "system memory", 3)


def test_a_bug_of_ours_ends_one_request_and_not_the_daemon(house, monkeypatch, caplog):
    def fail(name):
        raise ZeroDivisionError("a bug")

    client = house.client()
    monkeypatch.setattr(house.library, "get", fail)
    client.say(generate(1), Ping())
    house.turn()
    failed, pong = client.hear()
    assert (failed.id, failed.code) == (1, "internal")
    assert pong == Pong()
    assert "ZeroDivisionError" in caplog.text


def test_garbage_from_a_worker_is_ignored(house):
    client = house.client()
    client.say(generate(1))
    house.turn()
    worker = house.ready_worker()
    _, forwarded = worker.hear()
    worker.socket.send_multipart([b"EBB\x01", b"\xc1"])
    worker.socket.send(b"")
    worker.say(Chunk(id=12345, text="for nobody", tokens=1), Chunk(id=forwarded.id, text="x", tokens=1))
    house.turn()
    assert client.hear() == [Chunk(id=1, text="x", tokens=1)]
    assert worker.hear() == []
