"""What `chaos` breaks: simulated engines, two edges, their sinks and Redis servers, all of this process's own.

The edge `mortal` is killed and stopped again and again; its keys are in a cluster, its records go to a sink over HTTP.
The edge `steady` lives to the end, so that what grows is seen; its keys, its limits and its records are in the pair of
Redis servers under Sentinel. Both have the same pools: vLLM (two engines, one of them across a cable where the machine
allows it), SGLang and llama.cpp. Streams of vLLM that break go on at the other engine.
"""

import asyncio
import contextlib
import hashlib
import secrets
import signal
import socket
from collections import defaultdict
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import orjson
from aiohttp import web

from edge.keys.stores.redis import FORMAT, KEY_PREFIX, MARKER
from edge.simulator.behaviour import Behaviour, Dialect, Text
from edge.simulator.server import Simulator
from loadtest import processes
from loadtest.chaos.ledger import Given, Journal
from loadtest.chaos.places import Clock, Denied, Disk, Island
from loadtest.chaos.servers import Cluster, Pair, until
from loadtest.chaos.traffic import ID
from loadtest.edges import Edge
from loadtest.peers.peer import ROOT

USER: Final = "u-chaos"
STOP_PATIENCE_S: Final = 30.0  # the edge's own: drain_timeout and ten seconds
_KEPT: Final = 10**6  # requests of an engine between two collections
_BATCH: Final = 1_000
_STARTS: Final = 5  # of the last process, until everything is delivered
_CONFIG: Final = """
[server]
listen = "127.0.0.1:0"
admin = "127.0.0.1:${{ADMIN_PORT}}"
shutdown_delay = "0s"
drain_timeout = "2s"
[keys]
store = "{store}"
store_timeout = "500ms"
[usage]
journal = "{journal}"
sink = "{sink}"
{replicas}
rotate = "1MB"
{shared}
[limits.many]
requests_per_minute = 1_000_000_000
tokens_per_minute = 1_000_000_000_000
concurrent_requests = 100_000
[pools.v]
endpoints = ["{v}", "{island}"]
usage = "{usage}"
hedge_after = "15ms"
resume = "auto"
retry_budget = 1.0
{times}
[pools.s]
endpoints = ["{s}"]
engine = "sglang"
{times}
[pools.l]
endpoints = ["{l}"]
engine = "llamacpp"
{times}
[routes."public/v"]
pool = "v"
metered = true
limit = "many"
[routes."public/s"]
pool = "s"
metered = true
limit = "many"
[routes."public/l"]
pool = "l"
metered = true
limit = "many"
"""
_TIMES: Final = """
connect_timeout = "500ms"
first_byte_timeout = "4s"
idle_timeout = "2s"
max_connection_age = "10s"
"""


class Sink:
    """Takes batches over HTTP; of four one is refused and one is stored and told as failed. It may be down."""

    def __init__(self) -> None:
        self.records: dict[str, Any] = {}
        self.received = 0
        self.differing = 0
        self.is_down = False
        self._batches = 0
        self._runner = web.ServerRunner(web.Server(self._take))

    async def start(self) -> str:
        """Listen; return its URL."""
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}/usage"

    async def close(self) -> None:
        """Listen no more."""
        await self._runner.cleanup()

    async def _take(self, request: web.BaseRequest) -> web.StreamResponse:
        self._batches += 1
        if self.is_down or self._batches % 4 == 1:
            return web.Response(status=503)
        for record in orjson.loads(await request.read())["records"]:
            self.received += 1
            self.differing += self.records.setdefault(record["id"], record) != record
        return web.Response(status=500 if self._batches % 4 == 2 else 200)


@dataclass(slots=True)
class Census:
    """What a process has at rest."""

    memory_bytes: int
    descriptors: int
    tasks: int


