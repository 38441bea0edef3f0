from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from ebbflow.client.cli import chat as chat_module
from ebbflow.client.cli.main import EPILOG, main
from ebbflow.client.launch import COMMAND
from ebbflow.formats.architecture import Architecture
from ebbflow.formats.errors import BY_CODE, InvalidRequest
from ebbflow.formats.manifest import CurvePoint
from ebbflow.formats.messages import (
    Added,
    AddModel,
    Cancel,
    Chunk,
    Done,
    ExportModel,
    Failed,
    Finished,
    Generate,
    GetStatus,
    ImportModel,
    ListModels,
    ModelDetail,
    ModelList,
    Pause,
    Progress,
    RemoveModel,
    Request,
    Resize,
    Resized,
    Resume,
    ShowModel,
    Started,
    Status,
    YieldMemory,
)
from ebbflow.formats.units import AUTO, SizeWish
from ebbflow.formats.values import ModelSummary, ProcessMemory, Residency, Sampling

from support.fake_daemon import VANISH, FakeDaemon, Item

SUMMARY = ModelSummary(
    name="tiny",
    family="llama",
    codec="bitstack",
    nbytes=24_000_000,
    base_nbytes=3_000_000,
    original_nbytes=60_000_000,
    created="2025-11-21",
)
SHAPE = Architecture(
    family="llama", vocab=258, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=96, context=256,
    norm_eps=1e-5, rotary_theta=10_000.0,
)  # fmt: skip
RESIDENCY = Residency(
    model="tiny", blocks=120, total_blocks=240, nbytes=12_300_000, total_nbytes=24_000_000, base_nbytes=3_000_000,
    target_nbytes=12_500_000, kv_nbytes=400_000, running=1, waiting=2, tokens_per_second=31.26,
    wish=SizeWish(fraction=0.5), reason="as asked",
)  # fmt: skip
CURVE = (CurvePoint(60, 6_000_000, 2.5, 40.25), CurvePoint(240, 24_000_000, 0.01, 9.5))


def say(request: Request, *texts: str) -> Iterable[Item]:
    assert isinstance(request, Generate)
    yield Started(id=request.id, prompt_tokens=3)
    for number, text in enumerate(texts):
        yield Chunk(id=request.id, text=text, tokens=number + 1)


def end(request: Request, tokens: int = 2) -> Finished:
    assert isinstance(request, Generate)
    return Finished(id=request.id, reason="stop", prompt_tokens=3, tokens=tokens, seconds_to_first=0.1, seconds=0.2)


def working(request: Request) -> Iterable[Item]:
    """A daemon with one model, that answers `Hello, world`."""
    match request:
        case Generate():
            yield from say(request, "Hello", ", world")
            yield end(request)
        case ListModels():
            yield ModelList(id=request.id, models=(SUMMARY,))
        case ShowModel():
            yield ModelDetail(
                id=request.id, summary=SUMMARY, architecture=SHAPE, source="/models/tiny", checksum="abc",
                options={"levels": 8}, blocks=240, curve=CURVE,
            )  # fmt: skip
        case AddModel():
            yield Progress(id=request.id, stage="encode", tensor="layers.0.q", done=1000, total=2000, eta_seconds=70)
            yield Added(id=request.id, summary=SUMMARY, seconds=1.0)
        case ImportModel() | ExportModel():
            yield Progress(id=request.id, stage="copying", done=1000, total=2000)
            yield Added(id=request.id, summary=SUMMARY, seconds=1.0)
        case RemoveModel() | YieldMemory() | Pause() | Resume():
            yield Done(id=request.id)
        case Resize():
            after = msgspec.structs.replace(RESIDENCY, nbytes=6_100_000)
            yield Resized(id=request.id, residency=after, released_nbytes=6_200_000, seconds=0.0123)
        case GetStatus():
            yield status(request.id)


def status(id_: int) -> Status:
    return Status(
        id=id_, version="0.1.0", pid=7, uptime_seconds=200, available_nbytes=2_000_000_000,
        available_source="MemAvailable", reserve_nbytes=500_000_000, models=(RESIDENCY,),
        processes=(
            ProcessMemory(role="supervisor", pid=7, private_nbytes=25_000_000),
            ProcessMemory(role="worker", pid=8, private_nbytes=90_000_000, swapped_nbytes=1_000_000),
        ),
    )  # fmt: skip


