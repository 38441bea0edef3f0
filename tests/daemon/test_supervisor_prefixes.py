"""What shared prefixes ask of the supervisor: pins, priorities, deadlines, owners, and keys and values given back."""

from __future__ import annotations

import math

import msgspec
import pytest

from ebbflow.daemon.supervisor.budget import SHRINK_MARGIN
from ebbflow.daemon.supervisor.children import LAST_WORDS_SECONDS
from ebbflow.daemon.supervisor.squeeze import LEAST
from ebbflow.daemon.supervisor.worker import LATE_SECONDS
from ebbflow.formats.child_messages import LimitKv, LoadModel, Report, SetTarget, Trim
from ebbflow.formats.errors import Cancelled
from ebbflow.formats.messages import (
    LEASE_SECONDS,
    Cancel,
    Failed,
    Generate,
    ListPins,
    Pin,
    Ping,
    Pinned,
    Pins,
    Progress,
    RemoveModel,
    Unpin,
    failure,
)
from ebbflow.formats.values import ChatMessage, PinSummary

from support.house import GB, MB, House, finished, generate, holds
from support.models import write_model

SUMMARY = PinSummary(name="system", tokens=64, nbytes=MB)


@pytest.fixture
def house(tmp_path):
    write_model(tmp_path, "demo")
    write_model(tmp_path, "other")
    house = House(tmp_path)
    yield house
    house.close()


@pytest.fixture
def client(house):
    return house.client()


def pin(number: int, name: str = "system", **more) -> Pin:
    return Pin(id=number, model="demo", name=name, **(more or {"prompt": "Be brief."}))


def ask(number: int, seconds: float = 0.0, **more) -> Generate:
    return Generate(id=number, model="demo", prompt=f"p{number}", deadline_seconds=seconds, **more)


def codes(messages) -> list[tuple[int, str]]:
    return [(message.id, message.code) for message in messages if isinstance(message, Failed)]


def die(house) -> None:
    house.launcher.workers[-1].code = -9
    house.turn()
    house.turn(LAST_WORDS_SECONDS * 1.5)


# -- pins ---------------------------------------------------------------------------------------------------------


def test_a_pin_starts_a_worker_loads_the_model_and_is_answered(house, client):
    client.say(pin(1, save=True, namespace="n", ids=(1, 2)))
    house.turn()
    worker = house.ready_worker()
    load, asked = worker.hear()
    assert isinstance(load, LoadModel)
    assert asked == msgspec.structs.replace(pin(1, save=True, namespace="n", ids=(1, 2)), id=asked.id)
    worker.say(Progress(id=0, stage="reading"), Pinned(id=asked.id, pin=SUMMARY))
    house.turn()
    assert client.hear() == [Progress(id=1, stage="reading"), Pinned(id=1, pin=SUMMARY)]
    client.say(ListPins(id=2, model="demo"), Unpin(id=3, model="demo", name="system"))
    house.turn()
    listing, letting_go = worker.hear()
    assert (letting_go.model, letting_go.name) == ("demo", "system")
    worker.say(Pins(id=letting_go.id, pins=()), Pins(id=listing.id, pins=(SUMMARY,)))
    house.turn()
    assert client.hear() == [Pins(id=3, pins=()), Pins(id=2, pins=(SUMMARY,))]
    assert len(house.server.requests) == 0


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (pin(5, "../x"), "invalid_name"),
        (pin(5, ""), "invalid_name"),
        (pin(5, prompt="a", ids=(1,)), "invalid_request"),
        (pin(5, save=True), "invalid_request"),
        (pin(5, ids=()), "invalid_request"),
        (pin(5, chat=()), "invalid_request"),
        (pin(5, ids=(1, -1)), "invalid_request"),
        (pin(5, prompt="a", namespace="n" * 201), "invalid_request"),
        (Pin(id=5, model="nobody", name="p", prompt="a"), "unknown_model"),
        (ListPins(id=5, model="nobody"), "unknown_model"),
        (Unpin(id=5, model="../demo", name="p"), "unknown_model"),
        (ask(5, ids=(1,)), "invalid_request"),
        (ask(5, chat=(ChatMessage("user", "b"),)), "invalid_request"),
        (Generate(id=5, model="demo", ids=()), "invalid_request"),
        (Generate(id=5, model="demo", ids=(-1,)), "invalid_request"),
        (ask(5, priority=101), "invalid_request"),
        (ask(5, priority=-101), "invalid_request"),
        (ask(5, -1.0), "invalid_request"),
        (ask(5, math.inf), "invalid_request"),
        (ask(5, math.nan), "invalid_request"),
        (ask(5, namespace="n" * 201), "invalid_request"),
    ],
)
def test_what_cannot_be_asked_is_refused_and_starts_nothing(house, client, message, code):
    client.say(message)
    house.turn()
    assert codes(client.hear()) == [(5, code)]
    assert house.launcher.workers == []
    assert len(house.server.requests) == 0


