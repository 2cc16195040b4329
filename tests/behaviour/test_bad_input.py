"""Whatever a client or an upstream gets wrong: a clear error at once, nothing sent upstream, nothing given away."""

import asyncio
import json
import re
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trustme

from edge.client.connection import ClientConnection
from edge.simulator.server import Simulator
from tests.conftest import (
    ROUTES,
    Edge,
    RawClient,
    ScriptedConnection,
    StartEdge,
    StartUpstream,
    WatchMethod,
    tls_setting,
)

PUBLIC = "public/deepseek-r1"
GOOD = b'{"model":"public/deepseek-r1"}'
INVALID = "invalid_request_error"

Refused = Callable[..., Awaitable[tuple[dict[str, str], dict[str, Any]]]]


def check_error(
    edge: Edge, answer: tuple[int, dict[str, str], bytes], status: int, code: str, param: str | None = None
) -> tuple[dict[str, str], dict[str, Any]]:
    """Check one error: the one shape, status, code, param, no key; return its headers and members."""
    got, headers, body = answer
    error = json.loads(body)["error"]
    assert (got, error["code"], error["param"]) == (status, code, param), error
    assert list(error) == ["message", "type", "param", "code"]
    assert headers["content-type"] == "application/json"
    assert headers["access-control-allow-origin"] == "*"
    assert headers["x-request-id"]
    assert edge.key.encode() not in body
    hopeless = (status < 500 and status not in (408, 429)) or status in (501, 505)
    assert headers.get("x-should-retry") == ("false" if hopeless else None)
    return headers, error


@pytest.fixture
async def refused(edge: Edge, simulator: Simulator, caplog: pytest.LogCaptureFixture) -> Refused:
    """Send bytes, check the error that answers them, and that nothing went upstream and no log tells the key."""

    async def check(data: bytes, status: int, code: str, param: str | None = None) -> Any:
        client = await edge.connect()
        client.send(data)
        result = check_error(edge, await client.response(), status, code, param)
        client.close()
        assert list(simulator.requests) == []
        await edge.consistent()
        await edge.log()
        secrets = {edge.key, *re.findall(r"sk-secret-\w+", data.decode("latin-1"))}
        logged = edge._log_path.read_text() + caplog.text
        assert [secret for secret in secrets if secret in logged] == []
        return result

    return check


def with_head(edge: Edge, *lines: str, first: str = "POST /v1/chat/completions HTTP/1.1", body: bytes = GOOD) -> bytes:
    """A request with these header lines; what is usual is added unless a line of that name is given, even empty."""
    usual = {
        "Host": "127.0.0.1",
        "Authorization": f"Bearer {edge.key}",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
    }
    given = {line.partition(":")[0].lower() for line in lines}
    head = [f"{name}: {value}" for name, value in usual.items() if name.lower() not in given]
    head += [line for line in lines if not line.endswith(": -")]
    return "\r\n".join([first, *head, "", ""]).encode("latin-1") + body


# --- who calls


@pytest.mark.parametrize(
    ("lines", "status", "code"),
    [
        (("Authorization: -",), 401, "invalid_api_key"),
        (("Authorization: Bearer",), 401, "invalid_api_key"),
        (("Authorization: sk-secret-bare1234",), 401, "invalid_api_key"),
        (("Authorization: Basic c2stc2VjcmV0",), 401, "invalid_api_key"),
        (("Authorization: Bearer sk-secret-wrong1234567890",), 401, "invalid_api_key"),
        (("Authorization: -", "api-key: sk-secret-wrong1234567890"), 401, "invalid_api_key"),
        (("Authorization: Bearer sk-7777",), 401, "invalid_api_key"),
        (("Authorization: Bearer sk-secret-" + "x" * 503,), 401, "invalid_api_key"),
        (("Authorization: Bearer sk-secret-clé12345",), 401, "invalid_api_key"),
        (("Authorization: Bearer sk-secret-one1 sk-secret-two2",), 401, "invalid_api_key"),
        (("Authorization: Bearer sk-secret-one12345", "authorization: Bearer sk-secret-two12345"), 400, INVALID),
        (("Authorization: -", "x-api-key: sk-secret-one12345", "api-key: sk-secret-two12345"), 400, INVALID),
    ],
)
async def test_bad_credential_is_refused(
    edge: Edge, refused: Refused, lines: tuple[str, ...], status: int, code: str
) -> None:
    headers, error = await refused(with_head(edge, *lines), status, code)
    assert "sk-secret" not in error["message"]
    assert headers.get("www-authenticate", "").startswith("Bearer" if status == 401 else "")


