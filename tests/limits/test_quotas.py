"""Limits by day and month: what is counted, what is refused, and what is said; where it is kept over restarts."""

import asyncio
import gc
import random
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import AsyncMock

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.config.settings import LimitConfig
from edge.config.zones import zone_of
from edge.errors import QuotaSpent, RateLimited
from edge.exchange import Principal, Usage
from edge.journal.journal import Journal
from edge.journal.spent import SpentIndex
from edge.limits.admission import Admission
from edge.limits.nearest import Nearness, find_nearest
from edge.limits.quotas import Quota, Spent
from edge.limits.shared import SharedLimits
from edge.limits.shared_quotas import PREFIX
from edge.process.quotas import JournalQuotas
from edge.protocols import MESSAGES, OPENAI
from edge.valkey import connect, disconnect
from tests.keybackends import PATIENCE_S, ValkeyServer
from tests.limits.test_admission import ROUTE, USER, Clock, admission, admit, limit, refused
from tests.records import close, crash, opened

SHANGHAI = "Asia/Shanghai"


def at(*moment: int, zone: str = SHANGHAI) -> float:
    return datetime(*moment, tzinfo=zone_of(zone)).timestamp()  # type: ignore[misc, arg-type]


def quota(**numbers: Any) -> LimitConfig:
    return limit(**{"time_zone": SHANGHAI, **numbers})


# --- what is counted


def test_a_day_ends_at_midnight_of_its_zone_and_the_month_goes_on() -> None:
    clock = Clock(at(2026, 11, 29, 23, 59, 50))
    of = admission(clock, quota(requests_per_day=2, tokens_per_month=1000))
    admit(of, tokens=300).charge(300)
    admit(of, tokens=300).charge(300)
    error = refused(of)
    assert error.retry_after_s == 11
    clock.now = at(2026, 11, 30)
    admit(of, tokens=300).charge(300)
    assert "tokens per month" in refused(of, tokens=200).message
    clock.now = at(2026, 12, 1)
    admit(of, tokens=200).charge(200)


def test_refusal_says_which_limit_and_when_it_ends_in_each_protocol() -> None:
    """Who retries within two minutes by itself has no use for a day."""
    clock = Clock(at(2026, 11, 30, 9, 30))
    of = admission(clock, quota(tokens_per_day=100))
    admit(of, tokens=90).charge(90)
    error = refused(of, tokens=20)
    assert isinstance(error, QuotaSpent)
    assert (error.status, error.error_code, error.kind) == (429, "insufficient_quota", "insufficient_quota")
    assert error.retry_after_s == 14 * 3600 + 30 * 60 + 1
    assert error.should_retry is False
    assert error.message == (
        "Quota reached for tokens per day of this user with this model: limit 100, used 90, requested 20. The next day "
        "begins at 2026-12-01T00:00:00+08:00, in 14 h 31 min."
    )
    assert orjson.loads(OPENAI.error_body(error, "r"))["error"]["code"] == "insufficient_quota"
    assert orjson.loads(MESSAGES.error_body(error, "r"))["error"] == {
        "type": "rate_limit_error", "message": error.message,
    }  # fmt: skip
    clock.now = at(2026, 11, 30, 23, 59)
    assert refused(of, tokens=20).should_retry is None


def test_minute_and_day_are_told_apart_by_what_holds_up_longest() -> None:
    clock = Clock(at(2026, 11, 30, 9, 30))
    of = admission(clock, quota(requests_per_minute=1, requests_per_day=2))
    admit(of).charge(0)
    assert refused(of).error_code == "rate_limit_exceeded"
    clock.now += 120
    admit(of).charge(0)
    assert refused(of).error_code == "insufficient_quota"
    assert dict(refused(of).headers)["x-ratelimit-limit-requests"] == "1"


def test_tokens_are_reserved_and_corrected_and_a_refusal_charges_nothing() -> None:
    of = admission(Clock(at(2026, 11, 30, 9)), quota(tokens_per_day=1000))
    permit = admit(of, tokens=900)
    refused(of, tokens=200)
    permit.charge(500)
    permit.charge(1)
    again = admit(of, tokens=500)
    again.cancel()
    again.cancel()
    admit(of, tokens=500).charge(500)
    assert [(each.requests, each.tokens) for each, _ in of.quotas.counted()] == [(2, 1000)]


