"""The edge over each key store, whole and broken: known keys go on, nobody else gets in, and news arrives."""

import asyncio
import json
import random
import re
import string
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest

from edge.keys.stores.protocol import hash_key
from edge.keys.stores.redis import EMPTY
from edge.keys.stores.registry import KeyRegistry
from edge.simulator.server import Simulator
from tests.behaviour.test_keys import status_of, until_status
from tests.conftest import ROUTES, USER, Edge, StartEdge
from tests.issuer import AUDIENCE, ISSUER, OTHER_RSA_KEY, Issuer, public_jwk, token
from tests.keybackends import HARMS, KINDS, PATIENCE_S, Backend, Facts, HttpBackend, RedisBackend, ValkeyServer, running

BODY = {"model": "public/deepseek-r1", "messages": []}
KEY = "sk-one-0123456789"
NEW = "sk-new-0123456789"


class Start:
    """Starts edges over a backend, in front of the simulator."""

    def __init__(self, start_edge: StartEdge, simulator: Simulator) -> None:
        self._start_edge = start_edge
        self._routes = ROUTES.replace("{upstream}", simulator.url)

    async def over(self, backend: Backend, keys: str = "", more: str = "") -> Edge:
        return await self._start_edge(f"{more}\n{self._routes}", keys=f"{backend.setting}\n{keys}")


@pytest.fixture
def start(start_edge: StartEdge, simulator: Simulator) -> Start:
    return Start(start_edge, simulator)


@pytest.mark.parametrize(("kind", "how"), HARMS)
async def test_broken_store_lets_known_keys_go_on_and_nobody_else_in(
    start: Start, simulator: Simulator, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, how: str
) -> None:
    """Unknown is 503, never 401: an SDK gives up on a 401. A stream that runs is untouched; a mended store is asked.

    The log says what is wrong, in one line, and in another that it is over.
    """
    async with running(kind, tmp_path) as backend:
        await backend.create(KEY, Facts("key_1", USER))
        # Believed for a moment only, so that nearly every request asks the store.
        edge = await start.over(backend, 'cache_ttl = "1ms"\nnegative_ttl = "1ms"\nstore_timeout = "200ms"')
        body: dict[str, Any] = {**BODY, "stream": True, "simulate": {"tokens": 80, "interval_ms": 10}, "seed": 1}
        status, _, expected = await edge.ask(body, key=KEY)
        assert status == 200
        client = await edge.connect()
        client.send(edge.request(body, key=KEY))
        await simulator.wait_for(lambda: len(simulator.requests) == 2)
        await backend.create(NEW, Facts("key_2", "u-2200b"))
        await backend.harm(how)
        async with asyncio.timeout(PATIENCE_S):
            while not edge.server.authenticator.outage.reason:
                assert await status_of(edge, KEY) == 200
        for key in (NEW, "sk-never-heard-of"):
            for _ in range(3):
                status, headers, answer = await edge.ask(BODY, key=key)
                if status == 401:  # a store that answers for some keys may say no to one that nobody has
                    assert (key, kind, how) in {("sk-never-heard-of", "redis", h) for h in ("rubbish", "wrong type")}
                    continue
                assert (status, json.loads(answer)["error"]["code"]) == (503, "key_store_unavailable")
                assert int(headers["retry-after"]) >= 1
        assert await status_of(edge, KEY) == 200
        status, _, received = await client.response()
        assert (status, received) == (200, expected)
        assert edge.server.readiness.ready
        await backend.mend()
        await until_status(edge, 200, (503,), NEW)
        assert await status_of(edge, KEY) == 200
        await until_status(edge, 401, (503,), "sk-never-heard-of")
        await edge.consistent()
        async with asyncio.timeout(PATIENCE_S):
            while edge.server.authenticator.outage.reason:
                await asyncio.sleep(0.01)
    lines = [record for record in caplog.records if record.name == "edge.keys.authenticator"]
    assert [record.levelname for record in lines] == ["ERROR", "WARNING"]
    assert re.search(backend.harms[how], lines[0].getMessage())


