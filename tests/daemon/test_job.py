from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
import zmq

from ebbflow.daemon.library import add, job
from ebbflow.daemon.library.shapes import SHAPES
from ebbflow.daemon.library.synthetic import write_checkpoint
from ebbflow.formats.child_messages import Ready, from_child_decoder
from ebbflow.formats.errors import Cancelled, UnknownModel
from ebbflow.formats.manifest import read_manifest
from ebbflow.formats.messages import Added, AddModel, Failed, Progress
from ebbflow.formats.summary import summary
from ebbflow.formats.wire import Message, decode

from support.real_daemon import share_encoding_kernels

PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(SHAPES["tiny"], folder)
    return folder


class Supervisor:
    """The far end of a job's line, and what a job is started with."""

    def __init__(self, root: Path, sockets: str) -> None:
        self.library, self.cache = root / "library", root / "cache"
        share_encoding_kernels(self.cache)
        self.address = f"ipc://{sockets}/s"
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.bind(self.address)
        self._started: list[subprocess.Popen] = []

    def command(self, source: Path | str, **options) -> list[str]:
        request = AddModel(id=42, source=str(source), name="new", **{"levels": 2, **options})
        places = [self.address, "job-1", str(self.library), str(self.cache), msgspec.json.encode(request).decode()]
        return [sys.executable, "-P", "-m", "ebbflow.daemon.library.job", *places]

    def start(self, command: list[str], **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)
        self._started.append(process)
        return process

    def hear(self) -> Message:
        assert self._socket.poll(PATIENCE_MS), "the job said nothing"
        identity, *frames = self._socket.recv_multipart()
        assert identity == b"job-1"
        return decode(from_child_decoder, frames)

    def hear_all(self) -> list[Message]:
        """Until the terminal message."""
        heard = [self.hear()]
        while not isinstance(heard[-1], Added | Failed):
            heard.append(self.hear())
        return heard

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.communicate()
        self._socket.close()
        self._context.term()


@pytest.fixture
def supervisor(tmp_path) -> Iterator[Supervisor]:
    with tempfile.TemporaryDirectory() as sockets:  # tmp_path may be too long for a socket
        made = Supervisor(tmp_path, sockets)
        yield made
        made.close()


# -- the real process ---------------------------------------------------------------------------------------------


def test_adds_a_model(supervisor, tiny):
    process = supervisor.start(supervisor.command(tiny), EBBFLOW_JOB_MEMORY="8GB")
    ready, *progress, added = supervisor.hear_all()
    assert ready == Ready(pid=process.pid)
    assert progress
    assert all(isinstance(message, Progress) and message.id == 42 for message in progress)
    assert isinstance(added, Added)
    assert (added.id, added.summary) == (42, summary(read_manifest(supervisor.library / "new")))
    assert added.seconds > 0
    assert process.wait(60) == 0


def test_a_refusal_is_typed(supervisor):
    process = supervisor.start(supervisor.command("/nowhere"))
    *_, failed = supervisor.hear_all()
    assert (failed.id, failed.code) == (42, "unsupported_model")
    assert process.wait(60) == 0
    assert process.stderr.read() == ""


def test_sigterm_cancels(supervisor, tiny):
    process = supervisor.start(supervisor.command(tiny))
    while not (isinstance(message := supervisor.hear(), Progress) and message.stage == "sampling"):
        pass
    process.terminate()
    process.terminate()
    failed = supervisor.hear_all()[-1]
    assert (failed.id, failed.code) == (42, "cancelled")
    assert process.wait(60) == 0
    assert list(supervisor.library.iterdir()) == []


def test_kill_leaves_no_model(supervisor, tiny):
    process = supervisor.start(supervisor.command(tiny))
    while not (isinstance(message := supervisor.hear(), Progress) and message.stage == "sampling"):
        pass
    process.kill()
    assert process.wait(60) == -9
    assert [path.name for path in supervisor.library.iterdir()] == [f".adding-new-{process.pid}"]


