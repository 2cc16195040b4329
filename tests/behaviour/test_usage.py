"""What was used is recorded, once and to the token, and a client sees of it what it asked for."""

import asyncio
import errno
import gzip
import json
import os
import re
from itertools import pairwise, product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.simulator.chat import FINGERPRINT
from edge.simulator.dialects import Behaviour
from edge.simulator.server import Simulator
from tests.conftest import USER, Edge, ScriptedConnection, StartEdge, StartUpstream
from tests.profiles import examples
from tests.streams import chunk, document

METERED = """
[pools.r1]
endpoints = ["{upstream}"]
{pool}
[routes."public/deepseek-r1"]
pool = "r1"
metered = true
{route}
[routes."u-*"]
instance = "{upstream}"
"""
MODEL = "public/deepseek-r1"
DIALECTS = ["vllm", "sglang", "llamacpp", "openai"]
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TOKENS = 5
PROMPT_TOKENS = 12


def metered(url: str, pool: str = "", route: str = "") -> str:
    return METERED.replace("{upstream}", url).replace("{pool}", pool).replace("{route}", route)


def ask(path: str = "chat/completions", **members: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [], "prompt": "Hello", "input": "Hello", **members}


def simulate(**members: Any) -> dict[str, Any]:
    return {"simulate": {"tokens": TOKENS, "prompt_tokens": PROMPT_TOKENS, **members}}


def events(body: bytes) -> list[Any]:
    return [json.loads(data) for data in re.findall(rb"^data: (\{.*)$", body, re.MULTILINE)]


@pytest.mark.parametrize("stream", [False, True])
async def test_compressed_answer_is_passed_on_and_estimated(
    start_edge: StartEdge, start_upstream: StartUpstream, stream: bool
) -> None:
    """Nobody asked for it: `identity` goes upstream. What cannot be read is billed by its size, never as nothing."""
    words = b'{"choices":[{"message":{"content":"%b"}}],"usage":{"completion_tokens":7}}' % (b"word " * 40)
    packed = gzip.compress(b"data: %b\n\ndata: [DONE]\n\n" % words if stream else words)
    head = SSE if stream else SSE.replace(b"text/event-stream", b"application/json")
    head = head.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n")

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(head, chunk(packed), b"0\r\n\r\n")

    upstream = await start_upstream(script)
    edge = await start_edge(metered(upstream.url))
    status, headers, body = await edge.ask(ask(stream=stream, max_tokens=50))
    assert (status, headers["content-encoding"], body) == (200, "gzip", packed)
    (record,) = edge.records()
    assert (record["usage_source"], record["end"]) == ("estimated", "complete")
    assert 0 < record["completion_tokens"] <= 50


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_answer_is_recorded_with_what_its_upstream_counted(
    start_edge: StartEdge, simulator: Simulator, dialect: str
) -> None:
    edge = await start_edge(metered(simulator.url))
    ids = []
    paths = ("chat/completions", "completions", "responses", "messages")[: 3 if dialect == "openai" else 4]
    for path, stream in product(paths, (False, True)):
        body = ask(stream=stream, max_tokens=50, **simulate(dialect=dialect))
        status, headers, _ = await edge.ask(body, path=f"/v1/{path}")
        assert status == 200
        record = edge.records()[-1]
        ids.append(record["id"])
        assert record | {"id": "", "time": "", "ttft_ms": 0, "duration_ms": 0, "key_id": ""} == {
            "v": 2,
            "id": "",
            "time": "",
            "request_id": headers["x-request-id"],
            "key_id": "",
            "user": USER,
            "route": MODEL,
            "path": f"/v1/{path}",
            "model": MODEL,
            "region": None,
            "upstream_model": MODEL,
            "endpoint": simulator.url.removeprefix("http://"),
            "stream": stream,
            "status": 200,
            "end": "complete",
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": TOKENS,
            "cached_tokens": 0,
            "cache_creation_tokens": 0,
            "reasoning_tokens": 0,
            "units": 0,
            "unit": None,
            "usage_source": "final",
            "ttft_ms": 0,
            "duration_ms": 0,
            "retries": 0,
        }
    assert [begun["id"] for begun in edge.records(ended=False)] == ids
    assert [record["id"] for record in edge.records()] == ids
    await edge.consistent()


