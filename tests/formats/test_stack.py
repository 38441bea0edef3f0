from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from ebbflow.formats import container
from ebbflow.formats import stack as stack_module
from ebbflow.formats.container import ALIGNMENT, BLOCK_ALIGNMENT, content_hash, padded
from ebbflow.formats.errors import (
    BadBlock,
    BadHeader,
    BadOffsets,
    CorruptStack,
    TruncatedStack,
    UnknownKind,
    UnsupportedVersion,
)
from ebbflow.formats.index import BlockEntry, StackIndex, filled_before, prefix_edges
from ebbflow.formats.kinds import payload_nbytes
from ebbflow.formats.stack import Place, Stack, encode_header, read_blocks, read_stack, write_stack

from support import golden

PAYLOADS = (golden.DENSE, golden.SIGNS)


def write_golden(path: Path) -> None:
    write_stack(path, golden.INDEX, lambda i: PAYLOADS[i])


def header() -> dict:
    """The golden header, its index decoded, ready to be spoilt."""
    document = json.loads(golden.HEADER)
    document["__metadata__"]["index"] = json.loads(document["__metadata__"]["index"])
    return document


def assemble(path: Path, document: dict, data: bytes = golden.FILE[4096:]) -> Path:
    document["__metadata__"]["index"] = json.dumps(document["__metadata__"]["index"])
    return write_file(path, json.dumps(document).encode(), data)


def write_file(path: Path, text: bytes, data: bytes = golden.FILE[4096:]) -> Path:
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entries(document: dict) -> list[dict]:
    return document["__metadata__"]["index"]["blocks"]


# -- golden bytes -------------------------------------------------------------------------------------------------


def test_writes_the_golden_bytes(tmp_path):
    write_golden(tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == golden.FILE
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_reads_the_golden_bytes(tmp_path):
    (tmp_path / "s").write_bytes(golden.FILE)
    stack, edges = read_stack(tmp_path / "s"), (0, 64, 128)
    places = (Place(tmp_path / "s", 4096), Place(tmp_path / "s", 4160))
    assert stack == Stack(tmp_path / "s", 4096, 1, golden.ENTRIES, edges, edges, places)
    assert (stack.nbytes, stack.base_nbytes) == (128, 64)
    assert list(read_blocks(stack)) == list(zip(golden.ENTRIES, PAYLOADS, strict=True))


def test_opens_in_the_safetensors_library(tmp_path):
    (tmp_path / "s").write_bytes(golden.FILE)
    with safe_open(tmp_path / "s", framework="np") as file:
        assert list(file.keys()) == ["000000", "000001"]
        assert file.metadata()["format"] == "ebbflow-stack"
        assert file.get_tensor("000001").tobytes() == golden.SIGNS.ljust(64, b"\0")


def test_unknown_fields_of_an_entry_are_ignored(tmp_path):
    document = header()
    entries(document)[0]["patched"] = [1, 2]
    assert read_stack(assemble(tmp_path / "s", document)).blocks == golden.ENTRIES


def test_blocks_within_never_goes_below_the_base(tmp_path):
    (tmp_path / "s").write_bytes(golden.FILE)
    stack = read_stack(tmp_path / "s")
    assert [stack.blocks_within(n) for n in (0, 64, 127, 128, 10**9)] == [1, 1, 1, 2, 2]


# -- hostile files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 7, 8, 4095])
def test_truncated_header(tmp_path, size):
    (tmp_path / "s").write_bytes(golden.FILE[:size])
    with pytest.raises(TruncatedStack):
        read_stack(tmp_path / "s")


@pytest.mark.parametrize("size", [4096, 4097, len(golden.FILE) - 1])
def test_truncated_data(tmp_path, size):
    (tmp_path / "s").write_bytes(golden.FILE[:size])
    with pytest.raises(TruncatedStack):
        read_stack(tmp_path / "s")


@pytest.mark.parametrize(
    ("length", "error"),
    [
        (0, BadHeader),
        (1, BadHeader),
        (4087, BadHeader),  # data would not be aligned
        (2**64 - 1, BadHeader),
        (16_000_000 // 4096 * 4096 + 4096 - 8, BadHeader),  # above 16 MB
        (4096 * 100 - 8, TruncatedStack),
    ],
)
def test_lying_header_length(tmp_path, length, error):
    (tmp_path / "s").write_bytes(length.to_bytes(8, "little") + golden.FILE[8:])
    with pytest.raises(error):
        read_stack(tmp_path / "s")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe{}",
        b'{"000000": 3}',
        b'{"__metadata__": {"format": "pt"}}',
        b'{"__metadata__": {"format": 3}}',
        b"{}",
        b'{"a":' + b"[" * 4000,
        b'{"__metadata__": {"format": "ebbflow-stack", "version": "2"}}',
        b'{"__metadata__": {"format": "ebbflow-stack", "version": "2", "index": "' + b"[" * 3000 + b'"}}',
    ],
)
def test_header_that_is_not_ours(tmp_path, text):
    (tmp_path / "s").write_bytes((4088).to_bytes(8, "little") + text.ljust(4088))
    with pytest.raises(BadHeader):
        read_stack(tmp_path / "s")


