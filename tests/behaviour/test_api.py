"""The API: every path, what goes upstream, what comes back, and whose fault an upstream's error is."""

import asyncio
import itertools
import json
import re
import types
import uuid
from collections.abc import Generator
from typing import Any

import aiohttp
import pytest

from edge.envelope.json import LONG_BODY_BYTES, Envelope
from edge.envelope.long_json import read_long_json
from edge.keys.stores.registry import KeyRegistry
from edge.operations import OPERATIONS, Operation
from edge.simulator.dialects import error_document
from edge.simulator.server import Simulator
from tests.conftest import ROUTES, USER, Edge, Script, ScriptedConnection, StartEdge, StartUpstream, WatchMethod
from tests.streams import chunk

PUBLIC = "public/deepseek-r1"
OWN = f"{USER}/qwen2"
NEW_ID = re.compile(r"req_[0-9a-f]{32}")


def saying(data: bytes, *headers: str, status: str = "200 OK", kind: str = "application/json") -> Script:
    """Answer every request with these bytes."""
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(data)}", *headers, "", ""]

    async def script(connection: ScriptedConnection) -> None:
        await connection.send("\r\n".join(lines).encode() + data)

    return script


def streaming(*parts: bytes, close: bool = False) -> Script:
    """Answer every request with a chunked event stream whose bytes are written in these parts."""

    async def script(connection: ScriptedConnection) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        await connection.send(head, *parts)
        if close:
            connection.writer.close()

    return script


def form(model: str, boundary: str = "b0undary") -> bytes:
    """A form as SDKs send it: the file first, its bytes like a delimiter's, then the model."""
    return (
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="model"\r\n'
        f"Content-Type: audio/wav\r\n\r\nRIFF\r\n--{boundary[:-1]}\x00model\r\n"
        f'--{boundary}\r\nContent-Disposition: form-data; name="model"\r\n\r\n{model}\r\n'
        f'--{boundary}\r\nContent-Disposition: form-data; name="language"\r\n\r\nzh\r\n--{boundary}--\r\n'
    ).encode()


def split(request: bytes) -> tuple[str, dict[str, str], bytes]:
    """The request line, the headers by lower-case name and the body of what an upstream got."""
    head, _, body = request.partition(b"\r\n\r\n")
    line, *fields = head.decode("latin-1").split("\r\n")
    headers = dict(field.split(": ", 1) for field in fields)
    assert len(headers) == len(fields)
    return line, {name.lower(): value for name, value in headers.items()}, body


def error_of(body: bytes) -> dict[str, Any]:
    """The error of an answer, which has exactly the four members of the one shape."""
    document = json.loads(body)
    assert list(document) == ["error"]
    error: dict[str, Any] = document["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


# --- what reaches the upstream

POOL = """
[pools.r1]
endpoints = ["{upstream}"]
[routes."public/deepseek-r1"]
pool = "r1"
model = "deepseek-ai/DeepSeek-R1"
"""


FORMS = [name for name, operation in OPERATIONS.items() if operation.form]


def prefixes(operation: Operation) -> tuple[str, ...]:
    return ("",) if operation.has_version else ("", "/v1")


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name not in FORMS])
async def test_json_path_reaches_the_upstream_with_only_the_model_spliced(
    start_edge: StartEdge, start_upstream: StartUpstream, operation: str
) -> None:
    upstream = await start_upstream(saying(b'{"ok":1}'))
    edge = await start_edge(POOL.replace("{upstream}", upstream.url))
    body = b'{ "n":1.0, "model" :\t"public/deepseek-r1","text":"\xe4\xbd\xa0 public/deepseek-r1","deep":{"a":[1e2]} }'
    asked = prefixes(OPERATIONS[operation])
    for prefix in asked:
        status, _, answer = await edge.ask(body, path=f"{prefix}/{operation}?api-version=2")
        assert (status, answer) == (200, b'{"ok":1}')
    assert len(upstream.requests) == len(asked)
    root = "" if operation in ("tokenize", "detokenize", "v2/rerank") else "/v1"
    for request in upstream.requests:
        line, headers, sent = split(request)
        assert line == f"POST {root}/{operation} HTTP/1.1"
        assert sent == body.replace(b'"public/deepseek-r1"', b'"deepseek-ai/DeepSeek-R1"', 1)
        assert headers["content-length"] == str(len(sent))
    await edge.consistent()
    named = [(entry["model"], entry["upstream_model"]) for entry in await edge.log()]
    assert named == [(PUBLIC, "deepseek-ai/DeepSeek-R1")] * len(asked)