async def test_repeated_bad_key_is_refused_alike(edge: Edge, refused: Refused) -> None:
    """The first refusal comes from the store, the second from the cache."""
    data = with_head(edge, "Authorization: Bearer sk-secret-wrong1234567890")
    assert (await refused(data, 401, "invalid_api_key"))[1] == (await refused(data, 401, "invalid_api_key"))[1]


# --- which model


@pytest.mark.parametrize(
    "model",
    ["public/none", "u-2200b26923dd/qwen2", "u-1100a15812cc/Qwen_2", "u-1100a15812cc/", "u-1100a15812cc/a.b",
     "u-1100a15812cc/a/b", "u-1100a15812cc", "/", "PUBLIC/deepseek-r1", " public/deepseek-r1", "x" * 5000,
     "public/deepseek-r1\n", "public/\x00", "u-1100a15812cc/\u202eqwen", "../../etc", "http://127.0.0.1/"],
)  # fmt: skip
async def test_unknown_model_is_a_404(edge: Edge, refused: Refused, model: str) -> None:
    _, error = await refused(edge.request({"model": model}), 404, "model_not_found", "model")
    assert len(error["message"]) < 1000


ANOTHER = b'{"model":"public/deepseek-r1",%b}'


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"Model":"public/deepseek-r1"}',
        b'{"messages":[{"model":"public/deepseek-r1"}]}',
        *(b'{"model":%b}' % value for value in (b"1", b"null", b"true", b"[]", b'["public/a"]', b"{}", b'""')),
        *(
            ANOTHER % member
            for member in (
                b'"model":"public/other"',
                b'"\\u006dodel":"public/other"',
                b'"\\u006d\\u006F\\u0064\\u0065\\u006C":"public/other"',
                b'"mod\\u0065l":"public/other"',
                b'"model" : 1',
                b'"model":null',
                b'"a":{"model":"x"},"model":"public/other"',
            )
        ),
        b'{"\\u006dodel":"public/other","model":"public/deepseek-r1"}',
    ],
)  # fmt: skip
async def test_missing_wrong_or_second_model_is_a_400_that_names_it(edge: Edge, refused: Refused, body: bytes) -> None:
    await refused(edge.request(body), 400, INVALID, "model")


@pytest.mark.parametrize(
    "body",
    [
        ANOTHER % b'"messages":[{"model":"public/other","\\u006dodel":1}]',
        ANOTHER % b'"model":"public/deepseek-r1"',
        ANOTHER % b'"text":"\\"model\\":\\"public/other\\""',
        b'{"\\u006dodel":"public\\/deepseek-r1"}',
        b' \r\n\t{"a":[],"model"\t:\n"public/deepseek-r1"} \n',
        ANOTHER % (b'"a":[' + b"[]," * 2_800_000 + b"[]]"),
    ],
    ids=["nested", "twice the same", "in a text", "escaped", "spaced", "8 MB of brackets"],
)
async def test_unusual_but_unambiguous_body_goes_upstream_as_it_is(
    edge: Edge, simulator: Simulator, body: bytes
) -> None:
    assert (await edge.ask(body))[0] == 200
    assert simulator.requests[0].body == body
    await edge.consistent()


# --- no JSON


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"{", b"}", GOOD[:-1], GOOD + b"}", GOOD + GOOD, b"{'model':'public/deepseek-r1'}", b"nul", b"[]",
        b'"public/deepseek-r1"', b"1", b"null", b"\xef\xbb\xbf" + GOOD, GOOD.decode().encode("utf-16"), b"\x00" + GOOD,
        b"model=public/deepseek-r1", b'{"model":"\\ud800"}', *(ANOTHER % member for member in (
            b"", b'"t":NaN', b'"t":Infinity', b'"t":-Infinity', b'"t":01', b'"t":.5', b'"t":"\xff"',
            b'"t":"\xed\xa0\x80"', b'"t":"\xc0\xaf"', b'"t":"\x01"', b'"t":"\\x"', b'"t":tru', b'"t"',
            b'"t":1,', b'/**/"t":1',
        )),
        b"[]," * 2_800_000,
        ANOTHER % (b'"a":' + b"[" * 100_000 + b"]" * 100_000),
        ANOTHER % (b'"a":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        b"[" * 100_000,
    ],
    ids=lambda body: repr(body[:48]),
)  # fmt: skip
async def test_body_that_is_no_json_object_is_a_400(edge: Edge, refused: Refused, body: bytes) -> None:
    _, error = await refused(edge.request(body), 400, INVALID)
    assert "body" in error["message"]
    assert len(error["message"]) < 200