def test_deeply_nested_index(tmp_path):
    document = json.loads(golden.HEADER)
    nested = ',"new":' + "[" * 100_000 + "]" * 100_000 + "}"
    document["__metadata__"]["index"] = document["__metadata__"]["index"][:-1] + nested
    path = write_file(tmp_path / "s", json.dumps(document).encode())
    with pytest.raises(BadHeader, match="index"):
        read_stack(path)


def test_deeply_nested_header(tmp_path):
    path = write_file(tmp_path / "s", b'{"a":' + b"[" * 400_000)
    with pytest.raises(BadHeader):
        read_stack(path)


@pytest.mark.parametrize("version", ["1", "4"])
def test_other_version(tmp_path, version):
    document = header()
    document["__metadata__"]["version"] = version
    with pytest.raises(UnsupportedVersion, match=f"version '{version}'"):
        read_stack(assemble(tmp_path / "s", document))


@pytest.mark.parametrize("base", [-1, 0, 3])
def test_impossible_base(tmp_path, base):
    document = header()
    document["__metadata__"]["index"]["base"] = base
    with pytest.raises(BadHeader):
        read_stack(assemble(tmp_path / "s", document))


def test_index_and_tensors_disagree_in_number(tmp_path):
    document = header()
    entries(document).pop()
    with pytest.raises(BadHeader):
        read_stack(assemble(tmp_path / "s", document))


def test_misnamed_tensor(tmp_path):
    document = header()
    document["1"] = document.pop("000001")
    with pytest.raises(BadHeader, match="000001"):
        read_stack(assemble(tmp_path / "s", document))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([64, 128], [0, 64]),  # shuffled: other readers open it
        ([0, 64], [63, 127]),  # overlapping
        ([0, 64], [65, 129]),  # a hole
        ([64, 128], [128, 192]),  # does not begin at 0
        ([0, 64], [64, 64]),  # empty
        ([0, 64], [64, 0]),  # backwards
        ([-64, 0], [0, 64]),
    ],
)
def test_bad_offsets(tmp_path, first, second):
    document = header()
    document["000000"]["data_offsets"], document["000001"]["data_offsets"] = first, second
    with pytest.raises(BadOffsets):
        read_stack(assemble(tmp_path / "s", document))


def test_offsets_out_of_range(tmp_path):
    document = header()
    document["000001"] = {"dtype": "U8", "shape": [2**40], "data_offsets": [64, 64 + 2**40]}
    with pytest.raises(TruncatedStack):
        read_stack(assemble(tmp_path / "s", document))


def test_bytes_after_the_last_block(tmp_path):
    (tmp_path / "s").write_bytes(golden.FILE + b"\0" * 64)
    with pytest.raises(BadOffsets):
        read_stack(tmp_path / "s")