Cli = Callable[..., Result]


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="ebb") as folder:  # pytest's own folders may be too long for a socket
        monkeypatch.setenv("EBBFLOW_HOME", folder)
        (Path(folder) / "run").mkdir()
        yield f"ipc://{folder}/run/ebbflow.sock"


@pytest.fixture
def daemon(address: str) -> Iterator[FakeDaemon]:
    with FakeDaemon(address, working) as running:
        yield running


def ebb(*arguments: str, code: int = 0, typed: str | None = None) -> Result:
    """Run the command line; whatever happens, no traceback is shown."""
    result = CliRunner().invoke(main, arguments, input=typed)
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert "Traceback" not in result.output
    assert result.exit_code == code, result.output
    return result


def failing(code: str) -> Callable[[Request], Iterable[Item]]:
    def script(request: Request) -> Iterable[Item]:
        yield Failed(id=request.id, code=code, message="this and that")  # type: ignore[union-attr]

    return script


def test_run_streams_the_answer_to_stdout(daemon: FakeDaemon):
    result = ebb("run", "tiny", "Say", "--max-tokens", "7", "--top-p", "0.5", "--stop", "a", "--stop", "b")
    assert (result.stdout, result.stderr) == ("Hello, world\n", "")
    asked = daemon.wait_for(Generate)
    assert (asked.model, asked.prompt) == ("tiny", "Say")
    assert asked.sampling == Sampling(max_tokens=7, top_p=0.5, stop=("a", "b"))


def test_run_reads_the_prompt_from_stdin(daemon: FakeDaemon):
    ebb("run", "tiny", "-", typed="two\nlines\n")
    assert daemon.wait_for(Generate).prompt == "two\nlines\n"


def test_run_says_how_fast_it_was_on_stderr(daemon: FakeDaemon):
    result = ebb("run", "tiny", "Say", "-v")
    assert result.stdout == "Hello, world\n"
    assert "3 tokens read, 2 written (stop), 0.10 s to the first, 10.0 tokens/s" in result.stderr


def test_ctrl_c_in_a_single_answer_cancels_it_and_exits_130(daemon: FakeDaemon):
    def script(request: Request) -> Iterable[Item]:
        yield from say(request, "Hello")
        yield interrupt

    daemon.script = script
    result = ebb("run", "tiny", "Say", code=130)
    daemon.wait_for(Cancel)
    assert result.stdout in ("Hello\n", "")


def interrupt() -> None:
    """Ctrl-C, as the terminal would send it to the thread that reads."""
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    signal.pthread_kill(main_thread, signal.SIGINT)


def test_a_conversation_has_a_history(daemon: FakeDaemon):
    result = ebb("run", "tiny", typed="first\n\nsecond\n/clear\nthird\n/bye\nnever\n")
    assert result.stdout == "Hello, world\n" * 3
    turns = [daemon.wait_for(Generate).chat for _ in range(3)]
    assert [[(turn.role, turn.content) for turn in chat or ()] for chat in turns] == [
        [("user", "first")],
        [("user", "first"), ("assistant", "Hello, world"), ("user", "second")],
        [("user", "third")],
    ]


def test_ctrl_c_stops_the_answer_not_the_conversation(daemon: FakeDaemon):
    def script(request: Request) -> Iterable[Item]:
        assert isinstance(request, Generate) and request.chat
        if request.chat[-1].content == "first":
            yield from say(request, "Once upon")
            yield interrupt
        else:
            yield from working(request)

    daemon.script = script
    result = ebb("run", "tiny", typed="first\nsecond\n")
    daemon.wait_for(Cancel)
    again = daemon.wait_for(Generate)
    assert again.chat is not None and again.chat[-1].content == "second"
    assert result.stdout.endswith("Hello, world\n")
    assert "(stopped)" in result.stderr


def test_a_person_is_told_about_errors_and_goes_on(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch):
    lines = iter(["first", KeyboardInterrupt(), "second", EOFError()])

    def typed(_prompt: str) -> str:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    def script(request: Request) -> Iterable[Item]:
        if isinstance(request, Generate) and request.chat and request.chat[-1].content == "first":
            yield from failing("worker_died")(request)
        else:
            yield from working(request)

    daemon.script = script
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(chat_module.Chat, "interactive", property(lambda _: True))
    result = ebb("run", "tiny")
    assert "ebb: this and that" in result.stderr
    assert "Ctrl-D or /bye leaves." in result.stderr
    assert result.stdout == "Hello, world\n"
    daemon.wait_for(Generate)
    assert len(daemon.wait_for(Generate).chat or ()) == 1  # a failed turn is not history


