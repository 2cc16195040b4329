"""`watched`: what streams wait because operators watch: browsers on the status page, and Prometheus.

Streams go through one edge, whose turns are measured in CPU of its loop: first alone, then with browsers that follow
the page's events and with scrapes. The longest turn of each second is measured, and of all seconds the
second longest counts, as a machine that others use makes one long by itself: who watches may add 5 ms to it.
"""

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import sys
import time
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp

from edge.simulator.behaviour import Behaviour
from edge.simulator.server import Simulator
from loadtest import turns
from loadtest.edges import SERVER, Edge, create_key, run_apart
from loadtest.peers.peer import ROOT
from loadtest.target import positive

_MOST_MS: Final = 5.0  # that those who watch may cost a stream
_STOP_PATIENCE_S: Final = 30.0
_WINDOW_S: Final = 1.0
_INTERVAL_MS: Final = 250
_BODY: Final = {"model": "public/m", "messages": [], "stream": True}
_CONFIG: Final = """
[usage]
journal = "usage"
[pools.p]
endpoints = ["{url}"]
[routes."public/m"]
pool = "p"
metered = true
"""


class Turns:
    """The longest turns of an edge's loop, by the file that `turns.py` writes."""

    def __init__(self, file: Path) -> None:
        self._file = file

    async def longest_ms(self, seconds: int) -> list[float]:
        """Return the longest turn of each of so many seconds from now, in ms of CPU."""
        found = []
        for _ in range(seconds):
            with self._file.open("r+b") as file:
                file.write(bytes(8))
            await asyncio.sleep(_WINDOW_S)
            found.append(int.from_bytes(self._file.read_bytes(), sys.byteorder) / 1e6)
        return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `watched`."""
    add = partial(parser.add_argument, type=positive, metavar="N")
    add("--streams", default=500, help="at once; default: %(default)s")
    add("--browsers", default=20, help="with the status page open; default: %(default)s")
    add("--scrapes", default=10, help="of the metrics, a second; default: %(default)s")
    add("--seconds", default=20, help="of each part; default: %(default)s")


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; return 0, 1 when who watches costs a stream too much, 2 when a part does not start."""
    return run_apart("watched", partial(_run, arguments=arguments))


async def _run(directory: Path, arguments: argparse.Namespace) -> int:
    models = Simulator(Behaviour(ttft_ms=1, interval_ms=_INTERVAL_MS, jitter=0.5, tokens=4000), keep_requests=1)
    await models.start()
    (directory / "routes.toml").write_text(SERVER + _CONFIG.format(url=models.url))
    key = await asyncio.to_thread(create_key, ROOT, directory)
    file = directory / "turns"
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listening:
        command = (turns.__file__, str(file), "serve", "--config", "routes.toml")
        edge = Edge(1, ROOT, directory, listening, command=command)
        try:
            await asyncio.to_thread(edge.start)
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            return await _measure(Turns(file), edge, url, key, arguments)
        finally:
            await asyncio.to_thread(edge.stop, _STOP_PATIENCE_S)
            await models.close()


async def _measure(loop: Turns, edge: Edge, url: str, key: str, arguments: argparse.Namespace) -> int:
    admin, seconds = f"http://127.0.0.1:{edge.admin_port}", arguments.seconds
    scrapes_s: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session, _Tasks() as streams:
        for _ in range(arguments.streams):
            streams.begin(_follow(session, f"{url}/v1/chat/completions", key))
        await asyncio.sleep(2 * _WINDOW_S)
        before_s = _cpu_s(edge.pid)
        alone = await loop.longest_ms(seconds)
        alone_s = _cpu_s(edge.pid) - before_s
        async with _Tasks() as watching:
            for _ in range(arguments.browsers):
                watching.begin(_follow(session, f"{admin}/status/events"))
            watching.begin(_scrape(session, f"{admin}/metrics", 1 / arguments.scrapes, scrapes_s))
            await asyncio.sleep(_WINDOW_S)
            before_s = _cpu_s(edge.pid)
            watched = await loop.longest_ms(seconds)
            watched_s = _cpu_s(edge.pid) - before_s
            watching.check()
        streams.check()
    print(
        f"{'longest turn of each second, ms of CPU':40} {'median':>7} {'counts':>7} {'most':>7} {'CPU of the edge':>16}"
    )
    for name, found, cpu_s in (("streams alone", alone, alone_s), ("watched", watched, watched_s)):
        figures = " ".join(f"{each:7.2f}" for each in (statistics.median(found), _second_longest(found), max(found)))
        print(f"{name:40} {figures} {cpu_s / seconds:>16.0%}")
    print(f"{len(scrapes_s)} scrapes, {arguments.browsers} browsers, {arguments.streams} streams")
    added_ms = _second_longest(watched) - _second_longest(alone)
    print(f"{added_ms:.2f} ms more at most, {'ok' if added_ms <= _MOST_MS else 'NOT OK'}")
    return int(added_ms > _MOST_MS)


def _second_longest(found: list[float]) -> float:
    return sorted(found)[-2:][0]


class _Tasks(contextlib.AsyncExitStack):
    """Tasks that go on until the end of the `with`."""

    def __init__(self) -> None:
        super().__init__()
        self._tasks: list[asyncio.Task[None]] = []
        self.push_async_callback(self._end)

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work))

    def check(self) -> None:
        """Raise what a task has raised; none may have ended."""
        for each in self._tasks:
            if each.done():
                each.result()
                raise RuntimeError("a stream ended while it was measured: take fewer --seconds")

    async def _end(self) -> None:
        for each in self._tasks:
            each.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _follow(session: aiohttp.ClientSession, url: str, key: str = "") -> None:
    """Read a stream until it ends: a model's where there is a key, else that of the status page."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    method, body = ("POST", _BODY) if key else ("GET", None)
    timeout = aiohttp.ClientTimeout(total=None)
    async with session.request(method, url, json=body, headers=headers, timeout=timeout) as answer:
        answer.raise_for_status()
        async for _ in answer.content.iter_any():
            pass


async def _scrape(session: aiohttp.ClientSession, url: str, interval_s: float, took_s: list[float]) -> None:
    while True:
        begun = time.monotonic()
        async with session.get(url) as answer:
            answer.raise_for_status()
            await answer.read()
        took_s.append(time.monotonic() - begun)
        await asyncio.sleep(max(interval_s - took_s[-1], 0))


def _cpu_s(pid: int) -> float:
    """Return the seconds of CPU that a process took so far, those of the system for it included (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
