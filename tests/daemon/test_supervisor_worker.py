"""The worker's life as the supervisor sees it: started, crashed, killed, idle, replaced."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.daemon.supervisor.budget import SHRINK_MARGIN
from ebbflow.daemon.supervisor.children import LAST_WORDS_SECONDS, LEAVE_SECONDS
from ebbflow.daemon.supervisor.silence import HUNG_SECONDS, LOADING_SECONDS
from ebbflow.daemon.supervisor.terms import Terms, read_terms
from ebbflow.daemon.supervisor.worker_process import COMPILING_SECONDS, READY_SECONDS, START_ATTEMPTS
from ebbflow.formats.child_messages import Exit, LoadModel, Ready, Report, SetTarget, Trim, UnloadModel
from ebbflow.formats.messages import (
    LEASE_SECONDS,
    Added,
    Cancel,
    Chunk,
    Done,
    Failed,
    Generate,
    GetStatus,
    Pause,
    Pin,
    Ping,
    Pins,
    Progress,
    RemoveModel,
    Resize,
    Resized,
    Resume,
    ShowModel,
    Shutdown,
    YieldMemory,
)
from ebbflow.formats.units import AUTO, SizeWish

from support.house import GB, MB, House, finished, generate, holds
from support.models import write_model


@pytest.fixture
def house(tmp_path):
    write_model(tmp_path, "demo")
    house = House(tmp_path, idle_seconds=60)
    yield house
    house.close()


@pytest.fixture
def client(house):
    return house.client()


def begin(house, client, number=1, **options):
    """A request that the (ready) worker is at: the worker's line and the two messages that it got."""
    client.say(generate(number, **options))
    house.turn()
    worker = house.ready_worker()
    load, forwarded = worker.hear()
    return worker, load, forwarded


def pass_time(house, client, seconds):
    """Let time pass for a client that is alive."""
    step = LEASE_SECONDS / 2
    while seconds > 0:
        client.say(Ping())
        house.turn(min(step, seconds))
        seconds -= step
    client.hear()


def failures(messages):
    return [(message.id, message.code) for message in messages if isinstance(message, Failed)]


def mourn(house):
    """The turn in which an end is noticed, and the one in which the last words are over."""
    house.turn()
    house.turn(LAST_WORDS_SECONDS * 1.5)


def die(house, code=-9):
    """The newest worker ends."""
    house.launcher.workers[-1].code = code
    mourn(house)


def test_a_dead_workers_requests_fail_at_once_and_the_next_gets_a_new_one(house, client):
    begin(house, client)
    client.say(generate(2))
    house.turn()
    before = house.now
    die(house)
    assert house.now - before < 1
    heard = client.hear()
    assert failures(heard) == [(1, "worker_died"), (2, "worker_died")]
    assert "killed by signal 9" in heard[0].message
    assert len(house.launcher.workers) == 1
    assert house.launcher.workers[0].closed
    worker, load, forwarded = begin(house, client, 3)
    assert len(house.launcher.workers) == 2
    assert load.target_nbytes == GB
    worker.say(finished(forwarded.id))
    house.turn()
    assert client.hear() == [finished(3)]


def test_last_words_of_a_dead_worker_count(house, client):
    worker, _, forwarded = begin(house, client)
    client.say(generate(2))
    house.turn()
    house.launcher.workers[0].code = 1
    house.turn()
    worker.say(finished(forwarded.id))
    house.turn(LAST_WORDS_SECONDS * 1.5)
    assert client.hear()[0] == finished(1)
    assert len(house.server.requests) == 0


def test_late_words_of_a_worker_that_is_buried_do_not(house, client):
    old, _, forwarded = begin(house, client)
    die(house)
    _, _, again = begin(house, client, 2)
    client.hear()
    old.say(Ready(pid=1), Chunk(id=again.id, text="ghost", tokens=1), finished(forwarded.id), finished(again.id))
    house.turn()
    assert client.hear() == []


