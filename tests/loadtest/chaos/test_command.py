"""What a run of `chaos` says of faults that do not go as they should."""

import argparse
import asyncio
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from loadtest.chaos import command


async def test_problem_has_its_reason_also_where_an_error_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_FAULT_PATIENCE_S", 0.01)
    monkeypatch.setattr(command, "_PAUSES_S", {"world": (0.0, 0.0)})
    world: Any = SimpleNamespace(ports={}, key="")
    chaos = command.Chaos(world, argparse.Namespace(clients=0, seed=0, requests=None))

    async def hangs(world: Any, chance: Random) -> None:
        await asyncio.Event().wait()

    async def breaks(world: Any, chance: Random) -> None:
        chaos._traffic.is_over.set()
        raise RedisConnectionError

    faults: Any = {"hangs": hangs}
    task = asyncio.get_running_loop().create_task(chaos._lane("world", faults, float("inf")))
    while not chaos._problems:
        await asyncio.sleep(0)
    faults["breaks"] = breaks
    del faults["hangs"]
    await task
    assert {"hangs: not over within 0.01 s", "breaks: ConnectionError"} == set(chaos._problems)
