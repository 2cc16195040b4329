"""The upstream's streams in three protocols: whole where a proxy passed them on, and seen where it did not."""

import re

import orjson
import pytest

from loadtest.measures.load import Stamps
from loadtest.stamped import DIALECTS, Dialect


def sent(dialect: Dialect, tokens: int) -> list[bytes]:
    events = [dialect.event(number, 10**9).removesuffix(b"\n\n") for number in range(tokens)]
    return [*dialect.opening, *events, *dialect.closing(tokens)]


def read(dialect: Dialect, events: list[bytes], tokens: int) -> Stamps:
    stamps = Stamps(tokens, dialect)
    for event in events:
        stamps.event(event, 2.0)
    return stamps


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_a_stream_that_was_passed_on_is_whole_and_exact(dialect: Dialect) -> None:
    stamps = read(dialect, sent(dialect, 3), 3)
    assert stamps.whole
    assert stamps.exact
    assert stamps.lags_s == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_a_stream_that_was_encoded_anew_is_whole_and_not_exact(dialect: Dialect) -> None:
    again = [re.sub(rb'":', b'": ', event) for event in sent(dialect, 3)]
    stamps = read(dialect, again, 3)
    assert stamps.whole
    assert not stamps.exact


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_a_stream_that_lost_a_token_or_its_end_is_not_whole(dialect: Dialect) -> None:
    events = sent(dialect, 3)
    first = len(dialect.opening)
    assert not read(dialect, events[:first] + events[first + 1 :], 3).whole
    assert not read(dialect, events[:-1], 3).whole


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_every_event_is_json_of_its_own_name(dialect: Dialect) -> None:
    for event in sent(dialect, 1):
        name, _, data = event.rpartition(b"data: ")
        if data != b"[DONE]":
            document = orjson.loads(data)
            assert name in (b"", b"event: %b\n" % str(document.get("type")).encode())