async def test_store_of_a_first_start_refuses_unknown_keys_and_takes_the_first_key_at_once(
    start_edge: StartEdge, simulator: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    """A new edge in an empty folder is no outage."""
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), keys='store = "sqlite:new.db"')
    assert await status_of(edge, KEY) == 401
    with KeyRegistry(edge.keys_path.with_name("new.db")) as registry:
        key, _ = registry.create(USER)
    assert [await status_of(edge, each) for each in (key, KEY)] == [200, 401]
    [told] = [record.getMessage() for record in caplog.records if record.name.startswith("edge.keys")]
    assert "`edge keys create`" in told


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("sqlite", "revoked"),
        ("redis", "revoked"),
        ("redis", "disabled"),
        ("sqlite", "suspended"),
        ("redis", "out of quota"),
    ],
)
async def test_change_reaches_every_process(start: Start, tmp_path: Path, kind: str, change: str) -> None:
    """Of a key that every process would believe for an hour."""
    async with running(kind, tmp_path) as backend:
        facts = await backend.create(KEY, Facts("key_1", USER))
        edges = [await start.over(backend, 'cache_ttl = "1h"') for _ in range(2)]
        for edge in edges:
            await until_status(edge, 200, (), KEY)
        match change:
            case "revoked":
                await backend.revoke(facts)
            case "disabled":
                await backend.disable(facts)
            case "suspended":
                await backend.mark_user(USER, suspended=True)
            case _:
                await backend.mark_user(USER, out_of_quota=True)
        for edge in edges:
            await until_status(edge, 402 if change == "out of quota" else 401, (200,), KEY)


async def purge(edge: Edge, query: str = "") -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.post(f"{edge.admin_url}/keys/purge{query}") as response:
        return response.status, (await response.json() if response.status == 200 else await response.text())


@pytest.mark.parametrize("query", ["?id=key_1", f"?user={USER}", ""])
async def test_purge_at_one_process_reaches_all_that_share_a_redis(
    start: Start, tmp_path: Path, valkey: ValkeyServer, query: str
) -> None:
    """For a store that tells nobody of a revocation."""
    async with running("http", tmp_path) as backend:
        facts = await backend.create(KEY, Facts("key_1", USER))
        shared = f'[shared]\nredis = "{valkey.url}"'
        edges = [await start.over(backend, 'cache_ttl = "1h"', shared) for _ in range(2)]
        async with asyncio.timeout(PATIENCE_S):
            for edge in edges:  # that they subscribed is a reason to doubt what they know
                while b"shared redis: ok" not in await admin(edge, "/readyz?verbose"):
                    await asyncio.sleep(0.01)
        for edge in edges:
            assert await status_of(edge, KEY) == 200
        await backend.revoke(facts)
        assert [await status_of(edge, KEY) for edge in edges] == [200, 200], "nobody was told yet"
        assert await purge(edges[0], query) == (200, {"forgotten": 1, "processes": 2})
        for edge in edges:
            await until_status(edge, 401, (200,), KEY)


async def test_purge_of_what_is_not_understood_forgets_nothing(start: Start, tmp_path: Path) -> None:
    async with running("http", tmp_path) as backend:
        await backend.create(KEY, Facts("key_1", USER))
        edge = await start.over(backend)
        assert await status_of(edge, KEY) == 200
        assert isinstance(backend, HttpBackend)
        for query in ("?key=key_1", "?id=", "?user=&id=key_1"):
            status, text = await purge(edge, query)
            assert status == 400
            assert "?id=" in text
        async with aiohttp.ClientSession() as session, session.get(f"{edge.admin_url}/keys/purge") as response:
            assert response.status == 405
        assert await status_of(edge, KEY) == 200
        assert len(backend.asked) == 1
        assert await purge(edge, "?id=key_of_nobody") == (200, {"forgotten": 0})


async def test_shared_redis_that_is_gone_keeps_nobody_out_and_a_purge_says_so(
    start: Start, tmp_path: Path, valkey: ValkeyServer
) -> None:
    async with running("http", tmp_path) as backend:
        await backend.create(KEY, Facts("key_1", USER))
        edge = await start.over(backend, "", f'[shared]\nredis = "{valkey.url}"')
        assert await status_of(edge, KEY) == 200
        valkey.stop()
        assert await status_of(edge, KEY) == 200
        status, done = await purge(edge)
        assert (status, done["forgotten"]) == (200, 1)
        assert "could not be told" in done["problem"]
        assert await status_of(edge, KEY) == 200


