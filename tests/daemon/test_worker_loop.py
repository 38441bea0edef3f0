"""The worker's loop on a scripted line: every request ends once, edges move under it, bad files harm nobody else."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.daemon.settings import DEFAULTS, KV_TYPES, WorkerSettings
from ebbflow.daemon.worker import loop as loop_module
from ebbflow.daemon.worker.loop import IDLE_SECONDS, REPORT_SECONDS, SAVING_SECONDS, Loop
from ebbflow.daemon.worker.resident import Resident
from ebbflow.daemon.worker.shared import SharedBlocks
from ebbflow.formats.child_messages import (
    Exit,
    LimitKv,
    LoadFailed,
    LoadModel,
    Report,
    SetTarget,
    ToWorker,
    Trim,
    UnloadModel,
)
from ebbflow.formats.manifest import MANIFEST, STACK, read_manifest, write_manifest
from ebbflow.formats.messages import Cancel, Failed, Finished, Generate, Pin, Pinned, Resized
from ebbflow.formats.stack import read_stack
from ebbflow.formats.units import format_size
from ebbflow.formats.values import Residency, Sampling

from support.engines import Answers, engine_of, finish
from support.fake_line import FakeClock, FakeLine
from support.residents import load
from support.stacks import copy_model, write_signs_model, write_sparse_model, write_variant

ALL = 10**9
BASE, BLOCKS = 21, 49
SLOW = 0.06
PROMPT = "Once upon a time " * 4
SAMPLING = Sampling(max_tokens=12, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_signs_model(tmp_path_factory.mktemp("loop") / "model")


@pytest.fixture(scope="module")
def edges(folder: Path) -> tuple[int, ...]:
    return read_stack(folder / STACK).edges


@pytest.fixture(scope="module")
def fresh(folder: Path) -> dict[int, str]:
    """What `PROMPT` gives at each depth of a fresh load."""
    texts = {}
    for depth in range(BASE, BLOCKS + 1):
        resident, answers = load(folder, depth), Answers()
        engine = engine_of(folder, resident)
        answers.hear(engine.submit(ask(1)))
        finish(engine, answers)
        texts[depth] = answers.by_id[1].text
        resident.close()
    assert len(set(texts.values())) > len(texts) // 2
    return texts


def ask(key: int, prompt: str = PROMPT, model: str = "m", **sampling: Any) -> Generate:
    return Generate(id=key, model=model, prompt=prompt, sampling=msgspec.structs.replace(SAMPLING, **sampling))


class Worker:
    """A loop, what it heard and what it said."""

    def __init__(self, tick: float = 0.0005, settings: WorkerSettings = DEFAULTS) -> None:
        self.line, self.clock = FakeLine(), FakeClock(tick)
        self.loop = Loop(self.line, 2, self.clock, settings)
        self.answers = Answers()

    def hear(self, *messages: ToWorker) -> list[Any]:
        """One turn, in which these messages arrive; what was said."""
        self.line.script.append(list(messages))
        self.loop.turn()
        said = self.line.take()
        self.answers.hear(said)
        return said

    def settle(self) -> list[Any]:
        """Turns until nothing is left to do; what was said."""
        said = []
        for _ in range(3000):
            said += self.hear()
            if self.line.timeouts[-1] > 0:
                return said
        raise AssertionError("still busy")

    def load(self, folder: Path, target: int = ALL, name: str = "m") -> list[Any]:
        said = self.hear(LoadModel(model=name, folder=str(folder), target_nbytes=target))
        return said + self.settle()

    def residency(self, name: str = "m") -> Residency:
        return self.loop.models[name].residency(name)


@contextmanager
def slow_disk() -> Iterator[None]:
    """One block for each read, and with a clock of `SLOW` ticks no more than two of them between steps."""
    grow = Resident.grow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Resident, "grow", lambda self, blocks: grow(self, blocks, 1))
        yield


@contextmanager
def worker_with(folder: Path, target: int = ALL, tick: float = 0.0005) -> Iterator[Worker]:
    worker = Worker(tick)
    worker.load(folder, target)
    yield worker
    worker.hear(Exit())
    for served in worker.loop.models.values():
        served.engine.scheduler.check_integrity()


def only(kind: type[Any], said: list[Any]) -> Any:
    (found,) = [message for message in said if isinstance(message, kind)]
    return found


def test_a_model_is_loaded_and_reported_at_its_edge(folder: Path, edges: tuple[int, ...]) -> None:
    worker = Worker()
    said = worker.load(folder, edges[30] + 5)
    assert all(isinstance(message, Report) for message in said)
    (residency,) = said[-1].models
    assert (residency.model, residency.blocks, residency.total_blocks) == ("m", 30, BLOCKS)
    assert (residency.nbytes, residency.total_nbytes) == (edges[30], edges[BLOCKS])
    assert (residency.base_nbytes, residency.target_nbytes) == (edges[BASE], edges[30] + 5)
    assert (residency.kv_nbytes, residency.running, residency.waiting) == (0, 0, 0)


def test_settings_decide_what_keys_and_values_take(folder: Path) -> None:
    held = {}
    for kv in KV_TYPES:
        worker = Worker(settings=WorkerSettings(kv))
        worker.load(folder)
        worker.hear(ask(1))
        held[kv] = worker.residency().kv_nbytes
        worker.settle()
        assert isinstance(worker.answers.by_id[1].end, Finished)
        worker.hear(Exit())
    assert 0 < held["i8"] == held["f16"] * (32 + 4) // (32 * 2)


def test_a_model_that_comes_later_is_limited_too(folder: Path) -> None:
    worker = Worker()
    worker.load(folder)
    usual = worker.residency().kv_limit_nbytes
    worker.hear(LimitKv(nbytes=usual // 3))
    worker.load(folder, name="other")
    limits = [worker.residency(name).kv_limit_nbytes for name in ("m", "other")]
    assert limits[0] == limits[1] <= usual // 3
    worker.hear(LimitKv(nbytes=0))
    assert worker.residency("other").kv_limit_nbytes == usual
    worker.hear(Exit())


def test_a_target_below_the_base_holds_the_base(folder: Path) -> None:
    with worker_with(folder, 0) as worker:
        assert worker.residency().blocks == BASE


def test_a_request_that_comes_with_the_model_is_answered_at_its_full_depth(folder: Path, fresh: dict[int, str]) -> None:
    worker = Worker(SLOW)
    with slow_disk():
        worker.hear(LoadModel(model="m", folder=str(folder), target_nbytes=ALL), ask(1))
        assert worker.residency().blocks < BLOCKS
        assert worker.residency().waiting == 1
        worker.settle()
    assert worker.answers.by_id[1].text == fresh[BLOCKS]


def break_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")


def break_shape(folder: Path) -> None:
    manifest = read_manifest(folder)
    wider = msgspec.structs.replace(manifest.architecture, intermediate=128)
    write_manifest(folder, msgspec.structs.replace(manifest, architecture=wider))


def break_layers(folder: Path) -> None:
    manifest = read_manifest(folder)
    deeper = msgspec.structs.replace(manifest.architecture, layers=3)
    write_manifest(folder, msgspec.structs.replace(manifest, architecture=deeper))


def break_length(folder: Path) -> None:
    os.truncate(folder / STACK, 5000)


def break_number(folder: Path) -> None:
    stack = read_stack(folder / STACK)
    with (folder / STACK).open("r+b") as file:
        file.seek(stack.data_start)
        file.write(np.float32(np.nan).tobytes())


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[]")


def remove_stack(folder: Path) -> None:
    (folder / STACK).unlink()


@pytest.mark.parametrize(
    ("harm", "code"),
    [
        (break_manifest, "corrupt_manifest"),
        (break_shape, "bad_block"),
        (break_layers, "bad_block"),
        (break_length, "truncated_stack"),
        (break_number, "bad_block"),
        (break_tokenizer, "corrupt_file"),
        (remove_stack, "corrupt_stack"),
    ],
)
def test_a_model_that_cannot_be_loaded(folder: Path, tmp_path: Path, harm: Any, code: str) -> None:
    broken = copy_model(folder, tmp_path / "broken")
    harm(broken)
    with worker_with(folder) as worker:
        files = len(list(Path("/proc/self/fd").iterdir()))
        said = worker.hear(LoadModel(model="bad", folder=str(broken), target_nbytes=ALL), ask(1, model="bad"), ask(2))
        failed = only(LoadFailed, said)
        assert (failed.model, failed.code) == ("bad", code)
        assert failed.message
        assert failed.message.endswith("add or import bad again") == (
            code in {"bad_block", "truncated_stack", "corrupt_stack"}
        )
        assert len(list(Path("/proc/self/fd").iterdir())) == files
        worker.settle()
        end = worker.answers.by_id[1].end
        assert isinstance(end, Failed)
        assert end.code == "unknown_model"
        assert isinstance(worker.answers.by_id[2].end, Finished)
        assert list(worker.loop.models) == ["m"]


def test_no_memory_for_a_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(loop_module, "Served", refuse)
    worker = Worker()
    failed = only(LoadFailed, worker.load(folder))
    assert failed.code == "out_of_memory"


def test_loading_twice_only_moves_the_edge(folder: Path) -> None:
    with worker_with(folder) as worker:
        served = worker.loop.models["m"]
        worker.load(folder, 0)
        assert worker.loop.models["m"] is served
        assert worker.residency().blocks == BASE


def test_a_request_for_no_model(folder: Path) -> None:
    failed = only(Failed, Worker().hear(ask(5)))
    assert (failed.id, failed.code) == (5, "unknown_model")


def test_a_shrink_is_done_and_answered_in_the_turn_it_is_heard(folder: Path, edges: tuple[int, ...]) -> None:
    with worker_with(folder) as worker:
        said = worker.hear(SetTarget(model="m", target_nbytes=edges[25], id=7))
        resized = only(Resized, said)
        assert (resized.id, resized.residency.blocks) == (7, 25)
        assert resized.residency.target_nbytes == edges[25]
        assert resized.seconds > 0
        before = said[: said.index(resized)]
        assert any(isinstance(message, Report) for message in before)  # whoever is answered finds the books closed


def test_growing_is_answered_when_it_is_done(folder: Path, edges: tuple[int, ...]) -> None:
    with worker_with(folder, 0, SLOW) as worker, slow_disk():
        said = worker.hear(SetTarget(model="m", target_nbytes=ALL, id=8))
        assert not any(isinstance(message, Resized) for message in said)
        said += worker.settle()
        resized = only(Resized, said)
        assert (resized.id, resized.residency.nbytes) == (8, edges[BLOCKS])


def test_a_target_that_is_there_already_is_answered_at_once(folder: Path) -> None:
    with worker_with(folder) as worker:
        assert only(Resized, worker.hear(SetTarget(model="m", target_nbytes=ALL, id=9))).id == 9


def test_without_an_id_nobody_is_answered(folder: Path) -> None:
    with worker_with(folder) as worker:
        said = worker.hear(SetTarget(model="m", target_nbytes=0)) + worker.settle()
        assert not any(isinstance(message, Resized) for message in said)
        assert worker.residency().blocks == BASE


def test_resizing_no_model() -> None:
    resized = only(Resized, Worker().hear(SetTarget(model="gone", target_nbytes=0, id=3)))
    assert (resized.id, resized.residency) == (3, None)


def test_every_resize_is_answered_though_a_later_one_overtakes_it(folder: Path) -> None:
    with worker_with(folder, 0, SLOW) as worker, slow_disk():
        said = worker.hear(
            SetTarget(model="m", target_nbytes=ALL, id=1),
            SetTarget(model="m", target_nbytes=0, id=2),
            SetTarget(model="m", target_nbytes=ALL, id=3),
        )
        said += worker.hear(SetTarget(model="m", target_nbytes=ALL), UnloadModel(model="m"))
        assert [message.id for message in said if isinstance(message, Resized)] == [1, 2, 3]


def test_a_damaged_block_fails_the_resize_and_nothing_else_and_is_told_of(
    folder: Path, tmp_path: Path, edges: tuple[int, ...], fresh: dict[int, str]
) -> None:
    """The model serves from what is whole; whoever looks sees why it does not grow, until it can."""
    broken = copy_model(folder, tmp_path / "broken")
    content = (broken / STACK).read_bytes()
    with worker_with(broken, 0) as worker:
        assert (worker.residency().damage, worker.residency().damaged_at_nbytes) == ("", None)
        os.truncate(broken / STACK, read_stack(folder / STACK).data_start + edges[30])
        said = worker.hear(SetTarget(model="m", target_nbytes=ALL, id=50), ask(2)) + worker.settle()
        end = worker.answers.by_id.pop(50).end
        assert isinstance(end, Failed)
        assert end.code == "truncated_stack"
        assert end.message.endswith(f"is whole up to {format_size(edges[30])}: add or import it again")
        assert worker.answers.by_id[2].text == fresh[30]
        for target in (edges[25], edges[30], ALL):
            said = worker.hear(SetTarget(model="m", target_nbytes=target)) + worker.settle()
            told = [message for message in said if isinstance(message, Report)][-1].models[0]
            assert (told.nbytes, told.target_nbytes) == (min(target, edges[30]), target)
            assert (told.damage, told.damaged_at_nbytes) == (end.message, edges[30])
        (broken / STACK).write_bytes(content)
        said = worker.hear(SetTarget(model="m", target_nbytes=ALL, id=51)) + worker.settle()
        assert only(Resized, said).residency.nbytes == edges[BLOCKS]
        assert (worker.residency().blocks, worker.residency().damage) == (BLOCKS, "")
        assert worker.residency().damaged_at_nbytes is None


def test_a_flipped_bit_in_a_mask_is_told_of(tmp_path: Path) -> None:
    broken = write_sparse_model(tmp_path / "broken")
    stack = read_stack(broken / STACK)
    at = next(i for i in range(stack.base, len(stack.blocks)) if stack.blocks[i].kind == "mask")
    with stack.places[at].path.open("r+b") as file:
        file.seek(stack.places[at].offset)
        byte = file.read(1)[0]
        file.seek(stack.places[at].offset)
        file.write(bytes([byte ^ 1]))
    with worker_with(broken) as worker:
        assert worker.residency().nbytes == worker.residency().damaged_at_nbytes == stack.edges[at]
        assert stack.blocks[at].tensor in worker.residency().damage


def test_no_memory_to_grow_leaves_the_edge_where_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise MemoryError

    with worker_with(folder, 0) as worker:
        with monkeypatch.context() as patch:
            patch.setattr(Resident, "grow", refuse)
            worker.hear(SetTarget(model="m", target_nbytes=ALL, id=50), ask(2))
            worker.settle()
        end = worker.answers.by_id.pop(50).end
        assert isinstance(end, Failed)
        assert end.code == "out_of_memory"
        assert isinstance(worker.answers.by_id[2].end, Finished)
        assert (worker.residency().blocks, worker.residency().damage) == (BASE, "")
        worker.hear(SetTarget(model="m", target_nbytes=ALL))
        worker.settle()
        assert worker.residency().blocks == BLOCKS


moves = st.one_of(
    st.tuples(st.just("resize"), st.integers(0, 55)),
    st.tuples(st.just("ask"), st.integers(1, 30)),
    st.tuples(st.just("cancel"), st.integers(0, 10)),
    st.tuples(st.just("turns"), st.integers(1, 5)),
)


def resize_under_requests(worker: Worker, edges: tuple[int, ...], script: list[tuple[str, int]], other: bool) -> None:
    """Play a script of moves with the model `m`; an `other` moves the opposite way. No request fails."""
    asked: dict[int, int] = {}
    cancelled = set()
    blocks = len(edges) - 1
    for step, (what, value) in enumerate(script):
        match what:
            case "resize":
                orders = [SetTarget(model="m", target_nbytes=edges[min(value, blocks)], id=1000 + step)]
                if other:
                    orders.append(SetTarget(model="o", target_nbytes=edges[max(0, blocks - value)]))
                worker.hear(*orders)
            case "ask":
                asked[step] = value
                worker.hear(ask(step, max_tokens=value, model="o" if other and step % 2 else "m"))
            case "cancel":
                cancelled.add(value)
                worker.hear(Cancel(id=value))
            case _:
                for _ in range(value):
                    worker.hear()
    worker.settle()
    for key, tokens in asked.items():
        end = worker.answers.by_id[key].end
        if isinstance(end, Finished):
            assert (end.reason, end.tokens) == ("length", tokens)
        else:
            assert isinstance(end, Failed)
            assert end.code == "cancelled"
            assert key in cancelled


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(moves, max_size=25), st.integers(BASE, BLOCKS), st.sampled_from([0.0005, 0.03]), st.booleans())
def test_resizing_under_requests_fails_none_and_leaves_no_trace(
    folder: Path,
    edges: tuple[int, ...],
    fresh: dict[int, str],
    script: list[tuple[str, int]],
    depth: int,
    tick: float,
    slow: bool,
) -> None:
    with worker_with(folder, tick=tick) as worker, slow_disk() if slow else nullcontext():
        resize_under_requests(worker, edges, script, other=False)
        last = msgspec.structs.replace(ask(900), exact_prefix=True)
        worker.hear(SetTarget(model="m", target_nbytes=edges[depth]), last)
        worker.settle()
        assert worker.answers.by_id[900].text == fresh[depth]
        worker.hear(Trim(nbytes=1 << 40))
        assert worker.residency().kv_nbytes == 0


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two sparse models with the same masks."""
    one = write_sparse_model(tmp_path_factory.mktemp("variants") / "one", shares=(30, 25))
    return one, write_variant(one, one.with_name("two"))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.lists(moves, max_size=15), st.sampled_from([35, 36, 37, 50, 63]), st.booleans())