def test_a_script_fails_with_the_first_error(daemon: FakeDaemon):
    daemon.script = failing("worker_died")
    assert ebb("run", "tiny", typed="first\nsecond\n", code=75).stderr == "ebb: this and that\n"


def test_the_daemon_vanishing_is_an_error_like_any_other(daemon: FakeDaemon):
    def script(request: Request) -> Iterable[Item]:
        yield from say(request, "Hello")
        yield VANISH

    daemon.script = script
    result = ebb("run", "tiny", "Say", code=69)
    assert result.stdout == "Hello\n"
    assert result.stderr.startswith("ebb: the daemon went away")


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_each_error_is_one_line_and_its_exit_code(code: str, daemon: FakeDaemon):
    daemon.script = failing(code)
    exit_code = BY_CODE[code].exit_code
    assert ebb("list", code=exit_code).stderr == "ebb: this and that\n"
    assert f"\n{exit_code:5}  " in EPILOG or f" {exit_code:3}  " in EPILOG


def test_add_tells_how_far_it_is_on_stderr(daemon: FakeDaemon, tmp_path: Path):
    (tmp_path / "some-model").mkdir()
    result = ebb("add", str(tmp_path / "some-model"), "--levels", "4", "--order", "paper")
    assert result.stdout == ""
    assert "encode: 1.0 kB of 2.0 kB, 1 min 10 s left, layers.0.q\n" in result.stderr
    assert "tiny: added, 3.0 MB to 24.0 MB (the original has 60.0 MB)" in result.stderr
    asked = daemon.wait_for(AddModel)
    assert (asked.source, asked.name) == (str(tmp_path / "some-model"), "some-model")
    assert (asked.levels, asked.order, asked.codec) == (4, "paper", "nested")


def test_add_asks_for_a_sparse_model(daemon: FakeDaemon, tmp_path: Path):
    options = ["--codec", "sparse", "--sparsity", "0.6", "--method", "frankwolfe", "--values", "i4"]
    options += ["--masks-of", "other"]
    ebb("add", str(tmp_path), "--name", "tiny", *options)
    asked = daemon.wait_for(AddModel)
    assert (asked.codec, asked.sparsity, asked.pattern, asked.masks_of) == ("sparse", 0.6, None, "other")
    assert (asked.method, asked.values) == ("frankwolfe", "i4")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--codec", "sparse", "--sparsity", "1"], "sparsity must be above 0 and below 1, not 1.0"),
        (["--codec", "sparse", "--sparsity", "0.7", "--pattern", "2:4"], "the pattern 2:4 prunes 0.5, not 0.7"),
        (["--sparsity", "0.5"], "sparsity belongs to the codec sparse; the codec nested has none"),
    ],
)
def test_add_says_what_cannot_be_pruned_so(daemon: FakeDaemon, tmp_path: Path, options: list[str], said: str):
    result = ebb("add", str(tmp_path), "--name", "tiny", *options, code=InvalidRequest.exit_code)
    assert said in result.stderr


def test_ctrl_c_cancels_an_add_and_says_that_nothing_changed(daemon: FakeDaemon, tmp_path: Path):
    def script(request: Request) -> Iterable[Item]:
        yield Progress(id=request.id, stage="encode")  # type: ignore[union-attr]
        yield interrupt

    daemon.script = script
    result = ebb("add", str(tmp_path), "--name", "tiny", code=130)
    daemon.wait_for(Cancel)
    assert result.stderr.endswith(
        "ebb: cancelled; the library is untouched, and the same command would go on from here\n"
    )


def test_an_add_that_was_done_before_ctrl_c_was_heard_says_so(daemon: FakeDaemon, tmp_path: Path):
    daemon.script = lambda request: [interrupt, Added(id=request.id, summary=SUMMARY, seconds=1.0)]  # type: ignore[union-attr]
    result = CliRunner().invoke(main, ["add", str(tmp_path), "--name", "tiny"])
    assert "tiny: added" in result.stderr