def test_a_pin_can_be_cancelled_before_and_after_a_worker_knows_of_it(house, client):
    client.say(pin(1), pin(2))
    house.turn()
    client.say(Cancel(id=1))
    house.turn()
    assert codes(client.hear()) == [(1, "cancelled")]
    worker = house.ready_worker()
    _, asked = worker.hear()
    client.say(Cancel(id=2))
    house.turn()
    assert worker.hear() == [Cancel(id=asked.id)]
    worker.say(Failed(id=asked.id, code="cancelled", message=""))
    house.turn()
    assert codes(client.hear()) == [(2, "cancelled")]


def test_a_lost_lease_cancels_a_pin(house, client):
    client.say(pin(1))
    house.turn()
    worker = house.ready_worker()
    _, asked = worker.hear()
    house.turn(LEASE_SECONDS + 1)
    assert Cancel(id=asked.id) in worker.hear()
    assert len(house.server.requests) == 0


def test_pins_die_with_their_worker(house, client):
    client.say(pin(1), ListPins(id=2, model="demo"), Unpin(id=3, model="demo", name="system"))
    house.turn()
    house.ready_worker()
    die(house)
    assert codes(client.hear()) == [(1, "worker_died"), (2, "worker_died"), (3, "worker_died")]


def test_a_model_is_not_removed_under_a_pin_that_is_being_made(house, client):
    client.say(pin(1), RemoveModel(id=2, model="demo"))
    house.turn()
    assert codes(client.hear()) == [(2, "model_busy")]


def test_when_memory_is_short_pins_can_be_let_go_but_not_made(house, client):
    client.say(ask(1))
    house.turn()
    worker = house.ready_worker()
    load, _ = worker.hear()
    worker.say(holds(load))
    house.turn(0.2)
    house.sensor.available = 0
    for _ in range(10):
        house.turn(0.2)
        for message in worker.hear():
            if isinstance(message, SetTarget):
                worker.say(holds(message))
    client.say(pin(2), Unpin(id=3, model="demo", name="system"))
    house.turn()
    assert codes(client.hear()) == [(2, "out_of_memory")]
    assert [message.name for message in worker.hear() if isinstance(message, Unpin)] == ["system"]


# -- owners -------------------------------------------------------------------------------------------------------


def test_owners_are_the_supervisors_to_say(house, client):
    other = house.client()
    client.say(ask(1, owner=99), ask(2))
    other.say(ask(3, owner=1))
    house.turn()
    worker = house.ready_worker()
    owners = {message.prompt: message.owner for message in worker.hear() if isinstance(message, Generate)}
    assert owners["p1"] == owners["p2"]
    assert {*owners.values()} == {1, 2}
    ids = [request.id for request in house.server.requests]
    worker.say(*(finished(id_) for id_ in ids))
    house.turn()
    client.say(ask(4))
    house.turn()
    assert [message.owner for message in worker.hear()] == [owners["p1"]]  # also after it had nothing open