async def test_client_that_did_not_ask_for_usage_sees_the_stream_as_it_is_without(
    start_edge: StartEdge, simulator: Simulator
) -> None:
    plain, edge = (
        await start_edge(metered(simulator.url).replace("metered = true", "")),
        await start_edge(metered(simulator.url)),
    )
    asked: tuple[dict[str, Any] | None, ...] = (
        None, {}, {"include_usage": False}, {"include_usage": False, "other": 1},
    )  # fmt: skip
    for path, options in product(("chat/completions", "completions"), asked):
        body = ask(stream=True, seed=1, **simulate())
        _, _, expected = await plain.ask(body, path=f"/v1/{path}")
        if options is not None:
            body["stream_options"] = options
        _, _, received = await edge.ask(body, path=f"/v1/{path}")
        # vLLM moves its fingerprint to the frame with usage, which is not the client's.
        assert received == expected.replace(b',"system_fingerprint":"%b"' % FINGERPRINT.encode(), b"")
        sent = json.loads(simulator.requests[-1].body)
        assert sent == body | {"stream_options": (options or {}) | {"include_usage": True}}
    assert [record["completion_tokens"] for record in edge.records()] == [TOKENS] * 8
    # Without it there is still the count of the frames.
    counted = [(each["usage_source"], each["completion_tokens"]) for each in plain.records()]
    assert counted == [("estimated", TOKENS)] * 8


