"""The simulated model server: what tests, the demo and load tests rely on when it plays an engine."""

import asyncio
import io
import itertools
import os
import signal
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import orjson
import pytest
import trustme
import uvloop

from edge.simulator.behaviour import Behaviour
from edge.simulator.scripts import answer_text
from edge.simulator.server import Simulator, run
from tests.simulator.asking import CHAT, RawClient, ask, objects, raw, request_bytes, simulating

HOUR_MS = 3_600_000


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with simulating() as simulator:
        yield simulator


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def stream(simulator: Simulator, **body: Any) -> list[bytes]:
    async with raw(simulator) as connection:
        connection.ask(stream=True, **body)
        await connection.head()
        return await connection.chunks()


# --- Streams


async def test_each_frame_of_a_chat_stream_is_one_chunk(simulator: Simulator) -> None:
    """Role first, then one frame per token, the last with the reason to finish, then `[DONE]`."""
    chunks = await stream(simulator, simulate={"tokens": 9})
    assert all(c.startswith(b"data: ") and c.endswith(b"\n\n") and c.count(b"\n\n") == 1 for c in chunks)
    assert chunks[-1] == b"data: [DONE]\n\n"
    found = objects(chunks)
    assert "".join(o["choices"][0]["delta"]["content"] for o in found) == answer_text(9)
    assert [o["choices"][0]["finish_reason"] for o in found] == [None] * 9 + ["stop"]


HEADS = [
    ("vllm", True, ["date", "server", "content-type", "vary", "transfer-encoding"],
     {"server": "uvicorn", "content-type": "text/event-stream; charset=utf-8", "vary": "Origin"}),
    ("vllm", False, ["date", "server", "content-length", "content-type", "vary"],
     {"server": "uvicorn", "content-type": "application/json"}),
    ("sglang", True, ["date", "server", "content-type", "vary", "transfer-encoding"],
     {"content-type": "text/event-stream; charset=utf-8"}),
    ("llamacpp", True, ["Server", "Access-Control-Allow-Origin", "X-Accel-Buffering", "Content-Type",
                        "Transfer-Encoding", "Keep-Alive"],
     {"Server": "llama.cpp", "Access-Control-Allow-Origin": "", "X-Accel-Buffering": "no",
      "Content-Type": "text/event-stream", "Keep-Alive": "timeout=5, max=100"}),
    ("llamacpp", False, ["Server", "Access-Control-Allow-Origin", "Content-Type", "Content-Length", "Keep-Alive"],
     {"Content-Type": "application/json; charset=utf-8"}),
    ("openai", True, ["date", "server", "content-type", "openai-processing-ms", "x-request-id", "transfer-encoding"],
     {"content-type": "text/event-stream; charset=utf-8"}),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "streamed", "names", "values"), HEADS)
async def test_head_is_written_as_its_server_writes_it(
    simulator: Simulator, dialect: Any, streamed: bool, names: list[str], values: dict[str, str]
) -> None:
    """Names, their case and their order; also when the request itself chose the dialect."""
    answer = await ask(simulator, {"stream": streamed, "simulate": {"dialect": dialect}})
    assert list(answer.headers) == names
    assert answer.headers.items() >= values.items()


async def test_sglang_forbids_caches_for_responses(simulator: Simulator) -> None:
    body = {"stream": True, "simulate": {"dialect": "sglang"}}
    answer = await ask(simulator, body, "/v1/responses")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["connection"] == "keep-alive"


async def test_the_head_is_sent_before_the_first_frame_exists(simulator: Simulator) -> None:
    """Starlette sends the head of a StreamingResponse at once: status 200 says nothing about the first token."""
    async with raw(simulator) as connection:
        connection.ask(stream=True, simulate={"ttft_ms": HOUR_MS})
        status, _ = await connection.head()
        assert status == b"HTTP/1.1 200 OK"
        assert simulator.requests[0].frames_sent == 0
        assert simulator.requests[0].outcome == "open"
        assert simulator.active == 1


async def test_equal_requests_get_equal_bytes_and_a_seed_other_ids(simulator: Simulator) -> None:
    """Load tests compare byte for byte; a seed per stream shows bytes that reached the wrong client."""
    first, again, other = [await stream(simulator, seed=seed) for seed in (1, 1, 2)]
    assert first == again
    assert objects(first)[0]["id"] != objects(other)[0]["id"]


