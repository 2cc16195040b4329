"""A key store in Redis or Valkey: a hash for each key, and one for each user who is marked.

`edge:key:` and the SHA-256 of the key in hex names a hash of `id` and `user`, and of `name`, `allow` and `deny`
(patterns with a space between two), `enabled` (0 or 1), `expires_at` (Unix seconds) and `limit` where they are needed.
`edge:user:` and the user names a hash of `suspended` and `out_of_quota` (0 or 1). Whoever changes one publishes on
`edge:keys` (see `keys/revocations.py`), after the change. Publishing knows no databases: one Redis, one set of keys.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from edge.config.settings import KeysConfig
from edge.exchange import Principal
from edge.keys.revocations import RevocationChannel
from edge.keys.stores.protocol import AnswerUnusable, Invalidation, KeyStore, StoreFailed, UserState
from edge.keys.stores.records import principal_of, user_state_of
from edge.tls import client_tls
from edge.valkey import answer_of, connect, disconnect, reason_of

if TYPE_CHECKING:
    from redis.asyncio import Redis

KEY_PREFIX: Final = "edge:key:"
USER_PREFIX: Final = "edge:user:"
_FLAGS: Final = {"0": False, "1": True}


class RedisKeyStore(KeyStore):
    """Looks keys up in Redis, and reports the changes that its channel brings."""

    def __init__(self, config: KeysConfig) -> None:
        self._config = config
        self._client: Redis | None = None
        self._channel: RevocationChannel | None = None

    async def open(self) -> None:
        """Begin to answer, once Redis does; raises `Unusable` without the package, or for a bad CA file."""
        ca_file = self._config.store_ca_file
        if ca_file is not None:
            client_tls(ca_file, "keys.store_ca_file")  # the client would find out at each connection
        client = connect(self._config.store.url, self._config.store_timeout_s, ca_file)
        self._client = client
        self._channel = RevocationChannel(client)
        self._channel.on_change = self.on_change
        self._channel.on_outage = self._unheard
        self._channel.open()

    async def close(self) -> None:
        """Stop listening and close the connections."""
        channel, self._channel = self._channel, None
        client, self._client = self._client, None
        if channel is not None:
            await channel.close()
        if client is not None:
            await disconnect(client)

    def _unheard(self, reason: str) -> None:
        """Report an outage; while no change can be heard of, answers are believed from one attempt to the next."""
        self.on_outage(reason)
        if reason:
            self.on_change(Invalidation(everything=True))

    async def look_up(self, digest: bytes, key: str) -> Principal | None:
        """Return who owns the key of this SHA-256 digest; raises `StoreFailed`."""
        facts = await self._read(KEY_PREFIX + digest.hex())
        if not facts:
            return None
        try:
            principal = principal_of(record_of(facts))
        except ValueError as error:
            raise AnswerUnusable(f"a record with {error}") from None
        state = await self.look_up_user(principal.user)
        return replace(principal, suspended=state.suspended, out_of_quota=state.out_of_quota)

    async def look_up_user(self, user: str) -> UserState:
        """Return what is recorded of a user; raises `StoreFailed`."""
        facts = await self._read(USER_PREFIX + user)
        try:
            return user_state_of(_flags(facts, "suspended", "out_of_quota"))
        except ValueError as error:
            raise AnswerUnusable(f"a user's record with {error}") from None

    async def _read(self, name: str) -> dict[str, str]:
        from redis.exceptions import ResponseError

        if self._client is None:
            raise StoreFailed("the store is closed")
        try:
            fields = await answer_of(self._client.hgetall(name))
            return {_decoded(field): _decoded(value) for field, value in fields.items()}
        except UnicodeDecodeError:
            raise AnswerUnusable("a record that is not UTF-8") from None
        except ResponseError as error:
            raise AnswerUnusable(reason_of(error)) from None
        except Exception as error:  # from something that is no Redis the client raises whatever its parsing stumbles on
            raise StoreFailed(reason_of(error)) from None


def _decoded(text: bytes | str) -> str:
    return text if isinstance(text, str) else text.decode()


def record_of(facts: Mapping[str, str]) -> dict[str, Any]:
    """Return the record of a hash; text that is no flag or no number stays text, which no rule accepts."""
    record: dict[str, Any] = {name: facts.get(name) for name in ("id", "user", "name", "limit")}
    record |= {name: facts.get(name, "").split() for name in ("allow", "deny")}
    record["expires_at"] = facts.get("expires_at") or None
    with contextlib.suppress(TypeError, ValueError):
        record["expires_at"] = float(record["expires_at"])
    return record | _flags(facts, "enabled")


def _flags(facts: Mapping[str, str], *names: str) -> dict[str, bool | str]:
    return {name: _FLAGS.get(facts[name], facts[name]) for name in names if name in facts}
