"""The Redis servers of `chaos`: a pair under Sentinel, behind a relay to its primary, and a cluster of two nodes.

An edge speaks to one address. For a pair that is a relay to the primary, as a service or HAProxy in front of it is; for
a cluster it is a node.
"""

import asyncio
import contextlib
import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from redis import Redis as Client
from redis.exceptions import RedisError

from loadtest import processes
from loadtest.edges import redis_server

NAME: Final = "edge"  # of the pair
_PATIENCE_S: Final = 120.0  # on a machine that others use
_POLL_S: Final = 0.1
_BUFFER: Final = 65_536
_DOWN_AFTER_MS: Final = 1_000


async def until(holds: Callable[[], bool], what: str) -> None:
    """Return when something of another process holds; raises `ProcessError` when it takes too long."""
    give_up_at = time.monotonic() + _PATIENCE_S
    while True:
        with contextlib.suppress(RedisError, OSError):
            if await asyncio.to_thread(holds):
                return
        if time.monotonic() > give_up_at:
            raise processes.ProcessError(f"{what}: not within {_PATIENCE_S:g} s")
        await asyncio.sleep(_POLL_S)


class Redis:
    """A Redis or Valkey of our own on loopback, which can be killed and started again."""

    def __init__(self, name: str, directory: Path, *options: str) -> None:
        self.port = processes.free_port()
        self._directory = directory / name
        self._directory.mkdir()
        self._options = options
        self._running: subprocess.Popen[bytes] | None = None
        self.client: Any = Client(port=self.port, decode_responses=True, socket_timeout=5)

    @property
    def url(self) -> str:
        """Return its URL."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self, *more: str) -> None:
        """Start it; `until(redis.is_up)` waits for it."""
        command = [redis_server(), "--bind", "127.0.0.1", "--port", str(self.port), "--save", "", *self._options, *more]
        self._spawn(command)

    def start_sentinel(self, primary: int) -> None:
        """Start it as the Sentinel of a primary."""
        file = self._directory / "sentinel.conf"
        file.write_text(
            f"port {self.port}\nbind 127.0.0.1\nsentinel monitor {NAME} 127.0.0.1 {primary} 1\n"
            f"sentinel down-after-milliseconds {NAME} {_DOWN_AFTER_MS}\nsentinel failover-timeout {NAME} 3000\n"
        )
        self._spawn([redis_server(), str(file), "--sentinel"])

    def _spawn(self, command: list[str]) -> None:
        with (self._directory / "log").open("ab") as log:
            self._running = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._directory)

    def is_up(self) -> bool:
        """Return whether it answers."""
        return bool(self.client.ping())

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        if self._running is not None and self._running.poll() is None:
            os.kill(self._running.pid, number)

    def kill(self) -> None:
        """End it at once."""
        if self._running is not None and self._running.poll() is None:
            self._running.kill()
            self._running.wait()


class Pair:
    """A primary, its replica and a Sentinel, with a relay that leads to whoever is the primary."""

    def __init__(self, directory: Path) -> None:
        self._servers = [Redis("pair-1", directory), Redis("pair-2", directory)]
        self._sentinel = Redis("sentinel", directory)
        self._primary = self._servers[0]
        self._relay: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._following: asyncio.Task[None] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        """Return the URL of the relay."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def primary(self) -> Redis:
        """Return the server that the relay leads to."""
        return self._primary

    @property
    def replica(self) -> Redis:
        """Return the other one."""
        return self._servers[self._primary is self._servers[0]]

    async def start(self) -> None:
        """Start all of it."""
        first, second = self._servers
        first.start()
        await until(first.is_up, "Redis")
        second.start("--replicaof", f"127.0.0.1 {first.port}")
        self._sentinel.start_sentinel(first.port)
        self._relay = await asyncio.start_server(self._pass_on, "127.0.0.1", 0)
        self.port = self._relay.sockets[0].getsockname()[1]
        await self.settle()
        self._following = asyncio.get_running_loop().create_task(self._follow(), name="follow the primary")

    async def settle(self) -> None:
        """Wait until the replica has what the primary has, and Sentinel knows both."""

        def settled() -> bool:
            linked = self.replica.client.info("replication").get("master_link_status") == "up"
            known = self._sentinel.client.execute_command("SENTINEL", "REPLICAS", NAME)
            return linked and any("slave" in str(each) and "s_down" not in str(each) for each in known)

        await until(settled, "a replica in step")

    async def fail_over(self, *, kill: bool) -> None:
        """Let the replica take over: by order, or because the primary is killed, which then comes back as replica."""
        await self.settle()  # a replica that still has to copy would take over with a part
        old, new = self.primary, self.replica

        def ordered() -> bool:  # Sentinel denies it while it is busy with another one
            return self._primary is new or bool(
                self._sentinel.client.execute_command("SENTINEL", "FAILOVER", NAME, "COORDINATED")
            )

        if kill:
            old.kill()
        else:
            await until(ordered, "an order to fail over")
        try:
            await until(lambda: self._primary is new, "a failover")
        finally:
            if kill and self._primary is new:
                old.start("--replicaof", f"127.0.0.1 {new.port}")
            elif kill:  # what comes after this fault finds a pair
                old.start()
        await until(lambda: new.client.info("replication")["role"] == "master", "a new primary")
        await self.settle()

    async def close(self) -> None:
        """End all of it."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        if self._relay is not None:
            self._relay.close()
            self._drop()
        for each in (*self._servers, self._sentinel):
            each.send_signal(signal.SIGCONT)
            each.kill()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            with contextlib.suppress(RedisError, OSError):
                told = await asyncio.to_thread(self._sentinel.client.sentinel_get_master_addr_by_name, NAME)
                found = next((each for each in self._servers if told and each.port == int(told[1])), self._primary)
                if found is not self._primary:
                    self._primary = found
                    self._drop()

    def _drop(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            there, to = await asyncio.open_connection("127.0.0.1", self._primary.port)
        except OSError:
            writer.transport.abort()
            self._writers.discard(writer)
            return
        self._writers.add(to)
        try:
            await asyncio.gather(_copy(reader, to), _copy(there, writer))
        finally:
            for each in (writer, to):
                each.transport.abort()
                self._writers.discard(each)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # uvloop: a write to a connection that was closed
        while piece := await reader.read(_BUFFER):
            writer.write(piece)
            await writer.drain()
    writer.transport.abort()


class Cluster:
    """Two nodes of a cluster; the first one has every slot but the last."""

    def __init__(self, directory: Path) -> None:
        options = (
            *("--cluster-enabled", "yes", "--cluster-require-full-coverage", "no"),
            *("--cluster-allow-replica-migration", "no", "--appendonly", "yes", "--appendfsync", "always"),
        )
        self._bus_ports = [processes.free_port(), processes.free_port()]  # by default 10,000 above, which may not exist
        self.nodes = [
            Redis(name, directory, *options, "--cluster-port", str(bus_port))
            for name, bus_port in zip(("node-1", "node-2"), self._bus_ports, strict=True)
        ]

    async def start(self) -> None:
        """Start both nodes, and let them meet."""
        first, second = self.nodes
        for node in self.nodes:
            node.start()
            await until(node.is_up, "a node")
        first.client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16_382)
        second.client.execute_command("CLUSTER", "ADDSLOTS", 16_383)
        first.client.execute_command("CLUSTER", "MEET", "127.0.0.1", second.port, self._bus_ports[1])
        for node in self.nodes:
            await until(functools.partial(self._is_well, node), "a cluster")

    async def move(self, there: bool) -> None:
        """Move every slot but the last to the second node, or back."""
        source, target = self.nodes if there else self.nodes[::-1]
        name = target.client.execute_command("CLUSTER", "MYID")
        source.client.execute_command("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", 0, 16_382, "NODE", name)

        def moved() -> bool:
            latest = source.client.execute_command("CLUSTER", "GETSLOTMIGRATIONS")[0]
            if latest["state"] in ("failed", "canceled"):
                raise processes.ProcessError(f"resharding {latest['state']}: {latest['message']}")
            return bool(latest["state"] == "success")

        await until(moved, "resharding")

    def close(self) -> None:
        """End both nodes."""
        for node in self.nodes:
            node.send_signal(signal.SIGCONT)
            node.kill()

    @staticmethod
    def _is_well(node: Redis) -> bool:
        return "cluster_state:ok" in str(node.client.execute_command("CLUSTER", "INFO"))
