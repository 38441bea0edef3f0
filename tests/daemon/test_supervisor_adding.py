"""Adding models: one job at a time, one end for each request, nothing half done left in the library."""

from __future__ import annotations

import pytest

from ebbflow.daemon.supervisor.adding import HOLD_LEAST_SECONDS, HOLD_MOST_SECONDS, JOB_NBYTES, WAIT_MOST_SECONDS
from ebbflow.daemon.supervisor.children import LAST_WORDS_SECONDS, LEAVE_SECONDS
from ebbflow.formats.child_messages import Ready, SetTarget, UnloadModel
from ebbflow.formats.manifest import STACK
from ebbflow.formats.messages import (
    LEASE_SECONDS,
    Added,
    AddModel,
    Cancel,
    Chunk,
    Done,
    ExportModel,
    Failed,
    GetStatus,
    ImportModel,
    ListModels,
    Ping,
    Progress,
    RemoveModel,
    Shutdown,
)
from ebbflow.formats.stack import mark_of
from ebbflow.formats.summary import summary

from support.house import GB, MB, House, finished, generate, holds
from support.models import write_model


@pytest.fixture
def house(tmp_path):
    house = House(tmp_path)
    write_model(tmp_path, "demo")
    house.library.scan()
    yield house
    house.close()


@pytest.fixture
def client(house):
    return house.client()


def add(number, name="new", source="/checkpoint"):
    return AddModel(id=number, source=source, name=name)


def begin(house, client, number=1, name="new"):
    """A running job: its process, its line, and the folder in which it builds."""
    client.say(add(number, name))
    house.turn()
    process = house.launcher.jobs[-1]
    folder = house.root / f".adding-{name}-{process.pid}"
    folder.mkdir()
    (folder / "spool").write_text("half a model")
    job = house.child(process)
    job.say(Ready(pid=process.pid))
    house.turn()
    return process, job, folder


def end(house, process, code=0):
    process.code = code
    house.turn()
    house.turn(LAST_WORDS_SECONDS * 1.5)


def failures(messages):
    return [(message.id, message.code) for message in messages if isinstance(message, Failed)]


def test_a_job_reports_and_the_model_is_there(house, client):
    process, job, folder = begin(house, client)
    assert process.request == AddModel(id=process.request.id, source="/checkpoint", name="new")
    job.say(Progress(id=process.request.id, stage="encode", done=1, total=2))
    house.turn()
    assert client.hear() == [Progress(id=1, stage="encode", done=1, total=2)]
    folder.rename(house.root / "new")
    added = Added(id=process.request.id, summary=summary(write_model(house.root, "new")), seconds=3.0)
    job.say(added)
    house.turn()
    assert client.hear() == [Added(id=1, summary=added.summary, seconds=3.0)]
    end(house, process)
    client.say(ListModels(id=2))
    house.turn()
    assert [model.name for model in client.hear()[0].models] == ["demo", "new"]
    assert process.closed
    assert process.signals == []


def test_others_wait_in_line(house, client):
    process, job, _ = begin(house, client)
    client.say(add(2, "second"), add(3, "third"), GetStatus(id=4))
    house.turn()
    *waiting, status = client.hear()
    assert waiting == [Progress(id=2, stage="waiting"), Progress(id=3, stage="waiting")]
    assert status.adding == ("new", "second", "third")
    assert [process.role for process in status.processes] == ["supervisor", "job"]
    assert len(house.launcher.jobs) == 1
    client.say(Cancel(id=2))
    job.say(Failed(id=process.request.id, code="disk_full", message="no room"))
    house.turn()
    assert sorted(failures(client.hear())) == [(1, "disk_full"), (2, "cancelled")]
    end(house, process, 1)
    assert [job.request.name for job in house.launcher.jobs] == ["new", "third"]
    assert client.hear() == []


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (add(5, "demo"), "model_exists"),
        (add(5, "corrupt"), "model_exists"),
        (add(5, "new"), "model_busy"),
        (add(5, "../evil"), "invalid_name"),
        (add(5, ".hidden"), "invalid_name"),
        (add(5, "other", source=""), "invalid_request"),
        (AddModel(id=5, source="/c", name="other", codec="sparse", masks_of="nobody"), "unknown_model"),
        (RemoveModel(id=5, model="new"), "model_busy"),
    ],
)
def test_what_cannot_be_added_or_removed(house, client, message, code):
    (house.root / "corrupt").mkdir()
    begin(house, client)
    client.say(message)
    house.turn()
    assert failures(client.hear()) == [(5, code)]
    assert len(house.launcher.jobs) == 1


