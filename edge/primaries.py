"""Who is the primary: Sentinels are asked, or the nodes of a Cluster, whenever a connection is made.

So a client of several servers is one of a single server, the primary of the moment. In a Cluster that is the primary of
one slot, in which all names of the client are: scripts, transactions, subscriptions and `WAIT` are those of a single
server too. redis-py's pools of Sentinels do the rest. A connection that finds itself at a server which is no primary
any more is closed, and what was asked on it fails.

Sources: https://valkey.io/topics/sentinel-clients/ and https://valkey.io/commands/cluster-slots/
"""

from typing import Any, Final

from redis import Redis as BlockingRedis
from redis import SSLConnection as BlockingSSLConnection
from redis import sentinel as blocking
from redis.asyncio import BlockingConnectionPool, Redis, SSLConnection, sentinel
from redis.crc import key_slot
from redis.exceptions import ClusterDownError, MovedError
from redis.exceptions import ConnectionError as RedisConnectionError

from edge.config.redis_urls import RedisUrl
from edge.config.values import bracketed

Address = tuple[str, int]

_ASK_TIMEOUT_S: Final = 1.0  # one that is gone holds up what waits for a connection; the next one answers
_MOVED: Final = "the Cluster has another primary for this, or none"


def client_of(place: RedisUrl, key: str, options: dict[str, Any], max_connections: int, timeout_s: float) -> Redis:
    """Return a client of the primary; of a Cluster, of the slot of a name. `options` are those of each connection."""
    pool: Any = _Pool(  # type: ignore[no-untyped-call]  # redis-py
        place.service,
        _Finder(place, key, options),
        connection_class=_TlsConnection if place.is_tls else _Connection,
        db=place.database,
        username=place.username,
        password=place.password,
        max_connections=max_connections,
        timeout=timeout_s,
        **options,
    )
    return Redis.from_pool(pool)


def blocking_client_of(place: RedisUrl, key: str, options: dict[str, Any]) -> BlockingRedis:
    """Return the same for commands and threads."""
    pool: Any = blocking.SentinelConnectionPool(  # type: ignore[no-untyped-call]  # redis-py
        place.service,
        _BlockingFinder(place, key, options),
        connection_class=_BlockingTlsConnection if place.is_tls else _BlockingConnection,
        db=place.database,
        username=place.username,
        password=place.password,
        **options,
    )
    return BlockingRedis.from_pool(pool)


class _Turns:
    """Whom to ask: each in its turn, since one that is cut off names a primary of before; the silent ones last."""

    def __init__(self, place: RedisUrl, key: str, options: dict[str, Any]) -> None:
        self._place = place
        self._slot = key_slot(key.encode())
        self._servers = list(place.hosts)
        self._silent: set[Address] = set()
        self._options = {**options, "socket_timeout": _ASK_TIMEOUT_S, "socket_connect_timeout": _ASK_TIMEOUT_S}
        self._options["ssl"] = place.is_tls
        self._options["username"], self._options["password"] = (
            (place.sentinel_username, place.sentinel_password)
            if place.mode == "sentinel"
            else (place.username, place.password)
        )
        self.question: tuple[str, ...] = ("CLUSTER", "SLOTS")
        if place.mode == "sentinel":
            self.question = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", place.service)

    def servers(self) -> list[tuple[Address, dict[str, Any]]]:
        """Return each server, with the options of a client of it."""
        in_turn = sorted(self._servers, key=self._silent.__contains__)
        return [((host, port), {"host": host, "port": port, **self._options}) for host, port in in_turn]

    def answered(self, server: Address, answer: Any) -> Address:
        """Return whom an answer names; raises `RedisConnectionError` where it names nobody."""
        self._silent.discard(server)
        found, nodes = (_of_sentinel if self._place.mode == "sentinel" else self._of_cluster)(server, answer)
        stay = (each for each in self._servers if each in self._place.hosts or each in nodes)
        self._servers = [each for each in dict.fromkeys((*stay, *nodes)) if each != server] + [server]
        self._silent.intersection_update(self._servers)
        if found is None:
            raise RedisConnectionError("it knows none")
        return found

    def _of_cluster(self, server: Address, answer: Any) -> tuple[Address | None, list[Address]]:
        """Return the primary of the slot, and all nodes. A node may leave out its own host."""
        shards = [
            (
                range(first, last + 1),
                [((host or b"").decode().strip("?") or server[0], port) for host, port, *_ in nodes],
            )
            for first, last, *nodes in answer
        ]
        found = next((nodes[0] for slots, nodes in shards if self._slot in slots), None)
        return found, [node for _, nodes in shards for node in nodes]

    def failed(self, server: Address, error: Exception) -> str:
        """Note that a server did not answer; return why."""
        self._silent.add(server)
        place, reason = f"{bracketed(server[0])}:{server[1]}", str(error) or type(error).__name__
        return reason if place in reason else f"{place}: {reason}"

    def nobody(self, reasons: list[str]) -> RedisConnectionError:
        """Return the error of a round in which no server named a primary."""
        who = (
            f"Sentinel names a primary of {self._place.service!r}"
            if self._place.service
            else "node of the Cluster helps"
        )
        return RedisConnectionError(f"no {who}: {'; '.join(reasons)}")


def _of_sentinel(server: Address, answer: Any) -> tuple[Address | None, list[Address]]:
    return None if answer is None else (answer[0].decode(), int(answer[1])), []


class _Finder:
    """Asks for the primary, where redis-py's pool has a `Sentinel`."""

    def __init__(self, place: RedisUrl, key: str, options: dict[str, Any]) -> None:
        self._turns = _Turns(place, key, options)

    async def discover_master(self, service_name: str) -> Address:
        """Return the primary's address; raises `RedisConnectionError`."""
        reasons = []
        for server, options in self._turns.servers():
            try:
                async with Redis(**options) as client:
                    ask: Any = client.execute_command
                    return self._turns.answered(server, await ask(*self._turns.question))
            except Exception as error:  # from something that is no Redis whatever parsing stumbles on
                reasons.append(self._turns.failed(server, error))
        raise self._turns.nobody(reasons)


class _BlockingFinder:
    """The same for commands and threads."""

    def __init__(self, place: RedisUrl, key: str, options: dict[str, Any]) -> None:
        self._turns = _Turns(place, key, options)

    def discover_master(self, service_name: str) -> Address:
        """Return the primary's address; raises `RedisConnectionError`."""
        reasons = []
        for server, options in self._turns.servers():
            try:
                with BlockingRedis(**options) as client:
                    ask: Any = client.execute_command
                    return self._turns.answered(server, ask(*self._turns.question))
            except Exception as error:
                reasons.append(self._turns.failed(server, error))
        raise self._turns.nobody(reasons)


class _Pool(sentinel.SentinelConnectionPool, BlockingConnectionPool):
    """A pool that knows the primary, and waits for a connection where all are in use."""


class _Connection(sentinel.SentinelManagedConnection):
    """A connection that ends where the Cluster has moved what it was made for."""

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().read_response(*args, **kwargs)
        except (MovedError, ClusterDownError):
            await self.disconnect()
            raise RedisConnectionError(_MOVED) from None


class _TlsConnection(_Connection, SSLConnection):
    """The same over TLS."""


class _BlockingConnection(blocking.SentinelManagedConnection):
    """The same for commands and threads."""

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_response(*args, **kwargs)
        except (MovedError, ClusterDownError):
            self.disconnect()  # type: ignore[no-untyped-call]  # redis-py
            raise RedisConnectionError(_MOVED) from None


class _BlockingTlsConnection(_BlockingConnection, BlockingSSLConnection):
    """The same over TLS."""
