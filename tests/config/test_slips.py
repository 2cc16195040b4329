"""What wrong values were meant to be."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.config.slips import meant_count, meant_duration, meant_flag, meant_size
from edge.config.values import byte_count, seconds


@pytest.mark.parametrize(
    ("value", "meant"),
    [("true", "true"), (" Yes", "true"), (1, "true"), ("off", "false"), (0, "false"), ("maybe", None), ([], None)],
)
def test_flag(value: object, meant: str | None) -> None:
    assert meant_flag(value) == meant


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("64", 64),
        ("128k", 128_000),
        ("1,000", 1000),
        ("60/min", 60),
        (1e4, 10_000),
        ("1.5k", 1500),
        ("1.5", None),
        (float("inf"), None),
        ("many", None),
        (True, None),
    ],
)
def test_count(value: object, meant: int | None) -> None:
    assert meant_count(value) == meant


@pytest.mark.parametrize(
    ("text", "meant"),
    [("30", "30s"), ("5 min", "5m"), ("1m30s", "90s"), ("1h 5m", "3900s"), ("2 Hours", "2h"), ("", None), ("5x", None)],
)
def test_duration(text: str, meant: str | None) -> None:
    assert meant_duration(text) == meant


@pytest.mark.parametrize(
    ("text", "meant"),
    [("64", "64B"), ("64M", "64MiB"), ("64mb", "64MB"), ("1.5 gib", "1.5GiB"), ("64 megs", None), ("", None)],
)
def test_size(text: str, meant: str | None) -> None:
    assert meant_size(text) == meant


@given(st.from_regex(r"[0-9]{1,6}(\.[0-9]{1,3})? ?[A-Za-z]{0,3}", fullmatch=True))
def test_what_is_proposed_is_one(text: str) -> None:
    """A hint that is wrong itself would be worse than none, though it may be too long or no whole number of bytes."""
    for propose, read in ((meant_duration, seconds), (meant_size, byte_count)):
        proposed = propose(text)
        if proposed is None:
            continue
        with contextlib.suppress(ValueError):
            assert read(proposed) >= 0
            continue
        with pytest.raises(ValueError, match=r"too long|whole number"):
            read(proposed)
