"""Paths of other platforms and of stored responses, and what the edge answers by itself."""

import asyncio
import json
import re
import uuid
from typing import Any

import pytest

from edge.keys.stores.registry import KeyRegistry
from edge.process.server import Server
from edge.simulator.server import Simulator
from tests.conftest import ROUTES, Edge, ScriptedConnection, StartEdge, StartUpstream, WatchMethod
from tests.keybackends import ValkeyServer
from tests.streams import document

PUBLIC = "public/deepseek-r1"
OTHER_USER = "u-2200b26923dd"


async def reloaded(edge: Edge, watch: WatchMethod, text: str) -> None:
    """Let the edge take over another file."""
    edge.config_path.write_text(text)
    number, applied = edge.server.generation.number, watch(Server, "_apply")
    edge.server.reload()
    await applied.until(lambda: edge.server.generation.number > number)


def head_of(request: bytes) -> tuple[str, dict[str, str]]:
    first, *lines = request.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    return first, {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


def model_of(request: bytes) -> str:
    model: str = json.loads(request.partition(b"\r\n\r\n")[2])["model"]
    return model


# --- paths of other platforms


@pytest.mark.parametrize(
    ("path", "upstream_path"),
    [
        ("/anthropic/v1/messages", "/v1/messages"),
        ("/anthropic/messages", "/v1/messages"),
        ("/v1/messages/count_tokens", "/v1/messages/count_tokens"),
        ("/openai/v1/chat/completions?api-version=preview", "/v1/chat/completions"),
        ("/openai/v1/responses", "/v1/responses"),
        ("/v1/systemone", "/v1/systemone"),
        ("/v2/rerank", "/v2/rerank"),
    ],
)
async def test_path_of_another_platform_reaches_the_operation(
    start_edge: StartEdge, start_upstream: StartUpstream, path: str, upstream_path: str
) -> None:
    async def script(connection: ScriptedConnection) -> None:
        await connection.send(document({}))

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    assert (await edge.ask({"model": PUBLIC}, path=path))[0] == 200
    assert head_of(upstream.requests[0])[0] == f"POST {upstream_path} HTTP/1.1"


@pytest.mark.parametrize("padding", [0, 2 << 20])
@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "hi"}]},
        {"model": "gpt-4o", "messages": []},
        {"model": PUBLIC, "messages": []},
        {"messages": [{"model": "x"}]},
        {"messages": [], "stream": True},
        {"model": None, "messages": []},
        {},
    ],
)
async def test_model_in_azures_path_counts_and_goes_upstream_in_the_body(
    start_edge: StartEdge, start_upstream: StartUpstream, body: dict[str, Any], padding: int
) -> None:
    """The path names the deployment; what the body calls the model is Azure's to ignore."""

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(document({}))

    upstream = await start_upstream(script)
    routes = ROUTES.replace("{upstream}", upstream.url).replace('pool = "r1"', 'pool = "r1"\nmetered = true')
    edge = await start_edge(routes)
    if padding:
        body = body | {"user": "x" * padding}
    data = json.dumps(body).encode()
    path = f"/openai/deployments/{PUBLIC}/chat/completions?api-version=2026-05-01"
    request = edge.request(data, path=path).replace(b"Authorization: Bearer ", b"api-key: ")
    client = await edge.connect()
    client.send(request)
    assert (await client.response())[0] == 200
    sent = upstream.requests[0]
    assert head_of(sent)[0] == "POST /v1/chat/completions HTTP/1.1"
    asked = json.loads(sent.partition(b"\r\n\r\n")[2])
    assert asked.pop("model") == PUBLIC
    options = asked.pop("stream_options", None)
    assert options == ({"include_usage": True} if body.get("stream") else None)
    assert asked == {name: value for name, value in body.items() if name != "model"}
    await edge.consistent()


