"""How the daemon ends, and how it takes other settings, with a fake worker's line in the test's hand."""

from __future__ import annotations

import pytest

from ebbflow.formats.child_messages import Exit
from ebbflow.formats.errors import Cancelled
from ebbflow.formats.messages import AddModel, Cancel, Failed, Finished, GetStatus, ListModels, Resize, failure
from ebbflow.formats.units import AUTO

from support.house import House, finished, generate, holds
from support.models import write_model


@pytest.fixture
def house(tmp_path):
    write_model(tmp_path, "demo")
    house = House(tmp_path)
    yield house
    house.close()


def test_while_it_drains_only_what_was_begun_goes_on(house):
    client = house.client()
    client.say(generate(1), AddModel(id=2, source="/x", name="new"))
    house.turn()
    worker = house.ready_worker()
    house.server.drain(house.now, 10)
    client.say(generate(3), Resize(id=4, model="demo", wish=AUTO), ListModels(id=5))
    house.turn(1)
    refused = [message for message in client.hear() if isinstance(message, Failed)]
    assert [(failed.id, failed.code) for failed in refused] == [(3, "daemon_gone"), (4, "daemon_gone")]
    assert house.launcher.jobs[0].signals == ["TERM"]
    house.launcher.jobs[0].code = 0
    [load, forwarded] = worker.hear()
    worker.say(holds(load), finished(forwarded.id))
    house.turn(1)
    heard = client.hear()
    assert any(isinstance(message, Finished) for message in heard)
    house.turn(1)
    assert worker.hear()[-1] == Exit()
    assert not house.server.finished
    house.launcher.workers[0].code = 0
    house.turn(1)
    house.turn(1)
    assert house.server.finished
    heard += client.hear()
    assert [message.code for message in heard if isinstance(message, Failed)] == ["cancelled"]  # the add


@pytest.mark.parametrize("how", ["time", "asked again"])
def test_draining_ends_when_its_time_is_over_or_it_is_asked_again(house, how):
    client = house.client()
    client.say(generate(1))
    house.turn()
    worker = house.ready_worker()
    house.server.drain(house.now, 5)
    house.turn(4.9)
    assert client.hear() == []
    if how == "time":
        house.turn(0.2)
    else:
        house.server.drain(house.now, 10)
        house.turn()
    [failed] = client.hear()
    assert failed.code == "cancelled"
    assert worker.hear()[-1] == Exit()
    house.server.drain(house.now, 10)  # the third time nobody is waited for
    house.turn()
    assert house.launcher.workers[0].signals == ["KILL"]


def test_other_limits_hold_from_the_next_look(house):
    house.server.configure(reserve=123, battery_reserve=4, cap=456, idle_seconds=1.0)
    client = house.client()
    client.say(GetStatus(id=1))
    house.turn()
    assert client.hear()[0].reserve_nbytes == 123
    assert house.sensor.cap == 456
    client.say(generate(2))
    house.turn()
    worker = house.ready_worker()
    client.say(Cancel(id=2))
    house.turn()
    [_load, forwarded, _] = worker.hear()
    worker.say(failure(forwarded.id, Cancelled("")))
    house.turn()
    house.turn(1.1)
    house.turn(1.1)
    assert Exit() in worker.hear()
