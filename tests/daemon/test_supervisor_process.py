"""The supervisor as a process of its own, with fake children that are processes too."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zmq

from ebbflow.client import Client
from ebbflow.client import batch as batch_module
from ebbflow.client.batch import ATTEMPTS
from ebbflow.client.errors import WorkerDied
from ebbflow.daemon.supervisor.library import Library, _owner_lives
from ebbflow.daemon.supervisor.silence import HUNG_SECONDS
from ebbflow.formats.errors import AlreadyRunning
from ebbflow.formats.messages import (
    AddModel,
    Cancel,
    Chunk,
    Done,
    Failed,
    Finished,
    Generate,
    GetStatus,
    ListPins,
    Pin,
    Ping,
    Pinned,
    Pins,
    Pong,
    Progress,
    Resize,
    Resized,
    Shutdown,
    Started,
    Status,
    Unpin,
    YieldMemory,
    event_decoder,
)
from ebbflow.formats.paths import home_paths
from ebbflow.formats.units import AUTO, SizeWish
from ebbflow.formats.values import PinSummary
from ebbflow.formats.wire import decode, encode

from support.house import GB, generate
from support.models import write_model
from support.real_daemon import PATIENCE_SECONDS, until

SCRIPT = Path(__file__).parent.parent / "support" / "fake_supervisor.py"
PATIENCE_MS = PATIENCE_SECONDS * 1000


class Daemon:
    """A running daemon and one client's socket."""

    def __init__(self, home: Path, *options: str, **environment: str) -> None:
        self.paths = home_paths(home)
        self.environment = {**os.environ, "EBBFLOW_HOME": str(home), **environment}
        self.options = options
        self.process = self.launch()
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(self.paths.clients)

    def launch(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", str(SCRIPT), *self.options]
        return subprocess.Popen(command, env=self.environment, stderr=subprocess.PIPE, text=True)

    def say(self, *messages) -> None:
        for message in messages:
            self.socket.send_multipart(encode(message))

    def hear(self):
        assert self.socket.poll(PATIENCE_MS), "no answer"
        return decode(event_decoder, self.socket.recv_multipart())

    def hear_until(self, *kinds):
        heard = [self.hear()]
        while not isinstance(heard[-1], kinds):
            heard.append(self.hear())
        return heard

    def ask(self, message):
        self.say(message)
        return self.hear()

    def children(self) -> dict[str, int]:
        """The process ids of worker and job, also while events stream in."""
        self.say(GetStatus(id=999))
        processes = self.hear_until(Status)[-1].processes
        return {process.role: process.pid for process in processes if process.role != "supervisor"}

    def close(self) -> None:
        self.socket.close()
        self.context.term()
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("h")
    write_model(home / "library", "demo")
    write_model(home / "library", "broken")
    return home


@pytest.fixture
def start(home):
    """Starts daemons, one after the other, in the same folder."""
    with contextlib.ExitStack() as daemons:

        def start(*options, **environment):
            daemon = Daemon(home, *options, **environment)
            daemons.callback(daemon.close)
            return daemon

        yield start


@pytest.fixture
def daemon(start):
    return start()


def wait_until_gone(pid: int) -> None:
    """Wait for a process that may be another's child."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        poller = zmq.Poller()
        poller.register(descriptor, zmq.POLLIN)
        assert poller.poll(PATIENCE_MS)
        os.close(descriptor)


def test_a_worker_killed_in_mid_stream_is_told_at_once_and_replaced(daemon):
    daemon.say(*(generate(number, prompt="endless") for number in range(1, 5)))
    assert isinstance(daemon.hear_until(Chunk)[0], Started)
    pid = daemon.children()["worker"]
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    ended = set()
    while len(ended) < 4:
        [*_, failed] = daemon.hear_until(Failed)
        assert failed.code == "worker_died"
        assert "signal 9" in failed.message
        ended.add(failed.id)
    assert time.monotonic() - killed < HUNG_SECONDS / 3  # seen to end, not waited for
    assert ended == {1, 2, 3, 4}
    daemon.say(generate(5, prompt="alive again"))
    heard = daemon.hear_until(Finished)
    assert "".join(event.text for event in heard if isinstance(event, Chunk)) == "alive again "
    assert all(event.id == 5 for event in heard)
    assert daemon.children()["worker"] != pid


def test_pins_travel_like_generations(daemon):
    made = daemon.ask(Pin(id=1, model="demo", name="system", prompt="be brief", save=True))
    assert made == Pinned(id=1, pin=PinSummary(name="system", tokens=2, nbytes=2000, saved=True))
    assert daemon.ask(ListPins(id=2, model="demo")) == Pins(id=2, pins=(made.pin,))
    assert daemon.ask(Unpin(id=3, model="demo", name="system")) == Pins(id=3, pins=())


def test_in_a_batch_a_prompt_that_kills_every_worker_fails_alone(daemon, monkeypatch):
    monkeypatch.setattr(batch_module, "FIRST_WAIT_SECONDS", 0.001)
    prompts = [f"prompt {number:02}" for number in range(60)]
    prompts[30] = "prompt 30 kill"
    daemon.children()  # it listens
    with Client(daemon.paths.clients) as client:
        batch = client.generate_batch("demo", prompts, window=20)
        results = {result.index: result for result in batch}
    assert {index: result.text for index, result in results.items() if not result.error} == {
        index: f"{prompt} " for index, prompt in enumerate(prompts) if index != 30
    }
    assert isinstance(results[30].error, WorkerDied)
    assert results[30].attempts == ATTEMPTS


def test_the_fake_worker_keeps_the_contract(daemon):
    assert daemon.ask(Resize(id=1, model="demo", wish=SizeWish(fraction=0.5))) == Resized(id=1)
    daemon.say(generate(2, prompt="a b"))
    *_, finished = daemon.hear_until(Finished)
    assert (finished.id, finished.tokens) == (2, 2)
    resized = daemon.ask(Resize(id=3, model="demo", wish=SizeWish(nbytes=300_000_000)))
    assert (resized.id, resized.residency.target_nbytes, resized.residency.reason) == (
        3,
        300_000_000,
        "asked for 300 MB",
    )
    failed = daemon.ask(generate(4, model="broken"))
    assert (failed.id, failed.code) == (4, "corrupt_stack")
    daemon.say(generate(5, prompt="endless"))
    daemon.hear_until(Chunk)
    daemon.say(Cancel(id=5))
    [*_, failed] = daemon.hear_until(Failed)
    assert (failed.id, failed.code) == (5, "cancelled")
    daemon.say(generate(6, prompt="garbage"))
    assert isinstance(daemon.hear_until(Finished)[0], Started)
    failed = daemon.ask(generate(7, prompt="exit"))
    assert (failed.id, failed.code) == (7, "worker_died")
    assert "exit code 3" in failed.message
    assert "told to leave" in failed.message


def test_a_worker_that_cannot_start_ends_in_an_error_with_its_last_words(start):
    daemon = start(FAKE_WORKER="stillborn")
    failed = daemon.ask(generate(1))
    assert (failed.id, failed.code) == (1, "worker_died")
    assert "no strength to live" in failed.message
    assert daemon.ask(Ping()) == Pong()
    assert (daemon.paths.logs / "worker.log").read_text().count("no strength") == 3


def test_an_add_is_cancelled_and_leaves_nothing(daemon):
    daemon.say(AddModel(id=1, source="/x", name="new"))
    assert daemon.hear() == Progress(id=1, stage="encode", done=1, total=2)
    assert any(daemon.paths.library.glob(".adding-new-*"))
    daemon.say(Cancel(id=1))
    failed = daemon.hear()
    assert (failed.id, failed.code) == (1, "cancelled")
    daemon.ask(Shutdown(id=2))
    daemon.process.wait(PATIENCE_SECONDS)
    assert not any(daemon.paths.library.glob(".adding-*"))


def test_it_is_small_and_maps_nothing_large(daemon):
    for number in range(50):
        daemon.say(generate(number, prompt="x " * 100))
        daemon.hear_until(Finished)
    status = daemon.ask(GetStatus(id=100))
    [supervisor] = [process for process in status.processes if process.role == "supervisor"]
    assert supervisor.pid == daemon.process.pid
    assert supervisor.private_nbytes < 30_000_000
    mapped = Path(f"/proc/{supervisor.pid}/maps").read_text()
    assert "libzmq" in mapped
    for library in ("torch", "numpy", "llvmlite", "numba", "safetensors", "tokenizers"):
        assert library not in mapped


def test_importing_it_imports_nothing_large():
    program = (
        "import sys, ebbflow.daemon.supervisor.main\n"
        "heavy = {'torch', 'numpy', 'numba', 'llvmlite', 'safetensors', 'tokenizers', 'jinja2', 'click', 'rich'}\n"
        "ours = ('daemon.worker', 'daemon.engine', 'daemon.library', 'kernels', 'client', 'formats.blocks')\n"
        "bad = heavy & {name.partition('.')[0] for name in sys.modules}\n"
        "bad |= {n for n in sys.modules if n.startswith(tuple('ebbflow.' + name for name in ours))}\n"
        "bad |= {'formats.checkpoint'} & {n.removeprefix('ebbflow.') for n in sys.modules}\n"
        "sys.exit(' '.join(sorted(bad)) or None)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_only_one_daemon_runs_in_a_folder(daemon):
    assert daemon.ask(Ping()) == Pong()
    second = daemon.launch()
    _, errors = second.communicate(timeout=PATIENCE_SECONDS)
    assert second.returncode != 0
    assert f"process {daemon.process.pid}" in errors
    assert AlreadyRunning.__name__ in errors
    assert daemon.ask(Ping()) == Pong()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_streams_go_on_and_the_second_one_ends_them(daemon, number):
    daemon.say(generate(1, prompt="endless"))
    daemon.hear_until(Chunk)
    worker = daemon.children()["worker"]
    daemon.process.send_signal(number)
    while not isinstance(event := daemon.ask(generate(2, prompt="too late")), Failed):
        assert isinstance(event, Chunk)
        daemon.hear_until(Chunk)
    assert (event.id, event.code) == (2, "daemon_gone")
    assert len([event for _ in range(5) for event in daemon.hear_until(Chunk) if isinstance(event, Chunk)]) >= 5
    daemon.process.send_signal(number)
    [*_, failed] = daemon.hear_until(Failed)
    assert (failed.id, failed.code) == (1, "cancelled")
    assert daemon.process.wait(PATIENCE_SECONDS) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_it_tells_its_service_manager_and_reloads(start, home):
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.settimeout(PATIENCE_MS / 1000)
    manager.bind(str(home / "notify"))
    # Twice a second it shall say that it turns, with nothing to do.
    daemon = start(NOTIFY_SOCKET=str(home / "notify"), WATCHDOG_USEC="1000000")
    assert manager.recv(1000).startswith(b"READY=1\nSTATUS=leaving ")
    assert {manager.recv(1000) for _ in range(3)} == {b"WATCHDOG=1"}
    (home / "config.toml").write_text('reserve = "123MB"\ncap = "2GB"')
    daemon.process.send_signal(signal.SIGHUP)
    told = list(iter(lambda: manager.recv(1000), b"READY=1\nSTATUS=leaving 123 MB to everything else"))
    assert told[-1].startswith(b"RELOADING=1\nMONOTONIC_USEC=")
    (home / "config.toml").write_text("reserve = 'much'")  # a mistake: everything stays as it is
    daemon.process.send_signal(signal.SIGHUP)
    list(iter(lambda: manager.recv(1000), b"READY=1\nSTATUS=leaving 123 MB to everything else"))
    status = daemon.ask(GetStatus(id=1))
    assert (status.reserve_nbytes, status.available_source) == (123_000_000, "cap")
    daemon.process.send_signal(signal.SIGTERM)
    assert any(message.startswith(b"STOPPING=1") for message in iter(lambda: manager.recv(1000), b""))
    assert daemon.process.wait(PATIENCE_SECONDS) == 0
    manager.close()


def test_shutdown_answers_when_all_is_over(daemon):
    daemon.say(generate(1, prompt="endless"))
    daemon.hear_until(Chunk)
    worker = daemon.children()["worker"]
    daemon.say(Shutdown(id=2))
    [*_, done] = daemon.hear_until(Done)
    assert done == Done(id=2)
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    assert daemon.process.wait(PATIENCE_SECONDS) == 0


def test_no_signal_ends_it_before_the_sizes_asked_for_are_written(daemon, home):
    assert daemon.ask(Ping()) == Pong()
    partial = home / "library" / ".terms.json.partial"
    os.mkfifo(partial)  # a disk that hangs until it is read, and fails then
    resize = Resize(id=1, model="demo", wish=AUTO)
    assert isinstance(daemon.ask(resize), Resized)
    daemon.say(Shutdown(id=2))
    assert daemon.ask(Ping()) == Pong()
    daemon.process.send_signal(signal.SIGTERM)
    assert any("still being written" in line for line in iter(daemon.process.stderr.readline, ""))
    daemon.process.send_signal(signal.SIGHUP)
    assert daemon.ask(Ping()) == Pong()
    threads = Path(f"/proc/{daemon.process.pid}/task")
    before = len(list(threads.iterdir()))
    partial.read_bytes()
    assert daemon.hear() == Done(id=2)
    until(lambda: len(list(threads.iterdir())) < before)  # the writer's is over: now it is tried once more
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        daemon.process.send_signal(number)
    reader = os.open(partial, os.O_RDONLY | os.O_NONBLOCK)
    assert daemon.process.wait(PATIENCE_SECONDS) == 0
    os.close(reader)


def test_when_it_is_killed_its_children_die_and_the_next_one_starts(start):
    first = start()
    first.say(generate(1, prompt="endless"), AddModel(id=2, source="/x", name="new"))
    first.hear_until(Progress)
    children = first.children()
    assert children.keys() == {"worker", "job"}
    first.process.kill()
    for pid in children.values():
        wait_until_gone(pid)
    first.process.wait(PATIENCE_SECONDS)
    [left] = first.paths.library.glob(".adding-new-*")
    second = start()
    second.say(generate(1))
    assert isinstance(second.hear_until(Finished)[-1], Finished)
    # Deleted in the background, unless the number has been given to another process in the meantime.
    second.ask(Shutdown(id=2))
    second.process.wait(PATIENCE_SECONDS)
    assert not left.exists() or _owner_lives(left.name)


def test_a_resumed_answer_is_told_once_and_whole_whichever_worker_says_it(daemon):
    daemon.say(Generate(id=1, model="demo", prompt="all of us die one day", resume=True))
    heard = daemon.hear_until(Finished)
    assert [event.text for event in heard if isinstance(event, Chunk)] == [
        "all ",
        "of ",
        "us ",
        "die ",
        "one ",
        "day ",
    ]
    assert [type(event) for event in heard].count(Started) == 1
    assert not any(event.ids for event in heard if isinstance(event, Chunk))
    daemon.say(Generate(id=2, model="demo", prompt="words that kill", resume=True))
    [*heard, failed] = daemon.hear_until(Failed)
    assert (failed.id, failed.code) == (2, "worker_died")
    assert "".join(event.text for event in heard if isinstance(event, Chunk)) == "words that "


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_job_stands_still_while_memory_is_short_and_then_goes_on(daemon):
    daemon.say(AddModel(id=1, source="/x", name="new"))
    daemon.hear_until(Progress)
    job = daemon.children()["job"]
    daemon.ask(YieldMemory(id=2, nbytes=10**15))
    until(lambda: state_of(job) == "T")
    assert daemon.hear() == Progress(id=1, stage="waiting for memory")
    daemon.ask(YieldMemory(id=3, nbytes=0))
    until(lambda: state_of(job) != "T")
    daemon.ask(YieldMemory(id=4, nbytes=10**15))
    until(lambda: state_of(job) == "T")
    daemon.say(Cancel(id=1))
    wait_until_gone(job)
    assert isinstance(daemon.hear_until(Failed)[-1], Failed)


def test_a_job_that_stood_still_when_its_daemon_was_killed_is_woken_by_the_next(tmp_path):
    command = [sys.executable, "-c", "import signal, os; os.kill(os.getpid(), signal.SIGSTOP)"]
    stopped = subprocess.Popen(command)
    until(lambda: state_of(stopped.pid) == "T")
    folder = tmp_path / f".adding-new-{stopped.pid}"
    folder.mkdir()
    Library(tmp_path).clean()
    assert stopped.wait(10) == 0
    assert folder.exists()


def test_the_target_follows_a_cap(start):
    daemon = start("--cap", "900MB", "--reserve", "100MB")
    daemon.say(generate(1))
    daemon.hear_until(Finished)
    status = daemon.ask(GetStatus(id=2))
    assert status.available_source == "cap"
    assert status.reserve_nbytes == 100_000_000
    [model] = status.models
    assert GB * 0.7 < model.target_nbytes < GB * 0.8
