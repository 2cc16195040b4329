"""Keys and users over HTTP: what a console does, and what is refused."""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import jsonschema
import pytest

from edge.journal.index import SUMS
from edge.keys.stores.registry import KeyRegistry
from edge.process.api.documents import Day
from edge.simulator.server import Simulator
from loadtest.console import Console
from tests.conftest import ROUTES, Edge, StartEdge, Watch
from tests.keyapi import TOKEN, KeyClient
from tests.keys.keyfiles import back_up

BODY = {"model": "public/deepseek-r1", "messages": []}
LIMITS = "[limits.standard]\nrequests_per_minute = 100\n"


@pytest.fixture
async def edge(start_edge: StartEdge, simulator: Simulator) -> Edge:
    """An edge that is administered over HTTP, and whose cache alone would keep every answer for an hour."""
    routes = ROUTES.replace("{upstream}", simulator.url) + LIMITS
    keys = 'cache_ttl = "1h"\nnegative_ttl = "1h"\nstale_for = "1h"'
    return await start_edge(routes, server=f'admin_token = "{TOKEN}"\n', keys=keys)


@pytest.fixture
async def console(edge: Edge) -> AsyncIterator[KeyClient]:
    async with KeyClient(edge.admin_url) as client:
        yield client


async def status_of(edge: Edge, key: str) -> int:
    return (await edge.ask(BODY, key=key))[0]


def at(**ahead: int) -> str:
    return (datetime.now(UTC) + timedelta(**ahead)).isoformat()


# --- the day of a key


async def test_key_is_made_shown_changed_and_revoked(edge: Edge, console: KeyClient) -> None:
    """Each change holds with the answer: the process that made it need not hear of it."""
    made = await console.create(name="laptop", allow=["public/*"], limit="standard", share=4, expires_at=at(days=30))
    key = made.pop("key")
    assert key.startswith("sk-")
    shown = await console.ask("GET", f"/keys/{made['id']}")
    assert (shown.status, shown.body) == (200, made)
    assert (made["name"], made["allow"], made["limit"], made["user"], made["share"]) == (
        "laptop",
        ["public/*"],
        "standard",
        "u-console",
        4,
    )
    assert await status_of(edge, key) == 200
    for change, status in (
        ({"enabled": False}, 401),
        ({"enabled": True}, 200),
        ({"deny": ["public/*"]}, 403),
        ({"deny": []}, 200),
        ({"expires_at": at(seconds=-1)}, 401),
        ({"expires_at": None}, 200),
    ):
        changed = await console.ask("PATCH", f"/keys/{made['id']}", change)
        assert changed.status == 200
        assert await status_of(edge, key) == status, change
    assert (await console.ask("DELETE", f"/keys/{made['id']}")).status == 204
    assert await status_of(edge, key) == 401
    gone = (await console.ask("GET", f"/keys/{made['id']}")).body
    assert (gone["revoked"], gone["revoked_at"] is not None) == (True, True)
    assert (await console.ask("DELETE", f"/keys/{made['id']}")).status == 204, "again, as DELETE is idempotent"
    for method, path, body in (("PATCH", "", {"name": "x"}), ("POST", "/rotate", {})):
        assert (await console.ask(method, f"/keys/{made['id']}{path}", body)).status == 409


async def test_rotated_key_works_beside_its_successor_until_its_grace_is_over(edge: Edge, console: KeyClient) -> None:
    old = await console.create(name="ci")
    rotated = await console.ask("POST", f"/keys/{old['id']}/rotate", {"grace": "24h"})
    assert rotated.status == 201
    new = rotated.body
    assert (new["user"], new["name"]) == (old["user"], "ci")
    assert [await status_of(edge, each["key"]) for each in (old, new)] == [200, 200]
    before = (await console.ask("GET", f"/keys/{old['id']}")).body
    assert before["replaced_by"] == new["id"]
    assert before["expires_at"] is not None
    last = (await console.ask("POST", f"/keys/{new['id']}/rotate")).body
    assert [await status_of(edge, each["key"]) for each in (new, last)] == [401, 200]
    assert (await console.ask("POST", f"/keys/{old['id']}/rotate", {})).status == 409
    assert (await console.ask("POST", f"/keys/{last['id']}/rotate", {"grace": "soon"})).status == 400


async def test_user_is_suspended_and_out_of_quota_with_keys_made_later(edge: Edge, console: KeyClient) -> None:
    made = await console.create()
    for change, status in (({"suspended": True}, 401), ({"suspended": False, "out_of_quota": True}, 402),
                           ({"out_of_quota": False}, 200)):  # fmt: skip
        answer = await console.ask("PUT", "/users/u-console", change)
        assert (answer.status, answer.body["keys"]) == (200, 1)
        assert await status_of(edge, made["key"]) == status
    await console.ask("PUT", "/users/u-console", {"out_of_quota": True})
    later = await console.create()
    assert later["out_of_quota"]
    assert (await console.ask("GET", "/users/u-console")).body == {
        "object": "user", "id": "u-console", "suspended": False, "out_of_quota": True, "keys": 2,
    }  # fmt: skip


