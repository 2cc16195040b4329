"""The last minute, by route and endpoint."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.exchange import End, Usage, UsageSource
from edge.telemetry.alike import alike
from edge.telemetry.recent import OTHER, Recent, Traffic
from tests.profiles import examples
from tests.records import finished


def minute(recent: Recent, now: float) -> tuple[dict[str, Traffic], dict[str, Traffic]]:
    routes: dict[str, Traffic] = {}
    endpoints: dict[str, Traffic] = {}
    for _ in recent.minute(routes, endpoints, now):
        pass
    return routes, endpoints


def note(recent: Recent, at: float, **facts: Any) -> None:
    for requests in alike([finished(finished=at, **facts)]):
        recent.count(requests)


def test_a_request_counts_in_its_second_for_its_route_and_its_endpoint() -> None:
    recent = Recent()
    usage = Usage(5, 40, 0, 0, 0, UsageSource.FINAL)
    note(recent, 110.9, route="a", endpoint="h:1", first_byte=100.25, usage=usage)
    note(recent, 110.95, route="a", endpoint="h:2", first_byte=101.0, usage=usage)
    note(recent, 112.0, route="b", endpoint="h:1")
    routes, endpoints = minute(recent, 113.5)
    assert routes.keys() == {"a", "b"}
    assert endpoints.keys() == {"h:1", "h:2"}
    assert (routes["a"].requests[-3:], routes["a"].tokens[-3:]) == ([2, 0, 0], [80, 0, 0])
    assert routes["a"].first_byte_s[-3:] == [1.0, None, None]  # the slowest of a second
    assert endpoints["h:1"].requests[-3:] == [1, 0, 1]


def test_what_is_older_than_a_minute_and_the_second_that_runs_do_not_count() -> None:
    recent = Recent()
    for at in (110.0, 111.0, 170.9, 171.0):
        note(recent, at, route="a")
    routes, _ = minute(recent, 171.5)
    assert sum(routes["a"].requests) == 2
    assert (routes["a"].requests[0], routes["a"].requests[-1]) == (1, 1)
    assert minute(recent, 500.0) == ({}, {})


def test_one_that_ended_before_others_that_were_noted_counts_all_the_same() -> None:
    recent = Recent()
    note(recent, 112.0, route="a")
    note(recent, 111.9, route="a")
    assert sum(minute(recent, 114.0)[0]["a"].requests) == 2


@pytest.mark.parametrize(
    ("end", "status", "failed", "refused"),
    [
        (End.COMPLETE, 200, 0, 0),
        (End.REFUSED, 429, 0, 1),
        (End.REFUSED, 503, 1, 0),
        (End.CLIENT_GONE, 200, 0, 0),
        (End.CLIENT_GONE, 0, 0, 0),
        (End.SLOW_CLIENT, 200, 0, 0),
        (End.UPSTREAM_ERROR, 502, 1, 0),
        (End.UPSTREAM_CUT, 200, 1, 0),
        (End.FIRST_BYTE_TIMEOUT, 504, 1, 0),
        (End.IDLE_TIMEOUT, 200, 1, 0),
        (End.DRAINED, 200, 1, 0),
        (End.INTERNAL_ERROR, 500, 1, 0),
    ],
)
def test_a_failure_is_nobodys_wish_and_a_refusal_the_callers(end: End, status: int, failed: int, refused: int) -> None:
    recent = Recent()
    note(recent, 110.0, route="a", end=end, status=status)
    traffic = minute(recent, 111.0)[0]["a"]
    assert (traffic.failed, traffic.refused, len(recent.failures)) == (failed, refused, failed)


def test_latest_failures_have_what_finds_them_in_the_log_and_are_few() -> None:
    recent = Recent()
    for number in range(100):
        facts = {"endpoint": "h:1", "upstream_status": 401, "upstream_error": "no", "error": "upstream_error"}
        note(recent, 110.0, route="a", request_id=f"req_{number}", end=End.UPSTREAM_ERROR, status=502, **facts)
    assert [each.request_id for each in recent.failures] == [f"req_{number}" for number in range(80, 100)]
    latest = recent.failures[-1]
    assert (latest.endpoint, latest.status, latest.upstream_status, latest.duration_s) == ("h:1", 502, 401, 10.0)


def test_memory_is_bounded_whatever_is_asked() -> None:
    """Of a second so many routes have a cell of their own, and of a cell so many times to the first byte are kept."""
    recent = Recent()
    for number in range(1000):
        note(recent, 110.0, route=f"r{number}", endpoint="h:1", first_byte=101.0)
        note(recent, 110.0, route="r0", endpoint="h:1", first_byte=101.0)
    routes, _ = minute(recent, 111.0)
    assert len(routes) == 201
    assert sum(routes[OTHER].requests) == 800
    assert len(routes["r0"].times_s) == 20
    assert len(recent._seconds) == 2


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20))
@examples(100)
def test_quantile_is_a_time_that_was_met(times: list[float]) -> None:
    traffic = Traffic(times_s=times)
    half, most = traffic.first_byte_quantile_s(0.5), traffic.first_byte_quantile_s(0.95)
    assert half in times
    assert most in times
    assert half is not None
    assert sum(each <= half for each in times) * 2 >= len(times)


def test_without_a_first_byte_there_is_no_quantile() -> None:
    assert Traffic().first_byte_quantile_s(0.5) is None
