"""How late the loop does what is due: all that it holds up waits as long."""

import asyncio
import time
from collections.abc import Iterator
from typing import Final

from edge.telemetry.exposition import Histogram, Histograms

_INTERVAL_S: Final = 0.25
_BOUNDS_S: Final = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)  # uvloop's timers tick in milliseconds


class LoopLag:
    """Sleeps, and counts how much too long that took."""

    def __init__(self) -> None:
        self._lag = Histogram(_BOUNDS_S)

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            due = time.monotonic() + _INTERVAL_S
            await asyncio.sleep(_INTERVAL_S)
            self._lag.observe(max(time.monotonic() - due, 0.0))
            self._lag.fold()

    def metrics(self) -> Iterator[Histograms]:
        """Yield how late it was, four times a second."""
        yield Histograms("edge_event_loop_lag_seconds", "How late the loop woke up.", (), [((), self._lag)])