async def test_llamacpp_pings_while_it_is_silent(simulator: Simulator) -> None:
    """Before the first token and between two; a comment is no frame."""
    for pause, before in (({"ttft_ms": HOUR_MS}, 0), ({"interval_ms": HOUR_MS}, 1)):
        async with raw(simulator) as connection:
            connection.ask(stream=True, simulate={"dialect": "llamacpp", "ping_ms": 1, **pause})
            await connection.head()
            chunks = [await connection.chunk() for _ in range(before + 3)]
        assert chunks[before:] == [b":\n\n"] * 3
        assert simulator.requests[-1].frames_sent == before


async def test_ping_is_framed_as_the_stream_is(simulator: Simulator) -> None:
    async with raw(simulator) as connection:
        pause = {"ttft_ms": HOUR_MS, "ping_ms": 1, "framing": "close"}
        connection.ask(stream=True, simulate={"dialect": "llamacpp", **pause})
        await connection.head()
        assert await connection.reader.readexactly(6) == b":\n\n:\n\n"


async def test_pings_do_not_change_a_stream(simulator: Simulator) -> None:
    plain = {"dialect": "llamacpp", "tokens": 4}
    chunks = await stream(simulator, simulate=plain | {"interval_ms": 3, "ping_ms": 1})
    assert [chunk for chunk in chunks if chunk != b":\n\n"] == await stream(simulator, simulate=plain)


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
async def test_others_do_not_ping(simulator: Simulator, dialect: Any) -> None:
    slow = {"dialect": dialect, "interval_ms": 3, "ping_ms": 1, "tokens": 4}
    assert b":\n\n" not in await stream(simulator, simulate=slow)


async def test_frames_come_at_their_pace(simulator: Simulator) -> None:
    """A frame that is an hour away is not sent with the one before it."""
    async with raw(simulator) as connection:
        connection.ask(stream=True, simulate={"interval_ms": HOUR_MS})
        await connection.head()
        await connection.chunk()
        assert simulator.requests[0].frames_sent == 1


async def test_jitter_varies_the_pace_and_completes(simulator: Simulator) -> None:
    """Jitter changes when frames come, never which."""
    assert await stream(simulator, simulate={"interval_ms": 1, "jitter": 1}) == await stream(simulator)


async def test_a_late_stream_makes_up_for_it_so_that_its_rate_is_the_one_that_was_said(simulator: Simulator) -> None:
    """Each frame is due at a time of its own: what holds the loop up moves none of those behind it."""
    interval_ms, frames = 50, 20
    async with raw(simulator) as connection:
        connection.ask(stream=True, simulate={"tokens": 1000, "interval_ms": interval_ms})
        await connection.head()
        await simulator.wait_for(lambda: simulator.requests[0].frames_sent > 0)
        before = simulator.requests[0].frames_sent
        time.sleep(frames * interval_ms / 1000)
        await simulator.wait_for(lambda: simulator.requests[0].frames_sent > before)
        assert simulator.requests[0].frames_sent - before > frames // 2  # one, if the others were moved


async def test_a_client_that_does_not_read_stops_the_stream(simulator: Simulator) -> None:
    """Like uvicorn the simulator waits for room and goes on from there; memory does not grow with the answer."""
    async with raw(simulator) as connection:
        connection.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        # 12 MB: more than sockets hold
        connection.ask(stream=True, simulate={"tokens": 50_000, "context_length": 60_000})
        await connection.head()
        await simulator.wait_for(lambda: simulator.requests[0].frames_sent > 0)
        assert simulator.requests[0].frames_sent < 50_000
        assert len(await connection.chunks()) == 50_002
        await simulator.wait_for(lambda: simulator.requests[0].outcome == "complete")


async def test_a_thousand_streams_at_once_are_right_to_the_byte() -> None:
    """No stream gets another's frames, loses one, or waits for another."""
    async with simulating(Behaviour(tokens=8, ttft_ms=5, interval_ms=1)) as simulator:
        first = dict(enumerate([await stream(simulator, seed=seed) for seed in range(5)]))
        connections = [await asyncio.open_connection("127.0.0.1", simulator.port) for _ in range(1_000)]
        for number, (_, writer) in enumerate(connections):
            writer.write(request_bytes({"model": "m", "stream": True, "seed": number % 5}))
        answers = await asyncio.gather(*(RawClient(r, w).head() for r, w in connections))
        assert {status for status, _ in answers} == {b"HTTP/1.1 200 OK"}
        streams = await asyncio.gather(*(RawClient(r, w).chunks() for r, w in connections))
        assert all(found == first[number % 5] for number, found in enumerate(streams))
        await simulator.wait_for(lambda: simulator.active == 0)
        assert {record.outcome for record in simulator.requests} == {"complete"}
        for _, writer in connections:
            writer.transport.abort()
        await simulator.wait_for(lambda: simulator.connections == 0)


