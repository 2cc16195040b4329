"""Tasks that have to end, and those that do not."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from edge.tasks import Hung, end_tasks
from edge.valkey import answer_of


def started(work: Coroutine[Any, Any, Any], name: str | None = None) -> "asyncio.Task[Any]":
    return asyncio.get_running_loop().create_task(work, name=name)


async def losing(count: int) -> None:
    """Loses so many cancellations."""
    for _ in range(count):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
    await asyncio.Event().wait()


@asynccontextmanager
async def deaf(name: str | None) -> AsyncIterator["asyncio.Task[Any]"]:
    """A task that no cancellation ends, until the test is over."""
    over = asyncio.Event()

    async def run() -> None:
        while not over.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await over.wait()

    task = started(run(), name)
    await asyncio.sleep(0)
    yield task
    over.set()
    await task


async def test_task_that_loses_cancellations_is_cancelled_until_it_is_done() -> None:
    tasks = [started(losing(count)) for count in (0, 1, 3)]
    await asyncio.sleep(0)
    await end_tasks(tasks)
    assert all(task.cancelled() for task in tasks)


async def test_what_does_not_end_is_named_and_the_rest_has_ended() -> None:
    async with deaf("b") as one, deaf("a") as other, deaf(None) as unnamed:
        well = started(losing(1))
        await asyncio.sleep(0)
        with pytest.raises(Hung) as caught:
            await end_tasks((one, unnamed, other, well), 0.2)
        assert caught.value.names == ("a", "an unnamed task", "b")
        assert well.cancelled()


async def test_error_of_a_task_that_is_ended_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ValueError

    task = started(fail())
    await asyncio.sleep(0)
    await end_tasks((task,))
    del task
    gc.collect()
    assert not caplog.records


async def test_cancellation_that_comes_when_a_command_is_just_done_ends_the_task() -> None:
    """On CPython 3.11 `asyncio.wait_for` loses it, and redis-py waits with that."""
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def command() -> None:
        await asyncio.wait_for(done, 60)

    async def forever() -> None:
        await answer_of(command())
        await asyncio.Event().wait()

    task = started(forever())
    await asyncio.sleep(0)
    done.set_result(None)
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled()


@pytest.mark.parametrize("outcome", [7, OSError("gone")])
async def test_command_of_a_task_that_goes_on_has_its_own_outcome(outcome: object) -> None:
    async def command() -> object:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    if isinstance(outcome, Exception):
        with pytest.raises(OSError, match="gone"):
            await answer_of(command())
    else:
        assert await answer_of(command()) == outcome
