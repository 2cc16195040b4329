"""The live view of a run: one line on a terminal, rewritten twice a second.

A library would draw more, and its import takes three times as long as an interpreter does to start.
"""

import shutil
import statistics
import sys
from collections import deque
from typing import Final

from loadtest.outcome import Outcome
from loadtest.results import Tally

_BAR: Final = 24
_RECENT: Final = 200  # first tokens of which the median is shown
_WINDOW_S: Final = 5.0


class View:
    """What a run is doing, for who watches it; nothing where standard error is no terminal.

    `count` conversations or `duration_s` seconds are all of it, where that is known.
    """

    def __init__(self, tally: Tally, count: int | None, duration_s: float | None) -> None:
        self._tally = tally
        self._count, self._duration_s = count, duration_s
        self._ttfts: deque[float] = deque(maxlen=_RECENT)
        self._passed: deque[tuple[float, int, int]] = deque()
        self._is_shown = sys.stderr.isatty()

    def add(self, outcome: Outcome) -> None:
        """Take a finished request."""
        if outcome.ttft is not None:
            self._ttfts.append(outcome.ttft)

    def show(self, elapsed_s: float, last: bool = False) -> None:
        """Rewrite the line; the `last` one stays."""
        if self._is_shown:
            width = shutil.get_terminal_size().columns - 1
            text = self.line(elapsed_s)[:width]
            print(f"\r{text:<{width}}", end="\n" if last else "", file=sys.stderr, flush=True)

    def line(self, elapsed_s: float) -> str:
        """Return the line: how far, how fast over the last seconds, how soon, how many at once, and what failed."""
        tally = self._tally
        finished = tally.completed + tally.failed
        self._passed.append((elapsed_s, finished, tally.output_tokens))
        while elapsed_s - self._passed[0][0] > _WINDOW_S:
            self._passed.popleft()
        at, before, tokens_before = self._passed[0]
        span_s = max(elapsed_s - at, 1e-9)
        by_time = elapsed_s / self._duration_s if self._duration_s else 0.0
        share = min(1.0, max(by_time, finished / self._count if self._count else 0.0))
        bar = "#" * round(_BAR * share)
        parts = [
            f"[{bar:.<{_BAR}}] {finished:,}" + (f"/{self._count:,}" if self._count else ""),
            f"{elapsed_s:.0f} s",
            f"{(finished - before) / span_s:,.1f} req/s",
            f"{(tally.output_tokens - tokens_before) / span_s:,.0f} tok/s",
        ]
        if self._ttfts:
            parts.append(f"TTFT {statistics.median(self._ttfts) * 1e3:,.0f} ms")
        parts += [f"{tally.live.now:,} live", f"{tally.failed:,} failed"]
        return "  ".join(parts)