def test_resizing_sparse_variants_that_share_fails_nothing_and_leaves_no_trace(
    variants: tuple[Path, Path], script: list[tuple[str, int]], depth: int, slow: bool
) -> None:
    edges = read_stack(variants[0] / STACK).edges
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "SharedBlocks", lambda: SharedBlocks(64))
        with worker_with(variants[0], tick=0.03 if slow else 0.0005) as worker, slow_disk() if slow else nullcontext():
            worker.load(variants[1], name="o")
            assert worker.residency("o").shared_nbytes > edges[-1] / 4
            resize_under_requests(worker, edges, script, other=True)
            last = [msgspec.structs.replace(ask(900 + i, model=name), exact_prefix=True) for i, name in enumerate("mo")]
            worker.hear(*(SetTarget(model=name, target_nbytes=edges[depth]) for name in "mo"), *last)
            worker.settle()
            both = [worker.residency(name) for name in "mo"]
            assert sum(r.shared_nbytes for r in both) > edges[depth] / 4
    for key, folder in enumerate(variants):
        resident, answers = load(folder, depth), Answers()
        engine = engine_of(folder, resident)
        answers.hear(engine.submit(ask(1)))
        finish(engine, answers)
        assert worker.answers.by_id[900 + key].text == answers.by_id[1].text
        resident.close()