def test_more_than_a_day_has_is_taken_for_all_of_it() -> None:
    of = admission(Clock(at(2026, 11, 30, 9)), quota(tokens_per_day=1000))
    admit(of, tokens=5000).charge(5000)
    refused(of, tokens=1)


def test_what_ends_on_another_day_gives_nothing_back_there_and_counts_what_it_took_more() -> None:
    clock = Clock(at(2026, 11, 30, 23, 59))
    of = admission(clock, quota(tokens_per_day=1000))
    less, more = admit(of, tokens=400), admit(of, tokens=400)
    clock.now += 120
    admit(of, tokens=100).charge(100)
    less.charge(0)
    more.charge(600)
    [(found, _)] = of.quotas.counted()
    assert (found.requests, found.tokens, found.period.name) == (1, 300, "2026-12-01")


def test_a_clock_that_is_set_back_makes_nothing_free_again() -> None:
    clock = Clock(at(2026, 12, 1, 0, 0, 5))
    of = admission(clock, quota(requests_per_day=1))
    admit(of).charge(0)
    for back_s in (10, 86_400 * 40):
        clock.now = at(2026, 12, 1, 0, 0, 5) - back_s
        refused(of)
    clock.now = at(2026, 12, 1, 0, 0, 6)
    assert of.quotas.counted()[0][0].requests in (0, 1)


def test_users_keys_routes_and_limits_have_days_of_their_own() -> None:
    of = admission(
        Clock(at(2026, 11, 30, 9)), quota(requests_per_day=1), quota(name="key", per="key", requests_per_day=1)
    )
    admit(of).charge(0)
    refused(of, key_id="key_2")
    admit(of, user="u-2").charge(0)
    admit(of, route="public/other").charge(0)
    admit(of, "key").charge(0)
    refused(of, "key", user="u-3")
    admit(of, "key", key_id="key_2").charge(0)


def test_standing_and_the_nearest_show_days_and_months_and_make_nothing() -> None:
    clock = Clock(at(2026, 11, 30, 9))
    of = admission(clock, quota(requests_per_day=4, tokens_per_month=1000))
    [unused] = of.standing(ROUTE, ("standard",), USER, "key_1")
    assert [each.requests for each, _ in unused.quotas] == [0, 0]
    assert len(of.quotas) == 0
    admit(of, tokens=900).charge(900)
    [standing] = of.standing(ROUTE, ("standard",), USER, "key_1")
    assert [(each.requests, each.tokens, allowance.span) for each, allowance in standing.quotas] == [
        (1, 900, "day"), (1, 900, "month"),
    ]  # fmt: skip
    assert standing.quotas[0][1].begins_anew(standing.quotas[0][0]) == "2026-12-01T00:00:00+08:00"
    found: list[Nearness] = []
    for _ in find_nearest(of, 5, found):
        pass
    assert [(each.what, each.used, each.allowed) for each in found] == [
        ("tokens per month", 900, 1000), ("requests per day", 1, 4),
    ]  # fmt: skip


def test_days_that_are_over_are_forgotten() -> None:
    clock = Clock(at(2026, 11, 30, 9))
    of = admission(clock, quota(requests_per_day=4))
    for number in range(2500):
        admit(of, user=f"u-{number}").charge(0)
    for _ in of.forget_idle():
        pass
    _, held = of.metrics()
    assert (held.name, held.samples[0].value) == ("edge_limit_quotas", 2500)
    clock.now += 86_400
    admit(of).charge(0)
    for _ in of.forget_idle():
        pass
    assert len(of.quotas) == 1


def test_a_limit_without_days_keeps_none() -> None:
    of = admission(Clock(), limit(requests_per_minute=10))
    permit = admit(of)
    assert permit._parts == ()
    assert len(of.quotas) == 0


