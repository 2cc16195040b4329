"""What servers say of their models, read from lists of every kind and from servers that say anything else."""

import asyncio
import gc
import gzip
import itertools
import json
import logging
import re
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from edge.config.settings import EndpointConfig, PoolConfig, RouteConfig
from edge.config.values import Url, parse_dns, parse_url
from edge.routing import Match
from edge.tasks import in_steps
from edge.upstream import catalogue as module
from edge.upstream.catalogue import Catalogue, NotListed, lengths_of
from edge.upstream.endpoints import Endpoints, Lease
from edge.upstream.pools import Pool
from tests.profiles import examples

MODEL = "deepseek-ai/DeepSeek-R1"


def document(*entries: Any) -> bytes:
    return json.dumps({"object": "list", "data": entries}).encode()


def ok(body: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *headers, b"", body])


LISTED = ok(document({"id": MODEL, "object": "model", "max_model_len": 163840}))
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"


# --- what is read


@pytest.mark.parametrize(
    ("entry", "length"),
    [
        ({"id": MODEL, "owned_by": "vllm", "root": "/models/r1", "parent": None, "max_model_len": 163840}, 163840),
        ({"id": MODEL, "owned_by": "sglang", "root": MODEL, "max_model_len": 4096}, 4096),
        ({"id": MODEL, "context_length": 128000, "top_provider": {"context_length": 64000}}, 128000),
        ({"id": MODEL, "owned_by": "Groq", "active": True, "context_window": 131072}, 131072),
        ({"id": MODEL, "meta": {"n_vocab": 151936, "n_ctx": 8192, "n_ctx_train": 32768}}, 8192),
        ({"id": MODEL, "owned_by": "llamacpp", "meta": {"vocab_type": 2, "n_ctx_train": 32768}}, 32768),
        ({"id": MODEL, "meta": {"n_ctx": 0, "n_ctx_train": 32768}}, 32768),
        ({"id": MODEL, "max_model_len": None, "context_length": 0, "context_window": 7}, 7),
        ({"id": MODEL, "max_model_len": 1, "context_length": 2}, 1),
        ({"id": MODEL, "owned_by": "openai"}, None),
        ({"id": MODEL, "meta": None}, None),
        ({"id": MODEL, "meta": [1]}, None),
    ],
)
def test_the_length_is_read_as_each_server_names_it(entry: dict[str, Any], length: int | None) -> None:
    assert lengths_of(document({"id": "other", "context_length": 1}, entry)).by_id.get(MODEL) == length
    assert lengths_of(document(entry)).only == length


@pytest.mark.parametrize("value", [True, -1, 0, 1.5, 8e3, "8192", [8192], {"a": 1}, None, 2**53, 10**40, -(10**40)])
def test_what_is_no_number_of_tokens_is_not_known(value: object) -> None:
    assert lengths_of(document({"id": MODEL, "max_model_len": value})) == ({}, None)


def test_of_several_models_only_those_that_are_named_are_known() -> None:
    lengths = lengths_of(document({"id": "a", "max_model_len": 1}, {"id": "b", "max_model_len": 2}, {"id": "c"}))
    assert lengths == ({"a": 1, "b": 2}, None)


def test_entries_that_are_none_take_nothing_from_the_others() -> None:
    lengths = lengths_of(document(None, 7, "a", [], {}, {"id": 7, "max_model_len": 1}, {"id": "b", "max_model_len": 2}))
    assert lengths == ({"b": 2}, None)


@pytest.mark.parametrize(
    "body", [b"", b"[", b"[" * 10**6, b"\xff", b"null", b"[]", b'"data"', b'{"data":{}}', b'{"data":null}', b"{}"]
)
def test_what_is_no_list_of_models_says_so(body: bytes) -> None:
    with pytest.raises(NotListed, match="what its server answers is no"):
        lengths_of(body)


_json: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["data", "id", "meta", "max_model_len", "n_ctx", "context_length"]), inner)
    ),
    max_leaves=20,
)