# -- deadlines ----------------------------------------------------------------------------------------------------


def test_what_has_passed_here_is_no_longer_left_to_the_worker(house, client):
    client.say(ask(1, 5.0), ask(2), ask(3, 60.0))
    house.turn()
    house.turn(2.0)
    worker = house.ready_worker()
    left = {message.prompt: message.deadline_seconds for message in worker.hear() if isinstance(message, Generate)}
    assert left == {"p1": pytest.approx(3.0), "p2": 0.0, "p3": pytest.approx(58.0)}
    client.say(Ping())
    house.turn(4.0)  # the worker sees to it from now on
    assert codes(client.hear()) == []


def test_a_deadline_holds_though_the_worker_reads_a_model_or_hangs(house, client):
    client.say(ask(1, 5.0), ask(2))
    house.turn()
    worker = house.ready_worker()
    asked = next(m for m in worker.hear() if isinstance(m, Generate) and m.deadline_seconds)
    client.say(Ping())
    house.turn(5.0 + LATE_SECONDS / 2)
    assert codes(client.hear()) == []
    house.turn(LATE_SECONDS)
    assert codes(client.hear()) == [(1, "deadline_exceeded")]
    assert worker.hear() == [Cancel(id=asked.id)]
    worker.say(failure(asked.id, Cancelled("the request was cancelled")))
    house.turn()
    assert client.hear() == []


def test_a_deadline_that_passes_while_a_worker_starts(house, client):
    client.say(ask(1, 3.0), ask(2), pin(3))
    house.turn()
    house.turn(2.9)
    assert client.hear() == []
    house.turn(0.2)
    [failed] = client.hear()
    assert (failed.id, failed.code) == (1, "deadline_exceeded")
    worker = house.ready_worker()
    assert [type(message) for message in worker.hear()] == [LoadModel, Generate, Pin]


def test_an_answer_that_goes_on_in_another_worker_has_no_more_time_than_it_had(house, client):
    client.say(ask(1, 10.0, resume=True), ask(2, 1.0, resume=True))
    house.turn()
    house.ready_worker()
    client.say(Ping())
    house.turn(0.8)
    die(house)
    house.turn(0.3)
    assert codes(client.hear()) == [(2, "deadline_exceeded")]
    _, again = house.ready_worker().hear()
    assert 8.0 < again.deadline_seconds < 9.0


# -- keys and values given back -----------------------------------------------------------------------------------


def report(order: LoadModel | SetTarget, **fields) -> Report:
    [residency] = holds(order).models
    return Report(models=(msgspec.structs.replace(residency, **fields),))


def loaded(house, client):
    """A worker with one model and a request: its line, and what it was told to load."""
    client.say(generate(1))
    house.turn()
    worker = house.ready_worker()
    load, _ = worker.hear()
    return worker, load


def test_cached_keys_and_values_go_before_any_block(house, client):
    worker, load = loaded(house, client)
    worker.say(report(load, kv_nbytes=200 * MB, kv_cached_nbytes=200 * MB, cache_nbytes=200 * MB))
    house.turn(0.2)
    house.sensor.available = GB // 2 - 50 * MB
    house.turn(0.3)
    assert worker.hear() == [Trim(nbytes=50 * MB + SHRINK_MARGIN)]
    house.sensor.available += 40 * MB  # a moment later, before any report: most of it has come
    house.turn(0.3)
    assert worker.hear() == [Trim(nbytes=10 * MB + SHRINK_MARGIN)]
    house.sensor.available -= 300 * MB
    house.turn(0.3)
    assert any(isinstance(message, SetTarget) for message in worker.hear())


