"""What an introspection server may answer, and what each answer means; the rest is in `test_stores.py`."""

import asyncio
import base64
import contextlib
import gzip
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.config.process_settings import KeysConfig
from edge.config.values import KeyStoreAddress
from edge.exchange import Principal
from edge.keys.stores.http import HttpKeyStore, read_answer
from edge.keys.stores.protocol import AnswerUnusable, StoreFailed, hash_key
from tests.keybackends import Facts, HttpBackend

USER = "u-1100a15812cc"
KEY = "sk-one-0123456789"
DIGEST = hash_key(KEY)


def test_reply_of_rfc_7662() -> None:
    answer = {"active": True, "sub": USER, "exp": 1763000000, "jti": "key_1", "scope": "x", "client_id": "c"}
    assert read_answer(answer, DIGEST) == Principal("key_1", USER, expires_at=1763000000.0)


def test_reply_of_the_platform() -> None:
    answer = {
        "is_valid": True, "api_key_id": "key_2", "user_id": USER, "allow_models": ["public/*"], "deny_models": ["**"],
    }  # fmt: skip
    assert read_answer(answer, DIGEST) == Principal("key_2", USER, allow=("public/*",), deny=("**",))


@pytest.mark.parametrize("answer", [{"active": False}, {"is_valid": False, "user_id": ""}])
def test_clear_no_is_an_unknown_key(answer: dict[str, Any]) -> None:
    assert read_answer(answer, DIGEST) is None


def test_key_without_an_id_gets_one_that_stays_and_tells_nothing_of_it() -> None:
    first, again = (read_answer({"active": True, "sub": USER}, DIGEST) for _ in range(2))
    assert first == again
    assert first is not None
    assert first.id.startswith("key_")
    assert first.id.removeprefix("key_") not in DIGEST.hex()


@pytest.mark.parametrize(
    "answer",
    [
        None, [], "true", 1, {}, {"active": "true"}, {"active": 1}, {"active": None}, {"is_valid": "no"},
        {"active": True}, {"active": True, "sub": ""}, {"active": True, "sub": 7}, {"active": True, "sub": "../x"},
        {"active": True, "sub": USER, "exp": "soon"}, {"active": True, "sub": USER, "exp": True},
        {"active": True, "sub": USER, "allow_models": "public/*"}, {"active": True, "sub": USER, "allow_models": [1]},
        {"active": True, "sub": USER, "deny_models": ["[a-z]"]}, {"active": True, "sub": USER, "suspended": 0},
        {"active": True, "is_valid": False, "sub": USER}, {"active": False, "is_valid": True, "sub": USER},
        {"active": True, "sub": USER, "jti": "a\nb"}, {"active": True, "sub": USER, "name": ["x"]},
    ],
)  # fmt: skip
def test_what_is_not_understood_is_no_answer(answer: object) -> None:
    """It is the server's fault, so nobody is let in, and nobody is told that their key is wrong."""
    with pytest.raises(ValueError, match=r"."):
        read_answer(answer, DIGEST)


NAMES = st.sampled_from(["active", "is_valid", "sub", "user_id", "exp", "jti"])
SCALARS = st.none() | st.booleans() | st.integers() | st.text()


@given(st.recursive(SCALARS, lambda each: st.lists(each) | st.dictionaries(NAMES, each)))
def test_any_json_is_a_record_a_no_or_a_value_error(answer: object) -> None:
    try:
        found = read_answer(answer, DIGEST)
    except ValueError:
        return
    assert found is None or found.user


async def test_server_sees_the_credential_that_is_configured_and_the_key_in_the_form() -> None:
    backend = HttpBackend()
    await backend.start()
    key = "sk-a+b/c=d&e%20"
    await backend.create(key, Facts("key_1", USER))
    store = backend.store()
    basic = HttpKeyStore(
        KeysConfig(KeyStoreAddress(url=backend.url), store_client_id="edge", store_client_secret="s3cret")
    )
    try:
        for each in (store, basic):
            await each.open()
            found = await each.look_up(hash_key(key), key)
            assert found is not None
        assert backend.asked == [key, key]
        assert backend.authorizations == {f"Bearer {HttpBackend.token}", "Basic ZWRnZTpzM2NyZXQ="}
    finally:
        await store.close()
        await basic.close()
        await backend.close()


