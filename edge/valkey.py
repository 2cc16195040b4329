"""The one client of a Redis or Valkey: the key store, the usage sink and what processes share go through it."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edge.errors import Unusable

if TYPE_CHECKING:
    from redis.asyncio import Redis

_MAX_CONNECTIONS: Final = 32


def connect(url: str, timeout_s: float, ca_file: Path | None = None) -> "Redis":
    """Return a client of a Redis or Valkey; raises `Unusable` without the package or for a bad URL.

    It tries nothing twice: who asks decides what a failure means.
    """
    try:
        from redis.asyncio import BlockingConnectionPool, Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError:
        raise Unusable('redis: needs the package: pip install "edge[redis]"') from None
    options: dict[str, Any] = {} if ca_file is None else {"ssl_ca_certs": str(ca_file)}
    try:
        pool: Any = BlockingConnectionPool.from_url(
            url,
            max_connections=_MAX_CONNECTIONS,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            **options,
        )
    except ValueError:  # its message would repeat the URL, password and all
        raise Unusable("redis: the URL cannot be used: write redis://:PASSWORD@HOST:PORT/DATABASE") from None
    return Redis.from_pool(pool)


async def disconnect(client: "Redis") -> None:
    """Close every connection of a client."""
    await client.aclose()
    await client.connection_pool.disconnect()


def raise_cancellation() -> None:
    """Raise `CancelledError` when this task is cancelled: redis-py takes that for a failure while it connects."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError from None


def reason_of(error: Exception) -> str:
    """Return what the log may say of a failure; an error that Redis answers can repeat the command, digests and all."""
    from redis.exceptions import ConnectionError as RedisConnectionError

    told = isinstance(error, RedisConnectionError | OSError) and str(error)
    return told or type(error).__name__