def test_a_worker_that_dies_while_starting_is_tried_again_but_not_for_ever(house, client):
    client.say(generate(1))
    house.turn()
    for attempt in range(START_ATTEMPTS):
        assert len(house.launcher.workers) == attempt + 1
        assert client.hear() == []
        house.launcher.workers[-1].words = "ImportError: no numba"
        die(house, code=1)
    [failed] = client.hear()
    assert (failed.id, failed.code) == (1, "worker_died")
    assert "exit code 1" in failed.message
    assert "ImportError: no numba" in failed.message
    house.turn(100)
    assert len(house.launcher.workers) == START_ATTEMPTS
    client.say(generate(2))
    house.turn()
    die(house, code=1)
    assert failures(client.hear()) == [(2, "worker_died")]
    assert len(house.launcher.workers) == START_ATTEMPTS + 1


def test_a_good_start_forgives_bad_ones(house, client):
    client.say(generate(1))
    house.turn()
    die(house, code=1)
    die(house, code=1)
    house.ready_worker()
    die(house)
    assert failures(client.hear()) == [(1, "worker_died")]
    client.say(generate(2))
    house.turn()
    die(house, code=1)
    assert client.hear() == []
    assert len(house.launcher.workers) == 5


def test_a_worker_that_does_not_get_ready_is_killed(house, client):
    client.say(generate(1))
    house.turn()
    pass_time(house, client, READY_SECONDS - 1)
    assert house.launcher.workers[0].signals == []
    client.say(Ping())
    house.turn(1)
    assert house.launcher.workers[0].signals == ["KILL"]
    house.sensor.kills += 1  # of some other program
    mourn(house)
    [_, failed] = client.hear()
    assert failed.code == "worker_died"
    assert f"not ready after {READY_SECONDS:.0f} s" in failed.message
    assert len(house.launcher.workers) == 1


def test_a_worker_hears_what_there_is_to_spare(house, client):
    house.sensor.available = 3 * GB
    client.say(generate(1))
    house.turn()
    assert house.launcher.worker_spare == 3 * GB - GB // 2  # the reserve


def test_a_worker_that_compiles_gets_more_time(house, client):
    client.say(generate(1))
    house.turn()
    worker = house.child(house.launcher.workers[0])
    worker.say(Progress(id=0, stage="compiling"))
    pass_time(house, client, COMPILING_SECONDS - 1)
    assert house.launcher.workers[0].signals == []
    client.say(Ping())
    house.turn(1)
    assert house.launcher.workers[0].signals == ["KILL"]
    mourn(house)
    assert f"not ready after {COMPILING_SECONDS:.0f} s" in client.hear()[-1].message


def test_a_worker_that_is_ready_may_live_for_ever(house, client):
    worker, load, forwarded = begin(house, client)
    worker.say(holds(load), finished(forwarded.id))
    pass_time(house, client, 40)
    client.say(generate(2))
    house.turn()
    pass_time(house, client, HUNG_SECONDS - 1)
    assert house.launcher.workers[0].signals == []


def test_a_worker_that_cannot_be_started_is_a_typed_error(house, client):
    house.launcher.broken = OSError(12, "Cannot allocate memory")
    client.say(generate(1))
    house.turn()
    [failed] = client.hear()
    assert failed.code == "worker_died"
    assert "Cannot allocate memory" in failed.message
    house.launcher.broken = None
    begin(house, client, 2)


@pytest.mark.parametrize(
    ("code", "kills", "target"), [(-9, 1, int(0.8 * GB)), (-9, 0, GB), (-11, 1, GB)], ids=["oom", "kill -9", "segfault"]
)
def test_a_worker_killed_for_memory_is_replaced_by_a_smaller_one(house, client, code, kills, target):
    begin(house, client)
    house.sensor.kills += kills
    die(house, code)
    _, load, _ = begin(house, client, 2)
    assert load.target_nbytes == target


def test_an_idle_worker_is_sent_home(house, client):
    worker, load, forwarded = begin(house, client)
    for _ in range(5):
        worker.say(holds(load))
        pass_time(house, client, 20)
    assert worker.hear() == []  # busy all the time
    worker.say(finished(forwarded.id))
    house.turn()
    house.turn(59)
    assert worker.hear() == []
    house.turn(1)
    assert worker.hear() == [Exit()]
    house.turn(LEAVE_SECONDS - 0.5)
    assert house.launcher.workers[0].signals == []
    house.turn(0.5)
    assert house.launcher.workers[0].signals == ["KILL"]
    mourn(house)
    assert house.server.worker.phase == "absent"
    assert len(house.launcher.workers) == 1