def test_cancel_ends_the_job_and_leaves_nothing(house, client):
    process, job, folder = begin(house, client)
    client.say(Cancel(id=1), Cancel(id=1))
    house.turn()
    assert process.signals == ["TERM"]
    job.say(Progress(id=process.request.id, stage="encode"))
    job.say(Failed(id=process.request.id, code="cancelled", message="yes"))
    client.say(Ping())
    house.turn(LEAVE_SECONDS - 0.5)
    client.hear()
    house.turn(0.5)
    assert process.signals == ["TERM", "KILL"]
    assert client.hear() == []
    end(house, process, -9)
    assert failures(client.hear()) == [(1, "cancelled")]
    assert not folder.exists()
    client.say(add(2))
    house.turn()
    assert len(house.launcher.jobs) == 2


def test_a_model_that_was_ready_before_its_cancel_is_added(house, client):
    process, job, _ = begin(house, client)
    added = Added(id=process.request.id, summary=summary(write_model(house.root, "new")), seconds=3.0)
    job.say(added)
    client.say(Cancel(id=1))
    house.turn()
    end(house, process, -15)
    [heard] = client.hear()
    assert isinstance(heard, Added)
    assert house.library.get("new")


def test_a_client_that_is_gone_needs_no_model(house, client):
    process, _, folder = begin(house, client)
    house.turn(LEASE_SECONDS + 1)
    assert process.signals == ["TERM"]
    end(house, process, -15)
    assert not folder.exists()
    assert client.hear() == []
    assert len(house.server.requests) == 0


def test_a_job_that_dies_says_what_it_wrote_last(house, client):
    process, job, folder = begin(house, client)
    job.say(Chunk(id=process.request.id, text="not a job's word", tokens=1))
    process.words = "MemoryError"
    end(house, process, -11)
    [failed] = client.hear()
    assert (failed.id, failed.code) == (1, "job_died")
    assert "signal 11" in failed.message
    assert "MemoryError" in failed.message
    assert not folder.exists()


def test_a_job_that_cannot_be_started(house, client):
    house.launcher.broken = OSError(2, "No such file")
    client.say(add(1), add(2))
    house.turn()
    assert failures(client.hear()) == [(1, "job_died"), (2, "job_died")]


def test_a_job_that_is_done_and_does_not_go_is_killed(house, client):
    process, job, _ = begin(house, client)
    job.say(Failed(id=process.request.id, code="unsupported_model", message="a duck"))
    house.turn()
    assert failures(client.hear()) == [(1, "unsupported_model")]
    house.turn(LEAVE_SECONDS)
    assert process.signals == ["KILL"]


def test_once_answered_a_name_is_free_and_the_next_of_it_waits_in_line(house, client):
    process, job, _ = begin(house, client)
    job.say(Failed(id=process.request.id, code="disk_full", message="no room"))
    house.turn()
    client.say(add(2), GetStatus(id=3))
    house.turn()
    failed, waiting, status = client.hear()
    assert failed.code == "disk_full"
    assert waiting == Progress(id=2, stage="waiting")
    assert status.adding == ("new",)
    assert len(house.launcher.jobs) == 1
    end(house, process)
    assert len(house.launcher.jobs) == 2


