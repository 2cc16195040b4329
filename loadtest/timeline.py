"""What happened when, in memory that stays flat: a run cut into intervals, its busiest second, its most at once."""

import heapq
import itertools
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from loadtest.outcome import Outcome

_FIRST_WIDTH_S: Final = 0.05
_MAX_INTERVALS: Final = 120


@dataclass(slots=True)
class Interval:
    """What happened in one part of a run, `at` from its beginning; `ttfts` are those of requests that began in it."""

    at: float
    finished: int = 0
    failed: int = 0
    tokens: float = 0.0
    ttfts: list[float] = field(default_factory=list)


class Timeline:
    """A run in intervals of `width_s`, twice as wide when there would be more than 120.

    A token counts where the event came that brought it. `tokens_of_second` counts those of each second.
    """

    def __init__(self) -> None:
        self.width_s = _FIRST_WIDTH_S
        self._finished, self._failed, self._tokens = array("d"), array("d"), array("d")
        self.tokens_of_second = array("d")

    def add(self, outcome: Outcome) -> None:
        """Take a finished request."""
        end = outcome.end
        while end / self.width_s >= _MAX_INTERVALS:
            self._widen()
        last = int(end / self.width_s)
        for counts in (self._finished, self._failed, self._tokens):
            _grow(counts, last)
        if outcome.error:
            self._failed[last] += 1
            return
        self._finished[last] += 1
        _grow(self.tokens_of_second, int(end))
        now = end if outcome.ttft is None else outcome.start + outcome.queued + outcome.ttft
        share = outcome.output_tokens / (len(outcome.itls) + 1)
        # Once a token: no call, and no attribute.
        seconds, intervals, width_s = self.tokens_of_second, self._tokens, self.width_s
        for gap in (0.0, *outcome.itls):
            now += gap
            at = now if now < end else end  # sums of floats may end a hair after the end
            seconds[int(at)] += share
            intervals[int(at / width_s)] += share

    def intervals(self) -> list[Interval]:
        """Return the intervals, without first tokens."""
        counts = zip(self._finished, self._failed, self._tokens, strict=True)
        return [Interval(number * self.width_s, int(ok), int(bad), new) for number, (ok, bad, new) in enumerate(counts)]

    def _widen(self) -> None:
        self.width_s *= 2
        self._finished, self._failed, self._tokens = map(_halved, (self._finished, self._failed, self._tokens))


def _grow(counts: "array[float]", last: int) -> None:
    if last >= len(counts):
        counts.extend([0.0] * (last + 1 - len(counts)))


def _halved(counts: "array[float]") -> "array[float]":
    """Return counts of twice as wide intervals."""
    return array("d", map(sum, itertools.zip_longest(counts[::2], counts[1::2], fillvalue=0.0)))


class Live:
    """How many requests were with the server at once, from what each generator process tells.

    A process tells the times of beginnings, and of ends as negative numbers, and up to when it has told everything.
    """

    def __init__(self, processes: int) -> None:
        self._told_until = [0.0] * processes
        self._waiting: list[tuple[float, int]] = []
        self.now = 0
        self.most = 0

    def add(self, process: int, changes: Iterable[float], until: float) -> None:
        """Take what a process tells."""
        for change in changes:
            heapq.heappush(self._waiting, (abs(change), 1 if change > 0 else -1))
        self._told_until[process] = until
        self._count(min(self._told_until))

    def finish(self, process: int) -> None:
        """Take that a process tells no more."""
        self._told_until[process] = float("inf")
        self._count(min(self._told_until))

    def _count(self, until: float) -> None:
        while self._waiting and self._waiting[0][0] <= until:
            self.now += heapq.heappop(self._waiting)[1]
            self.most = max(self.most, self.now)