@pytest.mark.parametrize("operation", FORMS)
async def test_form_reaches_the_upstream_with_only_the_model_part_replaced(
    start_edge: StartEdge, start_upstream: StartUpstream, operation: str
) -> None:
    upstream = await start_upstream(saying(b'{"text":"ok"}'))
    edge = await start_edge(POOL.replace("{upstream}", upstream.url))
    body = form(PUBLIC)
    client = await edge.connect()
    for prefix, boundary in (("", '"b0undary"'), ("/v1", "b0undary")):
        content_type = f"multipart/form-data; boundary={boundary}"
        client.send(
            f"POST {prefix}/{operation} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {edge.key}\r\n"
            f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        assert (await client.response())[0] == 200
        line, headers, sent = split(upstream.requests[-1])
        assert line == f"POST /v1/{operation} HTTP/1.1"
        assert sent == form("deepseek-ai/DeepSeek-R1")
        assert (headers["content-type"], headers["content-length"]) == (content_type, str(len(sent)))
    await edge.consistent()
    assert len(upstream.requests) == 2


async def test_only_allowed_headers_go_upstream(start_edge: StartEdge, start_upstream: StartUpstream) -> None:
    """No credential, cookie, hop-by-hop or unknown header; `Connection` cannot name one of ours away."""
    upstream = await start_upstream(saying(b"{}"))
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    forwarded = {
        "accept": "text/event-stream",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "tracestate": "a=1",
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "tools",
        "openai-beta": "responses=v1",
    }
    dropped = (
        f"api-key: {edge.key}", f"x-api-key: {edge.key}", "Cookie: session=1", "Proxy-Authorization: Basic eDp5",
        "X-Forwarded-For: 1.2.3.4", "Forwarded: for=1.2.3.4", "Via: 1.1 a", "Accept-Encoding: gzip, br", "TE: trailers",
        "Connection: keep-alive, x-request-id, content-length", "Keep-Alive: timeout=5", "Upgrade: h2c",
        "X-Internal-Route: a", "User-Agent: OpenAI/Python", "OpenAI-Organization: org", "X-Stainless-Lang: python",
        "x-data-parallel-rank: 1", "traceparent2: x", "baggage: k=v",
    )  # fmt: skip
    status, _, _ = await edge.ask(
        {"model": PUBLIC},
        headers=(*dropped, "X-Request-Id: mine-1", *(f"{name}: {value}" for name, value in forwarded.items())),
    )
    assert status == 200
    _, headers, body = split(upstream.requests[0])
    upstream_id = uuid.UUID(headers.pop("x-request-id"))  # its own, as the span
    forwarded["traceparent"] = f"00-0af7651916cd43dd8448eb211c80319c-{upstream_id.hex[:16]}-01"
    assert headers == {
        **forwarded,
        "host": upstream.url.removeprefix("http://"),
        "accept-encoding": "identity",
        "content-type": "application/json",
        "content-length": str(len(body)),
    }
    assert edge.key.encode() not in upstream.requests[0]


@pytest.mark.parametrize(
    ("path", "operation", "target"),
    [
        ("", "chat/completions", "/v1/chat/completions"),
        ("/", "chat/completions", "/chat/completions"),
        ("/openai/v9", "chat/completions", "/openai/v9/chat/completions"),
        ("/openai/v9/", "embeddings", "/openai/v9/embeddings"),
        ("/openai/v9", "tokenize", "/tokenize"),
        ("", "detokenize", "/detokenize"),
    ],
)
async def test_endpoint_decides_path_key_and_model(
    start_edge: StartEdge, start_upstream: StartUpstream, path: str, operation: str, target: str
) -> None:
    upstream = await start_upstream(saying(b"{}"))
    endpoint = f'{{ url = "{upstream.url}{path}", api_key = "upstream-secret", model = "r1" }}'
    edge = await start_edge(POOL.replace('"{upstream}"', endpoint))
    assert (await edge.ask({"model": PUBLIC}, path=f"/v1/{operation}"))[0] == 200
    line, headers, body = split(upstream.requests[0])
    assert line == f"POST {target} HTTP/1.1"
    assert headers["authorization"] == "Bearer upstream-secret"
    assert json.loads(body) == {"model": "r1"}
    assert (await edge.log())[-1]["upstream_model"] == "r1"


async def test_instance_url_and_model_are_filled_from_the_name(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    upstream = await start_upstream(saying(b"{}"))
    instance = upstream.url.replace("127.0.0.1", "127.0.0.{service}")
    edge = await start_edge(f'[routes."u-*"]\ninstance = "{instance}/v3"\nmodel = "{{service}}-of-{{owner}}"\n')
    assert (await edge.ask({"model": f"{USER}/1"}))[0] == 200
    line, headers, body = split(upstream.requests[0])
    assert line == "POST /v3/chat/completions HTTP/1.1"
    assert headers["host"] == upstream.url.removeprefix("http://")
    assert json.loads(body) == {"model": f"1-of-{USER}"}


# --- what comes back


async def test_only_allowed_headers_come_back(start_edge: StartEdge, start_upstream: StartUpstream) -> None:
    kept = ("Date: Mon, 01 Jan 2024 00:00:00 GMT", "OpenAI-Processing-Ms: 7", "Content-Disposition: inline")
    dropped = (
        "Server: uvicorn", "Set-Cookie: a=1", "X-Request-Id: theirs", "X-Upstream: 10.0.0.1:8000", "Via: 1.1 x",
        "Access-Control-Allow-Origin: https://evil.example", "Keep-Alive: timeout=5", "Connection: keep-alive",
        "WWW-Authenticate: Bearer", "Location: http://10.0.0.1/",
    )  # fmt: skip
    upstream = await start_upstream(saying(b"{}", *kept, *dropped))
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    _, headers, _ = await edge.ask({"model": PUBLIC}, headers=("X-Request-Id: mine",))
    assert headers.pop("access-control-expose-headers")
    assert headers == {
        "content-type": "application/json",
        "content-length": "2",
        "x-request-id": "mine",
        "access-control-allow-origin": "*",
        "date": "Mon, 01 Jan 2024 00:00:00 GMT",
        "openai-processing-ms": "7",
        "content-disposition": "inline",
    }


async def test_stream_tells_intermediaries_not_to_hold_it_back(edge: Edge) -> None:
    _, headers, _ = await edge.ask({"model": PUBLIC, "stream": True})
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert headers["transfer-encoding"] == "chunked"


@pytest.mark.parametrize("extra", [(), ("Content-Length: 0",)], ids=["bare", "length 0"])
async def test_204_of_the_upstream_has_no_body_and_keeps_the_connection(
    start_edge: StartEdge, start_upstream: StartUpstream, extra: tuple[str, ...]
) -> None:
    async def script(connection: ScriptedConnection) -> None:
        await connection.send("\r\n".join(["HTTP/1.1 204 No Content", *extra, "", ""]).encode())

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    client = await edge.connect()
    for _ in range(2):
        client.send(edge.request({"model": PUBLIC}))
        head = await client.head()
        assert head.startswith(b"HTTP/1.1 204 ")
        # RFC 9110 section 8.6, RFC 9112 section 6.1: neither may stand in a 204.
        assert b"content-length" not in head.lower()
        assert b"transfer-encoding" not in head.lower()
    await edge.consistent()
    assert (len(upstream.requests), upstream.connections) == (2, 1)


# --- models


MODELS = """
[pools.r1]
endpoints = ["http://127.0.0.1:9"]
[routes."public/everywhere"]
pool = "r1"
[routes."public/chat-only"]
pool = "r1"
hosts = ["chat.d.run"]
[routes."public/regions"]
pool = "r1"
hosts = ["*.d.run", "!chat.d.run"]
[routes."public/family-*"]
pool = "r1"
list = ["public/family-a", "public/family-b"]
[routes."lab/thing"]
pool = "r1"
[routes."u-*"]
instance = "http://127.0.0.1:9"
list = ["u-1100a15812cc/qwen2", "u-2200b26923dd/qwen2"]
"""
FAMILY = ["public/everywhere", "public/family-a", "public/family-b"]


@pytest.mark.parametrize(
    ("host", "key", "names"),
    [
        ("chat.d.run", {}, ["public/chat-only", *FAMILY, OWN]),
        ("sh-02.d.run", {}, [*FAMILY, "public/regions", OWN]),
        ("elsewhere.example", {}, [*FAMILY, OWN]),
        ("localhost", {}, ["public/chat-only", *FAMILY, "public/regions", OWN]),
        ("chat.d.run", {"deny": ["public/family-*"]}, ["public/chat-only", "public/everywhere", OWN]),
        ("chat.d.run", {"allow": ["lab/*"]}, ["lab/thing"]),
        ("chat.d.run", {"allow": ["**"]}, ["lab/thing", "public/chat-only", *FAMILY, OWN]),
        ("chat.d.run", {"allow": ["u-2200b26923dd/*"]}, ["u-2200b26923dd/qwen2"]),
        ("chat.d.run", {"allow": ["lab/*"], "deny": ["**"]}, []),
    ],
)
async def test_models_lists_what_this_key_may_call_on_this_host(
    start_edge: StartEdge, host: str, key: dict[str, list[str]], names: list[str]
) -> None:
    edge = await start_edge(MODELS)
    with KeyRegistry(edge.keys_path) as registry:
        secret, _ = registry.create(USER, **key)
    for path in ("/models", "/v1/models"):
        status, headers, body = await edge.ask(path=path, method="GET", host=host, key=secret)
        document = json.loads(body)
        assert (status, headers["content-type"], document["object"]) == (200, "application/json", "list")
        assert [model["id"] for model in document["data"]] == sorted(names)
        assert {model["object"] for model in document["data"]} <= {"model"}


@pytest.mark.parametrize("spelled", [OWN, OWN.replace("/", "%2F"), OWN.replace("/", "%2f"), "u-1100a15812cc%2Fqwe%6e2"])
async def test_model_is_retrieved_in_any_spelling_without_asking_the_upstream(
    edge: Edge, simulator: Simulator, spelled: str
) -> None:
    for prefix in ("", "/v1"):
        status, _, body = await edge.ask(path=f"{prefix}/models/{spelled}", method="GET")
        assert status == 200
        document = json.loads(body)
        assert isinstance(document["created"], int)
        assert {"id": OWN, "object": "model", "owned_by": USER}.items() <= document.items()
    assert list(simulator.requests) == []


@pytest.mark.parametrize(
    ("spelled", "host", "status"),
    [
        ("public%2Ffamily-unlisted", "chat.d.run", 200),
        ("u-1100a15812cc%2Fanything", "chat.d.run", 200),
        ("public%2Fregions", "chat.d.run", 404),
        ("public%2Fregions", "sh-02.d.run", 200),
        ("public%2Fnone", "chat.d.run", 404),
        ("lab%2Fthing", "chat.d.run", 404),
        ("u-2200b26923dd%2Fqwen2", "chat.d.run", 404),
        ("u-1100a15812cc%2Fno_label", "chat.d.run", 404),
        ("u-1100a15812cc%2Fa%2Fb", "chat.d.run", 404),
        ("u-1100a15812cc%252Fqwen2", "chat.d.run", 404),  # decoded once
        ("%ff", "chat.d.run", 404),
        ("%00", "chat.d.run", 404),
        ("public%2F%0A", "chat.d.run", 404),
        ("public%2F" + "x" * 512, "chat.d.run", 404),
    ],
)
async def test_retrieve_answers_as_a_call_would(start_edge: StartEdge, spelled: str, host: str, status: int) -> None:
    edge = await start_edge(MODELS)
    got, _, body = await edge.ask(path=f"/v1/models/{spelled}", method="GET", host=host)
    assert got == status
    if status == 404:
        error = error_of(body)
        assert (error["code"], error["param"]) == ("model_not_found", "model")


async def test_unknown_and_not_yours_look_the_same(edge: Edge) -> None:
    texts = set()
    for name in ("public/none", "u-2200b26923dd/qwen2", f"{USER}/a/b"):
        for status, _, body in (
            await edge.ask({"model": name}),
            await edge.ask(path=f"/v1/models/{name}", method="GET"),
        ):
            assert status == 404
            texts.add(body.replace(name.encode(), b"NAME"))
    assert len(texts) == 1


async def test_head_of_models_has_the_headers_of_get_and_no_body(edge: Edge) -> None:
    client = await edge.connect()
    client.send(edge.request(path="/v1/models", method="GET"))
    _, wanted, body = await client.response()
    client.send(edge.request(path="/v1/models", method="HEAD") + edge.request(path="/v1/models/x", method="HEAD"))
    head = (await client.head()).decode()
    assert head.startswith("HTTP/1.1 200 ")
    assert f"content-length: {wanted['content-length']}\r\n" in head
    assert (await client.head()).startswith(b"HTTP/1.1 404 ")  # directly behind: no body came with either
    client.send(edge.request(path="/v1/models", method="GET"))
    assert (await client.response())[2] == body
    whole, *heads, _ = [line["response_bytes"] for line in await edge.log()]
    assert whole - len(body) == heads[0] > 0  # what was sent, heads included, as of any other answer
    assert heads[1] > 0


# --- every answer


OUTCOMES: dict[str, tuple[int, dict[str, Any]]] = {
    "json": (200, {"body": {"model": PUBLIC}}),
    "stream": (200, {"body": {"model": PUBLIC, "stream": True}}),
    "HTTP/1.0": (200, {"body": {"model": PUBLIC}, "version": "1.0"}),
    "models": (200, {"path": "/v1/models", "method": "GET"}),
    "preflight": (204, {"path": "/v1/chat/completions", "method": "OPTIONS"}),
    "preflight of nothing": (204, {"path": "/nothing", "method": "OPTIONS"}),
    "no JSON": (400, {"body": b"{"}),
    "no HTTP": (400, {"headers": ("broken header",)}),
    "wrong key": (401, {"body": {"model": PUBLIC}, "key": "sk-wrong-wrong"}),
    "unknown model": (404, {"body": {"model": "public/none"}}),
    "unknown path": (404, {"path": "/none"}),
    "wrong method": (405, {"path": "/v1/chat/completions", "method": "PUT"}),
    "wrong type": (415, {"body": {"model": PUBLIC}, "headers": ("Content-Encoding: gzip",)}),
    "long line": (414, {"path": "/" + "a" * 9000}),
    "upstream failed": (502, {"body": {"model": PUBLIC, "simulate": {"fault": "error"}}}),
    "upstream rubbish": (502, {"body": {"model": PUBLIC, "simulate": {"fault": "rubbish"}}}),
}


@pytest.mark.parametrize("outcome", OUTCOMES)
async def test_every_answer_has_cors_and_a_request_id(edge: Edge, outcome: str) -> None:
    wanted, arguments = OUTCOMES[outcome]
    status, headers, body = await edge.ask(**arguments)
    assert status == wanted
    assert headers["access-control-allow-origin"] == "*"
    exposed = {name.strip() for name in headers["access-control-expose-headers"].split(",")}
    assert exposed >= {"x-request-id", "retry-after", "x-should-retry", "x-ratelimit-remaining-tokens"}
    assert NEW_ID.fullmatch(headers["x-request-id"])
    assert "server" not in headers
    if status >= 400:
        assert headers["content-type"] == "application/json"
        error_of(body)
    if status >= 500:
        assert headers.get("x-should-retry") != "false"


async def test_preflight_needs_no_key(edge: Edge) -> None:
    client = await edge.connect()
    client.send(
        b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: https://page.example\r\n"
        b"Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: authorization, content-type\r\n\r\n"
    )
    status, headers, _ = await client.response()
    assert status == 204
    assert "POST" in headers["access-control-allow-methods"]
    assert "authorization" in headers["access-control-allow-headers"].lower()
    assert "content-length" not in headers


@pytest.mark.parametrize("given", ["a", "A.b_c-9", "x" * 128, "0123456789abcdef"])
async def test_plain_request_id_of_the_client_is_kept(edge: Edge, simulator: Simulator, given: str) -> None:
    for arguments in ({"body": {"model": PUBLIC}}, {"path": "/v1/models", "method": "GET"}, {"body": b"{"}):
        _, headers, _ = await edge.ask(**arguments, headers=(f"X-Request-ID: {given}",))  # type: ignore[arg-type]
        assert headers["x-request-id"] == given
    await edge.idle()
    assert {line["request_id"] for line in await edge.log()} == {given}


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a/b", 'a"b', "é", "a,b"])
async def test_other_request_id_is_replaced(edge: Edge, given: str) -> None:
    _, headers, _ = await edge.ask(path="/v1/models", method="GET", headers=(f"X-Request-ID: {given}",))
    assert NEW_ID.fullmatch(headers["x-request-id"])


@pytest.mark.parametrize(
    "header",
    [
        "Authorization: Bearer KEY", "authorization: bearer KEY", "AUTHORIZATION: BEARER   KEY", "api-key: KEY",
        "X-API-Key: KEY", "Authorization: Bearer KEY\r\nx-api-key: KEY\r\napi-key: KEY",
    ],
)  # fmt: skip
async def test_key_is_taken_from_any_of_three_headers(edge: Edge, simulator: Simulator, header: str) -> None:
    client = await edge.connect()
    body = json.dumps({"model": PUBLIC})
    client.send(
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n{header.replace('KEY', edge.key)}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    assert (await client.response())[0] == 200
    assert edge.key not in repr(simulator.requests[0].headers)


# --- hosts


HOSTED = """
[pools.r1]
endpoints = ["{upstream}"]
[routes."public/deepseek-r1"]
pool = "r1"
hosts = ["chat.d.run"]
[routes."u-*"]
instance = "{upstream}"
hosts = ["*.d.run", "!chat.d.run"]
"""


@pytest.mark.parametrize(
    ("host", "public", "own"),
    [
        ("chat.d.run", 200, 404),
        ("CHAT.d.run", 200, 404),
        ("chat.d.run:443", 200, 404),
        ("chat.d.run.", 200, 404),
        ("sh-02.d.run", 404, 200),
        ("a.b.d.run", 421, 421),
        ("d.run", 421, 421),
        ("elsewhere.example", 421, 421),
        ("192.0.2.1", 421, 421),
        ("localhost", 200, 200),
        ("localhost:8080", 200, 200),
        ("127.0.0.1", 200, 200),
        ("127.8.9.1:1", 200, 200),
        ("[::1]:8080", 200, 200),
        ("localhost.d.run", 404, 200),
    ],
)
async def test_host_chooses_the_routes(
    start_edge: StartEdge, simulator: Simulator, host: str, public: int, own: int
) -> None:
    edge = await start_edge(HOSTED.replace("{upstream}", simulator.url))
    for model, wanted in ((PUBLIC, public), (OWN, own)):
        status, _, body = await edge.ask({"model": model}, host=host)
        assert status == wanted
        if status == 421:
            assert error_of(body)["code"] == "misdirected_request"
    assert (await edge.ask(path="/v1/models", method="GET", host=host))[0] == (421 if public == 421 else 200)
    assert [each.method for each in simulator.requests].count("POST") == (public, own).count(200)


@pytest.mark.parametrize(
    "host",
    ["Host: a b", "Host: user@chat.d.run", "Host: chat.d.run:x", "Host: chat.d.run/", "Host: [::1", "Host: a,b",
     "Host: chät", "Host: chat.d.run\r\nHost: sh-02.d.run", "Host: chat.d.run\r\nHost: chat.d.run", "X-No-Host: 1"],
)  # fmt: skip
async def test_bad_missing_or_second_host_is_a_400(edge: Edge, simulator: Simulator, host: str) -> None:
    """RFC 9112 section 3.2: a server MUST answer each of these with 400."""
    client = await edge.connect()
    body = json.dumps({"model": PUBLIC})
    client.send(
        f"POST /v1/completions HTTP/1.1\r\n{host}\r\nAuthorization: Bearer {edge.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode("latin-1")
    )
    status, _, answer = await client.response()
    assert status == 400
    assert error_of(answer)["code"] == "invalid_request_error"
    assert list(simulator.requests) == []


async def test_host_of_an_absolute_target_is_the_one_that_counts(start_edge: StartEdge, simulator: Simulator) -> None:
    """RFC 9112 section 3.2.2."""
    edge = await start_edge(HOSTED.replace("{upstream}", simulator.url))
    path = "http://chat.d.run/v1/completions"
    assert (await edge.ask({"model": PUBLIC}, path=path, host="sh-02.d.run"))[0] == 200
    assert (await edge.ask({"model": OWN}, path=path, host="sh-02.d.run"))[0] == 404
    await edge.idle()
    assert {line["host"] for line in await edge.log()} == {"chat.d.run"}


# --- connections


async def test_connection_is_kept_for_requests_of_every_kind(edge: Edge) -> None:
    client = await edge.connect()
    for wanted, arguments in (
        (200, {"body": {"model": PUBLIC}}),
        (200, {"body": {"model": PUBLIC, "stream": True}}),
        (404, {"body": {"model": "public/none"}}),
        (200, {"path": "/v1/models", "method": "GET"}),
        (502, {"body": {"model": PUBLIC, "simulate": {"fault": "rubbish"}}}),
        (401, {"path": "/v1/models", "method": "GET", "key": "sk-wrong-wrong"}),
        (404, {"path": "/none", "method": "GET"}),
        (400, {"body": b"["}),
        (200, {"body": {"model": OWN}}),
    ):
        client.send(edge.request(**arguments))  # type: ignore[arg-type]
        status, headers, _ = await client.response()
        assert (status, headers.get("connection")) == (wanted, None)
    await edge.consistent()


@pytest.mark.parametrize("stream", [False, True])
async def test_connection_close_is_obeyed_and_said(edge: Edge, stream: bool) -> None:
    client = await edge.connect()
    client.send(edge.request({"model": PUBLIC, "stream": stream}, headers=("Connection: close",)))
    status, headers, _ = await client.response()
    assert (status, headers["connection"]) == (200, "close")
    assert await client.rest() == b""
    await edge.consistent()


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
async def test_http_1_0_gets_its_stream_without_chunks_ended_by_the_close(edge: Edge, framing: str) -> None:
    """RFC 9112 section 6.1: no transfer coding to a 1.0 client; the version of the status line is ours."""
    body = {"model": PUBLIC, "stream": True, "simulate": {"framing": framing}}
    _, _, wanted = await edge.ask({**body, "simulate": {"framing": "chunked"}})
    for connection in ((), ("Connection: keep-alive",)):
        client = await edge.connect()
        client.send(edge.request(body, version="1.0", headers=connection))
        head = await client.head()
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"transfer-encoding" not in head
        assert b"connection: close\r\n" in head
        assert await client.rest() == wanted
    await edge.consistent()


async def test_continue_comes_after_the_key_and_before_the_body(edge: Edge) -> None:
    """RFC 9110 section 10.1.1."""
    body = json.dumps({"model": PUBLIC}).encode()
    client = await edge.connect()
    head = edge.request(body, headers=("Expect: 100-continue",)).removesuffix(body)
    client.send(head)
    assert await client.head() == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(body)
    assert (await client.response())[0] == 200
    client.send(head + body)  # who does not wait needs no 100
    assert (await client.response())[0] in (100, 200)
    await edge.consistent()


@pytest.mark.parametrize("expectation", ["100-continue", "200-ok"])
async def test_expectation_of_an_old_client_is_ignored(
    start_edge: StartEdge, simulator: Simulator, watch: WatchMethod, expectation: str
) -> None:
    """It would take the 100 for its answer (RFC 9110 section 10.1.1)."""
    waiting = watch(aiohttp.StreamReader, "readany")
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url))
    body = json.dumps({"model": PUBLIC}).encode()
    assert (await edge.ask(body))[0] == 200  # the key is known from now on, so the body is read at once
    client = await edge.connect()
    client.send(edge.request(body, version="1.0", headers=(f"Expect: {expectation}",)).removesuffix(body))
    await waiting.called()  # for the body, so a 100 would have been sent
    client.send(body)
    assert (await client.head()).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("wanted", "arguments"),
    [
        (401, {"key": "sk-wrong-wrong"}),
        (404, {"path": "/none"}),
        (405, {"method": "PUT"}),
        (413, {"headers": ("Content-Length: 99999999999",)}),
        (415, {"headers": ("Content-Encoding: gzip",)}),
    ],
)
async def test_refused_request_gets_no_continue(edge: Edge, wanted: int, arguments: dict[str, Any]) -> None:
    """A 401 costs no body; the connection ends, since nobody knows whether the body follows."""
    client = await edge.connect()
    lines = arguments.pop("headers", ("Content-Length: 30",))
    head = edge.request(method=arguments.pop("method", "POST"), **arguments, headers=("Expect: 100-continue",))
    head = re.sub(rb"Content-Length: 0\r\n", b"", head).removesuffix(b"\r\n")
    head += "".join(f"{line}\r\n" for line in lines).encode()
    if b"Content-Length" not in head:
        head += b"Content-Length: 30\r\n"
    client.send(head + b"\r\n")
    status, headers, body = await client.response()
    assert (status, headers["connection"]) == (wanted, "close")
    error_of(body)
    await edge.consistent()