async def test_stream_that_is_no_boolean_is_a_400(edge: Edge, refused: Refused) -> None:
    for value in (b'"yes"', b"1", b"[]"):
        await refused(edge.request(ANOTHER % (b'"stream":' + value)), 400, INVALID, "stream")


# --- no form

PART = '--b\r\nContent-Disposition: form-data; name="model"\r\n\r\npublic/deepseek-r1\r\n'
FILE = '--b\r\nContent-Disposition: form-data; name="model"; filename="f"\r\n\r\npublic/deepseek-r1\r\n'


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        ("multipart/form-data; boundary=b", "", None),
        ("multipart/form-data; boundary=b", "--b--\r\n", "model"),
        ("multipart/form-data; boundary=b", FILE + "--b--\r\n", "model"),
        ("multipart/form-data; boundary=b", PART, None),
        ("multipart/form-data; boundary=b", PART + PART.replace("r1", "v3") + "--b--\r\n", "model"),
        ("multipart/form-data; boundary=b", PART.replace("deepseek", "\xff") + "--b--\r\n", "model"),
        ("multipart/form-data; boundary=other", PART + "--b--\r\n", None),
        ("multipart/form-data", PART + "--b--\r\n", None),
    ],
)
async def test_broken_form_is_a_400(edge: Edge, refused: Refused, kind: str, body: str, param: str | None) -> None:
    first = "POST /v1/audio/transcriptions HTTP/1.1"
    data = with_head(edge, f"Content-Type: {kind}", first=first, body=body.encode("latin-1"))
    await refused(data, 400, INVALID, param)


# --- how it is sent


@pytest.mark.parametrize(
    ("path", "lines"),
    [
        ("chat/completions", ("Content-Type: text/plain",)),
        ("chat/completions", ("Content-Type: application/x-www-form-urlencoded",)),
        ("chat/completions", ("Content-Type: multipart/form-data; boundary=b",)),
        ("chat/completions", ("Content-Type: application/jsonx",)),
        ("audio/transcriptions", ("Content-Type: application/json",)),
        ("images/edits", ("Content-Type: -",)),
        *(("completions", (f"Content-Encoding: {coding}",)) for coding in ("gzip", "br", "zstd", "identity, gzip")),
    ],
)
async def test_wrong_content_type_or_coding_is_a_415(
    edge: Edge, refused: Refused, path: str, lines: tuple[str, ...]
) -> None:
    data = with_head(edge, *lines, first=f"POST /v1/{path} HTTP/1.1")
    await refused(data, 415, "unsupported_media_type")


@pytest.mark.parametrize("lines", [(), ("Transfer-Encoding: chunked", "Content-Length: -")], ids=["length", "chunked"])
async def test_body_is_too_large_by_one_byte(
    start_edge: StartEdge, simulator: Simulator, lines: tuple[str, ...]
) -> None:
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server='max_body = "1KiB"')
    for size in (1024, 1025):
        body = GOOD.ljust(size)
        client = await edge.connect()
        client.send(with_head(edge, *lines, body=b"%x\r\n%b\r\n0\r\n\r\n" % (size, body) if lines else body))
        answer = await client.response()
        if size == 1024:
            assert answer[0] == 200
        else:
            check_error(edge, answer, 413, "request_too_large")
        client.close()
    assert [len(request.body) for request in simulator.requests] == [1024]
    await edge.consistent()


async def test_announced_size_is_refused_before_a_byte_of_the_body(edge: Edge, refused: Refused) -> None:
    for length in ("99999999999", "9" * 18):
        await refused(with_head(edge, f"Content-Length: {length}", body=b""), 413, "request_too_large")


