from __future__ import annotations

import io
import math
import os
import pty
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from ebbflow.client import Client, Lease
from ebbflow.client.cli.frame import BAR, BASE, FREE, HELD, TARGET, View, frame
from ebbflow.client.cli.main import main
from ebbflow.client.cli.quality import Quality, quality_at
from ebbflow.client.cli.top import Watch, show
from ebbflow.formats.manifest import CurvePoint
from ebbflow.formats.messages import Failed, GetStatus, Request, ShowModel, Status
from ebbflow.formats.units import SizeWish
from ebbflow.formats.values import ProcessMemory, Residency

from support.fake_daemon import FakeDaemon, Item

MB = 1_000_000
CURVE = (CurvePoint(1, 10 * MB, 1.0, 40.0), CurvePoint(2, 20 * MB, 0.01, 20.0))
MODEL = Residency(
    model="tiny", blocks=120, total_blocks=240, nbytes=12 * MB, total_nbytes=24 * MB, base_nbytes=3 * MB,
    target_nbytes=18 * MB, kv_nbytes=400_000, running=1, waiting=2, tokens_per_second=31.26,
    wish=SizeWish(), reason="memory is short",
)  # fmt: skip
STATUS = Status(
    id=1, version="0.1.0", pid=7, uptime_seconds=200, available_nbytes=2000 * MB, available_source="cgroup limit",
    reserve_nbytes=500 * MB, total_nbytes=4000 * MB, models=(MODEL,),
    processes=(
        ProcessMemory(role="supervisor", pid=7, private_nbytes=18 * MB),
        ProcessMemory(role="worker", pid=8, private_nbytes=90 * MB, swapped_nbytes=MB),
    ),
)  # fmt: skip


def drawn(view: View) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None, markup=False)
    console.print(frame(view))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_quality_lies_on_the_line_between_two_sizes():
    middle = quality_at(CURVE, 15 * MB)
    assert middle is not None
    assert (middle.kl, middle.excess) == pytest.approx((0.1, math.sqrt(2) - 1))
    assert quality_at(CURVE, 20 * MB) == Quality(pytest.approx(0.01), pytest.approx(0))
    assert quality_at(CURVE, 10 * MB) == quality_at(CURVE, MB) == Quality(pytest.approx(1), pytest.approx(1))
    assert quality_at(CURVE, 99 * MB) == quality_at(CURVE, 20 * MB)
    assert str(Quality(0.0512, 0.031)) == "KL 0.0512, perplexity +3.1%"


def test_quality_of_what_was_not_measured_or_is_no_number():
    assert quality_at((), MB) is None
    assert quality_at((CurvePoint(1, MB, math.inf, 1.0), CurvePoint(1, MB, 1.0, math.nan)), MB) is None
    assert quality_at((CurvePoint(1, MB, 0.0, 5.0),), MB) is not None


def test_a_picture_has_everything():
    text = drawn(View(STATUS, "", {"tiny": CURVE}, {"tiny": [0, 12 * MB, 24 * MB]}))
    for words in (
        "2.0 GB of 4.0 GB available (cgroup limit), 500 MB left to everything else",
        "12.0 MB of 24.0 MB (50%) -> 18.0 MB",
        "KL 0.398, perplexity +74.1%",
        "KV 400 kB   1 running, 2 waiting   31.3 tokens/s",
        "▁▅█  auto: memory is short",
        "processes supervisor 18.0 MB, worker 90.0 MB (and 1.0 MB swapped out)",
    ):
        assert words in text, text


def test_what_other_models_have_too_is_said():
    assert "shared" not in drawn(View(STATUS))
    variant = msgspec.structs.replace(MODEL, shared_nbytes=2 * MB)
    assert "2.0 MB shared   KV" in drawn(View(msgspec.structs.replace(STATUS, models=(variant,))))


def test_the_bar_shows_base_edge_and_target():
    [line] = [line for line in drawn(View(STATUS)).splitlines() if line.startswith("tiny")]
    bar = line[10 : 10 + BAR]
    eighth = BAR // 8
    assert bar == BASE * eighth + HELD * 3 * eighth + FREE * 2 * eighth + TARGET + FREE * (2 * eighth - 1)


def test_an_edge_that_cannot_come_nearer_is_not_shown_as_moving():
    near = msgspec.structs.replace(MODEL, target_nbytes=12_300_000)
    text = drawn(View(msgspec.structs.replace(STATUS, models=(near,))))
    assert "12.0 MB of 24.0 MB (50%)\n" in text


