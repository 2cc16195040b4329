"""The numbers of finished requests, as a scrape sees them."""

from collections.abc import Iterator
from itertools import groupby

import pytest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from edge.errors import InvalidRequest, RateLimited
from edge.exchange import End
from edge.telemetry.metrics import Metrics
from tests.records import finished as exchange


async def samples(metrics: Metrics) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families((await metrics.render()).decode())
    order = ("route", "status", "end", "le")
    return {
        (each.name, *(each.labels[name] for name in order if name in each.labels)): each.value
        for family in families
        for each in family.samples
    }


async def test_numbers_are_kept_by_route_status_and_end() -> None:
    metrics = Metrics()
    metrics.observe(exchange(route="a", first_byte=100.2, request_bytes=5, response_bytes=7, retries=1, replays=2))
    metrics.observe(exchange(route="a", request_bytes=5, response_bytes=7))
    metrics.observe(exchange(route="a", status=502, end=End.UPSTREAM_ERROR))
    metrics.observe(exchange(status=404, end=End.REFUSED, model="anything at all"))
    found = await samples(metrics)
    assert found["edge_requests_total", "a", "200", "complete"] == 2
    assert found["edge_requests_total", "a", "502", "upstream_error"] == 1
    assert found["edge_requests_total", "", "404", "refused"] == 1
    assert found["edge_request_bytes_total", "a"] == 10
    assert found["edge_response_bytes_total", "a"] == 14
    assert found["edge_retries_total", "a"] == 1
    assert found["edge_replays_total", "a"] == 2
    assert found["edge_request_duration_seconds_count", "a"] == 3
    assert found["edge_request_duration_seconds_sum", "a"] == 7.5
    assert found["edge_time_to_first_byte_seconds_count", "a"] == 1
    assert not any("anything" in part for key in found for part in key)


async def test_histogram_is_cumulative_and_ends_in_infinity() -> None:
    metrics = Metrics()
    for seconds in (0.0, 0.01, 0.02, 2.9, 3.0, 1e6):
        metrics.observe(exchange(route="a", finished=100.0 + seconds))
    found = await samples(metrics)
    buckets = {key[2]: value for key, value in found.items() if key[0] == "edge_request_duration_seconds_bucket"}
    assert list(buckets.values()) == sorted(buckets.values())
    assert (buckets["0.03"], buckets["600.0"], buckets["+Inf"]) == (3, 5, 6)


@pytest.mark.parametrize("route", ['a"b', "a\\b", "a\nb", "模型/*", ""])
async def test_any_route_name_survives_the_exposition(route: str) -> None:
    metrics = Metrics()
    metrics.observe(exchange(route=route))
    assert (await samples(metrics))["edge_requests_total", route, "200", "complete"] == 1


async def test_gauges_are_asked_at_the_scrape() -> None:
    metrics = Metrics()
    value = 1.0

    def now() -> Iterator[Metric]:
        yield GaugeMetricFamily("edge_now", "Now.", value)
        yield CounterMetricFamily("edge_ever", "Ever.", value)

    metrics.gauges.append(now)
    await samples(metrics)
    value = 2.0
    found = await samples(metrics)
    assert (found["edge_now",], found["edge_ever_total",]) == (2, 2)


async def test_routes_past_the_bound_are_summed_under_one_label_and_nothing_is_lost() -> None:
    metrics = Metrics(max_labels=3)
    metrics.observe(exchange(status=404, end=End.REFUSED))
    for number in range(50):
        for _ in range(number % 3 + 1):
            metrics.observe(exchange(route=f"r{number}", request_bytes=5, first_byte=100.2))
    found = await samples(metrics)
    counts = {key[1]: value for key, value in found.items() if key[0] == "edge_requests_total"}
    assert counts == {"": 1, "r0": 1, "r1": 2, "r2": 3, "(other)": 99 - 6}
    assert sum(value for key, value in found.items() if key[0] == "edge_request_bytes_total") == 99 * 5
    assert found["edge_time_to_first_byte_seconds_count", "(other)"] == 93
    metrics.max_labels = 4
    metrics.observe(exchange(route="r49"))
    assert (await samples(metrics))["edge_requests_total", "r49", "200", "complete"] == 1


async def test_limits_past_the_bound_are_summed_under_one_label_and_errors_come_in_parts() -> None:
    metrics = Metrics(max_labels=200)
    metrics.count_error(InvalidRequest("x"))
    for number in range(1000):
        for what in ("requests per minute", "tokens per minute"):
            refusal = RateLimited("x")
            refusal.limit = (f"limit-{number}", what)
            metrics.count_error(refusal)
    parts = [each for each in metrics.families() if each is not None and each.name == "edge_errors"]
    assert isinstance(parts[0], CounterMetricFamily)
    series = [sample for part in parts for sample in part.samples]  # type: ignore[union-attr]
    assert max(len(part.samples) for part in parts) <= 100  # type: ignore[union-attr]
    assert (len(series), sum(sample.value for sample in series)) == (1 + 2 * (200 + 1), 2001)
    others = [sample.value for sample in series if sample.labels["limit"] == "(other)"]
    assert (others, len({sample.labels["limit"] for sample in series})) == ([800, 800], 1 + 200 + 1)


async def test_scrape_goes_in_steps_of_a_hundred_lines_and_each_family_is_one_group() -> None:
    metrics = Metrics()
    for number in range(300):
        metrics.observe(exchange(route=f"r{number}"))

    def many() -> Iterator[Metric | None]:
        family = GaugeMetricFamily("edge_many", "Many.", labels=("at",))
        for number in range(1000):
            family.add_metric((str(number),), number)
        yield None
        yield family

    metrics.gauges.append(many)
    parts = [part async for part in metrics.parts()]
    assert max(part.count(b"\n") for part in parts) <= 8 * 13 + 2
    lines = b"".join(parts).decode().splitlines()
    heads = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(heads) == len(set(heads))
    groups = [name for name, _ in groupby(line.split("{")[0] for line in lines if line.startswith("edge_many"))]
    assert (groups, sum(line.startswith("edge_many{") for line in lines)) == (["edge_many"], 1000)