@pytest.mark.parametrize(
    "path",
    ["/", "/v1", "/v1/", "/v1/v1/chat/completions", "//v1/chat/completions", "/v1//chat/completions", "/v1/../admin",
     "/v1/../v1/chat/completions", "/v1/%2e%2e/admin", "/v1/chat/completions/", "/V1/chat/completions",
     "/v1/chat%2Fcompletions", "/v1/%63ompletions", "/v1/chat/completions;a", "/v1/files", "/metrics", "/readyz",
     "/v2/models", "/v1/modelsx", "/v1/chat/completions%00", "/v1/chat/completions%3Fa"],
)  # fmt: skip
async def test_unknown_path_is_a_404_that_names_the_base_url(edge: Edge, refused: Refused, path: str) -> None:
    """Never a redirect, never a normalised path; with a key or without."""
    elsewhere = not path.startswith("/v1/") or path.startswith(("/v1/v1/", "/v1//"))
    for key in ((), ("Authorization: -",)):
        data = with_head(edge, *key, "Host: chat.d.run", first=f"POST {path} HTTP/1.1")
        _, error = await refused(data, 404, "not_found")
        assert "https://chat.d.run/v1 " in error["message"]
        assert ("embeddings" in error["message"]) != elsewhere, "where the base URL is right, the operation is not"


async def test_base_url_is_one_of_the_listener(start_edge: StartEdge, simulator: Simulator, tmp_path: Path) -> None:
    authority = trustme.CA()
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server=tls_setting(tmp_path, authority))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    client = RawClient(*await asyncio.open_connection("127.0.0.1", edge.port, ssl=context))
    client.send(edge.request(path="/foo"))
    _, _, body = await client.response()
    client.close()
    assert "The base URL is https://127.0.0.1/v1 " in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        *((method, "/v1/chat/completions", "POST, OPTIONS") for method in ("GET", "PUT", "DELETE", "PATCH")),
        ("GET", "/completions", "POST, OPTIONS"),
        ("GET", "/v1/audio/transcriptions", "POST, OPTIONS"),
        *((method, "/v1/models", "GET, HEAD, OPTIONS") for method in ("POST", "DELETE")),
        ("DELETE", "/models/public%2Fdeepseek-r1", "GET, HEAD, OPTIONS"),
    ],
)
async def test_wrong_method_is_a_405_that_names_the_right_ones(
    edge: Edge, refused: Refused, method: str, path: str, allow: str
) -> None:
    headers, _ = await refused(with_head(edge, first=f"{method} {path} HTTP/1.1"), 405, "method_not_allowed")
    assert headers["allow"] == allow


@pytest.mark.parametrize(
    ("first", "lines", "status", "code"),
    [
        ("1.1", ("Transfer-Encoding: gzip, chunked",), 501, "unsupported_transfer_coding"),
        ("1.1", ("Transfer-Encoding: chunked", "Content-Length: 5"), 400, INVALID),
        ("1.1", ("Transfer-Encoding: gzip",), 400, INVALID),  # no length can be known: RFC 9112 section 6.3
        ("1.1", ("Transfer-Encoding: chunked, gzip",), 400, INVALID),
        ("1.0", ("Transfer-Encoding: chunked",), 400, INVALID),
        ("1.1", ("Content-Length: 5", "content-length: 6"), 400, INVALID),
        ("1.1", ("Content-Length: -1",), 400, INVALID),
        ("1.1", ("Content-Length: +5",), 400, INVALID),
        ("1.1", ("Content-Length: 0x5",), 400, INVALID),
        ("1.1", ("Content-Length: 5, 5",), 400, INVALID),
        ("1.1", ("Expect: 200-ok",), 400, INVALID),
        ("1.1", ("no colon",), 400, INVALID),
        ("1.1", ("Space : 1",), 400, INVALID),
        ("1.1", ("X-Nul: a\x00b",), 400, INVALID),
        ("1.1", ("X-Fold: a\r\n b",), 400, INVALID),
        ("0.9", (), 505, "unsupported_http_version"),
        ("2.0", (), 505, "unsupported_http_version"),
        ("1.2", (), 400, INVALID),
        ("11", (), 400, INVALID),
    ],
)  # fmt: skip
async def test_what_http_1_1_does_not_allow_is_refused_and_the_connection_closed(
    edge: Edge, refused: Refused, first: str, lines: tuple[str, ...], status: int, code: str
) -> None:
    given = {line.partition(":")[0].lower() for line in lines}
    extra = ("Content-Length: -",) if "transfer-encoding" in given and "content-length" not in given else ()
    body = b"5\r\nhello\r\n0\r\n\r\n" if "transfer-encoding" in given else GOOD
    data = with_head(edge, *lines, *extra, first=f"POST /v1/chat/completions HTTP/{first}", body=body)
    headers, _ = await refused(data, status, code)
    assert headers["connection"] == "close"