async def test_keys_are_listed_in_pages_that_miss_none(console: KeyClient) -> None:
    made = [(await console.create(user))["id"] for user in ("u-a", "u-b", "u-a", "u-a")]
    await console.ask("DELETE", f"/keys/{made[2]}")
    first = (await console.ask("GET", "/keys?user=u-a&limit=1")).body
    assert ([each["id"] for each in first["data"]], first["has_more"]) == ([made[0]], True)
    rest = (await console.ask("GET", f"/keys?user=u-a&limit=1&after={first['last_id']}")).body
    assert ([each["id"] for each in rest["data"]], rest["has_more"]) == ([made[3]], False)
    everything = (await console.ask("GET", "/keys?all=true&user=u-a")).body
    assert [each["id"] for each in everything["data"]] == [made[0], made[2], made[3]]
    nothing = (await console.ask("GET", "/keys?user=u-nobody")).body
    assert (nothing["data"], nothing["last_id"]) == ([], None)
    for query in (
        "limit=0",
        "limit=x",
        "limit=1001",
        "limit=000000001999999",
        "after=key_000000000000",
        "all=1",
        "page=2",
        "user=a&user=b",
    ):
        assert (await console.ask("GET", f"/keys?{query}")).status == 400, query


async def test_last_use_is_noted_without_a_write_of_a_request(edge: Edge, console: KeyClient) -> None:
    made = await console.create()
    idle = await console.create()
    assert await status_of(edge, made["key"]) == 200
    assert (await console.ask("GET", f"/keys/{made['id']}")).body["last_used_at"] is None
    await edge.server.key_uses.note()
    shown = (await console.ask("GET", f"/keys/{made['id']}")).body["last_used_at"]
    assert abs(datetime.fromisoformat(shown) - datetime.now(UTC)) < timedelta(seconds=120)
    assert shown.endswith(":00Z")
    assert (await console.ask("GET", f"/keys/{idle['id']}")).body["last_used_at"] is None
    assert await status_of(edge, made["key"]) == 200, "a use is no change of a key"


async def test_usage_of_a_key_is_that_of_its_records_by_day_and_model(edge: Edge, console: KeyClient) -> None:
    made = await console.create()
    for _ in range(3):
        assert await status_of(edge, made["key"]) == 200
    assert await status_of(edge, edge.key) == 200
    records = [each for each in edge.records() if each["key_id"] == made["id"]]
    used = (await console.ask("GET", f"/keys/{made['id']}/usage")).body
    [day] = used["data"]
    assert (day["day"], day["model"], day["requests"]) == (records[0]["time"][:10], BODY["model"], 3)
    for name in ("prompt_tokens", "completion_tokens"):
        assert day[name] == sum(each[name] for each in records)
    assert (await console.ask("GET", f"/keys/{made['id']}/usage?until=2020-01-01")).body["data"] == []
    for query in ("since=yesterday", "by=day"):
        assert (await console.ask("GET", f"/keys/{made['id']}/usage?{query}")).status == 400
    assert (await console.ask("GET", "/keys/key_000000000000/usage")).status == 404


def test_document_of_usage_has_the_sums_of_the_index() -> None:
    assert Day.__struct_fields__ == ("day", "model", *SUMS)


# --- a request that comes again


async def test_request_that_comes_again_makes_one_key_and_one_with_another_body_is_refused(console: KeyClient) -> None:
    body = {"user": "u-a", "name": "x"}
    first, again = [await console.ask("POST", "/keys", body, Idempotency_Key="abc") for _ in range(2)]
    assert (first.status, again.status, first.body) == (201, 201, again.body)
    other = await console.ask("POST", "/keys", {"user": "u-a", "name": "y"}, Idempotency_Key="abc")
    assert (other.status, other.body["error"]["code"]) == (409, "idempotency_key_reused")
    assert len((await console.ask("GET", "/keys?user=u-a")).body["data"]) == 1
    key_id = first.body["id"]
    rotated = [await console.ask("POST", f"/keys/{key_id}/rotate", {}, Idempotency_Key="def") for _ in range(2)]
    assert rotated[0].body == rotated[1].body
    assert (await console.ask("POST", f"/keys/{key_id}/rotate", {}, Idempotency_Key="abc")).status == 409
    assert (await console.ask("POST", "/keys", body, Idempotency_Key="a" * 256)).status == 400


