"""What an introspection server may answer, and what each answer means; the rest is in `test_keystores.py`."""

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.config import KeysConfig, KeyStoreAddress
from edge.errors import KeyStoreUnavailable
from edge.exchange import Principal
from edge.keys_http import HttpKeyStore, principal_of
from edge.keystores import hash_key
from tests.keybackends import Facts, HttpBackend

USER = "u-1100a15812cc"
DIGEST = hash_key("sk-one-0123456789")


def test_reply_of_rfc_7662() -> None:
    answer = {"active": True, "sub": USER, "exp": 1763000000, "jti": "key_1", "scope": "x", "client_id": "c"}
    assert principal_of(answer, DIGEST) == Principal("key_1", USER, expires_at=1763000000.0)


def test_reply_of_the_platform() -> None:
    answer = {
        "is_valid": True, "api_key_id": "key_2", "user_id": USER, "allow_models": ["public/*"], "deny_models": ["**"],
    }  # fmt: skip
    assert principal_of(answer, DIGEST) == Principal("key_2", USER, allow=("public/*",), deny=("**",))


@pytest.mark.parametrize("answer", [{"active": False}, {"is_valid": False, "user_id": ""}])
def test_clear_no_is_an_unknown_key(answer: dict[str, Any]) -> None:
    assert principal_of(answer, DIGEST) is None


def test_key_without_an_id_gets_one_that_stays_and_tells_nothing_of_it() -> None:
    first, again = (principal_of({"active": True, "sub": USER}, DIGEST) for _ in range(2))
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
        {"active": True, "sub": USER, "jti": "a\nb"}, {"active": True, "sub": USER, "name": ["x"]},
    ],
)  # fmt: skip
def test_what_is_not_understood_is_no_answer(answer: object) -> None:
    """It is the server's fault, so nobody is let in, and nobody is told that their key is wrong."""
    with pytest.raises(ValueError, match=r"."):
        principal_of(answer, DIGEST)


NAMES = st.sampled_from(["active", "is_valid", "sub", "user_id", "exp", "jti"])
SCALARS = st.none() | st.booleans() | st.integers() | st.text()


@given(st.recursive(SCALARS, lambda each: st.lists(each) | st.dictionaries(NAMES, each)))
def test_any_json_is_a_record_a_no_or_a_value_error(answer: object) -> None:
    try:
        found = principal_of(answer, DIGEST)
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
        with pytest.raises(KeyStoreUnavailable):
            await store.look_up(DIGEST, "sk-one-0123456789")
    finally:
        await store.close()
        server.close()
