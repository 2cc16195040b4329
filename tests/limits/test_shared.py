"""One limit over several processes, through a real server."""

import asyncio
import bisect
import json
import logging
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from edge.config.settings import LimitConfig
from edge.errors import RateLimited
from edge.limits.admission import Admission, Permit
from edge.limits.counters import Counter
from edge.limits.shared import PREFIX, SharedLimits
from edge.tasks import end_tasks
from edge.valkey import connect, disconnect
from tests.keybackends import PATIENCE_S, ValkeyServer

ROUTE = "public/deepseek-r1"
USER = "u-1100a15812cc"
KEY = f'{PREFIX}["standard","{ROUTE}","{USER}"]'
ROOT = Path(__file__).parent.parent.parent


class RecordedLimits(SharedLimits):
    """Shared limits that remember when their merges began and ended."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.times: list[tuple[float, float]] = []
        self.ended = asyncio.Event()

    async def merge(self) -> None:
        begun = time.monotonic()
        try:
            await super().merge()
            self.times.append((begun, time.monotonic()))
        finally:
            self.ended.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until this is so at the end of a merge, be it a failed one."""
        while not condition():
            self.ended.clear()
            await self.ended.wait()

    async def merge_again(self) -> None:
        """Wait for a merge that begins after this call, and for its answer."""
        begins_after = time.monotonic()
        await self.until(lambda: bool(self.times) and self.times[-1][0] >= begins_after)

    async def lost(self) -> None:
        """Wait until the server is known to be down."""
        await self.until(lambda: bool(self.outage))


@dataclass
class Process:
    """An admission with its shared limits, as a process has them."""

    admission: Admission
    shared: RecordedLimits
    client: Any
    admitted: list[float] = field(default_factory=list)  # when

    def admit(self, tokens: int = 0, user: str = USER) -> Permit:
        permit = self.admission.admit(ROUTE, ("standard",), user, "key_1", tokens)
        self.admitted.append(time.monotonic())
        return permit

    def admits(self) -> bool:
        try:
            self.admit().charge(0)
        except RateLimited:
            return False
        return True

    @property
    def counter(self) -> Counter:
        return self.admission._counters["standard", ROUTE, USER]

    @property
    def counts(self) -> tuple[int, int]:
        """Requests and tokens of all processes in two minutes."""
        counter = self.counter
        return counter.previous_requests + counter.requests, counter.previous_tokens + counter.tokens


def limits(**numbers: int) -> dict[str, LimitConfig]:
    return {"standard": LimitConfig("standard", requests_per_minute=numbers.get("requests"),
                                    tokens_per_minute=numbers.get("tokens"),
                                    concurrent_requests=numbers.get("places"))}  # fmt: skip


@asynccontextmanager
async def processes(
    url: str, count: int, clock: Callable[[], float] = time.time, timeout_s: float = PATIENCE_S, **numbers: int
) -> AsyncIterator[list[Process]]:
    """Processes that wait for their server as long as it takes on a busy machine, where none is to be given up."""
    made = []
    for _ in range(count):
        client = connect(url, timeout_s)
        admission = Admission(limits(**numbers), clock)
        made.append(Process(admission, RecordedLimits(client, admission), client))
    try:
        async with asyncio.timeout(2 * PATIENCE_S):
            yield made
    finally:
        for process in made:
            await disconnect(process.client)


@asynccontextmanager
async def merging(*members: Process) -> AsyncIterator[None]:
    """The loop of each process runs; all are ended and leave, as a server does."""
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(each.shared.run()) for each in members]
    try:
        yield
    finally:
        await end_tasks(tasks)
        for each in members:
            await each.shared.leave()


async def all_agree(*members: Process) -> None:
    """Let each tell and then hear of everything, also of what it did not touch."""
    for process in [*members, *members]:
        process.shared._joined = False
        await process.shared.merge()


# --- what is counted


