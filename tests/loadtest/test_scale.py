"""The command that tells the longest step of the loop: it asks, is answered, and says what is over."""

import argparse
import asyncio
import time
from asyncio.events import Handle

import pytest

from loadtest import scale
from loadtest.scale import Figure, Steps


def test_every_figure_is_told_and_the_exit_code_says_whether_one_is_over(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "_TRIES", 1)
    monkeypatch.setattr(scale, "_HOSTS", 3)
    monkeypatch.setattr(scale, "_START_S", 0.0)
    code = scale.main(argparse.Namespace(routes=5, pools=2, keys=20))
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 9
    assert code == 1
    assert "OVER" in told[0]


def test_longest_step_is_that_of_the_loops_own_thread_and_of_no_pause() -> None:
    async def work() -> float:
        with Steps() as steps:
            await asyncio.sleep(0.001)
            await asyncio.to_thread(sum, range(2_000_000))
            idle_ms = steps.longest_ms
            began = time.thread_time()
            while time.thread_time() - began < 0.05:
                pass
            await asyncio.sleep(0)
        assert idle_ms < 50
        return steps.longest_ms

    before = Handle._run
    assert asyncio.run(work()) >= 50
    assert Handle._run is before


def test_figure_is_over_where_it_exceeds_its_limit() -> None:
    assert [Figure("a", measured, 10.0).is_over for measured in (10.0, 10.1)] == [False, True]
