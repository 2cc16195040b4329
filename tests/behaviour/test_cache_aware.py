"""`cache-aware`: turns return to the member that has their prefix cached, and nothing is counted for ever."""

import asyncio
import contextlib
import random
from typing import Any

import pytest

from tests.conftest import Edge, ScriptedConnection, StartEdge, StartUpstream, soon
from tests.streams import chunk, document

CACHED = {"usage": {"prompt_tokens": 400, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 300}}}
SYSTEM = "You are a helpful assistant. " * 100
STREAM = b"HTTP/1.1 200 x\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


async def pool(
    start_edge: StartEdge, start_upstream: StartUpstream, script: Any, settings: str = "", count: int = 4
) -> Edge:
    urls = [(await start_upstream(script)).url for _ in range(count)]
    return await start_edge(
        f'[pools.p]\nendpoints = {urls}\n{settings}\n[routes."public/m"]\npool = "p"\nmetered = true\n'
    )


async def answers(connection: ScriptedConnection) -> None:
    await connection.send(document({"id": "x", "choices": [], "content": [], "output": [], **CACHED}))


def history(name: str, turn: int) -> list[dict[str, Any]]:
    lines = [{"role": "user", "content": f"{name}: hi"}]
    for number in range(1, turn):
        lines += [{"role": "assistant", "content": "answer " * 5}, {"role": "user", "content": f"question {number}"}]
    return lines


def marked(name: str, turn: int) -> dict[str, Any]:
    """As Claude Code sends turns: the last message is to be cached."""
    messages = history(name, turn)
    for each in messages:
        each["content"] = [{"type": "text", "text": each["content"]}]
    messages[-1]["content"][0]["cache_control"] = {"type": "ephemeral"}
    return {"max_tokens": 9, "messages": messages}


def text(name: str, turn: int) -> dict[str, Any]:
    return {"prompt": "".join(f"{each['content']}\n" for each in history(name, turn))}


def with_system(name: str, turn: int) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": SYSTEM}, *history(name, turn)]}


@pytest.mark.parametrize(
    ("path", "make", "header"),
    [
        ("chat/completions", lambda name, turn: {"messages": history(name, turn)}, ""),
        ("chat/completions", with_system, ""),
        ("messages", lambda name, turn: {"max_tokens": 9, "system": SYSTEM, "messages": history(name, turn)}, ""),
        ("messages", marked, ""),
        ("responses", lambda name, turn: {"input": history(name, turn)}, ""),
        ("completions", text, ""),
        ("responses", lambda name, turn: {"input": f"{turn} {name}", "prompt_cache_key": name}, ""),
        ("completions", lambda name, turn: {"prompt": f"{turn} {name}"}, "X-Session-Id: %s"),
    ],
    ids=["chat", "system", "messages", "marked", "items", "text", "key", "header"],
)
async def test_turns_of_a_conversation_stay_with_a_member(
    start_edge: StartEdge, start_upstream: StartUpstream, path: str, make: Any, header: str
) -> None:
    edge = await pool(start_edge, start_upstream, answers, 'balance = "prefix-affinity"')  # its former name
    for name in ("one", "two", "three", "four"):
        for turn in range(1, 5):
            headers = ((header % name,) if header else ()) + (f"X-Request-Id: {name}",)
            body = {"model": "public/m", **make(name, turn)}
            assert (await edge.ask(body, path=f"/v1/{path}", headers=headers))[0] == 200
    await edge.consistent()
    at = {(line["request_id"], line["endpoint"]) for line in await edge.log()}
    assert len(at) == 4


async def test_log_and_metrics_say_why_and_how_well_it_was_chosen(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    edge = await pool(start_edge, start_upstream, answers, count=2)
    for turn in range(1, 4):
        messages = [{"role": "system", "content": SYSTEM}, *history("a", turn)]
        await edge.ask({"model": "public/m", "messages": messages})
    await edge.ask({"model": "public/m", "input": "hi"}, path="/v1/embeddings")  # nothing of it is cached
    await edge.consistent()
    *turns, other = [line["choice"] for line in await edge.log()]
    assert other is None
    assert [each["hit_percent"] >= 90 for each in turns] == [False, True, True]
    assert all(each["score"] <= each["next_score"] for each in turns)
    assert {(each["backlog_bytes"], each["load"]) for each in turns} == {(0, 0)}
    values: dict[str, float] = {}
    for line in (await edge.server.metrics.render()).decode().splitlines():
        if line.startswith("edge_prefix_"):
            name = line.partition("{")[0]
            values[name] = values.get(name, 0) + float(line.rpartition(" ")[2])
    assert (values["edge_prefix_prompt_tokens_total"], values["edge_prefix_cached_tokens_total"]) == (1200, 900)
    assert 2 * 360 <= values["edge_prefix_predicted_tokens_total"] <= 800
    assert values["edge_prefix_backlog_bytes"] == 0
    assert 0 < values["edge_prefix_foreign"] < 0.075  # no turn was; what is taken to be so at first goes
    assert values["edge_prefix_entries"] > 5
    assert values["edge_prefix_trust"] < 1


async def test_one_endpoint_has_nothing_to_choose(start_edge: StartEdge, start_upstream: StartUpstream) -> None:
    edge = await pool(start_edge, start_upstream, answers, count=1)
    await edge.ask({"model": "public/m", "messages": history("a", 1)})
    assert (await edge.log())[-1]["choice"] is None
    assert b"edge_prefix_entries{" not in await edge.server.metrics.render()


async def test_nothing_is_counted_for_ever_whatever_fails(start_edge: StartEdge, start_upstream: StartUpstream) -> None:
    """Members that refuse, break and hang, clients that leave, requests that wait for a place."""
    chance = random.Random(4)

    async def script(connection: ScriptedConnection) -> None:
        match chance.randrange(6):
            case 0:
                connection.reset()
            case 1:
                await connection.send(b"HTTP/1.1 503 x\r\ncontent-length: 2\r\n\r\n{}")
            case 2:
                await connection.send(document({}, 400))
            case 3:
                await connection.closed.wait()
            case 4:
                await connection.send(
                    b"HTTP/1.1 200 x\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
                )
                await connection.send(chunk(b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'))
                connection.reset()
            case _:
                await answers(connection)

    settings = 'max_inflight = 2\nqueue = 100\nqueue_timeout = "30s"\nretry_after_send = true\nretry_budget = 1'
    edge = await pool(start_edge, start_upstream, script, settings)

    async def ask(number: int) -> None:
        client = await edge.connect()
        body = {"model": "public/m", "messages": history(f"{number % 7}", number % 5 + 1), "stream": number % 2 == 0}
        client.send(edge.request(body))
        leaving = asyncio.ensure_future(client.response())  # noqa: TID251  # awaited below, or cancelled with its client
        await asyncio.wait([leaving], timeout=0.2)
        client.close()
        leaving.cancel()
        with contextlib.suppress(BaseException):
            await leaving

    for start in range(0, 120, 24):
        await soon(asyncio.gather(*map(ask, range(start, start + 24))))
    await edge.consistent()
    caches = edge.server.generation.pools["p"].caches
    assert caches is not None
    assert len(caches.seats) == 4