async def test_counts_of_all_processes_are_exact_after_they_merged(valkey: ValkeyServer) -> None:
    draw = random.Random(7)
    async with processes(valkey.url, 3, requests=10**6, tokens=10**9, places=10**6) as members:
        used, running = 0, []
        for _ in range(40):
            process = draw.choice(members)
            running += [process.admit(tokens=draw.randrange(1000)) for _ in range(draw.randrange(20))]
            draw.shuffle(running)
            for permit in running[draw.randrange(10) :]:
                tokens = draw.randrange(2000)
                permit.charge(tokens)
                used += tokens
                running.remove(permit)
            await draw.choice(members).shared.merge()
        for permit in running:
            permit.charge(3)
        used += 3 * len(running)
        requests = sum(len(process.admitted) for process in members)
        await all_agree(*members)
        assert [process.counts for process in members] == [(requests, used)] * 3
        assert [process.counter.running + process.counter.remote_running for process in members] == [0, 0, 0]


async def test_many_counters_are_told_in_batches(valkey: ValkeyServer) -> None:
    async with processes(valkey.url, 2, requests=10) as (one, other):
        for number in range(500):
            for process in (one, other):
                process.admit(user=f"u-{number}").charge(0)
        await all_agree(one, other)
        told = [each.previous_requests + each.requests for each in one.admission._counters.values()]
        assert told == [2] * 500


async def test_concurrent_requests_of_all_processes_are_one_limit(valkey: ValkeyServer) -> None:
    async with processes(valkey.url, 3, places=3) as members:
        permits = [process.admit() for process in members]
        await all_agree(*members)
        for process in members:
            with pytest.raises(RateLimited, match="limit 3, used 3"):
                process.admit()
        permits[0].charge(0)
        await all_agree(*members)
        members[1].admit()
        await all_agree(*members)
        assert not members[0].admits()


