from __future__ import annotations

import json

import msgspec
import pytest

from ebbflow.formats import manifest as manifest_module
from ebbflow.formats.architecture import Architecture, RotaryScaling
from ebbflow.formats.errors import CorruptManifest, UnsupportedVersion
from ebbflow.formats.manifest import MANIFEST, CurvePoint, Manifest, Source, read_manifest, write_manifest

ARCHITECTURE = Architecture(
    family="llama",
    vocab=32,
    hidden=8,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=4,
    intermediate=16,
    context=64,
    norm_eps=1e-5,
    rotary_theta=1e4,
    rotary_scaling=RotaryScaling("llama3", 8.0),
    tied=True,
)
GIVEN = Manifest(
    name="demo",
    architecture=ARCHITECTURE,
    source=Source("org/demo", "00ff"),
    codec="bitstack",
    options={"levels": 14, "rank": "by shape", "factor": 0.5},
    nbytes=128,
    base_nbytes=64,
    blocks=2,
    original_nbytes=256,
    bos=0,
    eos=(1, 2),
    curve=(CurvePoint(1, 64, 2.0, 100.0), CurvePoint(2, 128, 0.25, 30.0)),
    created="2026-01-01T00:00:00+00:00",
)

NESTED = b'{"version": 1, "new": ' + b"[" * 99_999 + b"]" * 99_999 + b"}"


def test_round_trip(tmp_path):
    write_manifest(tmp_path, GIVEN)
    assert read_manifest(tmp_path) == GIVEN
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_what_people_and_other_programs_read(tmp_path):
    write_manifest(tmp_path, GIVEN)
    document = json.loads((tmp_path / MANIFEST).read_text())
    assert document["version"] == 1
    assert document["architecture"]["rotary_scaling"] == {"kind": "llama3", "factor": 8.0}
    assert document["curve"][0] == {"blocks": 1, "nbytes": 64, "kl": 2.0, "perplexity": 100.0}


def test_unknown_fields_are_ignored(tmp_path):
    document = json.loads(msgspec.json.encode(GIVEN)) | {"recoveries": [1]}
    (tmp_path / MANIFEST).write_text(json.dumps(document))
    assert read_manifest(tmp_path) == GIVEN


def test_newer_version(tmp_path):
    (tmp_path / MANIFEST).write_text('{"version": 2, "all": "new"}')
    with pytest.raises(UnsupportedVersion, match="version 2"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"{}", b'{"version": "1"}', b'{"version": 1}', b"\xff", b"[" * 99999]
)
def test_not_a_manifest(tmp_path, text):
    (tmp_path / MANIFEST).write_bytes(text)
    with pytest.raises(CorruptManifest, match="is not a manifest"):
        read_manifest(tmp_path)


def test_no_manifest(tmp_path):
    with pytest.raises(CorruptManifest, match="cannot be read: No such file"):
        read_manifest(tmp_path)


def test_failed_write_leaves_the_old_one(tmp_path, monkeypatch):
    write_manifest(tmp_path, GIVEN)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_manifest(tmp_path, msgspec.structs.replace(GIVEN, name="other"))
    assert read_manifest(tmp_path) == GIVEN
