"""A complete stack file as literal bytes: a dense vector of two, and a 2 x 3 signs block of rank 1."""

from __future__ import annotations

from ebbflow.formats.index import BlockEntry, StackIndex

DENSE = bytes.fromhex("0000803f 000000c0")  # 1, -2
SIGNS = bytes.fromhex(
    "0500000000000000 0600000000000000"  # + - +   - + +
    "0038 0040"  # U: 0.5, 2
    "003c 00bc 0034"  # V: 1, -1, 0.25
)
PLANES = bytes.fromhex(
    "0500000000000000 0600000000000000"  # top bits: 1 0 1   0 1 1
    "0600000000000000 0200000000000000"  # second bits: 0 1 1   0 1 0
    "803f 003f"  # scales: 1, 0.5
    "fdff0103 81fe027f"  # levels: -3 -1 1 3   -127 -2 2 127
)
SHARED_PLANE = bytes.fromhex(
    "0100000000000000 0400000000000000"  # third bits: 1 0 0   0 0 1
    "0040 803f"  # scales: 2, 1
    "fcfdfeff 01020304"  # levels for all rows: -4 -3 -2 -1 1 2 3 4
)
# two tiers of a 2 x 5 matrix: columns 1, 4 and 0, 2; then 3 and 1, which are the third and the first of those left
MASKS = (bytes.fromhex("1200000000000000 0500000000000000"), bytes.fromhex("0400000000000000 0100000000000000"))
VALUES = {
    "f16": (bytes.fromhex("003c 00c0 0038 0034"), bytes.fromhex("0040 00bc")),  # 1 -2  0.5 0.25; 2  -1
    "i8": (
        bytes.fromhex("0000803f 0000003f 03ff 7f81"),
        bytes.fromhex("05 fc"),
    ),  # scales 1, 0.5; 3 -1  127 -127; 5  -4
    "i4": (bytes.fromhex("0000803f 0000003f f3 97"), bytes.fromhex("05 0c")),  # 3 -1  7 -7; 5  -4
}
SPARSE = {
    "f16": [[0, 1, 0, 2, -2], [0.5, -1, 0.25, 0, 0]],
    "i8": [[0, 3, 0, 5, -1], [63.5, -2, -63.5, 0, 0]],
    "i4": [[0, 3, 0, 5, -1], [3.5, -2, -3.5, 0, 0]],
}
ROTATION_SIGNS = [-1, 1, 1]
ENTRIES = (
    BlockEntry(
        kind="dense",
        tensor="final_norm",
        level=0,
        shape=(2,),
        nbytes=8,
        gain=0.0,
        hash="f76600d11c87295e0d0a3f146dfdff06",
        uses=("final_norm",),
        dtype="f32",
    ),
    BlockEntry(
        kind="signs",
        tensor="layers.0.q",
        level=0,
        shape=(2, 3),
        nbytes=26,
        gain=0.5,
        hash="b3ca52f24c8efa64647d893fd713a30f",
        uses=("layers.0.q",),
        rank=1,
    ),
)
INDEX = StackIndex(1, ENTRIES)
HEADER = (
    rb'{"__metadata__":{"format":"ebbflow-stack","version":"2","index":"{\"base\":1,\"blocks\":['
    rb"{\"kind\":\"dense\",\"tensor\":\"final_norm\",\"level\":0,\"shape\":[2],\"nbytes\":8,\"gain\":0.0,"
    rb"\"hash\":\"f76600d11c87295e0d0a3f146dfdff06\",\"uses\":[\"final_norm\"],\"dtype\":\"f32\"},"
    rb"{\"kind\":\"signs\",\"tensor\":\"layers.0.q\",\"level\":0,\"shape\":[2,3],\"nbytes\":26,\"gain\":0.5,"
    rb"\"hash\":\"b3ca52f24c8efa64647d893fd713a30f\",\"uses\":[\"layers.0.q\"],\"rank\":1}]}"
    rb'"},"000000":{"dtype":"U8","shape":[64],"data_offsets":[0,64]},'
    rb'"000001":{"dtype":"U8","shape":[64],"data_offsets":[64,128]}}'
)
FILE = bytes.fromhex("f80f000000000000") + HEADER.ljust(4088) + DENSE.ljust(64, b"\0") + SIGNS.ljust(64, b"\0")
