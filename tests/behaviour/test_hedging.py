"""A stream whose first byte is late: a second server is asked, the client gets what begins first, the other is cut."""

import asyncio
import contextlib
import gc
import json
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from edge.client.answers import server_timing
from edge.exchange import Exchange, Hedged, Tried
from edge.hedging import Hedge
from edge.limits.admission import Permit
from edge.relay.relay import Relay
from edge.telemetry.access_log import AccessLog
from edge.upstream.first_bytes import LEAST_SAMPLES
from edge.upstream.pools import Pool
from edge.wire.connections import ConnectionPool, UpstreamConnection
from tests.conftest import (
    Edge,
    RawClient,
    Script,
    ScriptedConnection,
    ScriptedUpstream,
    StartEdge,
    StartUpstream,
    WatchMethod,
    soon,
)
from tests.streams import chunk, cut, document

MODEL = "public/m"
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
BUSY = document({"error": {"message": "busy"}}, 503)
MISSING = document({"error": {"message": "no such model"}}, 404)
WRONG = document({"error": {"message": "wrong", "type": "invalid_request_error"}}, 400)


def event(**members: Any) -> bytes:
    return b"data: " + json.dumps({"id": "x", "model": MODEL, "choices": [], **members}).encode() + b"\n\n"


def events(text: str) -> list[bytes]:
    """A stream of chat that says a text, with the usage that its server tells."""
    deltas = [event(choices=[{"index": 0, "delta": {"content": each}}]) for each in text]
    end = event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
    usage = event(usage={"prompt_tokens": 7, "completion_tokens": len(text), "total_tokens": 7 + len(text)})
    return [*deltas, end, usage, b"data: [DONE]\n\n"]


def stream(text: str) -> bytes:
    return SSE + b"".join(map(chunk, events(text))) + b"0\r\n\r\n"


async def silent(connection: ScriptedConnection) -> None:
    """Say nothing, until the edge leaves."""
    await connection.reader.read()


def says(*parts: bytes, when: asyncio.Event | None = None) -> Script:
    """Say something, then nothing until the edge leaves; `when` is what it waits for."""

    async def script(connection: ScriptedConnection) -> None:
        if when is not None:
            await when.wait()
        await connection.send(*parts)
        if not parts[-1].endswith((b"0\r\n\r\n", b"}")):
            await connection.reader.read()

    return script


def dies(when: asyncio.Event) -> Script:
    async def script(connection: ScriptedConnection) -> None:
        await when.wait()
        connection.reset()

    return script


class Scene:
    """An edge before servers of one model; each request goes to the first of them first."""

    edge: Edge

    def __init__(self, servers: list[ScriptedUpstream]) -> None:
        self.servers = servers

    @property
    def pool(self) -> Pool:
        return self.edge.server.generation.pools["p"]

    def body(self, **more: Any) -> dict[str, Any]:
        return {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "hi"}], **more}

    async def asked(self, path: str = "/v1/chat/completions", **more: Any) -> RawClient:
        client = await self.edge.connect()
        client.send(self.edge.request(self.body(**more), path=path))
        return client

    async def ask(self, **more: Any) -> tuple[int, bytes]:
        client = await self.asked(**more)
        status, _, content = await soon(client.response())
        client.close()
        return status, content

    async def told(self) -> dict[str, Any]:
        """The line of the only request; nothing is left of it anywhere."""
        await self.edge.consistent()
        assert self.pool.retrying == 0
        (line,), (record,) = await self.edge.log(), self.edge.records()
        assert record["end"] == line["end"]
        assert record.get("hedge") == (line["hedge"] if record.get("hedges") else None)
        return line

    def outcomes(self, line: dict[str, Any]) -> list[tuple[int, str]]:
        """The endpoints that were asked, each by its place, with what came of it."""
        names = [server.url.removeprefix("http://") for server in self.servers]
        return [(names.index(each["endpoint"]), each["outcome"]) for each in line["attempts"]]


StartScene = Callable[..., Awaitable[Scene]]


@pytest.fixture
def scene(start_edge: StartEdge, start_upstream: StartUpstream) -> StartScene:
    async def start(*scripts: Script, after: str = "1ms", pool: str = "", route: str = "", server: str = "") -> Scene:
        scene = Scene([await start_upstream(each) for each in scripts])
        urls = ", ".join(f'"{each.url}"' for each in scene.servers)
        balance = "" if "balance" in pool else 'balance = "round-robin"\n'
        hedge = f'hedge_after = "{after}"\n' if after else ""
        scene.edge = await start_edge(
            f"[pools.p]\nendpoints = [{urls}]\n{balance}{hedge}{pool}\n"
            f'[routes."{MODEL}"]\npool = "p"\nmetered = true\n{route}\n',
            server=server,
        )
        return scene

    return start


# --- who wins