@pytest.mark.parametrize("long", [False, True])
async def test_long_body_is_read_in_steps_and_alone(edge: Edge, monkeypatch: pytest.MonkeyPatch, long: bool) -> None:
    """Two at once would take their steps in the same turn of the loop."""
    reading, most = 0, 0

    @types.coroutine
    def counted(body: bytes, *how: Any) -> Generator[None, None, Envelope]:
        nonlocal reading, most
        reading += 1
        most = max(most, reading)
        envelope = yield from read_long_json(body, *how)
        reading -= 1
        return envelope

    monkeypatch.setattr("edge.proxy.read_long_json", counted)
    content = "x" * (2 * LONG_BODY_BYTES if long else 10)
    asked = {"model": OWN, "messages": [{"role": "user", "content": content}]}
    answers = await asyncio.gather(*(edge.ask(asked) for _ in range(4)))
    assert [status for status, *_ in answers] == [200] * 4
    assert (most, reading) == (int(long), 0)
    await edge.consistent()


async def test_pipelined_requests_are_answered_in_order(edge: Edge) -> None:
    """RFC 9112 section 9.3.2; the first is the slowest."""
    client = await edge.connect()
    asked = [
        {"model": f"{USER}/m{number}", "stream": number % 2 == 0, "simulate": {"ttft_ms": 30 - 10 * number}}
        for number in range(4)
    ]
    asked[3]["simulate"] = {}
    client.send(
        b"".join(map(edge.request, asked))
        + edge.request(path="/v1/models", method="GET")
        + edge.request(b"{")
        + edge.request({"model": OWN})
    )
    for number in range(4):
        status, headers, body = await client.response()
        assert status == 200
        assert f'"model":"{USER}/m{number}"'.encode() in body
        assert ("transfer-encoding" in headers) == (number % 2 == 0)
    assert json.loads((await client.response())[2])["object"] == "list"
    assert (await client.response())[0] == 400
    assert json.loads((await client.response())[2])["model"] == OWN
    await edge.consistent()


