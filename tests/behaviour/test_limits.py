"""Limits hold, say so in time, and give back what was not used; also over several processes."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge.keys.stores.registry import KeyRegistry
from edge.simulator.server import Simulator
from tests.conftest import ROUTES, USER, Edge, StartEdge
from tests.keybackends import PATIENCE_S, ValkeyServer

MODEL = "public/deepseek-r1"
LIMITED = """
[limits.standard]
{limit}
[limits.small]
requests_per_minute = 1
[pools.r1]
endpoints = ["{upstream}"]
[routes."public/deepseek-r1"]
pool = "r1"
metered = true
limit = "standard"
[routes."public/free"]
pool = "r1"
[routes."u-*"]
instance = "{upstream}"
"""
HEADERS = [f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")]


def limited(url: str, limit: str) -> str:
    return LIMITED.replace("{upstream}", url).replace("{limit}", limit)


def ask(stream: bool = False, **members: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [], "stream": stream, **members}


def another_key(edge: Edge, **facts: Any) -> str:
    with KeyRegistry(edge.keys_path) as registry:
        key, _ = registry.create(facts.pop("user", USER), **facts)
    return key


def error_of(body: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(body)["error"]
    return error


@pytest.mark.parametrize("stream", [False, True])
async def test_every_answer_tells_what_is_left(start_edge: StartEdge, simulator: Simulator, stream: bool) -> None:
    edge = await start_edge(limited(simulator.url, "requests_per_minute = 3\ntokens_per_minute = 1000"))
    seen = []
    for _ in range(4):
        status, headers, body = await edge.ask(ask(stream, max_tokens=8, simulate={"tokens": 8}))
        seen.append((status, *(headers[name] for name in HEADERS[:2]), headers[HEADERS[3]]))
        assert all(headers[name] for name in HEADERS)
    assert [each[:2] for each in seen] == [(200, "3"), (200, "3"), (200, "3"), (429, "3")]
    assert [each[2] for each in seen] == ["2", "1", "0", "0"]
    assert {each[3] for each in seen} == {"1000"}
    error = error_of(body)
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert 1 <= int(headers["retry-after"]) <= 59
    assert int(headers["retry-after-ms"]) == int(headers["retry-after"]) * 1000
    assert len(edge.records()) == 3, "what is refused was not accepted"


async def test_tokens_that_were_used_are_what_counts(start_edge: StartEdge, simulator: Simulator) -> None:
    """Not those that were reserved: after two answers of 32 there are 36 left."""
    edge = await start_edge(limited(simulator.url, "tokens_per_minute = 100"))
    answers = [await edge.ask(ask(max_tokens=30, simulate={"tokens": 20})) for _ in range(4)]
    assert [status for status, _, _ in answers] == [200, 200, 429, 429]
    assert answers[-1][1]["x-ratelimit-remaining-tokens"] == str(100 - 2 * (12 + 20))


async def test_prompt_that_is_left_before_a_word_is_charged_to_the_limit(
    start_edge: StartEdge, simulator: Simulator
) -> None:
    """Its engine has read it: who leaves early would else have no limit. What is recorded is what is known: nothing."""
    edge = await start_edge(limited(simulator.url, "tokens_per_minute = 2000"))
    prompt = [{"role": "user", "content": "x" * 3000}]
    for _ in range(2):
        client = await edge.connect()
        client.send(edge.request(ask(True, messages=prompt, max_tokens=100, simulate={"fault": "stall", "after": -1})))
        await simulator.wait_for(lambda: simulator.active == 1)
        client.abort()
        await simulator.wait_for(lambda: simulator.active == 0)
        await edge.consistent()
    assert [(each["prompt_tokens"], each["usage_source"]) for each in edge.records()] == [(0, "none")] * 2
    status, headers, _ = await edge.ask(ask(messages=prompt, max_tokens=100))
    assert status == 429
    assert int(headers["x-ratelimit-remaining-tokens"]) <= 2000 - 2 * 3000 // 4
    await edge.consistent()


async def test_four_agents_that_ask_for_much_and_use_little_run_at_once(
    start_edge: StartEdge, simulator: Simulator
) -> None:
    """Each has `max_tokens` 32,000, as coding agents send it; all of it reserved, three would fill the minute."""
    edge = await start_edge(limited(simulator.url, "tokens_per_minute = 100_000\nconcurrent_requests = 8"))
    for _ in range(2):
        agents = [await edge.connect() for _ in range(4)]
        simulated = {"tokens": 200, "fault": "stall", "after": 100}
        for agent in agents:
            agent.send(edge.request(ask(True, max_tokens=32_000, simulate=simulated)))
        await simulator.wait_for(lambda: simulator.active == 4)
        for agent in agents:
            agent.abort()
        await simulator.wait_for(lambda: simulator.active == 0)
        await edge.consistent()
    large = ask(max_tokens=131_072, simulate={"tokens": 100, "context_length": 200_000})
    statuses = [(await edge.ask(large))[0] for _ in range(3)]
    assert statuses == [200] * 3


async def remaining(edge: Edge, path: str = "chat/completions", **members: Any) -> int:
    """What is left of a minute's tokens while a request of this body runs."""
    asked = {"messages": [], "prompt": "", **members, "model": MODEL}
    status, headers, _ = await edge.ask(asked, path=f"/v1/{path}")
    assert status == 200
    return int(headers["x-ratelimit-remaining-tokens"]) + len(json.dumps(asked)) // 4


