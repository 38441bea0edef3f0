from __future__ import annotations

import asyncio
import gc
import inspect
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from ebbflow.client import AsyncClient, Client, Lease, asks, errors
from ebbflow.client.stream import Stream
from ebbflow.formats.messages import (
    Added,
    AddModel,
    Cancel,
    Chunk,
    Done,
    Failed,
    Finished,
    Generate,
    ListModels,
    ModelList,
    Pause,
    Progress,
    Request,
    Resize,
    Resized,
    Resume,
    Shutdown,
    Started,
    YieldMemory,
)
from ebbflow.formats.units import AUTO, SizeWish
from ebbflow.formats.values import ModelSummary, Sampling
from ebbflow.formats.wire import HEADER, MAX_MESSAGE

from support.fake_daemon import VANISH, FakeDaemon, Item, Raw, silent

SHORT = Lease(ping_seconds=0.05, silence_seconds=0.3, connect_seconds=0.3)
SUMMARY = ModelSummary(
    name="tiny", family="llama", codec="bitstack", nbytes=1000, base_nbytes=100, original_nbytes=2000, created="now"
)


def finished(request: Request, tokens: int = 2) -> Finished:
    assert not isinstance(request, Finished)
    return Finished(id=request.id, reason="stop", prompt_tokens=3, tokens=tokens, seconds_to_first=0.1, seconds=0.2)  # type: ignore[union-attr]


def hello(request: Request) -> Iterable[Item]:
    """Answers any generation with `Hello, world`."""
    assert isinstance(request, Generate)
    yield Started(id=request.id, prompt_tokens=3)
    yield Chunk(id=request.id, text="Hello", tokens=1)
    yield Chunk(id=request.id, text=", world", tokens=2)
    yield finished(request)


def half(request: Request) -> Iterable[Item]:
    """Begins a generation and does not go on."""
    assert isinstance(request, Generate)
    yield Started(id=request.id, prompt_tokens=3)
    yield Chunk(id=request.id, text="Hello", tokens=1)


def dying(request: Request) -> Iterable[Item]:
    """Begins a generation and dies."""
    yield from half(request)
    yield VANISH


def library(request: Request) -> Iterable[Item]:
    """Knows one model, and how to add it."""
    match request:
        case ListModels():
            yield ModelList(id=request.id, models=(SUMMARY,))
        case AddModel():
            yield Progress(id=request.id, stage="encode", done=1, total=2)
            yield Progress(id=request.id, stage="write", done=2, total=2)
            yield Added(id=request.id, summary=SUMMARY, seconds=1.0)
        case Resize():
            yield Resized(id=request.id)
        case YieldMemory() | Pause() | Resume():
            yield Done(id=request.id)
        case _:
            yield Failed(id=request.id, code="unknown_model", message="no such model")  # type: ignore[union-attr]


@pytest.fixture
def address() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="ebb") as folder:  # pytest's own folders may be too long for a socket
        yield f"ipc://{folder}/s"


def test_a_stream_yields_text_and_then_knows_how_it_ended(address: str):
    with FakeDaemon(address, hello) as daemon, Client(address) as client:
        with client.generate("tiny", "Say", max_tokens=5, stop="\n") as stream:
            assert stream.result is None
            assert list(stream) == ["Hello", ", world"]
        assert stream.result is not None
        assert (stream.result.tokens, stream.prompt_tokens) == (2, 3)
        assert list(stream) == []
        asked = daemon.wait_for(Generate)
        assert (asked.model, asked.prompt) == ("tiny", "Say")
        assert asked.sampling == Sampling(max_tokens=5, stop=("\n",))


def test_chat_takes_mappings_and_text_collects(address: str):
    with FakeDaemon(address, hello) as daemon, Client(address) as client:
        assert client.chat("tiny", [{"role": "user", "content": "Hi"}]).text() == "Hello, world"
        chat = daemon.wait_for(Generate).chat
        assert chat is not None
        assert [(turn.role, turn.content) for turn in chat] == [("user", "Hi")]


def test_requests_run_side_by_side(address: str):
    with FakeDaemon(address, hello), Client(address) as client:
        streams = [client.generate("tiny", "Say") for _ in range(20)]
        assert {stream.text() for stream in streams} == {"Hello, world"}


def test_leaving_the_block_cancels(address: str):
    with FakeDaemon(address, half) as daemon, Client(address) as client:
        with client.generate("tiny", "Say") as stream:
            assert next(stream) == "Hello"
        assert daemon.wait_for(Cancel).id == daemon_id(stream)
        assert list(stream) == []
        assert stream.result is None


