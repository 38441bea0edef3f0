"""The masks file: golden bytes, hostile files, and where a stack that has one keeps its blocks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from safetensors import safe_open

from ebbflow.formats.blocks import sum_blocks
from ebbflow.formats.container import ALIGNMENT, content_hash
from ebbflow.formats.errors import (
    BadBlock,
    BadHeader,
    BadOffsets,
    CorruptManifest,
    CorruptStack,
    NotArrived,
    TruncatedStack,
)
from ebbflow.formats.index import BlockEntry, StackIndex
from ebbflow.formats.manifest import MANIFEST, MASKS, STACK, read_manifest
from ebbflow.formats.masks import digest, encode_header, mask_offsets, masks_beside
from ebbflow.formats.stack import (
    BlockReader,
    Place,
    Stack,
    check_manifest,
    mark_of,
    read_blocks,
    read_stack,
    write_stack,
)
from ebbflow.formats.stack import encode_header as encode_stack_header

from support import golden
from support.stacks import write_sparse_model

FIRST, SECOND = (content_hash(mask) for mask in golden.MASKS)
HEADER = (
    '{"__metadata__":{"format":"ebbflow-masks","version":"1"},'
    f'"{FIRST}":{{"dtype":"U8","shape":[64],"data_offsets":[0,64]}},'
    f'"{SECOND}":{{"dtype":"U8","shape":[64],"data_offsets":[64,128]}}}}'
).encode()
FILE = bytes.fromhex("f80f000000000000") + HEADER.ljust(4088) + b"".join(mask.ljust(64, b"\0") for mask in golden.MASKS)


def blocks(dtype: str = "i8") -> list[tuple[BlockEntry, bytes]]:
    """The two tiers of the golden matrix, masks beside."""
    found = []
    for level, (mask, values) in enumerate(zip(golden.MASKS, golden.VALUES[dtype], strict=True)):
        for kind, data in (("mask", mask), ("values", values)):
            entry = BlockEntry(
                kind=kind,
                tensor="t",
                level=level,
                shape=(2, 5),
                nbytes=len(data),
                gain=0.0,
                hash=content_hash(data),
                uses=("t",),
                dtype="" if kind == "mask" else dtype,
                rank=2 - level,
                beside=kind == "mask",
            )
            found.append((entry, data))
    return found


def write(folder: Path, pairs: list[tuple[BlockEntry, bytes]] | None = None, base: int = 2) -> Path:
    """`-> path` of the stack."""
    pairs = blocks() if pairs is None else pairs
    folder.mkdir(exist_ok=True)
    write_stack(folder / STACK, StackIndex(base, tuple(entry for entry, _ in pairs)), lambda i: pairs[i][1])
    return folder / STACK


def with_index(path: Path, change: Callable[[dict], None], version: str = "3") -> Path:
    """The stack with its header changed, the data as they were."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    document = json.loads(content[8 : 8 + length])
    index = json.loads(document["__metadata__"]["index"])
    change(index)
    document["__metadata__"] |= {"index": json.dumps(index), "version": version}
    text = json.dumps(document).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return path


# -- golden bytes -------------------------------------------------------------------------------------------------


def test_writes_the_golden_bytes(tmp_path):
    path = write(tmp_path)
    assert (tmp_path / MASKS).read_bytes() == FILE
    assert sorted(file.name for file in tmp_path.iterdir()) == [MASKS, STACK]
    with safe_open(tmp_path / MASKS, framework="np") as file:
        assert set(file.keys()) == {FIRST, SECOND}
        assert file.get_tensor(SECOND).tobytes() == golden.MASKS[1].ljust(64, b"\0")
    with safe_open(path, framework="np") as file:
        assert file.metadata()["version"] == "3"
        assert [file.get_tensor(f"{i:06}").shape for i in range(4)] == [(0,), (64,), (0,), (64,)]


