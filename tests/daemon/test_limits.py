"""How much of what clients say this process holds."""

from __future__ import annotations

import pytest

from ebbflow.daemon.supervisor.requests import HELD_BY_ALL, HELD_PER_CLIENT, Requests
from ebbflow.formats.errors import TooBusy
from ebbflow.formats.messages import AddModel, Generate, ShowModel, Shutdown
from ebbflow.formats.values import ChatMessage

from support.house import House, generate

LARGE = "x" * 1_900_000  # nearly as much as a message can have


def fill(requests: Requests, client: bytes) -> int:
    """Open large requests until that is refused; how many there were."""
    for number in range(1000):
        try:
            requests.open(client, generate(number, prompt=LARGE), 0.0)
        except TooBusy:
            return number
    raise AssertionError("no limit")


def test_a_client_can_have_only_so_much_text_open():
    requests = Requests(lambda *_: None)
    count = fill(requests, b"a")
    assert count == HELD_PER_CLIENT // len(LARGE)
    requests.open(b"a", Shutdown(id=2000), 0.0)  # what has no text is no burden
    chat = (ChatMessage("user", LARGE),)
    with pytest.raises(TooBusy, match="this client"):
        requests.open(b"a", Generate(id=2001, model="m", chat=chat), 0.0)
    requests.forget(requests.of_client(b"a")[0])
    requests.open(b"a", Generate(id=2001, model="m", chat=chat), 0.0)
    requests.check_integrity()


def test_all_of_them_together_too():
    requests = Requests(lambda *_: None)
    counts = [fill(requests, bytes([number])) for number in range(6)]
    assert sum(counts) == HELD_BY_ALL // len(LARGE)
    with pytest.raises(TooBusy, match="all open requests"):
        requests.open(b"late", generate(1, prompt=LARGE), 0.0)
    requests.check_integrity()


def test_one_request_always_fits():
    requests = Requests(lambda *_: None)
    requests.open(b"a", generate(1, prompt="\U0001f40b" + "x" * (HELD_PER_CLIENT // 4)), 0.0)


@pytest.mark.parametrize("where", ["roles", "stops", "source"])
def test_all_text_counts_not_only_prompts(where):
    requests = Requests(lambda *_: None)

    def ask(number: int) -> Generate | AddModel:
        if where == "roles":
            return Generate(id=number, model="m", chat=(ChatMessage(LARGE, ""),))
        if where == "stops":
            return generate(number, stop=(LARGE,))
        return AddModel(id=number, source=LARGE, name="m")

    for number in range(HELD_PER_CLIENT // len(LARGE)):
        requests.open(b"a", ask(number), 0.0)
    with pytest.raises(TooBusy, match="this client"):
        requests.open(b"a", ask(1000), 0.0)
    requests.check_integrity()


@pytest.mark.parametrize("name", ["m" * 1_999_900, "\x01" * 1_999_900], ids=["as long as can be", "longer when quoted"])
def test_an_error_that_quotes_what_was_sent_can_always_be_sent(tmp_path, name):
    house = House(tmp_path)
    try:
        client = house.client()
        client.say(generate(1, model=name), ShowModel(id=2, model=name), AddModel(id=3, source="/x", name=name))
        for _ in range(3):
            house.turn()
        heard = client.hear()
        assert [(event.id, event.code) for event in heard] == [
            (1, "unknown_model"),
            (2, "unknown_model"),
            (3, "invalid_name"),
        ]
        assert all(len(event.message) < 5000 for event in heard)
    finally:
        house.close()