@pytest.mark.parametrize(
    "data",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"sk-secret-12345678\r\n\r\n",
     b"GET / HTTP/1.1\nHost: a\n\n", b"G\x00T / HTTP/1.1\r\n\r\n", b"GET /v1/models HTTP/1.1\r\n\r\n", b"GET\r\n\r\n"],
)  # fmt: skip
async def test_what_is_no_http_1_1_gets_a_400_of_ours(refused: Refused, data: bytes) -> None:
    headers, error = await refused(data, 400, INVALID)
    assert headers["connection"] == "close"
    assert "sk-secret" not in error["message"]


async def test_http_0_9_is_a_505(refused: Refused) -> None:
    await refused(b"GET /v1/models\r\n\r\n", 505, "unsupported_http_version")


@pytest.mark.parametrize(
    ("first", "upgrade"),
    [
        ("GET /v1/models HTTP/1.1", "websocket"),
        ("POST /v1/completions HTTP/1.1", "h2c"),
        ("POST /v1/completions HTTP/1.1", "websocket"),
    ],
)
async def test_upgrade_is_not_taken_and_the_connection_goes_on(edge: Edge, first: str, upgrade: str) -> None:
    """RFC 9110 section 7.8: who does not switch answers as if nobody had asked."""
    client = await edge.connect()
    body = GOOD if first.startswith("POST") else b""
    client.send(with_head(edge, "Connection: Upgrade", f"Upgrade: {upgrade}", first=first, body=body))
    status, headers, _ = await client.response()
    assert status == 200
    if headers.get("connection") != "close":
        client.send(edge.request(GOOD))
        assert (await client.response())[0] == 200
    await edge.consistent()


async def test_connect_is_refused_and_what_follows_is_no_tunnel(edge: Edge, simulator: Simulator) -> None:
    client = await edge.connect()
    client.send(b"CONNECT 127.0.0.1:443 HTTP/1.1\r\nHost: 127.0.0.1:443\r\n\r\n" + edge.request(GOOD))
    status, headers, _ = await client.response()
    assert status in (400, 404, 405, 501)
    assert headers["connection"] == "close"
    assert await client.rest() == b""
    assert list(simulator.requests) == []
    await edge.consistent()


async def test_prior_knowledge_http_2_is_refused(edge: Edge, simulator: Simulator) -> None:
    client = await edge.connect()
    client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    status, _, body = await client.response()
    assert status in (400, 505)
    assert json.loads(body)["error"]["type"] == INVALID


@pytest.mark.parametrize(
    "lines",
    [
        tuple(f"x-{number}: 1" for number in range(101)),
        ("x-long: " + "sk-secret-1234" * 1300,),
        tuple(f"x-{number}: {'v' * 1000}" for number in range(90)),
        ("x" * 20_000 + ": 1",),
    ],
    ids=["many", "long value", "many long", "long name"],
)
async def test_header_bomb_is_a_431(edge: Edge, refused: Refused, lines: tuple[str, ...]) -> None:
    headers, error = await refused(with_head(edge, *lines), 431, "headers_too_large")
    assert headers["connection"] == "close"
    assert "sk-secret" not in error["message"]


async def test_long_request_line_is_a_414(edge: Edge, refused: Refused) -> None:
    for path in ("/v1/models/" + "a" * 9000, "/v1/models?" + "a" * 9000, "/" + "a" * 100_000):
        headers, _ = await refused(with_head(edge, first=f"GET {path} HTTP/1.1", body=b""), 414, "uri_too_long")
        assert headers["connection"] == "close"


BROKEN_CHUNKS = (
    b"zz\r\n",
    b"5\r\nhelloXX",
    b"5\r\nhello\r\n-1\r\n",
    b"5;\x00\r\n",
    b"fffffffffffffffff\r\n",
    b"5\nhello\n",
)