async def test_answer_that_does_not_end_is_not_read_for_ever() -> None:
    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n")
        try:
            while True:
                writer.write(b" " * 65536)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(flood, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    store = HttpKeyStore(KeysConfig(KeyStoreAddress(url=f"http://127.0.0.1:{port}/introspect")))
    await store.open()
    try:
        with pytest.raises(AnswerUnusable):
            await store.look_up(DIGEST, "sk-one-0123456789")
    finally:
        await store.close()
        server.close()


async def test_client_id_and_secret_are_encoded_as_in_a_form() -> None:
    """RFC 6749 section 2.3.1: a colon in the id would else end it."""
    backend = HttpBackend()
    await backend.start()
    await backend.create(KEY, Facts("key_1", USER))
    address = KeyStoreAddress(url=backend.url)
    store = HttpKeyStore(KeysConfig(address, store_client_id="https://edge:1", store_client_secret="a b+c"))
    await store.open()
    try:
        assert await store.look_up(DIGEST, KEY) is not None
    finally:
        await store.close()
        await backend.close()
    [authorization] = backend.authorizations
    assert base64.b64decode(authorization.removeprefix("Basic ")) == b"https%3A%2F%2Fedge%3A1:a+b%2Bc"


ANSWER = b'HTTP/1.1 200 OK\r\nContent-Length: 41\r\n\r\n{"active": true, "sub": "u-1100a15812cc"}'


async def answering(answer: bytes, *, closes: Callable[[int], bool]) -> tuple[asyncio.Server, list[int]]:
    """A server that says the same each time, and closes without an answer where `closes` says so of a request."""
    requests: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(len("token=") + len(KEY))
                requests.append(len(requests))
                if closes(requests[-1]):
                    break
                writer.write(answer)
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0), requests


@contextlib.asynccontextmanager
async def asking(server: asyncio.Server) -> AsyncIterator[HttpKeyStore]:
    port = server.sockets[0].getsockname()[1]
    store = HttpKeyStore(KeysConfig(KeyStoreAddress(url=f"http://127.0.0.1:{port}/introspect")))
    await store.open()
    try:
        yield store
    finally:
        await store.close()
        server.close()


async def test_connection_that_the_server_had_closed_is_replaced_unseen() -> None:
    """A server closes idle connections; a look-up that crosses this must not become a 503."""
    server, requests = await answering(ANSWER, closes=lambda number: number == 1)
    async with asking(server) as store:
        assert await store.look_up(DIGEST, KEY) is not None
        assert await store.look_up(DIGEST, KEY) is not None
    assert requests == [0, 1, 2]


async def test_server_that_only_closes_is_asked_twice_and_no_more() -> None:
    server, requests = await answering(ANSWER, closes=lambda number: True)
    async with asking(server) as store:
        with pytest.raises(StoreFailed) as failed:
            await store.look_up(DIGEST, KEY)
    assert failed.value.reason == "ServerDisconnectedError"
    assert requests == [0, 1]


def answer(body: bytes, head: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n%s" % (head, len(body), body)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\n{}", "status 403"),
        (b"HTTP/1.1 206 Partial Content\r\nContent-Length: 17\r\n\r\n{\"active\": false}", "status 206"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://[\r\nContent-Length: 0\r\n\r\n", "status 302"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "status 101"),
        (answer(b"[" * 5000), "an answer that is no JSON"),
        (answer('{"active": false}'.encode("utf-16")), "an answer that is no JSON"),
        (answer(b'{"active": true, "sub": "u-1", "exp": 1%s}' % (b"0" * 400)), "an answer that is no JSON"),
        (answer(b""), "an answer that is no JSON"),
        (answer(b"<html><body>welcome</body></html>"), "an answer that is no JSON"),
        (answer(b'{"status": "ok"}'), 'an answer without one "active" or "is_valid", true or false'),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "status 204"),
        (answer(b"7"), "an answer that is no JSON object"),
        (answer(b" " * 70_000), "an answer of more than 64 KiB"),
        (answer(gzip.compress(b" " * 2**24), b"Content-Encoding: gzip\r\n"), "an answer of more than 64 KiB"),
        (answer(b"no gzip", b"Content-Encoding: gzip\r\n"), "ClientPayloadError"),
        (b"\xff\xfe rubbish\r\n\r\n", "ClientResponseError"),
        (b"HTTP/1.1 200 OK\r\nX: %s\r\n\r\n" % (b"x" * 100_000), "ClientResponseError"),
    ],
)  # fmt: skip
async def test_hostile_answer_is_a_failure_with_a_reason(said: bytes, reason: str) -> None:
    """Nothing of the answer is repeated: it may hold the key."""
    server, _ = await answering(said, closes=lambda number: False)
    async with asking(server) as store:
        with pytest.raises(StoreFailed) as failed:
            async with asyncio.timeout(20):
                await store.look_up(DIGEST, KEY)
    assert failed.value.reason == reason
