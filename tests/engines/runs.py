"""Asks an engine through an edge, and brings together what the edge recorded and what the engine counted."""

import asyncio
import os
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import aiohttp

from loadtest.processes import free_port
from tests.engines.cases import CASES, Case
from tests.engines.cutting import cutting
from tests.engines.edge_process import MODES, Edge, edge
from tests.engines.engine import Counts, Engine, Server
from tests.engines.processes import running
from tests.engines.told import told

_AT_ONCE: Final = 4
_READY_WITHIN_S: Final = 300.0
_IDLE_WITHIN_S: Final = 120.0
_IDLE_POLL_S: Final = 0.5  # two equal readings so far apart, with nothing running: the engine is idle
_WARM_UP: Final = 3


@dataclass(frozen=True)
class Outcome:
    """The requests of one case in one mode.

    `counted` by the engine, but for cached tokens. `ends` and `sources`: how often each stands in the records.
    """

    engine: str
    case: Case
    mode: str
    requests: int
    recorded: Counts
    counted: Counts
    ends: Mapping[str, int]
    sources: Mapping[str, int]


async def play(engine: Engine, home: Path, requests: int, only: set[str]) -> list[Outcome]:
    """Return what came of every case that the engine serves, in each mode that makes a difference to it."""
    outcomes = []
    for server in engine.servers(home):
        cases = [case for case in CASES if case.path in server.paths and (not only or case.name in only)]
        async with _served(engine, server, home) as (front, url):
            for case in cases:
                for mode in MODES if case.stream else MODES[:1]:
                    run = _Run(engine, server, front, url, case, mode, requests)
                    outcomes.append(await run.outcome())
    return outcomes


@asynccontextmanager
async def _served(engine: Engine, server: Server, home: Path) -> AsyncIterator[tuple[Edge, str]]:
    async with running_server(server, home) as port, cutting(port) as cut_port:
        with TemporaryDirectory(prefix="edge-") as directory:
            async with edge(Path(directory), engine.dialect, server.model, port, cut_port) as front:
                yield front, f"http://127.0.0.1:{port}"


@asynccontextmanager
async def running_server(server: Server, home: Path) -> AsyncIterator[int]:
    """Run a server of an engine; return its port."""
    port = free_port()
    async with running_at(port, server, home, home / "models", _READY_WITHIN_S):
        yield port


@asynccontextmanager
async def running_at(
    port: int, server: Server, home: Path, directory: Path, within_s: float
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a server of an engine in a directory that has its models."""
    environment = {**os.environ, "PATH": f"{home / 'bin'}:{os.environ['PATH']}", **server.environment}
    ready = f"http://127.0.0.1:{port}{server.ready}"
    async with running(server.command(port), ready, directory, environment, within_s) as process:
        yield process


class _Run:
    """One case in one mode, asked a number of times."""

    def __init__(
        self, engine: Engine, server: Server, front: Edge, url: str, case: Case, mode: str, requests: int
    ) -> None:
        self._engine, self._server, self._edge, self._url = engine, server, front, url
        self._case, self._mode, self._requests = case, mode, requests
        self._model = f"public/{mode}{'-cut' if case.goes == 'breaks' else ''}"
        # Where what an engine tells its client counts, each client asks for it: the numbers are odd.
        self._step = 1 if server.counters is not None else 2
        self._first = zlib.crc32(self._prefix.encode()) & ~1 | (self._step - 1)  # no two runs ask the same
        self._told = Counts()

    async def outcome(self) -> Outcome:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(300)) as session:
            for number in range(_WARM_UP):
                await self._ask(session, number, "warm")
            before = await self._counted(session)
            self._told = Counts()
            at_once = asyncio.Semaphore(_AT_ONCE)

            async def ask(number: int) -> None:
                async with at_once:
                    await self._ask(session, number, self._prefix)

            async with asyncio.TaskGroup() as tasks:
                for number in range(0, self._requests * self._step, self._step):
                    tasks.create_task(ask(number))
            after = await self._counted(session)
        records = await self._edge.records(f"{self._prefix}.", self._requests)
        recorded = sum(map(_counts_of, records), Counts())
        counters = self._server.counters
        counted = after - before if counters is not None else self._told
        if counters is not None and counters.leaves_out_cached:
            counted += Counts(prompt=recorded.cached)
        return Outcome(
            self._engine.name, self._case, self._mode, self._requests, recorded, counted,
            Counter(record["end"] for record in records), Counter(record["usage_source"] for record in records),
        )  # fmt: skip

    @property
    def _prefix(self) -> str:
        name = "".join(letter if letter.isalnum() else "-" for letter in self._case.name)
        return f"{self._mode}.{name}"

    async def _ask(self, session: aiohttp.ClientSession, number: int, prefix: str) -> None:
        """Send one request and read its answer as far as the case has it."""
        body: dict[str, Any] = {"model": self._model} | self._case.body(self._first + number)
        if self._case.goes == "fails":
            body |= self._engine.fails
        elif self._case.goes != "whole":
            body |= self._engine.cut
        headers = {"authorization": f"Bearer {self._edge.key}", "x-request-id": f"{prefix}.{number}"}
        try:
            async with session.post(self._edge.url + self._case.path, json=body, headers=headers) as answer:
                if self._case.goes == "client leaves":
                    await _read_events(answer, self._case.leaves_after(number))
                    answer.close()
                else:
                    content = await answer.read()
                    self._told += told(content)
        except aiohttp.ClientPayloadError:
            pass  # a stream that broke

    async def _counted(self, session: aiohttp.ClientSession) -> Counts:
        """Return the engine's own counts once it is idle."""
        counters, last = self._server.counters, None
        if counters is None:
            return Counts()
        async with asyncio.timeout(_IDLE_WITHIN_S):
            while True:
                now, is_busy = await counters.read(session, self._url)
                if now == last and not is_busy:
                    return now
                last = now
                await asyncio.sleep(_IDLE_POLL_S)


async def _read_events(answer: aiohttp.ClientResponse, count: int) -> None:
    seen = 0
    async for line in answer.content:
        seen += line.startswith(b"data:")
        if seen == count:
            return


def _counts_of(record: dict[str, Any]) -> Counts:
    return Counts(record["prompt_tokens"], record["cached_tokens"], record["completion_tokens"])