@pytest.mark.parametrize("behind", [1, 31, 32, 40, 200])
async def test_every_request_behind_a_late_body_is_answered(edge: Edge, behind: int) -> None:
    """The parser counts a request when its last byte comes, which is after it began to be answered.

    Behind many such requests the count must still be right: else the parser holds back what nobody asks it for.
    """
    client = await edge.connect()
    body = json.dumps({"model": OWN}).encode()
    late = edge.request(body, headers=("Expect: 100-continue",)).removesuffix(body)
    for _ in range(40):
        client.send(late)
        assert (await client.response())[0] == 100
        client.send(body)
        assert (await client.response())[0] == 200
    client.send(late)
    assert (await client.response())[0] == 100
    client.send(body + edge.request(path="/v1/models", method="GET") * behind)
    for _ in range(1 + behind):
        assert (await client.response())[0] == 200
    await edge.consistent()


async def test_chunked_body_of_the_client_goes_upstream_with_its_length(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    upstream = await start_upstream(saying(b"{}"))
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    client = await edge.connect()
    head = edge.request(b"", headers=("Transfer-Encoding: chunked",)).replace(b"Content-Length: 0\r\n", b"")
    for pieces in ((b'{"model":', b'"public/deepseek-r1"}'), (b'{"model":"public/deepseek-r1"}',)):
        client.send(head + b"".join(map(chunk, pieces)) + b"0\r\n\r\n")
        assert (await client.response())[0] == 200
    for request in upstream.requests:
        _, headers, body = split(request)
        assert body == b'{"model":"public/deepseek-r1"}'
        assert headers["content-length"] == str(len(body))
        assert "transfer-encoding" not in headers
    await edge.consistent()


# --- whose fault an upstream's error is

CODES = {
    400: "invalid_request_error", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large",
    415: "unsupported_media_type", 422: "invalid_request_error", 429: "rate_limit_exceeded",
}  # fmt: skip
REPLACED = {
    401: (502, "upstream_error"), 403: (502, "upstream_error"), 407: (502, "upstream_error"),
    408: (504, "upstream_timeout"), 409: (502, "upstream_error"), 451: (502, "upstream_error"),
    500: (502, "upstream_error"), 501: (501, "not_supported"), 502: (502, "upstream_error"),
    503: (503, "upstream_unavailable"), 504: (504, "upstream_timeout"), 529: (503, "upstream_unavailable"),
}  # fmt: skip


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "llamacpp", "openai"])
async def test_upstream_error_of_every_dialect_is_brought_to_one_shape(
    start_edge: StartEdge, start_upstream: StartUpstream, dialect: Any
) -> None:
    status = 0

    async def script(connection: ScriptedConnection) -> None:
        said = json.dumps(error_document(dialect, status, "detail for 10.0.0.1:8000", "prompt")).encode()
        await saying(said, status=f"{status} Whatever")(connection)

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    # The script reads the status.
    for status, stream in itertools.product((*CODES, *REPLACED), (False, True)):
        got, headers, body = await edge.ask({"model": PUBLIC, "stream": stream})
        error = error_of(body)
        if status in CODES:
            # where the engine is, is nobody's business
            assert (got, error["message"], error["code"]) == (status, "detail for (address)", CODES[status])
            assert error["param"] == (None if dialect == "llamacpp" else "prompt")
        else:
            assert (got, error["code"]) == REPLACED[status]
            assert "10.0.0.1" not in error["message"]
            assert error["param"] is None
        assert headers["content-type"] == "application/json"
        assert headers["content-length"] == str(len(body))
    await edge.consistent()
    assert {line["end"] for line in await edge.log()} == {"upstream_error"}