@pytest.mark.parametrize("usage", ["final", "continuous"])
async def test_client_that_asked_for_usage_gets_it_as_the_upstream_sent_it(
    start_edge: StartEdge, simulator: Simulator, usage: str
) -> None:
    edge = await start_edge(metered(simulator.url, f'usage = "{usage}"'))
    for asked in ({"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}):
        _, _, body = await edge.ask(ask(stream=True, stream_options=asked, **simulate()))
        *others, last = events(body)
        assert (last["choices"], last["usage"]["completion_tokens"]) == ([], TOKENS)
        assert all(("usage" in each) == ("continuous_usage_stats" in asked) for each in others)
    assert [each["completion_tokens"] for each in edge.records()] == [TOKENS, TOKENS]


async def test_instance_is_recorded_and_its_request_left_as_it_is(start_edge: StartEdge, simulator: Simulator) -> None:
    edge = await start_edge(metered(simulator.url))
    body = ask(stream=True, **simulate()) | {"model": f"{USER}/qwen2"}
    await edge.ask(body)
    assert json.loads(simulator.requests[-1].body) == body
    (record,) = edge.records()
    assert (record["route"], record["usage_source"], record["completion_tokens"]) == ("u-*", "estimated", TOKENS)


async def recorded_stream(simulator: Simulator, dialect: str) -> bytes:
    """The content of a stream with usage, as the dialect writes it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", simulator.port)
    body = json.dumps(
        ask(stream=True, seed=1, stream_options={"include_usage": True}, **simulate(dialect=dialect))
    ).encode()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    answer = await reader.read()
    writer.close()
    content, rest = b"", answer.partition(b"\r\n\r\n")[2]
    while size := int(rest.partition(b"\r\n")[0], 16):
        rest = rest.partition(b"\r\n")[2]
        content += rest[:size]
        rest = rest[size + 2 :]
    return content


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("asked", [True, False])
async def test_usage_is_read_however_the_stream_is_cut(
    start_edge: StartEdge, start_upstream: StartUpstream, simulator: Simulator, dialect: str, asked: bool
) -> None:
    """Into chunks and into segments, each at places of its own; the client's content does not depend on it."""
    content = await recorded_stream(simulator, dialect)
    parts: list[bytes] = []

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(SSE, *parts)

    upstream = await start_upstream(script)
    edge = await start_edge(metered(upstream.url))
    body = ask(stream=True, **({"stream_options": {"include_usage": True}} if asked else {}))
    events = [each for each in content.split(b"\n\n") if b'"choices":[]' not in each]
    shown = content if asked else b"\n\n".join(events).replace(b',"usage":null', b"")
    loop = asyncio.get_running_loop()
    done = 0

    @examples(60)
    @given(
        chunks=st.lists(st.integers(1, len(content) - 1), max_size=12),
        segments=st.lists(st.integers(1, len(content)), max_size=12),
        aligned=st.booleans(),
    )
    def cut(chunks: list[int], segments: list[int], aligned: bool) -> None:
        ends = [each.end() for each in re.finditer(b"\n\n", content)] if aligned else []
        at = sorted({0, len(content), *chunks, *ends})
        framed = b"".join(chunk(content[a:b]) for a, b in pairwise(at)) + b"0\r\n\r\n"
        places = sorted({0, len(framed), *segments})
        parts[:] = [framed[a:b] for a, b in pairwise(places)]
        found.append(asyncio.run_coroutine_threadsafe(edge.ask(body), loop).result())

    found: list[tuple[int, dict[str, str], bytes]] = []
    await asyncio.to_thread(cut)
    assert {each for _, _, each in found} == {shown}
    for record in edge.records():
        counted = record["prompt_tokens"], record["completion_tokens"], record["usage_source"], record["end"]
        assert counted == (PROMPT_TOKENS, TOKENS, "final", "complete")
        done += 1
    assert done == len(found)
    await edge.consistent()


@pytest.mark.parametrize("usage", ["final", "continuous"])
@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
async def test_stream_that_its_client_leaves_is_recorded_as_far_as_it_came(
    start_edge: StartEdge, simulator: Simulator, usage: str, dialect: str
) -> None:
    """The upstream stalls behind a known frame, so that what was read is what was sent."""
    edge = await start_edge(metered(simulator.url, f'usage = "{usage}"'))
    for tokens in range(1, TOKENS):
        client = await edge.connect()
        fault = simulate(dialect=dialect, fault="stall", after=tokens + 1)  # behind the frame with the role
        client.send(edge.request(ask(stream=True, **fault)))
        while b'%d"}' % (tokens - 1) not in (line := await client.reader.readuntil(b"\n")):
            assert b"[DONE]" not in line
        client.abort()
        await edge.idle()
        record = edge.records()[-1]
        assert (record["end"], record["completion_tokens"]) == ("client_gone", tokens)
        assert record["usage_source"] == ("running" if usage == "continuous" else "estimated")
        assert record["prompt_tokens"] == PROMPT_TOKENS or usage == "final"
    await edge.consistent()


@pytest.mark.parametrize(
    ("fault", "end", "status"),
    [
        ({"fault": "cut", "after": 3}, "upstream_cut", 200),
        ({"fault": "reset", "after": 3}, "upstream_cut", 200),
        ({"fault": "error_mid", "after": 3}, "upstream_error", 200),
        ({"fault": "error", "status": 400}, "upstream_error", 400),
        ({"fault": "error", "status": 500}, "upstream_error", 502),
        ({"fault": "error_first"}, "upstream_error", 502),
        ({"fault": "rubbish"}, "upstream_error", 502),
        ({"fault": "stall", "after": -1}, "first_byte_timeout", 504),
        ({"fault": "stall", "after": 3}, "idle_timeout", 200),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
async def test_record_says_how_a_request_ended(
    start_edge: StartEdge, simulator: Simulator, fault: dict[str, Any], end: str, status: int
) -> None:
    timeouts = 'first_byte_timeout = "200ms"\nidle_timeout = "200ms"'
    edge = await start_edge(metered(simulator.url, timeouts))
    client = await edge.connect()
    client.send(edge.request(ask(stream=True, **simulate(**fault)), headers=("Connection: close",)))
    await client.rest()
    await edge.idle()
    (record,) = edge.records()
    (line,) = await edge.log()
    assert (record["end"], record["status"]) == (end, status) == (line["end"], line["status"])
    expected = (2, "estimated") if status == 200 else (0, "none")
    assert (record["completion_tokens"], record["usage_source"]) == expected
    await edge.consistent()


async def test_record_is_complete_before_the_client_can_have_read_the_end(
    start_edge: StartEdge, simulator: Simulator
) -> None:
    edge = await start_edge(metered(simulator.url))
    client = await edge.connect()
    for stream in (True, False) * 20:
        client.send(edge.request(ask(stream=stream, **simulate())))
        await client.response()
        ids = {each["id"] for each in edge.records(ended=False)}
        assert {each["id"] for each in edge.records()} == ids


async def test_request_that_is_refused_before_it_is_accepted_is_not_recorded(edge: Edge) -> None:
    assert (await edge.ask({"model": "public/unknown"}))[0] == 404
    assert (await edge.ask({"model": MODEL}, key="sk-unknown-0000"))[0] == 401
    assert edge.records(ended=False) == []


@pytest.mark.parametrize("when_full", ["serve", "refuse"])
async def test_disk_that_cannot_be_written_refuses_requests_only_where_that_is_wanted(
    start_edge: StartEdge, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, when_full: str
) -> None:
    """Those that were accepted before it was noticed are recorded all the same, and a stream that runs goes on."""
    edge = await start_edge(metered(simulator.url) + f'[usage]\nwhen_full = "{when_full}"\n')
    journal, real = edge.server.journal, os.write

    def write(descriptor: int, data: bytes) -> int:
        if descriptor == journal._file._descriptor:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    client = await edge.connect()
    client.send(edge.request(ask(stream=True, **simulate(fault="stall", after=2))))
    await client.head()
    journal.drain()
    status, headers, body = await edge.ask(ask(**simulate()))
    assert status == (503 if when_full == "refuse" else 200)
    if when_full == "refuse":
        assert json.loads(body)["error"]["code"] == "journal_unavailable"
        assert headers["retry-after"] == "5"
    assert (journal.outage.reason, journal.lines_waiting) == ("No space left on device", 0)
    monkeypatch.undo()
    journal.retry()
    assert (await edge.ask(ask(**simulate())))[0] == 200
    client.close()
    await edge.idle()
    ends = [record["end"] for record in edge.records()]
    assert sorted(ends) == ["client_gone", "complete", *["complete"] * (when_full == "serve")]
    await edge.consistent()


async def test_images_are_counted_in_units(start_edge: StartEdge, simulator: Simulator) -> None:
    edge = await start_edge(metered(simulator.url))
    await edge.ask({"model": MODEL, "prompt": "a cat", "n": 3}, path="/v1/images/generations")
    assert [record["units"] for record in edge.records()] == [3]


@pytest.mark.parametrize(
    "line", ["", "content-type: text/plain\r\n", "content-type: application/json, text/event-stream\r\n"]
)
async def test_stream_that_its_type_does_not_name_is_metered_as_any_other(
    start_edge: StartEdge, start_upstream: StartUpstream, line: str
) -> None:
    token = b'data: {"model":"r1","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
    usage = b'data: {"model":"r1","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}}\n\n'
    head = f"HTTP/1.1 200 OK\r\n{line}transfer-encoding: chunked\r\n\r\n".encode()

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(head, *map(chunk, (token, token, usage, b"data: [DONE]\n\n")), b"0\r\n\r\n")

    upstream = await start_upstream(script)
    edge = await start_edge(metered(upstream.url, route='model = "r1"\nmodel_echo = true'))
    _, headers, body = await edge.ask(ask(stream=True))
    assert f"content-type: {headers['content-type']}\r\n" == line if line else "content-type" not in headers
    assert [each["model"] for each in events(body)] == [MODEL] * 2
    assert body.endswith(b"data: [DONE]\n\n")
    [record] = edge.records()
    assert (record["prompt_tokens"], record["completion_tokens"], record["usage_source"]) == (7, 2, "final")


async def test_sound_is_counted_in_characters_and_seconds(
    start_edge: StartEdge, start_upstream: StartUpstream, simulator: Simulator
) -> None:
    edge = await start_edge(metered(simulator.url))
    speak = {"model": MODEL, "input": "你好 Hello", "voice": "alloy"}
    await edge.ask(speak, path="/v1/audio/speech")
    status, _, _ = await edge.ask(speak | {"simulate": {"fault": "error", "status": 400}}, path="/v1/audio/speech")
    assert status == 400
    client = await edge.connect()
    client.send(edge.request(speak | {"simulate": {"fault": "stall", "after": 1}}, path="/v1/audio/speech"))
    await client.head()
    client.close()
    await edge.consistent()
    counted = [(each["units"], each["unit"], each["usage_source"], each["end"]) for each in edge.records()]
    assert counted == [
        (8, "characters", "final", "complete"),
        (0, None, "none", "upstream_error"),
        (8, "characters", "running", "client_gone"),
    ]


@pytest.mark.parametrize("sound", [b": ping", b"id:", b"data: x", b"\xff\xf3"])
async def test_sound_that_begins_as_an_event_does_is_sound(
    start_edge: StartEdge, start_upstream: StartUpstream, sound: bytes
) -> None:
    async def script(connection: ScriptedConnection) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: audio/pcm\r\ntransfer-encoding: chunked\r\n\r\n"
        await connection.send(head, chunk(sound), b"0\r\n\r\n")

    upstream = await start_upstream(script)
    edge = await start_edge(metered(upstream.url))
    _, headers, body = await edge.ask({"model": MODEL, "input": "Hello", "stream": True}, path="/v1/audio/speech")
    assert (body, "x-accel-buffering" in headers) == (sound, False)
    [record] = edge.records()
    assert (record["units"], record["unit"], record["end"]) == (5, "characters", "complete")


async def test_usage_is_metered_with_the_name_put_in(start_edge: StartEdge, simulator: Simulator) -> None:
    """`model_echo`, a heartbeat and a meter change the same events."""
    edge = await start_edge(metered(simulator.url, route='model = "r1"\nmodel_echo = true\nheartbeat = "15s"'))
    for stream in (True, False):
        _, _, body = await edge.ask(ask(stream=stream, **simulate()))
        assert {each["model"] for each in (events(body) if stream else [json.loads(body)])} == {MODEL}
        assert not stream or all(each["choices"] for each in events(body))
    assert [each["completion_tokens"] for each in edge.records()] == [TOKENS, TOKENS]


async def test_client_of_http_1_0_gets_no_usage_either(start_edge: StartEdge, simulator: Simulator) -> None:
    edge = await start_edge(metered(simulator.url))
    client = await edge.connect()
    client.send(edge.request(ask(stream=True, **simulate()), version="1.0"))
    body = (await client.rest()).partition(b"\r\n\r\n")[2]
    assert all(each["choices"] for each in events(body))
    assert body.endswith(b"data: [DONE]\n\n")
    assert [each["completion_tokens"] for each in edge.records()] == [TOKENS]


async def test_behaviour_without_usage_is_estimated_and_says_so(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    """A server that knows nothing of `stream_options`."""
    frames = [b'data: {"choices":[{"index":0,"delta":{"content":"%d"}}]}\n\n' % each for each in range(7)]

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(SSE, *map(chunk, frames), chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n")

    upstream = await start_upstream(script)
    edge = await start_edge(metered(upstream.url))
    _, _, body = await edge.ask(ask(stream=True))
    assert body == b"".join(frames) + b"data: [DONE]\n\n"
    (record,) = edge.records()
    assert (record["completion_tokens"], record["usage_source"], record["end"]) == (7, "estimated", "complete")
    assert record["prompt_tokens"] > 0


FRAME = b'data: {"choices":[{"index":0,"text":"a","delta":{"content":"a"},"finish_reason":null}]}\n\n'
LOGPROBS = {"id": "x", "choices": [{"text": "a", "logprobs": [{"token": "a", "logprob": -0.25}] * 400}]}


async def recorded(edge: Edge, **members: Any) -> tuple[int, str, str]:
    await edge.ask(ask(**members))
    await edge.consistent()
    record = edge.records()[-1]
    return record["completion_tokens"], record["usage_source"], record["end"]


@pytest.mark.parametrize("settings", ["", "context_length = 20"])
async def test_estimate_is_no_more_than_the_request_or_the_model_allows(
    start_edge: StartEdge, start_upstream: StartUpstream, settings: str
) -> None:
    """The engine tells no usage: neither log probabilities nor frames that are cut make more of an answer."""

    async def script(connection: ScriptedConnection) -> None:
        if b'"stream":true' in connection.request.replace(b": ", b":"):
            await connection.send(SSE + b"".join(map(chunk, [FRAME] * 30)))
            connection.reset()
        else:
            await connection.send(document(LOGPROBS))

    edge = await start_edge(metered((await start_upstream(script)).url, route=settings))
    size = len(json.dumps(LOGPROBS)) // 4
    most = 20 if settings else size
    assert await recorded(edge) == (most, "estimated", "complete")
    assert await recorded(edge, max_tokens=5) == (5, "estimated", "complete")
    assert await recorded(edge, max_tokens=5, n=2) == (10, "estimated", "complete")
    assert await recorded(edge, max_tokens=4, max_completion_tokens=6) == (6, "estimated", "complete")
    assert await recorded(edge, max_tokens=10**6) == (most, "estimated", "complete")
    assert await recorded(edge, stream=True, max_tokens=5) == (5, "estimated", "upstream_cut")
    assert await recorded(edge, stream=True) == (min(most, 30), "estimated", "upstream_cut")


async def test_context_that_the_server_of_the_pool_tells_bounds_an_estimate(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    async def script(connection: ScriptedConnection) -> None:
        models = {"data": [{"id": "m", "max_model_len": 40}]}
        await connection.send(document(models if connection.request.startswith(b"GET ") else LOGPROBS))

    edge = await start_edge(metered((await start_upstream(script)).url))
    await edge.ask(path="/v1/models", method="GET")
    assert await recorded(edge) == (40, "estimated", "complete")


@pytest.mark.parametrize(
    ("path", "answer", "end"),
    [
        ("chat/completions", {"error": {"message": "a" * 4000, "type": "server_error", "code": 500}}, "upstream_error"),
        ("completions", {"object": "error", "message": "a" * 4000, "code": 400}, "upstream_error"),
        ("messages", {"type": "error", "error": {"type": "api_error", "message": "a" * 4000}}, "upstream_error"),
        ("responses", {"id": "r", "status": "failed", "usage": None, "instructions": "a" * 4000}, "upstream_error"),
        ("responses", {"id": "r", "status": "queued", "usage": None, "instructions": "a" * 4000}, "complete"),
    ],
)
@pytest.mark.parametrize("route", ["", "model_echo = true"])
async def test_what_is_no_answer_counts_as_none(
    start_edge: StartEdge, start_upstream: StartUpstream, path: str, answer: dict[str, Any], end: str, route: str
) -> None:
    """A status of success that carries an error, a response that failed or waits: its client gets it as it came."""

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(document(answer))

    edge = await start_edge(metered((await start_upstream(script)).url, route=route))
    status, _, body = await edge.ask(ask(path), path=f"/v1/{path}")
    await edge.consistent()
    record = edge.records()[-1]
    assert (status, json.loads(body)) == (200, answer)
    assert (record["prompt_tokens"], record["completion_tokens"], record["usage_source"]) == (0, 0, "none")
    assert record["end"] == end


async def test_sound_in_a_prompt_is_not_billed_as_text_where_its_answer_is_cut(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    async def script(connection: ScriptedConnection) -> None:
        await connection.send(SSE + chunk(FRAME) * 3)
        connection.reset()

    edge = await start_edge(metered((await start_upstream(script)).url))
    sound = {"type": "input_audio", "input_audio": {"data": "UklGRiQA" * 66_667, "format": "wav"}}
    await edge.ask(ask(stream=True, messages=[{"role": "user", "content": [sound]}]))
    await edge.consistent()
    record = edge.records()[-1]
    assert 600 < record["prompt_tokens"] < 800
    assert (record["completion_tokens"], record["usage_source"]) == (3, "estimated")


def test_behaviour_of_the_simulator_is_what_is_counted_against() -> None:
    assert Behaviour().prompt_tokens == PROMPT_TOKENS