@pytest.mark.parametrize("step", [0, 1, 37])
async def test_the_second_server_answers_for_one_that_is_silent_which_is_cut(scene: StartScene, step: int) -> None:
    whole = stream("second")
    parts = cut(whole, range(step, len(whole), step)) if step else [whole]
    it = await scene(silent, says(*parts))
    _, content = await it.ask(stream_options={"include_usage": True})
    assert content == b"".join(events("second"))
    await soon(it.servers[0].gone.wait())
    line = await it.told()
    assert it.outcomes(line) == [(0, "outrun"), (1, "complete")]
    assert (line["hedge"], line["retries"], line["status"]) == ("won", 0, 200)
    assert line["endpoint"] == it.servers[1].url.removeprefix("http://")
    assert (line["prompt_tokens"], line["completion_tokens"]) == (7, 6)
    assert not any(member.endpoint.health.is_tainted for member in it.pool.members)


@pytest.mark.parametrize("path", ["completions", "messages"])
async def test_every_dialect_that_is_safe_to_ask_twice_is(scene: StartScene, path: str) -> None:
    it = await scene(silent, says(stream("second")))
    status, content = await it.ask(path=f"/v1/{path}", prompt="hi", max_tokens=9)
    assert (status, content.count(b'"content"')) == (200, len("second"))
    assert (await it.told())["hedge"] == "won"


async def test_the_first_server_answers_after_all_and_the_second_is_cut(scene: StartScene) -> None:
    asked = asyncio.Event()

    async def second(connection: ScriptedConnection) -> None:
        asked.set()
        await silent(connection)

    it = await scene(says(stream("first"), when=asked), second)
    _, content = await it.ask(stream_options={"include_usage": True})
    assert content == b"".join(events("first"))
    await soon(it.servers[1].gone.wait())
    line = await it.told()
    assert it.outcomes(line) == [(1, "outrun"), (0, "complete")]
    assert (line["hedge"], line["retries"], line["completion_tokens"]) == ("lost", 0, 5)
    assert not any(member.endpoint.health.is_tainted for member in it.pool.members)
    assert f"X-Request-Id: {line['upstream_id']}".encode() in it.servers[0].requests[0]
    metrics = (await it.edge.server.metrics.render()).decode()
    assert 'edge_pool_hedges_total{pool="p",outcome="lost"} 1' in metrics
    assert 'edge_pool_hedge_after_seconds{pool="p"} 0.001' in metrics


@pytest.mark.parametrize("slow", [0, 1])
async def test_a_server_that_accepts_no_connection_is_outrun(
    scene: StartScene, monkeypatch: pytest.MonkeyPatch, slow: int
) -> None:
    connecting, connect = asyncio.Event(), ConnectionPool.connect

    async def connects(pool: ConnectionPool, *args: Any) -> UpstreamConnection:
        if str(pool.url) == it.servers[slow].url:
            connecting.set()
            await asyncio.Event().wait()
        return await connect(pool, *args)

    monkeypatch.setattr(ConnectionPool, "connect", connects)
    it = await scene(says(stream("first"), when=connecting), says(stream("second")))
    assert (await it.ask())[0] == 200
    line = await it.told()
    assert it.outcomes(line) == [(slow, "outrun"), (1 - slow, "complete")]
    assert it.servers[slow].connections == 0


async def test_of_two_that_begin_in_the_same_turn_of_the_loop_the_client_gets_one(scene: StartScene) -> None:
    turns: list[asyncio.Event] = []

    async def server(connection: ScriptedConnection) -> None:
        await turns[-1].wait()
        connection.writer.write(stream("answer"))

    it = await scene(server, server)
    for _ in range(20):
        turns.append(asyncio.Event())
        for each in it.servers:
            each.asked.clear()
        client = await it.asked(stream_options={"include_usage": True})
        for each in it.servers:
            await soon(each.asked.wait())
        turns[-1].set()
        assert (await soon(client.response()))[2] == b"".join(events("answer"))
        client.close()
        await it.edge.consistent()


@pytest.mark.parametrize("refusal", [WRONG, BUSY, MISSING, b"HTTP/1.1 none"], ids=["400", "503", "404", "malformed"])
async def test_a_first_server_that_refuses_in_the_turn_in_which_the_second_begins_writes_into_no_stream(
    scene: StartScene, monkeypatch: pytest.MonkeyPatch, refusal: bytes
) -> None:
    """Its refusal is there, and the request has not woken up to it."""
    refuses, fail = asyncio.Event(), Relay.fail

    def fails(relay: Relay, *args: Any) -> None:
        fail(relay, *args)
        (hedge,) = hedges
        second = hedge._second
        assert second is not None
        assert second.relay is not None
        second.relay._answer.connection.receive(stream("second"))

    monkeypatch.setattr(Relay, "fail", fails)
    hedges: list[Hedge] = []
    relay = Hedge.relay

    async def noting(hedge: Hedge, *args: Any) -> None:
        hedges[:] = [hedge]
        await relay(hedge, *args)

    monkeypatch.setattr(Hedge, "relay", noting)
    sent = asyncio.Event()

    async def second(connection: ScriptedConnection) -> None:
        refuses.set()
        await sent.wait()

    it = await scene(says(refusal + b"\r\n\r\n", when=refuses), second)
    assert (await it.ask(stream_options={"include_usage": True}))[1] == b"".join(events("second"))
    sent.set()
    line = await it.told()
    assert (line["hedge"], line["end"]) == ("won", "complete")
    assert it.outcomes(line) == [(0, "outrun"), (1, "complete")]
    assert not any(member.endpoint.health.is_tainted for member in it.pool.members)