HTML = b"<html><body><h1>nginx 10.0.0.1</h1></body></html>"


@pytest.mark.parametrize(
    ("status", "said", "message"),
    [
        (400, b'{"error":"only a string"}', "only a string"),
        (400, b'{"detail":"only a detail"}', "only a detail"),
        (422, b'{"detail":[{"loc":["body","n"],"msg":"not an integer","type":"int"}]}', "not an integer"),
        (400, b'{"object":"error","message":"flat","type":"BadRequestError","param":null,"code":400}', "flat"),
        (400, b'{"message":"bare"}', "bare"),
        *((400, said, None) for said in (HTML, b"", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"a":', b"[" * 9999)),
        *((400, said, None) for said in (b'{"error":null}', b'{"detail":[]}', b'{"error":[1]}', b'{"message":1}')),
        (404, HTML, None),
        (429, HTML, None),
        (500, HTML, None),
        (502, HTML, None),
    ],
)  # fmt: skip
async def test_upstream_error_of_any_shape_becomes_ours(
    start_edge: StartEdge, start_upstream: StartUpstream, status: int, said: bytes, message: str | None
) -> None:
    upstream = await start_upstream(saying(said, status=f"{status} No", kind="text/html"))
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    got, headers, body = await edge.ask({"model": PUBLIC})
    assert got == (status if status < 500 else 502)
    assert headers["content-type"] == "application/json"
    error = error_of(body)
    if message is not None:
        assert error["message"] == message
    assert "nginx" not in error["message"]
    await edge.consistent()


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
async def test_redirect_of_the_upstream_is_our_502_and_never_followed(
    start_edge: StartEdge, start_upstream: StartUpstream, status: int
) -> None:
    upstream = await start_upstream(saying(b"", "Location: http://10.0.0.1/v1", status=f"{status} Moved"))
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    got, headers, body = await edge.ask({"model": PUBLIC})
    assert (got, error_of(body)["code"]) == (502, "upstream_error")
    assert "location" not in headers
    assert b"10.0.0.1" not in body
    assert len(upstream.requests) == 1
    await edge.consistent()


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("7", 7), ("1", 1), ("60", 59), ("0", 1), ("61", 59), ("3600", 59), ("99999999999999999999", 59), ("-1", 1),
     ("1.5", 2), ("Wed, 21 Oct 2026 07:28:00 GMT", 1), ("", 1), (None, 1), ("\xb2", 1)],
)  # fmt: skip
async def test_retry_after_is_a_whole_number_from_1_to_59(
    start_edge: StartEdge, start_upstream: StartUpstream, given: str | None, seconds: int
) -> None:
    async def script(connection: ScriptedConnection) -> None:
        line = b"" if given is None else f"Retry-After: {given}\r\n".encode("latin-1")
        await connection.send(b"HTTP/1.1 429 Too Many\r\nContent-Length: 2\r\n" + line + b"\r\n{}")

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    status, headers, body = await edge.ask({"model": PUBLIC})
    assert (status, error_of(body)["code"]) == (429, "rate_limit_exceeded")
    assert headers["retry-after"] == str(seconds)
    assert headers["retry-after-ms"] == str(1000 * seconds)


