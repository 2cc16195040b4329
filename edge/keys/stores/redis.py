"""A key store in Redis or Valkey: a hash for each key, and one for each user of whom there is something to say.

`edge:key:` and the SHA-256 of the key in hex names a hash of `id` and `user`, and of `name`, `allow` and `deny`
(patterns with a space between two), `enabled` (0 or 1), `expires_at` (Unix seconds) and `limit` where they are needed.
`edge:user:` and the user names a hash of `suspended` and `out_of_quota` (0 or 1). Whoever changes one publishes on
`edge:keys` (see `keys/revocations.py`), after the change. Publishing knows no databases: one Redis, one set of keys.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from edge.config.settings import KeysConfig
from edge.exchange import Principal
from edge.keys.revocations import RevocationChannel
from edge.keys.stores.protocol import (
    AnswerUnusable,
    Changes,
    StoreFailed,
    UserState,
    ignore_changes,
    ignore_outage,
)
from edge.names import is_dns_label, is_pattern
from edge.tls import client_tls
from edge.valkey import connect, disconnect, reason_of

if TYPE_CHECKING:
    from redis.asyncio import Redis

KEY_PREFIX: Final = "edge:key:"
USER_PREFIX: Final = "edge:user:"
_FLAGS: Final = {"0": False, "1": True}


class RedisKeyStore:
    """Looks keys up in Redis, and hears of changes by its channel."""

    knows_users = True

    def __init__(self, config: KeysConfig) -> None:
        self.changed: Callable[[Changes], object] = ignore_changes
        self.outage: Callable[[str], None] = ignore_outage
        self._config = config
        self._client: Redis | None = None
        self._channel: RevocationChannel | None = None

    async def open(self) -> None:
        """Begin to answer; a dead Redis is waited for.

        Raises: `Unusable` without the package, or for a bad CA file.
        """
        ca_file = self._config.store_ca_file
        if ca_file is not None:
            client_tls(ca_file, "keys.store_ca_file")  # the client would find out at each connection
        client = connect(self._config.store.url, self._config.store_timeout_s, str(ca_file) if ca_file else None)
        self._client = client
        self._channel = RevocationChannel(client)
        self._channel.changed = self.changed
        self._channel.outage = self._unheard
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
        """Tell of an outage; while no change can be heard of, answers are believed from one attempt to the next."""
        self.outage(reason)
        if reason:
            self.changed(Changes(everything=True))

    async def look_up(self, digest: bytes, key: str) -> Principal | None:
        """Return who owns the key of this SHA-256 digest; raises `StoreFailed`."""
        facts = await self._read(KEY_PREFIX + digest.hex())
        if not facts:
            return None
        try:
            principal = principal_of(facts, UserState())
        except ValueError as error:
            raise AnswerUnusable(f"a record {error}") from None
        state = await self.look_up_user(principal.user)
        return principal_of(facts, state)

    async def look_up_user(self, user: str) -> UserState:
        """Return what is recorded of a user; raises `StoreFailed`."""
        facts = await self._read(USER_PREFIX + user)
        try:
            return UserState(_flag(facts, "suspended", False), _flag(facts, "out_of_quota", False))
        except ValueError as error:
            raise AnswerUnusable(f"a user's record {error}") from None

    async def _read(self, name: str) -> dict[str, str]:
        from redis.exceptions import ResponseError

        if self._client is None:
            raise StoreFailed("the store is closed")
        try:
            fields = await self._client.hgetall(name)
            return {_decoded(field): _decoded(value) for field, value in fields.items()}
        except UnicodeDecodeError:
            raise AnswerUnusable("a record that is not UTF-8") from None
        except ResponseError as error:
            raise AnswerUnusable(reason_of(error)) from None
        except Exception as error:  # from something that is no Redis the client raises whatever its parsing stumbles on
            raise StoreFailed(reason_of(error)) from None


def _decoded(text: bytes | str) -> str:
    return text if isinstance(text, str) else text.decode()


def principal_of(facts: Mapping[str, str], state: UserState) -> Principal:
    """Return the record of a hash; raises `ValueError` with what is wrong with it."""
    user, key_id = facts.get("user", ""), facts.get("id", "")
    if not is_dns_label(user):
        raise ValueError("without a DNS label as user")
    if not key_id or not key_id.isprintable():
        raise ValueError("without an id")
    return Principal(
        id=key_id,
        user=user,
        name=facts.get("name", ""),
        allow=_patterns(facts, "allow"),
        deny=_patterns(facts, "deny"),
        enabled=_flag(facts, "enabled", True),
        suspended=state.suspended,
        out_of_quota=state.out_of_quota,
        expires_at=_time(facts, "expires_at"),
        limit=facts.get("limit") or None,
    )


def _flag(facts: Mapping[str, str], name: str, default: bool) -> bool:
    value = facts.get(name)
    if value is None:
        return default
    if value not in _FLAGS:
        raise ValueError(f"with another {name} than 0 or 1")
    return _FLAGS[value]


def _time(facts: Mapping[str, str], name: str) -> float | None:
    value = facts.get(name)
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"with another {name} than seconds since 1970")
    return seconds


def _patterns(facts: Mapping[str, str], name: str) -> tuple[str, ...]:
    patterns = tuple(facts.get(name, "").split())
    if not all(map(is_pattern, patterns)):
        raise ValueError(f"with a pattern in {name} that means nothing")
    return patterns