def test_the_sensor_rests_while_nothing_is_loaded_and_looks_more_often_where_memory_is_near(house, client):
    for _ in range(20):
        house.turn(0.2)
    assert house.sensor.readings == 0
    worker, load, forwarded = begin(house, client)
    worker.say(holds(load), finished(forwarded.id))
    house.turn()
    readings = house.sensor.readings
    for _ in range(20):
        house.turn(0.1)
    assert house.sensor.readings - readings <= 8
    assert house.server.following.wait_seconds(house.now) <= 0.25
    house.sensor.available = 700 * MB  # 200 MB above the reserve
    house.turn(0.3)
    readings = house.sensor.readings
    for _ in range(20):
        house.turn(0.05)
    assert house.sensor.readings - readings == pytest.approx(20, abs=1)
    assert house.server.following.wait_seconds(house.now) <= 0.05


def test_a_request_that_comes_while_the_worker_leaves_gets_the_next_one(house, client):
    worker, _, forwarded = begin(house, client)
    worker.say(finished(forwarded.id))
    house.turn(60)
    house.turn(60)
    assert Exit() in worker.hear()
    client.hear()
    client.say(generate(2))
    house.turn()
    assert worker.hear() == []
    die(house, 0)
    assert client.hear() == []
    house.ready_worker()
    assert len(house.launcher.workers) == 2


def test_a_request_cancelled_during_the_start_leaves_a_worker_that_goes_home(house, client):
    client.say(generate(1), Cancel(id=1))
    house.turn()
    worker = house.ready_worker()
    assert worker.hear() == []
    house.turn(61)
    assert worker.hear() == [Exit()]


# -- a worker that hangs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [generate(2), Resize(id=2, model="demo", wish=SizeWish(fraction=0.5))])
def test_a_worker_that_says_nothing_is_killed_and_everybody_is_told(house, client, ask):
    worker, load, forwarded = begin(house, client)
    worker.say(holds(load), finished(forwarded.id))
    pass_time(house, client, 3 * LEASE_SECONDS)
    client.say(ask)
    house.turn()
    pass_time(house, client, HUNG_SECONDS - 1)
    assert house.launcher.workers[0].signals == []
    client.say(Ping())
    house.turn(1)
    house.turn()
    assert house.launcher.workers[0].signals == ["KILL"]
    house.sensor.kills += 1  # of some other program
    mourn(house)
    [_, failed] = client.hear()
    assert (failed.id, failed.code) == (2, "worker_died")
    assert "it hung and was killed" in failed.message
    begin(house, client, 3)


def test_a_worker_that_reports_may_take_its_time(house, client):
    worker, load, _ = begin(house, client)
    for _ in range(20):
        worker.say(holds(load))
        pass_time(house, client, HUNG_SECONDS / 2)
    assert house.launcher.workers[0].signals == []


def test_a_worker_that_loads_may_be_silent_for_longer(house, client):
    begin(house, client)
    pass_time(house, client, LOADING_SECONDS - 1)
    assert house.launcher.workers[0].signals == []
    pass_time(house, client, 2)
    house.turn()
    assert house.launcher.workers[0].signals == ["KILL"]


def test_silence_that_nobody_could_hear_does_not_count(house, client):
    worker, load, _ = begin(house, client)
    worker.say(holds(load))
    house.turn()
    client.say(Ping())
    house.turn(1000)  # the whole machine was stopped
    house.turn()
    assert house.launcher.workers[0].signals == []


# -- sizes --------------------------------------------------------------------------------------------------------


