"""Streams of `responses`: the last event has the usage."""

import pytest

from edge.exchange import Usage, UsageSource
from tests.metering.test_meters import RESPONSES, USED, data, events, fed, usage
from tests.streams import cut

FINAL, RUNNING, ESTIMATED, NONE = UsageSource


@pytest.mark.parametrize("kind", ["completed", "incomplete", "failed"])
def test_usage_of_a_response_stands_in_its_last_event(kind: str) -> None:
    value = {"input_tokens": 12, "input_tokens_details": {"cached_tokens": 2}, "output_tokens": 5,
             "output_tokens_details": {"reasoning_tokens": 3}, "total_tokens": 17}  # fmt: skip
    meter = events(RESPONSES)
    meter.feed(data({"type": "response.in_progress", "response": {"usage": usage(1, 1)}}))
    meter.feed(data({"type": f"response.{kind}", "response": {"error": None, "usage": value}}))
    assert meter.usage(True) == meter.usage(False) == Usage(12, 5, 2, 3, source=FINAL)
    assert meter.failed is (kind == "failed")


def test_ending_of_a_response_is_that_of_a_delta_only() -> None:
    for kind in ("response.output_text.done", "response.completed", "error"):
        assert fed(events(RESPONSES), [data({"text": "a", "type": kind})] * 2).ending == b""
    nested = data({"type": "response.output_text.delta", "delta": {"type": "response.x.delta"}})
    assert fed(events(RESPONSES), [nested]).ending == b""


@pytest.mark.parametrize("length", [30_000, 200_000, 900_000, 3_000_000])
def test_last_event_of_a_response_is_read_however_long_it_is(length: int) -> None:
    """It repeats the whole text; behind the usage stand the caller's own tools and metadata."""
    for size in [1400, 65_536, 10**7]:
        value = {"output": ["x" * length], "usage": {"input_tokens": 12, "output_tokens": 5}, "tools": ["t" * 30_000]}
        event = b"event: response.completed\n" + data({"type": "response.completed", "response": value})
        meter = events(RESPONSES)
        for part in cut(event, range(size, len(event), size)):
            assert meter.feed(part) is part
        assert meter.usage(False) == USED