# --- Whole answers


async def test_a_request_without_stream_gets_json(simulator: Simulator) -> None:
    """With the text of all tokens, their count, and a content-length."""
    answer = await ask(simulator, {"model": "public/m", "messages": []})
    assert answer.headers["content-length"]
    assert answer.json["model"] == "public/m"
    assert answer.json["choices"][0]["message"]["content"] == answer_text(16)
    assert simulator.requests[0].tokens == 16


async def test_many_requests_share_one_connection(simulator: Simulator) -> None:
    """Keep-alive holds after streams, whole answers and errors alike."""
    async with raw(simulator) as connection:
        for body in ({"stream": True}, {}, {"simulate": {"fault": "error"}}, {"stream": True}):
            connection.ask(**body)
            _, headers = await connection.head()
            if "content-length" in headers:
                await connection.reader.readexactly(int(headers["content-length"]))
            else:
                await connection.chunks()
        assert simulator.connections == 1
        assert len(simulator.requests) == 4


ENDINGS: list[tuple[dict[str, Any], str, str]] = [
    ({"stream": True}, "Keep-Alive", "timeout=5, max=100"),
    ({"temperature": "hot"}, "Connection", "close"),
    ({"simulate": {"dialect": "llamacpp", "fault": "error", "status": 503}}, "Connection", "close"),
]


@pytest.mark.parametrize(("body", "name", "value"), ENDINGS)
async def test_llamacpp_closes_after_a_stream_and_after_an_error(body: dict[str, Any], name: str, value: str) -> None:
    """It announces that it keeps the connection after a stream, and does not."""
    async with simulating(Behaviour(dialect="llamacpp")) as simulator, raw(simulator) as connection:
        connection.ask(**body)
        _, headers = await connection.head()
        assert headers[name] == value
        await connection.rest()


async def test_llamacpp_closes_after_a_hundred_requests() -> None:
    async with simulating(Behaviour(dialect="llamacpp", tokens=1)) as simulator, raw(simulator) as connection:
        for number in range(1, 101):
            connection.ask()
            _, headers = await connection.head()
            assert ("Connection" in headers) == (number == 100)
            await connection.reader.readexactly(int(headers["Content-Length"]))
        assert await connection.rest() == b""


async def test_an_idle_connection_is_closed_after_the_keepalive_timeout() -> None:
    """A uvicorn closes after 5 s; here the time is a parameter, so that the race with a pool can be staged."""
    async with simulating(keepalive_timeout_s=0.05) as simulator, raw(simulator) as connection:
        connection.ask()
        _, headers = await connection.head()
        await connection.reader.readexactly(int(headers["content-length"]))
        assert await connection.rest() == b""


async def test_connection_close_and_http_1_0_are_honoured(simulator: Simulator) -> None:
    """An HTTP/1.0 client gets no chunks (RFC 9112 section 7.1) but an answer that ends with the connection."""
    async with raw(simulator) as connection:
        connection.writer.write(request_bytes({"stream": True}, headers="connection: close\r\n"))
        _, headers = await connection.head()
        assert headers["connection"] == "close"
        assert (await connection.rest()).endswith(b"\r\n0\r\n\r\n")
    async with raw(simulator) as connection:
        connection.writer.write(request_bytes({"stream": True}, version="1.0"))
        _, headers = await connection.head()
        assert "transfer-encoding" not in headers
        assert (await connection.rest()).endswith(b"\n\ndata: [DONE]\n\n")


