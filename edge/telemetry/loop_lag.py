"""How late the loop does what is due, which all that it holds up waits; and how far the machine's clock was set."""

import asyncio
import time
from collections.abc import Iterator
from typing import Final

from prometheus_client.core import GaugeMetricFamily

from edge.telemetry.exposition import Family, Histogram, Histograms

_INTERVAL_S: Final = 0.25
_BOUNDS_S: Final = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)  # uvloop's timers tick in milliseconds


class LoopLag:
    """Sleeps, and counts how much too long that took."""

    def __init__(self) -> None:
        self._lag = Histogram(_BOUNDS_S)
        self._begun_s = time.time() - time.monotonic()

    @property
    def clock_step_s(self) -> float:
        """How far the clock of the machine was set since the start; the steady one goes on as it was."""
        return time.time() - time.monotonic() - self._begun_s

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            due = time.monotonic() + _INTERVAL_S
            await asyncio.sleep(_INTERVAL_S)
            self._lag.observe(max(time.monotonic() - due, 0.0))
            self._lag.fold()

    def metrics(self) -> Iterator[Family]:
        """Yield how late it was, four times a second, and how far the clock was set."""
        yield GaugeMetricFamily("edge_clock_step_seconds", "How far the clock was set.", round(self.clock_step_s, 3))
        yield Histograms("edge_event_loop_lag_seconds", "How late the loop woke up.", (), [((), self._lag)])