@pytest.mark.parametrize(
    ("path", "members", "reserved"),
    [
        ("chat/completions", {}, 256),
        ("chat/completions", {"max_tokens": 9}, 9),
        ("chat/completions", {"max_tokens": 9000}, 256),
        ("chat/completions", {"max_tokens": 9, "max_completion_tokens": 64}, 64),
        ("chat/completions", {"max_completion_tokens": 9, "max_tokens": 64}, 9),
        ("chat/completions", {"max_tokens": 9, "n": 3}, 27),
        ("completions", {"max_tokens": 9, "max_completion_tokens": 64}, 9),
        ("completions", {"max_tokens": 9, "prompt": ["a", "b", "c"]}, 27),
        ("completions", {"max_tokens": 9, "prompt": [[1, 2], [3]], "n": 2}, 36),
    ],
)
async def test_each_answer_reserves_as_much_as_it_may_have_or_as_is_usual(
    start_edge: StartEdge, simulator: Simulator, path: str, members: dict[str, Any], reserved: int
) -> None:
    edge = await start_edge(limited(simulator.url, "tokens_per_minute = 100_000"))
    left = await remaining(edge, path, **members)
    assert abs(100_000 - reserved - left) < 8, "but for how the prompt is written"


async def test_answers_that_are_long_reserve_more_and_a_setting_bounds_them(
    start_edge: StartEdge, simulator: Simulator
) -> None:
    edge = await start_edge(limited(simulator.url, "tokens_per_minute = 1000_000"))
    for _ in range(6):
        await edge.ask(ask(max_tokens=32_000, simulate={"tokens": 2000, "prompt_tokens": 0}))
    unused = {"tokens": 0, "prompt_tokens": 0}
    left = [await remaining(edge, max_tokens=most, simulate=unused) for most in (32_000, 40, 10)]
    first, second = left[2] - left[0], left[2] - left[1]
    assert 1500 < first < 2000
    assert abs(second - 30) < 4
    edge = await start_edge(limited(simulator.url, "tokens_per_minute = 1000_000\nreserve_at_most = 5000"))
    assert abs(1_000_000 - 5000 - await remaining(edge, max_tokens=32_000)) < 8


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("chat/completions", {"type": "image_url", "image_url": {"url": "data:image/png;base64,BLOB"}}),
        ("chat/completions", {"type": "input_audio", "input_audio": {"data": "BLOB", "format": "wav"}}),
        ("chat/completions", {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,BLOB"}}),
        ("messages", {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "BLOB"}}),
        ("messages", {"type": "document", "source": {"media_type": "application/pdf", "data": "BLOB"}}),
        ("responses", {"type": "input_file", "file_data": "data:application/pdf;base64,BLOB"}),
    ],
)
async def test_second_turn_of_a_conversation_with_a_picture_is_not_refused(
    start_edge: StartEdge, simulator: Simulator, path: str, part: dict[str, Any]
) -> None:
    """As text, 1.2 MB of base64 would be three times the minute; it is sent again with each turn."""
    edge = await start_edge(limited(simulator.url, "tokens_per_minute = 100_000"))
    turns = [{"role": "user", "content": [part]}]
    body = json.dumps({"model": MODEL, "max_tokens": 50, "messages": turns, "input": turns})
    asked = body.replace("BLOB", "iVBORw0KGgo" * 110_000).encode()
    statuses = [(await edge.ask(asked, path=f"/v1/{path}"))[0] for _ in range(2)]
    assert statuses == [200, 200]