def test_what_ends_when_its_day_is_forgotten_counts_in_the_new_one() -> None:
    clock = Clock(at(2026, 11, 30, 23, 59))
    of = admission(clock, quota(tokens_per_day=1000))
    permit = admit(of, tokens=300)
    clock.now += 120
    list(of.forget_idle())
    assert len(of.quotas) == 0
    admit(of, tokens=100).charge(100)
    permit.charge(700)
    [(found, _)] = of.quotas.counted()
    assert (found.tokens, found.period.name) == (500, "2026-12-01")


def test_limit_of_a_reload_holds_at_once_also_for_who_came_before_and_what_runs() -> None:
    clock = Clock(at(2026, 11, 30, 9))
    of = admission(clock, quota(tokens_per_day=100))
    permit = admit(of, tokens=90)
    refused(of, tokens=20)
    of.reconfigure({"standard": quota(tokens_per_day=1000)})
    admit(of, tokens=20).charge(20)
    permit.charge(80)
    [(found, allowance)] = of.quotas.counted()
    assert (found.tokens, allowance.tokens) == (100, 1000)


@pytest.mark.parametrize("zone", ["America/Los_Angeles", "UTC", "Pacific/Auckland"])
def test_another_time_zone_frees_nothing_of_a_day_that_goes_on(zone: str) -> None:
    clock = Clock(at(2026, 11, 30, 20))
    of = admission(clock, quota(tokens_per_day=100))
    permit = admit(of, tokens=40)
    admit(of, tokens=50).charge(50)
    of.reconfigure({"standard": quota(tokens_per_day=100, time_zone=zone)})
    refused(of, tokens=20)
    permit.charge(40)
    error = refused(of, tokens=20)
    assert "used 90" in error.message
    [(found, allowance)] = of.quotas.counted()
    assert allowance.zone == zone
    clock.now = found.period.ends_at
    admit(of, tokens=100)


@given(st.lists(st.tuples(st.integers(0, 7200), st.integers(0, 400), st.integers(0, 800)), max_size=40))
def test_no_day_admits_more_than_it_has_and_all_that_was_used_counts(steps: list[tuple[int, int, int]]) -> None:
    """Reserved tokens are never over the limit; what counts is what was used, in the day in which it began."""
    clock = Clock(at(2026, 10, 24, 20, zone="Europe/Berlin"))
    of = admission(clock, limit(requests_per_day=10, tokens_per_day=1000, time_zone="Europe/Berlin"))
    used: dict[str, list[int]] = {}
    for ahead_s, reserved, took in steps:
        clock.now += ahead_s
        day = datetime.fromtimestamp(clock.now, zone_of("Europe/Berlin")).date().isoformat()
        requests, tokens = used.setdefault(day, [0, 0])
        fits = requests < 10 and tokens + reserved <= 1000
        try:
            admit(of, tokens=reserved).charge(took)
        except QuotaSpent:
            assert not fits
        else:
            assert fits
            used[day][0] += 1
            used[day][1] += took


# --- what is kept over restarts: one suite over the journal and Redis


class Process(Protocol):
    """A process with its limits, and where it keeps what was used."""

    admission: Admission

    def use(self, tokens: int, user: str = USER, key_id: str = "key_1", route: str = ROUTE) -> None:
        """Let a request begin and end; raises `RateLimited`."""

    async def exchange(self) -> None:
        """Report what was used, and learn what others used."""

    async def stop(self, *, killed: bool = False) -> None:
        """End in order, or not."""


Start = Callable[[LimitConfig], Any]


class OverJournal:
    """A process that shares nothing."""

    def __init__(self, directory: Path, clock: Clock, config: LimitConfig) -> None:
        self.journal = Journal(directory, 2**20, "serve")
        self.admission = Admission({"standard": config}, clock)
        self.clock_step_s = 0.0
        self._quotas = JournalQuotas(self.journal, self.admission, lambda: self.clock_step_s)
        self._clock = clock

    def use(self, tokens: int, user: str = USER, key_id: str = "key_1", route: str = ROUTE) -> None:
        permit = self.admission.admit(route, ("standard",), user, key_id, tokens)
        facts = {"principal": Principal(key_id, user), "route": route, "started_at": self._clock.now}
        recorded = opened(self.journal, **facts)
        close(self.journal, recorded, usage=Usage(tokens, 0))
        permit.charge(tokens)

    async def begin(self) -> None:
        await self._quotas.start()

    async def exchange(self) -> None:
        self.journal.drain()
        await self._quotas._load()

    async def stop(self, *, killed: bool = False) -> None:
        await self._quotas.close()
        if killed:
            crash(self.journal)
        else:
            self.journal.close()