def test_long_names_keep_the_bars_in_line():
    long = msgspec.structs.replace(MODEL, model="a-model-with-a-long-name")
    lines = drawn(View(msgspec.structs.replace(STATUS, models=(MODEL, long)))).splitlines()
    starts = {min(line.index(letter) for letter in (BASE, HELD) if letter in line) for line in lines if BASE in line}
    assert starts == {len("a-model-with-a-long-name ")}


@pytest.mark.parametrize(
    "changed",
    [
        {"nbytes": 0, "target_nbytes": 0},
        {"nbytes": 24 * MB, "target_nbytes": 99 * MB},
        {"nbytes": 0, "total_nbytes": 0, "base_nbytes": 0},
        {"nbytes": 2 * MB},
    ],
)
def test_a_bar_is_never_longer_or_shorter(changed):
    model = msgspec.structs.replace(MODEL, **changed)
    text = drawn(View(msgspec.structs.replace(STATUS, models=(model,), total_nbytes=0)))
    [line] = [line for line in text.splitlines() if line.startswith("tiny")]
    assert set(line[10 : 10 + BAR]) <= {BASE, HELD, FREE, TARGET}
    assert line[10 + BAR] == " "


def test_nothing_in_memory_and_nobody_there():
    assert "no model is in memory" in drawn(View(msgspec.structs.replace(STATUS, models=(), adding=("new",))))
    assert "adding    new" in drawn(View(msgspec.structs.replace(STATUS, models=(), adding=("new",))))
    assert "no daemon it went away" in drawn(View(None, "it went away"))


def test_a_reason_cannot_drive_the_terminal():
    evil = msgspec.structs.replace(MODEL, reason="\x1b[2J[bold]x[/bold]")
    text = drawn(View(msgspec.structs.replace(STATUS, models=(evil,))))
    assert "\x1b" not in text
    assert "[bold]x[/bold]" in text


@pytest.fixture
def address(monkeypatch) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="ebb") as folder:
        monkeypatch.setenv("EBBFLOW_HOME", folder)
        (Path(folder) / "run").mkdir()
        yield f"ipc://{folder}/run/ebbflow.sock"


def answering(request: Request) -> Iterable[Item]:
    match request:
        case GetStatus():
            yield msgspec.structs.replace(STATUS, id=request.id)
        case ShowModel():
            yield Failed(id=request.id, code="unknown_model", message="")


def test_once_prints_one_picture(address, tmp_path):
    with FakeDaemon(address, answering):
        for arguments in (["top", "--once"], ["top"]):  # a pipe is no terminal
            result = CliRunner().invoke(main, arguments)
            assert (result.exit_code, "12.0 MB of 24.0 MB" in result.stdout) == (0, True), result.output
        file = tmp_path / "top.svg"
        assert CliRunner().invoke(main, ["top", "--svg", str(file)]).stdout == ""
        assert file.read_text().startswith("<svg")
    assert CliRunner().invoke(main, ["top", "--once"]).exit_code == 69


def test_it_outlives_the_daemon(address):
    with Client(lease=Lease(connect_seconds=0.2)) as client:
        watch = Watch(client)
        assert "trying again" in watch.look().trouble
        for _ in range(2):
            with FakeDaemon(address, answering):
                assert watch.look().status is not None
        assert watch.look().status is None
        with FakeDaemon(address, answering):
            assert [*watch.look().edges["tiny"]] == [12 * MB] * 3


def test_it_draws_until_it_is_enough():
    views = iter([View(STATUS), View(None, "gone"), View(STATUS)])
    pauses = iter([False, False, True])
    screen = Console(file=io.StringIO(), force_terminal=True, width=100, height=30)
    show(lambda: next(views), screen, lambda: next(pauses))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "no daemon" in text
    assert next(views, None) is None


@pytest.mark.parametrize(
    "leave",
    [lambda _process, terminal: os.write(terminal, b"xq"), lambda process, _: process.send_signal(signal.SIGINT)],
)
def test_q_and_ctrl_c_leave_the_terminal_as_it_was(address, leave: Callable[..., None]):
    ours, theirs = pty.openpty()
    with FakeDaemon(address, answering):
        command = [sys.executable, "-P", "-m", "ebbflow.client.cli.main", "top"]
        process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"}
        )
        os.close(theirs)
        heard = b""
        while b"processes" not in heard:
            heard += os.read(ours, 10_000)
        leave(process, ours)
        try:
            while True:
                heard += os.read(ours, 10_000)
        except OSError:  # the other end is closed: it has ended
            pass
        assert process.wait(20) == 0
    os.close(ours)
    assert b"\x1b[?1049h" in heard
    assert b"\x1b[?1049l" in heard[heard.index(b"\x1b[?1049h") :]
    assert b"Traceback" not in heard
