from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.formats.errors import InvalidRequest, InvalidSize
from ebbflow.formats.units import AUTO, SizeWish, format_seconds, format_size, parse_seconds, parse_size, parse_wish


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("12B", 12),
        ("300MB", 300_000_000),
        ("300 mb", 300_000_000),
        ("300M", 300_000_000),
        ("1.5 GiB", 1_610_612_736),
        (" 2k ", 2000),
        ("0.1KiB", 102),
        ("3TB", 3 * 10**12),
        ("9007199254740993", 9_007_199_254_740_993),  # one that a float cannot hold
    ],
)
def test_parse_size(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    ["", "MB", "-1MB", "1e9", "1,5GB", "1 5GB", "5XB", "5%", "nan", "inf", "٣MB", "9" * 400, "9000000TB0"],
)
def test_not_a_size(text):
    with pytest.raises(InvalidSize):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "wish"),
    [
        ("auto", AUTO),
        (" AUTO ", AUTO),
        ("60%", SizeWish(fraction=0.6)),
        ("100 %", SizeWish(fraction=1.0)),
        ("12.5%", SizeWish(fraction=0.125)),
        ("300MB", SizeWish(nbytes=300_000_000)),
    ],
)
def test_parse_wish(text, wish):
    assert parse_wish(text) == wish


@pytest.mark.parametrize("text", ["0%", "101%", "-5%", "", "most"])
def test_not_a_wish(text):
    with pytest.raises(InvalidSize):
        parse_wish(text)


def test_a_wish_resolves_against_the_full_size():
    assert AUTO.resolve(1000) == 1000
    assert SizeWish(fraction=0.5).resolve(1001) == 500
    assert SizeWish(nbytes=300).resolve(1000) == 300
    assert SizeWish(nbytes=3000).resolve(1000) == 1000
    assert [str(w) for w in (AUTO, SizeWish(fraction=0.5), SizeWish(nbytes=300))] == ["auto", "50%", "300 B"]
    assert [w.automatic for w in (AUTO, SizeWish(fraction=0.5), SizeWish(nbytes=0))] == [True, False, False]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_949, "99.9 kB"),
        (99_950, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (12_345_678, "12.3 MB"),
        (615_000_000, "615 MB"),
        (2 * 10**12, "2.0 TB"),
        (-12_345_678, "-12.3 MB"),
    ],
)
def test_format_size(nbytes, text):
    assert format_size(nbytes) == text


@given(st.integers(0, 10**15))
def test_sizes_come_back_within_what_is_shown(nbytes):
    assert abs(parse_size(format_size(nbytes)) - nbytes) <= 0.05 * nbytes


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (3599.9, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("45s", 45), (" 20 m", 1200), ("1.5H", 5400), ("2d", 172800)]
)
def test_parse_seconds(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1m", "1e3", "5 weeks", "1:30", "9" * 20])
def test_not_a_time(text):
    with pytest.raises(InvalidRequest, match="is not a time"):
        parse_seconds(text)