@pytest.mark.parametrize("stream", [False, True])
async def test_parallel_callers_stay_within_the_limit(
    start_edge: StartEdge, simulator: Simulator, stream: bool
) -> None:
    """Five callers that ask as fast as they can: what is in flight is reserved, so none of it is over."""
    edge = await start_edge(limited(simulator.url, "tokens_per_minute = 100"))

    async def call() -> None:
        for _ in range(40):
            await edge.ask(ask(stream, max_tokens=20, simulate={"tokens": 20, "prompt_tokens": 5}))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(5):
            tasks.create_task(call())
    used = sum(each["prompt_tokens"] + each["completion_tokens"] for each in edge.records())
    assert 0 < used <= 100
    await edge.consistent()


async def test_answers_without_max_tokens_exceed_the_limit_by_no_more_than_runs_at_once(
    start_edge: StartEdge, simulator: Simulator
) -> None:
    """Each is reserved as much as an answer is assumed to take, here all there is: so one runs at a time."""
    edge = await start_edge(limited(simulator.url, "tokens_per_minute = 100"))
    asked = [edge.ask(ask(simulate={"tokens": 150})) for _ in range(20)]
    statuses = Counter(status for status, _, _ in await asyncio.gather(*asked))
    assert statuses == {200: 1, 429: 19}


@pytest.mark.parametrize("how", ["complete", "error", "cut", "refused", "gone", "gone mid-stream"])
async def test_place_is_given_back_however_a_request_ends(
    start_edge: StartEdge, simulator: Simulator, how: str
) -> None:
    edge = await start_edge(limited(simulator.url, "concurrent_requests = 1"))
    faults = {"error": {"fault": "error"}, "cut": {"fault": "cut", "after": 2}, "refused": {"fault": "rubbish"}}
    stalls = {"gone": {"fault": "stall", "after": -1}, "gone mid-stream": {"fault": "stall", "after": 2}}
    for _ in range(3):
        client = await edge.connect()
        simulated = (faults | stalls).get(how, {})
        client.send(edge.request(ask(True, simulate=simulated), headers=("Connection: close",)))
        if how in stalls:
            count = len(simulator.requests)
            await simulator.wait_for(lambda count=count: simulator.active == 1)
            status, _, body = await edge.ask(ask())
            assert (status, "concurrent" in error_of(body)["message"]) == (429, True)
            client.abort()
        else:
            await client.rest()
        await edge.consistent()
    assert (await edge.ask(ask()))[0] == 200


async def test_users_do_not_share_a_limit_and_the_keys_of_one_do(start_edge: StartEdge, simulator: Simulator) -> None:
    edge = await start_edge(limited(simulator.url, "requests_per_minute = 1"))
    mine, others = another_key(edge), another_key(edge, user="u-2200b")
    assert [(await edge.ask(ask(), key=key))[0] for key in (edge.key, mine, others)] == [200, 429, 200]


async def test_keys_of_a_limit_per_key_do_not_share_it(start_edge: StartEdge, simulator: Simulator) -> None:
    edge = await start_edge(limited(simulator.url, 'per = "key"\nrequests_per_minute = 1'))
    mine = another_key(edge)
    assert [(await edge.ask(ask(), key=key))[0] for key in (edge.key, mine, mine)] == [200, 200, 429]


async def test_limit_of_a_key_holds_beside_that_of_the_route(start_edge: StartEdge, simulator: Simulator) -> None:
    edge = await start_edge(limited(simulator.url, "requests_per_minute = 10"))
    small = another_key(edge, limit="small")
    for model in (MODEL, "public/free"):
        answers = [await edge.ask(ask() | {"model": model}, key=small) for _ in range(2)]
        assert [status for status, _, _ in answers] == [200, 429]
        assert {headers["x-ratelimit-limit-requests"] for _, headers, _ in answers} == {"1"}
    assert (await edge.ask(ask()))[1]["x-ratelimit-remaining-requests"] == "8", "a refusal charges nothing"
    status, headers, _ = await edge.ask(ask() | {"model": "public/free"})
    assert (status, "x-ratelimit-limit-requests" in headers) == (200, False)


