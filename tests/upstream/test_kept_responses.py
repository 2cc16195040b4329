"""Who keeps which response, in one process and in several over a real server."""

import asyncio
import gc
import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.exceptions import ConnectionError as RedisConnectionError

from edge.errors import UpstreamUnavailable
from edge.tasks import end_tasks
from edge.upstream import kept_responses
from edge.upstream.kept_responses import LIFETIME_S, PREFIX, Keeper, KeptResponses
from edge.valkey import connect, disconnect
from tests.conftest import soon
from tests.keybackends import NO_REDIS, PATIENCE_S, ValkeyServer, saying
from tests.profiles import examples

USER = "u-1100a15812cc"
OTHER_USER = "u-2200b26923dd"
ID = "resp_68a1f0c2b4c08190a3b1d2e3f4a5b6c7"
KEEPER = Keeper("public/deepseek-r1", "10.0.0.1:8000")
INSTANCE = Keeper(f"{USER}/qwen2", "")


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def gauges(kept: KeptResponses) -> dict[str, float]:
    return {sample.name: sample.value for metric in kept.metrics() for sample in metric.samples}


# --- one process


async def not_told(kept: KeptResponses, response_id: str) -> bool:
    """Whether nobody can say who keeps a response: that is a 503, since it may well be kept."""
    with pytest.raises(UpstreamUnavailable):
        await kept.find(USER, response_id)
    return True


async def nobody(kept: KeptResponses, response_id: str) -> bool:
    """Whether it is certain that nobody keeps a response."""
    try:
        return await kept.find(USER, response_id) is None
    except UpstreamUnavailable:
        return False


async def test_a_response_is_known_at_once_to_its_user_alone() -> None:
    kept = KeptResponses(Clock())
    kept.remember(USER, ID, KEEPER)
    kept.remember(USER, "resp_2", INSTANCE)
    assert await kept.find(USER, ID) == KEEPER
    assert await kept.find(USER, "resp_2") == INSTANCE
    assert await kept.find(OTHER_USER, ID) is None
    assert await kept.find(USER, "resp_3") is None
    assert gauges(kept) == {"edge_responses_known": 2}


async def test_what_was_deleted_is_not_known_any_more() -> None:
    kept = KeptResponses(Clock())
    kept.remember(USER, ID, KEEPER)
    kept.forget(OTHER_USER, ID)
    assert await kept.find(USER, ID) == KEEPER
    kept.forget(USER, ID)
    assert await kept.find(USER, ID) is None


async def test_an_id_that_comes_again_is_where_it_was_made_last() -> None:
    kept = KeptResponses(Clock())
    kept.remember(USER, ID, INSTANCE)
    kept.remember(USER, ID, KEEPER)
    assert await kept.find(USER, ID) == KEEPER
    assert gauges(kept) == {"edge_responses_known": 1}


@pytest.mark.parametrize("bad", ["", "a b", "a/b", "resp_\n", "résumé", "a" * 129, '"', "..\\", "\ud800", "a\0"])
async def test_an_id_that_no_upstream_should_give_is_not_remembered(bad: str) -> None:
    kept = KeptResponses(Clock())
    kept.remember(USER, bad, KEEPER)
    assert await kept.find(USER, bad) is None
    assert gauges(kept) == {"edge_responses_known": 0}
    kept.forget(USER, bad)


@pytest.mark.parametrize("good", [ID, "chatcmpl-1", "a", "0.1_-", "a" * 128])
async def test_ids_as_upstreams_give_them_are_remembered(good: str) -> None:
    kept = KeptResponses(Clock())
    kept.remember(USER, good, KEEPER)
    assert await kept.find(USER, good) == KEEPER


async def test_a_response_is_known_for_a_day() -> None:
    clock = Clock()
    kept = KeptResponses(clock)
    kept.remember(USER, ID, KEEPER)
    clock.now += LIFETIME_S - 1
    assert await kept.find(USER, ID) == KEEPER
    clock.now += 1
    assert await kept.find(USER, ID) is None


async def test_expired_responses_leave_a_few_at_each_new_one() -> None:
    clock = Clock()
    kept = KeptResponses(clock)
    for number in range(10):
        kept.remember(USER, f"resp_{number}", KEEPER)
    clock.now += LIFETIME_S
    counts = []
    for number in range(10, 22):
        kept.remember(USER, f"resp_{number}", KEEPER)
        counts.append(gauges(kept)["edge_responses_known"])
    assert counts == [9, 8, 7, 6, 5, 6, 7, 8, 9, 10, 11, 12]


async def test_one_user_takes_no_place_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_responses, "MAX_OF_USER", 2)
    kept = KeptResponses(Clock())
    kept.remember(OTHER_USER, ID, KEEPER)
    for number in range(9):
        kept.remember(USER, f"resp_{number}", KEEPER)
    found = [await kept.find(USER, f"resp_{number}") is not None for number in range(9)]
    assert found == [False] * 7 + [True] * 2
    assert await kept.find(OTHER_USER, ID) == KEEPER