ERROR_FRAMES = {
    "vllm": (b'data: {"error":{"message":"m","type":"BadRequestError","param":null,"code":400}}\n\n', 400),
    "vllm, done": (b'data: {"error":{"message":"m","code":404}}\n\ndata: [DONE]\n\n', 404),
    "sglang, flat": (b'data: {"object":"error","message":"m","type":"BadRequest","param":null,"code":400}\n\n', 400),
    "sglang, spaced": (b'data: {"object": "error", "message": "m", "code": 429}\n\n', 429),
    "llamacpp, old": (b'error: {"code":400,"message":"m","type":"invalid_request_error"}\n\n', 400),
    "llamacpp": (b'data: {"error":{"code":503,"message":"m","type":"unavailable_error"}}\n\n', 503),
    "no space": (b'data:{"error":{"message":"m","code":422}}\r\n\r\n', 422),
    "no code": (b'data: {"error":{"message":"m","code":null}}\n\n', 502),
    "code in words": (b'data: {"error":{"message":"m","code":"invalid_api_key"}}\n\n', 502),
    "not the caller's": (b'data: {"error":{"message":"m","code":401}}\n\n', 502),
    "no status": (b'data: {"error":{"message":"m","code":200}}\n\n', 502),
    "anthropic": (b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"m"}}\n\n', 502),
}