def test_a_cancelled_request_is_answered_so_and_another_cancel_is_ignored(folder: Path) -> None:
    with worker_with(folder) as worker:
        worker.hear(ask(1, max_tokens=100))
        failed = only(Failed, worker.hear(Cancel(id=1)))
        assert (failed.id, failed.code) == (1, "cancelled")
        assert not any(isinstance(m, Failed) for m in worker.hear(Cancel(id=1), Cancel(id=77)))


def test_unloading_cancels_what_runs_and_forgets_the_model(folder: Path) -> None:
    with worker_with(folder) as worker:
        worker.hear(ask(1, max_tokens=100), ask(2, max_tokens=100))
        said = worker.hear(UnloadModel(model="m"))
        assert {message.id: message.code for message in said if isinstance(message, Failed)} == {
            1: "cancelled",
            2: "cancelled",
        }
        assert said[-1] == Report(models=())
        assert not worker.loop.models
        assert worker.hear(UnloadModel(model="m")) == []


def test_exit_ends_everything(folder: Path) -> None:
    worker = Worker()
    worker.load(folder)
    worker.hear(ask(1, max_tokens=100))
    worker.line.script.append([Exit()])
    assert not worker.loop.turn()
    assert only(Failed, worker.line.take()).code == "cancelled"
    assert not worker.loop.models


