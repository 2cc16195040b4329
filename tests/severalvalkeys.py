"""Several Valkey servers of our own on loopback, of which one can be lost: a primary under Sentinels, and a Cluster."""

import asyncio
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis as redis_package
from redis.exceptions import RedisError

from tests.keybackends import PATIENCE_S, ValkeyServer

SERVICE = "edge-1"
# Users with the rights that the documentation names.
_RIGHTS = "~edge:* ~{edge}:* &edge:keys +@read +@write +@scripting +@transaction +@pubsub +@connection +time +wait"
_USER = ("--user", "edge", "on", ">secret", *_RIGHTS.split(), "+cluster|slots")
_SENTINELS_USER = "asker on >watch +sentinel|get-master-addr-by-name +@connection"
_DOWN_AFTER_MS = 800
_SLOTS = ((0, 9999), (10_000, 12_999), (13_000, 16_383))  # the first has all that an edge asks for


async def until(holds: Callable[[], bool]) -> None:
    """Wait for something of another process."""
    give_up_at = time.monotonic() + PATIENCE_S
    while True:
        try:
            if holds():
                return
        except (RedisError, OSError):
            pass
        assert time.monotonic() < give_up_at
        await asyncio.sleep(0.02)


def free_port(lowest: int = 0) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", lowest))
        return int(probe.getsockname()[1])


class Several:
    """Servers with a primary that can be lost for good."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.servers: list[ValkeyServer] = []
        self.replicas: list[ValkeyServer] = []  # of the first one
        self.url = ""

    def add(self, *options: str) -> ValkeyServer:
        directory = self.directory / str(len(self.servers))
        directory.mkdir()
        server = ValkeyServer(directory, options=options)
        self.servers.append(server)
        server.start()
        return server

    async def start(self) -> None:
        raise NotImplementedError

    def lose_primary(self) -> None:
        """Kill the primary, without a word to anybody."""
        self.servers[0].stop()

    async def successor(self) -> ValkeyServer:
        """The replica that has taken its place."""
        found: list[ValkeyServer] = []

        def is_there() -> bool:
            found.extend(each for each in self.replicas if _info(each)["role"] == "master")
            return bool(found)

        await until(is_there)
        return found[0]

    def close(self) -> None:
        for each in self.servers:
            each.stop()


class Sentinels(Several):
    """A primary, two replicas, two Sentinels that ask for a password, and one that is gone."""

    async def start(self) -> None:
        shared = ("--repl-diskless-sync-delay", "0", *_USER)
        primary = self.add(*shared)
        of_it = ("--replicaof", f"127.0.0.1 {primary.port}")
        self.replicas = [self.add(*shared, *of_it) for _ in range(2)]
        sentinels = [self._sentinel(primary) for _ in range(2)]
        await until(lambda: all(_info(each)["master_link_status"] == "up" for each in self.replicas))

        def is_known(sentinel: ValkeyServer) -> bool:
            with redis_package.Redis(port=sentinel.port, password="watch") as client:
                state: Any = client.sentinel_masters()
            return bool(state[SERVICE]["num-slaves"] == 2 and state[SERVICE]["num-other-sentinels"] == 1)

        await until(lambda: all(map(is_known, sentinels)))
        hosts = ",".join(f"127.0.0.1:{port}" for port in (free_port(), *(each.port for each in sentinels)))
        query = "sentinel_username=asker&sentinel_password=watch"
        self.url = f"redis+sentinel://edge:secret@{hosts}/{SERVICE}/0?{query}"

    def _sentinel(self, primary: ValkeyServer) -> ValkeyServer:
        file = self.directory / f"sentinel-{len(self.servers)}.conf"
        file.write_text(
            f"sentinel monitor {SERVICE} 127.0.0.1 {primary.port} 2\n"
            f"sentinel down-after-milliseconds {SERVICE} {_DOWN_AFTER_MS}\n"
            f"sentinel failover-timeout {SERVICE} 2000\n"
            f"sentinel sentinel-pass watch\nrequirepass watch\nuser {_SENTINELS_USER}\n"
        )
        return self.add(str(file), "--sentinel")


def _info(server: ValkeyServer) -> dict[str, Any]:
    with server.client() as client:
        found: dict[str, Any] = client.info()  # type: ignore[assignment]  # redis-py: may be async
    return found


class Cluster(Several):
    """Three primaries and two replicas, those of the first one."""

    async def start(self) -> None:
        shared = (
            "--cluster-enabled",
            "yes",
            "--cluster-node-timeout",
            "400",
            "--repl-diskless-sync-delay",
            "0",
            *_USER,
        )
        nodes = [self.add(*shared, "--cluster-port", str(free_port())) for _ in range(5)]
        self.replicas = nodes[3:]
        clients: list[Any] = [each.client() for each in nodes]
        for client, (first, last) in zip(clients, _SLOTS, strict=False):
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
        for client in clients[1:]:
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port, nodes[0].options[-1])
        ids = [client.execute_command("CLUSTER", "MYID").decode() for client in clients]
        for client in clients[3:]:
            await until(lambda client=client: client.execute_command("CLUSTER", "REPLICATE", ids[0]))
        await until(lambda: all(_info(each)["master_link_status"] == "up" for each in nodes[3:]))
        for client in clients:
            await until(lambda client=client: b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO"))
            client.close()
        self.url = f"redis+cluster://edge:secret@127.0.0.1:{nodes[0].port},127.0.0.1:{nodes[1].port}"
