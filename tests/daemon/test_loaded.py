"""What the worker was told to load, between what it is told and what it says."""

from __future__ import annotations

import msgspec

from ebbflow.daemon.supervisor.books import Holding
from ebbflow.daemon.supervisor.loaded import Loaded
from ebbflow.formats.values import Residency


def residency(model: str, nbytes: int, kv: int = 0, shared: int = 0) -> Residency:
    return Residency(
        model=model,
        blocks=1,
        total_blocks=2,
        nbytes=nbytes,
        total_nbytes=100,
        base_nbytes=10,
        target_nbytes=50,
        kv_nbytes=kv,
        shared_nbytes=shared,
        shared_base_nbytes=shared // 2,
    )


def test_a_model_is_there_from_when_it_was_told_to_when_it_goes():
    loaded = Loaded()
    for name in ("a", "b"):
        loaded.add(name)
    assert (len(loaded), loaded.names, loaded.loading) == (2, {"a", "b"}, True)
    assert loaded.get("a") is None
    loaded.note([residency("b", 20, kv=3, shared=8), residency("a", 10), residency("gone", 10)])
    assert not loaded.loading
    assert loaded.get("a") == residency("a", 10)
    assert "gone" not in loaded
    assert loaded.holdings == {"a": Holding(10, 50), "b": Holding(20, 50, 8, 4)}
    assert loaded.kv_nbytes == [3]
    loaded.note([msgspec.structs.replace(residency("b", 20), damaged_at_nbytes=30)])
    assert loaded.holdings["b"] == Holding(20, 50, damaged_at=30)
    loaded.remove("b")
    loaded.remove("b")
    loaded.note([residency("b", 20)])  # said before it heard that
    assert [known.model for known in loaded.residencies] == ["a"]
    loaded.clear()
    assert not len(loaded)
