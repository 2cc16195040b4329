"""What happened when, in memory that stays flat: a run cut into intervals, its busiest second, its most at once."""

import heapq
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
    """A run in intervals of `width_s`, twice as wide when there would be more than 120; their `ttfts` are empty.

    A token counts where the event came that brought it. `tokens_of_second` counts those of each second.
    """

    def __init__(self) -> None:
        self.width_s = _FIRST_WIDTH_S
        self.intervals: list[Interval] = []
        self.tokens_of_second = array("d")

    def add(self, outcome: Outcome) -> None:
        """Take a finished request."""
        last = self._at(outcome.end)
        if outcome.error:
            last.failed += 1
            return
        last.finished += 1
        if outcome.ttft is None:
            self._tokens(outcome.end, outcome.output_tokens)
            return
        share = outcome.output_tokens / (len(outcome.itls) + 1)
        now = outcome.start + outcome.queued + outcome.ttft
        self._tokens(now, share)
        for gap in outcome.itls:
            now += gap
            # Sums of floats may end a hair after the end.
            self._tokens(min(now, outcome.end), share)

    def _tokens(self, at: float, count: float) -> None:
        second = int(at)
        if second >= len(self.tokens_of_second):
            self.tokens_of_second.extend([0.0] * (second + 1 - len(self.tokens_of_second)))
        self.tokens_of_second[second] += count
        self._at(at).tokens += count

    def _at(self, at: float) -> Interval:
        index = int(at / self.width_s)
        while index >= _MAX_INTERVALS:
            self._widen()
            index = int(at / self.width_s)
        while index >= len(self.intervals):
            self.intervals.append(Interval(len(self.intervals) * self.width_s))
        return self.intervals[index]

    def _widen(self) -> None:
        self.width_s *= 2
        wider: list[Interval] = []
        for number, each in enumerate(self.intervals):
            if number % 2 == 0:
                wider.append(each)
                continue
            whole = wider[-1]
            whole.finished += each.finished
            whole.failed += each.failed
            whole.tokens += each.tokens
        self.intervals = wider


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