def test_a_stack_with_its_masks_beside_reads_as_one_with_them_inside(tmp_path):
    beside = read_stack(write(tmp_path / "beside"))
    inside = [(msgspec.structs.replace(entry, beside=False), data) for entry, data in blocks()]
    whole = read_stack(write(tmp_path / "inside", inside))
    assert not (tmp_path / "inside" / MASKS).exists()
    assert (beside.edges, beside.base_nbytes) == (whole.edges, whole.base_nbytes) == ((0, 64, 128, 192, 256), 128)
    assert [data for _, data in read_blocks(beside)] == [data for _, data in read_blocks(whole)]
    assert sum_blocks(read_blocks(beside))["t"].tolist() == golden.SPARSE["i8"]
    masks = tmp_path / "beside" / MASKS
    assert beside.places == (
        Place(masks, 4096), Place(beside.path, 4096), Place(masks, 4160), Place(beside.path, 4160)
    )  # fmt: skip
    assert (beside.file_edges, whole.file_edges) == ((0, 0, 64, 64, 128), whole.edges)
    assert (beside.masks_path, whole.masks_path) == (masks, None)
    assert whole.path.read_bytes()[4096:] == b"".join(data.ljust(64, b"\0") for _, data in inside)


def test_the_same_masks_are_the_same_file_whatever_the_values_and_the_order(tmp_path):
    first, second = blocks("i8"), blocks("i4")
    other = [(msgspec.structs.replace(entry, tensor="u"), data) for entry, data in first]
    others = [(msgspec.structs.replace(entry, tensor="u"), data) for entry, data in second]
    orders = [first[:2] + other[:2] + first[2:] + other[2:], second[:2] + others[:2] + others[2:] + second[2:]]
    stacks = [read_stack(write(tmp_path / str(i), pairs, 4)) for i, pairs in enumerate(orders)]
    assert digest(stacks[0].blocks) == digest(stacks[1].blocks) != digest([first[0][0]])
    assert [(tmp_path / name / MASKS).read_bytes() for name in "01"] == [FILE, FILE]  # and each only once
    assert len({place for place in stacks[0].places if place.path.name == MASKS}) == 2
    changed = msgspec.structs.replace(first[0][0], hash="0" * 32)
    assert digest([changed, first[2][0]]) != digest([first[0][0], first[2][0]])
    assert digest([entry for entry, _ in first if not entry.beside]) == ""


def test_some_masks_may_lie_inside(tmp_path):
    first, *rest = blocks()
    stack = read_stack(write(tmp_path, [(msgspec.structs.replace(first[0], beside=False), first[1]), *rest]))
    assert [place.path.name for place in stack.places] == [STACK, STACK, MASKS, STACK]
    assert sum_blocks(read_blocks(stack))["t"].tolist() == golden.SPARSE["i8"]


# -- hostile files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda path: path.unlink(), TruncatedStack),
        (lambda path: path.write_bytes(b""), TruncatedStack),
        (lambda path: path.write_bytes(FILE[:5]), TruncatedStack),
        (lambda path: path.write_bytes(FILE[:4095]), TruncatedStack),
        (lambda path: path.write_bytes(FILE[:4096]), TruncatedStack),
        (lambda path: path.write_bytes(FILE[:-1]), TruncatedStack),
        (lambda path: path.write_bytes(FILE + bytes(64)), BadOffsets),
        (lambda path: path.write_bytes(b"{}" + FILE[2:]), BadHeader),
        (lambda path: path.write_bytes(FILE.replace(FIRST.encode(), b"0" * 32)), BadHeader),
        (lambda path: path.write_bytes(FILE.replace(b"[64,128]", b"[0,  64]")), BadHeader),
        (lambda path: path.write_bytes(FILE.replace(b'"version":"1"', b'"version":"2"')), BadHeader),
        (lambda path: path.write_bytes(bytes(len(FILE))), BadHeader),
        (lambda path: path.write_bytes(FILE[:8]), TruncatedStack),
        (lambda path: path.write_bytes(b"\xff" * 8), BadHeader),
        (lambda path: (path.unlink(), path.mkdir()), CorruptStack),
    ],
)
def test_a_masks_file_that_is_not_this_stacks(tmp_path, spoil, error):
    path = write(tmp_path)
    spoil(tmp_path / MASKS)
    with pytest.raises(error) as caught:
        read_stack(path)
    assert type(caught.value) is error
    assert MASKS in str(caught.value)


def test_a_link_to_another_file(tmp_path):
    path = write(tmp_path / "m")
    for target in (path, write(tmp_path / "other", [_other(pair) for pair in blocks()]).with_name(MASKS)):
        (tmp_path / "m" / MASKS).unlink()
        os.link(target, tmp_path / "m" / MASKS)
        with pytest.raises(BadHeader):
            read_stack(path)