def test_a_step_without_memory_ends_its_requests_with_a_retryable_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise MemoryError

    with worker_with(folder) as worker:
        worker.hear(ask(1))
        with monkeypatch.context() as patch:
            patch.setattr(worker.loop.models["m"].engine, "_forward", refuse)
            worker.hear(ask(2))
            worker.settle()
        for key in (1, 2):
            end = worker.answers.by_id[key].end
            assert isinstance(end, Failed)
            assert end.code == "out_of_memory"
        assert worker.residency().kv_nbytes == 0
        worker.hear(ask(3))
        worker.settle()
        assert isinstance(worker.answers.by_id[3].end, Finished)


def test_running_requests_go_on_while_the_edge_moves_up(folder: Path) -> None:
    with worker_with(folder, 0, 0.02) as worker, slow_disk():
        worker.hear(ask(1, max_tokens=50))
        worker.hear(SetTarget(model="m", target_nbytes=ALL))
        for _ in range(6):
            worker.hear()
        assert BASE < worker.residency().blocks < BLOCKS
        assert worker.answers.by_id[1].tokens > 3


def test_two_models_answer_side_by_side(folder: Path, tmp_path: Path, fresh: dict[int, str]) -> None:
    other = write_signs_model(tmp_path / "other", seed=5)
    with worker_with(folder) as worker:
        worker.load(other, name="o")
        worker.hear(ask(1), ask(2, model="o"), ask(3))
        worker.settle()
        texts = [worker.answers.by_id[key].text for key in (1, 2, 3)]
        assert texts[0] == texts[2] == fresh[BLOCKS]
        assert texts[1] != texts[0]


