from __future__ import annotations

import math

import pytest

from ebbflow.formats.errors import InvalidName, InvalidRequest, Unsupported
from ebbflow.formats.pruning import METHODS, PATTERNS, VALUES, Pruning, read_pruning


def test_defaults():
    assert read_pruning("sparse", None, None, None, None) == Pruning(None, None, "admm", "i8")
    assert read_pruning("nested", None, None, None, None) is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", VALUES)
def test_every_name_is_known(method, values):
    assert read_pruning("sparse", 0.6, None, method, values) == Pruning(0.6, None, method, values)


@pytest.mark.parametrize("sparsity", [0, 1, -0.1, 1.5, math.nan, math.inf, -math.inf])
def test_sparsity_is_a_share(sparsity):
    with pytest.raises(InvalidRequest, match="above 0 and below 1"):
        read_pruning("sparse", sparsity, None, None, None)


@pytest.mark.parametrize("sparsity", [5e-324, 0.001, 0.5, 0.999, 1 - 2**-53])
def test_something_is_always_kept_and_a_row_of_one_is_not_pruned(sparsity):
    found = read_pruning("sparse", sparsity, None, None, None)
    assert found is not None
    for group in (1, 2, 64, 5632):
        assert 1 <= found.keep(group) <= group


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_says_its_sparsity(pattern):
    keep, group = PATTERNS[pattern]
    for sparsity in (None, 1 - keep / group):
        found = read_pruning("sparse", sparsity, pattern, None, None)
        assert found is not None
        assert (found.wanted, found.group("t", 8 * group), found.keep(group)) == (1 - keep / group, group, keep)
        with pytest.raises(InvalidRequest, match=f"{pattern} does not divide the {group + 1} columns of layers.3.o"):
            found.group("layers.3.o", group + 1)
    with pytest.raises(InvalidRequest, match="one of the two"):
        read_pruning("sparse", 0.6, pattern, None, None)


@pytest.mark.parametrize("pattern", ["", "1:4", "4:2", "2:4 ", "2-4", "4:4"])
def test_unknown_patterns(pattern):
    with pytest.raises(Unsupported, match="this version knows 2:4, 4:8"):
        read_pruning("sparse", None, pattern, None, None)


def test_unknown_methods_and_values():
    with pytest.raises(
        Unsupported, match="method 'obs'; this version knows magnitude, wanda, admm, sparsegpt, frankwolfe"
    ):
        read_pruning("sparse", None, None, "obs", None)
    with pytest.raises(Unsupported, match="values as 'f32'; this version knows i8, f16, i4"):
        read_pruning("sparse", None, None, None, "f32")


@pytest.mark.parametrize("codec", ["nested", "bitstack"])
def test_options_of_another_codec(codec):
    for given in (
        (0.5, None, None, None),
        (None, "2:4", None, None),
        (None, None, "admm", None),
        (None, None, None, "i8"),
    ):
        with pytest.raises(InvalidRequest, match=f"belongs? to the codec sparse; the codec {codec} has none"):
            read_pruning(codec, *given)
    with pytest.raises(InvalidRequest, match="pattern and method belong"):
        read_pruning(codec, None, "2:4", "admm", None)
    with pytest.raises(InvalidRequest, match="masks_of belongs"):
        read_pruning(codec, None, None, None, None, "other")


def test_masks_of_is_a_models_name():
    assert read_pruning("sparse", None, None, None, "i4", "other") == Pruning(values="i4")
    for name in ("", "../other", "a/b"):
        with pytest.raises(InvalidName):
            read_pruning("sparse", None, None, None, None, name)
