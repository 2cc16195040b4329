"""Days and months, whatever clocks do at midnight."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.config.zones import zone_of
from edge.limits.periods import Calendar, Period, Span, period_of

DAY_S = 86_400
ZONES = (
    "UTC", "Asia/Shanghai", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe",
    "America/Sao_Paulo", "Africa/Cairo", "Asia/Beirut", "Pacific/Apia", "America/St_Johns", "Asia/Tehran",
)  # fmt: skip


def at(zone: str, *moment: int) -> float:
    return datetime(*moment, tzinfo=zone_of(zone)).timestamp()  # type: ignore[misc, arg-type]


@given(st.sampled_from(ZONES), st.integers(0, 2_500_000_000), st.sampled_from(["day", "month"]))
def test_every_moment_is_in_one_period_and_periods_follow_each_other(zone: str, moment: int, span: Span) -> None:
    of = zone_of(zone)
    period = period_of(span, of, moment)
    assert period.begins_at <= moment < period.ends_at
    assert period_of(span, of, period.begins_at) == period
    assert period_of(span, of, period.ends_at - 1) == period
    following = period_of(span, of, period.ends_at)
    assert following.begins_at == period.ends_at
    assert following.name > period.name
    days = (period.ends_at - period.begins_at) / DAY_S
    assert (0.9 if span == "day" else 27) < days < (1.1 if span == "day" else 32)
    shown = datetime.fromtimestamp(period.begins_at, of)
    assert shown.date().isoformat().startswith(period.name)


@pytest.mark.parametrize(
    ("zone", "moment", "hours"),
    [
        ("Europe/Berlin", (2026, 3, 29, 12), 23),
        ("Europe/Berlin", (2026, 10, 25, 12), 25),
        ("America/Sao_Paulo", (2018, 11, 4, 12), 23),  # there is no midnight
        ("Australia/Lord_Howe", (2026, 4, 5, 12), 24.5),
        ("America/St_Johns", (2005, 10, 30, 12), 25),  # at a minute past midnight it is the day before once more
        ("Asia/Shanghai", (2026, 11, 30, 12), 24),
    ],
)
def test_a_day_is_as_long_as_clocks_make_it(zone: str, moment: tuple[int, ...], hours: float) -> None:
    period = period_of("day", zone_of(zone), at(zone, *moment))
    assert (period.ends_at - period.begins_at) / 3600 == hours


def test_a_day_that_was_skipped_has_no_length() -> None:
    before = period_of("day", ZoneInfo("Pacific/Apia"), at("Pacific/Apia", 2011, 12, 29, 12))
    after = period_of("day", ZoneInfo("Pacific/Apia"), before.ends_at)
    assert (before.name, after.name) == ("2011-12-29", "2011-12-31")


def test_what_has_begun_goes_on_when_the_clock_is_set_back_a_little() -> None:
    calendar, begins_at = Calendar(UTC), at("UTC", 2026, 12, 1)
    today = calendar.current("day", begins_at)
    assert calendar.current("day", begins_at - 5) is today
    assert calendar.current("month", begins_at).name == "2026-12"
    yesterday = calendar.current("day", begins_at - 7200)
    assert yesterday == Period("2026-11-30", begins_at - DAY_S, begins_at)
    assert calendar.written(begins_at) == "2026-12-01T00:00:00+00:00"


def test_zone_that_nobody_knows_is_refused_with_what_to_write() -> None:
    for wrong in ("Asia/Shangai", "../etc/passwd", "", "/etc/localtime", "a\0b"):
        with pytest.raises(ValueError, match="Asia/Shanghai"):
            zone_of(wrong)