class OverRedis:
    """A process that shares what it counts."""

    def __init__(self, url: str, clock: Clock, config: LimitConfig) -> None:
        self._client = connect(url, PATIENCE_S)
        self.admission = Admission({"standard": config}, clock)
        self.shared = SharedLimits(self._client, self.admission)
        self.shared._keep_time = lambda *args: None  # type: ignore[method-assign]  # the clock is moved by hand

    def use(self, tokens: int, user: str = USER, key_id: str = "key_1", route: str = ROUTE) -> None:
        self.admission.admit(route, ("standard",), user, key_id, tokens).charge(tokens)

    async def begin(self) -> None:
        await self.exchange()

    async def exchange(self) -> None:
        await self.shared.merge()

    async def stop(self, *, killed: bool = False) -> None:
        await self.exchange()
        if not killed:
            await self.shared.leave()
        await disconnect(self._client)


@pytest.fixture
def clock() -> Clock:
    """Noon of tomorrow: what Redis is told to forget yesterday is gone at once."""
    today = datetime.now(zone_of(SHANGHAI)).replace(hour=12, minute=0, second=0, microsecond=0)
    return Clock((today + timedelta(days=1)).timestamp())


@pytest.fixture(params=["journal", "redis"])
async def start(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock, valkey: ValkeyServer) -> Start:
    async def begin(config: LimitConfig) -> Process:
        made = (
            OverJournal(tmp_path, clock, config) if request.param == "journal" else OverRedis(valkey.url, clock, config)
        )
        await made.begin()
        return made

    return begin


async def until_known(process: Process, use: Callable[[], None]) -> None:
    """A process over Redis learns of a user with its first request."""
    for _ in range(2):
        try:
            use()
        except RateLimited:
            return
        await process.exchange()
    raise AssertionError("nothing of the time before is known")


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("config", [{"requests_per_day": 3}, {"tokens_per_day": 300}, {"tokens_per_month": 300}])
async def test_what_was_used_before_a_restart_counts_after_it(
    start: Start, config: dict[str, int], killed: bool
) -> None:
    first = await start(quota(**config))
    for _ in range(3):
        first.use(100)
    with pytest.raises(QuotaSpent):
        first.use(100)
    await first.exchange()
    await first.stop(killed=killed)
    second = await start(quota(**config))
    await until_known(second, lambda: second.use(1))
    second.use(100, user="u-2")
    second.use(100, route="public/other")
    await second.exchange()
    await second.stop()
    third = await start(quota(**config))
    await until_known(third, lambda: third.use(1))
    await third.stop()


async def test_day_begins_anew_and_the_month_goes_on_over_restarts(start: Start, clock: Clock) -> None:
    config = quota(requests_per_day=2, tokens_per_month=1000)
    clock.now = (datetime.fromtimestamp(clock.now, zone_of(SHANGHAI)) + timedelta(days=32)).replace(day=3).timestamp()
    first = await start(config)
    for _ in range(2):
        first.use(200)
    await first.exchange()
    await first.stop()
    clock.now += 86_400
    second = await start(config)
    for _ in range(2):
        second.use(200)
        await second.exchange()
    with pytest.raises(QuotaSpent, match="requests per day"):
        second.use(1)
    clock.now += 86_400
    with pytest.raises(QuotaSpent, match="tokens per month of"):
        second.use(300)
    second.use(200)
    await second.stop()