@pytest.mark.parametrize("named", ["", "whisper-1"])
async def test_model_in_azures_path_goes_upstream_in_a_form_too(
    start_edge: StartEdge, start_upstream: StartUpstream, named: str
) -> None:
    async def script(connection: ScriptedConnection) -> None:
        await connection.send(document({"text": "ok"}))

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    model = f'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n{named}\r\n' if named else ""
    body = f'{model}--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n--b--\r\n'
    path = f"/openai/deployments/{PUBLIC}/audio/transcriptions"
    client = await edge.connect()
    client.send(edge.request(body.encode(), path=path).replace(b"application/json", b"multipart/form-data; boundary=b"))
    assert (await client.response())[0] == 200
    sent = upstream.requests[0].partition(b"\r\n\r\n")[2].decode()
    assert sent.count('name="model"\r\n\r\n' + PUBLIC + "\r\n--b") == sent.count('name="model"') == 1
    assert sent.endswith('name="file"; filename="a.wav"\r\n\r\nRIFF\r\n--b--\r\n')
    await edge.consistent()


async def test_two_models_in_a_body_are_refused_under_azures_path_too(edge: Edge, simulator: Simulator) -> None:
    body = b'{"model":"a","messages":[],"model":"b"}'
    status, _, answer = await edge.ask(body, path=f"/openai/deployments/{PUBLIC}/chat/completions")
    assert (status, json.loads(answer)["error"]["param"]) == (400, "model")
    assert list(simulator.requests) == []


async def test_anthropics_client_is_answered_in_its_protocol_wherever_it_asks(edge: Edge) -> None:
    """An SDK of Anthropic's whose base URL ends in /v1, its usual mistake, learns what to change."""
    for method, path in (("POST", "/v1/v1/messages"), ("GET", "/anthropic/v1/models/none"), ("POST", "/anthropic/x")):
        status, headers, body = await edge.ask(method=method, path=path)
        said = json.loads(body)
        assert (status, said["type"], said["request_id"]) == (404, "error", headers["request-id"])
    assert "without /v1" in said["error"]["message"]
    status, _, body = await edge.ask(method="GET", path="/anthropic/v1/models", key="sk-" + "0" * 45)
    assert (status, json.loads(body)["error"]["type"]) == (401, "authentication_error")


async def test_operator_adds_an_operation_while_the_edge_runs(
    start_edge: StartEdge, start_upstream: StartUpstream, watch: WatchMethod
) -> None:
    async def script(connection: ScriptedConnection) -> None:
        await connection.send(document({"usage": {"prompt_tokens": 3, "total_tokens": 3}}))

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    assert (await edge.ask({"model": PUBLIC}, path="/v1/classify"))[0] == 404
    text = edge.config_path.read_text()
    await reloaded(edge, watch, text.replace("[server]", '[server]\noperations = ["classify"]', 1))
    for path in ("/v1/classify", "/classify"):
        assert (await edge.ask({"model": PUBLIC}, path=path))[0] == 200
    assert (await edge.ask({}, path="/v1/classify"))[0] == 400
    assert [head_of(each)[0] for each in upstream.requests] == ["POST /v1/classify HTTP/1.1"] * 2
    await edge.consistent()
    assert [record["prompt_tokens"] for record in edge.records()] == [3, 3]


# --- what the edge answers by itself


