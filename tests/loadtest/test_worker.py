"""One process's part of a run, in this process, against an upstream that says exactly these bytes."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import orjson
import pytest
import trustme

from loadtest.arrivals import Arrivals
from loadtest.channel import Batch, Done, Told
from loadtest.outcome import Outcome
from loadtest.target import Target
from loadtest.worker import Plan, Worker
from loadtest.workload import SCENARIOS, Made
from tests.conftest import ScriptedConnection, StartUpstream
from tests.streams import document

ANSWER = document(
    {"choices": [{"message": {"content": "well"}}], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}
)
CHAT = SCENARIOS["chat"]


async def well(connection: ScriptedConnection) -> None:
    await connection.send(ANSWER)


def plan(*urls: str, count: int | None = 1, **changes: Any) -> Plan:
    targets = [Target(url, "sk-1") for url in urls]
    return replace(Plan(targets, CHAT.kind, CHAT.stream, "m", {}, Made(CHAT), Arrivals(count)), **changes)


class Played:
    """What a worker told."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.done: Done | None = None

    def tell(self, message: Told) -> None:
        assert isinstance(message, Batch)
        self.batches.append(message)

    @property
    def outcomes(self) -> list[Outcome]:
        return [each for batch in self.batches for each in batch.outcomes]


async def play(asked: Plan, stop: asyncio.Event | None = None) -> Played:
    played = Played()
    worker = Worker(asked, 0, 1, played.tell)
    await worker.warm()
    played.done = await worker.send_all(time.monotonic(), stop or asyncio.Event())
    return played


def heads_and_bodies(requests: list[bytes]) -> list[tuple[list[bytes], dict[str, Any]]]:
    cut = [request.partition(b"\r\n\r\n") for request in requests]
    return [(head.split(b"\r\n"), orjson.loads(body)) for head, _, body in cut]


async def test_what_an_answer_tells_is_told(start_upstream: StartUpstream) -> None:
    upstream = await start_upstream(well)
    played = await play(plan(upstream.url, count=2, warmups=1))
    assert [(each.input_tokens, each.output_tokens, each.error) for each in played.outcomes] == [(5, 7, "")] * 2
    assert len(upstream.requests) == 3
    assert [change > 0 for change in played.batches[-1].changes].count(True) == 2
    assert played.done is not None
    assert played.done.unfinished == 0


async def test_headers_are_added_or_replaced_and_a_query_stays(start_upstream: StartUpstream) -> None:
    upstream = await start_upstream(well)
    headers = (("X-Tenant", "a b"), ("user-agent", "mine"))
    target = Target(f"{upstream.url}/openai?api-version=2", "sk-1", headers=headers)
    await play(replace(plan(upstream.url), targets=[target]))
    [(head, _)] = heads_and_bodies(upstream.requests)
    assert head[0] == b"POST /openai/chat/completions?api-version=2 HTTP/1.1"
    assert {b"X-Tenant: a b", b"user-agent: mine", b"Authorization: Bearer sk-1"} <= set(head)
    assert not [line for line in head if line.startswith(b"User-Agent")]


async def test_several_urls_are_asked_in_turn(start_upstream: StartUpstream) -> None:
    first, second = await start_upstream(well), await start_upstream(well)
    played = await play(plan(first.url, second.url, count=5))
    assert (len(first.requests), len(second.requests)) == (3, 2)
    assert sorted(each.target for each in played.outcomes) == [0, 0, 0, 1, 1]


async def test_a_conversation_tells_all_that_was_said_and_ends_where_it_fails(start_upstream: StartUpstream) -> None:
    async def script(connection: ScriptedConnection) -> None:
        await connection.send(document({"error": {"code": "full"}}, 503) if len(upstream.requests) == 3 else ANSWER)

    upstream = await start_upstream(script)
    source = Made(CHAT, prefix_len=50, turns=5, think_time_s=0.001)
    played = await play(plan(upstream.url, source=source))
    bodies = [body for _, body in heads_and_bodies(upstream.requests)]
    roles = [[each["role"] for each in body["messages"]] for body in bodies]
    assert roles == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user", "assistant", "user", "assistant", "user"],
    ]
    assert bodies[1]["messages"][:2] == bodies[0]["messages"]
    assert bodies[2]["messages"][2] == {"role": "assistant", "content": "well"}
    assert [(each.turn, each.error) for each in played.outcomes] == [(0, ""), (1, ""), (2, "status 503 full")]


async def test_as_many_as_asked_are_kept_at_work_until_the_time_is_over(start_upstream: StartUpstream) -> None:
    upstream = await start_upstream(well)
    played = await play(plan(upstream.url, count=None, duration_s=0.1, max_concurrency=3))
    assert len(played.outcomes) > 3
    assert {each.queued for each in played.outcomes} == {0.0}
    live = most = 0
    for change in sorted((each for batch in played.batches for each in batch.changes), key=abs):
        live += 1 if change > 0 else -1
        most = max(most, live)
    assert (live, most) == (0, 3)


async def test_requests_that_are_due_wait_for_a_place_and_that_is_the_clients_queue(
    start_upstream: StartUpstream,
) -> None:
    async def slow(connection: ScriptedConnection) -> None:
        await asyncio.sleep(0.02)
        await connection.send(ANSWER)

    upstream = await start_upstream(slow)
    played = await play(plan(upstream.url, arrivals=Arrivals(3, times=[0.0, 0.0, 0.0]), max_concurrency=1))
    first, second, third = played.outcomes
    assert first.queued == 0.0
    for before, after in ((first, second), (second, third)):
        assert after.begun >= before.end
        assert after.start + after.queued >= before.end
    assert all(each.begun == pytest.approx(each.start + each.queued + each.lag) for each in played.outcomes)


async def test_what_is_stopped_tells_what_has_ended_and_counts_the_rest(start_upstream: StartUpstream) -> None:
    async def first_only(connection: ScriptedConnection) -> None:
        if len(upstream.requests) == 1:
            await connection.send(ANSWER)
        else:
            stop.set()
            await connection.reader.read()

    stop = asyncio.Event()
    upstream = await start_upstream(first_only)
    played = await play(plan(upstream.url, count=None, duration_s=3600.0, max_concurrency=1), stop)
    assert len(played.outcomes) == 1
    assert played.done is not None
    assert played.done.unfinished == 1


@pytest.fixture
async def tls_url() -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
        writer.write(ANSWER)
        await reader.read()
        writer.close()

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("nobody.example").configure_cert(context)
    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_any_certificate_will_do_where_that_is_said(tls_url: str) -> None:
    def asked(insecure: bool) -> Plan:
        return replace(plan(tls_url), targets=[Target(tls_url, "k", insecure=insecure)])

    [refused] = (await play(asked(False))).outcomes
    assert refused.error.startswith("connect: certificate")
    [served] = (await play(asked(True))).outcomes
    assert served.error == ""
