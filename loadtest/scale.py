"""`scale`: the longest step of the loop of an edge with ten thousand routes and a hundred thousand keys and users.

The edge runs in this process, on asyncio's own loop, whose every step is timed in CPU of its thread: other programs on
the machine do not count. Of several tries the median is told. Who waits for the loop waits for its longest step.
"""

import argparse
import asyncio
import gc
import hashlib
import os
import socket
import statistics
import tempfile
import time
from asyncio.events import Handle
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from edge.exchange import End, Exchange, Principal
from edge.keys.cache import Entry
from edge.keys.caller import Caller
from edge.keys.stores.registry import KeyRegistry
from edge.process.server import Server
from edge.tasks import in_steps
from loadtest.target import positive

_STEP_MS: Final = 10.0  # what nobody else's doing may take the loop
_SCRAPE_MS: Final = 5.0  # every 15 s
_START_S: Final = 1.5
_TRIES: Final = 5
_HOSTS: Final = 300
_USER: Final = "u-1100a15812cc"
_PATIENCE_S: Final = 120.0
_TURNS: Final = 1000  # of the loop, in which what follows a reload is done
_HEAD: Final = """
[server]
listen = "127.0.0.1:0"
admin = "127.0.0.1:0"
shutdown_delay = "0s"
max_metric_labels = 1000
[keys]
store = "sqlite:keys.db"
[usage]
journal = "usage"
[limits.standard]
requests_per_minute = 1_000_000_000
"""


@dataclass(frozen=True, slots=True)
class Figure:
    """What was measured of something, and what it may take."""

    text: str
    measured: float
    limit: float
    unit: str = "ms"

    @property
    def is_over(self) -> bool:
        """Whether it takes too long."""
        return self.measured > self.limit

    def __str__(self) -> str:
        verdict = "OVER" if self.is_over else "ok"
        return f"{self.text:<44} {self.measured:8.2f} {self.unit:<2}  limit {self.limit:5.1f}  {verdict}"


class Steps:
    """The longest step of the loop while it is entered, in ms of its thread's CPU."""

    def __init__(self) -> None:
        self.longest_ms = 0.0
        self._run = Handle._run

    def __enter__(self) -> Self:
        run = self._run

        def timed(handle: Any) -> None:
            began = time.thread_time()
            run(handle)
            self.longest_ms = max(self.longest_ms, (time.thread_time() - began) * 1e3)

        Handle._run = timed  # type: ignore[assignment,method-assign]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        Handle._run = self._run  # type: ignore[method-assign]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `scale`."""
    for name, count in (("--routes", 10_000), ("--pools", 2_000), ("--keys", 100_000)):
        parser.add_argument(name, type=positive, default=count, metavar="N", help="default: %(default)s")


def main(arguments: argparse.Namespace) -> int:
    """Measure; return 0, or 1 when something takes too long."""
    found = asyncio.run(_measured(arguments.routes, arguments.pools, arguments.keys))
    for figure in found:
        print(figure)
    return int(any(figure.is_over for figure in found))


def routes_toml(routes: int, pools: int, version: int = 0) -> str:
    """Return a file of so many routes; another version of it differs in every route and no pool."""
    lines = [_HEAD]
    for number in range(pools):
        host = f"{number // 65536}.{number // 256 % 256}.{number % 256}"
        lines.append(f'[pools.p{number}]\nendpoints = ["http://10.{host}:8000", "http://11.{host}:8000"]')
    for number in range(routes):
        lines.append(
            f'[routes."public/model-{number}"]\npool = "p{number % pools}"\nmetered = true\nlimit = "standard"'
        )
        lines.append(f"context_length = {4096 + version}")
    return "\n".join(lines)