async def test_instances_are_never_limited(start_edge: StartEdge, simulator: Simulator) -> None:
    edge = await start_edge(limited(simulator.url, "requests_per_minute = 1"))
    small = another_key(edge, limit="small")
    statuses = {(await edge.ask(ask() | {"model": f"{USER}/qwen2"}, key=small))[0] for _ in range(20)}
    assert statuses == {200}


async def test_limit_of_a_reload_holds_for_what_was_counted_before(start_edge: StartEdge, simulator: Simulator) -> None:
    edge = await start_edge(limited(simulator.url, "requests_per_minute = 100"))
    for _ in range(3):
        assert (await edge.ask(ask()))[0] == 200
    text = edge.config_path.read_text()
    edge.config_path.write_text(text.replace("requests_per_minute = 100", "requests_per_minute = 4"))
    edge.server.reload()
    while edge.server.generation.number == 1:
        await asyncio.sleep(0.01)
    answers = [await edge.ask(ask()) for _ in range(2)]
    assert [status for status, _, _ in answers] == [200, 429]


# --- several processes


async def merges_until(edge: Edge, condition: Callable[[], bool]) -> None:
    """Wait until this is so at the end of a merge, be it a failed one."""
    shared = edge.server.shared_limits
    merge, ended = shared.merge, asyncio.Event()

    async def watched() -> None:
        try:
            await merge()
        finally:
            ended.set()

    shared.merge = watched
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            ended.clear()
            await ended.wait()
    shared.merge = merge


async def merged(edges: list[Edge]) -> None:
    """Wait until each process has reported and read all that was counted so far."""

    async def merge(edge: Edge) -> None:
        count = edge.server.shared_limits.merges + 2  # one may have begun before
        await merges_until(edge, lambda: edge.server.shared_limits.merges >= count)

    for _ in ("report", "read"):
        await asyncio.gather(*map(merge, edges))


async def test_three_processes_hold_one_limit(
    start_edge: StartEdge, simulator: Simulator, valkey: ValkeyServer
) -> None:
    """What one has let in the others know after a merge, and together they are over by what they could not know."""
    shared = f'[shared]\nredis = "{valkey.url}"\n'
    routes = shared + limited(simulator.url, "requests_per_minute = 30")
    edges = [await start_edge(routes) for _ in range(3)]
    for edge in edges[1:]:
        with KeyRegistry(edge.keys_path) as registry:
            key, _ = registry.create(USER)
        edge.key = key
    await merged(edges)
    for _ in range(8):
        for edge in edges:
            assert (await edge.ask(ask()))[0] == 200
    await merged(edges)
    left = 30 - 3 * 8
    statuses = Counter()
    for edge in edges:  # each knows of what is left, and not of what the others do meanwhile
        answers = await asyncio.gather(*(edge.ask(ask()) for _ in range(20)))
        statuses.update(status for status, _, _ in answers)
    assert left <= statuses[200] <= 3 * left
    await merged(edges)
    assert [(await edge.ask(ask()))[0] for edge in edges] == [429, 429, 429]


