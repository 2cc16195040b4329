"""`hedging`: how long the first tokens of streams take where a few prompts stall, with and without a second endpoint.

Two edges run side by side, one of them with `hedge_after`, each before simulated engines of its own that draw alike. An
engine begins to answer after some 100 ms, by a lognormal; a share of what it is asked stalls for 2 s more, whatever is
asked, so the same prompt does not stall at the next one. The first requests let the pool measure, and do not count.
"""

import argparse
import asyncio
import random
import socket
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import aiohttp

from edge.simulator.behaviour import Behaviour
from edge.simulator.server import Simulator
from loadtest.edges import SERVER, Edge, create_key
from loadtest.peers.peer import ROOT
from loadtest.processes import ProcessError
from loadtest.target import positive

_WARMUP: Final = 200
_MEDIAN_S: Final = 0.1
_SPREAD: Final = 0.3
_STALL_S: Final = 2.0
_CONFIG: Final = """
[pools.members]
endpoints = {endpoints}
{hedge}
[routes."public/m"]
pool = "members"
"""


class _Engine(Simulator):
    """An engine that stalls at random."""

    def __init__(self, stalls: float, seed: int) -> None:
        super().__init__(Behaviour(tokens=16, interval_ms=5), keep_requests=1_000_000)
        self._stalls = stalls
        self._draw = random.Random(seed)

    def _delay_s(self, *_: Any) -> float:
        stall_s = _STALL_S if self._draw.random() < self._stalls else 0.0
        return stall_s + _MEDIAN_S * self._draw.lognormvariate(0, _SPREAD)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hedging`."""
    add = parser.add_argument
    add("--requests", type=positive, default=2000, metavar="N", help="of each edge; default: %(default)s")
    add("--rate", type=float, default=20, metavar="N", help="requests a second of each; default: %(default)s")
    add("--stalls", type=float, default=0.02, metavar="SHARE", help="of what is asked; default: %(default)s")
    add("--members", type=positive, default=4, metavar="N", help="engines of each edge; default: %(default)s")
    add("--hedge-after", default="p95", metavar="TIME", help="default: %(default)s")
    add("--seed", type=int, default=1, metavar="N", help="another one draws other times; default: 1")


def main(arguments: argparse.Namespace) -> int:
    """Measure both, and print; return 0, 1 when an answer failed, 2 when an edge did not start."""
    try:
        return asyncio.run(_compare(arguments))
    except ProcessError as error:
        print(f"loadtest hedging: {error}", file=sys.stderr)
        return 2


async def _compare(arguments: argparse.Namespace) -> int:
    hedges = {"without": "", f"after {arguments.hedge_after}": f'hedge_after = "{arguments.hedge_after}"'}
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        runs = {}
        for name, hedge in hedges.items():
            engines = [_Engine(arguments.stalls, arguments.seed + number) for number in range(arguments.members)]
            for engine in engines:
                await engine.start()
                stack.push_async_callback(engine.close)
            made = tempfile.TemporaryDirectory(prefix="loadtest-hedging-", ignore_cleanup_errors=True)
            directory = Path(stack.enter_context(made))
            text = SERVER + _CONFIG.format(endpoints=[each.url for each in engines], hedge=hedge)
            (directory / "routes.toml").write_text(text)
            key = create_key(ROOT, directory)
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))
            edge = Edge(0, ROOT, directory, listening)
            stack.callback(edge.kill)
            await asyncio.to_thread(edge.start)
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/chat/completions"
            runs[name] = engines, url, key
        played = {
            name: (engines, group.create_task(_play(arguments, url, key))) for name, (engines, url, key) in runs.items()
        }
        print(f"{'hedge':12} {'p50 s':>7} {'p90 s':>7} {'p95 s':>7} {'p99 s':>7} {'p99.9 s':>7} {'extra':>7} failed")
        failed = 0
        for name, (engines, task) in played.items():
            times = await task
            answered = sorted(each for each in times[_WARMUP:] if each is not None)
            failed += times.count(None)
            at = [answered[int(share * len(answered))] for share in (0.5, 0.9, 0.95, 0.99, 0.999)]
            extra = sum(len(engine.requests) for engine in engines) / len(times) - 1
            print(f"{name:12} {' '.join(f'{each:7.3f}' for each in at)} {extra:7.1%} {times.count(None):6}")
    return int(failed > 0)


async def _play(arguments: argparse.Namespace, url: str, key: str) -> list[float | None]:
    """Return what the first token of each stream took, in seconds, None of one that failed."""
    draw = random.Random(arguments.seed)
    headers = {"Authorization": f"Bearer {key}"}
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as session,
        asyncio.TaskGroup() as group,
    ):
        asked = []
        for number in range(_WARMUP + arguments.requests):
            asked.append(group.create_task(_first_token_s(session, url, f"question {number}")))
            await asyncio.sleep(draw.expovariate(arguments.rate))
    return [task.result() for task in asked]


async def _first_token_s(session: aiohttp.ClientSession, url: str, text: str) -> float | None:
    body = {"model": "public/m", "stream": True, "messages": [{"role": "user", "content": text}]}
    began, first_s, last = time.monotonic(), None, b""
    try:
        async with session.post(url, json=body) as answer:
            async for line in answer.content:
                if b'"content"' in line and first_s is None:
                    first_s = time.monotonic() - began
                last = line.strip() or last
    except aiohttp.ClientError:
        return None
    return first_s if last == b"data: [DONE]" else None