async def _measured(routes: int, pools: int, keys: int) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="edge-scale-") as name:
        path = Path(name) / "routes.toml"
        path.write_text(routes_toml(routes, pools))
        with KeyRegistry(path.parent / "keys.db") as registry:
            key, _ = registry.create(_USER)
        began = time.process_time()
        async with _serving(path) as server:
            figures = [
                Figure(f"start with {routes} routes, without imports", time.process_time() - began, _START_S, "s")
            ]
            clients, admin = (int(each.rpartition(":")[2]) for each in (server.addresses[0], server.admin_address))
            bearer = f"Authorization: Bearer {key}\r\n"

            async def name_hosts() -> None:
                for number in range(_HOSTS):
                    host = f"made-up-{number}-{time.monotonic_ns()}.example"
                    await _ask(clients, "GET /v1/models/none", bearer, host, status=404)

            async def forget_idle() -> None:
                await in_steps(server.admission.forget_idle())

            version = 0

            async def reload() -> None:
                nonlocal version
                version += 1
                await asyncio.to_thread(path.write_text, routes_toml(routes, pools, version))
                await _reloaded(server)

            list_models = partial(_ask, clients, "GET /v1/models", bearer)
            scrape, ask_readiness = (partial(_ask, admin, f"GET {at}") for at in ("/metrics", "/readyz?verbose"))
            revoke, purge = (partial(_ask, admin, f"POST /keys/purge{whose}") for whose in ("?user=u-7", ""))
            figures.append(await _longest(f"a list of {routes} models", list_models))
            figures.append(await _longest(f"{_HOSTS} hosts that nobody named before", name_hosts))
            await asyncio.to_thread(_observe_all, server)
            figures.append(await _longest("a scrape after requests at every route", scrape, _SCRAPE_MS))
            figures.append(await _longest("/readyz?verbose", ask_readiness))
            figures.append(await _longest("a reload that changes every route", reload))
            await asyncio.to_thread(_remember, server, keys)
            figures.append(await _longest(f"a user's keys revoked, of {keys}", revoke))
            figures.append(await _longest(f"all of {keys} keys to be asked for anew", purge))
            figures.append(await _longest(f"idle ones of {keys} counters forgotten", forget_idle))
        return figures


@asynccontextmanager
async def _serving(path: Path) -> AsyncIterator[Server]:
    ready = asyncio.Event()
    log = os.open(os.devnull, os.O_WRONLY)
    try:
        server = Server(path, log_to=log)
        running = asyncio.get_running_loop().create_task(server.run(lambda _: ready.set()), name="edge")
        running.add_done_callback(lambda _: ready.set())
        await ready.wait()
        if running.done():
            running.result()
        yield server
        server.stop()
        await running
    finally:
        os.close(log)


async def _longest(text: str, act: Callable[[], Awaitable[None]], limit_ms: float = _STEP_MS) -> Figure:
    """Return the longest step while something is done, the median of several tries."""
    tries = []
    for _ in range(_TRIES):
        gc.collect()
        await asyncio.sleep(0)  # behind the step that collected
        with Steps() as steps:
            await act()
        tries.append(steps.longest_ms)
    return Figure(text, statistics.median(tries), limit_ms)


async def _ask(port: int, line: str, headers: str = "", host: str = "localhost", status: int = 200) -> None:
    """Ask once, on a thread of its own; raises `RuntimeError` for another answer than this status."""
    head = f"{line} HTTP/1.1\r\nHost: {host}\r\n{headers}Connection: close\r\nContent-Length: 0\r\n\r\n"

    def ask() -> bytes:
        with socket.create_connection(("127.0.0.1", port), _PATIENCE_S) as client:
            client.sendall(head.encode())
            return b"".join(iter(lambda: client.recv(1 << 20), b""))

    answer = await asyncio.to_thread(ask)
    if not answer.startswith(b"HTTP/1.1 %d " % status):
        raise RuntimeError(f"{line} was answered: {answer[:200]!r}")


async def _reloaded(server: Server) -> None:
    """Reload, and return when the generation of before is freed too."""
    before = server.generation.number
    server.reload()
    async with asyncio.timeout(_PATIENCE_S):
        while server.generation.number == before:
            if server.readiness.reload_failed:
                raise RuntimeError(server.readiness.reload_failed)
            await asyncio.sleep(0.02)
    for _ in range(_TURNS):
        await asyncio.sleep(0)


def _observe_all(server: Server) -> None:
    """Let a request count at every route."""
    for route in server.generation.config.routes:
        exchange = Exchange("r", "POST", time.time(), time.monotonic())
        exchange.route, exchange.status = route.name, 200
        exchange.ended(End.COMPLETE)
        server.metrics.observe(exchange)


def _remember(server: Server, count: int) -> None:
    """Have so many keys known, and as many counters in use."""
    cache, now = server.authenticator._known, time.monotonic()
    for number in range(count):
        entry = Entry(Caller(Principal(f"key_{number}", f"u-{number}")), now + 3600, now + 3600, now + 7200)
        cache.put(hashlib.sha256(b"%d" % number).digest(), entry, now)
        server.admission.admit("public/model-0", ("standard",), f"u-{number}", f"key_{number}", 10).charge(5)
