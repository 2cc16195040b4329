"""The administering side of a key store in Redis or Valkey: its first keys, and the mark that they are all there."""

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final

from edge.config.settings import KeysConfig
from edge.errors import Unusable
from edge.exchange import Principal
from edge.keys.revocations import CHANNEL
from edge.keys.stores.redis import FORMAT, KEY_PREFIX, MARKER, any_record
from edge.valkey import answer_of, connect, disconnect, reason_of

if TYPE_CHECKING:
    from redis.asyncio import Redis

_TIMEOUT_S: Final = 5.0


async def add_key(config: KeysConfig, digest: bytes, record: Principal) -> bool:
    """Record a key, the first one with the mark; return whether the store is marked. Raises `Unusable`."""
    facts = {"id": record.id, "user": record.user, "name": record.name, "limit": record.limit or ""}
    facts |= {"allow": " ".join(record.allow), "deny": " ".join(record.deny)}
    facts["expires_at"] = "" if record.expires_at is None else str(record.expires_at)
    async with _administering(config) as client:
        mark = await _mark_of(client)
        is_first = mark is None and await any_record(client) is None
        commands: Any = client.pipeline(transaction=True)
        commands.hset(KEY_PREFIX + digest.hex(), mapping={name: value for name, value in facts.items() if value})
        if is_first:
            commands.set(MARKER, FORMAT, nx=True)
        commands.publish(CHANNEL, f"digest:{digest.hex()}")
        await answer_of(commands.execute())
    return is_first or mark is not None


async def mark(config: KeysConfig) -> None:
    """Say that all keys are there, or that there are to be none; raises `Unusable`."""
    async with _administering(config) as client:
        await _mark_of(client)
        await answer_of(client.set(MARKER, FORMAT))
        await answer_of(client.publish(CHANNEL, "all"))


async def _mark_of(client: "Redis") -> Any:
    """Return the mark, None without one; raises `Unusable` for that of another edge."""
    found: Any = await answer_of(client.get(MARKER))
    if found not in (None, FORMAT.encode()):
        raise Unusable(f"keys.store: its {MARKER} names a format that this edge does not know: upgrade this edge")
    return found


@contextlib.asynccontextmanager
async def _administering(config: KeysConfig) -> AsyncIterator["Redis"]:
    client = connect(config.store.url, _TIMEOUT_S, config.store_ca_file)
    from redis.exceptions import RedisError

    try:
        yield client
    except (RedisError, OSError) as error:
        raise Unusable(f"keys.store cannot be written: {reason_of(error)}") from None
    finally:
        await disconnect(client)