@pytest.mark.parametrize("change", [{"dtype": "F32"}, {"shape": [63]}, {"shape": [8, 8]}, {"shape": []}])
def test_tensor_that_is_not_its_bytes(tmp_path, change):
    document = header()
    document["000000"] |= change
    with pytest.raises(BadBlock):
        read_stack(assemble(tmp_path / "s", document))


@pytest.mark.parametrize(
    ("block", "change"),
    [
        (0, {"shape": []}),
        (0, {"shape": [0]}),
        (0, {"shape": [-2]}),
        (0, {"shape": [3]}),
        (0, {"dtype": "f64"}),
        (0, {"dtype": ""}),
        (0, {"nbytes": 7}),
        (0, {"nbytes": -8}),
        (0, {"nbytes": 10**30}),
        (0, {"level": 1}),
        (0, {"level": -1}),
        (0, {"uses": []}),
        (1, {"shape": [2]}),
        (1, {"shape": [2, 3, 1]}),
        (1, {"shape": [2, 300]}),
        (1, {"rank": 0}),
        (1, {"rank": 3}),
        (1, {"rank": 2}),
        (1, {"tensor": "final_norm"}),  # a second level 0
        (1, {"tensor": "final_norm", "level": 1}),  # of another shape than the first
    ],
)
def test_entry_that_makes_no_sense(tmp_path, block, change):
    document = header()
    entries(document)[block] |= change
    with pytest.raises(BadBlock):
        read_stack(assemble(tmp_path / "s", document))


@pytest.mark.parametrize("changed", [0, 1])
def test_planes_are_not_added_to_other_blocks(tmp_path, changed):
    """Two levels of one matrix, one of them signs and one a plane, each as long as its entry says."""
    plane = {"kind": "plane", "dtype": "i8-shared"}
    both = [{"kind": "signs", "rank": 1, "nbytes": 26}, {"kind": "signs", "rank": 1, "nbytes": 26}]
    both[changed] = plane | {"nbytes": 40 if changed == 0 else 28}
    document = header()
    common = {"tensor": "t", "shape": [2, 3], "gain": 0.0, "hash": "", "uses": ["t"]}
    document["__metadata__"]["index"] = {
        "base": 1, "blocks": [common | own | {"level": level} for level, own in enumerate(both)]
    }  # fmt: skip
    with pytest.raises(BadBlock, match="planes are not added"):
        read_stack(assemble(tmp_path / "s", document))


