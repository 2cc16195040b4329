"""Sends the requests of a run at their times, from processes of its own, and says what became of each."""

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import queue
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from typing import Final

import uvloop

from loadtest import processes
from loadtest.alarm import Alarm
from loadtest.client import Connections, Sample
from loadtest.results import Outcome
from loadtest.target import Target
from loadtest.workload import Answer, Kept, Scenario, numbered, refusal

_PROGRESS_INTERVAL_S: Final = 0.2
_START_IN_S: Final = 0.1
_READY_INTERVAL_S: Final = 0.002
_CONNECT_AT_ONCE: Final = 100  # fewer than any listener's backlog


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run sends; `times` None asks for all at once. `equal`: every answer must be the first one's copy."""

    target: Target
    scenario: Scenario
    body: bytes
    count: int
    times: Sequence[float] | None
    seed: int
    warmups: int
    max_concurrency: int | None
    timeout_s: float | None
    exact: bool
    equal: bool


@dataclass(slots=True)
class Generated:
    """What became of the requests, by their start.

    Shares of the time: `busy` that the busiest generator ran, `waited` that the one which had to wait most for a core
    did, and `steal` that a hypervisor took.
    """

    outcomes: list[Outcome]
    busy: float = 0.0
    waited: float = 0.0
    steal: float = 0.0

    def add(self, other: "Generated") -> None:
        """Take in what another process saw."""
        self.outcomes += other.outcomes
        self.busy = max(self.busy, other.busy)
        self.waited = max(self.waited, other.waited)
        self.steal = max(self.steal, other.steal)


class GeneratorDied(Exception):
    """A generator process ended before its work was done."""


def generate(plan: Plan, workers: int) -> Generated:
    """Send the requests from so many processes; raises `GeneratorDied`."""
    _allow_descriptors()
    context = multiprocessing.get_context("spawn")
    workers = min(workers, plan.count, plan.max_concurrency or workers)
    shared = _Shared(
        context.Value("q", 0), context.Value("q", 0), context.Value("q", 0), context.Value("d", 0.0), context.Event()
    )
    answers: multiprocessing.Queue[Generated] = context.Queue()
    generators = [
        context.Process(target=_work, args=(plan, index, workers, shared, answers), daemon=True)
        for index in range(workers)
    ]
    for process in generators:
        process.start()
    generated, waiting = Generated([]), workers
    while waiting:
        if not shared.begun.is_set() and shared.ready.value == workers:
            shared.begin_at.value = time.monotonic() + _START_IN_S
            shared.begun.set()
        try:
            share = answers.get(timeout=_PROGRESS_INTERVAL_S if shared.begun.is_set() else _READY_INTERVAL_S)
        except queue.Empty:
            if any(process.exitcode for process in generators):
                raise GeneratorDied("a generator process died; what it wrote stands above") from None
            _progress(shared, plan.count)
        else:
            generated.add(share)
            waiting -= 1
    _progress(shared, plan.count, last=True)
    for process in generators:
        process.join()
    generated.outcomes.sort(key=lambda each: each.start)
    return generated


@dataclass(frozen=True, slots=True)
class _Shared:
    """What the processes of a run tell each other; `begin_at` counts once `begun` is set."""

    ready: "Synchronized[int]"
    finished: "Synchronized[int]"
    failed: "Synchronized[int]"
    begin_at: "Synchronized[float]"
    begun: Event


def _progress(shared: _Shared, total: int, last: bool = False) -> None:
    if sys.stderr.isatty():
        done, failed = shared.finished.value, shared.failed.value
        filled = 40 * done // total
        bar = "#" * filled + "." * (40 - filled)
        text = f"\r[{bar}] {done}/{total}" + (f", {failed} failed" if failed else "")
        print(text, end="\n" if last else "", file=sys.stderr, flush=True)


def _work(plan: Plan, index: int, workers: int, shared: _Shared, answers: "multiprocessing.Queue[Generated]") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and ends its daemons
    _allow_descriptors()
    answers.put(uvloop.run(_send_share(plan, index, workers, shared)))


async def _send_share(plan: Plan, index: int, workers: int, shared: _Shared) -> Generated:
    return await _Worker(plan, index, workers, shared).send_all()


