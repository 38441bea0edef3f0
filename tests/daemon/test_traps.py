"""Every way to free memory that frees nothing (design, section 6): ours returns it, as the kernel says; theirs do not.

Each measurement runs in a process and, where allowed, a memory cgroup of its own (`support.cgroups`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from ebbflow.daemon.library.synthetic_stack import write_random_stack
from ebbflow.daemon.mapping import Mapping

from support.cgroups import measure
from support.stacks import TINY, dense_entry, write_model, write_planes_model, write_signs_model, write_sparse_model

MIB = 1 << 20
NBYTES = 64 * MIB
SLACK = 6 * MIB  # counters are kept per processor and settled in batches

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the figures are Linux's")


class Found(dict[str, int]):
    """What was measured."""

    def near(self, name: str, wanted: int) -> bool:
        return abs(self[name] - wanted) <= SLACK


def measured_by_cgroup(what: str) -> Found:
    """For what only the cgroup's figure tells the truth about."""
    found = Found(measure(what))
    if not found["counted"]:
        pytest.skip("no memory cgroup can be made here")
    return found


def test_a_mapping_costs_nothing_until_filled_and_goes_back_in_halves() -> None:
    found = Found(measure("mapping"))
    assert found.near("reserved", 0)
    assert found.near("filled", NBYTES)
    assert found.near("half", NBYTES // 2)
    assert found.near("none", 0)


def test_trap_pythons_own_anonymous_mapping_is_shared_and_keeps_everything() -> None:
    """Why `Mapping` passes flags. If this fails one day, Python or Linux has changed for the better."""
    found = measured_by_cgroup("shared_mapping")
    assert found.near("filled", NBYTES)
    assert found.near("rss", 0)  # so it seems gone
    assert found.near("dropped", NBYTES)  # and is not
    assert found["byte"] == 1


def test_trap_half_a_huge_page_seems_freed_and_is_not() -> None:
    """Why `Mapping` forbids huge pages."""
    found = measured_by_cgroup("huge_pages")
    if not found.near("huge", NBYTES):
        pytest.skip("the kernel gave no huge pages")
    assert found.near("freed_rss", NBYTES // 2)
    assert found.near("freed", 0)


def test_a_mapping_has_no_huge_pages() -> None:
    memory = Mapping(8 * MIB)
    memory.bytes[:] = 1
    area = smaps_of(memory.address())
    assert "nh" in area["VmFlags"].split()
    assert area["AnonHugePages"].split() == ["0", "kB"]
    assert area["Private_Dirty"].split() == [str(8 * 1024), "kB"]


def smaps_of(address: int) -> dict[str, str]:
    """The kernel's description of the area that begins at or before `address`."""
    area: dict[str, str] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            start, stop = (int(edge, 16) for edge in first.split("-"))
            area = {"found": ""} if start <= address < stop else {}
        elif "found" in area:
            area[first.rstrip(":")] = rest
            if first == "VmFlags:":
                return area
    raise LookupError(hex(address))


def test_freed_kv_blocks_are_returned() -> None:
    found = Found(measure("kv_blocks"))
    assert found.near("reserved", 0)
    assert found.near("filled", NBYTES)
    assert found.near("half", NBYTES // 2)
    assert found.near("none", 0)
    assert found["held"] == 0


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 blocks of a mebibyte, no two the same; only good for being read."""
    weight = np.random.default_rng(0).random((512, 512), np.float32)
    blocks = [dense_entry(TINY, f"tensor{i}", weight + i, "f32") for i in range(64)]
    return write_model(tmp_path_factory.mktemp("large") / "model", TINY, blocks, 1)


@pytest.fixture(scope="module")
def loaded(large_model: Path) -> Found:
    return Found(measure("resident", str(large_model)))


def test_a_stack_in_memory_is_anonymous_and_not_twice_there(loaded: Found) -> None:
    """File-backed pages are invisible to MemAvailable: a controller watching it over mapped weights is blind."""
    assert loaded.near("anonymous", loaded["nbytes"])
    if not loaded["droppable"]:
        pytest.skip("this file system keeps its files in memory")
    assert loaded.near("warm", loaded["nbytes"])
    assert loaded["cold"] < MIB


def test_a_dropped_tail_is_returned_and_then_the_rest(loaded: Found) -> None:
    assert loaded.near("freed", loaded["nbytes"] - loaded["left"])
    assert loaded.near("closed", loaded["left"])


def test_a_hundred_models_later_the_worker_is_as_small_as_before(tmp_path: Path) -> None:
    folders = [write_signs_model(tmp_path / "model"), write_sparse_model(tmp_path / "sparse")]
    found = Found(measure("loop_rounds", *map(str, folders)))
    assert found["ended"]
    assert found["private"] < 1.5 * MIB
    assert found["used"] < SLACK
    assert found["address_space"] < 100 * MIB  # one model reserves more for keys and values


def test_trap_malloc_keeps_what_was_freed_until_the_model_is_unloaded(tmp_path: Path) -> None:
    found = Found(measure("unload_trims", str(write_signs_model(tmp_path / "model"))))
    assert found.near("filled", NBYTES)
    assert found["freed"] > NBYTES // 2  # why unloading trims
    assert found.near("trimmed", 0)


def test_serving_does_not_wake_the_compiler(tmp_path: Path) -> None:
    """It would make somebody wait, and its 70 MB of code come back."""
    writers = (write_planes_model, write_signs_model, write_sparse_model)
    found = measure("compiler_idle", *(str(write(tmp_path / write.__name__)) for write in writers))
    assert found["answered"] == len(writers)
    assert found["compiled"] == 0
    assert found["before"] > 20 * MIB
    assert found["after"] < found["before"] / 4


SHAPE = msgspec.structs.replace(
    TINY, vocab=4000, hidden=1024, layers=5, heads=8, kv_heads=4, head_dim=128, intermediate=4096, context=512
)


def test_the_kernel_moves_by_what_the_ledger_says(tmp_path: Path) -> None:
    """Blocks, keys and values, work space: all that a model holds, and no more, each time something comes or goes."""
    write_random_stack(SHAPE, tmp_path, "m", levels=3)
    found = Found(measure("ledger", str(tmp_path / "m")))
    moves = [name.removesuffix(" ours") for name in found if name.endswith(" ours")]
    assert moves == ["grown", "shrunk", "running", "finished", "trimmed", "unloaded"]
    for move in moves:
        ours = found[f"{move} ours"]
        assert abs(found[f"{move} kernel"] - ours) <= max(0.05 * abs(ours), 4 * MIB), (move, found)
    assert found["grown ours"] > 15 * MIB
    assert found["grown ours"] - found["shrunk ours"] > 5 * MIB
    # A busy machine reads the prompt in smaller chunks, with less work space: keys and values are there at any speed.
    a_token = 2 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim * np.dtype(np.float16).itemsize
    assert found["running ours"] - found["shrunk ours"] > 450 * a_token
    assert found["trimmed ours"] <= found["shrunk ours"] + 4096  # tables of blocks are made by the next step
