"""A rolling restart of model servers under load: how many of their streams are cut.

    python -m tests.engines.rolling [--streams N] [--at-once N]

Three simulated servers stand behind an edge whose pool resumes. While clients stream, each server is stopped in turn,
by SIGTERM and by SIGKILL, and started again, until all streams were asked. The next one follows once the one before is
up and the streams that ran then have ended: a stream is gone on with once. A stream is cut if it is not, to the byte of
its text and to the token of its record, what an unbroken one is. It exits with 1 if any is.
"""

import argparse
import asyncio
import os
import random
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import aiohttp

from loadtest.processes import free_port
from tests.engines.cases import CHAT
from tests.engines.dying import told_in
from tests.engines.edge_process import Edge, serving
from tests.engines.processes import running

_SERVERS: Final = 3
_PROMPTS: Final = 20
_STREAMS_A_STOP: Final = 40  # that have ended before the next server is stopped
_READY_WITHIN_S: Final = 60.0
_SIMULATED: Final = (
    "--text", "prompt", "--dialect", "vllm", "--ttft", "20ms", "--rate", "40", "--tokens", "80", "--thinks", "20",
)  # fmt: skip
_ROUTES: Final = """
[pools.p]
endpoints = [{endpoints}]
resume = "auto"
retry_budget = 1.0
retry_after_send = true
[routes."public/m"]
pool = "p"
metered = true
"""


class Rolling:
    """The servers, and the streams that are asked of them through the edge."""

    def __init__(self, edge: Edge, ports: list[int], directory: Path) -> None:
        self._edge, self._ports, self._directory = edge, ports, directory
        self._ups = [AsyncExitStack() for _ in ports]
        self._processes: list[asyncio.subprocess.Process] = []
        self._ended = asyncio.Event()
        self._wholes: list[Any] = []
        self._running: set[int] = set()
        self.done = self.stops = 0
        self.cut: list[str] = []

    async def play(self, streams: int, at_once: int) -> None:
        """Ask all streams while servers are stopped in turn."""
        async with AsyncExitStack() as stack:
            for place, up in enumerate(self._ups):
                stack.push_async_callback(up.aclose)
                self._processes.append(await up.enter_async_context(self._up(place)))
            connector = aiohttp.TCPConnector(limit=0)
            session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
            self._wholes = await asyncio.gather(*(self._ask(session, number) for number in range(_PROMPTS)))
            numbers = iter(range(streams))
            async with asyncio.TaskGroup() as tasks:
                roller = tasks.create_task(self._roll())
                async with asyncio.TaskGroup() as clients:
                    for _ in range(at_once):
                        clients.create_task(self._client(session, numbers))
                roller.cancel()

    def _up(self, place: int) -> Any:
        port = self._ports[place]
        words = [sys.executable, "-m", "edge", "simulate", "--listen", f"127.0.0.1:{port}", *_SIMULATED]
        directory = self._directory / str(place)
        directory.mkdir(exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        return running(words, f"http://127.0.0.1:{port}/health", directory, environment, _READY_WITHIN_S)

    async def _roll(self) -> None:
        """Stop one server after another, each once all are up again and no stream is left of the last stop."""
        chance = random.Random(1)
        while True:
            upto, broken = self.done + _STREAMS_A_STOP, set(self._running)
            while self.done < upto or broken & self._running:
                self._ended.clear()
                await self._ended.wait()
            place = self.stops % _SERVERS
            self._processes[place].send_signal(chance.choice((signal.SIGTERM, signal.SIGKILL)))
            await self._processes[place].wait()
            self.stops += 1
            await self._ups[place].aclose()
            self._processes[place] = await self._ups[place].enter_async_context(self._up(place))

    async def _client(self, session: aiohttp.ClientSession, numbers: Any) -> None:
        for number in numbers:
            self._running.add(number)
            whole, told = self._wholes[number % _PROMPTS], await self._ask(session, number)
            self._running.remove(number)
            self.done += 1
            self._ended.set()
            if told != whole:
                self.cut.append(f"{told}, and not {whole}")

    async def _ask(self, session: aiohttp.ClientSession, number: int) -> Any:
        prompt = f"tell me of {number % _PROMPTS} rivers"
        body = {"model": "public/m", "stream": True, "temperature": 0, "stream_options": {"include_usage": True}}
        body["messages"] = [{"role": "user", "content": prompt}]
        content, headers = b"", {"authorization": f"Bearer {self._edge.key}"}
        try:
            async with session.post(self._edge.url + CHAT, json=body, headers=headers) as answer:
                async for piece in answer.content.iter_any():
                    content += piece
        except aiohttp.ClientError as error:
            return repr(error)
        return told_in(content) if answer.status == 200 else (answer.status, content)


async def played(streams: int, at_once: int) -> int:
    """Play a rolling restart, print what came of it, and return how many streams were cut."""
    with tempfile.TemporaryDirectory(prefix="rolling-") as temporary:
        directory, ports = Path(temporary), [free_port() for _ in range(_SERVERS)]
        endpoints = ", ".join(f'"http://127.0.0.1:{port}"' for port in ports)
        async with serving(directory, _ROUTES.format(endpoints=endpoints)) as edge:
            run = Rolling(edge, ports, directory)
            await run.play(streams, at_once)
            records = await edge.records("", streams + _PROMPTS)
            words = Counter(re.findall(rb'"resume":"([a-z_]+)"', (directory / "output").read_bytes()))
    resumed = sum(record.get("resumes", 0) for record in records)
    retried = sum(record["retries"] > record.get("resumes", 0) for record in records)
    bills = {(record["end"], record["completion_tokens"]) for record in records}
    print(f"{run.done} streams, {run.stops} stops of {_SERVERS} servers: {resumed} gone on with elsewhere, ", end="")
    print(f"{retried} asked elsewhere before their first byte, {len(run.cut)} cut; recorded as {sorted(bills)}")
    print("of those that broke: " + ", ".join(f"{count} `{word.decode()}`" for word, count in words.most_common()))
    for cut in run.cut[:5]:
        print(cut, file=sys.stderr)
    return len(run.cut)


def main(words: Sequence[str] | None = None) -> int:
    """Play a rolling restart; return the exit code."""
    parser = argparse.ArgumentParser(prog="tests.engines.rolling", description="a rolling restart under load")
    parser.add_argument("--streams", type=int, default=2000, metavar="N", help="that are asked in all (default 2000)")
    parser.add_argument("--at-once", type=int, default=40, metavar="N", help="(default 40)")
    asked = parser.parse_args(words)
    return int(bool(asyncio.run(played(asked.streams, asked.at_once))))


if __name__ == "__main__":
    sys.exit(main())
