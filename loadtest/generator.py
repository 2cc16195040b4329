"""Sends the requests of a run from processes of its own, and adds up what became of them while it goes on."""

import asyncio
import contextlib
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import uvloop

from loadtest.channel import Batch, Done, Failed, Ready, frame, receive
from loadtest.live import View
from loadtest.outcome import Outcome
from loadtest.results import Tally
from loadtest.worker import BEGIN, Plan

_SHOW_INTERVAL_S: Final = 0.5
_START_IN_S: Final = 0.1
_STREAM_LIMIT: Final = 1 << 20


@dataclass(slots=True)
class Generated:
    """What a run came to, and what sending it took.

    Shares of the time: `busy` that the busiest generator ran, `waited` that the one which had to wait most for a core
    did, and `steal` that a hypervisor took. `stopped` is the signal that ended it early, 0 for none; `unfinished`
    requests were given up then. `problem`: why a process ended before its work was done.
    """

    tally: Tally
    busy: float = 0.0
    waited: float = 0.0
    steal: float = 0.0
    unfinished: int = 0
    stopped: int = 0
    problem: str = ""


def default_workers(cores: int) -> int:
    """Return how many processes send: one a core, but for one core that this process, or a server, may have."""
    return max(1, cores - 1)


def generate(
    plan: Plan,
    workers: int,
    goodput: Mapping[str, float] | None = None,
    finished: Callable[[Outcome], None] = lambda outcome: None,
) -> Generated:
    """Send the requests from so many processes; `finished` hears of each that has come to its end.

    SIGINT and SIGTERM end it early, with what has finished by then; a second one ends it at once, by
    `KeyboardInterrupt`.
    """
    count = plan.arrivals.count
    workers = min(workers, count or workers, plan.max_concurrency or workers)
    return uvloop.run(_Generation(plan, workers, Tally(goodput, workers), finished).run())


class _Generation:
    def __init__(self, plan: Plan, workers: int, tally: Tally, finished: Callable[[Outcome], None]) -> None:
        self._plan, self._workers = plan, workers
        self._tally, self._finished = tally, finished
        self._generated = Generated(tally)
        self._view = View(tally, plan.arrivals.count, plan.duration_s)
        self._processes: list[asyncio.subprocess.Process] = []
        self._ready = 0
        self._begin_at = 0.0

    async def run(self) -> Generated:
        loop = asyncio.get_running_loop()
        main = asyncio.current_task()
        assert main is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop, number, main)
        try:
            self._processes = [await self._start(index) for index in range(self._workers)]
            async with asyncio.TaskGroup() as group:
                showing = group.create_task(self._show(), name="showing")
                await asyncio.gather(*(self._follow(index) for index in range(self._workers)))
                showing.cancel()
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            self._end_all()
            for process in self._processes:
                await process.wait()
        if self._begin_at:
            self._view.show(time.monotonic() - self._begin_at, last=True)
        return self._generated

    async def _start(self, index: int) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "loadtest.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_STREAM_LIMIT,
            start_new_session=True,  # a terminal's Ctrl-C is for this process alone
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert process.stdin is not None
        process.stdin.write(frame(pickle.dumps((self._plan, index, self._workers))))
        return process

    async def _follow(self, index: int) -> None:
        """Take what a process tells until it ends."""
        process, generated = self._processes[index], self._generated
        assert process.stdout is not None
        is_done = False
        while (message := await receive(process.stdout)) is not None:
            match message:
                case Ready():
                    self._ready += 1
                    if self._ready == self._workers and not generated.stopped:
                        self._begin()
                case Batch():
                    for outcome in message.outcomes:
                        self._tally.add(outcome)
                        self._view.add(outcome)
                        self._finished(outcome)
                    self._tally.live.add(index, message.changes, message.until)
                case Done():
                    is_done = True
                    generated.busy = max(generated.busy, message.busy)
                    generated.waited = max(generated.waited, message.waited)
                    generated.steal = max(generated.steal, message.steal)
                    generated.unfinished += message.unfinished
                case Failed():
                    generated.problem = f"a generator process cannot begin: {message.problem}"
        self._tally.live.finish(index)
        if not is_done and not generated.stopped:
            generated.problem = generated.problem or "a generator process died; what it wrote stands above"
            self._end_all()

    def _begin(self) -> None:
        self._begin_at = time.monotonic() + _START_IN_S
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(frame(BEGIN.pack(self._begin_at)))

    def _stop(self, number: int, main: "asyncio.Task[object]") -> None:
        if self._generated.stopped:
            for process in self._processes:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            main.cancel()
        self._generated.stopped = number
        self._end_all()

    def _end_all(self) -> None:
        """Let every process stop: its input ends."""
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()

    async def _show(self) -> None:
        while True:
            await asyncio.sleep(_SHOW_INTERVAL_S)
            if self._begin_at:
                self._view.show(time.monotonic() - self._begin_at)