def daemon_id(stream: object) -> int:
    return stream._id  # type: ignore[attr-defined, no-any-return]


def test_an_answer_that_ctrl_c_took_out_of_the_readers_hands_is_not_waited_for_for_ever(address: str):
    with FakeDaemon(address, lambda request: [Done(id=request.id)]), Client(address) as client:  # type: ignore[union-attr]
        stream = Stream(client._channel, asks.remove("tiny"))
        assert isinstance(stream._replies.get(), Done)  # and there the reader is interrupted
        stream.cancel()
        assert stream.wait() is None


def test_a_forgotten_stream_cancels(address: str):
    with FakeDaemon(address, half) as daemon, Client(address) as client:
        stream = client.generate("tiny", "Say")
        next(stream)
        del stream
        gc.collect()
        daemon.wait_for(Cancel)


def test_cancelling_ends_iteration_with_the_daemons_word(address: str):
    with FakeDaemon(address, half), Client(address) as client:
        stream = client.generate("tiny", "Say")
        assert next(stream) == "Hello"
        stream.cancel()
        with pytest.raises(errors.Cancelled):
            next(stream)


def test_errors_are_typed(address: str):
    with FakeDaemon(address, library), Client(address) as client:
        with pytest.raises(errors.UnknownModel, match="no such model"):
            client.show("other")
        with pytest.raises(errors.UnknownModel):
            client.generate("other", "Say").text()


def test_an_answer_of_another_kind_is_our_bug_and_says_so(address: str):
    def wrong(request: Request) -> Iterable[Item]:
        yield Done(id=request.id)  # type: ignore[union-attr]

    wanted = pytest.raises(errors.InternalError, match="Done where ModelList")
    with FakeDaemon(address, wrong), Client(address) as client, wanted:
        client.models()


def test_the_daemon_vanishing_in_the_middle_of_an_answer_is_noticed_at_once(address: str):
    with FakeDaemon(address, dying), Client(address) as client:  # the usual lease: only the lost connection can tell
        stream = client.generate("tiny", "Say")
        assert next(stream) == "Hello"
        with pytest.raises(errors.DaemonGone):
            next(stream)


def test_a_daemon_that_hangs_ends_requests_with_the_lease(address: str):
    with FakeDaemon(address, half, pong=False), Client(address, lease=SHORT) as client:
        stream = client.generate("tiny", "Say")
        assert next(stream) == "Hello"
        with pytest.raises(errors.DaemonGone, match="has said nothing"):
            next(stream)


def test_the_next_request_meets_the_next_daemon_and_the_last_one_does_not(address: str):
    with Client(address) as client:
        with FakeDaemon(address, dying), pytest.raises(errors.DaemonGone):
            client.generate("tiny", "first").text()
        with pytest.raises(errors.DaemonGone, match="ebb serve"):
            client.generate("tiny", "second").text()
        with FakeDaemon(address, hello) as daemon:
            assert client.generate("tiny", "third").text() == "Hello, world"
            assert daemon.wait_for(Generate).prompt == "third"


def test_nothing_listening_is_known_soon(address: str):
    for_ever = Lease(connect_seconds=1000, silence_seconds=1000)
    with Client(address, lease=for_ever) as client, pytest.raises(errors.NotRunning, match="nobody listens"):
        client.ping()


def test_a_stale_socket_file_is_nothing_listening(address: str):
    with FakeDaemon(address):
        pass
    Path(address.removeprefix("ipc://")).touch()
    with Client(address) as client, pytest.raises(errors.DaemonGone):
        client.models()


def test_garbage_from_the_daemon_is_ignored(address: str):
    def garbage(request: Request) -> Iterable[Item]:
        yield Raw((b"nonsense",))
        yield Raw((HEADER, b"\xc1"))
        yield Raw((b"",) * 50)
        yield Raw((HEADER, b"\x81\xa4type\xa7Unknown"))
        yield from hello(request)

    with FakeDaemon(address, garbage), Client(address) as client:
        assert client.generate("tiny", "Say").text() == "Hello, world"


def test_an_oversize_message_from_the_daemon_ends_the_connection(address: str):
    huge = Raw((HEADER, bytes(MAX_MESSAGE + 1)))
    with FakeDaemon(address, lambda _: [huge]), Client(address) as client, pytest.raises(errors.DaemonGone):
        client.models()


