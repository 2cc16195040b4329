"""A key store that is asked over HTTP: token introspection (RFC 7662), or the platform's own reply.

The key is sent as the form field `token` (section 2.1), so the server should be reached over TLS. It answers JSON:

- RFC 7662: `{"active": true, "sub": "u-1100a15812cc", "exp": 1763000000, "jti": "key_1"}`; `sub` is the user. `name`,
  `allow_models`, `deny_models`, `enabled`, `suspended`, `out_of_quota`, `limit` and `share` may stand beside it.
- the platform: `{"is_valid": true, "user_id": "u-...", "api_key_id": "...", "allow_models": [], "deny_models": []}`.

A refusal is `"active": false` or `"is_valid": false` with status 200, and nothing else: whatever cannot be understood
is a failure of the server, never an unknown key. Changes are not reported: a revoked key lives until its answer is
old, or until `POST /keys/purge` names it.
"""

import hashlib
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote_plus

import aiohttp
import orjson

from edge.config.process_settings import KeysConfig
from edge.exchange import Principal
from edge.keys.stores.protocol import AnswerUnusable, KeyStore, StoreFailed
from edge.keys.stores.records import principal_of
from edge.tls import client_tls

_MAX_ANSWER_BYTES: Final = 2**16
_MAX_CONNECTIONS: Final = 64


class HttpKeyStore(KeyStore):
    """Asks an introspection server about each key."""

    knows_users = False  # there is no such question in RFC 7662

    def __init__(self, config: KeysConfig) -> None:
        self._config = config
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Begin to answer; the server is first asked when a key comes. Raises: `Unusable` for a bad CA file."""
        tls = client_tls(self._config.store_ca_file, "keys.store_ca_file")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=_MAX_CONNECTIONS, ssl=tls),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),  # the owner bounds the whole look-up
        )

    async def close(self) -> None:
        """Close the connections to the server."""
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    def reconfigure(self, config: KeysConfig) -> None:
        """Take over the credentials of a reload."""
        self._config = config

    async def look_up(self, digest: bytes, key: str) -> Principal | None:
        """Return who owns a key; raises `StoreFailed` for every answer but a clear one."""
        try:
            content = await self._ask(key)
        except (aiohttp.ClientError, OSError) as error:
            raise StoreFailed(type(error).__name__) from None
        try:
            return read_answer(orjson.loads(content), digest)
        except orjson.JSONDecodeError:
            raise AnswerUnusable("an answer that is no JSON") from None
        except ValueError as error:
            raise AnswerUnusable(f"an answer {error}") from None

    async def _ask(self, key: str) -> bytes:
        """Return the body of an answer.

        A server closes connections that are idle, and a request that crosses this on its way is answered by nobody: it
        is sent once more, since asking changes nothing.
        """
        try:
            return await self._ask_once(key)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            return await self._ask_once(key)

    async def _ask_once(self, key: str) -> bytes:
        if self._session is None:
            raise StoreFailed("the store is closed")
        config = self._config
        headers = {"Accept": "application/json"}
        if config.store_token is not None:
            headers["Authorization"] = f"Bearer {config.store_token}"
        elif config.store_client_id is not None:
            # Both are encoded as in a form before they are joined (RFC 6749 section 2.3.1).
            client_id, secret = quote_plus(config.store_client_id), quote_plus(config.store_client_secret or "")
            headers["Authorization"] = aiohttp.encode_basic_auth(client_id, secret)
        async with self._session.post(
            config.store.url, data={"token": key}, headers=headers, allow_redirects=False
        ) as response:
            if response.status != 200:
                raise AnswerUnusable(f"status {response.status}")
            content = bytearray()
            async for piece in response.content.iter_any():
                content += piece
                if len(content) > _MAX_ANSWER_BYTES:
                    raise AnswerUnusable("an answer of more than 64 KiB")
            return bytes(content)


def read_answer(answer: object, digest: bytes) -> Principal | None:
    """Return the principal of an answer, None for a clear no; raises `ValueError` with what the answer is."""
    if not isinstance(answer, Mapping):
        raise ValueError("that is no JSON object")
    verdicts = [answer[name] for name in ("active", "is_valid") if name in answer]
    if not verdicts or not all(isinstance(each, bool) for each in verdicts) or len(set(verdicts)) > 1:
        raise ValueError('without one "active" or "is_valid", true or false')
    if not verdicts[0]:
        return None
    # A key without an id has the same one each time, and no way back to the digest.
    ids = answer.get("api_key_id"), answer.get("jti"), "key_" + hashlib.sha256(b"id of " + digest).hexdigest()[:12]
    key_id = next(each for each in ids if each not in (None, ""))
    renamed = {"user": answer.get("user_id", answer.get("sub")), "expires_at": answer.get("exp")}
    patterns = {"allow": answer.get("allow_models"), "deny": answer.get("deny_models")}
    try:
        return principal_of({**answer, "id": key_id, **renamed, **patterns})
    except ValueError as error:
        raise ValueError(f"with {error}") from None