def test_list_and_show(daemon: FakeDaemon):
    assert ebb("list").stdout.splitlines()[1].split() == [
        "tiny", "llama", "bitstack", "3.0", "MB", "24.0", "MB", "2025-11-21",
    ]  # fmt: skip
    shown = ebb("show", "tiny").stdout
    assert "llama, 2 layers" in shown
    assert [line.split() for line in shown.splitlines()[-3:]] == [
        ["SIZE", "OF", "STACK", "KL", "PERPLEXITY"],
        ["6.0", "MB", "25%", "2.5", "40.25"],
        ["24.0", "MB", "100%", "0.01", "9.50"],
    ]
    plot = shown.splitlines()[shown.splitlines().index("KL, nats a token") + 1 : -3]
    assert plot[2].startswith("       1 ┤ ")
    assert plot[-1].split() == ["6.0", "MB", "15.0", "MB", "24.0", "MB"]


def test_list_and_show_say_what_is_shared(daemon: FakeDaemon):
    one = msgspec.structs.replace(SUMMARY, shares=("two", "won"), shared_nbytes=3_100_000)
    two = msgspec.structs.replace(one, name="two", shares=("tiny", "won"))

    def script(request: Request) -> Iterable[Item]:
        if isinstance(request, ListModels):
            yield ModelList(id=request.id, models=(one, two))
        else:
            (shown,) = working(request)
            yield msgspec.structs.replace(shown, summary=one)

    assert "shares" not in ebb("show", "tiny").stdout
    daemon.script = script
    assert ["shares", "3.1", "MB", "of", "masks", "with", "two,", "won"] in [
        line.split() for line in ebb("show", "tiny").stdout.splitlines()
    ]
    assert ebb("list").stderr.splitlines() == ["tiny shares 3.1 MB of masks with two, won"]


def test_json_on_stdout_is_one_document(daemon: FakeDaemon):
    assert json.loads(ebb("list", "--json").stdout)[0]["name"] == "tiny"
    assert json.loads(ebb("show", "tiny", "--json").stdout)["curve"][0]["kl"] == 2.5
    for command in ("status", "ps"):
        document = json.loads(ebb(command, "--json").stdout)
        assert document["models"][0]["wish"] == "50%"
        assert document["adding"] == []
    document = json.loads(ebb("resize", "tiny", "auto", "--json").stdout)
    assert (document["residency"]["nbytes"], document["released_nbytes"]) == (6_100_000, 6_200_000)
    assert "id" not in document


def test_ps_shows_sizes_reasons_and_what_the_kernel_counts(daemon: FakeDaemon):
    output = ebb("ps").stdout
    row = output.splitlines()[1].split("  ")
    assert [cell.strip() for cell in row if cell.strip()] == [
        "tiny", "12.3 MB", "24.0 MB", "51%", "120/240", "400 kB", "0 B", "1/2", "31.3", "50%", "as asked",
    ]  # fmt: skip
    assert "supervisor 25.0 MB, worker 90.0 MB (and 1.0 MB swapped out)" in output
    assert "2.0 GB available (MemAvailable)" in output
    assert "held by the worker: 12.7 MB: stacks 12.3 MB, keys and values 400 kB, work space 0 B, runtime 0 B" in output


def test_ps_and_show_tell_of_damage(daemon: FakeDaemon):
    damaged = msgspec.structs.replace(RESIDENCY, damage="block 7 \x1bis bad", damaged_at_nbytes=12_300_000)

    def script(request: Request) -> Iterable[Item]:
        if isinstance(request, GetStatus):
            yield msgspec.structs.replace(status(request.id), models=(damaged,))
        else:
            (shown,) = working(request)
            yield msgspec.structs.replace(shown, damage=damaged.damage)

    assert "damaged" not in ebb("show", "tiny").stdout
    daemon.script = script
    assert "tiny: block 7 \ufffdis bad" in ebb("ps").stdout.splitlines()
    assert ["damaged", "block", "7", "\ufffdis", "bad"] in [
        line.split() for line in ebb("show", "tiny").stdout.splitlines()
    ]


def test_ps_shows_terms_and_what_was_yielded(daemon: FakeDaemon):
    terms = msgspec.structs.replace(
        RESIDENCY, wish=AUTO, floor_nbytes=5_000_000, cap_nbytes=20_000_000, priority=2.0, work_nbytes=3_000_000
    )

    def script(request: Request) -> Iterable[Item]:
        yield msgspec.structs.replace(
            status(request.id), models=(terms,), yielded_nbytes=10**9, yield_seconds=90.0, paused=True,
            runtime_nbytes=40_000_000,
        )  # fmt: skip

    daemon.script = script
    output = ebb("ps").stdout
    assert "auto, at least 5.0 MB, at most 20.0 MB, priority 2" in output
    assert "55.7 MB: stacks 12.3 MB, keys and values 400 kB, work space 3.0 MB, runtime 40.0 MB" in output
    assert "left to everything else (1.0 GB for another 1 min 30 s); paused" in output