def _other(pair: tuple[BlockEntry, bytes]) -> tuple[BlockEntry, bytes]:
    """The same, of another content."""
    entry, data = pair
    data = data[:-1] + b"\x01"
    return msgspec.structs.replace(entry, hash=content_hash(data)), data


def test_a_changed_mask_does_not_match_its_hash(tmp_path):
    path = write(tmp_path)
    spoilt = bytearray(FILE)
    spoilt[4160] ^= 1
    (tmp_path / MASKS).write_bytes(spoilt)
    stack = read_stack(path)
    assert len(list(read_blocks(stack, [0, 1]))) == 2
    with pytest.raises(BadBlock, match="block 2"):
        list(read_blocks(stack))


def test_a_masks_file_cut_after_it_was_opened(tmp_path):
    stack = read_stack(write(tmp_path))
    (tmp_path / MASKS).write_bytes(FILE[:4161])
    with pytest.raises(TruncatedStack, match=MASKS):
        list(read_blocks(stack))


def test_files_that_are_open_may_go(tmp_path):
    stack = read_stack(write(tmp_path / "m"))
    with BlockReader(stack) as reader:
        shutil.rmtree(tmp_path / "m")
        assert [reader.read(i) for i in range(4)] == [data for _, data in blocks()]
    with pytest.raises(CorruptStack, match="cannot be read"):
        BlockReader(stack)


@pytest.mark.parametrize(
    ("block", "change", "error"),
    [
        (1, {"beside": True}, BadOffsets),  # has bytes in the stack
        (0, {"beside": False}, BadOffsets),  # has none
        (0, {"hash": FIRST.upper()}, BadBlock),
        (0, {"hash": ""}, BadBlock),
        (0, {"hash": "__metadata__"}, BadBlock),
        (0, {"hash": SECOND}, BadHeader),  # the file does not have it first
        (0, {"beside": "yes"}, BadHeader),
        (0, {"nbytes": 10**30}, BadBlock),
    ],
)
def test_an_index_that_lies_about_what_is_beside(tmp_path, block, change, error):
    path = write(tmp_path)
    with_index(path, lambda index: index["blocks"][block].update(change))
    with pytest.raises(error):
        read_stack(path)


def test_one_hash_of_two_lengths(tmp_path):
    """Two tensors whose masks would have to be the same bytes, and are not of one length."""
    pairs = blocks()[:2]
    long = msgspec.structs.replace(pairs[0][0], tensor="u", shape=(3, 5), nbytes=24)
    values = msgspec.structs.replace(pairs[1][0], tensor="u", shape=(3, 5), nbytes=18)
    with pytest.raises(BadBlock, match="cannot be the hash"):
        masks_beside([pairs[0][0], pairs[1][0], long, values])


@pytest.mark.parametrize("kind", ["values", "dense"])
def test_only_masks_lie_beside(tmp_path, kind):
    if kind == "values":
        entries = tuple(msgspec.structs.replace(entry, beside=True) for entry, _ in blocks())
    else:
        entries = (msgspec.structs.replace(golden.ENTRIES[0], beside=True),)
    (tmp_path / STACK).write_bytes(encode_stack_header(StackIndex(1, entries)))
    (tmp_path / MASKS).write_bytes(encode_header(masks_beside(entries)).ljust(9000, b"\0"))
    with pytest.raises(BadBlock, match="only masks do"):
        read_stack(tmp_path / STACK)


def test_version_2_has_nothing_beside(tmp_path):
    with pytest.raises(BadBlock, match="version 3"):
        read_stack(with_index(write(tmp_path), lambda index: None, version="2"))


# -- arriving -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [None, 0, 4000, len(FILE) - 1])
def test_masks_that_have_not_arrived(tmp_path, there):
    path = write(tmp_path)
    mark_of(path).touch()
    (tmp_path / MASKS).unlink()
    if there is not None:
        (tmp_path / MASKS).write_bytes(FILE[:there])
    with pytest.raises(NotArrived, match=MASKS):
        read_stack(path)
    (tmp_path / MASKS).write_bytes(b"\xff" * len(FILE))
    with pytest.raises(BadHeader):  # never becomes right
        read_stack(path)


def test_what_has_arrived_is_counted_in_the_stacks_own_file(tmp_path):
    path = write(tmp_path)
    os.truncate(path, 4096 + 64)
    mark_of(path).touch()
    stack = read_stack(path)
    assert stack.arriving
    assert [data for _, data in read_blocks(stack, [0, 1, 2])] == [data for _, data in blocks()[:3]]