async def test_a_second_server_that_is_given_up_in_the_turn_in_which_the_first_begins_leaves_no_trace(
    scene: StartScene, watch: WatchMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, fail = watch(Hedge, "_ask_second"), Relay.fail

    def fails(relay: Relay, *args: Any) -> None:
        fail(relay, *args)
        asked.calls[0]._first.relay._answer.connection.receive(stream("first"))

    async def second(connection: ScriptedConnection) -> None:
        monkeypatch.setattr(Relay, "fail", fails)
        asked.calls[0]._second.relay._answer.overdue()  # as after `first_byte_timeout`
        await silent(connection)

    it = await scene(silent, second)
    assert (await it.ask())[1].count(b"content") == len("first")
    line = await it.told()
    assert (line["end"], line["phase"], line["hedge"]) == ("complete", "done", "lost")
    assert it.outcomes(line) == [(1, "outrun"), (0, "complete")]


async def test_a_first_server_that_is_given_up_in_the_turn_in_which_the_second_begins_leaves_no_trace(
    scene: StartScene, watch: WatchMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, fail = watch(Hedge, "_ask_second"), Relay.fail

    def fails(relay: Relay, *args: Any) -> None:
        fail(relay, *args)
        asked.calls[0]._second.relay._answer.connection.receive(stream("second"))

    async def second(connection: ScriptedConnection) -> None:
        monkeypatch.setattr(Relay, "fail", fails)
        asked.calls[0]._first.relay._answer.overdue()
        await silent(connection)

    it = await scene(silent, second)
    assert (await it.ask())[1].count(b"content") == len("second")
    line = await it.told()
    assert (line["end"], line["phase"], line["hedge"]) == ("complete", "done", "won")
    assert it.outcomes(line) == [(0, "outrun"), (1, "complete")]


async def test_a_first_server_that_connects_as_it_is_outrun_changes_no_charge(
    scene: StartScene, watch: WatchMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client left within the stream: what it got counts, and not the prompt alone."""
    charged: list[tuple[int, int]] = []
    charge, connect, decide, outrun = Permit.charge, ConnectionPool.connect, Hedge.decide, asyncio.Event()
    lost = watch(Relay, "lose")

    async def connects(pool: ConnectionPool, *args: Any) -> UpstreamConnection:
        connection = await connect(pool, *args)
        if str(pool.url) == it.servers[0].url:
            await outrun.wait()
        return connection

    def decides(hedge: Hedge, lane: Any) -> None:
        outrun.set()
        decide(hedge, lane)

    def charges(permit: Permit, tokens: int, answer_tokens: int) -> None:
        charged.append((tokens, answer_tokens))
        charge(permit, tokens, answer_tokens)

    monkeypatch.setattr(ConnectionPool, "connect", connects)
    monkeypatch.setattr(Hedge, "decide", decides)
    monkeypatch.setattr(Permit, "charge", charges)
    part = SSE + b"".join(map(chunk, events("second")[:6]))
    it = await scene(silent, says(part), route='limit = "free"\n[limits.free]\ntokens_per_minute = 100000\n')
    client = await it.asked()
    await soon(client.reader.readuntil(b'"d"'))
    await lost.called()  # the connection that came too late
    client.abort()
    line = await it.told()
    assert (line["end"], line["phase"], line["completion_tokens"]) == ("client_gone", "stream", 6)
    ((tokens, answer_tokens),) = charged
    assert (tokens, answer_tokens) == (line["prompt_tokens"] + 6, 6)


async def test_the_body_of_who_was_outrun_is_let_go_while_the_other_streams(
    scene: StartScene, watch: WatchMethod
) -> None:
    asked = watch(Hedge, "_ask_second")
    it = await scene(silent, says(SSE + chunk(events("s")[0])))
    client = await it.asked()
    await soon(client.reader.readuntil(b'"s"'))
    (hedge,) = asked.calls
    assert [lane.attempt.body for lane in (hedge._first, hedge._second)] == [(), ()]
    client.abort()
    await it.told()


async def test_a_client_that_leaves_the_stream_of_who_won_pays_for_what_it_had(scene: StartScene) -> None:
    asked = asyncio.Event()

    async def second(connection: ScriptedConnection) -> None:
        asked.set()
        await silent(connection)

    it = await scene(says(SSE + b"".join(map(chunk, events("first")[:4])), when=asked), second)
    client = await it.asked()
    await soon(client.reader.readuntil(b'"s"'))
    await soon(it.servers[1].gone.wait())
    client.abort()
    await soon(it.servers[0].gone.wait())
    line = await it.told()
    assert (line["end"], line["hedge"], line["completion_tokens"]) == ("client_gone", "lost", 4)


async def test_a_head_alone_decides_nothing(scene: StartScene) -> None:
    """Servers send it at once, and their first token much later."""
    it = await scene(says(SSE), says(stream("second")))
    assert (await it.ask())[1].count(b"content") == len("second")
    assert (await it.told())["hedge"] == "won"


async def test_an_answer_within_the_time_is_asked_of_one_server(scene: StartScene) -> None:
    it = await scene(says(stream("first")), silent, after="30s")
    assert (await it.ask())[0] == 200
    line = await it.told()
    assert (line["hedge"], line["attempts"], it.servers[1].requests) == (None, None, [])


# --- who fails


async def test_a_second_server_that_fails_leaves_the_first_to_answer(scene: StartScene, watch: WatchMethod) -> None:
    failed, left = asyncio.Event(), watch(Hedge, "_leave")

    async def second(connection: ScriptedConnection) -> None:
        await connection.send(BUSY)

    it = await scene(says(stream("first"), when=failed), second)
    client = await it.asked()
    await left.called()
    assert [member.endpoint.health.is_tainted for member in it.pool.members] == [False, True]
    failed.set()
    assert (await soon(client.response()))[0] == 200
    client.close()
    line = await it.told()
    assert it.outcomes(line) == [(1, "upstream_error"), (0, "complete")]
    assert (line["hedge"], line["retries"]) == ("failed", 0)


@pytest.mark.parametrize("who", ["first", "second"])
async def test_a_server_that_has_no_such_model_is_at_fault_where_the_other_one_answers(
    scene: StartScene, watch: WatchMethod, who: str
) -> None:
    over = watch(Hedge, "_leave" if who == "second" else "lease")
    asked = asyncio.Event()

    async def answers(connection: ScriptedConnection) -> None:
        asked.set()
        await over.called()
        await connection.send(stream("answer"))

    async def second_lacks_it(connection: ScriptedConnection) -> None:
        await connection.send(MISSING)

    it = await scene(*([says(MISSING, when=asked), answers] if who == "first" else [answers, second_lacks_it]))
    assert (await it.ask())[0] == 200
    await it.told()
    assert [member.endpoint.health.is_tainted for member in it.pool.members] == [who == "first", who == "second"]


@pytest.mark.parametrize("how", ["busy", "dead", "error first"])
async def test_a_first_server_that_fails_leaves_the_second_to_answer(
    scene: StartScene, watch: WatchMethod, how: str
) -> None:
    """After a connection that dies nobody else is asked, for a prompt may have killed it; but here somebody is."""
    asked, failed, taken = asyncio.Event(), asyncio.Event(), watch(Hedge, "lease")
    error = SSE + chunk(b'data: {"error": {"message": "x", "code": 503}}\n\n') + b"0\r\n\r\n"
    first = {"busy": says(BUSY, when=asked), "dead": dies(asked), "error first": says(error, when=asked)}[how]

    async def second(connection: ScriptedConnection) -> None:
        asked.set()
        await failed.wait()
        await connection.send(stream("second"))

    it = await scene(first, second)
    client = await it.asked()
    await taken.called()
    assert [member.endpoint.health.is_tainted for member in it.pool.members] == [True, False]
    failed.set()
    assert (await soon(client.response()))[0] == 200
    client.close()
    line = await it.told()
    assert it.outcomes(line)[1:] == [(1, "complete")]
    assert (line["hedge"], line["retries"]) == ("won", 0)


@pytest.mark.parametrize("who", ["first", "second"])
async def test_an_error_that_no_other_server_is_asked_for_answers_for_both(scene: StartScene, who: str) -> None:
    asked = asyncio.Event()

    async def second(connection: ScriptedConnection) -> None:
        asked.set()
        await (silent(connection) if who == "first" else connection.send(WRONG))

    it = await scene(says(WRONG, when=asked) if who == "first" else silent, second)
    status, content = await it.ask()
    assert (status, json.loads(content)["error"]["message"]) == (400, "wrong")
    await soon(it.servers[who == "first"].gone.wait())
    line = await it.told()
    assert sorted(it.outcomes(line)) == sorted([(who == "first", "outrun"), (who != "first", "upstream_error")])
    assert (line["hedge"], line["retries"]) == ({"first": "lost", "second": "won"}[who], 0)


async def test_a_first_server_that_is_given_up_leaves_the_second_to_answer(
    scene: StartScene, watch: WatchMethod
) -> None:
    asked, taken = watch(Hedge, "_ask_second"), watch(Hedge, "lease")

    async def second(connection: ScriptedConnection) -> None:
        (hedge,) = asked.calls
        hedge._first.relay._answer.overdue()  # as after `first_byte_timeout`
        await taken.called()
        await connection.send(stream("second"))

    it = await scene(silent, second)
    assert (await it.ask())[0] == 200
    line = await it.told()
    assert it.outcomes(line) == [(0, "first_byte_timeout"), (1, "complete")]
    assert (line["end"], line["hedge"]) == ("complete", "won")


async def test_where_both_fail_a_third_is_asked_as_a_retry(scene: StartScene) -> None:
    asked = asyncio.Event()

    async def second(connection: ScriptedConnection) -> None:
        asked.set()
        await connection.send(BUSY)

    it = await scene(says(BUSY, when=asked), second, says(stream("third")))
    assert (await it.ask())[0] == 200
    line = await it.told()
    assert [outcome for _, outcome in it.outcomes(line)] == ["upstream_error", "upstream_error", "complete"]
    assert (line["hedge"], line["retries"]) == ("failed", 1)


# --- who leaves


async def test_a_client_that_leaves_while_both_are_asked_frees_both(scene: StartScene, watch: WatchMethod) -> None:
    sent = watch(Relay, "send")
    it = await scene(silent, silent)
    client = await it.asked()
    await sent.until(lambda: len(sent.calls) == 2)
    client.abort()
    for server in it.servers:
        await soon(server.gone.wait())
    line = await it.told()
    assert (line["end"], line["hedge"], line["completion_tokens"]) == ("client_gone", "left", 0)
    assert it.outcomes(line) == [(1, "client_gone"), (0, "client_gone")]
    (record,) = it.edge.records()
    assert (record["hedges"], record["prompt_tokens"]) == (1, 0)


@pytest.mark.parametrize("slow", [0, 1])
async def test_a_drain_that_is_over_cuts_both_also_where_one_of_them_connects(
    scene: StartScene, monkeypatch: pytest.MonkeyPatch, slow: int
) -> None:
    connecting, connect = asyncio.Event(), ConnectionPool.connect

    async def connects(pool: ConnectionPool, *args: Any) -> UpstreamConnection:
        if str(pool.url) == it.servers[slow].url:
            connecting.set()
            await asyncio.Event().wait()
        return await connect(pool, *args)

    monkeypatch.setattr(ConnectionPool, "connect", connects)
    it = await scene(silent, silent, server='drain_timeout = "10ms"')
    client = await it.asked()
    await soon(connecting.wait())
    await soon(it.servers[1 - slow].asked.wait())
    it.edge.server.stop()
    assert (await soon(client.response()))[0] == 503
    await soon(it.servers[1 - slow].gone.wait())
    await it.edge.idle()
    (line,), (record,) = await it.edge.log(), it.edge.records()
    assert (line["end"], line["hedge"], record["end"], record["status"]) == ("drained", "left", "drained", 503)
    assert it.outcomes(line) == [(1, "drained"), (0, "drained")]


async def test_a_client_that_has_left_asks_no_second_server(
    scene: StartScene, watch: WatchMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    relayed, gone, timers = watch(Hedge, "relay"), Relay.client_gone, list[object]()

    def goes(relay: Relay) -> None:
        gone(relay)
        timers.append(relayed.calls[0]._timer)

    monkeypatch.setattr(Relay, "client_gone", goes)
    it = await scene(silent, silent, after="30s")
    client = await it.asked()
    await soon(it.servers[0].asked.wait())
    client.abort()
    assert (await it.told())["hedge"] is None
    assert timers == [None]


async def test_a_drain_that_is_over_cuts_both(scene: StartScene) -> None:
    it = await scene(silent, silent, server='drain_timeout = "10ms"')
    client = await it.asked()
    for server in it.servers:
        await soon(server.asked.wait())
    it.edge.server.stop()
    assert (await soon(client.response()))[0] == 503
    for server in it.servers:
        await soon(server.gone.wait())
    await it.edge.idle()
    (line,) = await it.edge.log()
    assert (line["end"], line["hedge"]) == ("drained", "left")
    assert it.outcomes(line) == [(1, "drained"), (0, "drained")]


@pytest.mark.parametrize("who", ["first", "second"])
async def test_nothing_of_a_request_is_left_to_the_collector(scene: StartScene, who: str) -> None:
    asked = asyncio.Event()

    async def second(connection: ScriptedConnection) -> None:
        asked.set()
        await (silent(connection) if who == "first" else connection.send(stream("second")))

    it = await scene(says(stream("first"), when=asked) if who == "first" else silent, second)
    gc.collect()
    gc.disable()
    try:
        await it.ask()
        await it.edge.consistent()
        await asyncio.sleep(0)
        assert [each for each in gc.get_objects() if isinstance(each, Hedge | Relay)] == []
    finally:
        gc.enable()


async def test_whatever_two_servers_do_at_once_each_request_has_one_answer_and_one_record(
    scene: StartScene, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(5)

    async def server(connection: ScriptedConnection) -> None:
        what = chance.choice(["answers", "is slow", "is silent", "is busy", "is wrong", "dies", "dies within"])
        if what != "answers":
            await asyncio.sleep(chance.random() / 100)
        if what in ("answers", "is slow"):
            await connection.send(*cut(stream("answer"), sorted(chance.sample(range(1, 500), 3))))
        elif what == "is silent":
            await silent(connection)
        elif what in ("is busy", "is wrong"):
            await connection.send(BUSY if what == "is busy" else WRONG)
        else:
            await connection.send(stream("answer")[: 300 if what == "dies within" else 0])
            connection.reset()

    it = await scene(*[server] * 4, pool='resume = "replay"\nretry_after_send = true\nretry_budget = 1.0\n')

    async def ask(patience_s: float) -> None:
        client = await it.asked(temperature=0)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            async with asyncio.timeout(patience_s):  # both may be silent
                status, _, content = await client.response()
                assert status != 200 or content.endswith((b"[DONE]\n\n", b"}\n\n"))
                assert content.count(b'"content"') <= len("answer")
        client.abort()

    for _ in range(3):
        await asyncio.gather(*(ask(chance.choice([0.01, 0.3])) for _ in range(50)))
    await it.edge.consistent()
    assert it.pool.retrying == 0
    assert [each.getMessage() for each in caplog.records if each.levelname == "ERROR"] == []
    for line in await it.edge.log():
        if line["attempts"] is not None:
            hedges = line["hedge"] in ("won", "lost", "failed", "left")
            assert len(line["attempts"]) == 1 + line["retries"] + hedges


async def test_a_second_server_that_failed_is_not_asked_again_when_the_first_fails_too(scene: StartScene) -> None:
    failed = asyncio.Event()
    bad = document({"error": {"message": "bad gateway"}}, 502)

    async def second(connection: ScriptedConnection) -> None:
        await connection.send(bad)
        failed.set()

    it = await scene(says(bad, when=failed), second)
    assert (await it.ask())[0] == 502
    line = await it.told()
    assert sorted(it.outcomes(line)) == [(0, "upstream_error"), (1, "upstream_error")]
    assert [len(server.requests) for server in it.servers] == [1, 1]


@pytest.mark.parametrize("queue", ["", "queue = 5"])
async def test_a_request_without_a_place_gets_that_of_a_second_server(scene: StartScene, queue: str) -> None:
    """Real work goes before a duplicate."""
    answers = asyncio.Event()

    async def second(connection: ScriptedConnection) -> None:
        if len(it.servers[1].requests) == 1:
            await silent(connection)
        else:
            await connection.send(stream("other"))

    it = await scene(says(stream("first"), when=answers), second, pool=f"max_inflight = 1\n{queue}\n")
    client = await it.asked()
    await soon(it.servers[1].asked.wait())
    assert (await it.ask())[1].count(b"content") == len("other")
    answers.set()
    assert (await soon(client.response()))[0] == 200
    client.close()
    await it.edge.consistent()
    other, line = await it.edge.log()
    assert other["queue_ms"] is None
    assert (line["hedge"], it.outcomes(line)) == ("room", [(1, "displaced"), (0, "complete")])
    assert it.pool.retrying == 0
    assert it.pool.duplicates == {}


async def test_the_body_of_a_request_that_was_refused_is_let_go(scene: StartScene, watch: WatchMethod) -> None:
    relayed = watch(Hedge, "relay")
    it = await scene(says(WRONG), silent, after="30s")
    assert (await it.ask())[0] == 400
    assert [hedge._first.attempt.body for hedge in relayed.calls] == [()]


async def test_a_defect_that_raises_a_timeout_of_its_own_is_not_taken_for_a_first_server_that_was_outrun(
    scene: StartScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = ConnectionPool.connect

    async def connects(pool: ConnectionPool, *args: Any) -> UpstreamConnection:
        if str(pool.url) == it.servers[0].url:
            await it.servers[1].asked.wait()
            raise TimeoutError
        return await connect(pool, *args)

    monkeypatch.setattr(ConnectionPool, "connect", connects)
    it = await scene(silent, silent)
    assert (await it.ask())[0] == 500
    await soon(it.servers[1].gone.wait())
    assert (await it.told())["end"] == "internal_error"


# --- when no second one is asked


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"stream": False}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 2**14}]}),
        ("responses", {"input": "hi"}),
        ("embeddings", {"input": "hi"}),
    ],
    ids=["no stream", "long", "may be kept, or use tools", "generates nothing"],
)
async def test_other_requests_are_asked_of_one_server(
    scene: StartScene, watch: WatchMethod, path: str, body: dict[str, Any]
) -> None:
    begun = watch(Hedge, "__init__")
    it = await scene(says(document({"usage": {}})), silent)
    await it.ask(path=f"/v1/{path}", **body)
    assert (begun.calls, (await it.told())["hedge"]) == ([], None)


@pytest.mark.parametrize("model", [MODEL, "u-1100a15812cc/own"])
async def test_a_pool_without_the_setting_and_an_instance_have_no_hedge(
    start_edge: StartEdge, start_upstream: StartUpstream, watch: WatchMethod, model: str
) -> None:
    begun, server = watch(Hedge, "__init__"), await start_upstream(says(stream("a")))
    edge = await start_edge(
        f'[pools.p]\nendpoints = ["{server.url}", "http://127.0.0.1:9"]\nbalance = "round-robin"\n'
        f'[routes."{MODEL}"]\npool = "p"\n[routes."u-*"]\ninstance = "{server.url}"\n'
    )
    assert (await edge.ask({"model": model, "stream": True, "messages": []}))[0] == 200
    assert (begun.calls, [line["hedge"] for line in await edge.log()]) == ([], [None])


@pytest.mark.parametrize("why", ["budget", "member", "queue"])
async def test_no_second_server_is_asked_where_it_is_one_too_many(
    scene: StartScene, watch: WatchMethod, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    decided, answers = watch(Hedge, "_ask_second"), asyncio.Event()
    it = await scene(says(stream("first"), when=answers), silent)
    if why == "budget":
        it.pool.retrying = 3
    elif why == "member":
        endpoint = it.pool.members[1].endpoint
        for number in range(3):
            endpoint.health.unreachable(0.0, number)
    else:
        monkeypatch.setattr(Pool, "waiting", 1)
    client = await it.asked()
    await decided.called()
    answers.set()
    assert (await soon(client.response()))[0] == 200
    client.close()
    await it.edge.consistent()
    (line,) = await it.edge.log()
    assert (line["hedge"], line["attempts"], it.servers[1].requests) == (why, None, [])
    assert "hedges" not in it.edge.records()[0]


async def test_a_request_that_waited_for_its_place_is_asked_of_one_server(
    scene: StartScene, watch: WatchMethod
) -> None:
    waits, begun = watch(Pool, "wait"), watch(Hedge, "__init__")
    answers = asyncio.Event()
    scripts = [says(stream("a"), when=answers) for _ in range(2)]
    it = await scene(*scripts, after="30s", pool="max_inflight = 1\nqueue = 5\n")
    clients = [await it.asked() for _ in range(3)]
    await waits.called()
    answers.set()
    for client in clients:
        assert (await soon(client.response()))[0] == 200
        client.close()
    await it.edge.consistent()
    assert len(begun.calls) == 2


async def test_a_retry_is_asked_of_one_server(scene: StartScene, watch: WatchMethod) -> None:
    decided = watch(Hedge, "_ask_second")
    it = await scene(says(BUSY), says(stream("second")), silent, after="30s")
    assert (await it.ask())[0] == 200
    line = await it.told()
    assert (line["hedge"], line["retries"], decided.calls) == (None, 1, [])


# --- beside other parts


async def test_a_heartbeat_decides_for_the_server_that_it_stands_for(scene: StartScene) -> None:
    """That is the first one, unless the loop was held up: behind a heartbeat nobody else is asked."""
    answers = asyncio.Event()
    it = await scene(*[says(stream("answer"), when=answers)] * 2, route='heartbeat = "20ms"')
    client = await it.asked()
    assert b" 200 " in await soon(client.head())
    answers.set()
    assert (await soon(client.reader.readuntil(b"[DONE]"))).count(b"content") == len("answer")
    client.close()
    line = await it.told()
    assert [outcome for _, outcome in it.outcomes(line)] == ["outrun", "complete"]
    assert line["hedge"] in ("lost", "won")


async def test_behind_a_heartbeat_no_second_server_is_asked(scene: StartScene, watch: WatchMethod) -> None:
    decided, answers = watch(Hedge, "_ask_second"), asyncio.Event()
    it = await scene(says(stream("first"), when=answers), silent, after="30s", route='heartbeat = "5ms"')
    client = await it.asked()
    await soon(client.head())
    answers.set()
    assert await soon(client.reader.readuntil(b"[DONE]"))
    client.close()
    assert (await it.told())["hedge"] is None
    assert decided.calls == []


async def test_a_stream_that_a_second_server_began_goes_on_at_the_first_when_it_breaks(scene: StartScene) -> None:
    """Who was slow has not failed."""
    part = SSE + b"".join(map(chunk, events("answer")[:3]))

    async def slow_once(connection: ScriptedConnection) -> None:
        if len(it.servers[0].requests) == 1:
            await silent(connection)
        else:
            await connection.send(stream("answer"))

    async def breaks(connection: ScriptedConnection) -> None:
        await connection.send(part)
        connection.writer.close()

    it = await scene(slow_once, breaks, pool='resume = "replay"\n')
    _, content = await it.ask(temperature=0)
    assert content.count(b'"content"') == len("answer")
    assert content.endswith(b"[DONE]\n\n")
    line = await it.told()
    assert it.outcomes(line) == [(0, "outrun"), (1, "upstream_cut"), (0, "complete")]
    assert (line["hedge"], line["resume"], line["retries"]) == ("won", "resumed", 1)
    assert it.edge.records()[0].keys() >= {"hedges", "resumes"}


async def test_a_cache_aware_pool_learns_where_the_prompt_was_read(
    scene: StartScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow: set[int] = set()

    def server(number: int) -> Script:
        async def script(connection: ScriptedConnection) -> None:
            if not slow:
                slow.add(number)
            await (silent(connection) if number in slow else connection.send(stream("a")))

        return script

    it = await scene(server(0), server(1), pool='balance = "cache-aware"\n')
    turns = [{"role": "user", "content": "x" * 3000}]
    await it.ask(messages=turns)
    (lost,) = slow
    slow.add(9)  # nobody else is slow, and this one is well again
    slow.remove(lost)
    await it.edge.consistent()
    monkeypatch.setattr(Pool, "hedge_after_s", None)
    for number in range(3):
        turns += [{"role": "assistant", "content": "a"}, {"role": "user", "content": f"question {number}"}]
        await it.ask(messages=turns)
    await it.edge.consistent()
    assert len(it.servers[lost].requests) == 1
    assert [line["choice"]["hit_percent"] > 90 for line in await it.edge.log()] == [False, True, True, True]


# --- the measured time


async def test_nothing_is_asked_twice_before_enough_is_measured(scene: StartScene, watch: WatchMethod) -> None:
    decided = watch(Hedge, "_ask_second")
    it = await scene(says(stream("a")), says(stream("a")), after="p95")
    window = it.pool.first_bytes
    assert window is not None
    for _ in range(LEAST_SAMPLES - 1):
        window.note(0.0)
    assert it.pool.hedge_after_s is None
    await it.ask()
    assert it.pool.hedge_after_s is not None
    assert decided.calls == []


async def test_a_request_gives_one_time_and_one_that_was_outrun_counts_as_slow(scene: StartScene) -> None:
    it = await scene(silent, says(stream("a")), after="p95")
    window = it.pool.first_bytes
    assert window is not None
    for _ in range(LEAST_SAMPLES):
        window.note(0.01)
    await it.ask()
    await it.told()
    assert len(window._latest) == LEAST_SAMPLES + 1
    assert window._latest[-1] >= 0.01
    assert window.p95_s == 0.01


async def test_a_first_server_that_fails_shows_no_time(scene: StartScene, watch: WatchMethod) -> None:
    asked, taken = asyncio.Event(), watch(Hedge, "lease")

    async def second(connection: ScriptedConnection) -> None:
        asked.set()
        await taken.called()
        await connection.send(stream("second"))

    it = await scene(dies(asked), second, after="p95")
    window = it.pool.first_bytes
    assert window is not None
    for _ in range(LEAST_SAMPLES):
        window.note(0.001)
    assert (await it.ask())[0] == 200
    await it.told()
    assert len(window._latest) == LEAST_SAMPLES


async def test_the_wait_for_who_was_outrun_is_no_overhead_of_the_edge(
    scene: StartScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished: list[Exchange] = []
    monkeypatch.setattr(AccessLog, "write", lambda self, exchange: finished.append(exchange))
    it = await scene(silent, says(stream("second")))
    await it.ask()
    await it.edge.consistent()
    (exchange,) = finished
    assert exchange.hedge is not None
    assert 0 < exchange.asked_at - exchange.hedge.asked_at <= exchange.waited_s


def test_the_time_of_two_attempts_side_by_side_is_the_upstreams() -> None:
    first, second = Tried("a", 502, "upstream_error", "", 6000.0), Tried("b", 502, "upstream_error", "", 2000.0)
    exchange = Exchange("id", "POST", 0.0, 100.0, asked_at=108.0, retries=1, failures=[second, first])
    exchange.hedge = Hedged("failed", 101.0)
    assert server_timing(exchange, 110.0) == b"server-timing: edge;dur=1000.0, upstream;dur=9000.0\r\n"


async def test_a_server_that_was_too_slow_for_its_time_counts_with_it(scene: StartScene) -> None:
    it = await scene(silent, silent, after="p95", pool='first_byte_timeout = "20ms"\n')
    window = it.pool.first_bytes
    assert window is not None
    assert (await it.ask())[0] == 504
    assert len(window._latest) == 1
    assert window._latest[0] >= 0.01


@pytest.mark.parametrize(("usual_s", "counts"), [(1e9, False), (0.0, True)])
async def test_a_client_that_leaves_before_the_first_byte_shows_a_time_that_is_long_alone(
    scene: StartScene, usual_s: float, counts: bool
) -> None:
    it = await scene(silent, silent, after="p95")
    window = it.pool.first_bytes
    assert window is not None
    for _ in range(LEAST_SAMPLES):
        window.note(usual_s)
    client = await it.asked()
    await soon(it.servers[0].asked.wait())
    client.abort()
    await it.told()
    assert len(window._latest) == LEAST_SAMPLES + counts