@examples(60)
@given(
    st.binary(max_size=99)
    | _json.map(lambda value: json.dumps(value).encode())
    | st.lists(_json).map(lambda each: document(*each))
)
def test_no_document_makes_anything_else_than_lengths(body: bytes) -> None:
    try:
        lengths = lengths_of(body)
    except NotListed:
        return
    assert all(type(length) is int and length > 0 for length in (*lengths.by_id.values(), lengths.only or 1))


# --- who is asked


class Listing:
    """A server that answers each connection's request with exactly these bytes; None for no answer at all."""

    def __init__(self, *answers: bytes | None) -> None:
        self.answers: Iterator[bytes | None] = itertools.chain(answers, itertools.repeat(answers[-1]))
        self.asked: list[str] = []  # the heads
        self._writers: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self.asked.append((await reader.readuntil(b"\r\n\r\n")).decode())
        answer = next(self.answers)
        if answer is not None:
            writer.write(answer)
            writer.close()

    async def start(self, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1", port: int = 0) -> None:
        self._server = await asyncio.start_server(self.serve, host, port, ssl=tls)
        host, port = self._server.sockets[0].getsockname()
        self.url = f"{'http' if tls is None else 'https'}://{host}:{port}"

    def close(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()


StartListing = Callable[..., Any]


@pytest.fixture
async def listing() -> AsyncIterator[StartListing]:
    """Start servers of given answers."""
    with_ends = AsyncExitStack()

    async def start(*answers: bytes | None, **how: Any) -> Listing:
        made = Listing(*answers)
        await made.start(**how)
        with_ends.callback(made.close)
        return made

    async with with_ends:
        yield start


@pytest.fixture
async def endpoints() -> AsyncIterator[Endpoints]:
    made = Endpoints(asyncio.get_running_loop())
    yield made
    made.close()


class Clock:
    """The loop, at a time of the test's own."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def create_task(self, *args: Any, **more: Any) -> Any:
        return asyncio.get_running_loop().create_task(*args, **more)


@pytest.fixture
async def catalogue(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Catalogue]:
    monkeypatch.setattr(module, "_PATIENCE_S", 20.0)  # a busy machine is no slow server
    made = Catalogue()
    made._loop = Clock()  # type: ignore[assignment]
    yield made
    await made.close()


def pool_of(endpoints: Endpoints, *urls: str, name: str = "p", **more: Any) -> Pool:
    config = PoolConfig(name, tuple(EndpointConfig(parse_url(url)) for url in urls), **more)
    return Pool(config, [endpoints.member(each.url, config) for each in config.endpoints])


async def asked_after(catalogue: Catalogue, seconds: float, *names: str) -> None:
    """Somebody lists models so much later, and whoever is asked has answered."""
    catalogue._loop.now += seconds  # type: ignore[attr-defined]
    await catalogue.learn(names or ("p",))
    async with asyncio.timeout(20):
        while any(pool.asking is not None for pool in catalogue._pools.values()):
            await asyncio.sleep(0)


async def test_nobody_is_asked_until_models_are_listed_and_then_as_requests_are(
    endpoints: Endpoints, catalogue: Catalogue, listing: StartListing
) -> None:
    server = await listing(LISTED)
    url = parse_url(f"{server.url}/api/v3")
    config = PoolConfig("p", (EndpointConfig(url, api_key="sk-123"),))
    await in_steps(catalogue.apply([Pool(config, [endpoints.member(url, config)])]))
    assert catalogue.context_length("p", MODEL) is None
    assert server.asked == []
    await catalogue.learn(["p"])
    assert catalogue.context_length("p", MODEL) == 163840
    assert catalogue.context_length("p", "as asked") == 163840  # it has no other
    assert catalogue.context_length("q", MODEL) is None
    request, *headers = server.asked[0].strip().split("\r\n")
    assert request == "GET /api/v3/models HTTP/1.1"
    assert {f"Host: {url.authority}", "Authorization: Bearer sk-123", "Accept-Encoding: identity"} <= set(headers)


async def test_context_of_a_model_is_that_of_its_route_or_of_its_pools_server(
    endpoints: Endpoints, catalogue: Catalogue, listing: StartListing
) -> None:
    server = await listing(LISTED)
    url = parse_url(server.url)
    config = PoolConfig("p", (EndpointConfig(url),))
    await in_steps(catalogue.apply([Pool(config, [endpoints.member(url, config)])]))
    named, said, asked, other = (
        Match(RouteConfig("public/r1", "public/r1", pool="p", **each), "", "")
        for each in ({"model": MODEL}, {"model": MODEL, "context_length": 99}, {}, {"model": "x"})
    )
    instance = Match(RouteConfig("u-*", "u-*", instance="http://{service}"), "", "")
    matches = (named, said, asked, other, instance)
    assert [catalogue.context_length_of(MODEL, each) for each in matches] == [None, 99, None, None, None]
    await catalogue.learn(["p"])
    assert [catalogue.context_length_of(MODEL, each) for each in matches] == [163840, 99, 163840, 163840, None]


async def test_api_that_is_at_the_root_lists_its_models_there(
    endpoints: Endpoints, catalogue: Catalogue, listing: StartListing
) -> None:
    server = await listing(LISTED)
    await in_steps(catalogue.apply([pool_of(endpoints, f"{server.url}/")]))
    await catalogue.learn(["p"])
    assert server.asked[0].startswith("GET /models HTTP/1.1\r\n")


async def test_many_who_list_at_once_ask_once_and_again_after_five_minutes(
    endpoints: Endpoints, catalogue: Catalogue, listing: StartListing
) -> None:
    server = await listing(LISTED, ok(document({"id": MODEL, "max_model_len": 7})))
    await in_steps(catalogue.apply([pool_of(endpoints, server.url)]))
    await asyncio.gather(*(catalogue.learn(["p"]) for _ in range(9)))
    await asked_after(catalogue, 299)
    assert (len(server.asked), catalogue.context_length("p", MODEL)) == (1, 163840)
    await asked_after(catalogue, 1)
    assert (len(server.asked), catalogue.context_length("p", MODEL)) == (2, 7)


async def test_who_lists_waits_for_no_server_of_which_something_is_known_or_which_is_silent(
    endpoints: Endpoints, catalogue: Catalogue, listing: StartListing, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, silent = await listing(LISTED, None), await listing(None)
    await in_steps(catalogue.apply([pool_of(endpoints, known.url), pool_of(endpoints, silent.url, name="q")]))
    await asked_after(catalogue, 0)
    catalogue._loop.now += 300  # type: ignore[attr-defined]
    await catalogue.learn(["p"])  # its second answer never comes
    assert catalogue.context_length("p", MODEL) == 163840
    monkeypatch.setattr(module, "_PATIENCE_S", 0.01)
    await catalogue.learn(["q"])
    assert catalogue.context_length("q", MODEL) is None


async def test_server_without_a_list_is_no_news(
    endpoints: Endpoints, catalogue: Catalogue, listing: StartListing, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = await listing(NOT_FOUND)
    await in_steps(catalogue.apply([pool_of(endpoints, server.url)]))
    for _ in range(3):
        await asked_after(catalogue, 300)
    assert (len(server.asked), caplog.records) == (3, [])
    assert server.asked[0].startswith("GET /v1/models HTTP/1.1\r\n")


async def test_next_member_is_asked_after_one_that_fails_and_none_that_is_out(
    endpoints: Endpoints, catalogue: Catalogue, listing: StartListing
) -> None:
    good, bad, out = await listing(LISTED), await listing(UNAVAILABLE), await listing(LISTED)
    pool = pool_of(endpoints, good.url, bad.url, out.url)
    for _ in range(2):
        pool.members[2].endpoint.health.probed(healthy=False, now=0.0)
    await in_steps(catalogue.apply([pool]))
    with Lease(pool.members[0]):  # so that the other one is asked first
        await asked_after(catalogue, 0)
        assert (len(good.asked), len(bad.asked)) == (0, 1)
        await asked_after(catalogue, 5)
    assert (len(good.asked), len(bad.asked), len(out.asked)) == (1, 1, 0)
    assert catalogue.context_length("p", MODEL) == 163840


@pytest.mark.parametrize(("engine", "asked"), [("vllm", 1), ("llamacpp", 0)])
async def test_engine_that_would_interrupt_an_answer_is_asked_while_it_is_idle(
    endpoints: Endpoints, catalogue: Catalogue, listing: StartListing, engine: Any, asked: int
) -> None:
    server = await listing(LISTED)
    pool = pool_of(endpoints, server.url, engine=engine)
    await in_steps(catalogue.apply([pool]))
    with Lease(pool.members[0]):
        await asked_after(catalogue, 0)
        assert len(server.asked) == asked
    await asked_after(catalogue, 5)
    assert len(server.asked) == 1
    assert catalogue.context_length("p", MODEL) == 163840


async def test_failure_is_followed_sooner_and_ever_later_and_what_was_known_goes_on(
    endpoints: Endpoints, catalogue: Catalogue, listing: StartListing
) -> None:
    server = await listing(LISTED, *[UNAVAILABLE] * 7, ok(document({"id": MODEL})))
    await in_steps(catalogue.apply([pool_of(endpoints, server.url)]))
    await asked_after(catalogue, 0)
    for count, pause_s in enumerate((300, 5, 10, 20, 40, 80, 160), start=1):
        await asked_after(catalogue, pause_s - 1)
        assert len(server.asked) == count
        await asked_after(catalogue, 1)
        assert len(server.asked) == count + 1
        assert catalogue.context_length("p", MODEL) == 163840
    await asked_after(catalogue, 300)
    assert catalogue.context_length("p", MODEL) is None


# --- reloads and members that come and go


async def test_a_reload_asks_what_changed_and_forgets_what_is_gone(
    endpoints: Endpoints, catalogue: Catalogue, listing: StartListing
) -> None:
    first, second = await listing(LISTED), await listing(LISTED)
    await in_steps(catalogue.apply([pool_of(endpoints, first.url, name="p"), pool_of(endpoints, second.url, name="q")]))
    await asked_after(catalogue, 0, "p", "q")
    await in_steps(
        catalogue.apply([pool_of(endpoints, first.url, name="p"), pool_of(endpoints, second.url, name="q", queue=7)])
    )
    assert catalogue.context_length("p", MODEL) == 163840
    assert catalogue.context_length("q", MODEL) is None
    await asked_after(catalogue, 0, "p", "q")
    assert catalogue.context_length("q", MODEL) == 163840
    await in_steps(catalogue.apply([pool_of(endpoints, first.url, name="p")]))
    assert catalogue.context_length("q", MODEL) is None
    assert (len(first.asked), len(second.asked)) == (1, 2)
    await in_steps(catalogue.apply([]))
    assert catalogue.context_length("p", MODEL) is None


async def test_a_question_to_a_pool_that_goes_is_given_up(
    endpoints: Endpoints, catalogue: Catalogue, listing: StartListing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.01)
    server = await listing(None)
    await in_steps(catalogue.apply([pool_of(endpoints, server.url)]))
    await catalogue.learn(["p"])
    asking = catalogue._pools["p"].asking
    assert asking is not None
    await in_steps(catalogue.apply([]))
    await asyncio.wait((asking,), timeout=20)
    assert asking.cancelled()


async def test_members_by_dns_are_asked_as_they_are_at_that_time(
    endpoints: Endpoints, catalogue: Catalogue, listing: StartListing
) -> None:
    first = await listing(UNAVAILABLE)
    port = int(first.url.rpartition(":")[2])
    second = await listing(LISTED, host="127.0.0.2", port=port)
    config = PoolConfig("p", dns=parse_dns(f"vllm.pool.svc:{port}"))
    pool = Pool(config, [])
    await in_steps(catalogue.apply([pool]))
    await asked_after(catalogue, 0)  # nobody is there to be asked
    pool.replace([endpoints.member(Url("http", "127.0.0.1", port), config)])
    await asked_after(catalogue, 300)
    assert len(first.asked) == 1
    pool.replace([endpoints.member(Url("http", "127.0.0.2", port), config)])
    await asked_after(catalogue, 300)
    assert catalogue.context_length("p", MODEL) == 163840
    assert second.asked[0].startswith("GET /v1/models HTTP/1.1\r\n")
    assert f"Host: vllm.pool.svc:{port}\r\n" in second.asked[0]


async def test_a_server_is_proved_by_the_authority_of_its_pool(
    endpoints: Endpoints, catalogue: Catalogue, listing: StartListing, tmp_path: Path
) -> None:
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    server = await listing(LISTED, tls=context)
    await in_steps(catalogue.apply([pool_of(endpoints, server.url)]))
    await asked_after(catalogue, 0)
    assert not server.asked
    await in_steps(catalogue.apply([pool_of(endpoints, server.url, ca_file=tmp_path / "ca.crt")]))
    await asked_after(catalogue, 0)
    assert catalogue.context_length("p", MODEL) == 163840


# --- what servers may send


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CLIENT: str = r"[A-Z]\w+Error"  # whatever the client makes of it
HOSTILE: dict[str, tuple[bytes | None, str]] = {
    "nothing": (b"", CLIENT),
    "silence": (None, CLIENT),
    "no HTTP": (b"\x16\x03\x01 this is no HTTP\r\n\r\n", CLIENT),
    "half a head": (b"HTTP/1.1 200 OK\r\nContent-Le", CLIENT),
    "half a body": (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", CLIENT),
    "a bad chunk": (CHUNKED + b"zz\r\n{}\r\n", CLIENT),
    "a long head": (b"HTTP/1.1 200 OK\r\n" + b"X: %b\r\n" % (b"x" * 9000) * 9, CLIENT),
    "too long": (ok(b" " * (2**20 + 1)), "/v1/models answers more than 1 MiB"),
    "too long in chunks": (CHUNKED + b"10000\r\n%b\r\n" % (b" " * 2**16) * 20, "/v1/models answers more than 1 MiB"),
    "compressed": (ok(gzip.compress(b" " * 2**24), b"Content-Encoding: gzip"), "what its server answers is no JSON"),
    "a page": (ok(b"<html>models</html>", b"Content-Type: text/html"), "what its server answers is no JSON"),
    "deep": (ok(b'{"data":' * 10**5), "what its server answers is no JSON"),
    "another list": (ok(b'{"models":[]}'), "what its server answers is no list of models"),
    "cookies": (ok(b"{}", b"Set-Cookie: \xff=;;=; Path=%%%", b"Set-Cookie: a=b; Max-Age=x"), ".* no list of models"),
    "an error": (UNAVAILABLE, "/v1/models answers 503"),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", "/v1/models answers 204"),
}


@pytest.mark.parametrize("kind", HOSTILE)
async def test_nothing_that_a_server_sends_ends_it_or_is_logged_twice(
    kind: str,
    endpoints: Endpoints,
    catalogue: Catalogue,
    listing: StartListing,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    answer, reason = HOSTILE[kind]
    if answer is None:
        monkeypatch.setattr(module, "_TIMEOUT_S", 0.1)
    server = await listing(answer, answer, answer, LISTED)
    await in_steps(catalogue.apply([pool_of(endpoints, server.url)]))
    for _ in range(4):
        await asked_after(catalogue, 300)
    assert catalogue.context_length("p", MODEL) == 163840
    gc.collect()  # what nobody asked for is logged when it is collected
    lost, back = caplog.records
    assert (lost.levelno, back.levelno) == (logging.INFO, logging.INFO)
    words, _, why = lost.getMessage().partition(": ")
    assert words == "pool p does not list its models"
    assert re.fullmatch(reason, why)
    assert back.getMessage() == "pool p lists its models again"


async def test_of_thousands_of_pools_a_hundred_are_asked_at_once(endpoints: Endpoints, catalogue: Catalogue) -> None:
    """One list of models set off a connection to every model server there is."""
    asked = asyncio.Event()

    async def ask(member: object) -> bytes:
        await asked.wait()
        return b'{"data":[]}'

    catalogue._ask = ask  # type: ignore[method-assign]
    await in_steps(catalogue.apply([pool_of(endpoints, "http://10.0.0.1", name=f"p{number}") for number in range(150)]))
    names = [f"p{number}" for number in range(150)]
    async with asyncio.TaskGroup() as learning:
        learning.create_task(catalogue.learn(names))
        await asyncio.sleep(0)
        assert sum(pool.asking is not None for pool in catalogue._pools.values()) == 100
        asked.set()
    await catalogue.learn(names)
    assert [name for name in names if catalogue._pools[name].lengths is None] == []
