"""Streams of `responses`: the last event has the usage."""

import orjson
import pytest

from edge.exchange import Usage, UsageSource
from tests.metering.test_meters import RESPONSES, USED, data, document, events, fed, usage
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


@pytest.mark.parametrize("length", [10, 3_000_000])
def test_usage_of_the_caller_is_not_that_of_the_response(length: int) -> None:
    own = {"usage": {"input_tokens": 1, "output_tokens": 1}}
    value = {"metadata": own, "output": ["x" * length, own], "usage": {"input_tokens": 12, "output_tokens": 5}}
    for response in (value, dict(reversed(value.items()))):
        last = data({"type": "response.completed", "sequence_number": 7, "x": own, "response": response} | own)
        for size in (10**7, 1400):
            meter = fed(events(RESPONSES), cut(last, range(size, len(last), size)))
            assert meter.usage(False) == USED
            assert meter.ended
            assert meter.begun(b"").sequence_number == 7
    without = data({"type": "response.completed", "response": {"output": ["x" * length], "metadata": own}} | own)
    assert fed(events(RESPONSES), [without]).usage(True).source is ESTIMATED


@pytest.mark.parametrize("length", [10, 3_000_000])
def test_response_is_known_by_its_document_however_long_it_is(length: int) -> None:
    value = {"id": "resp_1", "created_at": 3, "output": ["x" * length], "model": "m", "usage": usage()}
    meter = fed(document(RESPONSES), [orjson.dumps(value)])
    assert (meter.response_id(False), meter.response_id(True), meter.usage(True)) == ("", "resp_1", USED)
    assert fed(document(RESPONSES), [b"["]).response_id(True) == ""
