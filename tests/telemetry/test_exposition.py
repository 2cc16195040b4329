"""The text that Prometheus reads, held against what prometheus-client writes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from edge.telemetry.exposition import Family, Histogram, Histograms, lines_of


class Fixed:
    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> list[Metric]:
        return [self._family]


def read(text: bytes) -> list[tuple[str, ...]]:
    return [
        (family.type, family.documentation, each.name, repr(sorted(each.labels.items())), repr(float(each.value)))
        for family in text_string_to_metric_families(text.decode())
        for each in family.samples
    ]


def reference(family: Metric) -> list[tuple[str, ...]]:
    registry = CollectorRegistry()
    registry.register(Fixed(family))  # type: ignore[arg-type]  # which has all that is asked of one
    return read(generate_latest(registry))


def ours(family: Family) -> list[tuple[str, ...]]:
    return read(b"".join(lines_of(family)))


@given(st.lists(st.floats(0, 1e7), max_size=50))
def test_histogram_counts_what_is_at_most_each_bound(values: list[float]) -> None:
    histogram = Histogram((0.1, 1.0, 10.0))
    for value in values:
        histogram.observe(value)
    expected = [sum(value <= float(bound) for value in values) for bound in ("0.1", "1", "10", "inf")]
    assert list(histogram.cumulative) == expected


@given(st.tuples(st.text(), st.text()), st.floats())
@pytest.mark.parametrize("kind", [CounterMetricFamily, GaugeMetricFamily])
def test_samples_are_read_as_those_of_prometheus_client(
    kind: type[Metric], labels: tuple[str, str], value: float
) -> None:
    family = kind("edge_things", "What % and \\ are.", labels=("a", "b"))  # type: ignore[call-arg]
    family.add_metric(labels, value)  # type: ignore[attr-defined]
    assert ours(family) == reference(family)


@given(st.text(), st.lists(st.floats(0, 1e3), max_size=9))
def test_histograms_are_read_as_those_of_prometheus_client(label: str, values: list[float]) -> None:
    bounds = (5e-05, 0.25, 1.0, 100.0)
    histogram = Histogram(bounds)
    for value in values:
        histogram.observe(value)
    family = HistogramMetricFamily("edge_s_seconds", "Took.", labels=("route",))
    buckets = [(str(bound), float(count)) for bound, count in zip((*bounds, "+Inf"), histogram.cumulative, strict=True)]
    family.add_metric((label,), buckets, histogram.total)
    found = ours(Histograms("edge_s_seconds", "Took.", ("route",), [((label,), histogram)]))
    assert found == reference(family)


def test_pieces_are_short_and_have_one_head() -> None:
    rows = [((str(number),), Histogram((1.0, 2.0))) for number in range(100)]
    pieces = list(lines_of(Histograms("edge_s_seconds", "Took.", ("route",), rows)))
    assert (max(piece.count(b"\n") for piece in pieces) <= 102, len(pieces) > 4) == (True, True)
    assert b"".join(pieces).count(b"# TYPE") == 1
    assert b"".join(lines_of(Histograms("edge_s_seconds", "Took.", ("route",), rows), with_head=False)).count(b"#") == 0
