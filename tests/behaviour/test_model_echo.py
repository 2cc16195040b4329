"""With `model_echo` every answer names the model that was asked, and is else as the upstream sent it."""

import asyncio
import json
import re
from collections.abc import Sequence
from typing import Any

import pytest

from edge.simulator.server import Simulator
from tests.conftest import ROUTES, Edge, ScriptedConnection, StartEdge, StartUpstream
from tests.streams import STREAMS

ASKED = "public/deepseek-r1"
SERVED = "deepseek-ai/DeepSeek-R1"
ECHO = f'[routes."{ASKED}"]\nmodel = "{SERVED}"\nmodel_echo = true'
SSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
QUESTIONS: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": []},
    "completions": {"prompt": "a"},
    "responses": {"input": "a"},
    "messages": {"messages": [], "max_tokens": 5},
}


def names(document: Any) -> list[str]:
    """The names that an answer or an event says it is of."""
    holders = [document, document.get("response"), document.get("message")]
    return [each["model"] for each in holders if isinstance(each, dict) and "model" in each]


def events(body: bytes) -> list[Any]:
    return [json.loads(line) for line in re.findall(rb"^data: (\{.*\})\r?$", body, re.MULTILINE)]


@pytest.fixture
async def edge(start_edge: StartEdge, simulator: Simulator) -> Edge:
    """An edge whose upstream serves the model under another name."""
    return await start_edge(ROUTES.replace("{upstream}", simulator.url).replace(f'[routes."{ASKED}"]', ECHO))


@pytest.mark.parametrize("operation", QUESTIONS)
async def test_every_answer_and_every_event_names_the_model_that_was_asked(
    edge: Edge, simulator: Simulator, operation: str
) -> None:
    """In every dialect, on one connection: a length that is wrong would be seen by the next answer."""
    client = await edge.connect()
    for stream in (False, True, False):
        client.send(edge.request({"model": ASKED, "stream": stream, **QUESTIONS[operation]}, path=f"/v1/{operation}"))
        status, headers, body = await client.response()
        documents = events(body) if stream else [json.loads(body)]
        assert status == 200
        assert ("content-length" in headers) == (not stream)
        assert json.loads(simulator.requests[-1].body)["model"] == SERVED
        assert {name for document in documents for name in names(document)} == {ASKED}
        assert SERVED.encode() not in body
    await edge.consistent()
    assert {line["end"] for line in await edge.log()} == {"complete"}


async def test_route_that_does_not_ask_for_it_passes_the_upstreams_name(
    start_edge: StartEdge, simulator: Simulator
) -> None:
    text = ROUTES.replace("{upstream}", simulator.url).replace(f'[routes."{ASKED}"]', ECHO.replace("true", "false"))
    edge = await start_edge(text)
    _, _, body = await edge.ask({"model": ASKED, "messages": []})
    assert names(json.loads(body)) == [SERVED]


@pytest.mark.parametrize("name", STREAMS)
async def test_recorded_stream_differs_in_nothing_but_the_name(
    start_edge: StartEdge, start_upstream: StartUpstream, name: str
) -> None:
    stream = STREAMS[name]
    parts: Sequence[bytes] = ()

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(SSE, *parts)

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url).replace(f'[routes."{ASKED}"]', ECHO))
    expected = re.sub(rb'"model":"(m|public/deepseek-r1)"', f'"model":"{ASKED}"'.encode(), stream)
    for size in (len(stream), 1000, 61, 7):
        pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
        framed = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        parts = [framed[at : at + size + 3] for at in range(0, len(framed), size + 3)]
        async with asyncio.timeout(20):
            _, _, body = await edge.ask({"model": ASKED, "stream": True, "messages": []})
        assert body == expected
    await edge.consistent()


async def test_error_and_models_are_as_ever(edge: Edge) -> None:
    status, _, body = await edge.ask({"model": ASKED, "messages": [], "simulate": {"fault": "error", "status": 400}})
    assert status == 400
    assert set(json.loads(body)) == {"error"}
    status, _, body = await edge.ask(
        {"model": ASKED, "stream": True, "messages": [], "simulate": {"fault": "cut", "after": 3}}
    )
    assert status == 200
    assert events(body)[-1]["error"]["code"] == "upstream_disconnected"
    assert {name for event in events(body)[:-1] for name in names(event)} == {ASKED}
    await edge.consistent()


async def test_heartbeat_and_echo_go_together(start_edge: StartEdge, simulator: Simulator) -> None:
    text = ROUTES.replace("{upstream}", simulator.url).replace(f'[routes."{ASKED}"]', ECHO + '\nheartbeat = "5ms"')
    edge = await start_edge(text)
    ask = {"model": ASKED, "stream": True, "messages": [], "simulate": {"ttft_ms": 60, "interval_ms": 20, "tokens": 4}}
    status, _, body = await edge.ask(ask)
    assert status == 200
    assert body.startswith(b": keep-alive\n\n")
    assert body.endswith(b"data: [DONE]\n\n")
    assert {name for event in events(body) for name in names(event)} == {ASKED}
    await edge.consistent()