class World:
    """Everything that runs; `why` has, by name, why a part is absent."""

    def __init__(self, directory: Path, faketime: list[Path]) -> None:
        self.directory = directory
        self.why: dict[str, str] = {}
        self.sink = Sink()
        self.pair = Pair(directory)
        self.cluster = Cluster(directory)
        self.key = "sk-" + secrets.token_hex(24)
        self.engines: dict[str, Simulator] = {}
        self.journals = {name: Journal(name) for name in ("mortal", "steady")}
        self.edges: dict[str, Edge] = {}
        self.ports: dict[str, int] = {}
        self.given: dict[str, list[Given]] = defaultdict(list)
        self.island: Island | None = None
        self.disk: Disk | None = None
        self.clock: Clock | None = None
        self._stack = AsyncExitStack()
        self._faketime = faketime

    async def start(self) -> None:
        """Start all of it; raises `ProcessError`. `close` follows in any case."""
        self._find_places()
        await self._start_engines()
        sink = await self.sink.start()
        self._stack.push_async_callback(self.sink.close)
        self._stack.push_async_callback(self.pair.close)
        await self.pair.start()
        self._stack.callback(self.cluster.close)
        await self.cluster.start()
        node = self.cluster.nodes[0]
        for client in (self.pair.primary.client, node.client):
            digest = hashlib.sha256(self.key.encode()).hexdigest()
            client.hset(KEY_PREFIX + digest, mapping={"id": "key_chaos", "user": USER})
            client.set(MARKER, FORMAT)
        self._start_edge("mortal", store=node.url, sink=sink, replicas="", shared="", usage="continuous")
        url, replicas = self.pair.url, "sink_replicas = 1"  # else a failover may lose what the primary acknowledged
        shared = f'[shared]\nredis = "{url}"'
        self._start_edge("steady", store=url, sink=url, replicas=replicas, shared=shared, usage="final")
        await asyncio.gather(*(asyncio.to_thread(edge.start) for edge in self.edges.values()))

    async def close(self) -> None:
        """End all of it."""
        await self._stack.aclose()

    def _find_places(self) -> None:
        try:
            self.island = Island()
            self._stack.callback(self.island.close)
        except Denied as error:
            self.why["partition"] = str(error)
        try:
            self.disk = Disk(self.directory / "disk")
            self._stack.callback(self.disk.close)
        except Denied as error:
            self.why["full disk"] = str(error)
        library = Clock.library(self._faketime)
        if library is None:
            self.why["clock steps"] = "needs libfaketime: apt install libfaketime, or --faketime FILE"
        else:
            self.clock = Clock(library, self.directory)

    async def _start_engines(self) -> None:
        dialects: dict[str, Dialect] = {"v": "vllm", "island": "vllm", "s": "sglang", "l": "llamacpp"}
        for name, dialect in dialects.items():
            text: Text = "prompt" if dialect == "vllm" else "plain"  # which somebody else can go on with
            engine = self.engines[name] = Simulator(Behaviour(dialect, text=text), keep_requests=_KEPT)
            self._stack.push_async_callback(engine.close)
            inside = self.island.listening() if name == "island" and self.island is not None else None
            await (engine.start(sock=inside) if inside is not None else engine.start())

    def _start_edge(self, name: str, *, store: str, sink: str, replicas: str, shared: str, usage: str) -> None:
        directory = self.directory / name
        directory.mkdir()
        is_on_disk = name == "steady" and self.disk is not None
        journal = self.disk.directory / "usage" if is_on_disk and self.disk is not None else directory / "usage"
        urls = {each: engine.url for each, engine in self.engines.items()}
        own = {"store": store, "sink": sink, "replicas": replicas, "shared": shared, "usage": usage}
        text = _CONFIG.format(journal=journal, times=_TIMES, **own, **urls)
        (directory / "routes.toml").write_text(text)
        listening = self._stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096))
        command = ("-m", "loadtest.census", str(directory / "tasks"), "serve", "--config", "routes.toml")
        environment = self.clock.environment if self.clock is not None else None
        edge = Edge(1, ROOT, directory, listening, command=command, environment=environment)
        self.edges[name], self.ports[name] = edge, listening.getsockname()[1]
        self._stack.callback(edge.kill)

    def collect(self) -> None:
        """Take what engines gave to requests that have ended."""
        for engine in self.engines.values():
            running, endpoint = [], urlsplit(engine.url).netloc
            for each in engine.requests:
                if not each.ended:
                    running.append(each)
                elif "tokenize" not in each.path and (found := ID.search(each.body)):
                    attempt = Given(each.started, each.tokens, each.outcome, endpoint, each.prompt_tokens)
                    self.given[found[1].decode()].append(attempt)
            engine.requests.clear()
            engine.requests.extend(running)

    async def census(self, name: str) -> Census:
        """Count what an edge has now."""
        pid, file = self.edges[name].pid, self.directory / name / "tasks"
        file.unlink(missing_ok=True)
        self.edges[name].send_signal(signal.SIGUSR1)
        await until(file.exists, "the tasks of an edge")
        memory_bytes = await asyncio.to_thread(processes.pss_bytes, [pid])
        return Census(memory_bytes, processes.descriptors([pid]), int(file.read_text()))

    async def deliver_all(self) -> list[str]:
        """Stop both edges, start and stop them until everything is delivered; return what did not go in order."""
        found = []
        for name, edge in self.edges.items():
            for _ in range(_STARTS):
                code, took_s = await asyncio.to_thread(edge.stop, STOP_PATIENCE_S)
                if code != 0:
                    found.append(f"{name}: the last stop ended with {code} after {took_s:.1f} s: {edge.last_words()}")
                if not list(self.journal_of(name).glob("*.lock")):
                    break
                await asyncio.to_thread(edge.start)
            edge.kill()
        self.collect()
        for attempts in self.given.values():
            attempts.sort(key=lambda each: each.started)
        for name, journal in self.journals.items():
            journal.read(self.journal_of(name))
            found += [f"{name}: a defect in its log: {line}" for line in self._defects(name)]
        self.journals["mortal"].delivered = self.sink.records
        self.journals["steady"].delivered = self._shipped_to_redis()
        if self.sink.differing:
            found.append(f"{self.sink.differing} records came again and differed")
        return found

    def journal_of(self, name: str) -> Path:
        """Return the directory of an edge's records."""
        return self.disk.directory / "usage" if name == "steady" and self.disk else self.directory / name / "usage"

    def _defects(self, name: str) -> list[str]:
        found = []
        for line in (self.directory / name / "edge1.log").read_bytes().splitlines():
            with contextlib.suppress(orjson.JSONDecodeError):
                if isinstance(told := orjson.loads(line), dict) and told.get("stack"):
                    found.append(f"{told['message']}: {told['stack'][-300:]}")
        return found[:3]

    def _shipped_to_redis(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        first = "-"
        while entries := self.pair.primary.client.xrange("edge:usage", min=first, count=_BATCH):
            for entry, fields in entries:
                found.setdefault(fields["id"], orjson.loads(fields["record"]))
                first = f"({entry}"
        return found