def test_an_oversize_request_fails_at_once_and_harms_no_other(address: str):
    with FakeDaemon(address, hello), Client(address) as client:
        other = client.generate("tiny", "Say")
        with pytest.raises(errors.InvalidRequest, match="bytes"):
            client.generate("tiny", "x" * (MAX_MESSAGE + 1)).text()
        assert other.text() == "Hello, world"


def test_closing_the_client_ends_what_is_open(address: str):
    with FakeDaemon(address, half) as daemon:
        client = Client(address)
        stream = client.generate("tiny", "Say")
        next(stream)
        client.close()
        client.close()
        with pytest.raises(errors.Cancelled):
            next(stream)
        daemon.wait_for(Cancel)
        with pytest.raises(errors.Cancelled, match="closed"):
            client.models()


def test_closing_joins_the_thread(address: str):
    before = threading.active_count()
    with Client(address):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_a_forgotten_client_takes_its_thread_along(address: str):
    before = threading.active_count()
    client = Client(address)
    del client
    gc.collect()
    assert threading.active_count() == before


def test_a_client_is_of_no_use_in_a_forked_child(address: str, monkeypatch: pytest.MonkeyPatch):
    with Client(address) as client, monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(errors.InvalidRequest, match="fork"):
            client.models()


@pytest.mark.parametrize("address", ["", "nonsense", "inproc://x"])
def test_an_address_must_be_one(address: str):
    with pytest.raises(errors.InvalidRequest):
        Client(address or "x")


def test_an_address_that_zeromq_refuses_is_an_error_not_the_end_of_the_thread():
    with Client("tcp://localhost:nowhere") as client:
        for _ in range(2):
            with pytest.raises(errors.DaemonGone, match="cannot connect"):
                client.models()


def test_adding_reports_progress_and_gives_the_summary(address: str, tmp_path: Path):
    source = tmp_path / "some-model"
    source.mkdir()
    with FakeDaemon(address, library) as daemon, Client(address) as client:
        stream = client.add(source, levels=3)
        assert [progress.stage for progress in stream] == ["encode", "write"]
        assert stream.result() == SUMMARY
        asked = daemon.wait_for(AddModel)
        assert (asked.source, asked.name, asked.levels) == (str(source), "some-model", 3)
        assert client.add("org/name").result() == SUMMARY
        assert daemon.wait_for(AddModel).name == "name"


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda c: c.add("./nowhere"), errors.InvalidRequest),
        (lambda c: c.add("org/name", "bad name"), errors.InvalidName),
        (lambda c: c.add("org/name", calibration="/nowhere.txt"), errors.InvalidRequest),
        (lambda c: c.add("org/name", levels="three"), errors.InvalidRequest),
        (lambda c: c.add("org/name", level=3), errors.InvalidRequest),
        (lambda c: c.add("org/name", codec="sparse", sparsity=1), errors.InvalidRequest),
        (lambda c: c.add("org/name", codec="sparse", sparsity="half"), errors.InvalidRequest),
        (lambda c: c.add("org/name", codec="sparse", pattern="3:4"), errors.Unsupported),
        (lambda c: c.add("org/name", codec="sparse", method="obs"), errors.Unsupported),
        (lambda c: c.add("org/name", codec="sparse", values="i2"), errors.Unsupported),
        (lambda c: c.add("org/name", sparsity=0.5), errors.InvalidRequest),
        (lambda c: c.generate("m", "p", temperature=-1), errors.InvalidRequest),
        (lambda c: c.generate("m", "p", temperature="hot"), errors.InvalidRequest),
        (lambda c: c.generate("m", "p", heat=1), errors.InvalidRequest),
        (lambda c: c.chat("m", [{"role": "user"}]), errors.InvalidRequest),
        (lambda c: c.resize("m", "some"), errors.InvalidSize),
        (lambda c: c.resize("m", "auto", floor="much"), errors.InvalidSize),
        (lambda c: c.resize("m", "auto", flor=1), errors.InvalidRequest),
        (lambda c: c.resize("m", "auto", priority="high"), errors.InvalidRequest),
        (lambda c: c.yield_memory("2GB", "soon"), errors.InvalidRequest),
        (lambda c: c.yield_memory("all"), errors.InvalidSize),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_sent(call, error, address: str):  # type: ignore[no-untyped-def]
    with Client(address) as client, pytest.raises(error):
        call(client)


@pytest.mark.parametrize(
    ("size", "wish"),
    [
        ("300MB", SizeWish(nbytes=300_000_000)),
        ("60%", SizeWish(fraction=0.6)),
        ("auto", AUTO),
        (SizeWish(fraction=0.5), SizeWish(fraction=0.5)),
    ],
)
def test_sizes(size: str | SizeWish, wish: SizeWish, address: str):
    with FakeDaemon(address, library) as daemon, Client(address) as client:
        client.resize("tiny", size)
        assert daemon.wait_for(Resize).wish == wish


