"""The file with what people asked for: written by a thread, the last wish in it, and nothing that it meets ends us."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator

import pytest

from ebbflow.daemon.supervisor.terms import FILE, Terms, TermsFile, read_terms
from ebbflow.formats.messages import Done, Ping, Pong, Resize, Resized, Shutdown
from ebbflow.formats.units import AUTO

from support.house import MB, House
from support.models import write_model


class Disk:
    """Syncs nothing before `ready` is set."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.began = threading.Event()
        self.syncs = 0

    def fsync(self, _descriptor: int) -> None:
        self.syncs += 1
        self.began.set()
        assert self.ready.wait(10)


@pytest.fixture
def disk(monkeypatch, tmp_path) -> Iterator[Disk]:
    write_model(tmp_path, "demo")
    disk = Disk()
    monkeypatch.setattr(os, "fsync", disk.fsync)
    yield disk
    disk.ready.set()


def floor(nbytes: int) -> dict[str, Terms]:
    return {"demo": Terms(floor=nbytes)}


def test_a_disk_that_hangs_does_not_keep_the_daemon_from_answering(disk, tmp_path):
    with contextlib.closing(House(tmp_path)) as house:
        client = house.client()
        for number in (1, 2, 3):
            client.say(Resize(id=number, model="demo", wish=AUTO, floor_nbytes=(300 + number) * MB))
            house.turn()
        assert [(type(event), event.id) for event in client.hear()] == [(Resized, 1), (Resized, 2), (Resized, 3)]
        assert disk.began.wait(10)
        assert read_terms(tmp_path) == {}
        disk.ready.set()
    assert read_terms(tmp_path) == floor(303 * MB)


def test_of_those_that_wait_only_the_last_is_written(disk, tmp_path):
    with contextlib.closing(TermsFile(tmp_path)) as file:
        file.keep(floor(1))
        assert disk.began.wait(10)
        for nbytes in (2, 3, 4):
            file.keep(floor(nbytes))
        disk.ready.set()
    assert read_terms(tmp_path) == floor(4)
    assert disk.syncs == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, "demo"]


def test_terms_change_after_they_were_kept_without_changing_what_is_written(disk, tmp_path):
    with contextlib.closing(TermsFile(tmp_path)) as file:
        kept = floor(1)
        file.keep(kept)
        kept["demo"] = Terms(floor=2)
        disk.ready.set()
    assert read_terms(tmp_path) == floor(1)


def test_what_cannot_be_written_is_logged_and_the_next_is_written(tmp_path, caplog):
    folder = tmp_path / "library"
    with contextlib.closing(TermsFile(folder)) as file:
        file.keep(floor(1))
        file.close()
    assert "cannot be written; sizes asked for hold until the daemon ends" in caplog.text
    folder.mkdir()
    (folder / (FILE + ".partial")).mkdir()
    with contextlib.closing(TermsFile(folder)) as file:
        file.keep(floor(1))
        file._writer.submit(os.rmdir, folder / (FILE + ".partial")).result()
        file.keep(floor(2))
    assert read_terms(folder) == floor(2)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), MemoryError("no room")])
def test_what_could_not_be_written_is_tried_once_more_at_the_end(tmp_path, monkeypatch, caplog, error):
    failures = [error]
    monkeypatch.setattr(os, "fsync", lambda _descriptor: failures and (_ for _ in ()).throw(failures.pop()))
    with contextlib.closing(TermsFile(tmp_path)) as file:
        file.keep(floor(1))
        file._writer.submit(int).result()
        assert read_terms(tmp_path) == {}
        assert str(error) in caplog.text
    assert read_terms(tmp_path) == floor(1)


def test_the_daemon_answers_until_what_was_asked_for_is_written(disk, tmp_path, caplog):
    with contextlib.closing(House(tmp_path)) as house:
        client = house.client()
        client.say(Resize(id=1, model="demo", wish=AUTO, floor_nbytes=300 * MB), Shutdown(id=2))
        house.turn()
        house.server.stop(house.now)
        assert "still being written" in caplog.text
        client.say(Ping())
        house.turn()
        assert [type(event) for event in client.hear()] == [Resized, Pong]
        disk.ready.set()
        house.server._terms_file._writer.submit(int).result()
        house.turn()
        assert client.hear() == [Done(id=2)]
        assert house.server.finished
    assert read_terms(tmp_path) == floor(300 * MB)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"demo": {"floor": "much"}}', "\xff"])
def test_terms_that_cannot_be_read_are_ignored(tmp_path, text, caplog):
    (tmp_path / FILE).write_text(text)
    assert read_terms(tmp_path) == {}
    assert "is ignored" in caplog.text