def test_waits_only_when_there_is_nothing_to_do(folder: Path) -> None:
    with worker_with(folder) as worker:
        assert worker.line.timeouts[-1] == IDLE_SECONDS
        worker.hear(ask(1))
        worker.hear()
        assert worker.line.timeouts[-1] == 0


def test_a_busy_worker_reports_now_and_then_and_once_when_done(folder: Path) -> None:
    with worker_with(folder, tick=0.01) as worker:
        before = worker.clock.now
        said = worker.hear(ask(1, max_tokens=100)) + worker.settle()
        seconds = worker.clock.now - before
        reports = [message for message in said if isinstance(message, Report)]
        assert 1 < len(reports) <= seconds / REPORT_SECONDS + 2
        assert reports[0].models[0].running == 1
        assert reports[-1].models[0].running == 0


@pytest.mark.parametrize("unloaded", [False, True])
def test_while_a_pin_is_written_others_are_answered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unloaded: bool
) -> None:
    disk, sync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (disk.wait(60), sync(descriptor)))
    worker = Worker()
    worker.load(copy_model(folder, tmp_path / "model"))
    worker.hear(Pin(id=1, model="m", name="system", ids=tuple(range(64)), save=True), ask(2))
    said = worker.settle()
    assert worker.line.timeouts[-1] == SAVING_SECONDS  # it looks again soon, and does not spin
    assert not any(isinstance(message, Pinned) for message in said)
    assert isinstance(worker.answers.by_id[2].end, Finished)
    if unloaded:
        said = worker.hear(UnloadModel(model="m"))  # which does not wait for the disk either
        disk.set()
        assert only(Failed, said).id == 1
        return
    disk.set()
    while not any(isinstance(message, Pinned) for message in said):
        said = worker.hear()
    worker.hear(Exit())