@pytest.mark.parametrize("broken", BROKEN_CHUNKS)
async def test_body_whose_framing_breaks_is_a_400_at_once(edge: Edge, simulator: Simulator, broken: bytes) -> None:
    """aiohttp's parser forgets such a body, and its handler would wait for ever."""
    head = with_head(edge, "Transfer-Encoding: chunked", "Content-Length: -", "Expect: 100-continue", body=b"")
    for when in ("with the head", "after the head", "after a chunk"):
        client = await edge.connect()
        if when == "with the head":
            client.send(head + broken)
        else:
            client.send(head)
            assert await client.head() == b"HTTP/1.1 100 Continue\r\n\r\n"  # so the body is being read
            client.send((b"5\r\n     \r\n" if when == "after a chunk" else b"") + broken)
        headers, _ = check_error(edge, await client.response(), 400, INVALID)
        assert headers["connection"] == "close"
        assert await client.rest() == b""
    assert list(simulator.requests) == []
    await edge.consistent()


@pytest.mark.parametrize(
    ("chunks", "status", "code"),
    [
        (b"1\r\nx\r\n" * 20_000, 400, INVALID),
        (b"5;" + b"x" * 100_000, 400, INVALID),
        (b"5;" + b"x" * 5000 + b"\r\nhello\r\n0\r\n\r\n", 400, INVALID),
        (b"8000000000000000\r\n", 413, "request_too_large"),
        (b"4000001\r\n", 413, "request_too_large"),
    ],
)
async def test_chunks_that_no_client_needs_are_refused_at_once(
    edge: Edge, simulator: Simulator, chunks: bytes, status: int, code: str
) -> None:
    """They cost a hundred times what the same body costs in one, or would be waited for until the body's timeout."""
    head = with_head(edge, "Transfer-Encoding: chunked", "Content-Length: -", "Expect: 100-continue", body=b"")
    for when in ("with the head", "cut in the head's end", "after a chunk"):
        client = await edge.connect()
        if when == "with the head":
            client.send(head + chunks)
        elif when == "cut in the head's end":
            client.send(head[:-1])
            for _ in range(5):  # so that it is read by itself, as a rule
                await asyncio.sleep(0)
            client.send(head[-1:] + chunks)
        else:
            client.send(head)
            assert await client.head() == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.send(b"5\r\n     \r\n" + chunks)
        headers, _ = check_error(edge, await client.response(), status, code)
        assert headers["connection"] == "close"
    assert list(simulator.requests) == []
    await edge.consistent()


@pytest.mark.parametrize("chunk_bytes", [16, 1000, 65_536])
async def test_long_body_in_chunks_arrives_as_it_is(edge: Edge, simulator: Simulator, chunk_bytes: int) -> None:
    body = GOOD.ljust(300_000)
    pieces = [body[at : at + chunk_bytes] for at in range(0, len(body), chunk_bytes)]
    chunked = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    client = await edge.connect()
    head = with_head(edge, "Transfer-Encoding: chunked", "Content-Length: -", body=b"")
    for _ in range(2):  # and the connection goes on
        client.send(head + chunked + b"0;a=b\r\nX: y\r\n\r\n")
        assert (await client.response())[0] == 200
    assert [request.body for request in simulator.requests] == [body, body]
    await edge.consistent()


# --- too slow, too much


@pytest.mark.parametrize("lines", [("Content-Length: 100",), ("Transfer-Encoding: chunked", "Content-Length: -")])
async def test_client_that_stops_inside_its_body_gets_a_408(
    start_edge: StartEdge, simulator: Simulator, lines: tuple[str, ...]
) -> None:
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server='body_timeout = "100ms"')
    client = await edge.connect()
    client.send(with_head(edge, *lines, body=b"5\r\nhel"))
    headers, _ = check_error(edge, await client.response(), 408, "request_timeout")
    assert headers["connection"] == "close"
    assert list(simulator.requests) == []
    await edge.consistent()