async def test_health_needs_no_key_and_tells_nothing_else(edge: Edge) -> None:
    client = await edge.connect()
    for method in ("GET", "HEAD"):
        client.send(f"{method} /health HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head = await client.head()
        assert head.startswith(b"HTTP/1.1 200 ")
        assert b"content-length: 0\r\n" in head


async def test_health_is_503_from_the_beginning_of_a_stop(start_edge: StartEdge, simulator: Simulator) -> None:
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server='shutdown_delay = "60s"')
    edge.server.stop()
    async with asyncio.timeout(20):
        while (status := (await edge.ask(method="GET", path="/health"))[0]) == 200:
            await asyncio.sleep(0)
    assert status == 503
    edge.server.stop()


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/realtime", "/"])
async def test_websocket_is_told_at_once_to_speak_http(edge: Edge, path: str) -> None:
    """Agents that try a WebSocket first fall back on a 426, and wait on anything else."""
    client = await edge.connect()
    client.send(
        f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    status, headers, body = await client.response()
    assert (status, headers["upgrade"]) == (426, "HTTP/1.1")
    assert "WebSocket is not served here" in json.loads(body)["error"]["message"]
    assert await client.rest() == b""


@pytest.mark.parametrize("path", ["files", "batches", "fine_tuning/jobs", "assistants", "realtime/sessions", "threads"])
@pytest.mark.parametrize("prefix", ["/v1/", "/", "/openai/v1/"])
async def test_apis_that_are_not_served_are_named_as_such(edge: Edge, prefix: str, path: str) -> None:
    status, _, body = await edge.ask({"model": PUBLIC}, path=prefix + path)
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (404, "not_found")
    assert f"`{path.partition('/')[0]}` is not served here" in error["message"]


async def test_models_have_what_uis_of_every_protocol_read(start_edge: StartEdge, simulator: Simulator) -> None:
    routes = ROUTES.replace("{upstream}", simulator.url).replace('pool = "r1"', 'pool = "r1"\ncontext_length = 5000')
    edge = await start_edge(routes)
    lists = [json.loads((await edge.ask(method="GET", path=path))[2]) for path in ("/v1/models", "/v1/models/")]
    assert lists[0] == lists[1]
    [model] = lists[0]["data"]
    assert (lists[0]["first_id"], lists[0]["last_id"], lists[0]["has_more"]) == (PUBLIC, PUBLIC, False)
    assert (model["id"], model["object"], model["owned_by"], model["type"]) == (PUBLIC, "model", "public", "model")
    assert (model["context_length"], model["max_model_len"]) == (5000, 5000)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", model["created_at"])
    alone = json.loads((await edge.ask(method="GET", path="/v1/models/public%2Fdeepseek-r1"))[2])
    assert alone == model


async def test_reload_does_not_change_when_a_model_was_created(edge: Edge, watch: WatchMethod) -> None:
    first = json.loads((await edge.ask(method="GET", path="/v1/models"))[2])
    edge.server.proxy._own.created -= 1000  # what only a restart would change
    await reloaded(edge, watch, edge.config_path.read_text() + '[routes."public/new"]\npool = "r1"\n')
    second = json.loads((await edge.ask(method="GET", path="/v1/models"))[2])
    assert len(second["data"]) == 2
    assert {each["created"] for each in second["data"]} == {first["data"][0]["created"] - 1000}


# --- ids


async def test_upstream_gets_a_uuid_of_ours_for_each_attempt(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    """One engine refuses any other id; and what a client calls its request is its own affair."""
    statuses = [503, 200]

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(document({}, statuses.pop(0)))

    upstream = await start_upstream(script)
    other = await start_upstream(script)
    routes = f'[pools.p]\nendpoints = ["{upstream.url}", "{other.url}"]\n[routes."public/m"]\npool = "p"\n'
    edge = await start_edge(routes)
    status, headers, _ = await edge.ask({"model": "public/m"}, headers=("X-Request-Id: my-own.1",))
    assert (status, headers["x-request-id"]) == (200, "my-own.1")
    ids = [head_of(each)[1]["x-request-id"] for each in (*upstream.requests, *other.requests)]
    assert len(set(ids)) == 2
    assert {uuid.UUID(each).version for each in ids} == {4}
    line = (await edge.log())[-1]
    assert line["request_id"] == edge.records()[-1]["request_id"] == "my-own.1"
    assert line["upstream_id"] in ids


# --- an upstream's words


async def test_headers_that_concern_the_caller_pass_and_those_of_the_platforms_account_do_not(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    lines = ("openai-version: 2020-10-01", "openai-organization: the-platform", "x-ratelimit-remaining-requests: 7",
             "anthropic-ratelimit-requests-remaining: 7", "server: x", "set-cookie: a=b")  # fmt: skip

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(document({}, 200, *lines))

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    _, shared, _ = await edge.ask({"model": PUBLIC})
    _, own, _ = await edge.ask({"model": "u-1100a15812cc/qwen2"})
    account = {"openai-organization", "x-ratelimit-remaining-requests", "anthropic-ratelimit-requests-remaining"}
    assert "openai-version" in shared
    assert not account & shared.keys()
    assert account < own.keys()
    assert not {"server", "set-cookie"} & (own.keys() | shared.keys())


@pytest.mark.parametrize("status", [401, 403, 405, 418, 501])
async def test_own_instance_is_quoted_and_a_shared_pool_is_not(
    start_edge: StartEdge, start_upstream: StartUpstream, status: int
) -> None:
    async def script(connection: ScriptedConnection) -> None:
        await connection.send(document({"error": {"message": "start it with --embeddings"}}, status))

    upstream = await start_upstream(script)
    edge = await start_edge(ROUTES.replace("{upstream}", upstream.url))
    got, headers, body = await edge.ask({"model": "u-1100a15812cc/qwen2"})
    assert (got, headers["x-should-retry"]) == (status, "false")
    assert json.loads(body)["error"]["message"] == "start it with --embeddings"
    got, headers, body = await edge.ask({"model": PUBLIC})
    assert got == (status if status in (405, 501) else 502)
    assert (b"--embeddings" in body) == (status == 405)


async def test_endpoint_that_does_not_take_the_edge_is_left_for_another(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    """An upstream's 401 is about the pool's own key: three of them and the endpoint is left."""

    async def refuses(connection: ScriptedConnection) -> None:
        await connection.send(document({"error": "Unauthorized"}, 401))

    async def answers(connection: ScriptedConnection) -> None:
        await connection.send(document({}))

    urls = [(await start_upstream(refuses)).url, (await start_upstream(answers)).url]
    edge = await start_edge(
        f'[pools.p]\nendpoints = {urls}\nbalance = "round-robin"\n[routes."public/m"]\npool = "p"\n'
    )
    assert {(await edge.ask({"model": "public/m"}))[0] for _ in range(8)} == {200}
    [out] = [each for each in edge.server.endpoints.states() if each.health.is_out_for_some]
    assert urls[0].endswith(out.authority)


@pytest.mark.parametrize("stream", [False, True])
async def test_request_that_timed_out_is_not_to_be_sent_again_unless_it_streams(
    start_edge: StartEdge, start_upstream: StartUpstream, stream: bool
) -> None:
    """The engine goes on with an answer that nobody waits for; three tries are three of them."""

    async def script(connection: ScriptedConnection) -> None:
        await connection.reader.read()

    upstream = await start_upstream(script)
    routes = ROUTES.replace("{upstream}", upstream.url).replace("[routes.", 'first_byte_timeout = "50ms"\n[routes.', 1)
    edge = await start_edge(routes)
    status, headers, _ = await edge.ask({"model": PUBLIC, "stream": stream})
    assert (status, headers.get("x-should-retry")) == (504, None if stream else "false")


# --- stored responses


STORED = '[pools.p]\nendpoints = {urls}\nbalance = "round-robin"\n[routes."public/m"]\npool = "p"\n'


async def keepers(start_upstream: StartUpstream, count: int = 2) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """Servers that each keep what they made; what each was asked: the first line and the body."""
    asked: list[list[tuple[str, str]]] = [[] for _ in range(count)]

    def server(number: int) -> Any:
        async def script(connection: ScriptedConnection) -> None:
            head, _, body = connection.request.partition(b"\r\n\r\n")
            first = head.partition(b"\r\n")[0].decode()
            asked[number].append((first, body.decode()))
            made = f"resp_{number}_{len(asked[number])}"
            if b'"stream": true' in body:
                created = b'data: {"type":"response.created","response":{"id":"%b"}}\n\n' % made.encode()
                done = b'data: {"type":"response.completed","response":{"id":"%b"}}\n\n' % made.encode()
                head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                content = created + done
                await connection.send(head + b"content-length: %d\r\n\r\n" % len(content), content)
            else:
                await connection.send(document({"id": made, "object": "response"}))

        return script

    return [(await start_upstream(server(number))).url for number in range(count)], asked


@pytest.mark.parametrize("stream", [False, True])
async def test_stored_response_is_asked_for_where_it_was_made(
    start_edge: StartEdge, start_upstream: StartUpstream, stream: bool
) -> None:
    urls, asked = await keepers(start_upstream)
    edge = await start_edge(STORED.replace("{urls}", str(urls)))
    made = []
    for _ in range(4):
        _, _, body = await edge.ask({"model": "public/m", "input": "x", "stream": stream}, path="/v1/responses")
        made.append(re.findall(rb'"(resp_\d_\d+)"', body)[0].decode())
    assert {each[5] for each in made} == {"0", "1"}
    for response_id in made:
        number = int(response_id[5])
        for method, rest in (("GET", ""), ("GET", "/input_items?limit=2"), ("POST", "/cancel"), ("DELETE", "")):
            status, _, _ = await edge.ask(method=method, path=f"/v1/responses/{response_id}{rest}")
            assert status == 200
            assert asked[number][-1] == (f"{method} /v1/responses/{response_id}{rest} HTTP/1.1", "")
        status, _, body = await edge.ask(method="GET", path=f"/v1/responses/{response_id}")
        assert (status, json.loads(body)["error"]["code"]) == (404, "response_not_found")  # it was deleted
    await edge.consistent()


async def test_conversation_goes_on_where_its_last_response_is_kept(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    urls, asked = await keepers(start_upstream, 3)
    edge = await start_edge(STORED.replace("{urls}", str(urls)))
    _, _, body = await edge.ask({"model": "public/m", "input": "x"}, path="/v1/responses")
    last = json.loads(body)["id"]
    number = int(last[5])
    for _ in range(5):
        _, _, body = await edge.ask(
            {"model": "public/m", "input": "x", "previous_response_id": last}, path="/v1/responses"
        )
        last = json.loads(body)["id"]
    assert [len(each) for each in asked] == [6 if each == number else 0 for each in range(3)]
    with KeyRegistry(edge.keys_path) as registry:
        key, _ = registry.create(OTHER_USER)
    for response_id, other in (("resp_x", None), (last, key)):  # nobody's, and another user's
        ask = {"model": "public/m", "previous_response_id": response_id}
        status, _, body = await edge.ask(ask, path="/v1/responses", key=other)
        assert (status, json.loads(body)["error"]["code"]) == (404, "response_not_found")
    assert sum(map(len, asked)) == 6


async def test_response_that_is_not_to_be_stored_is_not_noted(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    urls, _ = await keepers(start_upstream, 1)
    edge = await start_edge(STORED.replace("{urls}", str(urls)))
    _, _, body = await edge.ask({"model": "public/m", "input": "x", "store": False}, path="/v1/responses")
    assert (await edge.ask(method="GET", path=f"/v1/responses/{json.loads(body)['id']}"))[0] == 404


async def test_response_of_another_user_is_not_there(start_edge: StartEdge, start_upstream: StartUpstream) -> None:
    urls, asked = await keepers(start_upstream, 1)
    edge = await start_edge(STORED.replace("{urls}", str(urls)))
    _, _, body = await edge.ask({"model": "public/m", "input": "x"}, path="/v1/responses")
    path = f"/v1/responses/{json.loads(body)['id']}"
    with KeyRegistry(edge.keys_path) as registry:
        key, _ = registry.create(OTHER_USER)
    count = len(asked[0])
    for method in ("GET", "DELETE"):
        status, _, body = await edge.ask(method=method, path=path, key=key)
        assert (status, json.loads(body)["error"]["code"]) == (404, "response_not_found")
    assert len(asked[0]) == count
    assert (await edge.ask(method="GET", path=path))[0] == 200


async def test_response_whose_server_left_the_pool_is_not_there_any_more(
    start_edge: StartEdge, start_upstream: StartUpstream, watch: WatchMethod
) -> None:
    urls, _ = await keepers(start_upstream, 2)
    edge = await start_edge(STORED.replace("{urls}", str(urls[:1])))
    _, _, body = await edge.ask({"model": "public/m", "input": "x"}, path="/v1/responses")
    response_id = json.loads(body)["id"]
    await reloaded(edge, watch, edge.config_path.read_text().replace(urls[0], urls[1]))
    status, _, body = await edge.ask(method="GET", path=f"/v1/responses/{response_id}")
    assert (status, json.loads(body)["error"]["code"]) == (404, "response_not_found")
    ask = {"model": "public/m", "input": "x", "previous_response_id": response_id}
    assert (await edge.ask(ask, path="/v1/responses"))[0] == 404
    await edge.consistent()


async def test_response_is_found_by_the_other_processes(
    start_edge: StartEdge, start_upstream: StartUpstream, valkey: ValkeyServer
) -> None:
    urls, asked = await keepers(start_upstream, 2)
    routes = f'[shared]\nredis = "{valkey.url}"\n' + STORED.replace("{urls}", str(urls))
    one, other = await start_edge(routes), await start_edge(routes)
    _, _, body = await one.ask({"model": "public/m", "input": "x"}, path="/v1/responses")
    response_id = json.loads(body)["id"]
    async with asyncio.timeout(20):
        while one.server.kept_responses._queued:  # Redis has it then
            await asyncio.sleep(0)
    assert (await other.ask(method="GET", path=f"/v1/responses/{response_id}"))[0] == 200
    assert asked[int(response_id[5])][-1][0] == f"GET /v1/responses/{response_id} HTTP/1.1"


async def test_instance_keeps_responses_too(start_edge: StartEdge, start_upstream: StartUpstream) -> None:
    urls, asked = await keepers(start_upstream, 1)
    edge = await start_edge(ROUTES.replace("{upstream}", urls[0]))
    _, _, body = await edge.ask(
        {"model": "u-1100a15812cc/qwen2", "input": "x", "background": True}, path="/v1/responses"
    )
    response_id = json.loads(body)["id"]
    assert (await edge.ask(method="GET", path=f"/v1/responses/{response_id}"))[0] == 200
    assert asked[0][-1][0] == f"GET /v1/responses/{response_id} HTTP/1.1"


async def test_background_is_refused_where_its_usage_would_not_be_seen(
    start_edge: StartEdge, start_upstream: StartUpstream
) -> None:
    urls, asked = await keepers(start_upstream, 1)
    edge = await start_edge(STORED.replace("{urls}", str(urls)) + "metered = true\n")
    for background in (True, 1, "true", "yes", [0]):  # engines take more than true for it
        ask = {"model": "public/m", "input": "x", "background": background}
        status, _, body = await edge.ask(ask, path="/v1/responses")
        assert (status, json.loads(body)["error"]["param"]) == (400, "background")
    assert asked == [[]]
    assert (await edge.ask({"model": "public/m", "input": "x", "background": None}, path="/v1/responses"))[0] == 200


@pytest.mark.parametrize("path", ["/v1/responses/resp_1?a=%0d%0a", "/v1/responses/resp_1?" + "a" * 600])
async def test_query_of_a_stored_response_is_as_strict_as_its_path(
    start_edge: StartEdge, start_upstream: StartUpstream, path: str
) -> None:
    urls, asked = await keepers(start_upstream, 1)
    edge = await start_edge(STORED.replace("{urls}", str(urls)))
    assert (await edge.ask(method="GET", path=path))[0] in (400, 404)
    assert asked == [[]]