@pytest.mark.parametrize("name", ERROR_FRAMES)
async def test_error_that_opens_a_stream_becomes_a_status(
    start_edge: StartEdge, start_upstream: StartUpstream, name: str
) -> None:
    frame, wanted = ERROR_FRAMES[name]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    sent = chunk(frame) + b"0\r\n\r\n"
    cuts = ((head, sent), (head, *(sent[at : at + 1] for at in range(len(sent)))), (head + sent,))
    remaining = iter(cuts)

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(*next(remaining))

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    for _ in cuts:
        status, headers, body = await edge.ask({"model": PUBLIC, "stream": True})
        assert (status, headers["content-type"]) == (wanted, "application/json")
        error = error_of(body)
        if wanted in CODES:
            assert error["message"] == "m"
    await edge.consistent()
    assert [(line["status"], line["end"]) for line in await edge.log()] == [(wanted, "upstream_error")] * 3


@pytest.mark.parametrize(
    "opening",
    [b'data: {"err', b'data: {"errors":[]}\n\n', b": ping\n\n", b"\n\n", b'data: {"object":"'],
)  # fmt: skip
async def test_stream_that_only_begins_like_an_error_passes_unchanged(
    start_edge: StartEdge, start_upstream: StartUpstream, opening: bytes
) -> None:
    rest = b'x"}\n\ndata: [DONE]\n\n'
    parts = (chunk(opening), chunk(rest), b"0\r\n\r\n")
    upstream = await start_upstream(streaming(*parts))
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    client = await edge.connect()
    client.send(edge.request({"model": PUBLIC, "stream": True}, headers=("Connection: close",)))
    assert (await client.head()).startswith(b"HTTP/1.1 200 ")
    assert await client.rest() == b"".join(parts)
    await edge.consistent()
    assert [line["end"] for line in await edge.log()] == ["complete"]


