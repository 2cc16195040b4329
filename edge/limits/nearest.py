"""Which users and keys are nearest to their limits, for the status page."""

import heapq
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from edge.config.settings import LimitConfig
from edge.limits.admission import Admission
from edge.limits.counters import Counter
from edge.limits.quotas import Quota

_A_STEP: Final = 1000  # counters


class Nearness(NamedTuple):
    """How much of the scarcest part of a limit, `what`, one user or key has used at a route.

    `span` is the time it is of: minute, day or month.
    """

    share: float
    limit: str
    route: str
    whom: str
    what: str
    used: int
    allowed: int
    span: str = "minute"


def find_nearest(admission: Admission, most: int, found: list[Nearness]) -> Iterator[None]:
    """Put the users and keys that have the smallest share left into `found`, in steps.

    Those of minutes come first, `most` at most, then as many of days and months: these may be used up for weeks.
    """
    counters, limits, minute, weight = admission.counted()
    minutes: list[Nearness] = []
    for number, counter in enumerate(counters, 1):
        limit = limits.get(counter.key[0])
        if limit is not None and (near := _scarcest(counter, limit, minute, weight)) is not None:
            _keep(near, most, minutes)
        if number % _A_STEP == 0:
            yield
    periods: list[Nearness] = []
    for number, (quota, _) in enumerate(admission.quotas.counted(), 1):
        limit = limits.get(quota.key[0])
        if limit is not None and (near := _of_period(quota, limit)) is not None:
            _keep(near, most, periods)
        if number % _A_STEP == 0:
            yield
    found += [*sorted(minutes, reverse=True), *sorted(periods, reverse=True)]


def _keep(near: Nearness, most: int, found: list[Nearness]) -> None:
    """Let one be among those found, if there is no nearer one in its place."""
    if len(found) < most:
        heapq.heappush(found, near)
    elif near.share > found[0].share:
        heapq.heapreplace(found, near)


def _of_period(quota: Quota, limit: LimitConfig) -> Nearness | None:
    """Return the part of a day or month of which the largest share is used, None when nothing is."""
    is_day = quota.span == "day"
    parts = (
        (f"requests per {quota.span}", quota.requests, limit.requests_per_day if is_day else None),
        (f"tokens per {quota.span}", quota.tokens, limit.tokens_per_day if is_day else limit.tokens_per_month),
    )
    return _nearest_of(parts, quota.key, quota.span)


def _scarcest(counter: Counter, limit: LimitConfig, minute: int, weight: float) -> Nearness | None:
    """Return the part of a limit of which the largest share is used, None when nothing is."""
    now = counter.minute == minute
    before = now or counter.minute == minute - 1  # of one that was not used since, this minute has nothing

    def slid(current: int, previous: int) -> float:
        return current + previous * weight if now else current * weight if before else 0.0

    parts = (
        ("requests", slid(counter.requests, counter.previous_requests), limit.requests_per_minute),
        ("tokens", slid(counter.tokens, counter.previous_tokens), limit.tokens_per_minute),
        ("at once", counter.running + counter.remote_running, limit.concurrent_requests),
    )
    return _nearest_of(parts, counter.key, "minute")


def _nearest_of(
    parts: Iterable[tuple[str, float, int | None]], key: tuple[str, str, str], span: str
) -> Nearness | None:
    """Return the part of which the largest share is used; each is what it counts, what is used, and of how many."""
    share, best = 0.0, None
    for what, used, allowed in parts:
        if allowed is not None and used / allowed > share:
            share, best = used / allowed, (what, round(used), allowed)
    return None if best is None else Nearness(share, *key, *best, span)