async def test_days_of_keys_are_kept_by_key(start: Start) -> None:
    config = quota(per="key", requests_per_day=1)
    first = await start(config)
    first.use(1)
    first.use(1, key_id="key_2", user="u-2")
    await first.exchange()
    await first.stop()
    second = await start(config)
    second.use(1, key_id="key_3")
    await until_known(second, lambda: second.use(1, user="u-9"))
    await second.stop()


async def test_processes_side_by_side_count_together_and_none_twice(start: Start) -> None:
    config = quota(requests_per_day=100, tokens_per_day=10**6)
    members = [await start(config) for _ in range(3)]
    draw = random.Random(3)
    used = Spent()
    for _ in range(60):
        tokens = draw.randrange(100)
        draw.choice(members).use(tokens)
        used = Spent(used.requests + 1, used.tokens + tokens)
        if draw.random() < 0.2:
            await draw.choice(members).exchange()
    for member in (*members, *members):
        member.use(0)
        await member.exchange()
    for member in members:
        await member.exchange()
    for member in members:
        [(found, _)] = member.admission.quotas.counted()
        assert (found.requests, found.tokens) == (used.requests + 6, used.tokens)
        await member.stop()


# --- over the journal alone


async def test_journal_that_cannot_be_indexed_is_reported_and_limits_count_what_is_served_here(
    tmp_path: Path, clock: Clock
) -> None:
    (tmp_path / "quota-index.db").write_bytes(b"no database" * 100)
    process = OverJournal(tmp_path, clock, quota(requests_per_day=1))
    await process.begin()
    assert process._quotas.is_used
    assert "remove it" in process._quotas.outage.reason
    process.use(1)
    with pytest.raises(QuotaSpent):
        process.use(1)
    (tmp_path / "quota-index.db").unlink()
    await process.exchange()
    assert not process._quotas.outage
    await process.stop()