@pytest.mark.parametrize(
    ("command", "asked", "said"),
    [
        (("yield", "2GB", "--for", "20m"), YieldMemory(id=0, nbytes=2 * 10**9, seconds=1200), "2.0 GB more are left"),
        (("yield", "1GiB"), YieldMemory(id=0, nbytes=2**30, seconds=3600), "for 1 h 0 min"),
        (("yield", "0"), YieldMemory(id=0, nbytes=0), "nothing is yielded"),
        (("pause",), Pause(id=0), "ebb resume"),
        (("resume",), Resume(id=0), "grow again"),
    ],
)
def test_memory_for_something_else(daemon: FakeDaemon, command: tuple[str, ...], asked: Request, said: str):
    assert said in ebb(*command).stderr
    assert msgspec.structs.replace(daemon.wait_for(type(asked)), id=0) == asked


def test_resize_with_terms(daemon: FakeDaemon):
    ebb("resize", "tiny", "auto", "--floor", "5MB", "--cap", "0", "--priority", "2")
    asked = daemon.wait_for(Resize)
    assert (asked.wish, asked.floor_nbytes, asked.cap_nbytes, asked.priority) == (AUTO, 5_000_000, 0, 2.0)
    ebb("resize", "tiny", "auto")
    asked = daemon.wait_for(Resize)
    assert (asked.floor_nbytes, asked.cap_nbytes, asked.priority) == (None, None, None)


def test_resize_says_what_came_back(daemon: FakeDaemon):
    assert ebb("resize", "tiny", "25%").stdout == (
        "tiny: 12.3 MB -> 6.1 MB (of 24.0 MB); the kernel counts 6.2 MB less private memory, after 12 ms\n"
    )
    assert daemon.wait_for(Resize).wish == SizeWish(fraction=0.25)


def test_resizing_a_model_that_is_not_loaded(daemon: FakeDaemon):
    def script(request: Request) -> Iterable[Item]:
        if isinstance(request, Resize):
            yield Resized(id=request.id)
        else:
            yield from working(request)

    daemon.script = script
    assert ebb("resize", "other", "25%").stdout == "other: not loaded; 25% will apply when it is\n"


def test_rm_and_status_and_stop(daemon: FakeDaemon):
    assert "tiny" in ebb("rm", "tiny").stderr
    assert daemon.wait_for(RemoveModel).model == "tiny"
    assert "7, up 3 min 20 s" in ebb("status").stdout
    assert "stopped" in ebb("stop").stderr


def test_without_a_daemon_stop_is_content_and_ps_and_status_say_so(address: str):
    assert "not running" in ebb("stop").stderr
    for command in ("ps", "status"):
        result = ebb(command, code=69)
        assert result.stdout == ""
        assert "not running" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["resize", "tiny", "some"],
        ["resize", "tiny", "auto", "--cap", "x"],
        ["yield", "1GB", "--for", "x"],
        ["yield", "a"],
        ["add", "./nowhere"],
        ["run", "tiny", "x", "--top-p", "2"],
        ["what"],
    ],
)
def test_wrong_usage_exits_2(arguments: list[str], daemon: FakeDaemon):
    ebb(*arguments, code=2)


def test_an_unexpected_exception_is_one_line_too(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch):
    def broken(_self: object) -> None:
        raise ZeroDivisionError("by design")

    monkeypatch.setattr("ebbflow.client.client.Client.models", broken)
    assert ebb("list", code=70).stderr == "ebb: unexpected ZeroDivisionError: by design; EBBFLOW_DEBUG=1 shows where\n"
    monkeypatch.setenv("EBBFLOW_DEBUG", "1")
    assert isinstance(CliRunner().invoke(main, ["list"]).exception, ZeroDivisionError)


def test_a_reader_that_goes_away_is_no_drama(daemon: FakeDaemon):
    command = f"{sys.executable} -P -m ebbflow.client.cli.main run tiny Say | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=dict(os.environ), check=False)
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("list >/dev/full", 1, "ebb: the output: No space left on device\n"),
        ("run tiny Say >/dev/full", 1, "ebb: the output: No space left on device\n"),
        ("--help >/dev/full", 1, "ebb: the output: No space left on device\n"),
        ("list >&-", 0, ""),
        ("run tiny - <&-", 0, ""),
        ("list 2>&- >/dev/full", 1, ""),
        ("what 2>/dev/full", 1, ""),
    ],
)
def test_streams_that_are_closed_or_full(daemon: FakeDaemon, command: str, code: int, said: str):
    def script(request: Request) -> Iterable[Item]:
        match request:
            case Generate():
                yield from say(request, "Hello")
                yield end(request)
            case _:
                yield ModelList(id=request.id, models=(SUMMARY,))

    daemon.script = script
    shell = f"{sys.executable} -P -m ebbflow.client.cli.main {command}"
    result = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=dict(os.environ), check=False)
    assert (result.returncode, result.stderr) == (code, said)