def _allow_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Worker:
    """One process's part of a run: every `workers`th request, from `index` on."""

    def __init__(self, plan: Plan, index: int, workers: int, shared: _Shared) -> None:
        self._plan = plan
        self._shared = shared
        self._numbers = range(index, plan.count, workers)
        self._warmups = len(range(index, plan.warmups, workers))
        self._raw = plan.target.request(plan.scenario.kind, plan.body)
        self._connections = Connections(plan.target.address())
        self._places: asyncio.Semaphore | None = None
        if plan.max_concurrency:
            self._places = asyncio.Semaphore(len(range(index, plan.max_concurrency, workers)))
        self._outcomes: list[Outcome] = []
        self._digest: int | None = None
        self._begun = 0.0

    async def send_all(self) -> Generated:
        """Return what became of the requests, and what sending them took."""
        plan, shared = self._plan, self._shared
        alarm = Alarm()
        await self._warm()
        with shared.ready.get_lock():
            shared.ready.value += 1
        await asyncio.to_thread(shared.begun.wait)
        self._begun = shared.begin_at.value
        cpu_s, waited_s = time.process_time(), processes.waited_s([os.getpid()])
        steal_s, all_s = processes.steal_and_total_s()
        async with asyncio.TaskGroup() as group:
            for number in self._numbers:
                # Made before its time has come: numbering a body of 10 MB takes a millisecond.
                raw = self._raw if plan.equal else numbered(self._raw, (plan.seed << 20) + number)
                at = self._begun + (plan.times[number] if plan.times is not None else 0.0)
                await alarm.until(at)
                group.create_task(self._one(raw, at))
        elapsed_s = time.monotonic() - self._begun
        cpu_s, waited_s = time.process_time() - cpu_s, processes.waited_s([os.getpid()]) - waited_s
        steal_s_now, all_s_now = processes.steal_and_total_s()
        steal = (steal_s_now - steal_s) / max(all_s_now - all_s, 1e-9)
        alarm.close()
        self._connections.close()
        return Generated(self._outcomes, cpu_s / elapsed_s, waited_s / elapsed_s, steal)

    async def _warm(self) -> None:
        if self._warmups:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._warmups):
                    group.create_task(self._warm_up(), name="warm-up")
        if self._plan.times is None:  # or a thousand handshakes would be the first thing that is measured
            wanted = min(len(self._numbers), self._plan.max_concurrency or len(self._numbers))
            for first in range(self._warmups, wanted, _CONNECT_AT_ONCE):
                try:
                    await self._connections.warm(min(_CONNECT_AT_ONCE, wanted - first))
                except OSError:
                    return  # its requests will tell

    async def _warm_up(self) -> None:
        async with self._places or contextlib.nullcontext():
            await self._connections.request(self._raw, timeout_s=self._plan.timeout_s)

    async def _one(self, raw: bytes, at: float) -> None:
        plan, places = self._plan, self._places
        ready = time.monotonic()
        if places is not None:
            await places.acquire()
        queued = time.monotonic() - ready if places is not None else 0.0
        kept = Kept()
        try:
            sample = await self._connections.request(raw, kept, at, timeout_s=plan.timeout_s)
        finally:
            if places is not None:
                places.release()
        outcome = self._outcome(sample, kept, at, queued)
        self._outcomes.append(outcome)
        with self._shared.finished.get_lock():
            self._shared.finished.value += 1
            self._shared.failed.value += bool(outcome.error)

    def _outcome(self, sample: Sample, kept: Kept, at: float, queued: float) -> Outcome:
        plan = self._plan
        open_loop = plan.times is not None
        begun = sample.sent - sample.connect_s
        since = at if open_loop else begun
        lag = max(0.0, sample.sent - at - queued - sample.connect_s) if open_loop else 0.0
        outcome = Outcome(
            since - self._begun, sample.finished - self._begun, begun - self._begun, lag, queued, sample.error
        )
        if sample.error:
            return outcome
        if not sample.ok:
            outcome.error = refusal(sample.status, kept.whole)
            return outcome
        answer = Answer(plan.scenario.stream, plan.scenario.output_len if plan.exact else None)
        kept.tell(answer)
        outcome.error = answer.end()
        if plan.equal and not outcome.error:
            self._digest = answer.digest if self._digest is None else self._digest
            outcome.error = "" if answer.digest == self._digest else "an answer differs from the first"
        if answer.choice_times:
            outcome.vllm_ttft = answer.choice_times[0] - since
            outcome.e2el = answer.choice_times[-1] - since
        else:
            outcome.e2el = sample.finished - since
        if answer.content_times:
            outcome.ttft = answer.content_times[0] - since
            outcome.itls = [after - before for before, after in itertools.pairwise(answer.content_times)]
            outcome.is_counted = answer.is_counted
        outcome.input_tokens, outcome.output_tokens = answer.input_tokens, answer.output_tokens
        return outcome