async def test_the_oldest_go_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_responses, "MAX_KNOWN", 3)
    kept = KeptResponses(Clock())
    for number in (1, 2, 1, 3, 4):  # the first is new again before the others come
        kept.remember(USER, f"resp_{number}", KEEPER)
    assert [await kept.find(USER, f"resp_{number}") is not None for number in (1, 2, 3, 4)] == [True, False, True, True]


@examples(60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, LIFETIME_S // 3)), max_size=40))
def test_what_is_found_is_what_was_remembered_last_and_within_a_day(steps: list[tuple[bool, int, int]]) -> None:
    async def check() -> None:
        clock = Clock()
        kept = KeptResponses(clock)
        made: dict[int, tuple[Keeper, float]] = {}
        for count, (remembers, number, later_s) in enumerate(steps):
            clock.now += later_s
            if remembers:
                made[number] = Keeper("m", str(count)), clock.now
                kept.remember(USER, f"resp_{number}", made[number][0])
            else:
                made.pop(number, None)
                kept.forget(USER, f"resp_{number}")
            for each in range(6):
                keeper, at = made.get(each, (None, 0.0))
                expected = keeper if clock.now < at + LIFETIME_S else None
                assert await kept.find(USER, f"resp_{each}") == expected

    asyncio.run(check())


# --- several processes


class WatchedResponses(KeptResponses):
    """Wakes the test whenever it was written, or could not be."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.writes = 0
        self._wrote = asyncio.Event()

    async def _write(self) -> bool:
        try:
            return await super()._write()
        finally:
            self.writes += 1
            self._wrote.set()

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self._wrote.clear()
            await self._wrote.wait()

    async def written(self) -> None:
        """Wait until Redis has all of it."""
        await self.until(lambda: not self._queued and not self.outage)


@dataclass
class Process:
    """What a process has."""

    kept: WatchedResponses
    client: Any
    tasks: "list[asyncio.Task[None]]" = field(default_factory=list)

    def run(self) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(self.kept.run())
        self.tasks.append(task)
        return task


@asynccontextmanager
async def processes(url: str, count: int, timeout_s: float = 2.0, *, run: bool = True) -> AsyncIterator[list[Process]]:
    clients = [connect(url, timeout_s) for _ in range(count)]
    made = [Process(WatchedResponses(Clock(), client), client) for client in clients]
    try:
        async with asyncio.timeout(2 * PATIENCE_S):
            for process in made:
                if run:
                    process.run()
            yield made
    finally:
        for process in made:
            await end_tasks(process.tasks)
            await process.kept.close()
            await disconnect(process.client)


async def test_every_process_finds_what_one_remembered(valkey: ValkeyServer) -> None:
    async with processes(valkey.url, 2) as (one, other):
        one.kept.remember(USER, ID, KEEPER)
        other.kept.remember(USER, "resp_2", INSTANCE)
        await one.kept.written()
        await other.kept.written()
        assert await other.kept.find(USER, ID) == KEEPER
        assert await one.kept.find(USER, "resp_2") == INSTANCE
        assert await other.kept.find(OTHER_USER, ID) is None
        with valkey.client() as client:
            name = f'{PREFIX}["{USER}","{ID}"]'
            assert client.get(name) == b'["public/deepseek-r1","10.0.0.1:8000"]'
            assert LIFETIME_S - 60 < int(client.ttl(name)) <= LIFETIME_S
        assert gauges(one.kept) == {"edge_responses_known": 1, "edge_shared_responses_up": 1}


async def test_what_one_deleted_no_other_finds(valkey: ValkeyServer) -> None:
    async with processes(valkey.url, 2) as (one, other):
        one.kept.remember(USER, ID, KEEPER)
        await one.kept.written()
        other.kept.forget(USER, ID)
        assert await other.kept.find(USER, ID) is None  # though Redis has not heard yet
        await other.kept.written()
        assert await other.kept.find(USER, ID) is None
        with valkey.client() as client:
            assert client.dbsize() == 0


async def test_what_changes_while_it_is_written_is_written_again(
    valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with processes(valkey.url, 2, run=False) as (one, other):
        ask, held, go = one.kept._ask, asyncio.Event(), asyncio.Event()

        async def hold(command: Any) -> Any:
            answer = await ask(command)
            held.set()
            await go.wait()
            return answer

        monkeypatch.setattr(one.kept, "_ask", hold)
        one.kept.remember(USER, ID, INSTANCE)
        one.kept.remember(USER, "resp_2", INSTANCE)
        one.run()
        await soon(held.wait())
        one.kept.remember(USER, ID, KEEPER)
        one.kept.forget(USER, "resp_2")
        go.set()
        await one.kept.written()
        assert await other.kept.find(USER, ID) == KEEPER
        assert await other.kept.find(USER, "resp_2") is None


async def test_more_than_one_batch_is_written(valkey: ValkeyServer) -> None:
    async with processes(valkey.url, 2) as (one, other):
        for number in range(350):
            one.kept.remember(USER, f"resp_{number}", KEEPER)
        await one.kept.written()
        found = [await other.kept.find(USER, f"resp_{number}") for number in range(350)]
        assert found == [KEEPER] * 350


@pytest.mark.parametrize(
    "value", [b"", b"[", b"[1,2]", b'["m"]', b'{"model":"m"}', b'["\xff","m"]', b"null", b"[" * 9999]
)
async def test_what_somebody_else_wrote_is_left_alone_and_told_and_no_outage(
    valkey: ValkeyServer, value: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A newer edge, say: a process of it can tell. That nobody keeps the response would be a guess."""
    async with processes(valkey.url, 1, run=False) as (process,):
        with valkey.client() as client:
            client.set(f'{PREFIX}["{USER}","{ID}"]', value)
            assert [await not_told(process.kept, ID) for _ in range(2)] == [True, True]
            assert client.get(f'{PREFIX}["{USER}","{ID}"]') == value
        assert not process.kept.outage
        assert len(caplog.records) == 1


# --- what fails


def lines_of(caplog: pytest.LogCaptureFixture) -> Iterator[tuple[int, str]]:
    return ((each.levelno, each.getMessage()) for each in caplog.records)


async def test_a_server_that_is_gone_costs_what_others_know_and_gets_it_when_it_is_back(
    valkey: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "edge.upstream.kept_responses")
    async with processes(valkey.url, 2) as (one, other):
        one.kept.remember(USER, ID, KEEPER)
        await one.kept.written()
        assert await other.kept.find(USER, ID) == KEEPER
        valkey.stop()
        for number in range(3):
            one.kept.remember(USER, f"resp_{number}", KEEPER)
        assert await not_told(other.kept, ID)
        assert await one.kept.find(USER, ID) == KEEPER
        await one.kept.until(lambda: one.kept.outage)
        assert other.kept.outage
        assert gauges(other.kept)["edge_shared_responses_up"] == 0
        one.kept.forget(USER, "resp_0")
        assert [await not_told(other.kept, f"resp_{number}") for number in range(3)] == [True] * 3
        valkey.start()
        await one.kept.written()
        await other.kept.written()
        found = [await other.kept.find(USER, each) for each in ("resp_0", "resp_1", "resp_2", ID)]
        assert found == [None, KEEPER, KEEPER, None]  # the server lost what it had
    lines = list(lines_of(caplog))
    assert sorted(level for level, _ in lines) == [logging.INFO] * 2 + [logging.WARNING] * 2
    assert any("shared.redis is unavailable, a response is found by the process alone" in line for _, line in lines)
    assert lines[-1][1] == "shared.redis answers again, a response is found by every process"


async def test_a_server_that_says_nothing_is_asked_no_more_until_it_answers(
    valkey: ValkeyServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request may wait for a second; those behind it do not wait at all."""
    monkeypatch.setattr(kept_responses, "_TIMEOUT_S", 0.2)
    async with processes(valkey.url, 1, timeout_s=30.0) as (process,):
        await process.kept.until(lambda: process.kept.writes)
        valkey.signal(signal.SIGSTOP)
        try:
            assert await not_told(process.kept, ID)
            assert process.kept.outage.reason == "no answer"
            asking = asyncio.get_running_loop().create_task(not_told(process.kept, ID))
            await asyncio.sleep(0)
            assert asking.done(), "it waits"
        finally:
            valkey.signal(signal.SIGCONT)
        await process.kept.written()
    assert [level for level, _ in lines_of(caplog)] == [logging.WARNING]


async def test_what_is_queued_is_bounded_and_the_oldest_are_dropped(
    valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_responses, "_MAX_QUEUED", 5)
    async with processes(valkey.url, 2, run=False) as (one, other):
        for number in range(8):
            one.kept.remember(USER, f"resp_{number}", KEEPER)
        assert len(one.kept._queued) == 5
        one.run()
        await one.kept.written()
        found = [await other.kept.find(USER, f"resp_{number}") for number in range(8)]
        assert found == [None] * 3 + [KEEPER] * 5
        assert [await one.kept.find(USER, f"resp_{number}") for number in range(8)] == [KEEPER] * 8


@pytest.mark.parametrize("answer", NO_REDIS)
async def test_something_that_is_no_redis_is_an_outage_or_knows_nothing(answer: bytes) -> None:
    async with saying(answer) as url, processes(url, 1, timeout_s=0.5) as (process,):
        process.kept.remember(USER, ID, KEEPER)
        await process.kept.until(lambda: process.kept.outage or not process.kept._queued)
        if process.kept.outage or not await nobody(process.kept, "resp_2"):
            assert await not_told(process.kept, "resp_2")
        assert await process.kept.find(USER, ID) == KEEPER


async def test_connections_that_were_closed_meanwhile_cost_nothing(
    valkey: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The client finds out about each of them only when it is used."""
    ids = [f"resp_{number}" for number in range(10)]
    async with processes(valkey.url, 2) as (one, other):
        for each in ids:
            one.kept.remember(USER, each, KEEPER)
        await one.kept.written()
        for _ in range(3):
            found = await asyncio.gather(*(other.kept.find(USER, each) for each in ids))
            assert found == [KEEPER] * len(ids)
            with valkey.client() as client:
                client.client_kill_filter(_type="normal", skipme=True)
        one.kept.remember(USER, ID, KEEPER)
        await one.kept.written()
        assert await other.kept.find(USER, ID) == KEEPER
    assert not caplog.records


# --- the end


async def test_the_last_responses_of_a_process_are_written_at_its_end(valkey: ValkeyServer) -> None:
    async with processes(valkey.url, 2) as (one, other):
        await one.kept.until(lambda: one.kept.writes)
        one.kept.remember(USER, ID, KEEPER)
        await end_tasks(one.tasks)
        await one.kept.close()
        assert await other.kept.find(USER, ID) == KEEPER


async def test_a_write_that_is_cancelled_half_way_is_done_again(
    valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with processes(valkey.url, 2, run=False) as (one, other):
        ask, asking = one.kept._ask, asyncio.Event()

        async def hang(command: Any) -> Any:
            monkeypatch.setattr(one.kept, "_ask", ask)
            asking.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(one.kept, "_ask", hang)
        one.kept.remember(USER, ID, KEEPER)
        task = one.run()
        await soon(asking.wait())
        await end_tasks((task,))
        await one.kept.close()
        assert await other.kept.find(USER, ID) == KEEPER


async def test_a_cancellation_ends_it_whenever_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """redis-py loses some of those that come while it connects to a server that says nothing."""
    monkeypatch.setattr(kept_responses, "_TIMEOUT_S", 0.05)
    server = await asyncio.get_running_loop().create_server(asyncio.Protocol, "127.0.0.1", 0)
    async with server:
        for turns in range(40):
            url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
            async with processes(url, 1, timeout_s=0.5) as (process,):
                process.kept.remember(USER, ID, KEEPER)
                for _ in range(turns):
                    await asyncio.sleep(0)
                process.tasks[0].cancel()
                await asyncio.wait(process.tasks)
                assert process.tasks[0].cancelled()
                await asyncio.gather(*process.kept._asking, return_exceptions=True)


@pytest.mark.parametrize("runs", [True, False])
async def test_a_command_that_cannot_be_cancelled_holds_nobody_up(
    valkey: ValkeyServer, runs: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with processes(valkey.url, 1, run=False) as (process,):
        asking, released = asyncio.Event(), asyncio.Event()

        async def deaf(*_: object) -> None:
            asking.set()
            while not released.is_set():
                with suppress(asyncio.CancelledError):
                    await released.wait()
            raise ConnectionError("too late")

        class Deaf:
            def set(self, *_: object, ex: int) -> None: ...

            execute = get = deaf

            def pipeline(self, transaction: bool) -> "Deaf":
                return self

        monkeypatch.setattr(process.kept, "_client", Deaf())
        try:
            if runs:
                process.kept.remember(USER, ID, KEEPER)
                waiting: asyncio.Task[Any] = process.run()
            else:
                waiting = asyncio.get_running_loop().create_task(process.kept.find(USER, ID))
            await asking.wait()
            waiting.cancel()
            await asyncio.wait((waiting,))
            assert waiting.cancelled()
        finally:
            released.set()
            commands = tuple(process.kept._asking)
            await asyncio.wait(commands)
        assert not process.kept._asking
        del commands
        gc.collect()
        assert "never retrieved" not in caplog.text


async def test_a_cancellation_that_the_client_takes_for_a_lost_connection_tries_nothing_again(
    valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with processes(valkey.url, 1, run=False) as (process,):
        tries, asking = 0, asyncio.Event()

        async def swallowed(name: str) -> None:
            nonlocal tries
            tries += 1
            asking.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise RedisConnectionError("Connect call failed") from None

        monkeypatch.setattr(process.client, "get", swallowed)
        finding = asyncio.get_running_loop().create_task(process.kept.find(USER, ID))
        await asking.wait()
        [command] = process.kept._asking
        finding.cancel()
        await asyncio.wait((finding, command))
        assert finding.cancelled()
        assert command.cancelled()
        assert tries == 1
