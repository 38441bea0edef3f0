"""Stacks of planes that are broken, or whose numbers overflow: a typed error for whoever asked, nothing for others."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ebbflow.daemon.worker.served import Served
from ebbflow.formats.errors import BadBlock, CorruptFile
from ebbflow.formats.index import StackIndex
from ebbflow.formats.kinds import planes_nbytes
from ebbflow.formats.manifest import STACK
from ebbflow.formats.messages import Failed, Finished, Generate
from ebbflow.formats.stack import encode_header, read_stack
from ebbflow.formats.values import Sampling

from support.engines import Answers, engine_of, finish
from support.fake_line import FakeClock
from support.residents import load
from support.stacks import copy_model, write_planes_model

GREATEST = b"\x7f\x7f"  # as bf16: 3.4e38


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planes_model(tmp_path_factory.mktemp("hostile") / "model")


def spoil(folder: Path, tensor: str, level: int, value: bytes, scales: bool = False) -> int:
    """Overwrite the end of a block, or with `scales` all of its scales; returns the block's position."""
    stack = read_stack(folder / STACK)
    position = next(i for i, e in enumerate(stack.blocks) if (e.tensor, e.level) == (tensor, level))
    entry = stack.blocks[position]
    m, n = entry.shape
    with (folder / STACK).open("r+b") as file:
        start = stack.data_start + stack.edges[position]
        file.seek(start + (planes_nbytes(m, n, level) if scales else entry.nbytes - len(value)))
        file.write(value * m if scales else value)
    return position


def ask(key: int, **sampling: float | int) -> Generate:
    return Generate(id=key, model="m", prompt="Once", sampling=Sampling(**({"max_tokens": 4} | sampling)))  # type: ignore[arg-type]


@pytest.mark.parametrize("tensor", ["embed", "layers.1.down", "head"])
def test_a_level_of_minus_128_in_the_base_is_a_model_that_cannot_be_loaded(
    folder: Path, tmp_path: Path, tensor: str
) -> None:
    broken = copy_model(folder, tmp_path / "broken")
    spoil(broken, tensor, 0, b"\x80")
    with pytest.raises(BadBlock, match="-128"):
        Served(broken, 0, 2, FakeClock())


def test_a_level_of_minus_128_beyond_the_base_stops_the_edge(folder: Path, tmp_path: Path) -> None:
    broken = copy_model(folder, tmp_path / "broken")
    position = spoil(broken, "layers.1.q", 2, b"\x80")
    served = Served(broken, 10**9, 2, FakeClock(0.0))
    with pytest.raises(BadBlock, match="-128"):
        served.move(1e9)
    assert served.resident.stack.base <= served.resident.blocks <= position
    served.resident.check_integrity()
    answers = Answers()
    answers.hear(served.engine.submit(ask(1)))
    finish(served.engine, answers)
    assert isinstance(answers.by_id[1].end, Finished)
    served.close()


def test_a_ninth_plane_is_a_bad_block(folder: Path, tmp_path: Path) -> None:
    """The tables of resident blocks hold no more than the depths that there are."""
    broken = copy_model(folder, tmp_path / "broken")
    stack = read_stack(folder / STACK)
    deep = msgspec.structs.replace(stack.blocks[-1], level=7)
    (broken / STACK).write_bytes(encode_header(StackIndex(stack.base, (*stack.blocks, deep))))
    with (broken / STACK).open("ab") as file:
        file.write(bytes(stack.nbytes + 2 * stack.blocks[-1].nbytes))
    with pytest.raises(CorruptFile):
        Served(broken, 0, 2, FakeClock())


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1.0, "top_p": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("tensor", ["layers.0.o", "layers.1.down", "head"])
def test_numbers_that_overflow_end_the_request_in_words(
    folder: Path, tmp_path: Path, tensor: str, sampling: dict[str, float | int]
) -> None:
    """Every stored number is finite, but not what is computed from them: no token can be chosen."""
    broken = copy_model(folder, tmp_path / "broken")
    for level in range(4):
        spoil(broken, tensor, level, GREATEST, scales=True)
    resident = load(broken, len(read_stack(broken / STACK).blocks))
    answers, engine = Answers(), engine_of(broken, resident)
    answers.hear(engine.submit(ask(1, **sampling)))
    finish(engine, answers)
    end = answers.by_id[1].end
    assert isinstance(end, Failed)
    assert end.code == "corrupt_file"
    assert engine.kv_nbytes == engine.kv_cached_nbytes
    resident.close()