async def test_thousand_requests_with_one_cold_key_are_one_look_up(start: Start, tmp_path: Path) -> None:
    async with running("http", tmp_path) as backend:
        assert isinstance(backend, HttpBackend)
        await backend.create(KEY, Facts("key_1", USER))
        edge = await start.over(backend)
        await backend.harm("slow")
        clients = await asyncio.gather(*(edge.connect() for _ in range(1000)))
        for client in clients:
            client.send(edge.request(BODY, key=KEY))
        async with asyncio.timeout(PATIENCE_S):
            while edge.server.proxy.in_flight < 1000 or not backend.asked:
                await asyncio.sleep(0.01)
        await backend.mend()
        answers = await asyncio.gather(*(client.response() for client in clients))
        assert {status for status, _, _ in answers} == {200}
        assert backend.asked == [KEY]


# --- tokens


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    running_issuer = await Issuer().start()
    yield running_issuer
    await running_issuer.close()


def jwt_table(issuer: Issuer, more: str = "") -> str:
    algorithms = 'algorithms = ["RS256", "ES256", "EdDSA"]'
    return f'[jwt]\nissuer = "{ISSUER}"\naudience = "{AUDIENCE}"\njwks = "{issuer.url}"\n{algorithms}\n{more}'


async def test_redis_that_comes_back_empty_refuses_no_good_request(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is down, in one line that says what to do. With its mark it is a store that does not know the key."""
    async with running("redis", tmp_path) as backend:
        assert isinstance(backend, RedisBackend)
        await backend.create(KEY, Facts("key_1", USER))
        edge = await start.over(backend, 'cache_ttl = "1ms"\nnegative_ttl = "1ms"')
        assert [await status_of(edge, each) for each in (KEY, NEW)] == [200, 401]
        with backend.server.client() as client:
            client.flushall()
        assert {await status_of(edge, KEY) for _ in range(50)} == {200}
        assert {await status_of(edge, NEW) for _ in range(5)} == {503}
        assert edge.server.authenticator.outage.reason == EMPTY
        told = [each.getMessage() for each in caplog.records if "key store" in each.getMessage()]
        assert told == [f"key store is unavailable: {EMPTY}"]
        backend.mark()
        await until_status(edge, 401, (200,), KEY)
        assert [each.getMessage() for each in caplog.records if "answers again" in each.getMessage()] != []


@pytest.mark.parametrize("kind", KINDS)
async def test_token_calls_what_its_user_may_and_keys_go_on_beside_it(
    start: Start, issuer: Issuer, tmp_path: Path, kind: str
) -> None:
    async with running(kind, tmp_path) as backend:
        await backend.create(KEY, Facts("key_1", USER))
        edge = await start.over(backend, more=jwt_table(issuer))
        for kid in ("rsa", "ec", "ed"):
            assert await status_of(edge, token(kid)) == 200
        assert await status_of(edge, KEY) == 200
        for model, status in ((f"{USER}/qwen2", 200), ("u-2200b/qwen2", 404)):
            assert (await edge.ask({**BODY, "model": model}, key=token()))[0] == status
        assert await status_of(edge, token(sub="u-x", iss="https://other.example/")) == 401
        assert (await edge.log())[0]["user"] == USER


async def test_tokens_need_no_key_file(start_edge: StartEdge, simulator: Simulator, issuer: Issuer) -> None:
    """Who has no keys names no store, and has none."""
    routes = f"{jwt_table(issuer)}\n{ROUTES.replace('{upstream}', simulator.url)}"
    edge = await start_edge(routes, keys='store = "sqlite:new.db"')
    assert await status_of(edge, token()) == 200
    for bad in (token(key=OTHER_RSA_KEY), token(exp=int(time.time()) - 3600), KEY):
        assert await status_of(edge, bad) == 401
    assert not edge.server.authenticator.outage


async def test_token_is_proved_once_and_expires_while_it_is_cached(
    start: Start, issuer: Issuer, tmp_path: Path
) -> None:
    async with running("sqlite", tmp_path) as backend:
        edge = await start.over(backend, more=jwt_table(issuer, 'leeway = "0s"'))
        given = token(exp=time.time() + 1.5)
        assert [await status_of(edge, given) for _ in range(3)] == [200] * 3
        assert edge.server.authenticator.counts.misses == 1
        await until_status(edge, 401, (200,), given)
        answer = (await edge.ask(BODY, key=given))[2]
        assert json.loads(answer)["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
async def test_suspended_user_does_not_get_in_with_a_token_either(
    start: Start, issuer: Issuer, tmp_path: Path, kind: str
) -> None:
    async with running(kind, tmp_path) as backend:
        edge = await start.over(backend, more=jwt_table(issuer))
        given = token()
        await until_status(edge, 200, (), given)
        await backend.mark_user(USER, suspended=True)
        await until_status(edge, 401, (200,), given)
        await backend.mark_user(USER, out_of_quota=True)
        await until_status(edge, 402, (401,), given)
        await backend.mark_user(USER)
        await until_status(edge, 200, (402,), given)


async def test_token_needs_no_introspection_server(
    start: Start, issuer: Issuer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """There is nothing to ask of it: while it is dead tokens get in, and the log does not say that it is back."""
    async with running("http", tmp_path) as backend:
        edge = await start.over(backend, more=jwt_table(issuer))
        await backend.harm("dead")
        for number in range(6):
            assert await status_of(edge, f"sk-unknown-{number}") == 503
            assert await status_of(edge, token(iat=int(time.time()) - number)) == 200
        assert [record.levelname for record in caplog.records if record.name == "edge.keys.authenticator"] == ["ERROR"]


async def test_withdrawn_key_of_the_issuer_ends_its_tokens(start: Start, issuer: Issuer, tmp_path: Path) -> None:
    """Also those that were proved with it and would be believed until they expire."""
    async with running("sqlite", tmp_path) as backend:
        edge = await start.over(backend, more=jwt_table(issuer, 'jwks_ttl = "100ms"'))
        given = token("ec")
        assert await status_of(edge, given) == 200
        issuer.keys = [public_jwk(OTHER_RSA_KEY, "RS256", "new")]
        # The next fetch is due after the least interval: it is what a reload asks for at once.
        edge.server.reload()
        await until_status(edge, 401, (200,), given)
        assert await status_of(edge, token("new", key=OTHER_RSA_KEY, algorithm="RS256")) == 200


async def test_issuer_that_is_down_at_the_start_keeps_no_key_out(start: Start, tmp_path: Path) -> None:
    issuer = Issuer()
    issuer.harm = "500"
    await issuer.start()
    try:
        async with running("sqlite", tmp_path) as backend:
            await backend.create(KEY, Facts("key_1", USER))
            edge = await start.over(backend, more=jwt_table(issuer))
            assert await status_of(edge, KEY) == 200
            assert await status_of(edge, token()) == 503
            assert b"edge_token_keys_up 0.0" in await admin(edge, "/metrics")
    finally:
        await issuer.close()


async def admin(edge: Edge, path: str) -> bytes:
    async with aiohttp.ClientSession() as session, session.get(edge.admin_url + path) as response:
        return await response.read()


# --- what must be seen nowhere


@pytest.mark.parametrize("kind", ["sqlite", "http", "redis"])
async def test_no_credential_is_shown_anywhere(
    start_edge: StartEdge, simulator: Simulator, issuer: Issuer, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str], kind: str,
) -> None:  # fmt: skip
    """Good ones, bad ones, malformed ones, in the wrong place; logs, metrics, pages, errors and files are searched."""
    caplog.set_level("DEBUG")
    draw = random.Random(7)
    secrets: dict[str, str] = {}

    def secret(name: str, length: int = 40) -> str:
        secrets[name] = "sk-" + "".join(draw.choices(string.ascii_letters + string.digits, k=length))
        return secrets[name]

    upstream_key, store_token = secret("upstream key"), HttpBackend.token
    endpoint = '[{ url = "{upstream}", api_key = "UPSTREAM_KEY" }]'.replace("UPSTREAM_KEY", upstream_key)
    routes = ROUTES.replace('["{upstream}"]', endpoint)
    apart = tmp_path / "store"  # whose files hold digests, as they must
    apart.mkdir()
    async with running(kind, apart) as backend:
        edge = await start_edge(
            jwt_table(issuer) + routes.replace("{upstream}", simulator.url),
            keys=f'{backend.setting}\ncache_ttl = "1ms"\nnegative_ttl = "1ms"\nstore_timeout = "100ms"',
        )
        good = secret("good key")
        await backend.create(good, Facts("key_1", USER))
        secrets["token"], secrets["forged"] = token(), token("rsa", key=OTHER_RSA_KEY)
        secrets["expired"] = token(exp=int(time.time()) - 3600)
        bodies: list[bytes] = []
        pages: list[bytes] = []

        async def send(raw: bytes) -> None:
            client = await edge.connect()
            client.send(raw)
            bodies.append(await client.rest())

        close = ("Connection: close",)
        for key in (
            good,
            secret("bad key"),
            secret("malformed", 600),
            *(secrets[n] for n in ("token", "forged", "expired")),
        ):
            await send(edge.request(BODY, key=key, headers=close))
            await send(edge.request(b"{", key=key, headers=close))
            await send(edge.request({"model": f"public/{secret('in the model')}"}, key=key, headers=close))
        await send(edge.request(BODY, path=f"/v1/{secret('in the path')}", headers=close).replace(b"sk-", b"xx-"))
        await send(edge.request(BODY, path=f"/v1/models?key={secret('in the query')}", method="GET", headers=close))
        for lines in (
            f"Host: x\r\nAuthorization: Bearer {secret('header with NUL')}\x00",
            f"Host: x\r\nAuthorization Bearer {secret('no colon')}",
            f"Host: x\r\napi-key: {secret('first')}\r\nx-api-key: {secret('second')}",
            f"Host: {secret('as the host')}\r\nauthorization: Basic {secret('basic')}",
        ):
            await send(f"GET /v1/models HTTP/1.1\r\n{lines}\r\nConnection: close\r\n\r\n".encode())
        await send(f"POST {secret('as the target')} HTTP/9.9\r\nConnection: close\r\n\r\n".encode())
        for how in backend.harms:
            await backend.harm(how)
            counts = edge.server.authenticator.counts
            enough = counts.failures + 9
            async with asyncio.timeout(PATIENCE_S):
                # Until its reason was logged; a store that stumbles on one key alone is not down.
                while not edge.server.authenticator.outage.reason and counts.failures < enough:
                    await send(edge.request(BODY, key=good, headers=close))
                    await send(edge.request(BODY, key=secret(f"while {how}"), headers=close))
                    pages.append(await admin(edge, "/readyz?verbose"))
                await backend.mend()
                while edge.server.authenticator.outage.reason:
                    await send(edge.request(BODY, key=good, headers=close))
        edge.config_path.write_text(edge.config_path.read_text() + f'\n[nonsense]\nkey = "{secret("in a bad file")}"\n')
        edge.server.reload()
        async with asyncio.timeout(PATIENCE_S):
            while not edge.server.readiness.reload_failed:
                await asyncio.sleep(0.01)
        pages += [await admin(edge, path) for path in ("/metrics", "/readyz?verbose", "/livez", "/nothing")]
        await purge(edge, "?id=key_1")
        log = await edge.log()
        await edge.stop()

    text = b"\n".join((*bodies, *pages)).decode("utf-8", "replace") + json.dumps(log)
    text += caplog.text + "".join(capfd.readouterr())
    directory = edge.config_path.parent
    files = [path for path in directory.rglob("*") if path.is_file() and path != edge.config_path]
    content = b"\n".join(path.read_bytes() for path in files)
    text += content.decode("utf-8", "replace")
    text = text.replace("\\\\", "\\")  # as JSON and metrics write a backslash
    # What a client wrote where names and paths stand comes back to that client, and stands in the log as such.
    public = ("in the model", "in the path", "as the target", "as the host", "in the query")
    for name, value in secrets.items():
        if name not in public:
            assert value not in text, name
            assert value[3:25] not in text, f"a part of {name}"
            assert hash_key(value).hex() not in text, f"the digest of {name}"
            assert repr(hash_key(value))[2:-1] not in text, f"the digest of {name}"
            assert hash_key(value) not in content, f"the digest of {name}"
    assert secrets["in the query"] not in text
    assert store_token not in text
    for signature in (secrets[name].split(".")[2] for name in ("token", "forged", "expired")):
        assert signature not in text
    assert jwt.decode(secrets["token"], options={"verify_signature": False})["sub"] == USER