def test_a_model_that_was_just_added_can_be_removed_at_once(house, client):
    process, job, folder = begin(house, client)
    folder.rename(house.root / "new")
    job.say(Added(id=process.request.id, summary=summary(write_model(house.root, "new")), seconds=3.0))
    house.turn()
    client.say(RemoveModel(id=2, model="new"))
    house.turn()
    assert client.hear()[-1] == Done(id=2)
    assert not process.closed


def test_shutdown_ends_jobs(house, client):
    process, _, folder = begin(house, client)
    client.say(add(2, "second"), Shutdown(id=3))
    house.turn()
    assert failures(client.hear()) == [(1, "cancelled"), (2, "cancelled")]
    assert process.signals == ["TERM"]
    end(house, process, -15)
    assert client.hear() == [Done(id=3)]
    assert house.server.finished
    assert not folder.exists()


# -- memory -------------------------------------------------------------------------------------------------------


def test_a_job_may_take_what_an_automatic_model_would_give_back(house, client):
    client.say(generate(1))
    house.turn()
    worker = house.ready_worker()
    load, _ = worker.hear()
    worker.say(holds(load))  # all of its GB, of which 200 MB are its base
    house.sensor.available = 600 * MB
    house.turn(0.2)
    client.say(add(2))
    house.turn()
    assert house.launcher.job_memory == 100 * MB + 800 * MB


def test_a_job_waits_for_room_and_says_how_much_there_is(house, client):
    house.sensor.available = GB // 2 + JOB_NBYTES - 1
    client.say(add(1), add(2, "second"))
    house.turn()
    waiting = Progress(id=1, stage="waiting for memory", done=JOB_NBYTES - 1, total=JOB_NBYTES)
    assert waiting in client.hear()
    assert house.launcher.jobs == []
    house.turn(0.5)
    assert client.hear() == []
    client.say(Ping())
    house.turn(0.6)
    assert waiting in client.hear()
    house.sensor.available += 1
    house.turn(1)
    assert [job.request.name for job in house.launcher.jobs] == ["new"]


def test_waiting_for_room_ends_with_a_cancel_or_after_a_long_time(house, client):
    house.sensor.available = 0
    client.say(add(1))
    house.turn()
    client.hear()
    client.say(Cancel(id=1), add(2, "second"))
    house.turn()
    assert failures(client.hear()) == [(1, "cancelled")]
    for _ in range(int(WAIT_MOST_SECONDS / 5)):
        client.say(Ping())
        house.turn(5)
    [failed] = [message for message in client.hear() if isinstance(message, Failed)]
    assert (failed.id, failed.code) == (2, "out_of_memory")
    assert house.launcher.jobs == []


def test_a_job_for_which_there_will_never_be_room_is_refused_at_once(house, client):
    house.server.adding.most_nbytes = JOB_NBYTES - 1
    house.sensor.available = GB
    client.say(add(1), add(2))
    house.turn()
    heard = client.hear()
    assert failures(heard) == [(1, "out_of_memory"), (2, "out_of_memory")]
    assert "needs at least 700 MB" in heard[0].message
    assert house.launcher.jobs == []


def test_when_memory_is_short_a_job_stands_still_and_goes_on_when_there_is_room(house, client):
    process, _, _ = begin(house, client)
    house.turn(0.1)
    assert process.signals == []
    house.sensor.available = 400 * MB
    house.turn(0.3)
    assert process.signals == ["STOP"]
    assert client.hear()[-1] == Progress(id=1, stage="waiting for memory")
    house.sensor.available = 2 * GB
    house.turn(HOLD_LEAST_SECONDS / 2)
    assert process.signals == ["STOP"]
    house.turn(HOLD_LEAST_SECONDS / 2)
    assert process.signals == ["STOP", "CONT"]
    house.sensor.available = 400 * MB
    house.turn(0.3)
    client.say(Cancel(id=1))
    house.turn()
    assert process.signals == ["STOP", "CONT", "STOP", "TERM", "CONT"]


