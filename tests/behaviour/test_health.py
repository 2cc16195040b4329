"""What answers do to the health of a pool: a caller's bad input nothing, a member that fails whoever asks a lot."""

import asyncio
import logging
from collections.abc import Sequence

import pytest

from edge.keys.stores.registry import KeyRegistry
from tests.conftest import USER, Edge, Script, ScriptedConnection, StartEdge, StartUpstream
from tests.streams import chunk, document

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = chunk(b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n')
ERROR = chunk(b'data: {"error":{"message":"list index out of range","type":"InternalServerError","code":500}}\n\n')
ENGINE_ERROR = {"error": {"message": "list index out of range", "type": "InternalServerError", "code": 500}}
# What an engine does with one request, by a word in its body, which is bad input of some kind.
ANSWERS = {
    b"engine-error": [document(ENGINE_ERROR, 500)],
    b"gateway-page": [b"HTTP/1.1 504 X\r\ncontent-type: text/html\r\ncontent-length: 4\r\n\r\nlate"],
    b"moderated": [document({"error": {"message": "flagged"}}, 403)],
    b"over-the-account": [document({"error": {"message": "too many tokens"}}, 429, "retry-after: 60")],
    b"error-opens-stream": [STREAM, ERROR, b"0\r\n\r\n"],
    b"error-within-stream": [STREAM, EVENT, ERROR, b"0\r\n\r\n"],
    b"cut": [STREAM, EVENT, b""],
    b"closed": [b""],
    b"no-http": [b"220 ready\r\n\r\n"],
    b"no-such-model": [document({"error": {"message": "The model `m` does not exist."}}, 404)],
}


async def engine(connection: ScriptedConnection) -> None:
    """An engine that is well."""
    for word, parts in ANSWERS.items():
        if word in connection.request:
            await connection.send(*parts)
            if not parts[-1]:
                connection.reset()
            return
    await connection.send(document({"choices": []}))


def always(*parts: bytes) -> Script:
    async def script(connection: ScriptedConnection) -> None:
        await connection.send(*parts)

    return script


def asked(word: bytes = b"", model: str = "public/m") -> dict[str, object]:
    return {"model": model, "stream": b"stream" in word or word == b"cut", "messages": [], "note": word.decode()}


def pool(name: str, urls: Sequence[str], more: str = "") -> str:
    return f'[pools."{name}"]\nendpoints = {list(urls)}\n{more}\n[routes."public/{name}"]\npool = "{name}"\n'


def keys_of(edge: Edge, *users: str) -> list[str]:
    with KeyRegistry(edge.keys_path) as registry:
        return [registry.create(user)[0] for user in users]


async def test_bad_input_of_one_user_takes_no_member_from_another(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    """Through all members, of every kind, with two keys: 2,585 such requests had all three members out, each time."""
    members = [await start_upstream(engine) for _ in range(3)]
    edge = await start_edge(pool("m", [each.url for each in members], 'balance = "round-robin"'))
    keys = [edge.key, *keys_of(edge, USER)]
    [other] = keys_of(edge, "u-000000000001")
    for word in ANSWERS:
        statuses = {(await edge.ask(asked(word), key=keys[at % 2]))[0] for at in range(12)}
        assert statuses != {200} or b"stream" in word or word == b"cut", word
        before = [len(each.requests) for each in members]
        assert [(await edge.ask(asked(), key=other))[0] for _ in range(6)] == [200] * 6, word
        assert [len(each.requests) - earlier for each, earlier in zip(members, before, strict=True)] == [2, 2, 2], word
    assert [each.health.total_ejections for each in edge.server.endpoints.states()] == [0, 0, 0]
    await edge.consistent()


async def test_timeouts_of_one_user_take_no_member_from_another(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    """A prompt may be so long that no engine begins to answer it in time."""

    async def slow(connection: ScriptedConnection) -> None:
        if b"long" in connection.request:
            await connection.closed.wait()
        else:
            await engine(connection)

    members = [await start_upstream(slow) for _ in range(2)]
    in_turn = 'balance = "round-robin"\nfirst_byte_timeout = "20ms"'
    edge = await start_edge(pool("m", [each.url for each in members], in_turn))
    [other] = keys_of(edge, "u-000000000001")
    assert {status for status, _, _ in await asyncio.gather(*(edge.ask(asked(b"long")) for _ in range(12)))} == {504}
    now = edge.server._loop.time()
    for endpoint in edge.server.endpoints.states():
        assert endpoint.health.admits(now, "u-000000000001")
        assert not endpoint.health.admits(now, USER)
    assert (await edge.ask(asked(), key=other))[0] == 200


async def test_a_member_that_refuses_at_once_draws_no_traffic(
    start_edge: StartEdge, start_upstream: StartUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    """It looks least loaded: of 383 requests to three members, one of which answered 404, 191 failed."""
    good = await start_upstream(engine)
    checks = {302: "its URL", 401: "its `api_key`", 402: "the account", 403: "what its `api_key`", 407: "its URL"}
    words = {"error": {"message": "The model `m` does not exist."}}
    bad = {status: await start_upstream(always(document(words, status))) for status in (*checks, 404)}
    balance = 'balance = "least-loaded"'  # all ask the same, which else stays where it was answered
    edge = await start_edge("".join(pool(f"m{status}", [each.url, good.url], balance) for status, each in bad.items()))
    for status, member in bad.items():
        assert [(await edge.ask(asked(model=f"public/m{status}")))[0] for _ in range(30)] == [200] * 30
        assert 1 <= len(member.requests) <= 3, status
    logged = [record.getMessage() for record in caplog.records if " to the edge: " in record.getMessage()]
    assert [line.partition(" answers ")[2][:25] for line in logged] == [
        f"{status} to the edge: check {check}"[:25] for status, check in checks.items()
    ]
    assert all(check in line for check, line in zip(checks.values(), logged, strict=True))


async def test_a_model_that_is_nowhere_is_asked_for_twice_and_counts_against_nobody(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    members = [await start_upstream(engine) for _ in range(3)]
    edge = await start_edge(pool("m", [each.url for each in members]))
    for at in range(1, 6):
        status, _, _ = await edge.ask(asked(b"no-such-model"))
        assert (status, sum(len(each.requests) for each in members)) == (404, 2 * at)
    assert not any(each.health.is_tainted for each in edge.server.endpoints.states())


async def test_a_member_that_fails_everybody_is_out_after_three_users_though_its_probes_succeed(
    start_edge: StartEdge, start_upstream: StartUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine whose model has died: its server still answers what needs no model."""
    caplog.set_level(logging.WARNING, "edge.upstream.endpoints")

    async def dead(connection: ScriptedConnection) -> None:
        request = connection.request
        needs_model = request.startswith(b"POST") and not request.startswith(b"POST /tokenize")
        await connection.send(document(ENGINE_ERROR, 500) if needs_model else document({"tokens": []}))

    bad, good = await start_upstream(dead), await start_upstream(engine)
    probes = 'balance = "round-robin"\nhealth = { interval = "10ms" }'
    edge = await start_edge(pool("m", [bad.url, good.url], probes))
    keys = keys_of(edge, *(f"u-{at:012x}" for at in range(4)))
    statuses = []
    for at in range(12):
        statuses.append((await edge.ask(asked(), key=keys[at // 2 % 4]))[0])
        assert (await edge.ask(asked(), path="/v1/tokenize", key=keys[0]))[0] == 200
        assert (await edge.ask(asked(), path="/v1/tokenize", key=keys[0]))[0] == 200
    assert statuses.count(502) == 3
    assert statuses[6:] == [200] * 6
    assert [each.health.total_ejections for each in edge.server.endpoints.states()] == [1, 0]
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == ["ejected for 5 s"]


async def test_an_instance_is_asked_whatever_it_answered_and_so_is_that_of_another_user(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    upstream = await start_upstream(engine)
    edge = await start_edge(f'[routes."u-*"]\ninstance = "{upstream.url}"\n')
    [other] = keys_of(edge, "u-000000000001")
    for word in (b"engine-error", b"moderated", b"over-the-account", b"closed"):
        for _ in range(5):
            await edge.ask(asked(word, f"{USER}/m"))
        assert (await edge.ask(asked(model="u-000000000001/m"), key=other))[0] == 200
    assert len(upstream.requests) >= 4 * 6  # one on a connection that was closed is sent again
    assert not any(each.health.is_tainted for each in edge.server.endpoints.states())


async def test_an_error_behind_heartbeats_counts_for_its_user(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    """It is an event by then, since the client has its status, and as much a fault as any."""
    beaten = asyncio.Event()

    async def late(connection: ScriptedConnection) -> None:
        await beaten.wait()
        await connection.send(document(ENGINE_ERROR, 500))

    edge = await start_edge(pool("m", [(await start_upstream(late)).url]) + 'heartbeat = "10ms"\n')
    [endpoint] = edge.server.endpoints.states()
    for times in range(1, 4):
        beaten.clear()
        client = await edge.connect()
        client.send(edge.request(asked(b"stream")))
        assert b" 200 " in await client.head()
        beaten.set()
        assert b'"code":"upstream_error"' in await client.reader.readuntil(b"\r\n0\r\n\r\n")
        await edge.idle()
        now = edge.server._loop.time()
        assert endpoint.health.admits(now, USER) == (times < 3)
        assert endpoint.health.admits(now, "u-000000000001")