async def test_slow_head_gets_a_408(start_edge: StartEdge, simulator: Simulator) -> None:
    """Also on a connection that has served a request."""
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server='header_timeout = "100ms"')

    async def one(part: bytes, before: int) -> None:
        client = await edge.connect()
        for _ in range(before):
            client.send(edge.request(path="/v1/models", method="GET"))
            assert (await client.response())[0] == 200
        client.send(part)
        headers, _ = check_error(edge, await client.response(), 408, "request_timeout")
        assert headers["connection"] == "close"
        assert await client.rest() == b""

    parts = (b"P", b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer sk-s")
    await asyncio.gather(*(one(part, before) for part in parts for before in (0, 1)))
    await edge.consistent()


async def test_slow_head_behind_a_running_answer_gets_a_408_after_it(
    start_edge: StartEdge, start_upstream: StartUpstream, watch: WatchMethod
) -> None:
    received = watch(ClientConnection, "data_received")
    go_on = asyncio.Event()

    async def script(connection: ScriptedConnection) -> None:
        await go_on.wait()
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url), server='header_timeout = "100ms"')
    client = await edge.connect()
    client.send(edge.request(GOOD))
    await upstream.asked.wait()
    client.send(b"POST /v1/chat")
    await received.until(lambda: len(received.calls) == 2)
    go_on.set()
    assert (await client.response())[0] == 200
    check_error(edge, await client.response(), 408, "request_timeout")
    assert await client.rest() == b""
    await edge.consistent()


async def test_empty_line_behind_a_body_begins_no_head(start_edge: StartEdge, simulator: Simulator) -> None:
    """Old clients send one (RFC 9112 section 2.2); a 408 would be taken for the answer to their next request."""
    settings = 'header_timeout = "50ms"\nclient_idle_timeout = "300ms"'
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server=settings)
    client = await edge.connect()
    client.send(edge.request(GOOD))
    assert (await client.response())[0] == 200
    client.send(b"\r\n")
    assert await client.rest() == b""
    await edge.consistent()


async def test_bodies_of_all_requests_together_are_bounded(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    """A 503 when spent; what is released can be had again."""
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def script(connection: ScriptedConnection) -> None:
        asked.set()
        await go_on.wait()
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    upstream = await start_upstream(script)
    edge = await start_edge(
        ROUTES.replace("{upstream}", upstream.url), server='max_body = "1KiB"\nbody_memory = "1500B"'
    )
    first = await edge.connect()
    first.send(edge.request(GOOD.ljust(1000)))
    await asked.wait()
    for lines in ((), ("Transfer-Encoding: chunked", "Content-Length: -")):
        second = await edge.connect()
        body = GOOD.ljust(1000)
        second.send(with_head(edge, *lines, body=b"%x\r\n%b\r\n0\r\n\r\n" % (1000, body) if lines else body))
        headers, _ = check_error(edge, await second.response(), 503, "overloaded")
        assert headers["retry-after"] == "1"
    assert len(upstream.requests) == 1
    go_on.set()
    assert (await first.response())[0] == 200
    assert (await edge.ask(GOOD.ljust(1000)))[0] == 200
    await edge.consistent()


# --- what the upstream gets wrong


async def test_upstream_that_refuses_is_a_503_without_its_address(start_edge: StartEdge) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        edge = await start_edge(ROUTES.replace("{upstream}", f"http://127.0.0.1:{port}"))
        for model in (PUBLIC, "u-1100a15812cc/qwen2"):
            for stream in (False, True):
                answer = await edge.ask({"model": model, "stream": stream})
                _, error = check_error(edge, answer, 503, "upstream_unavailable")
                assert str(port) not in error["message"]
    await edge.consistent()


RUBBISH = (
    b"\x16\x03\x01\x02\x00\x01", b"hello\r\n\r\n", b"HTTP/2.0 200 OK\r\n\r\n", b"HTTP/1.1 99 No\r\n\r\n",
    b"HTTP/1.1 600 No\r\n\r\n", b"HTTP/1.1 200OK\r\n\r\n", b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}",
    *(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n{}" % line for line in (
        b"Content-Length: -2", b"Content-Length: 2\r\nContent-Length: 2", b"Content-Length: 2, 2", b"no colon",
        b"Content-Length: 2\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: gzip", b"Content-Length : 2", b" Content-Length: 2", b"X: a\r\n b: c", b"X: a\x00",
        b"X: " + b"a" * 70_000,
        b"Transfer-Encoding: chunked\r\n\r\nzz", b"Transfer-Encoding: chunked\r\n\r\n-2",
    )),
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
)  # fmt: skip