def test_goes_on_after_a_kill(supervisor, tiny):
    process = supervisor.start(supervisor.command(tiny))
    while not any((supervisor.cache / "adding").glob("*/layer-0000")):
        assert isinstance(supervisor.hear(), Ready | Progress)
    process.kill()
    process.wait(60)
    process = supervisor.start(supervisor.command(tiny))
    *heard, added = supervisor.hear_all()
    assert isinstance(added, Added)
    assert process.wait(60) == 0
    first = next(message for message in heard if isinstance(message, Progress) and message.stage == "encoding")
    assert first.done > 0.2 * first.total
    assert list((supervisor.cache / "adding").iterdir()) == []


PARENT = """
import subprocess, sys
subprocess.Popen(sys.argv[1:])
sys.stdin.read()
"""


def test_dies_with_its_parent(supervisor, tiny):
    command = [sys.executable, "-P", "-c", PARENT, *supervisor.command(tiny)]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE)
    while not (isinstance(message := supervisor.hear(), Progress) and message.stage == "sampling"):
        pass
    parent.kill()
    parent.communicate()
    assert supervisor.hear_all()[-1].code == "cancelled"
    assert list(supervisor.library.iterdir()) == []


def test_wrong_arguments():
    command = [sys.executable, "-P", "-m", "ebbflow.daemon.library.job", "one"]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.startswith("usage:")


def test_from_the_rename_on_it_is_too_late_to_cancel():
    code = (
        "import os, signal; from ebbflow.daemon.library.job import Cancellation\n"
        "c = Cancellation(); c.listen(); c.close(); os.kill(os.getpid(), signal.SIGTERM); c.check(); print('added')\n"
    )
    command = [sys.executable, "-P", "-c", code]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "added\n"


def test_who_asked_just_before_is_still_heard():
    cancellation = job.Cancellation()
    cancellation.asked = True
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Cancelled):
            cancellation.close()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_memory_has_a_cap():
    code = "from ebbflow.daemon.library import job; job._limit_memory(); bytearray(2 * 10**9)"
    environment = os.environ | {job.MEMORY_VARIABLE: "1GB"}
    command = [sys.executable, "-P", "-c", code]
    found = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert "MemoryError" in found.stderr


def test_libraries_that_find_no_room_are_a_shortage():
    code = (
        "import sys; from pathlib import Path; from ebbflow.daemon.library import job\n"
        "from ebbflow.formats.messages import AddModel\n"
        "sys.modules['torch'] = None  # the import fails\n"
        "request = AddModel(id=1, source='/s', name='n')\n"
        "print(job.outcome(request, Path(), Path(), print, job.Cancellation()).code)\n"
    )
    for cap, said in (("64GB", "out_of_memory\n"), ("", "internal\n")):
        environment = os.environ | {job.MEMORY_VARIABLE: cap}
        command = [sys.executable, "-P", "-c", code]
        found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        assert found.stdout == said


# -- every failure has a name -------------------------------------------------------------------------------------


def outcome(monkeypatch, error: BaseException, *, cancelled: bool = False) -> Message:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(add, "add_model", fail)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    cancellation = job.Cancellation()
    cancellation.asked = cancelled
    return job.outcome(AddModel(id=9, source="s", name="n"), Path(), Path(), lambda m: None, cancellation)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnknownModel("x"), "unknown_model"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "out_of_memory"),
    ],
)
def test_failures(monkeypatch, capsys, error, code):
    failed = outcome(monkeypatch, error)
    assert (failed.id, failed.code) == (9, code)
    assert str(error) in failed.message
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), KeyError("q"), OSError(5, "Input/output error")])
def test_bugs_are_named_and_logged(monkeypatch, capsys, error):
    failed = outcome(monkeypatch, error)
    assert (failed.id, failed.code) == (9, "internal")
    assert type(error).__name__ in failed.message
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("could not determine the shape"), MemoryError(), UnknownModel("x")])
def test_whatever_a_cancelled_job_raises_it_was_cancelled(monkeypatch, capsys, error):
    failed = outcome(monkeypatch, error, cancelled=True)
    assert (failed.id, failed.code) == (9, "cancelled")
    assert capsys.readouterr().err == ""


def test_torch_says_what_we_listen_for():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert job._is_allocation_failure(caught.value)
