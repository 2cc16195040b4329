"""What a sweep found: where a server keeps up, its knee, its capacity under limits; and which rate to try next.

A server keeps up with a rate when it ends as many requests as begin. The knee is where throughput over latency, which
Kleinrock named power (Power and deterministic rules of thumb, ICC 1979), is the greatest: beyond it, latency buys
little throughput. The capacity is the highest rate that it keeps up with while a share of the requests meets all
limits, as DistServe (OSDI '24) defines goodput.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

KEEPS_UP: Final = 0.95  # of the offered rate
_MAX_FAILED: Final = 0.01
_PRECISE: Final = 1.1  # between a rate that is served and one that is not
_MAX_STEPS: Final = 20


@dataclass(frozen=True, slots=True)
class Step:
    """One rate of a sweep and what came of it; rates are requests per second.

    `served`: as many ended, the last ones' latency not counted against them. `share` of the requests met the limits; it
    is that of those which did not fail where there are no limits. `void`: the numbers are the generator's.
    """

    rate: float
    served: float
    e2el_ms: float
    share: float
    failed_share: float
    void: bool = False

    @classmethod
    def of(cls, rate: float, numbers: Mapping[str, Any]) -> "Step":
        """Return the step that the numbers of a run tell."""
        completed, failed = numbers["completed"], numbers["failed"]
        requests = max(1, completed + failed)
        e2el_ms = numbers.get("median_e2el_ms", math.inf)
        served = completed / max(numbers["duration"] - e2el_ms / 1e3, 1e-9)
        share = numbers["goodput_share"]
        share = completed / requests if share is None else share
        return cls(rate, served, numbers.get("mean_e2el_ms", math.inf), share, failed / requests, bool(numbers["void"]))

    def is_good(self, slo_share: float) -> bool:
        """Whether the server keeps up, and enough requests meet the limits."""
        return self.served >= KEEPS_UP * self.rate and self.failed_share <= _MAX_FAILED and self.share >= slo_share

    @property
    def power(self) -> float:
        """Throughput over latency."""
        return min(self.served, self.rate) / self.e2el_ms if self.e2el_ms else 0.0


def knee(steps: Sequence[Step]) -> Step | None:
    """Return the step of the greatest power; None when there is none to be had."""
    usable = [each for each in steps if not each.void and each.failed_share <= _MAX_FAILED and each.power]
    return max(usable, key=lambda each: each.power, default=None)


def capacity(steps: Sequence[Step], slo_share: float) -> Step | None:
    """Return the highest good step below the first bad one; None when the lowest is bad already."""
    found = None
    for each in sorted((each for each in steps if not each.void), key=lambda each: each.rate):
        if not each.is_good(slo_share):
            break
        found = each
    return found


def next_rate(first: float, steps: Sequence[Step], slo_share: float) -> float | None:
    """Return the rate to try next: twice as much until it is too much, then between; None when that is known.

    A void step counts as too much: beyond it the generator would be measured.
    """
    if not steps:
        return first
    good = max((each.rate for each in steps if each.is_good(slo_share) and not each.void), default=0.0)
    bad = min((each.rate for each in steps if each.void or not each.is_good(slo_share)), default=math.inf)
    if len(steps) >= _MAX_STEPS or bad <= good:
        return None
    if bad == math.inf:
        return good * 2
    if not good:
        return bad / 4 if bad > first / 100 else None
    return None if bad / good <= _PRECISE else math.sqrt(good * bad)