def test_a_wish_for_a_model_that_is_not_loaded_is_remembered(house, client):
    client.say(Resize(id=1, model="demo", wish=SizeWish(nbytes=300 * MB)))
    house.turn()
    assert client.hear() == [Resized(id=1)]
    assert house.launcher.workers == []
    _, load, _ = begin(house, client, 2)
    assert load.target_nbytes == 300 * MB
    die(house)
    _, load, _ = begin(house, client, 3)
    assert load.target_nbytes == 300 * MB


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (SizeWish(nbytes=100 * MB), "200000000"),
        (SizeWish(fraction=0.1), "200 MB"),
        (SizeWish(fraction=1.5), "between 0 and 1"),
        (SizeWish(fraction=float("nan")), "between 0 and 1"),
        (SizeWish(nbytes=GB, fraction=0.5), "not both"),
        (SizeWish(nbytes=-1), "200 MB"),
    ],
)
def test_impossible_sizes_are_refused_with_numbers(house, client, wish, said):
    client.say(Resize(id=1, model="demo", wish=wish))
    house.turn()
    [failed] = client.hear()
    assert failed.code == "invalid_size"
    assert said in failed.message
    assert len(house.server.requests) == 0


def test_a_loaded_model_is_resized_by_the_worker_and_the_answer_says_why(house, client):
    worker, load, _ = begin(house, client)
    worker.say(holds(load))
    house.turn()
    client.say(Resize(id=2, model="demo", wish=SizeWish(fraction=0.5)))
    house.turn()
    [order] = worker.hear()
    assert (order.model, order.target_nbytes) == ("demo", GB // 2)
    [residency] = holds(order).models
    worker.say(Resized(id=order.id, residency=residency, released_nbytes=GB // 2, seconds=0.1))
    house.turn()
    [resized] = client.hear()
    assert (resized.id, resized.released_nbytes, resized.seconds) == (2, GB // 2, 0.1)
    assert (resized.residency.wish, resized.residency.reason) == (SizeWish(fraction=0.5), "asked for 50%")


def test_whoever_asks_about_a_damaged_model_is_told(house, client):
    worker, load, _ = begin(house, client)
    for nbytes in (GB // 2, GB // 4):
        (residency,) = holds(load).models
        damaged = msgspec.structs.replace(residency, nbytes=nbytes, damage="block 7 is bad", damaged_at_nbytes=GB // 2)
        worker.say(Report(models=(damaged,)))
        house.turn()
        client.say(GetStatus(id=2), ShowModel(id=3, model="demo"))
        house.turn()
        status, detail = client.hear()
        words = "damaged beyond 500 MB: add or import it again"
        assert status.models[0].reason == (words if nbytes == GB // 2 else f"all of it fits; {words}")
        assert status.models[0].damage == detail.damage == "block 7 is bad"


def test_a_resize_under_way_fails_with_its_worker_and_the_wish_stays(house, client):
    begin(house, client)
    client.say(Resize(id=2, model="demo", wish=SizeWish(fraction=0.5)))
    house.turn()
    die(house)
    assert failures(client.hear()) == [(1, "worker_died"), (2, "worker_died")]
    _, load, _ = begin(house, client, 3)
    assert load.target_nbytes == GB // 2


def test_memory_getting_short_shrinks_a_model_in_the_same_turn(house, client):
    worker, load, _ = begin(house, client)
    worker.say(holds(load))
    house.turn(0.2)
    house.sensor.available = 400 * MB
    house.turn(0.3)
    [trim, order] = worker.hear()
    assert trim == Trim(nbytes=100 * MB + SHRINK_MARGIN)
    assert order.id == 0
    assert GB - 130 * MB < order.target_nbytes <= GB - 100 * MB
    worker.say(holds(order))
    house.sensor.available = 10 * GB
    house.turn(0.2)
    for _ in range(100):
        house.turn(0.2)
        for order in worker.hear():
            worker.say(holds(order))
        client.say(Ping())
    assert order.target_nbytes == GB


def test_a_worker_that_reads_nothing_is_killed(house, client, monkeypatch):
    begin(house, client)
    monkeypatch.setattr(house.children, "lost", lambda: [house.lost(house.launcher.workers[0].identity)])
    house.turn()
    monkeypatch.undo()
    house.turn()
    assert house.launcher.workers[0].signals == ["KILL"]
    mourn(house)
    assert failures(client.hear()) == [(1, "worker_died")]


# -- several models, and none ---------------------------------------------------------------------------------------


def two_models(house, client):
    """Two loaded models of 1 GB with bases of 200 MB: `demo` is asked something, `other` is idle."""
    write_model(house.root, "other")
    worker, load, _ = begin(house, client)
    client.say(generate(2, "other"))
    house.turn()
    second, asked = worker.hear()
    worker.say(*(both(load, second)), finished(asked.id))
    house.turn(0.3)
    client.hear()
    return worker, load, second


def both(*orders):
    """One report of a worker that does as each of these says."""
    return [Report(models=tuple(model for order in orders for model in holds(order).models))]


@pytest.mark.parametrize(("shared", "dropped"), [(0, 100 * MB), (800 * MB, 200 * MB)])
def test_the_budget_hears_what_models_share(house, client, shared, dropped):
    """Of what two models drop that have much in common, a part frees nothing: so they drop more."""
    worker, first, second = two_models(house, client)
    [report] = both(first, second)
    whole = [msgspec.structs.replace(model, nbytes=GB, target_nbytes=GB) for model in report.models]
    whole[1] = msgspec.structs.replace(whole[1], shared_nbytes=shared + 50 * MB, shared_base_nbytes=50 * MB)
    worker.say(Report(models=tuple(whole)))
    house.sensor.available = GB // 2 + SHRINK_MARGIN - 100 * MB
    house.turn(0.3)
    orders = {order.model: order.target_nbytes for order in worker.hear() if isinstance(order, SetTarget)}
    assert sum(GB - target for target in orders.values()) == pytest.approx(dropped, rel=0.01)


def obey(worker, held):
    """Do as the worker is told; what else it heard."""
    others = []
    for order in worker.hear():
        match order:
            case SetTarget() | LoadModel():
                held[order.model] = order
            case UnloadModel():
                held.pop(order.model)
                others.append(order)
            case _:
                others.append(order)
    if held:
        worker.say(*both(*held.values()))
    return others


def test_when_all_are_at_their_least_idle_ones_are_unloaded_and_come_back_on_demand(house, client):
    worker, load, second = two_models(house, client)
    held, heard = {"demo": load, "other": second}, []
    house.sensor.available = 100 * MB
    for _ in range(60):
        client.say(Ping())
        house.turn(0.1)
        heard += obey(worker, held)
    assert UnloadModel(model="other") in heard
    assert {name: order.target_nbytes for name, order in held.items()} == {"demo": GB // 5}
    client.hear()
    client.say(generate(3), generate(4, "other"))
    house.turn()
    assert failures(client.hear()) == [(3, "out_of_memory"), (4, "out_of_memory")]
    house.sensor.available = 2 * GB
    house.turn(0.3)
    client.say(generate(5), generate(6, "other"))
    house.turn()
    again = [type(message) for message in worker.hear()]
    assert again == [Generate, LoadModel, Generate]


def test_an_idle_model_makes_room_for_one_that_is_asked(house, client):
    worker, load, second = two_models(house, client)
    write_model(house.root, "third")
    held = {"demo": load, "other": second}
    house.sensor.available = GB // 2 + 150 * MB
    for _ in range(10):
        house.turn(0.1)
        obey(worker, held)
    assert failures(client.hear()) == []
    worker.say(*both(*(SetTarget(model=model, target_nbytes=GB // 5) for model in held)))
    house.turn(0.1)
    worker.hear()
    client.say(generate(7, "third"))
    house.turn()
    orders = worker.hear()
    assert UnloadModel(model="other") in orders
    assert [order.model for order in orders if isinstance(order, LoadModel)] == ["third"]
    assert not any(isinstance(order, UnloadModel) and order.model == "demo" for order in orders)


@pytest.mark.parametrize(("masks", "fits"), [("m", True), ("other", False)])
def test_a_variant_needs_no_room_for_masks_that_are_there(house, client, masks, fits):
    write_model(house.root, "demo", masks="m", base_masks=80 * MB)
    write_model(house.root, "variant", masks=masks, base_masks=80 * MB)
    house.server._library.scan()
    worker, load, _ = begin(house, client)
    least = SetTarget(model="demo", target_nbytes=GB // 5)
    house.sensor.available = GB // 2 - 1
    worker.say(holds(load))
    house.turn(0.3)
    worker.hear()
    worker.say(holds(least))
    house.sensor.available = GB // 2 + 125 * MB  # and a base takes 200
    house.turn(0.3)
    client.hear()
    client.say(generate(2, "variant"))
    house.turn()
    assert [order.model for order in worker.hear() if isinstance(order, LoadModel)] == ["variant"] * fits
    assert failures(client.hear()) == [(2, "out_of_memory")] * (not fits)


def test_paused_everything_gives_way_and_the_worker_goes_home_when_nobody_waits(house, client):
    worker, load, second = two_models(house, client)
    held = {"demo": load, "other": second}
    client.say(Pause(id=20))
    house.turn()
    assert client.hear() == [Done(id=20)]
    heard = []
    for _ in range(20):
        client.say(Ping())
        house.turn(0.1)
        heard += obey(worker, held)
    assert heard == [UnloadModel(model="other")]
    assert held["demo"].target_nbytes == GB // 5
    client.hear()
    client.say(GetStatus(id=21), Resume(id=22))
    house.turn()
    status, done = client.hear()
    assert status.paused
    assert status.models[0].reason == "paused (`ebb resume` ends it)"
    assert done == Done(id=22)
    client.say(Pause(id=23), Cancel(id=1))
    house.turn()
    worker.say(Failed(id=1, code="cancelled", message=""))
    for _ in range(20):
        house.turn(0.1)
        heard += obey(worker, held)
    assert heard[-2:] == [UnloadModel(model="demo"), Exit()]


def test_memory_is_yielded_for_a_while(house, client):
    worker, load, _ = begin(house, client)
    held = {"demo": load}
    worker.say(holds(load))
    house.sensor.available = 700 * MB
    house.turn(0.3)
    client.say(YieldMemory(id=2, nbytes=500 * MB, seconds=60), GetStatus(id=3))
    house.turn(0.1)
    done, status = client.hear()
    assert done == Done(id=2)
    assert (status.yielded_nbytes, round(status.yield_seconds), status.reserve_nbytes) == (500 * MB, 60, GB)
    house.turn(0.1)
    obey(worker, held)
    assert GB - 330 * MB <= held["demo"].target_nbytes <= GB - 300 * MB
    client.say(YieldMemory(id=4, nbytes=0), GetStatus(id=5))
    house.turn(0.1)
    assert client.hear()[-1].yielded_nbytes == 0


@pytest.mark.parametrize(
    ("ask", "code"),
    [
        (YieldMemory(id=1, nbytes=-1), "invalid_size"),
        (YieldMemory(id=1, nbytes=2**63), "invalid_size"),
        (YieldMemory(id=1, nbytes=1, seconds=0), "invalid_request"),
        (YieldMemory(id=1, nbytes=1, seconds=float("nan")), "invalid_request"),
        (Resize(id=1, model="demo", wish=AUTO, floor_nbytes=2 * GB), "invalid_size"),
        (Resize(id=1, model="demo", wish=AUTO, floor_nbytes=-1), "invalid_size"),
        (Resize(id=1, model="demo", wish=AUTO, cap_nbytes=100 * MB), "invalid_size"),
        (Resize(id=1, model="demo", wish=AUTO, floor_nbytes=500 * MB, cap_nbytes=400 * MB), "invalid_size"),
        (Resize(id=1, model="demo", wish=AUTO, priority=0.0), "invalid_request"),
        (Resize(id=1, model="demo", wish=AUTO, priority=float("nan")), "invalid_request"),
    ],
)
def test_terms_that_cannot_be(house, client, ask, code):
    client.say(ask)
    house.turn()
    assert failures(client.hear()) == [(1, code)]
    assert house.server.budget.demand.terms == {}


def test_terms_are_kept_over_a_restart_and_forgotten_with_the_model(house, client, tmp_path):
    client.say(Resize(id=1, model="demo", wish=AUTO, floor_nbytes=300 * MB, priority=2.0))
    client.say(Resize(id=2, model="demo", wish=AUTO, cap_nbytes=600 * MB))
    house.turn()
    house.server.close()
    wanted = {"demo": Terms(floor=300 * MB, cap=600 * MB, priority=2.0)}
    assert read_terms(tmp_path) == wanted
    with contextlib.closing(House(tmp_path)) as again:
        assert again.server.budget.demand.terms == wanted
        other = again.client()
        _, load, _ = begin(again, other)
        assert load.target_nbytes == 600 * MB
    with contextlib.closing(House(tmp_path)) as third:
        third.client().say(RemoveModel(id=3, model="demo"))
        third.turn()
    assert read_terms(tmp_path) == {}


# -- the end ------------------------------------------------------------------------------------------------------


def test_shutdown_ends_requests_then_the_worker_then_answers(house, client):
    worker, _, _ = begin(house, client)
    client.say(Shutdown(id=9), generate(3))
    house.turn()
    assert failures(client.hear()) == [(1, "cancelled"), (3, "daemon_gone")]
    assert [type(message) for message in worker.hear()] == [Cancel, Exit]
    assert not house.server.finished
    die(house, 0)
    assert client.hear() == [Done(id=9)]
    assert house.server.finished
    assert len(house.server.requests) == 0


def test_a_second_signal_does_not_wait(house, client):
    begin(house, client)
    house.server.stop(house.now)
    house.turn()
    assert house.launcher.workers[0].signals == []
    house.server.stop(house.now)
    house.turn()
    assert house.launcher.workers[0].signals == ["KILL"]
    mourn(house)
    assert house.server.finished


def test_stopping_while_a_worker_starts_starts_no_other(house, client):
    client.say(generate(1))
    house.turn()
    house.server.stop(house.now)
    house.turn()
    mourn(house)
    assert house.launcher.workers[0].signals == ["KILL"]
    assert house.server.finished
    assert failures(client.hear()) == [(1, "cancelled")]


# -- whatever happens ---------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["ask", "pin", "hurry", "cancel", "die", "oom", "ready", "answer", "odd", "wait", "long", "resize", "vanish"]
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(WORDS, max_size=40))
def test_every_request_ends_exactly_once_whatever_happens(tmp_path_factory, words):
    root = tmp_path_factory.mktemp("library")
    write_model(root, "demo")
    with contextlib.closing(House(root, idle_seconds=3)) as house:
        live_through(house, words)


def live_through(house, words):
    client, worker, asked, heard, forwarded = house.client(), None, 0, [], []
    for word in [*words, "wait"]:
        process = house.launcher.workers[-1] if house.launcher.workers else None
        alive = process is not None and process.code is None
        match word:
            case "ask":
                asked += 1
                client.say(generate(asked))
            case "pin":
                asked += 1
                client.say(Pin(id=asked, model="demo", name="p", prompt="hello"))
            case "hurry":
                asked += 1
                client.say(Generate(id=asked, model="demo", prompt="hello", deadline_seconds=0.5))
            case "resize":
                asked += 1
                client.say(Resize(id=asked, model="demo", wish=SizeWish(fraction=0.5)))
            case "cancel" if asked:
                client.say(Cancel(id=asked))
            case "die" | "oom" if alive:
                house.sensor.kills += word == "oom"
                process.code = -9
            case "ready" if alive:
                worker = house.child(process) if worker is None or worker.of is not process else worker
                worker.of = process
                worker.say(Ready(pid=1))
            case "odd" if worker:
                worker.say(Report(models=()), Added(id=1, summary=house.library.summaries()[0], seconds=0))
            case "answer" if forwarded:
                worker.say(forwarded.pop())
            case "wait" | "long":
                client.say(Ping())
                house.turn(0.2 if word == "wait" else 4)
            case "vanish":
                house.turn(LEASE_SECONDS + 1)
        house.turn()
        if worker:
            for message in worker.hear():
                match message:
                    case Generate():
                        forwarded.append(finished(message.id))
                    case Pin():
                        forwarded.append(Pins(id=message.id, pins=()))
                    case SetTarget(id=number) if number:
                        forwarded.append(Resized(id=number))
                    case LoadModel() | SetTarget():
                        worker.say(holds(message))
        heard += client.hear()
    house.server.stop(house.now)
    house.server._terms_file._writer.submit(int).result()  # the disk knows nothing of our clock
    for _ in range(60):
        house.turn(0.2)
    heard += client.hear()
    assert house.server.finished
    ends = [m.id for m in heard if isinstance(m, Failed | Resized | Pins) or type(m).__name__ == "Finished"]
    assert len(ends) == len(set(ends))
    if "vanish" not in words:
        assert sorted(ends) == list(range(1, asked + 1))
    assert all(process.closed for process in house.launcher.workers)
