"""Who gets in: other users of this machine at the socket file, keys at a tcp port. Real sockets, real clients."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import zmq

from ebbflow.client import AsyncClient, Client, Lease, errors
from ebbflow.client.channel import new_pair
from ebbflow.daemon.channel import Hub, wait
from ebbflow.daemon.supervisor.door import listen
from ebbflow.formats.errors import DaemonFailed, InvalidConfig, InvalidRequest, NotAllowed
from ebbflow.formats.keys import own_pair, write_allowed
from ebbflow.formats.messages import Pong, request_decoder
from ebbflow.formats.paths import home_paths

PATIENT = Lease(connect_seconds=20)


@pytest.fixture
def paths(monkeypatch):
    with tempfile.TemporaryDirectory(prefix="ebb") as folder:  # others can reach those below it, unlike pytest's
        monkeypatch.setenv("EBBFLOW_HOME", folder)
        paths = home_paths(Path(folder))
        paths.runtime.mkdir(mode=0o700)
        yield paths


class Answering:
    """A hub that answers everybody, in a thread."""

    def __init__(self, paths) -> None:
        self.hub = Hub(paths.clients, request_decoder)
        self.bell, self.rope = os.pipe()
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        while not self.rung:
            wait([self.hub], [self.bell], None)
            for peer, _ in self.hub.receive():
                self.hub.send(peer, Pong())

    rung = False

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.rung = True
        os.write(self.rope, b"x")
        self.thread.join()
        self.hub.close()
        os.close(self.bell)
        os.close(self.rope)


def free_port() -> int:
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        return socket.bind_to_random_port("tcp://127.0.0.1")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_is_cut_off_at_the_socket_file(paths):
    with Answering(paths):
        for folder in (paths.runtime, paths.runtime.parent):
            folder.chmod(0o755)  # as if the folders' modes did not keep them out
        (paths.runtime / "ebbflow.sock").chmod(0o777)
        program = (
            "import os, sys\n"
            "from ebbflow.client import Client, Lease, errors\n"
            "os.setgid(65534)\nos.setuid(int(sys.argv[1]))\n"
            "try:\n"
            "    Client(sys.argv[2], lease=Lease(connect_seconds=20)).ping()\n"
            "    print('in')\n"
            "except errors.DaemonGone as error:\n"
            "    print('hung up' if 'hung up' in str(error) else error)\n"
        )
        said = [
            subprocess.run(
                [sys.executable, "-c", program, user, paths.clients], capture_output=True, text=True, check=True
            ).stdout
            for user in ("65534", "0")
        ]
    assert said == ["hung up\n", "in\n"]


def test_by_tcp_only_allowed_keys_come_in(paths):
    address = f"tcp://127.0.0.1:{free_port()}"
    mine, strange = new_pair(), new_pair()
    write_allowed(paths.keys / "allowed", {mine.public: "me"})
    answering = Answering(paths)
    listen(answering.hub, address, paths)
    server = own_pair(paths.keys / "daemon", new_pair).public
    with answering:
        with Client(address, server_key=server, keys=mine, lease=PATIENT) as client:
            client.ping()
        with Client(address, server_key=server, keys=strange, lease=PATIENT) as client:
            with pytest.raises(NotAllowed, match="ebb keys"):
                client.ping()
            # Allowing needs no restart, and neither daemon nor client has to be made anew.
            write_allowed(paths.keys / "allowed", {mine.public: "me", strange.public: "a friend"})
            client.ping()
        with Client(address, lease=PATIENT) as client, pytest.raises((NotAllowed, errors.DaemonGone)):
            client.ping()
        wrong = Client(address, server_key=strange.public, keys=mine, lease=PATIENT)
        with wrong as client, pytest.raises(errors.DaemonGone, match="a wrong key"):
            client.ping()
        with Client(paths.clients, lease=PATIENT) as client:
            client.ping()
        (paths.keys / "allowed").write_text("broken")
        with Client(address, server_key=server, keys=mine, lease=PATIENT) as client, pytest.raises(NotAllowed):
            client.ping()


@pytest.mark.parametrize("taken", [False, True])
def test_who_may_come_in_stays_the_same_when_all_are_cut_off(paths, monkeypatch, taken):
    address = f"tcp://127.0.0.1:{free_port()}"
    mine, strange = new_pair(), new_pair()
    write_allowed(paths.keys / "allowed", {mine.public: "me"})
    answering = Answering(paths)
    listen(answering.hub, address, paths)
    if taken:  # the port, by somebody quick
        reopen = answering.hub._open
        with zmq.Context() as context, context.socket(zmq.REP) as thief:
            monkeypatch.setattr(answering.hub, "_open", lambda: (reopen(), thief.bind(address)))
            answering.hub.start_over()
        answering.hub.bind_missing()
    else:
        answering.hub.start_over()
    server = own_pair(paths.keys / "daemon", new_pair).public
    with answering:
        for welcome in (
            Client(address, server_key=server, keys=mine, lease=PATIENT),
            Client(paths.clients, lease=PATIENT),
        ):
            with welcome:
                welcome.ping()
        with Client(address, server_key=server, keys=strange, lease=PATIENT) as client, pytest.raises(NotAllowed):
            client.ping()


def test_what_is_bound_after_the_encrypted_port_is_plain(paths):
    address = f"tcp://127.0.0.1:{free_port()}"
    write_allowed(paths.keys / "allowed", {own_pair(paths.keys / "client", new_pair).public: ""})
    answering = Answering(paths)
    listen(answering.hub, address, paths)
    answering.hub._bind(f"{paths.clients}.again")
    server = own_pair(paths.keys / "daemon", new_pair).public
    with answering:
        for client in (
            Client(f"{paths.clients}.again", lease=PATIENT),
            Client(address, server_key=server, lease=PATIENT),
        ):
            with client:
                client.ping()


def test_the_environment_says_where_the_daemon_is(paths, monkeypatch):
    address = f"tcp://127.0.0.1:{free_port()}"
    client_key = own_pair(paths.keys / "client", new_pair).public
    write_allowed(paths.keys / "allowed", {client_key: ""})
    answering = Answering(paths)
    listen(answering.hub, address, paths)
    monkeypatch.setenv("EBBFLOW_HOST", address)
    monkeypatch.setenv("EBBFLOW_SERVER_KEY", own_pair(paths.keys / "daemon", new_pair).public)
    with answering, Client(lease=PATIENT) as client:
        client.ping()


def test_loopback_is_open_until_a_key_is_allowed(paths):
    address = f"tcp://127.0.0.1:{free_port()}"
    answering = Answering(paths)
    listen(answering.hub, address, paths)
    with answering, Client(address, lease=PATIENT) as client:
        client.ping()


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://[::]:5555", "tcp://192.0.2.1:5555"])
def test_a_public_address_without_keys_is_refused(paths, address):
    hub = Hub(paths.clients, request_decoder)
    with pytest.raises(InvalidConfig, match="no key is allowed"):
        listen(hub, address, paths)
    hub.close()


@pytest.mark.parametrize(
    "address", ["ipc:///tmp/x", "tcp://127.0.0.1", "tcp://127.0.0.1:port", "127.0.0.1:5555", "tcp://a/b:5"]
)
def test_what_is_no_tcp_address_is_refused(paths, address):
    hub = Hub(paths.clients, request_decoder)
    with pytest.raises(InvalidConfig, match="listen cannot be"):
        listen(hub, address, paths)
    hub.close()


def test_an_address_that_cannot_be_bound_is_a_typed_error(paths):
    write_allowed(paths.keys / "allowed", {new_pair().public: "me"})
    with pytest.raises(DaemonFailed, match="cannot be bound"):
        listen(Hub(paths.clients, request_decoder), "tcp://192.0.2.1:5555", paths)


@pytest.mark.parametrize("make", [Client, AsyncClient])
def test_another_machine_is_not_spoken_to_in_the_clear(paths, make):
    with pytest.raises(InvalidRequest, match="EBBFLOW_SERVER_KEY"):
        make("tcp://192.0.2.1:5555")
    with pytest.raises(InvalidConfig, match="not a key"):
        make("tcp://192.0.2.1:5555", server_key="short")