@pytest.mark.parametrize("rubbish", RUBBISH, ids=lambda rubbish: repr(rubbish[:60]))
async def test_upstream_that_answers_rubbish_is_a_502(
    start_edge: StartEdge, start_upstream: StartUpstream, rubbish: bytes
) -> None:
    async def script(connection: ScriptedConnection) -> None:
        await connection.send(rubbish)
        connection.writer.close()

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    for stream in (False, True):
        check_error(edge, await edge.ask({"model": PUBLIC, "stream": stream}), 502, "upstream_error")
    await edge.consistent()
    assert (upstream.connections, [line["end"] for line in await edge.log()]) == (2, ["upstream_error"] * 2)


EVENTS = (b'data: {"choices":[]}\n\n', b'data: {"a":"\xe4\xbd\xa0"}\n\n', b"data: [DONE]\n\n")
SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
ANSWERS = {
    "json": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 27\r\n\r\n"
    b'{"choices":[{"text":"hi"}]}',
    "json, chunked": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'1b\r\n{"choices":[{"text":"hi"}]}\r\n0\r\n\r\n',
    "events": SSE_HEAD
    + b"Transfer-Encoding: chunked\r\n\r\n"
    + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in EVENTS)
    + b"0\r\n\r\n",
    "events, sized": SSE_HEAD + b"Content-Length: %d\r\n\r\n" % len(b"".join(EVENTS)) + b"".join(EVENTS),
    "events, extended": SSE_HEAD
    + b"Transfer-Encoding: chunked\r\n\r\n"
    + b"".join(b"%x;a=b\r\n%b\r\n" % (len(event), event) for event in EVENTS)
    + b"0\r\nx-trailer: 1\r\n\r\n",
}


def is_whole(raw: bytes) -> bool:
    """Whether a client of HTTP takes this for a complete success (RFC 9112 section 8)."""
    head, _, body = raw.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 ") or b"upstream_disconnected" in body:
        return False
    if length := re.search(rb"\r\ncontent-length: (\d+)", head):
        return len(body) == int(length[1])
    assert b"\r\ntransfer-encoding: chunked" in head
    return body.endswith(b"\r\n0\r\n\r\n")


# The others end with a reset in test_broken_streams.py.
RESETS = ("events, sized", "events, extended")


@pytest.mark.parametrize(
    ("name", "how"), [*((name, "closes") for name in ANSWERS), *((name, "resets") for name in RESETS)]
)
async def test_upstream_that_ends_at_any_byte_never_looks_complete(
    start_edge: StartEdge, start_upstream: StartUpstream, name: str, how: str
) -> None:
    answer = ANSWERS[name]
    count = 0

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(answer[:count])
        if how == "closes":
            connection.writer.close()
        else:
            connection.reset()

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    address = upstream.url.removeprefix("http://").encode()
    body_begins = answer.index(b"\r\n\r\n") + 4
    for count in range(len(answer) + 1):
        client = await edge.connect()
        client.send(edge.request({"model": PUBLIC, "stream": True}, headers=("Connection: close",)))
        raw = await read_all(client)
        has_last_event = b"data: [DONE]\n\n" in answer[:count]  # behind it nothing is missing
        if not has_last_event and (how == "closes" or count < len(answer)):  # a reset may overtake the last bytes
            assert is_whole(raw) == (count == len(answer)), (count, raw)
        assert address not in raw
        if count <= body_begins:
            assert raw.startswith(b"HTTP/1.1 502 ")
            assert b'"upstream_error"' in raw
    await edge.consistent()
    ends = [line["end"] for line in await edge.log()]
    assert len(ends) == len(answer) + 1
    assert {"upstream_error", "upstream_cut"} <= set(ends[:-1]) <= {"upstream_error", "upstream_cut", "complete"}


async def read_all(client: RawClient) -> bytes:
    """Read to the end, also when that is a reset."""
    parts = []
    try:
        while part := await client.reader.read(65_536):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


async def test_old_client_sees_a_reset_where_the_end_would_complete_the_answer(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    """To HTTP/1.0 an orderly end is a complete answer."""
    answer = ANSWERS["json, chunked"]
    count = 0

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(answer[:count])
        connection.writer.close()

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    begins = answer.index(b"{")
    for count in range(begins + 1, len(answer)):  # noqa: B007  # the script reads it
        client = await edge.connect()
        client.send(edge.request({"model": PUBLIC}, version="1.0"))
        with pytest.raises(ConnectionResetError):
            await client.rest()
    await edge.consistent()
