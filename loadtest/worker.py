"""A generator process: sends its share of a run's requests at their times, and tells what became of each.

The plan comes on its standard input, then the time to begin; the end of that input stops it. So nothing goes on when
the command is gone.
"""

import asyncio
import contextlib
import gc
import itertools
import os
import pickle
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import orjson
import uvloop

from loadtest import processes
from loadtest.alarm import Alarm
from loadtest.answer import Answer, Kept, refusal
from loadtest.arrivals import Arrivals
from loadtest.channel import Batch, Done, Failed, Ready, Teller, Told, read_frame
from loadtest.client import Connections, Sample
from loadtest.dialects import DIALECTS, Message
from loadtest.outcome import Outcome
from loadtest.target import Target
from loadtest.workload import Source, Turn, whole

_TELL_INTERVAL_S: Final = 0.1
_TOLD_AT_ONCE: Final = 64  # a batch takes the loop a fraction of a millisecond
_CONNECT_AT_ONCE: Final = 100  # fewer than any listener's backlog
_MOST_CONNECTED: Final = 10_000  # ahead of time
BEGIN: Final = struct.Struct(">d")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run sends, and how; requests go to the `targets` in turn.

    `members` are added to every body; `duration_s`: nothing begins later. `exact`: so many tokens of our own upstream
    are expected; `equal`: every answer must be the first one's copy.
    """

    targets: Sequence[Target]
    kind: str
    stream: bool
    model: str
    members: dict[str, object]
    source: Source
    arrivals: Arrivals
    duration_s: float | None = None
    warmups: int = 0
    max_concurrency: int | None = None
    timeout_s: float | None = None
    exact: int | None = None
    equal: bool = False

    def raw(self, target: Target, messages: Sequence[Message], turn: Turn) -> bytes:
        """Return the request of a turn, `messages` being all that was said so far."""
        asked = DIALECTS[self.kind].ask(self.model, messages, turn.output_len, self.stream)
        return whole(target.head(self.kind), orjson.dumps({**asked, **turn.members, **self.members}))

    def answer(self) -> Answer:
        """Return what reads an answer."""
        return Answer(self.stream, self.exact, DIALECTS[self.kind])


class Worker:
    """One process's part of a run: every `of`-th conversation, from `index` on; raises `OSError`."""

    def __init__(self, plan: Plan, index: int, of: int, tell: Callable[[Told], None]) -> None:
        self._plan = plan
        self._tell_all = tell
        self._index, self._of = index, of
        self._warmups = len(range(index, plan.warmups, of))
        self._connections = [Connections(each.address()) for each in plan.targets]
        self._places: asyncio.Semaphore | None = None
        self._room = len(range(index, plan.max_concurrency, of)) if plan.max_concurrency else 0
        if self._room:
            self._places = asyncio.Semaphore(self._room)
        self._outcomes: list[Outcome] = []
        self._changes: list[float] = []
        self._digest: int | None = None
        self._begun = 0.0
        self._live = self._unfinished = 0

    def _share(self) -> Iterator[tuple[int, float]]:
        return self._plan.arrivals.share(self._index, self._of)

    async def warm(self) -> None:
        """Send the warm-ups, and open the connections of what will begin at once."""
        if self._warmups:
            plan = self._plan
            turn = plan.source.conversation(0)[0]
            raw = plan.raw(plan.targets[0], turn.messages, turn)
            async with asyncio.TaskGroup() as group:
                for _ in range(self._warmups):
                    group.create_task(self._warm_up(raw), name="warm-up")
        if self._plan.arrivals.is_open:
            return
        # Or a thousand handshakes would be the first thing that is measured.
        share = sum(1 for _ in itertools.islice(self._share(), self._room or _MOST_CONNECTED))
        each_wants = -(-share // len(self._connections))
        for connections in self._connections:
            for first in range(self._warmups, each_wants, _CONNECT_AT_ONCE):
                try:
                    await connections.warm(min(_CONNECT_AT_ONCE, each_wants - first))
                except OSError:
                    return  # its requests will tell

    async def _warm_up(self, raw: bytes) -> None:
        async with self._places or contextlib.nullcontext():
            await self._connections[0].request(raw, timeout_s=self._plan.timeout_s)

    async def send_all(self, begin_at: float, stop: asyncio.Event) -> Done:
        """Send until all is sent or `stop` is set; return what that took."""
        self._begun = begin_at
        cpu_s, waited_s = time.process_time(), processes.waited_s([os.getpid()])
        steal_s, all_s = processes.steal_and_total_s()
        async with asyncio.TaskGroup() as group:
            telling = group.create_task(self._tell_on(), name="telling")
            sending = group.create_task(self._send(), name="sending")
            stopping = group.create_task(self._stop(stop, sending), name="stopping")
            await asyncio.wait([sending])
            stopping.cancel()
            telling.cancel()
        self._unfinished += self._live
        elapsed_s = max(time.monotonic() - self._begun, 1e-9)
        cpu_s, waited_s = time.process_time() - cpu_s, processes.waited_s([os.getpid()]) - waited_s
        steal_s_now, all_s_now = processes.steal_and_total_s()
        self._tell()
        for each in self._connections:
            each.close()
        steal = (steal_s_now - steal_s) / max(all_s_now - all_s, 1e-9)
        return Done(cpu_s / elapsed_s, waited_s / elapsed_s, steal, self._unfinished)

    async def _stop(self, stop: asyncio.Event, sending: "asyncio.Task[None]") -> None:
        await stop.wait()
        sending.cancel()

    async def _send(self) -> None:
        plan, places = self._plan, self._places
        until = None if plan.duration_s is None else self._begun + plan.duration_s
        full_until = 0.0  # the time at which a wait for a place ended
        alarm = Alarm()
        try:
            async with asyncio.TaskGroup() as group:
                for number, after_s in self._share():
                    target = number % len(plan.targets)
                    turns = plan.source.conversation(number)
                    # Made before its time has come: a body of 10 MB takes milliseconds.
                    raw = plan.raw(plan.targets[target], turns[0].messages, turns[0])
                    at = self._begun + after_s
                    if until is not None and at >= until:
                        break
                    await alarm.until(at)
                    if places is not None:
                        is_full = places.locked()
                        await places.acquire()
                        full_until = time.monotonic() if is_full else full_until
                    if until is not None and time.monotonic() >= until:
                        break
                    if not plan.arrivals.is_open and plan.duration_s is not None:
                        at = full_until = time.monotonic()  # whoever follows one that has ended waits for nothing
                    queued = max(0.0, full_until - at)
                    group.create_task(self._converse(turns, target, raw, at, queued))
        finally:
            alarm.close()

    async def _converse(self, turns: Sequence[Turn], target: int, raw: bytes, at: float, queued: float) -> None:
        """Ask turn by turn, each with all that was said before, until one fails."""
        plan = self._plan
        said: list[Message] = []
        try:
            for place, turn in enumerate(turns):
                said += turn.messages
                if place:
                    await asyncio.sleep(turn.delay_s)
                    at, queued = time.monotonic(), 0.0
                    if plan.duration_s is not None and at >= self._begun + plan.duration_s:
                        return
                    raw = plan.raw(plan.targets[target], said, turn)
                outcome, text = await self._ask(raw, target, at, queued)
                outcome.target, outcome.turn = target, place
                self._outcomes.append(outcome)
                if len(self._outcomes) >= _TOLD_AT_ONCE:
                    self._tell()
                if outcome.error:
                    return
                said.append({"role": "assistant", "content": text})
        finally:
            if self._places is not None:
                self._places.release()

    async def _ask(self, raw: bytes, target: int, at: float, queued: float) -> tuple[Outcome, str]:
        kept = Kept()
        self._live += 1
        self._changes.append(time.monotonic() - self._begun)
        sample = await self._connections[target].request(raw, kept, at, timeout_s=self._plan.timeout_s)
        self._changes.append(self._begun - time.monotonic())
        self._live -= 1
        return self._outcome(sample, kept, at, queued)

    def _outcome(self, sample: Sample, kept: Kept, at: float, queued: float) -> tuple[Outcome, str]:
        plan = self._plan
        is_open = plan.arrivals.is_open
        begun = sample.sent - sample.connect_s
        since = at + queued if is_open else begun
        lag = max(0.0, begun - since)
        start = at - self._begun if is_open else begun - self._begun - queued
        outcome = Outcome(start, sample.finished - self._begun, begun - self._begun, lag, queued, sample.error)
        if sample.error:
            return outcome, ""
        if not sample.ok:
            outcome.error = refusal(sample.status, kept.whole)
            return outcome, ""
        answer = plan.answer()
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
        return outcome, answer.text

    async def _tell_on(self) -> None:
        while True:
            await asyncio.sleep(_TELL_INTERVAL_S)
            self._tell()

    def _tell(self) -> None:
        self._tell_all(Batch(self._outcomes, self._changes, time.monotonic() - self._begun))
        self._outcomes, self._changes = [], []


async def _work() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    teller = await Teller.open(sys.stdout.buffer)
    planned = await read_frame(reader)
    if planned is None:
        return
    plan, index, of = pickle.loads(planned)  # of the command that started this process
    try:
        worker = Worker(plan, index, of, teller.tell)
        await worker.warm()
        gc.freeze()  # what is there stays: a collection in the middle of a run need not look at it
        teller.tell(Ready())
        begin = await read_frame(reader)
        if begin is not None:
            stop = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                hearing = group.create_task(_hear_the_end(reader, stop), name="hearing")
                teller.tell(await worker.send_all(BEGIN.unpack(begin)[0], stop))
                hearing.cancel()
    except OSError as error:
        teller.tell(Failed(str(error)))
    await teller.close()


async def _hear_the_end(reader: asyncio.StreamReader, stop: asyncio.Event) -> None:
    await reader.read()
    stop.set()


def main() -> None:
    """Be one process of a run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command hears it, and ends this process by its input
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    uvloop.run(_work())


if __name__ == "__main__":
    main()