async def test_requests_at_once_by_one_idempotency_key_make_one_key(console: KeyClient) -> None:
    asked = [console.ask("POST", "/keys", {"user": "u-a"}, Idempotency_Key="once") for _ in range(5)]
    answers = await asyncio.gather(*asked)
    assert {each.status for each in answers} == {201}
    assert len({each.body["key"] for each in answers}) == 1


# --- the token


async def test_without_the_token_nothing_is_told_but_that_it_is_needed(edge: Edge, console: KeyClient) -> None:
    """A path that there is not looks the same; health, metrics and the document are open."""
    for token in (None, "wrong", TOKEN + "x", TOKEN[:-1]):
        console.token = token
        for asked in ("GET /keys", "POST /keys", "GET /keys/key_000000000000", "GET /nothing", "PUT /users/u-a",
                      "POST /keys/purge", "GET /status.json"):  # fmt: skip
            refused = await console.ask(*asked.split())
            assert (refused.status, refused.body["error"]["code"]) == (401, "invalid_admin_token")
            assert refused.headers["WWW-Authenticate"] == 'Bearer realm="edge admin"'
        for path in ("/livez", "/readyz", "/metrics", "/openapi.json"):
            assert (await console.ask("GET", path)).status == 200
    console.token = TOKEN
    assert (await console.ask("POST", "/keys/purge")).body["forgotten"] >= 0


async def test_browser_shows_the_token_as_a_password_and_changes_nothing_with_it(console: KeyClient) -> None:
    """Another site could have it post: it sends what it was told along with everything."""
    basic = "Basic " + base64.b64encode(f"operator:{TOKEN}".encode()).decode()
    console.token = None
    assert (await console.ask("GET", "/keys", Authorization=basic)).status == 200
    for path in ("/keys", "/keys/purge"):
        assert (await console.ask("POST", path, {"user": "u-a"}, Authorization=basic)).status == 401
    assert (await console.ask("GET", "/keys", Authorization="Basic !")).status == 401


async def test_without_a_token_in_the_file_there_is_no_api(start_edge: StartEdge, simulator: Simulator) -> None:
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url))
    async with KeyClient(edge.admin_url, "any") as console:
        for method, path in (("POST", "/keys"), ("GET", "/keys"), ("PUT", "/users/u-a"), ("GET", "/openapi.json")):
            assert (await console.ask(method, path)).status in (404, 405)
        assert (await console.ask("POST", "/keys/purge")).status == 200


async def test_token_of_a_reloaded_file_holds_at_once(edge: Edge, console: KeyClient, watch: Any) -> None:
    text = edge.config_path.read_text()
    edge.config_path.write_text(text.replace(TOKEN, "another-token-0123456789"))
    seen: Watch = watch(type(edge.server._reloader), "accept")
    edge.server.reload()
    await seen.called()
    assert (await console.ask("GET", "/keys")).status == 401
    console.token = "another-token-0123456789"
    assert (await console.ask("GET", "/keys")).status == 200


# --- what is refused


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "`user`"),
        ({"user": "../etc"}, "DNS label"),
        ({"user": "u-a", "nam": "x"}, "unknown field `nam`"),
        ({"user": 7}, "Expected `str`"),
        ({"user": "u-a", "name": "a\nb"}, "one line"),
        ({"user": "u-a", "allow": ["a b"]}, "pattern"),
        ({"user": "u-a", "limit": "none"}, "no limit of that name"),
        ({"user": "u-a", "share": 0}, ">= 1"),
        ({"user": "u-a", "expires_at": "tomorrow"}, "expires_at"),
        ({"user": "u-a", "expires_at": "2030-01-01T00:00:00"}, "expires_at"),
        ({"user": "u-a", "expires_at": "2020-01-01T00:00:00Z"}, "more than 0 s"),
    ],
)
async def test_body_that_no_key_can_be_made_of_is_refused_with_what_is_wrong(
    console: KeyClient, body: dict[str, Any], says: str
) -> None:
    refused = await console.ask("POST", "/keys", body)
    assert refused.status == 400
    assert says in refused.body["error"]["message"]
    assert (await console.ask("GET", "/keys?user=u-a")).body["data"] == []


async def test_what_cannot_be_done_is_told_by_its_status(console: KeyClient) -> None:
    made = await console.create()
    for method, path, body, status in (
        ("PATCH", f"/keys/{made['id']}", {}, 400),
        ("PATCH", f"/keys/{made['id']}", {"limit": "none"}, 400),
        ("PUT", "/users/u-a", {}, 400),
        ("PUT", "/users/A", {"suspended": True}, 400),
        ("PATCH", "/keys/key_000000000000", {"name": "x"}, 404),
        ("DELETE", "/keys/key_000000000000", None, 404),
        ("GET", "/keys/", None, 404),
        ("GET", "/keysx", None, 404),
        ("PUT", "/keys", {}, 405),
        ("POST", "/keys", {"user": "u-a", "name": "x" * 70_000}, 413),
    ):
        assert (await console.ask(method, path, body)).status == status, (method, path)
    allowed = (await console.ask("PUT", f"/keys/{made['id']}")).headers["Allow"]
    assert allowed == "GET, PATCH, DELETE, HEAD"


