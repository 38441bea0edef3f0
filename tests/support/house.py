"""A supervisor in the test process: real server, real (inproc) sockets; fake children, sensor and clock."""

from __future__ import annotations

import itertools
from pathlib import Path

import zmq

from ebbflow.daemon.channel import Hub, Lost
from ebbflow.daemon.supervisor.library import Library, delete
from ebbflow.daemon.supervisor.reading import Reading
from ebbflow.daemon.supervisor.server import Outside, Server
from ebbflow.formats.child_messages import LoadModel, Ready, Report, SetTarget, from_child_decoder, to_worker_decoder
from ebbflow.formats.messages import Finished, Generate, event_decoder, request_decoder
from ebbflow.formats.values import ProcessMemory, Residency, Sampling
from ebbflow.formats.wire import Message, decode, encode

GB = 1_000_000_000
MB = 1_000_000


class Peer:
    """The far end of a hub: a client, or a child that has connected."""

    def __init__(self, context: zmq.Context, address: str, decoder, identity: bytes = b"", rcvhwm: int = 0) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.rcvhwm = rcvhwm
        self.socket.linger = 0
        if identity:
            self.socket.identity = identity
        self.socket.connect(address)
        self.decoder = decoder

    def say(self, *messages: Message) -> None:
        for message in messages:
            self.socket.send_multipart(encode(message))

    def hear(self) -> list[Message]:
        """Everything that has arrived."""
        messages = []
        while self.socket.poll(0):
            messages.append(decode(self.decoder, self.socket.recv_multipart()))
        return messages

    def close(self) -> None:
        self.socket.close()


class FakeProcess:
    def __init__(self, pid: int, identity: str, request=None) -> None:
        self.pid = pid
        self.identity = identity.encode()
        self.request = request
        self.descriptor = None
        self.code: int | None = None
        self.signals: list[str] = []
        self.closed = False
        self.words = ""

    def exit_code(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        self.signals.append("TERM")

    def kill(self) -> None:
        self.signals.append("KILL")
        self.code = -9

    def suspend(self) -> None:
        self.signals.append("STOP")

    def go_on(self) -> None:
        self.signals.append("CONT")

    def last_words(self) -> str:
        return self.words

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class FakeLauncher:
    def __init__(self) -> None:
        self.pids = itertools.count(5_000_000)  # above any that Linux gives
        self.workers: list[FakeProcess] = []
        self.jobs: list[FakeProcess] = []
        self.broken: OSError | None = None

    def start_worker(self, identity: str, spare_nbytes: int) -> FakeProcess:
        self.worker_spare = spare_nbytes
        return self._start(self.workers, identity)

    def start_job(self, identity: str, request, memory_nbytes: int) -> FakeProcess:
        self.job_memory = memory_nbytes
        return self._start(self.jobs, identity, request)

    def _start(self, where: list[FakeProcess], identity: str, request=None) -> FakeProcess:
        if self.broken:
            raise self.broken
        where.append(FakeProcess(next(self.pids), identity, request))
        return where[-1]


class FakeSensor:
    def __init__(self) -> None:
        self.available = 10 * GB
        self.source = "system memory"
        self.memory = 16 * GB
        self.kills = 0
        self.readings = 0
        self.own = 20 * MB

    def read(self, pids=(), worker=None) -> Reading:
        self.readings += 1
        return Reading(self.available, self.source)

    def set_cap(self, cap: int | None) -> None:
        self.cap = cap

    def total(self) -> int:
        return self.memory

    def process(self, role: str, pid: int) -> ProcessMemory | None:
        return ProcessMemory(role=role, pid=pid, private_nbytes=self.own if role == "supervisor" else 1000)

    def oom_kills(self) -> int:
        return self.kills


class House:
    """Everything around one `Server`; `turn` lets time pass and the server act on what has come."""

    def __init__(self, root: Path, *, idle_seconds: float = 300.0) -> None:
        self.root = root
        self.context = zmq.Context()
        self.clients = Hub("inproc://clients", request_decoder, context=self.context)
        self.children = Hub("inproc://children", from_child_decoder, context=self.context, explain=False)
        self.launcher = FakeLauncher()
        self.sensor = FakeSensor()
        self.library = Library(root, delete)
        self.peers: list[Peer] = []
        self.now = 1000.0
        outside = Outside(self.clients, self.children, self.launcher, self.sensor)  # type: ignore[arg-type]
        self.server = Server(outside, self.library, reserve=GB // 2, idle_seconds=idle_seconds, now=self.now)

    def client(self, rcvhwm: int = 0) -> Peer:
        return self._peer("inproc://clients", event_decoder, rcvhwm=rcvhwm)

    def child(self, process: FakeProcess) -> Peer:
        """The line of a process that the server started, as that process would hold it."""
        return self._peer("inproc://children", to_worker_decoder, process.identity)

    def _peer(self, *arguments, **options) -> Peer:
        self.peers.append(Peer(self.context, *arguments, **options))
        return self.peers[-1]

    def turn(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.server.turn(self.now)
        self.server.requests.check_integrity()

    def ready_worker(self) -> Peer:
        """Have the newest worker connect and say that it is ready."""
        worker = self.child(self.launcher.workers[-1])
        worker.say(Ready(pid=self.launcher.workers[-1].pid))
        self.turn()
        return worker

    def lost(self, peer: bytes) -> Lost:
        return Lost(peer, "overflowed")

    def close(self) -> None:
        self.server.close()
        for peer in self.peers:
            peer.close()
        self.clients.close()
        self.children.close()
        self.context.term()


def generate(number: int, model: str = "demo", prompt: str = "hello", **sampling) -> Generate:
    return Generate(id=number, model=model, prompt=prompt, sampling=Sampling(**sampling))


def finished(number: int) -> Finished:
    return Finished(id=number, reason="stop", prompt_tokens=1, tokens=1, seconds_to_first=0.0, seconds=0.0)


def holds(message: LoadModel | SetTarget, nbytes: int | None = None) -> Report:
    """The report of a worker that does as `message` says (or has got only to `nbytes`)."""
    held = message.target_nbytes if nbytes is None else nbytes
    return Report(
        models=(
            Residency(
                model=message.model,
                blocks=1,
                total_blocks=2,
                nbytes=held,
                total_nbytes=GB,
                base_nbytes=GB // 5,
                target_nbytes=message.target_nbytes,
            ),
        )
    )