# -- writing ------------------------------------------------------------------------------------------------------


def test_a_mask_that_is_not_what_its_entry_says_leaves_nothing(tmp_path):
    pairs = blocks()
    pairs[2] = (pairs[2][0], golden.MASKS[0])
    with pytest.raises(BadBlock, match="mask of t level 1"):
        write(tmp_path, pairs)
    assert not list(tmp_path.iterdir())


def test_masks_that_are_there_are_left_alone(tmp_path):
    write(tmp_path / "a")
    (tmp_path / "b").mkdir()
    os.link(tmp_path / "a" / MASKS, tmp_path / "b" / MASKS)
    pairs = blocks("f16")
    asked: list[int] = []

    def payload(i: int) -> bytes:
        asked.append(i)
        return pairs[i][1]

    write_stack(tmp_path / "b" / STACK, StackIndex(2, tuple(e for e, _ in pairs)), payload, masks_there=True)
    assert asked == [1, 3]
    assert (tmp_path / "b" / MASKS).stat().st_nlink == 2
    assert sum_blocks(read_blocks(read_stack(tmp_path / "b" / STACK)))["t"].tolist() == golden.SPARSE["f16"]
    write(tmp_path / "b", [_other(pair) for pair in pairs])  # a new file, not into the shared one
    assert (tmp_path / "a" / MASKS).read_bytes() == FILE


def test_the_manifest_says_which_masks(tmp_path):
    folder = write_sparse_model(tmp_path / "m")
    stack, manifest = read_stack(folder / STACK), read_manifest(folder)
    assert manifest.masks == digest(stack.blocks) != ""
    assert mask_offsets(stack.blocks)[0] == (folder / MASKS).stat().st_size
    assert isinstance(stack, Stack)
    check_manifest(stack, manifest)
    for other in ("", "0" * 32):
        with pytest.raises(CorruptManifest):
            check_manifest(stack, msgspec.structs.replace(manifest, masks=other))
    masks = [stack.edges[i + 1] - stack.edges[i] for i in range(stack.base) if stack.blocks[i].beside]
    assert stack.base_masks_nbytes == sum(masks) > 0
    check_manifest(stack, msgspec.structs.replace(manifest, base_masks_nbytes=sum(masks)))
    with pytest.raises(CorruptManifest):
        check_manifest(stack, msgspec.structs.replace(manifest, base_masks_nbytes=sum(masks) + 1))


@pytest.mark.parametrize("name", [MASKS, STACK, MANIFEST])
@pytest.mark.parametrize("odd", ["pipe", "link", "link to a device", "link to nowhere"])
def test_pipes_and_links_are_no_files(tmp_path: Path, name: str, odd: str) -> None:
    """Of a pipe nobody would ever hear again; a link may have come after the library was looked at."""
    folder = write_sparse_model(tmp_path / "odd")
    (folder / name).rename(tmp_path / "elsewhere")
    if odd == "pipe":
        os.mkfifo(folder / name)
    else:
        targets = {"link": tmp_path / "elsewhere", "link to a device": Path("/dev/zero"), "link to nowhere": Path("no")}
        (folder / name).symlink_to(targets[odd])
    wanted = f"{name} cannot be read: it is {'not a plain file' if odd == 'pipe' else 'a link;'}"
    with pytest.raises((CorruptStack, CorruptManifest), match=wanted):
        read_manifest(folder)
        read_stack(folder / STACK)


def test_hard_links_and_linked_folders_are_read(tmp_path: Path) -> None:
    """Shared masks are hard links; and who has little room may have put the whole library on another disk."""
    folder = write_sparse_model(tmp_path / "there" / "library" / "m")
    wanted = [payload for _, payload in read_blocks(read_stack(folder / STACK))]
    for name in (MASKS, STACK, MANIFEST):
        os.link(folder / name, tmp_path / name)
    (tmp_path / "library").symlink_to(tmp_path / "there" / "library")
    (tmp_path / "linked").symlink_to(folder)
    for home in (tmp_path, tmp_path / "library" / "m", tmp_path / "linked"):
        stack = read_stack(home / STACK)
        check_manifest(stack, read_manifest(home))
        assert [payload for _, payload in read_blocks(stack)] == wanted