async def test_reply_that_is_lost_changes_no_count(valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has applied what it was told, and nobody knows; so it is told again."""
    async with processes(valkey.url, 2, requests=100, tokens=1000) as (one, other):
        await one.shared.merge()
        evalsha = one.client.evalsha

        async def lost(*args: Any) -> bytes:
            await evalsha(*args)
            raise RedisConnectionError("Connection closed by server.")

        for _ in range(5):
            one.admit(tokens=10).charge(10)
            monkeypatch.setattr(one.client, "evalsha", lost)
            with pytest.raises(RedisConnectionError):
                await one.shared.merge()
            monkeypatch.setattr(one.client, "evalsha", evalsha)
            await one.shared.merge()
        other.admit().charge(0)
        await all_agree(one, other)
        assert one.counts == other.counts == (6, 50)


async def test_minutes_are_those_of_the_server(valkey: ValkeyServer) -> None:
    """Processes whose clocks are wrong by hours count in the same minutes."""

    def skewed(skew_s: float) -> Callable[[], float]:
        return lambda: time.time() + skew_s

    async with AsyncExitStack() as stack:
        members = []
        for skew_s in (-7200.0, 0.0, 5400.0):
            [process] = await stack.enter_async_context(processes(valkey.url, 1, skewed(skew_s), requests=100))
            process.admit().charge(0)  # before anything is known of the server
            await process.shared.merge()
            assert abs(process.admission.clock_offset_s + skew_s) < 1
            process.admit().charge(0)
            members.append(process)
        await all_agree(*members)
        seconds, _ = await members[0].client.time()
        for process in members:
            assert abs(process.counter.minute - seconds // 60) <= 1
        # The clock of the first was set forward: what it had counted two hours ago was gone.
        assert [process.counts[0] for process in members] == [5, 5, 5]


async def test_script_adds_up_what_is_of_the_minutes_that_count(valkey: ValkeyServer) -> None:
    async with processes(valkey.url, 1, requests=10**6, tokens=10**6, places=10**6) as (process,):
        await process.shared.merge()
        process.admit().charge(0)
        minute = process.counter.minute
        now = time.time() + process.admission.clock_offset_s
        fields = {
            "same": f"{minute} 1 20 300 4000 5 {now:.3f}",
            "idle since the last": f"{minute - 1} 10 200 70000 70000 0 {now - 60:.3f}",
            "idle for long": f"{minute - 2} 70000 70000 70000 70000 0 {now - 130:.3f}",
            "gone": f"{minute - 5} 70000 70000 70000 70000 9 {now - 300:.3f}",
            "dead": f"{minute} 1 0 0 0 70 {now - 3.5:.3f}",
            "a moment ahead": f"{minute + 1} 2 1 4 2 1 {now:.3f}",
            "rubbish": "hello",
        }
        with valkey.client() as client:
            client.hset(KEY, mapping=fields)
            await process.shared.merge()
            counter = process.counter
            assert (counter.requests, counter.tokens) == (1 + 1 + 1 + 2 + 4, 20 + 1 + 2)
            assert (counter.previous_requests, counter.previous_tokens) == (300 + 10, 4000 + 200)
            assert counter.remote_running == 5 + 1
            left = {name.decode() for name in client.hkeys(KEY)}
            assert 120 < int(client.ttl(KEY)) <= 180
        assert left - fields.keys() == {process.shared._process}
        assert fields.keys() - left == {"gone"}


async def test_counts_of_a_newer_edge_are_left_alone_and_told_once(
    valkey: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with processes(valkey.url, 1, requests=10) as (process,):
        process.admit()
        await process.shared.merge()
        newer = {f"p{number}": f"v2 {process.counter.minute} 5 5 5 5 5 5 {time.time():.3f}" for number in range(2)}
        with valkey.client() as client:
            client.hset(KEY, mapping=newer)
            for _ in range(2):
                process.admit()
                await process.shared.merge()
            kept = {name.decode(): value.decode() for name, value in client.hgetall(KEY).items()}
        assert newer.items() <= kept.items()
        assert process.counter.remote_running == 0
        assert [each.getMessage() for each in caplog.records if "another version" in each.getMessage()] == [
            "shared.redis: limits of another version of the edge are not counted here: run one version"
        ]


# --- what is held


def bound_of(admitted: list[list[float]], merges: list[list[tuple[float, float]]], allowed: int) -> int:
    """The most that may have been admitted, by the formula of `limits/admission.py` and by who knew what when."""
    from tests.limits.test_admission import overshoot_bound  # which the processes below need not wait for

    everyone = sorted(at for each in admitted for at in each)
    last = []
    for number, ats in enumerate(admitted):
        heard = [begun for begun, ended in merges[number] if ended < ats[-1]]
        knew = []
        for other, theirs in enumerate(merges):
            if other != number:
                told = [begun for begun, ended in theirs if heard and ended < heard[-1]]
                knew.append(bisect.bisect_left(everyone, told[-1]) if told else 0)
        last.append((bisect.bisect_right(everyone, ats[-1]), min(knew)))
    # What slid out of the window meanwhile was free again.
    slid = allowed * (everyone[-1] - everyone[0]) / 60
    return overshoot_bound(allowed, last) + int(slid) + 1


async def try_until_refused(process: Process, pause: Callable[[], Awaitable[object]]) -> None:
    """Ask as fast as the loop goes, until four merges after the first refusal."""
    refused_at = None
    while refused_at is None or len(process.shared.times) < refused_at + 4:
        if not process.admits() and refused_at is None:
            refused_at = len(process.shared.times)
        await pause()


async def test_processes_that_try_as_fast_as_they_can_keep_to_the_bound(valkey: ValkeyServer) -> None:
    allowed = 40_000
    async with processes(valkey.url, 3, requests=allowed) as members, merging(*members):
        for process in members:
            await process.shared.merge_again()
        async with asyncio.TaskGroup() as group:
            for process in members:
                group.create_task(try_until_refused(process, lambda: asyncio.sleep(0)))
        total = sum(len(process.admitted) for process in members)
        bound = bound_of([each.admitted for each in members], [each.shared.times for each in members], allowed)
        assert allowed <= total <= bound


async def child(url: str, allowed: int) -> None:
    """What each of three processes does; its parent says when."""
    async with processes(url, 1, requests=allowed) as (process,), merging(process):
        await process.shared.merge_again()
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        await try_until_refused(process, lambda: asyncio.sleep(0.0005))
    print(json.dumps([process.admitted, process.shared.times]))


async def test_three_processes_of_the_system_hold_one_limit(valkey: ValkeyServer) -> None:
    allowed = 1500
    code = f"import asyncio; from {__name__} import child; asyncio.run(child({valkey.url!r}, {allowed}))"
    children = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            limit=2**24,
        )
        for _ in range(3)
    ]  # fmt: skip
    try:
        async with asyncio.timeout(2 * PATIENCE_S):
            for each in children:
                assert each.stdout is not None
                assert await each.stdout.readline() == b"ready\n"
            answers = await asyncio.gather(*(each.communicate(b"go\n") for each in children))
    finally:
        for each in children:
            if each.returncode is None:
                each.kill()
                await each.wait()
    told = [json.loads(out) for out, _ in answers]
    admitted, merges = [each[0] for each in told], [each[1] for each in told]
    assert allowed <= sum(map(len, admitted)) <= bound_of(admitted, merges, allowed)
    with valkey.client() as client:
        running = [value.split()[5] for value in client.hvals(KEY)]
    assert running == [b"0"] * 3


# --- what fails


async def test_requests_go_on_while_the_server_is_gone_and_agree_when_it_is_back_without_its_data(
    valkey: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with processes(valkey.url, 3, requests=10**6, tokens=10**9) as members:
        stop, served = asyncio.Event(), asyncio.Event()

        async def requests(process: Process) -> None:
            while not stop.is_set():
                process.admit(tokens=10).charge(7)
                served.set()
                await asyncio.sleep(0)

        async with merging(*members), asyncio.TaskGroup() as group:
            for process in members:
                group.create_task(requests(process))
            for process in members:
                await process.shared.merge_again()
            valkey.stop()
            for process in members:
                await process.shared.lost()
            before = [len(process.admitted) for process in members]
            while any(len(each.admitted) < count + 100 for each, count in zip(members, before, strict=True)):
                served.clear()
                await served.wait()
            valkey.start()
            for process in members:
                await process.shared.merge_again()
            stop.set()
        await all_agree(*members)
        total = sum(len(process.admitted) for process in members)
        assert [process.counts for process in members] == [(total, 7 * total)] * 3
    lines = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in lines] == [logging.ERROR] * 3 + [logging.WARNING] * 3
    assert "shared.redis is unavailable, limits count what this process serves" in lines[0][1]
    assert lines[-1][1] == "shared.redis answers again, limits are shared"


async def test_idle_counters_are_told_anew_to_a_server_that_lost_its_data(valkey: ValkeyServer) -> None:
    """Nothing of them was touched since, yet another process has to know."""
    async with processes(valkey.url, 2, requests=10, places=10) as (one, other):
        one.admit()
        await one.shared.merge()
        valkey.stop()
        valkey.start()
        async with merging(one):  # a connection that was idle may come back without an error
            await one.shared.merge_again()
            await one.shared.merge_again()
            other.admit()
            await all_agree(other)
            assert other.counts[0] == 2
            assert other.counter.remote_running == 1


async def test_server_that_says_nothing_holds_nobody_up(valkey: ValkeyServer, caplog: pytest.LogCaptureFixture) -> None:
    async with processes(valkey.url, 1, timeout_s=1.0, requests=10) as (process,), merging(process):
        await process.shared.merge_again()
        valkey.signal(signal.SIGSTOP)
        while not process.shared.outage:
            process.admits()
            await asyncio.sleep(0)
        assert not process.admits()
        valkey.signal(signal.SIGCONT)
        await process.shared.merge_again()
    assert len(caplog.records) == 2


async def test_server_that_is_not_there_yet_is_waited_for(valkey: ValkeyServer) -> None:
    valkey.stop()
    async with processes(valkey.url, 1, requests=1) as (process,), merging(process):
        await process.shared.lost()
        assert process.admits()
        assert not process.admits()
        valkey.start()
        await process.shared.until(lambda: not process.shared.outage)
    assert process.shared.merges >= 1


async def test_process_that_dies_gives_its_places_back(valkey: ValkeyServer) -> None:
    async with processes(valkey.url, 2, places=2) as (dead, alive):
        dead.admit()
        dead.admit()
        await dead.shared.merge()
        async with merging(alive):
            alive.admits()
            await alive.shared.merge_again()
            assert not alive.admits()
            await alive.shared.until(alive.admits)
            seconds, microseconds = await alive.client.time()
            value = await alive.client.hget(KEY, dead.shared._process)
            assert seconds + microseconds / 1e6 - float(value.split()[6]) >= 3


async def test_places_that_are_merely_held_are_told_again(valkey: ValkeyServer) -> None:
    """Nothing happens to a long stream, and it must not be taken for that of a dead process."""
    async with processes(valkey.url, 2, places=1) as (one, other), merging(one, other):
        one.admit()
        told: set[bytes] = set()
        while len(told) < 3:
            await one.shared.merge_again()
            told |= {value for value in [await one.client.hget(KEY, one.shared._process)] if value}
        assert {value.split()[5] for value in told} == {b"1"}
        assert other.admits()  # it used the counter never before
        await other.shared.merge_again()
        assert not other.admits()


async def test_process_that_ends_in_order_leaves_nothing_running(valkey: ValkeyServer) -> None:
    async with processes(valkey.url, 2, requests=10, places=1) as (one, other):
        async with merging(one):
            permit = one.admit()
            await one.shared.merge_again()
        permit.charge(0)
        assert other.admits()
        await other.shared.merge()
        assert other.counts[0] == 2
        assert other.admits()


async def test_end_is_not_held_up_by_a_server_that_is_gone(valkey: ValkeyServer) -> None:
    async with processes(valkey.url, 1, requests=10, places=1) as (process,):
        async with merging(process):
            process.admit()
            await process.shared.merge_again()
            valkey.stop()
        async with merging(process):
            await process.shared.lost()


async def test_cancellation_that_the_client_swallows_ends_it_all_the_same(valkey: ValkeyServer) -> None:
    """redis-py takes a cancellation while it connects for a failure to connect."""
    async with processes(valkey.url, 1, requests=10) as (process,):
        waiting = asyncio.Event()

        async def swallowed(script: str) -> None:
            waiting.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise RedisConnectionError("Connect call failed") from None

        process.client.script_load = swallowed
        async with merging(process):
            await waiting.wait()
        assert not process.shared.outage


async def test_client_that_cannot_even_disconnect_is_an_outage_like_any_other() -> None:
    class Stuck:
        connection_pool: "Stuck"

        async def script_load(self, script: str) -> None:
            raise RedisConnectionError("gone")

        async def disconnect(self, inuse_connections: bool) -> None:
            disconnected.set()
            raise RedisTimeoutError("Timed out closing connection")

    client, disconnected = Stuck(), asyncio.Event()
    client.connection_pool = client
    shared = SharedLimits(client, Admission({}, time.time))  # type: ignore[arg-type]  # what it uses of one
    running = asyncio.get_running_loop().create_task(shared.run())
    for _ in range(2):
        await disconnected.wait()
        disconnected.clear()
    assert shared.outage
    await end_tasks((running,))