def test_cached_keys_and_values_go_before_a_model_is_refused(house, client):
    worker, load = loaded(house, client)
    cached = 200 * MB
    least = report(
        load, nbytes=GB // 5, target_nbytes=GB // 5, kv_nbytes=cached, kv_cached_nbytes=cached, cache_nbytes=cached
    )
    house.sensor.available = GB // 2 + GB // 5 - 50 * MB  # the other one's base less 50 MB
    worker.say(least)
    house.turn(0.2)
    worker.hear()
    worker.say(least)
    client.say(generate(2, model="other"))
    house.turn()
    told = worker.hear()
    assert codes(client.hear()) == []
    assert [type(message) for message in told if not isinstance(message, SetTarget)] == [Trim, LoadModel, Generate]
    [trim] = [message for message in told if isinstance(message, Trim)]
    assert 0 < trim.nbytes <= 100 * MB


def test_saved_pins_are_read_back_as_far_as_there_is_room(house, client):
    house.sensor.available = GB // 2 + GB // 5 + 300 * MB
    _, load = loaded(house, client)
    assert load.pins_nbytes == 300 * MB


def squeezed(house, client, seconds: float = 4.0):
    """Memory gets short with a model at its base and 300 MB of keys and values; what the worker was told since."""
    worker, load = loaded(house, client)
    worker.say(report(load, kv_nbytes=300 * MB, running=4))
    house.turn(0.2)
    house.sensor.available = GB // 2 - 900 * MB
    order, told = load, []
    for _ in range(round(seconds / 0.1)):
        client.say(Ping())
        house.turn(0.1)
        for message in worker.hear():
            told.append(message)
            if isinstance(message, SetTarget):
                order = message
                house.sensor.available = GB // 2 - 100 * MB  # what the model gave back
                worker.say(report(order, kv_nbytes=300 * MB, running=4))
            if isinstance(message, LimitKv) and house.sensor.available < GB // 2:
                house.sensor.available = GB // 2 + 20 * MB
                worker.say(report(order, kv_nbytes=message.nbytes, running=3, waiting=1))
    return worker, order, told


def test_requests_give_their_places_up_at_last_and_get_them_back(house, client):
    worker, order, told = squeezed(house, client)
    assert order.target_nbytes == GB // 5  # the base: nothing is left to shrink
    [limit] = [message for message in told if isinstance(message, LimitKv)]
    assert limit == LimitKv(nbytes=200 * MB)
    assert told.index(limit) > told.index(order)
    house.sensor.available = 3 * GB
    for _ in range(30):
        client.say(Ping())
        house.turn(0.1)
    assert [message for message in worker.hear() if isinstance(message, LimitKv)] == [LimitKv(nbytes=0)]


def test_models_do_not_grow_before_requests_have_their_places_back(house, client):
    worker, *_ = squeezed(house, client)
    told = []
    house.sensor.available = 3 * GB
    for _ in range(50):
        client.say(Ping())
        house.turn(0.1)
        for message in worker.hear():
            told.append(type(message))
            if isinstance(message, SetTarget):
                worker.say(holds(message))
    assert told.index(LimitKv) < told.index(SetTarget)


def test_idle_models_go_before_requests_do(house, client):
    worker, load = loaded(house, client)
    client.say(generate(2, model="other"))
    house.turn()
    other, asked = worker.hear()
    worker.say(holds(other), finished(asked.id))
    both = (*report(load, kv_nbytes=300 * MB, running=4).models, *holds(other).models)
    worker.say(Report(models=both))
    house.turn(0.2)
    house.sensor.available = 0
    told = []
    for _ in range(60):
        client.say(Ping())
        house.turn(0.1)
        for message in worker.hear():
            told.append(type(message).__name__)
            if isinstance(message, SetTarget):
                both = tuple(
                    msgspec.structs.replace(r, nbytes=message.target_nbytes, target_nbytes=message.target_nbytes)
                    if r.model == message.model
                    else r
                    for r in both
                )
                worker.say(Report(models=both))
    assert told.index("UnloadModel") < told.index("LimitKv")


def test_the_next_worker_has_not_heard_of_a_limit(house, client):
    squeezed(house, client)
    assert house.server.budget.squeeze.limit >= LEAST
    die(house)
    assert house.server.budget.squeeze.limit == 0