async def test_error_frame_after_the_first_event_passes_unchanged(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    parts = (chunk(b'data: {"choices":[]}\n\n'), chunk(ERROR_FRAMES["vllm"][0]), b"0\r\n\r\n")
    upstream = await start_upstream(streaming(*parts))
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    client = await edge.connect()
    client.send(edge.request({"model": PUBLIC, "stream": True}, headers=("Connection: close",)))
    await client.head()
    assert await client.rest() == b"".join(parts)


async def test_head_is_held_until_the_body_begins(start_edge: StartEdge, start_upstream: StartUpstream) -> None:
    """Servers send the head at once; until the first byte an upstream that dies is a 502, not a broken stream."""
    upstream = await start_upstream(streaming(close=True))
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    status, _, body = await edge.ask({"model": PUBLIC, "stream": True})
    assert (status, error_of(body)["code"]) == (502, "upstream_error")


async def test_interim_answers_of_the_upstream_do_not_reach_the_client(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    """RFC 9110 section 15.2: nobody asked for them."""

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\n")
        await saying(b'{"a":1}')(connection)

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    assert (await edge.ask({"model": PUBLIC}))[::2] == (200, b'{"a":1}')


async def test_drop_of_all_idle_upstream_connections_is_not_seen_by_clients(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    """A reused connection that dies with no byte of an answer is replayed once on a new one (RFC 9112 9.3.1)."""
    served = 0

    async def script(connection: ScriptedConnection) -> None:
        nonlocal served
        served += 1
        if served == 2:
            connection.reset()
        else:
            await saying(b"{}")(connection)

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    for _ in range(2):
        assert (await edge.ask({"model": PUBLIC}))[0] == 200
    await edge.consistent()
    assert (len(upstream.requests), upstream.connections) == (3, 2)
