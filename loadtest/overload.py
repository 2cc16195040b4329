"""`overload`: three times as much as a pool can serve, and back: what is served, what a refusal costs (Linux).

An engine that takes eight requests at once stands behind one edge. Clients in a closed loop find its capacity; an open
loop asks for three times that, then for seven tenths. Exit 1 when less than 80 % of the capacity is served meanwhile,
when somebody is refused more than 10 s later, or when a refusal takes a third of the CPU of a served request.
"""

import argparse
import asyncio
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import aiohttp

from edge.simulator.behaviour import Behaviour
from edge.simulator.server import Simulator
from loadtest import processes
from loadtest.edges import Edge, create_key, run_apart, serving
from loadtest.peers.peer import ROOT
from loadtest.target import positive

_AT_ONCE: Final = 8  # requests of the engine
_TIMES: Final = 3.0
_AFTER: Final = 0.7
_LEAST_GOODPUT: Final = 0.8
_LONGEST_RECOVERY_S: Final = 10.0
_DEAREST: Final = 1 / 3
_ANSWER: Final = {"tokens": 20, "interval_ms": 10, "ttft_ms": 10, "prompt_tokens": 5}
_BODY: Final = {"model": "public/m", "stream": True, "messages": [], "simulate": _ANSWER}
_CONFIG: Final = """
[server]
listen = "127.0.0.1:0"
admin = "127.0.0.1:${{ADMIN_PORT}}"
[pools.p]
endpoints = ["{url}"]
max_inflight = {at_once}
{queue}
[routes."public/m"]
pool = "p"
metered = true
"""


@dataclass(frozen=True, slots=True)
class _Answer:
    """When an answer ended, and whether it was whole; else it was refused."""

    ended_at: float
    is_whole: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `overload`."""
    parser.add_argument("--seconds", type=positive, default=12, metavar="N", help="of overload; default: %(default)s")
    parser.add_argument("--queue", type=positive, metavar="N", help="of the pool; default: none")


def main(arguments: argparse.Namespace) -> int:
    """Run; return 0, 1 when a bound is not kept, 2 when a part cannot be started."""
    return run_apart("overload", partial(_run, arguments=arguments))


async def _run(directory: Path, arguments: argparse.Namespace) -> int:
    engine = Simulator(Behaviour("vllm"), keep_requests=1)
    await engine.start()
    queue = f"queue = {arguments.queue}" if arguments.queue else ""
    (directory / "routes.toml").write_text(_CONFIG.format(url=engine.url, at_once=_AT_ONCE, queue=queue))
    key = await asyncio.to_thread(create_key, ROOT, directory)
    try:
        async with (
            serving(1, directory) as (edge, url),
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), headers={"Authorization": f"Bearer {key}"}
            ) as session,
        ):
            return await _measure(_Load(session, f"{url}/v1/chat/completions"), edge, float(arguments.seconds))
    finally:
        await engine.close()


class _Load:
    """What is asked; the answers that came are returned when all have."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def closed(self, seconds: float) -> list[_Answer]:
        """Ask as many at once as the engine takes."""
        until = time.monotonic() + seconds

        async def client() -> list[_Answer]:
            found = []
            while time.monotonic() < until:
                found.append(await self._ask())
            return found

        return [each for found in await asyncio.gather(*(client() for _ in range(_AT_ONCE))) for each in found]

    async def open(self, rate: float, seconds: float) -> list[_Answer]:
        """Ask at a rate, whatever comes back."""
        begun, loop, tasks = time.monotonic(), asyncio.get_running_loop(), []
        for number in range(round(rate * seconds)):
            await asyncio.sleep(max(begun + number / rate - time.monotonic(), 0))
            tasks.append(loop.create_task(self._ask()))
        return await asyncio.gather(*tasks)

    async def _ask(self) -> _Answer:
        async with self._session.post(self._url, json=_BODY) as answer:
            body = await answer.read()
            return _Answer(time.monotonic(), answer.status == 200 and body.rstrip().endswith(b"[DONE]"))


async def _measure(load: _Load, edge: Edge, seconds: float) -> int:
    await load.closed(1)
    cpu_s, begun = processes.cpu_s([edge.pid]), time.monotonic()
    found = await load.closed(seconds / 2)
    capacity = len(found) / (time.monotonic() - begun)
    served_s = (processes.cpu_s([edge.pid]) - cpu_s) / len(found)
    cpu_s, begun = processes.cpu_s([edge.pid]), time.monotonic()
    found = await load.open(_TIMES * capacity, seconds)
    over_at = time.monotonic()
    whole = sum(each.is_whole for each in found)
    refused = len(found) - whole
    goodput = whole / (over_at - begun) / capacity
    refused_s = (processes.cpu_s([edge.pid]) - cpu_s - whole * served_s) / max(refused, 1)
    after = await load.open(_AFTER * capacity, _LONGEST_RECOVERY_S + 2)
    recovery_s = max((each.ended_at - over_at for each in after if not each.is_whole), default=0.0)
    print(f"capacity: {capacity:.1f} requests/s, {served_s * 1e3:.2f} ms of CPU each")
    print(f"at {_TIMES:g} x: {len(found)} asked, {whole} served, which is {goodput:.0%} of the capacity")
    print(f"refused: {refused}, {refused_s * 1e3:.2f} ms of CPU each, {refused_s / served_s:.0%} of a served one")
    print(f"then at {_AFTER:g} x: {len(after)} asked, the last refusal after {recovery_s:.1f} s")
    kept = goodput >= _LEAST_GOODPUT and recovery_s <= _LONGEST_RECOVERY_S and refused_s < served_s * _DEAREST
    print("verdict: " + ("holds" if kept else "does not hold"), flush=True)
    return int(not kept)