async def test_redis_that_goes_and_comes_back_fails_no_request(
    start_edge: StartEdge, simulator: Simulator, valkey: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    shared = f'[shared]\nredis = "{valkey.url}"\n'
    edge = await start_edge(shared + limited(simulator.url, "requests_per_minute = 1000000"))
    await merged([edge])
    ended, answered = asyncio.Event(), asyncio.Event()
    statuses: Counter[int] = Counter()

    async def call() -> None:
        while not ended.is_set():
            statuses[(await edge.ask(ask(stream=True)))[0]] += 1
            answered.set()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(call())
        valkey.stop()
        await merges_until(edge, lambda: bool(edge.server.shared_limits.outage))
        async with asyncio.timeout(PATIENCE_S):
            count = statuses.total()
            while statuses.total() < count + 50:
                answered.clear()
                await answered.wait()
        valkey.start()
        await merges_until(edge, lambda: not edge.server.shared_limits.outage)
        ended.set()
    assert set(statuses) == {200}
    told = [each.message for each in caplog.records if "shared.redis" in each.message]
    assert len(told) == 2


async def test_size_of_a_recording_is_no_count_of_tokens(start_edge: StartEdge, simulator: Simulator) -> None:
    """Reserved by its bytes, one form would take the whole minute of its user: a second at once would be refused."""
    edge = await start_edge(limited(simulator.url, "tokens_per_minute = 1000"))
    parts = (
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n' % MODEL.encode(),
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n%b\r\n--b--\r\n' % bytes(100_000),
    )
    body = b"".join(parts)
    head = (
        f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {edge.key}\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    client = await edge.connect()
    client.send(head.encode() + body)
    status, headers, _ = await client.response()
    assert (status, headers["x-ratelimit-remaining-tokens"]) == (200, "1000")


async def test_request_that_cannot_be_recorded_is_charged_nothing(start_edge: StartEdge, simulator: Simulator) -> None:
    routes = ROUTES.replace("{upstream}", simulator.url).replace('pool = "r1"', 'pool = "r1"\nlimit = "two"')
    limits = '[limits.two]\nrequests_per_minute = 2\n[usage]\nwhen_full = "refuse"\n'
    edge = await start_edge(limits + routes)
    asked = {"model": "public/deepseek-r1", "messages": []}
    edge.server.journal.sync_outage.down("no room")
    assert [(await edge.ask(asked))[0] for _ in range(3)] == [503] * 3
    edge.server.journal.sync_outage.up()
    assert [(await edge.ask(asked))[0] for _ in range(3)] == [200, 200, 429]


# --- days and months


async def test_day_that_is_used_up_at_one_process_is_at_another_and_after_all_have_restarted(
    start_edge: StartEdge, simulator: Simulator, valkey: ValkeyServer
) -> None:
    text = f'[shared]\nredis = "{valkey.url}"\n' + limited(simulator.url, "requests_per_day = 3")

    async def refused(edge: Edge) -> dict[str, Any]:
        """What an edge answers once it knows what others used."""
        async with asyncio.timeout(PATIENCE_S):
            while (answer := await edge.ask(ask()))[0] == 200:
                await asyncio.sleep(0.01)
        return error_of(answer[2])

    first = await start_edge(text)
    assert [(await first.ask(ask()))[0] for _ in range(4)] == [200, 200, 200, 429]
    second = await start_edge(text)
    assert (await refused(second))["code"] == "insufficient_quota"
    await first.stop()
    await second.stop()
    third = await start_edge(text)
    assert (await refused(third))["code"] == "insufficient_quota"


async def test_day_that_is_used_up_says_so_and_stays_used_up_over_a_restart(
    start_edge: StartEdge, simulator: Simulator, tmp_path: Path
) -> None:
    text = limited(simulator.url, 'tokens_per_day = 60\ntime_zone = "Asia/Shanghai"')
    text = f'[usage]\njournal = "{tmp_path}/journal"\n' + text
    edge = await start_edge(text)
    body = ask(max_tokens=30, simulate={"tokens": 30})
    assert (await edge.ask(body))[0] == 200
    assert (await edge.ask(body))[0] == 429
    await edge.stop()
    again = await start_edge(text)
    status, headers, content = await again.ask(body)
    error = error_of(content)
    assert (status, error["type"], error["code"]) == (429, "insufficient_quota", "insufficient_quota")
    assert "tokens per day" in error["message"]
    assert "begins at" in error["message"]
    assert 1 <= int(headers["retry-after"]) <= 86_400
    status, headers, content = await again.ask({"model": MODEL, "max_tokens": 30, "messages": []}, path="/v1/messages")
    assert (status, json.loads(content)["error"]["type"]) == (429, "rate_limit_error")
    status, _, content = await again.ask(method="GET", path="/v1/limits")
    [shown] = [each for each in json.loads(content)["data"] if each["model"] == MODEL]
    used = shown["tokens_per_day"]
    assert used["limit"] == 60
    assert used["used"] == 60 - used["remaining"] > 30
    assert used["resets_at"].endswith("T00:00:00+08:00")
    assert (shown["tokens_per_minute"], shown["requests_per_day"], shown["tokens_per_month"]) == (None, None, None)
