"""Days and months of a time zone: a day begins at its first midnight and ends at the next one.

A day has 23 to 25 hours where clocks are changed, a date that was skipped has none (Samoa, 2011-12-30), and a midnight
that is skipped is the moment at which it was (https://peps.python.org/pep-0495/). No clock in here.
"""

from datetime import date, datetime, timedelta, tzinfo
from typing import Final, Literal, NamedTuple

Span = Literal["day", "month"]

_SET_BACK_S: Final = 3600.0  # by which a clock may be set back and what has begun goes on


class Period(NamedTuple):
    """A day or a month, `name` as in 2026-11-30 or 2026-11, in Unix seconds."""

    name: str
    begins_at: float
    ends_at: float


_NEVER: Final = Period("", 0.0, 0.0)


def period_of(span: Span, zone: tzinfo, at: float) -> Period:
    """Return the day or month in which a moment is."""
    today = datetime.fromtimestamp(at, zone).date()
    first = today if span == "day" else today.replace(day=1)
    while True:
        following = first + timedelta(days=1) if span == "day" else (first + timedelta(days=31)).replace(day=1)
        ends_at = _begin_of(following, zone)
        if at < ends_at:
            return Period(first.isoformat()[: 10 if span == "day" else 7], _begin_of(first, zone), ends_at)
        first = following  # a clock that was set back over midnight shows the day before once more


def _begin_of(day: date, zone: tzinfo) -> float:
    return datetime(day.year, day.month, day.day, tzinfo=zone).timestamp()


class Calendar:
    """The day and the month of now in a time zone, worked out once for each.

    What has begun goes on when the clock is set back a little: else what a day had used would be free again.
    """

    def __init__(self, zone: tzinfo) -> None:
        self._zone = zone
        self._current: dict[Span, Period] = {"day": _NEVER, "month": _NEVER}

    def current(self, span: Span, now: float) -> Period:
        """Return the period of now."""
        period = self._current[span]
        if period.begins_at - _SET_BACK_S <= now < period.ends_at:
            return period
        self._current[span] = period_of(span, self._zone, now)
        return self._current[span]

    def written(self, at: float) -> str:
        """Return a moment in RFC 3339, with the offset of the time zone."""
        return datetime.fromtimestamp(at, self._zone).isoformat(timespec="seconds")
