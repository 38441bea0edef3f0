"""Pinned prefixes, and what is told of reuse: the library's calls and the commands."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ebbflow.client import AsyncClient, Client, PinSummary, errors
from ebbflow.client.cli.main import main
from ebbflow.formats.messages import (
    Failed,
    Generate,
    GetStatus,
    ListPins,
    Pin,
    Pinned,
    Pins,
    Request,
    ShowModel,
    Status,
    Unpin,
)
from ebbflow.formats.values import ChatMessage, Residency

from support.fake_daemon import FakeDaemon, Item, silent

MB = 1_000_000
SYSTEM = PinSummary(name="system", tokens=640, nbytes=3 * MB, saved=True)
OLD = PinSummary(name="old", tokens=32, nbytes=MB, current=False)
MODEL = Residency(
    model="tiny", blocks=1, total_blocks=2, nbytes=12 * MB, total_nbytes=24 * MB, base_nbytes=MB, target_nbytes=12 * MB,
    kv_nbytes=40 * MB, kv_limit_nbytes=2000 * MB, kv_cached_nbytes=30 * MB, kv_pinned_nbytes=4 * MB,
    prompt_tokens=1000, reused_tokens=850, preemptions=3, shared_nbytes=2 * MB,
)  # fmt: skip


def pinning(request: Request) -> Iterable[Item]:
    match request:
        case Pin():
            pin = PinSummary(name=request.name, tokens=64, nbytes=300_000, saved=request.save)
            yield Pinned(id=request.id, pin=pin)
        case Unpin(name="system"):
            yield Pins(id=request.id, pins=(OLD,))
        case Unpin():
            yield Failed(id=request.id, code="invalid_request", message="no such pin")
        case ListPins():
            yield Pins(id=request.id, pins=(SYSTEM, OLD))
        case ShowModel():
            yield Failed(id=request.id, code="unknown_model", message="no such model")
        case GetStatus():
            yield Status(
                id=request.id, version="0", pid=7, uptime_seconds=1, available_nbytes=MB, available_source="here",
                reserve_nbytes=0, models=(MODEL,),
            )  # fmt: skip


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="ebb") as folder:
        monkeypatch.setenv("EBBFLOW_HOME", folder)
        (Path(folder) / "run").mkdir()
        yield f"ipc://{folder}/run/ebbflow.sock"


@pytest.fixture
def daemon(address: str) -> Iterator[FakeDaemon]:
    with FakeDaemon(address, pinning) as running:
        yield running


def ebb(*arguments: str, code: int = 0, typed: bytes | None = None) -> Result:
    result = CliRunner().invoke(main, arguments, input=typed)
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.exit_code == code, result.output
    return result


def test_a_prefix_is_text_ids_or_a_conversation(daemon: FakeDaemon, address: str):
    with Client(address) as client:
        made = client.pin("tiny", "system", "Be brief.", save=True, namespace="n")
        assert made == PinSummary(name="system", tokens=64, nbytes=300_000, saved=True)
        client.pin("tiny", "system", [1, 2])
        client.pin("tiny", "system", [ChatMessage("system", "Be brief.")])
        pins = [daemon.wait_for(Pin) for _ in range(3)]
        assert pins[0] == Pin(id=1, model="tiny", name="system", prompt="Be brief.", namespace="n", save=True)
        assert (pins[1].ids, pins[2].chat) == ((1, 2), (ChatMessage("system", "Be brief."),))
        assert client.pins("tiny") == (SYSTEM, OLD)
        assert client.unpin("tiny", "system") == (OLD,)
        with pytest.raises(errors.InvalidRequest, match="no such pin"):
            client.unpin("tiny", "nobody")


@pytest.mark.parametrize("text", [[], [-1], [1.5], 7, [{"role": "user"}]])
def test_what_cannot_be_pinned_is_refused_before_it_is_sent(address: str, text: object):
    with Client(address) as client:
        with pytest.raises(errors.InvalidRequest):
            client.pin("tiny", "system", text)  # type: ignore[arg-type]
        with pytest.raises(errors.InvalidName, match="is not a pin name"):
            client.pin("tiny", "../x", "text")


def test_coroutines_pin_too(daemon: FakeDaemon, address: str):
    async def run() -> None:
        async with AsyncClient(address) as client:
            assert (await client.pin("tiny", "system", "Be brief.")).tokens == 64
            assert await client.pins("tiny") == (SYSTEM, OLD)
            assert await client.unpin("tiny", "system") == (OLD,)

    asyncio.run(run())


def test_what_a_generation_can_be_asked_with(daemon: FakeDaemon, address: str):
    daemon.script = silent
    with Client(address) as client:
        first = client.generate("tiny", [3, 4], priority=7, deadline=2.5, namespace="n", exact_prefix=True, resume=True)
        second = client.chat("tiny", [{"role": "user", "content": "hi"}], deadline="1m")
        asked = [daemon.wait_for(Generate) for _ in range(2)]
        assert asked[0] == Generate(
            id=1, model="tiny", ids=(3, 4), priority=7, deadline_seconds=2.5, namespace="n", exact_prefix=True,
            resume=True,
        )  # fmt: skip
        assert asked[1].deadline_seconds == 60.0
        with pytest.raises(errors.InvalidRequest, match="a prompt is a string or token ids"):
            client.generate("tiny", [1, "2"])  # type: ignore[list-item]
        first.close()
        second.close()


def test_pin_a_file(daemon: FakeDaemon, tmp_path: Path):
    file = tmp_path / "system.txt"
    file.write_text("Be brief.\n")
    result = ebb("pin", "tiny", str(file), "--save")
    assert (result.stdout, result.stderr) == ("", "system: 64 tokens are kept in 300 kB, on disk too\n")
    assert daemon.wait_for(Pin).prompt == "Be brief.\n"
    assert ebb("pin", "tiny", "-", "--as", "other", typed=b"x").stderr == (
        "other: 64 tokens are kept in 300 kB, while tiny is in memory (--save: on disk too)\n"
    )
    assert daemon.wait_for(Pin).name == "other"


def test_list_and_remove(daemon: FakeDaemon):
    shown = ebb("pin", "tiny", "--list").stdout.splitlines()
    assert [line.split() for line in shown] == [
        ["PIN", "TOKENS", "SIZE", "SAVED", "STATE"],
        ["system", "640", "3.0", "MB", "yes", "current"],
        ["old", "32", "1.0", "MB", "no", "computed", "when", "the", "model", "was", "smaller"],
    ]
    assert [pin["name"] for pin in json.loads(ebb("pin", "tiny", "--list", "--json").stdout)] == ["system", "old"]
    assert "system" not in ebb("pin", "tiny", "--remove", "system").stdout
    assert "no such pin" in ebb("pin", "tiny", "--remove", "nobody", code=2).stderr


@pytest.mark.parametrize(
    "arguments",
    [[], ["a", "--list"], ["a", "--remove", "b"], ["--list", "--remove", "b"], ["--list", "--save"], ["-"]],
)
def test_one_thing_at_a_time(address: str, arguments: list[str]):
    assert "Error: " in ebb("pin", "tiny", *arguments, code=2).stderr


def test_files_that_cannot_be_pinned(address: str, tmp_path: Path):
    assert "No such file" in ebb("pin", "tiny", str(tmp_path / "nowhere"), code=74).stderr
    file = tmp_path / "binary"
    file.write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in ebb("pin", "tiny", str(file), code=2).stderr


def test_ps_and_top_tell_of_prefixes(daemon: FakeDaemon):
    assert (
        "tiny: keys and values 40.0 MB of at most 2.0 GB, 30.0 MB of it of requests that have ended, 4.0 MB pinned, "
        "85% of 1000 prompt tokens were computed before, 3 times a request gave its place up for a while"
    ) in ebb("ps").stdout
    assert "tiny: 2.0 MB in common with other models, and counted there\n" in ebb("ps").stdout
    assert "stacks 10.0 MB, " in ebb("ps").stdout
    assert "KV 40.0 MB of 2.0 GB, 85% reused" in ebb("top", "--once").stdout