def test_a_job_does_not_stand_still_for_ever(house, client):
    process, _, folder = begin(house, client)
    house.sensor.available = 400 * MB
    for _ in range(int(HOLD_MOST_SECONDS / 5) + 1):
        client.say(Ping())
        house.turn(5)
    assert process.signals == ["STOP", "KILL"]
    [failed] = [message for message in client.hear() if isinstance(message, Failed)]
    assert (failed.id, failed.code) == (1, "out_of_memory")
    assert "stood still for 5 min" in failed.message
    house.turn()
    house.turn(LAST_WORDS_SECONDS * 1.5)
    assert not folder.exists()


def test_a_job_stands_still_before_an_idle_model_goes(house, client):
    process, _, _ = begin(house, client)
    client.say(generate(2))
    house.turn()
    worker = house.ready_worker()
    load, asked = worker.hear()
    worker.say(holds(load), finished(asked.id))
    house.turn(0.3)
    house.sensor.available = 300 * MB
    house.turn(0.3)
    [_, order] = [message for message in worker.hear() if not isinstance(message, UnloadModel)]
    worker.say(holds(order))
    for _ in range(9):
        house.turn(0.1)
        for message in worker.hear():
            if isinstance(message, SetTarget):
                worker.say(holds(message))
            assert not isinstance(message, UnloadModel) or process.signals == ["STOP"]
    for _ in range(30):
        house.turn(0.1)
    assert process.signals == ["STOP"]
    assert UnloadModel(model="demo") in worker.hear()


def test_a_copy_is_a_job_like_any_other_and_needs_no_memory(house, client):
    house.sensor.available = MB
    client.say(ImportModel(id=1, source="/elsewhere/new", name="new"))
    house.turn()
    [process] = house.launcher.jobs
    assert process.request == ImportModel(id=process.request.id, source="/elsewhere/new", name="new")
    job = house.child(process)
    job.say(Ready(pid=process.pid), Progress(id=process.request.id, stage="copying", done=1, total=2))
    house.turn()
    assert client.hear() == [Progress(id=1, stage="copying", done=1, total=2)]
    client.say(RemoveModel(id=2, model="new"), ExportModel(id=3, name="demo", target="/somewhere/else"))
    house.turn()
    assert failures(client.hear()) == [(2, "model_busy")]
    job.say(Added(id=process.request.id, summary=summary(write_model(house.root, "new")), seconds=3.0))
    house.turn()
    end(house, process)
    assert [type(event) for event in client.hear()] == [Added]
    assert house.launcher.jobs[1].request.target == "/somewhere/else"


def test_only_what_was_left_half_copied_is_imported_again(house, client):
    mark = mark_of(house.root / "demo" / STACK)
    client.say(ImportModel(id=1, source="/x", name="demo"))
    house.turn()
    assert failures(client.hear()) == [(1, "model_exists")]
    mark.touch()
    client.say(ImportModel(id=2, source="/x", name="demo"), AddModel(id=3, source="/x", name="demo"))
    house.turn()
    assert failures(client.hear()) == [(3, "model_busy")]
    assert house.launcher.jobs[0].request.name == "demo"


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (ImportModel(id=1, source="", name="x"), "invalid_request"),
        (ImportModel(id=1, source="x", name="x"), "invalid_request"),
        (ImportModel(id=1, source="/x", name="../x"), "invalid_name"),
        (ExportModel(id=1, name="nobody", target="/x"), "unknown_model"),
        (ExportModel(id=1, name="demo", target="x"), "invalid_request"),
    ],
)
def test_copies_that_cannot_be_made_are_refused(house, client, message, code):
    client.say(message)
    house.turn()
    assert failures(client.hear()) == [(1, code)]
    assert house.launcher.jobs == []
