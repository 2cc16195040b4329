"""Many numbers: exact while they are few, and to a thousandth in flat memory when they are many."""

import random
import statistics

import numpy
import pytest
from hdrh.histogram import HdrHistogram

from loadtest.values import Values, percentile_ms


@pytest.mark.parametrize(("percentile", "enough"), [(50, 1), (90, 10), (99, 100), (99.9, 1000), (100, 1)])
def test_a_percentile_is_exact_and_none_where_so_few_values_do_not_have_it(percentile: float, enough: int) -> None:
    for count in (enough, 3 * enough + 1):
        ordered = sorted(random.Random(count).expovariate(1.0) for _ in range(count))
        assert percentile_ms(ordered, percentile) == pytest.approx(float(numpy.percentile(ordered, percentile)) * 1e3)
    assert percentile_ms([1.0] * (enough - 1), percentile) is None


@pytest.mark.parametrize("kept", [100_000, 1000])
def test_numbers_are_those_of_all_values_however_many_are_kept(kept: int) -> None:
    draw = random.Random(1)
    all_of_them = [draw.lognormvariate(-3, 1) for _ in range(20_000)]
    values = Values(kept)
    values.extend(all_of_them[:7000])
    for each in all_of_them[7000:]:
        values.add(each)
    mean, deviation, highest = values.moments()
    assert values.is_exact is (kept == 100_000)
    assert values.count == 20_000
    assert len(values.exact()) <= kept
    assert mean == pytest.approx(statistics.fmean(all_of_them))
    assert deviation == pytest.approx(statistics.pstdev(all_of_them))
    assert highest == max(all_of_them)
    tolerance = 1e-12 if values.is_exact else 2e-3
    for percentile, value in zip((50, 99, 99.9), values.percentiles_ms((50, 99, 99.9)), strict=True):
        assert value == pytest.approx(float(numpy.percentile(all_of_them, percentile)) * 1e3, rel=tolerance)
    assert values.ranked_ms([0.5])[0] == pytest.approx(statistics.median(all_of_them) * 1e3, rel=2e-3)
    decoded = HdrHistogram.decode(values.histogram().encode())
    assert decoded.get_total_count() == 20_000
    assert decoded.get_value_at_percentile(50) / 1e6 == pytest.approx(statistics.median(all_of_them), rel=2e-3)


def test_nothing_at_all_has_no_percentile() -> None:
    assert Values().moments() == (0.0, 0.0, 0.0)
    assert Values().percentiles_ms([50, 99]) == [None, None]


def test_what_took_longer_than_an_hour_and_what_took_no_time_is_counted_too() -> None:
    assert Values().histogram().get_total_count() == 0
    values = Values()
    values.extend([0.0, 5000.0])
    assert values.histogram().get_total_count() == 2