def test_help_names_version_completion_and_exit_codes():
    assert ebb("--version").stdout.startswith("ebb, version ")
    output = ebb("--help").stdout
    assert "_EBB_COMPLETE" in output
    assert "Exit codes" in output


def test_a_terminal_shows_the_whole_answer_and_obeys_none_of_it(daemon: FakeDaemon):
    def script(request: Request) -> Iterable[Item]:
        yield from say(request, "Hello", " \x1b[31mworld")
        yield end(request)

    daemon.script = script
    screen = on_terminal("run", "tiny", "Say")
    assert screen.rpartition("\x1b[2K")[2].strip() == "Hello \ufffd[31mworld"  # after the sign of life was wiped


def test_serve_hands_its_options_to_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = list[list[str]]()
    monkeypatch.setattr(os, "execv", lambda path, command: commands.append(command))
    for arguments in ([], ["--kv", "i8", "--threads=2", "--exact", "--idle-seconds", "5"]):
        assert CliRunner().invoke(main, ["serve", *arguments]).exit_code == 0
    plain, full = (command[len(COMMAND) :] for command in commands)
    assert plain == []
    assert sorted(full) == ["--exact=true", "--idle-seconds=5", "--kv=i8", "--threads=2"]


def on_terminal(*arguments: str) -> str:
    """Everything that the command line writes to a terminal."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-P", "-m", "ebbflow.client.cli.main", *arguments]
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    screen = b""
    with contextlib.suppress(OSError):  # how Linux says that nobody has the terminal open any more
        while data := os.read(ours, 65536):
            screen += data
    os.close(ours)
    assert process.wait() == 0
    return screen.decode()


def test_run_goes_on_after_a_dead_worker_unless_told_not_to_and_says_what_it_waits_for(address: str) -> None:
    def dying(request: Request) -> Iterable[Item]:
        if isinstance(request, Generate):
            yield Progress(id=request.id, stage="compiling kernels")
            yield from say(request, "all" if request.resume else "less")
            yield end(request)

    with FakeDaemon(address, dying):
        result = ebb("run", "tiny", "x")
        assert (result.stdout, result.stderr) == ("all\n", "compiling kernels ...\n")
        assert ebb("run", "tiny", "x", "--no-resume").stdout == "less\n"
        assert ebb("run", "tiny", typed="hi\n").stdout == "all\n"


def test_import_and_export_name_folders_whole(
    daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    result = ebb("import", "model", "--name", "tiny")
    assert "copying: 1.0 kB of 2.0 kB" in result.stderr
    assert "tiny: all 24.0 MB are here" in result.stderr
    sent = daemon.wait_for(ImportModel)
    assert (sent.source, sent.name) == (str(tmp_path / "model"), "tiny")
    assert "copied to out" in ebb("export", "tiny", "out").stderr
    assert daemon.wait_for(ExportModel).target == str(tmp_path / "out")
    assert "is not a folder" in ebb("import", "nowhere", code=2).stderr


def test_an_import_that_is_cancelled_says_what_stays(address: str, tmp_path: Path) -> None:
    def slow(request: Request) -> Iterable[Item]:
        if isinstance(request, ImportModel):
            yield Progress(id=request.id, stage="copying", done=1, total=2)
            yield lambda: os.kill(os.getpid(), signal.SIGINT)

    with FakeDaemon(address, slow):
        assert "goes on from there" in ebb("import", str(tmp_path), "--name", "x", code=130).stderr


def test_what_is_still_arriving_is_listed_so(address: str) -> None:
    half = msgspec.structs.replace(SUMMARY, arrived_nbytes=SUMMARY.nbytes // 4)

    def script(request: Request) -> Iterable[Item]:
        if isinstance(request, ListModels):
            yield ModelList(id=request.id, models=(half,))

    with FakeDaemon(address, script):
        assert "arriving 25%" in ebb("list").stdout