async def test_journal_that_is_still_being_read_is_reported(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process reads it, and is not done."""
    process = OverJournal(tmp_path, clock, quota(requests_per_day=1))
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(SpentIndex, "catch_up", lambda self: False)
        SpentIndex(tmp_path).forget()
        await process.begin()
    assert process._quotas.outage.reason == "the journal is still being read"
    await process.exchange()
    assert not process._quotas.outage
    await process.stop()


async def test_sums_of_thousands_are_nothing_for_the_collector_of_garbage_and_leave_the_loop_its_turns(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = OverJournal(tmp_path, clock, quota(requests_per_day=1))
    rows = [(ROUTE, f"u-{number}", f"key_{number}", 1, 10) for number in range(3000)]
    turns: list[float] = []
    monkeypatch.setattr(SpentIndex, "read", lambda *args: iter(rows))
    monkeypatch.setattr("edge.process.quotas.time.sleep", turns.append)
    _, found = process._quotas._read(process._quotas._periods())
    [sums] = found.values()
    gc.collect()
    assert len(sums) == 6000
    assert not any(map(gc.is_tracked, sums.values()))
    assert len(turns) >= 30
    process.journal.close()


async def test_another_time_zone_frees_nothing_of_what_the_journal_has(tmp_path: Path, clock: Clock) -> None:
    first = OverJournal(tmp_path, clock, quota(tokens_per_day=1000))
    await first.begin()
    first.use(900)
    await first.exchange()
    await first.stop()
    second = OverJournal(tmp_path, clock, quota(tokens_per_day=1000))
    await second.begin()
    second.use(50)
    second.admission.reconfigure({"standard": quota(tokens_per_day=1000, time_zone="Europe/Berlin")})
    for _ in range(2):
        await second.exchange()
        with pytest.raises(QuotaSpent):
            second.use(100)
    await second.stop()


async def test_days_follow_the_clock_of_the_machine_where_it_is_set_by_far(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was a day behind when the process started."""
    process = OverJournal(tmp_path, clock, quota(requests_per_day=1))
    await process.begin()
    process.use(1)
    looked = asyncio.Event()
    monkeypatch.setattr("edge.process.quotas._INTERVAL_S", 0.0)
    monkeypatch.setattr(process._quotas, "_load", AsyncMock(side_effect=looked.set))
    running = asyncio.get_running_loop().create_task(process._quotas.run())
    for step_s, is_free in ((4.0, False), (86_400.0, True)):
        process.clock_step_s = step_s
        for _ in range(2):
            looked.clear()
            await looked.wait()
        if is_free:
            process.use(1)
        with pytest.raises(QuotaSpent):
            process.use(1)
    running.cancel()
    await process.stop()


async def test_zones_of_thousands_of_limits_are_found_without_making_them(tmp_path: Path, clock: Clock) -> None:
    process = OverJournal(tmp_path, clock, quota(requests_per_day=1, tokens_per_month=1))
    calls: list[LimitConfig] = []
    process.admission.quotas.allowances = lambda config: calls.append(config) or ()  # type: ignore[method-assign,func-returns-value]
    assert set(process._quotas._periods()) == {(SHANGHAI, "day"), (SHANGHAI, "month")}
    assert calls == []
    process.journal.close()


async def test_journal_is_not_asked_without_a_limit_by_day_or_month(tmp_path: Path, clock: Clock) -> None:
    process = OverJournal(tmp_path, clock, limit(requests_per_minute=1))
    await process.begin()
    assert not process._quotas.is_used
    assert not (tmp_path / "quota-index.db").exists()
    await process.stop()


# --- over Redis alone


async def test_what_others_used_of_a_day_binds_as_that_of_a_minute_does(clock: Clock, valkey: ValkeyServer) -> None:
    """All of them admit at most the limit and what was left for each of the others at the last merge."""
    config = quota(requests_per_day=100)
    members = [OverRedis(valkey.url, clock, config) for _ in range(3)]
    for member in members:
        await member.begin()
        for _ in range(30):
            member.use(0)
        await member.exchange()
    for member in members:
        await member.exchange()
    admitted = 0
    for member in members:
        for _ in range(50):
            try:
                member.use(0)
                admitted += 1
            except QuotaSpent:
                break
    assert admitted == 3 * 10
    for member in members:
        await member.exchange()
    for member in members:
        with pytest.raises(QuotaSpent):
            member.use(0)
        await member.stop()


async def test_who_is_refused_for_long_learns_that_there_is_room_again(clock: Clock, valkey: ValkeyServer) -> None:
    """What another process had reserved when it was asked last may be free since."""
    config = quota(tokens_per_month=10_000)
    reserves, refuses = OverRedis(valkey.url, clock, config), OverRedis(valkey.url, clock, config)
    for member in (reserves, refuses):
        await member.begin()
    refuses.use(10)
    await refuses.exchange()
    permit = reserves.admission.admit(ROUTE, ("standard",), USER, "key_1", 9900)
    await reserves.exchange()
    await refuses.exchange()
    clock.now += 600
    with pytest.raises(QuotaSpent):
        refuses.use(200)
    permit.charge(50)
    await reserves.exchange()
    await refuses.exchange()
    refuses.use(200)
    for member in (reserves, refuses):
        await member.stop()


async def test_server_that_comes_back_empty_has_all_again_that_a_process_knew(
    clock: Clock, valkey: ValkeyServer
) -> None:
    """Also what those had used that are gone."""
    config = quota(requests_per_day=10)
    gone, stays = OverRedis(valkey.url, clock, config), OverRedis(valkey.url, clock, config)
    for member in (gone, stays):
        await member.begin()
        for _ in range(4):
            member.use(0)
        await member.exchange()
    await gone.stop()
    await stays.exchange()
    with valkey.client() as client:
        client.flushall()
    stays.shared._joined = False
    await stays.exchange()
    late = OverRedis(valkey.url, clock, config)
    late.use(0)
    await late.exchange()
    [(found, _)] = late.admission.quotas.counted()
    assert found.requests == 9
    for member in (stays, late):
        await member.stop()


async def test_process_that_is_silent_for_a_day_is_counted_with_those_that_left(
    clock: Clock, valkey: ValkeyServer
) -> None:
    config = quota(tokens_per_month=10**6)
    dead, stays = OverRedis(valkey.url, clock, config), OverRedis(valkey.url, clock, config)
    await dead.begin()
    dead.use(70)
    await dead.stop(killed=True)
    stays.use(5)
    [(found, _)] = stays.admission.quotas.counted()
    name = PREFIX + orjson.dumps((*found.key, found.period.name)).decode()
    with valkey.client() as client:
        [field] = client.hkeys(name)
        client.hset(name, field, f"1 70 {int(time.time()) - 90_000}")
        await stays.exchange()
        assert (found.requests, found.tokens) == (2, 75)
        assert client.hget(name, "gone") == b"1 70"
        assert client.hlen(name) == 2
        assert client.ttl(name) > 86_400
    await stays.stop()


def test_what_others_report_late_of_a_day_that_is_over_changes_nothing() -> None:
    clock = Clock(at(2026, 11, 30, 9))
    of = admission(clock, quota(requests_per_day=9))
    admit(of).charge(0)
    [(found, allowance)] = of.quotas.counted()
    before = found.period
    found.update_remote(Spent(3, 0))
    assert found.local == Spent(1, 0)
    clock.now += 86_400
    admit(of).charge(0)
    assert isinstance(found, Quota)
    assert found.period is not before
    assert (found.requests, found.remote) == (1, Spent())
    assert allowance.has_room(found, 0, clock.now)


async def test_what_a_process_reported_half_a_day_ago_it_reports_again(clock: Clock, valkey: ValkeyServer) -> None:
    """Else it is taken for gone, and counts twice when the process reports it again."""
    process = OverRedis(valkey.url, clock, quota(tokens_per_month=10**6))
    await process.begin()
    process.use(70)
    await process.exchange()
    [(found, _)] = process.admission.quotas.counted()
    name = PREFIX + orjson.dumps((*found.key, found.period.name)).decode()
    with valkey.client() as client:
        [field] = client.hkeys(name)
        old = f"1 70 {int(time.time()) - 86_000}"
        client.hset(name, field, old)
        for later_s, is_new in ((11 * 3600, False), (2 * 3600, True)):
            clock.now += later_s
            for _ in range(2):
                await process.exchange()
            list(process.admission.forget_idle())
            await process.exchange()
            assert (client.hget(name, field) != old.encode()) is is_new
    await process.stop()


async def test_who_asks_what_is_left_leaves_nothing_here_or_there(clock: Clock, valkey: ValkeyServer) -> None:
    process = OverRedis(valkey.url, clock, quota(tokens_per_day=100, tokens_per_month=10**6))
    await process.begin()
    for number in range(20):
        list(process.admission.standing(f"public/{number}", ("standard",), USER, "key_1"))
    process.use(1)
    await process.exchange()
    with valkey.client() as client:
        assert len(client.keys(PREFIX + "*")) == 2
    list(process.admission.forget_idle())
    assert len(process.admission.quotas) == 42
    clock.now += 121
    list(process.admission.forget_idle())
    assert len(process.admission.quotas) == 2
    await process.stop()


def test_a_merge_looks_at_those_that_were_used_lately_in_steps() -> None:
    clock = Clock(at(2026, 11, 30, 9))
    of = admission(clock, quota(tokens_per_month=10**6))
    of.quotas.shares = True
    for number in range(2500):
        admit(of, user=f"u-{number}").charge(1)
    assert [len(found) for found in of.quotas.collect(False, clock.now)] == [1000, 1000, 500]
    clock.now += 130
    admit(of, user="u-7").charge(1)
    for _ in range(20):
        list(of.quotas.collect(False, clock.now))
    assert [[each.key[2] for each in found] for found in of.quotas.collect(False, clock.now)] == [["u-7"]]
    assert [len(found) for found in of.quotas.collect(True, clock.now)] == [1000, 1000, 500]


async def test_thousands_of_quotas_are_reported_in_batches(clock: Clock, valkey: ValkeyServer) -> None:
    member = OverRedis(valkey.url, clock, quota(requests_per_day=9))
    for number in range(450):
        member.use(0, user=f"u-{number}")
    await member.exchange()
    with valkey.client() as client:
        assert sum(1 for _ in client.scan_iter(PREFIX + "*", 1000)) == 450
    await member.stop()
