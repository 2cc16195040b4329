"""Requests that are counted together."""

from typing import Any

import pytest

from edge.exchange import End, Tried, Usage
from edge.telemetry.alike import alike
from tests.records import finished

AT = {"route": "a", "pool": "p", "endpoint": "h:1", "asked_at": 100.0, "first_byte": 100.5, "usage": Usage(5, 7)}


def test_requests_that_ended_alike_are_one_group_with_their_sums() -> None:
    exchanges = [finished(**AT, finished=at) for at in (102.1, 102.9, 102.5)]
    (requests,) = alike(exchanges)
    assert requests.exchanges == exchanges
    assert (requests.second, requests.completion_tokens, requests.first_bytes_s) == (102, 21, [0.5] * 3)
    assert requests.is_plain


@pytest.mark.parametrize(
    "facts",
    [
        {"route": "b"},
        {"pool": "q"},
        {"endpoint": "h:2"},
        {"status": 400},
        {"end": End.UPSTREAM_CUT},
        {"stream": True},
        {"finished": 103.0},
        {"replays": 1},
        {"queued_s": 0.1},
        {"failures": [Tried("h:2", 503, "upstream_error", "busy", 1.0)]},
    ],
)
def test_a_request_that_differs_in_what_is_counted_apart_is_another_group(facts: dict[str, Any]) -> None:
    groups = list(alike([finished(**AT), finished(**(AT | facts)), finished(**AT)]))
    assert [len(each.exchanges) for each in groups] == [2, 1]
