"""How late the loop is, by a clock that the test turns."""

import asyncio

import pytest

from edge.telemetry import loop_lag
from edge.telemetry.exposition import lines_of
from edge.telemetry.loop_lag import LoopLag


def test_clock_that_is_set_shows_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    unix = [1000.0]
    monkeypatch.setattr(loop_lag.time, "time", lambda: unix[0])
    monkeypatch.setattr(loop_lag.time, "monotonic", lambda: 5.0)
    lag = LoopLag()
    unix[0] -= 3600
    family, _ = lag.metrics()
    assert b"edge_clock_step_seconds -3600.0\n" in b"".join(lines_of(family))


async def test_what_holds_the_loop_up_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now, woken = [100.0], asyncio.Event()
    sleeps = iter((0.25, 0.25 + 0.04, 10.0))

    async def sleep(seconds: float) -> None:
        took = next(sleeps)
        if took == 10.0:
            woken.set()
            await asyncio.Event().wait()
        now[0] += took

    monkeypatch.setattr(loop_lag.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(loop_lag.asyncio, "sleep", sleep)
    lag = LoopLag()
    running = asyncio.get_running_loop().create_task(lag.run())
    await woken.wait()
    running.cancel()
    _, family = lag.metrics()
    lines = b"".join(lines_of(family)).decode().splitlines()
    assert 'edge_event_loop_lag_seconds_bucket{le="0.025"} 1' in lines
    assert 'edge_event_loop_lag_seconds_bucket{le="0.05"} 2' in lines