def tiers(changes: dict[int, dict] | None = None, gone: tuple[int, ...] = ()) -> tuple[BlockEntry, ...]:
    """Two tiers of a 2 x 5 matrix, some entries changed, each as long as it says."""
    found, filled = [], 0
    for place in range(4):
        own = {"kind": ("mask", "values")[place % 2], "level": place // 2, "rank": 2 - place // 2}
        own |= {"dtype": "i8"} if place % 2 else {}
        own |= {"tensor": "t", "shape": (2, 5), "filled": 2 * (place // 2)} | (changes or {}).get(place, {})
        filled = own.pop("filled")
        sizes = {name: own[name] for name in ("dtype", "rank", "level") if name in own}
        nbytes = payload_nbytes(own["kind"], own["shape"], filled=filled, **sizes)
        if place not in gone:
            found.append(BlockEntry(**own, nbytes=nbytes, gain=0.0, hash="", uses=("t",)))
    return tuple(found)


def write_entries(path: Path, blocks: tuple[BlockEntry, ...]) -> Path:
    text = encode_header(StackIndex(1, blocks))
    path.write_bytes(text + bytes(prefix_edges(blocks)[-1]))
    return path


def test_tiers_of_a_tensor(tmp_path):
    blocks = tiers()
    assert read_stack(write_entries(tmp_path / "s", blocks)).blocks == blocks
    assert filled_before(blocks) == (0, 0, 2, 2)
    alone = tiers(gone=(3,))  # any prefix is a stack
    assert read_stack(write_entries(tmp_path / "s", alone)).blocks == alone


@pytest.mark.parametrize(
    ("changes", "gone", "message"),
    [
        ({}, (0,), "of every tier"),
        ({}, (2,), "of every tier"),
        ({}, (1,), "comes before"),
        ({2: {"level": 0, "filled": 0}}, (1,), "of every tier"),
        ({1: {"rank": 3}}, (), "its mask says 2"),
        ({3: {"rank": 2}}, (), "its mask says 1"),
        ({3: {"dtype": "i4"}}, (), "tiers before it are i8"),
        ({3: {"level": 0}}, (), "comes before|takes"),
        ({2: {"rank": 3}, 3: {"shape": (5, 2)}}, (), "columns left|another shape"),
        ({1: {"shape": (5, 2)}}, (), "another shape"),
        ({2: {"kind": "dense", "rank": 0, "dtype": "f16"}}, (3,), "not added to others"),
        ({0: {"kind": "dense", "rank": 0, "dtype": "f16"}}, (1,), "not added to others|comes before"),
        ({0: {"kind": "plane", "rank": 0, "dtype": "i8"}, 1: {"level": 1}}, (2, 3), "not added to others"),
        ({2: {"kind": "plane", "rank": 0, "dtype": "i8"}}, (3,), "not added to others"),
    ],
)
def test_tiers_that_make_no_sense(tmp_path, changes, gone, message):
    with pytest.raises(BadBlock, match=message):
        read_stack(write_entries(tmp_path / "s", tiers(changes, gone)))


@pytest.mark.parametrize("second", [{"rank": 4}, {"rank": 6}, {"rank": -1}])
def test_more_values_than_columns_are_left(tmp_path, second):
    (*first, mask, values) = tiers()
    changed = tuple(msgspec.structs.replace(entry, **second) for entry in (mask, values))
    with pytest.raises(BadBlock, match="columns left"):
        read_stack(write_entries(tmp_path / "s", (*first, *changed)))


def test_unknown_kind(tmp_path):
    document = header()
    entries(document)[1]["kind"] = "lattice"
    with pytest.raises(UnknownKind, match="lattice"):
        read_stack(assemble(tmp_path / "s", document))


@pytest.mark.parametrize("change", [{"nbytes": "8"}, {"shape": [1.5]}, {"kind": None}, {"gain": "much"}])
def test_entry_of_wrong_types(tmp_path, change):
    document = header()
    entries(document)[0] |= change
    with pytest.raises(BadHeader):
        read_stack(assemble(tmp_path / "s", document))


@pytest.mark.parametrize("position", [4096, 4096 + 64, 4096 + 64 + 25])
def test_changed_block(tmp_path, position):
    data = bytearray(golden.FILE)
    data[position] ^= 1
    (tmp_path / "s").write_bytes(data)
    stack = read_stack(tmp_path / "s")
    with pytest.raises(BadBlock, match="hash"):
        list(read_blocks(stack))


def test_file_cut_after_it_was_opened(tmp_path):
    (tmp_path / "s").write_bytes(golden.FILE)
    stack = read_stack(tmp_path / "s")
    (tmp_path / "s").write_bytes(golden.FILE[: 4096 + 70])
    with pytest.raises(TruncatedStack):
        list(read_blocks(stack))


def test_file_that_cannot_be_read(tmp_path):
    with pytest.raises(CorruptStack, match="cannot be read"):
        read_stack(tmp_path / "missing")
    with pytest.raises(CorruptStack, match="cannot be read"):
        read_stack(tmp_path)


@given(st.data())
def test_any_change_of_the_header_is_harmless(tmp_path_factory, data):
    """Whatever bytes stand there: a stack, or an error of the specification."""
    spoilt = bytearray(golden.FILE)
    for _ in range(data.draw(st.integers(1, 3))):
        spoilt[data.draw(st.integers(0, 8 + len(golden.HEADER) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "spoilt"
    path.write_bytes(spoilt)
    with contextlib.suppress(CorruptStack, UnsupportedVersion):
        read_stack(path)


# -- writing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, b"what it was"])
@pytest.mark.parametrize("payload", [b"12345678", b"short"])
def test_wrong_payload_leaves_what_was(tmp_path, before, payload):
    if before is not None:
        (tmp_path / "s").write_bytes(before)
    with pytest.raises(BadBlock):
        write_stack(tmp_path / "s", golden.INDEX, lambda i: payload)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([] if before is None else [before])


def test_full_disk_leaves_what_was(tmp_path, monkeypatch):
    (tmp_path / "s").write_bytes(b"what it was")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stack_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_golden(tmp_path / "s")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"what it was"]


KILLED = """
import os, sys, pathlib
sys.path.insert(0, sys.argv[1])
import golden
from ebbflow.formats import stack
step, path = sys.argv[2], pathlib.Path(sys.argv[3])
def payload(i):
    if step == f"payload {i}":
        os._exit(9)
    return (golden.DENSE, golden.SIGNS)[i]
if step == "fsync":
    stack.os.fsync = lambda descriptor: os._exit(9)
if step == "rename":
    pathlib.Path.rename = lambda self, target: os._exit(9)
stack.write_stack(path, golden.INDEX, payload)
"""


@pytest.mark.parametrize("step", ["payload 0", "payload 1", "fsync", "rename"])
def test_killed_while_writing_leaves_what_was(tmp_path, step):
    path = tmp_path / "s"
    path.write_bytes(b"what it was")
    command = [sys.executable, "-P", "-c", KILLED, str(Path(golden.__file__).parent), step, str(path)]
    assert subprocess.run(command, check=False).returncode == 9
    assert path.read_bytes() == b"what it was"
    write_golden(path)  # what the killed one left is no obstacle
    assert path.read_bytes() == golden.FILE
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_header_has_a_limit(monkeypatch):
    monkeypatch.setattr(container, "MAX_HEADER", 4500)
    with pytest.raises(BadHeader, match="at most 4500"):
        encode_header(golden.INDEX)


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=10)


@st.composite
def stacks(draw) -> list[tuple[BlockEntry, bytes]]:
    blocks = []
    for tensor in draw(st.lists(names, min_size=1, max_size=4, unique=True)):
        m, n = draw(st.integers(1, 70)), draw(st.integers(1, 130))
        rank = draw(st.integers(1, min(m, n)))
        dtype = draw(st.sampled_from(["bf16", "f16", "f32", "i8"]))
        planes, levels = draw(st.booleans()), draw(st.sampled_from(["i8", "i8-shared"]))
        for level in range(draw(st.integers(1, 3))):
            kind = "plane" if planes else draw(st.sampled_from(["dense", "signs"]))
            own = {"dense": {"dtype": dtype}, "signs": {"rank": rank}, "plane": {"dtype": levels}}[kind]
            nbytes = payload_nbytes(kind, (m, n), level=level, **own)
            payload = draw(st.randoms(use_true_random=False)).randbytes(nbytes)
            entry = BlockEntry(
                kind=kind,
                tensor=tensor,
                level=level,
                shape=(m, n),
                nbytes=nbytes,
                gain=draw(st.floats(allow_nan=False, allow_infinity=False)),
                hash=content_hash(payload),
                uses=tuple(draw(st.lists(names, min_size=1, max_size=2))),
                **own,
            )
            blocks.append((entry, payload))
    return blocks


@given(stacks(), st.data())
def test_round_trip(tmp_path_factory, blocks, data):
    path = tmp_path_factory.getbasetemp() / "round-trip"
    index = StackIndex(data.draw(st.integers(1, len(blocks))), tuple(entry for entry, _ in blocks))
    write_stack(path, index, lambda i: blocks[i][1])
    stack = read_stack(path)
    assert list(read_blocks(stack)) == blocks
    assert (stack.base, stack.edges) == (index.base, prefix_edges(index.blocks))
    assert stack.data_start % ALIGNMENT == 0
    assert all(edge % BLOCK_ALIGNMENT == 0 for edge in stack.edges)
    assert stack.data_start + sum(padded(entry.nbytes) for entry, _ in blocks) == path.stat().st_size
    with safe_open(path, framework="np") as file:
        assert len(file.keys()) == len(blocks)