async def test_key_sent_in_the_place_of_an_id_is_neither_repeated_nor_logged(
    edge: Edge, console: KeyClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    made = await console.create()
    key = made["key"]
    assert (await console.ask("GET", "/keys")).status == 200
    for method in ("GET", "PATCH", "DELETE"):
        refused = await console.ask(method, f"/keys/{key}", {"name": "x"} if method == "PATCH" else None)
        assert refused.status == 404
        assert key not in json.dumps(refused.body)
    await console.ask("POST", f"/keys/{key}/rotate", {})
    await console.ask("PATCH", f"/keys/{made['id']}", {"name": key, "limit": 7})
    assert key not in caplog.text
    assert TOKEN not in caplog.text


async def test_store_that_cannot_be_written_is_a_503_and_the_log_says_why(
    edge: Edge, console: KeyClient, caplog: pytest.LogCaptureFixture
) -> None:
    copy = back_up(edge.keys_path)
    await console.create()
    edge.keys_path.unlink()
    refused = await console.ask("POST", "/keys", {"user": "u-a"})
    assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
    assert str(edge.keys_path) not in json.dumps(refused.body)
    assert "is missing or empty" in caplog.text
    assert not edge.keys_path.exists()
    copy.replace(edge.keys_path)
    made = await console.create()
    with KeyRegistry(edge.keys_path) as registry:
        assert made["id"] in [each.id for each in registry.list()]


async def test_store_of_another_server_is_read_only_and_says_so(
    start_edge: StartEdge, simulator: Simulator, unused_tcp_port: int
) -> None:
    edge = await start_edge(
        ROUTES.replace("{upstream}", simulator.url),
        server=f'admin_token = "{TOKEN}"\n',
        keys=f'store = "http://127.0.0.1:{unused_tcp_port}/introspect"',
    )
    async with KeyClient(edge.admin_url) as console:
        for method, path, body in (("POST", "/keys", {"user": "u-a"}), ("GET", "/keys", None)):
            refused = await console.ask(method, path, body)
            assert (refused.status, refused.body["error"]["code"]) == (501, "read_only_store")


# --- who changed what


async def test_operator_finds_who_changed_what_and_when(
    edge: Edge, console: KeyClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    made = (await console.ask("POST", "/keys", {"user": "u-a", "name": "ci"}, X_Actor="alice@console")).body
    await console.ask("DELETE", f"/keys/{made['id']}")
    with KeyRegistry(edge.keys_path) as registry:
        lines = [each for each in registry.audit() if each["user"] == "u-a"]
    assert [(each["action"], each["actor"], each["via"], each["address"], each["key_id"]) for each in lines] == [
        ("create", "alice@console", "api", "127.0.0.1", made["id"]),
        ("revoke", "admin token", "api", "127.0.0.1", made["id"]),
    ]
    assert f"revoke_key by admin token from 127.0.0.1: {made['id']} of u-a" in caplog.text
    assert (await console.ask("POST", "/keys", {"user": "u-a"}, X_Actor="a" * 129)).status == 400


# --- a day of a console


async def test_day_of_a_console_loses_no_key_and_lets_none_work_after_its_end(edge: Edge, console: KeyClient) -> None:
    """`python -m loadtest console` has ten thousand keys, and a second edge over the same store."""
    day = Console(console._session, edge.admin_url, TOKEN, [edge.url]).run(40, 8)
    done = await asyncio.wait_for(day, 60)
    assert done.faults == []
    assert len(done.made) == 60
    assert set(done.made.values()) == {"live", "revoked", "rotated"}


# --- the document


def test_document_is_one_whose_schemas_and_references_hold(console: KeyClient) -> None:
    """OpenAPI 3.1 takes JSON Schema 2020-12 as it is; every real answer of this file is held against it."""
    document = console.document
    assert document["openapi"].startswith("3.1.")
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    text = json.dumps(document)
    referred = {each.split('"')[0] for each in text.split("#/components/schemas/")[1:]}
    assert referred <= set(document["components"]["schemas"])
    operations = [each for methods in document["paths"].values() for each in methods.values()]
    names = [each["operationId"] for each in operations]
    assert len(names) == len(set(names))
    for template, methods in document["paths"].items():
        for each in methods.values():
            paths = {one["name"] for one in each["parameters"] if one["in"] == "path"}
            assert paths == ({"id"} if "{id}" in template else set())