async def test_framing_can_be_chosen(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    """Any kind of answer in any framing has the same content."""
    for streamed, framing in itertools.product((True, False), ("chunked", "length", "close")):
        body = {"model": "m", "stream": streamed}
        async with client.post(simulator.url + CHAT, json=body) as response:
            plain = await response.read()
        async with client.post(simulator.url + CHAT, json=body | {"simulate": {"framing": framing}}) as response:
            assert await response.read() == plain
        assert ("content-length" in response.headers) == (framing == "length")
        assert ("transfer-encoding" in response.headers) == (framing == "chunked")
        assert (response.headers.get("connection") == "close") == (framing == "close")


async def test_a_client_that_expects_100_is_invited(simulator: Simulator) -> None:
    """RFC 9110 section 10.1.1: curl waits for it with large bodies."""
    async with raw(simulator) as connection:
        head, body = request_bytes({}, headers="expect: 100-continue\r\n").split(b"\r\n\r\n")
        connection.writer.write(head + b"\r\n\r\n")
        assert await connection.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.writer.write(body)
        assert (await connection.head())[0] == b"HTTP/1.1 200 OK"


async def test_a_large_body_is_read_whole(simulator: Simulator, client: aiohttp.ClientSession) -> None:
    """The limit of 1 MiB that is aiohttp's own does not apply."""
    body = io.BytesIO(orjson.dumps({"model": "m", "pad": "x" * 3_000_000}))
    headers = {"content-type": "application/json"}
    async with client.post(simulator.url + CHAT, data=body, headers=headers) as response:
        assert response.status == 200
    assert len(simulator.requests[0].body) > 3_000_000


async def test_a_record_has_the_request_as_it_came(simulator: Simulator) -> None:
    """Names of headers in their own case, doubled ones twice, and the query."""
    async with raw(simulator) as connection:
        connection.writer.write(request_bytes({}, CHAT + "?a=%2F", headers="X-Two: 1\r\nX-Two: 2\r\n"))
        await connection.head()
    record = simulator.requests[0]
    assert (record.method, record.path, record.body) == ("POST", CHAT + "?a=%2F", b"{}")
    assert [value for name, value in record.headers if name == "X-Two"] == ["1", "2"]
    assert record.ended >= record.started


async def test_no_records_are_kept_when_none_are_wanted() -> None:
    """Under load the bodies would fill the memory."""
    async with simulating(keep_requests=0) as simulator:
        assert await stream(simulator)
        assert not simulator.requests


async def test_tls_is_spoken_with_a_context(client: aiohttp.ClientSession) -> None:
    """An upstream behind TLS, resets included."""
    authority = trustme.CA()
    served, trusted = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(served)
    authority.configure_trust(trusted)
    simulator = Simulator()
    await simulator.start(ssl=served)
    try:
        assert simulator.url.startswith("https://127.0.0.1:")
        async with client.post(simulator.url + CHAT, json={"stream": True}, ssl=trusted) as response:
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
        body = {"stream": True, "simulate": {"fault": "reset", "after": 2}}
        with pytest.raises(aiohttp.ClientError):
            async with client.post(simulator.url + CHAT, json=body, ssl=trusted) as response:
                await response.read()
    finally:
        await simulator.close()


async def test_a_given_socket_is_listened_on() -> None:
    """The caller may choose the address before the simulator exists."""
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    simulator = Simulator()
    await simulator.start(sock=sock)
    assert simulator.port == port
    await simulator.close()
    with pytest.raises(RuntimeError, match="await start"):
        _ = simulator.url


# --- Refusals


async def test_a_body_over_the_limit_is_413(client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the dialect's shape, naming the limit."""
    monkeypatch.setattr("edge.simulator.behaviour.MAX_BODY_BYTES", 100)
    async with simulating() as simulator, client.post(simulator.url + CHAT, json={"pad": "x" * 200}) as response:
        assert response.status == 413
        assert "100 bytes" in (await response.json())["error"]["message"]


async def test_openai_sends_a_request_id_of_its_own(client: aiohttp.ClientSession) -> None:
    """Which a proxy must not confuse with its own; vLLM sends none."""
    async with simulating(Behaviour(dialect="openai")) as simulator:
        async with client.post(simulator.url + CHAT, json={}, headers={"x-request-id": "mine"}) as response:
            assert response.headers["x-request-id"] == "req_simulated"
        simulator.behaviour = Behaviour()
        async with client.post(simulator.url + CHAT, json={}, headers={"x-request-id": "mine"}) as response:
            assert "x-request-id" not in response.headers


# --- Faults


@pytest.mark.parametrize("streamed", [True, False])
async def test_fault_error_is_a_status_in_place_of_the_answer(
    simulator: Simulator, client: aiohttp.ClientSession, streamed: bool
) -> None:
    """A stream that fails before it begins is no stream."""
    body = {"stream": streamed, "simulate": {"fault": "error", "status": 503}}
    async with client.post(simulator.url + CHAT, json=body) as response:
        assert response.status == 503
        assert response.headers["content-type"] == "application/json"
        assert (await response.json())["error"]["code"] == 503
    assert simulator.requests[0].outcome == "error"


async def test_fault_error_may_have_a_status_without_a_name(simulator: Simulator) -> None:
    """Servers invent some; the status line then has an empty reason (RFC 9112 section 4)."""
    async with raw(simulator) as connection:
        connection.ask(simulate={"fault": "error", "status": 499})
        assert (await connection.head())[0] == b"HTTP/1.1 499 "


@pytest.mark.parametrize(
    ("dialect", "done"), [("vllm", True), ("sglang", True), ("llamacpp", False), ("openai", False)]
)
async def test_fault_error_first_is_a_stream_that_opens_with_an_error(
    simulator: Simulator, dialect: Any, done: bool
) -> None:
    """Status 200 was sent before the engine failed; vLLM and SGLang close such a stream with `[DONE]`."""
    chunks = await stream(simulator, simulate={"fault": "error_first", "dialect": dialect, "after": 9})
    assert "error" in objects(chunks)[0]
    assert len(chunks) == 1 + done
    assert (chunks[-1] == b"data: [DONE]\n\n") == done
    assert simulator.requests[0].tokens == 0


async def test_fault_error_mid_comes_after_so_many_frames(simulator: Simulator) -> None:
    """The stream ends cleanly all the same."""
    chunks = await stream(simulator, simulate={"fault": "error_mid", "after": 4})
    assert chunks[:4] == (await stream(simulator))[:4]
    assert objects(chunks)[4]["error"]["code"] == 500
    assert chunks[5:] == [b"data: [DONE]\n\n"]
    assert (simulator.requests[0].outcome, simulator.requests[0].tokens) == ("error_mid", 3)


async def test_fault_error_mid_follows_the_whole_text_at_the_latest(simulator: Simulator) -> None:
    """An `after` beyond the end does not put the error behind `[DONE]`."""
    chunks = await stream(simulator, simulate={"fault": "error_mid", "after": 1_000, "tokens": 2})
    assert "error" in objects(chunks)[3]
    assert len(chunks) == 5


@pytest.mark.parametrize(("path", "kind"), [("/v1/responses", "error"), ("/v1/messages", "error")])
async def test_typed_streams_fail_with_an_event_named_error(simulator: Simulator, path: str, kind: str) -> None:
    """As OpenAI's Responses and Anthropic's Messages do."""
    async with raw(simulator) as connection:
        body = {"stream": True, "simulate": {"fault": "error_mid", "after": 5}}
        connection.writer.write(request_bytes(body, path))
        await connection.head()
        chunks = await connection.chunks()
    assert len(chunks) == 6
    assert chunks[-1].startswith(b"event: error\n")
    assert objects(chunks)[-1]["type"] == kind


async def test_fault_reset_delivers_its_frames_and_then_an_rst(simulator: Simulator) -> None:
    """`after` frames arrive whole, then the connection is reset, not closed."""
    async with raw(simulator) as connection:
        connection.ask(stream=True, simulate={"fault": "reset", "after": 3, "after_bytes": 2})
        await connection.head()
        assert [len(await connection.chunk()) > 0 for _ in range(3)] == [True] * 3
        with pytest.raises(ConnectionResetError):
            await connection.reader.readuntil(b"\n\n")
    await simulator.wait_for(lambda: simulator.requests[0].outcome == "reset")
    assert simulator.requests[0].frames_sent == 3


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_fault_reset_loses_no_frame_on_either_loop(loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """The loop uvloop writes at the end of its turn: a reset must wait for that, or it would drop what came before."""

    async def frames_before_the_reset() -> int:
        async with simulating() as simulator, raw(simulator) as connection:
            connection.ask(stream=True, simulate={"fault": "reset", "after": 7})
            await connection.head()
            frames = [await connection.chunk() for _ in range(7)]
            with pytest.raises(ConnectionResetError):
                await connection.reader.readexactly(1)
            return len(frames)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        assert runner.run(frames_before_the_reset()) == 7


async def test_fault_reset_waits_for_a_client_that_reads_late(simulator: Simulator) -> None:
    """As long as bytes wait for room no RST is sent: it would drop them."""
    async with raw(simulator) as connection:
        body = {"input": [""] * 100_000, "simulate": {"fault": "reset", "after": 1}}  # 8 MB: more than sockets hold
        connection.writer.write(request_bytes(body, "/v1/embeddings"))
        await connection.head()
        await simulator.wait_for(lambda: simulator.requests[0].frames_sent == 1)
        assert simulator.requests[0].outcome == "open"
        with pytest.raises(ConnectionResetError):
            await connection.rest()
    assert simulator.requests[0].outcome == "reset"


@pytest.mark.parametrize("streamed", [True, False])
async def test_fault_reset_before_the_head_sends_no_byte(simulator: Simulator, streamed: bool) -> None:
    """`after` -1: a connection that dies with zero response bytes, which a proxy may replay on a fresh one."""
    async with raw(simulator) as connection:
        connection.ask(stream=streamed, simulate={"fault": "reset", "after": -1})
        with pytest.raises(ConnectionResetError):
            await connection.reader.readexactly(1)
    assert simulator.requests[0].status == 0


async def test_fault_cut_ends_between_two_frames(simulator: Simulator) -> None:
    """FIN without the last chunk: an answer that must not look complete."""
    async with raw(simulator) as connection:
        connection.ask(stream=True, simulate={"fault": "cut", "after": 2})
        await connection.head()
        whole = await connection.rest()
    assert whole.count(b"data: ") == 2
    assert whole.endswith(b"\n\n\r\n")
    assert simulator.requests[0].outcome == "cut"


@pytest.mark.parametrize("after_bytes", [1, 4, 40])
async def test_fault_cut_can_fall_into_a_chunk(simulator: Simulator, after_bytes: int) -> None:
    """Inside its size line or its data."""
    async with raw(simulator) as connection:
        connection.ask(stream=True)
        await connection.head()
        whole = await connection.reader.readuntil(b"0\r\n\r\n")
    async with raw(simulator) as connection:
        connection.ask(stream=True, simulate={"fault": "cut", "after": 0, "after_bytes": after_bytes})
        await connection.head()
        assert await connection.rest() == whole[:after_bytes]


async def test_fault_cut_of_a_whole_answer_is_short_of_its_length(simulator: Simulator) -> None:
    """content-length promises more than comes."""
    async with raw(simulator) as connection:
        connection.ask(simulate={"fault": "cut", "after_bytes": 10})
        _, headers = await connection.head()
        assert len(await connection.rest()) == 10 < int(headers["content-length"])


@pytest.mark.parametrize("after", [-1, 0, 2])
async def test_fault_stall_is_silent_until_the_client_goes(simulator: Simulator, after: int) -> None:
    """Before the head, after it, or mid-stream; the record then says who ended it."""
    async with raw(simulator) as connection:
        connection.ask(stream=True, simulate={"fault": "stall", "after": after})
        if after >= 0:
            await connection.head()
        for _ in range(after):
            await connection.chunk()
        await simulator.wait_for(lambda: simulator.requests and simulator.requests[0].frames_sent == max(after, 0))
        assert simulator.requests[0].outcome == "open"
    await simulator.wait_for(lambda: simulator.requests[0].outcome == "client_gone")
    assert simulator.requests[0].frames_sent == max(after, 0)


@pytest.mark.parametrize("stall", [{"after": 3}, {"after": 1}, {"after_bytes": 100_000}])
async def test_fault_stall_after_a_whole_answer_leaves_the_connection_to_the_next_request(
    simulator: Simulator, stall: dict[str, int]
) -> None:
    """There is nothing left to stall: the next request on the connection was never answered."""
    async with raw(simulator) as connection:
        for _ in range(2):
            connection.ask(simulate={"fault": "stall", **stall})
            async with asyncio.timeout(20):
                _, headers = await connection.head()
                await connection.reader.readexactly(int(headers["content-length"]))
    assert [record.outcome for record in simulator.requests] == ["complete"] * 2


async def test_fault_stall_before_the_last_chunk_is_no_whole_answer(simulator: Simulator) -> None:
    async with raw(simulator) as connection:
        connection.ask(stream=True, simulate={"fault": "stall", "after": 1000})
        await connection.head()
        while await connection.chunk() != b"data: [DONE]\n\n":
            pass
        assert simulator.requests[0].outcome == "open"
    await simulator.wait_for(lambda: simulator.requests[0].outcome == "client_gone")


async def test_fault_rubbish_is_no_http(simulator: Simulator) -> None:
    """The first bytes are no status line, then FIN."""
    async with raw(simulator) as connection:
        connection.ask(stream=True, simulate={"fault": "rubbish"})
        answer = await connection.rest()
    assert answer
    assert not answer.startswith(b"HTTP/")


async def test_fault_no_done_ends_cleanly_without_done(simulator: Simulator) -> None:
    """As transformers serve ends; every SDK takes it for complete."""
    assert await stream(simulator, simulate={"fault": "no_done"}) == (await stream(simulator))[:-1]


# --- Clients that leave


def reset(connection: RawClient) -> None:
    sock = connection.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.writer.transport.abort()


IN_A_STREAM: dict[str, Any] = {"stream": True, "simulate": {"interval_ms": 1}}
BEFORE_THE_ANSWER: dict[str, Any] = {"simulate": {"ttft_ms": HOUR_MS}}


@pytest.mark.parametrize(
    ("leave", "body"),
    [
        (reset, IN_A_STREAM),
        (lambda c: c.writer.close(), BEFORE_THE_ANSWER),
        (lambda c: c.writer.write_eof(), IN_A_STREAM),
        (lambda c: c.writer.write_eof(), BEFORE_THE_ANSWER),
    ],
)
async def test_a_client_that_leaves_ends_its_request_at_once(
    simulator: Simulator, leave: Callable[[RawClient], None], body: dict[str, Any]
) -> None:
    """RST, FIN or half-close, in a stream or before the answer: no timer lives on, nothing more is written."""
    simulator.behaviour = Behaviour(tokens=20_000)
    async with raw(simulator) as connection:
        connection.ask(**body)
        await simulator.wait_for(lambda: simulator.active == 1 and simulator.requests[0].body)
        leave(connection)
        await simulator.wait_for(lambda: simulator.active == 0)
        await simulator.wait_for(lambda: simulator.connections == 0)
    record = simulator.requests[0]
    assert record.outcome == "client_gone"
    assert record.frames_sent < 20_000


async def test_a_client_that_leaves_within_its_body_is_recorded(simulator: Simulator) -> None:
    """Half a body is no request to answer."""
    async with raw(simulator) as connection:
        connection.writer.write(request_bytes({"model": "m"})[:-3])
        await simulator.wait_for(lambda: simulator.active == 1)
    await simulator.wait_for(lambda: simulator.active == 0)
    assert simulator.requests[0].outcome == "client_gone"


async def test_closing_drops_what_runs_and_a_second_close_is_nothing() -> None:
    """An engine that is killed; its clients see the connection end without the last chunk."""
    simulator = Simulator(Behaviour(fault="stall"))
    await simulator.start()
    async with raw(simulator) as connection:
        connection.ask(stream=True)
        await connection.head()
        await simulator.close()
        await simulator.close()
        assert await connection.rest() == b""
    assert simulator.requests[0].outcome == "closed"
    assert (simulator.active, simulator.connections) == (0, 0)


async def test_a_wrong_predicate_fails_its_own_waiter_only(simulator: Simulator) -> None:
    """The request that woke it is answered all the same."""
    async with asyncio.TaskGroup() as group:
        asked = group.create_task(stream(simulator))
        with pytest.raises(ZeroDivisionError):
            await simulator.wait_for(lambda: simulator.requests and 1 / 0)
    assert len(asked.result()) == 18


async def test_run_plays_until_a_signal_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It prints where it listens, ends at SIGTERM, and frees the port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    printed: asyncio.Queue[str] = asyncio.Queue()
    monkeypatch.setattr("builtins.print", lambda text, **_: printed.put_nowait(text))
    async with asyncio.TaskGroup() as group:
        group.create_task(run("127.0.0.1", port, Behaviour()))
        assert await printed.get() == f"simulating vllm on http://127.0.0.1:{port}/v1"
        os.kill(os.getpid(), signal.SIGTERM)
    socket.create_server(("127.0.0.1", port)).close()
