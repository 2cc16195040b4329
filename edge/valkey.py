"""The one client of a Redis or Valkey: the key store, the usage sink and what processes share go through it."""

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from edge.config.redis_urls import TAG, parse_redis
from edge.errors import Unusable

if TYPE_CHECKING:
    from redis import Redis as BlockingRedis
    from redis.asyncio import Redis

_MAX_CONNECTIONS: Final = 32
_CLOSE_PATIENCE_S: Final = 0.5  # a server that says nothing does not end its TLS either

_IS_MEMBER: Final = "it is a member of a Cluster, which keeps a part of the keys: name it with redis+cluster://"
_ADVICE: Final = {  # by the class of an error that a server answers
    "ReadOnlyError": "it is a read-only replica: name its primary, or its Sentinels with redis+sentinel://",
    "MovedError": _IS_MEMBER,
    "AskError": _IS_MEMBER,
    "ClusterDownError": "a part of the Cluster has no primary",
}

_MISSING: Final = 'redis: needs the package: pip install "edge[redis]"'
_BAD_URL: Final = "redis: the URL cannot be used: write redis://:PASSWORD@HOST:PORT/DATABASE"

T = TypeVar("T")


def connect(url: str, timeout_s: float, ca_file: Path | None = None, key: str = TAG) -> "Redis":
    """Return a client of a Redis or Valkey; raises `Unusable` without the package or for a bad URL.

    It tries nothing twice: who asks decides what a failure means. In a Cluster it is a client of the primary that has
    the slot of a `key`, and knows what is in that slot alone.
    """
    with _usable():
        from redis.asyncio import BlockingConnectionPool, Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        from edge.primaries import client_of

        options = _options(timeout_s, ca_file) | {"retry": Retry(NoBackoff(), 0)}
        place = parse_redis(url)
        if place.mode != "single":
            return client_of(place, key, options, _MAX_CONNECTIONS, timeout_s)
        pool: Any = BlockingConnectionPool.from_url(url, max_connections=_MAX_CONNECTIONS, timeout=timeout_s, **options)
        return Redis.from_pool(pool)


def connect_blocking(url: str, timeout_s: float, ca_file: Path | None = None, key: str = TAG) -> "BlockingRedis":
    """Return a client for commands and threads, with one connection; raises as `connect` does."""
    with _usable():
        from redis import Redis as BlockingRedis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        from edge.primaries import blocking_client_of

        options = _options(timeout_s, ca_file) | {"retry": Retry(NoBackoff(), 0)}
        place = parse_redis(url)
        return (
            BlockingRedis.from_url(url, **options)
            if place.mode == "single"
            else blocking_client_of(place, key, options)
        )


@contextlib.contextmanager
def _usable() -> Iterator[None]:
    """Raise `Unusable` for a package that is missing, and for a URL that redis-py refuses."""
    try:
        yield
    except ImportError:
        raise Unusable(_MISSING) from None
    except ValueError:  # its message would repeat the URL, password and all
        raise Unusable(_BAD_URL) from None


def _options(timeout_s: float, ca_file: Path | None) -> dict[str, Any]:
    """Return the options of each connection."""
    options: dict[str, Any] = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    return options if ca_file is None else {**options, "ssl_ca_certs": str(ca_file)}


class Script:
    """A script of Lua that answers in lines: a reply of one text, since the client reads thousands of numbers slowly.

    Source: https://valkey.io/topics/eval-intro/
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._digest = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()

    async def load(self, client: "Redis") -> None:
        """Give the server the script; raises what the client raises."""
        await answer_of(client.script_load(self._source))

    async def run(self, client: "Redis", keys: Sequence[str], arguments: Sequence[str]) -> list[bytes]:
        """Return the lines that it answers; raises what the client raises, also where it was not loaded."""
        reply: Any = client.evalsha(self._digest, len(keys), *keys, *arguments)
        lines: list[bytes] = (await answer_of(reply)).rstrip().split(b"\n")
        return lines


async def disconnect(client: "Redis") -> None:
    """Close every connection of a client; of one that does not close in order nothing is lost."""
    from redis.exceptions import RedisError

    with contextlib.suppress(RedisError, OSError):
        async with asyncio.timeout(_CLOSE_PATIENCE_S):
            await client.aclose()
            await client.connection_pool.disconnect()


async def answer_of(command: Awaitable[T]) -> T:
    """Return what a command of the client returns, raise what it raises; a task that is cancelled ends here.

    redis-py loses cancellations. One that comes while it connects it takes for a failure to connect, and one that comes
    when it has just sent does nothing at all (see `tasks.py`): the task would go on for ever.
    """
    try:
        return await command
    finally:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError


def reason_of(error: Exception) -> str:
    """Return what the log may say of a failure; an error that Redis answers can repeat the command, digests and all."""
    from redis.exceptions import ConnectionError as RedisConnectionError

    told = isinstance(error, RedisConnectionError | OSError) and str(error)
    kind = type(error).__name__
    return told or _ADVICE.get(kind, kind)