def test_shutdown_returns_when_the_daemon_has_gone(address: str):
    with FakeDaemon(address) as daemon, Client(address) as client:
        client.shutdown()
        daemon.wait_for(Shutdown)
        with pytest.raises(errors.DaemonGone):
            client.ping()


def test_coroutines_stream_collect_and_ask(address: str):
    async def main() -> None:
        async with AsyncClient(address) as client:
            async with client.generate("tiny", "Say", seed=4) as stream:
                assert [piece async for piece in stream] == ["Hello", ", world"]
            assert stream.result is not None
            texts = await asyncio.gather(*(client.chat("tiny", []).text() for _ in range(5)))
            assert set(texts) == {"Hello, world"}

    with FakeDaemon(address, hello):
        asyncio.run(main())


def test_coroutines_ask_everything_else(address: str, tmp_path: Path):
    async def main() -> None:
        async with AsyncClient(address) as client:
            await client.ping()
            assert await client.models() == (SUMMARY,)
            assert await client.resize("tiny", "60%") == Resized(id=3)
            stream = client.add(tmp_path, "tiny")
            assert [progress.done async for progress in stream] == [1, 2]
            assert await stream.result() == SUMMARY
            for favour in (client.yield_memory("2GB", "20m"), client.pause(), client.resume()):
                await favour
            for call in (client.show("x"), client.remove("x"), client.status()):
                with pytest.raises(errors.UnknownModel):
                    await call
            await client.shutdown()

    with FakeDaemon(address, library):
        asyncio.run(main())


def test_coroutines_cancel_by_leaving_by_aclose_and_by_being_cancelled(address: str):
    async def main(daemon: FakeDaemon) -> None:
        async with AsyncClient(address) as client:
            async with client.generate("tiny", "a") as stream:
                assert await anext(stream) == "Hello"
            assert (await asyncio.to_thread(daemon.wait_for, Cancel)).id == daemon_id(stream)
            stream = client.generate("tiny", "b")
            await stream.aclose()
            await stream.aclose()
            assert (await asyncio.to_thread(daemon.wait_for, Cancel)).id == daemon_id(stream)
            task = asyncio.create_task(client.generate("tiny", "c").text())
            await asyncio.to_thread(daemon.wait_for, Generate)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(daemon.wait_for, Cancel)

    with FakeDaemon(address, half) as daemon:
        asyncio.run(main(daemon))


def test_coroutines_meet_the_same_errors(address: str):
    async def main() -> None:
        async with AsyncClient(address) as client:
            stream = client.generate("tiny", "Say")
            assert await anext(stream) == "Hello"
            with pytest.raises(errors.DaemonGone):
                await anext(stream)
            with pytest.raises(errors.DaemonGone):
                await client.models()

    with FakeDaemon(address, dying):
        asyncio.run(main())


def test_a_reply_to_a_loop_that_is_closed_is_dropped(address: str):
    async def main(client: AsyncClient) -> object:
        return client.generate("tiny", "Say")

    with FakeDaemon(address, silent) as daemon:
        client = AsyncClient(address)
        stream = asyncio.run(main(client))
        daemon.wait_for(Generate)
        asyncio.run(client.aclose())
        del stream


def test_the_twins_offer_the_same():
    def offered(kind: type) -> dict[str, list[tuple[str, object]]]:
        methods = {name.replace("aclose", "close"): member for name, member in vars(kind).items() if name[0] != "_"}
        assert all(member.__doc__ for member in methods.values())
        return {
            name: [(p.name, p.default) for p in inspect.signature(member).parameters.values()]
            for name, member in methods.items()
        }

    assert offered(Client) == offered(AsyncClient)


def test_the_error_classes_are_all_there():
    from ebbflow.formats import errors as formats_errors

    assert {getattr(errors, name) for name in errors.__all__} == set(formats_errors.BY_CODE.values())


def test_the_client_starts_without_what_only_the_daemon_needs():
    code = (
        "import sys, ebbflow.client, ebbflow.client.cli.main;"
        "bad = ['torch', 'numba', 'numpy', 'psutil', 'transformers', 'ebbflow.daemon', 'ebbflow.kernels',"
        " 'ebbflow.formats.blocks', 'ebbflow.formats.checkpoint'];"
        "print([name for name in bad if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-P", "-c", code], text=True) == "[]\n"
