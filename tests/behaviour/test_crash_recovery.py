"""A process that is killed again and again, and a sink that is down half of the time: nothing is lost or counted twice.

`EDGE_CHAOS=10000:5` makes as many requests and kills as often, in seconds; else it is a short run.
"""

import asyncio
import itertools
import json
import os
import random
import signal
import sys
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from edge.keys.stores.registry import KeyRegistry
from edge.simulator.server import Simulator
from tests.conftest import USER, RawClient

REQUESTS, KILL_EVERY_S = (int(each) for each in os.environ.get("EDGE_CHAOS", "400:1").split(":"))
CALLERS = 16
CONFIG = """
[server]
listen = "127.0.0.1:{port}"
admin = "127.0.0.1:0"
shutdown_delay = "0s"
[keys]
store = "sqlite:keys.db"
[usage]
sink = "{sink}"
rotate = "100KB"
"""
POOL = """
[pools.{usage}]
endpoints = ["{upstream}"]
first_byte_timeout = "400ms"
idle_timeout = "400ms"
retry_within = "0s"
usage = "{usage}"
[routes."public/{usage}"]
pool = "{usage}"
metered = true
"""
USAGES = ("final", "continuous")  # in one run: what a kill does is no matter of how usage is asked for
KINDS = ("whole", "json", "asked", "abort", "abort", "cut", "error", "error_mid", "stall", "no_answer")


class Sink:
    """Takes batches, and is down half of the time: refuses, or takes one and says nothing."""

    def __init__(self) -> None:
        self.records: dict[str, Any] = {}
        self.received = 0
        self._ticks = 0

    async def start(self) -> str:
        self._runner = web.ServerRunner(web.Server(self._take))
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}/usage"

    async def _take(self, request: web.BaseRequest) -> web.StreamResponse:
        self._ticks += 1
        if self._ticks % 4 == 1:
            return web.Response(status=503)
        for record in json.loads(await request.read())["records"]:
            self.received += 1
            assert self.records.setdefault(record["id"], record) == record
        return web.Response(status=500 if self._ticks % 4 == 2 else 200)  # stored, but who sent it does not know

    async def close(self) -> None:
        await self._runner.cleanup()


class Chaos:
    def __init__(self, directory: Path, port: int, key: str) -> None:
        self.directory = directory
        self.port = port
        self.key = key
        self.read_to_the_end: list[str] = []
        self.starts = 0
        self._random = random.Random(1)
        self._ids = itertools.count()
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self.starts += 1
        with (self.directory / "stderr").open("ab") as log, (self.directory / "stdout").open("ab") as lines:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "edge", "serve", cwd=self.directory, stdout=lines, stderr=log
            )

    async def end(self, how: signal.Signals) -> int:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(how)
        return await self._process.wait()

    async def kill_and_restart(self) -> None:
        while True:
            await self.listens()  # each serves for as long, however slow the machine is at starting one
            await asyncio.sleep(KILL_EVERY_S)
            await self.end(signal.SIGKILL)
            await self.start()

    async def listens(self) -> None:
        """Wait until the edge takes connections."""
        while not await _answers(self.port):
            await asyncio.sleep(0.02)

    async def call(self) -> None:
        while (number := next(self._ids)) < REQUESTS:
            for attempt in itertools.count():
                if await self._ask(f"chaos-{number}-{attempt}"):
                    break
                await asyncio.sleep(0.02)  # nobody listens: the next process is on its way

    async def _ask(self, request_id: str) -> bool:
        """Make one request; return whether somebody was there."""
        kind = self._random.choice(KINDS)
        tokens = self._random.randrange(1, 30)
        simulate: dict[str, Any] = {"tokens": tokens, "interval_ms": self._random.choice((0, 2))}
        simulate |= {
            "cut": {"fault": "cut", "after": tokens // 2},
            "error": {"fault": "error", "status": self._random.choice((400, 500, 503))},
            "error_mid": {"fault": "error_mid", "after": tokens // 2},
            "stall": {"fault": "stall", "after": tokens // 2},
            "no_answer": {"fault": "stall", "after": -1},
        }.get(kind, {})
        model = f"public/{self._random.choice(USAGES)}"
        body: dict[str, Any] = {"model": model, "messages": [], "stream": kind != "json", "simulate": simulate}
        body["user"] = request_id
        if kind == "asked":
            body["stream_options"] = {"include_usage": True}
        data = json.dumps(body).encode()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        client = RawClient(reader, writer)
        try:
            client.send(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Authorization: Bearer %b\r\nX-Request-Id: %b\r\nContent-Length: %d\r\n\r\n%b"
                % (self.key.encode(), request_id.encode(), len(data), data)
            )
            if kind == "abort":
                for _ in range(self._random.randrange(20)):
                    await reader.readline()
                client.abort()
                return True
            status, _, answer = await client.response()
            if status == 200 and (kind == "json" or answer.endswith(b"data: [DONE]\n\n")) and b'"error"' not in answer:
                self.read_to_the_end.append(request_id)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            client.abort()
        return True


def lines_of(directory: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    found: tuple[list[Any], list[Any]] = [], []
    for file in sorted((directory / "usage").glob("*.jsonl")):
        for line in map(json.loads, file.read_bytes().splitlines()):
            found["end" in line].append(line)
    return found


@pytest.mark.timeout(1800)
async def test_kills_and_a_flapping_sink_lose_nothing_and_count_nothing_twice(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    async with AsyncExitStack() as stack:
        await _chaos(stack, tmp_path, unused_tcp_port)


async def _chaos(stack: AsyncExitStack, tmp_path: Path, unused_tcp_port: int) -> None:
    simulator, sink = Simulator(keep_requests=10**6), Sink()
    await simulator.start()
    stack.push_async_callback(simulator.close)
    stack.push_async_callback(sink.close)
    config = CONFIG.format(port=unused_tcp_port, sink=await sink.start())
    config += "".join(POOL.format(usage=usage, upstream=simulator.url) for usage in USAGES)
    (tmp_path / "routes.toml").write_text(config)
    with KeyRegistry(tmp_path / "keys.db") as registry:
        key, _ = registry.create(USER)
    chaos = Chaos(tmp_path, unused_tcp_port, key)
    stack.push_async_callback(chaos.end, signal.SIGKILL)
    await chaos.start()
    killer = asyncio.get_running_loop().create_task(chaos.kill_and_restart())
    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(CALLERS):
                tasks.create_task(chaos.call())
    finally:
        killer.cancel()
        await asyncio.gather(killer, return_exceptions=True)
    await chaos.end(signal.SIGKILL)
    for _ in range(5):  # the last start adopts and ships what is left; a sink that is down may need one more
        await chaos.start()
        await chaos.listens()
        assert await chaos.end(signal.SIGTERM) == 0
        if not list((tmp_path / "usage").glob("*.lock")):
            break
    opened, ended = lines_of(tmp_path)
    ends = Counter(each["end"] for each in ended)
    ids = [each["id"] for each in opened]
    print(f"\n{chaos.starts} starts, {len(set(ids))} accepted, {dict(ends)}, sink got {sink.received}")
    # A file that follows another begins with what is open, so an open line may stand twice, but not a record.
    assert sorted(each["id"] for each in ended) == sorted(set(ids))
    assert ends.total() == len(set(ids))
    complete = {each["request_id"]: each for each in ended if each["end"] == "complete"}
    assert len(complete) == ends["complete"]
    assert [each for each in chaos.read_to_the_end if each not in complete] == []
    counted = {json.loads(each.body)["user"]: each.tokens for each in simulator.requests if each.body}
    assert {each: record["completion_tokens"] for each, record in complete.items()} == {
        each: counted[each] for each in complete
    }
    assert all(each["usage_source"] == "final" for each in complete.values())
    assert sink.records == {each["id"]: each for each in ended}
    assert {each["model"] for each in complete.values()} == {f"public/{usage}" for usage in USAGES}
    assert chaos.starts > 2
    assert ends["crashed"] > 0


async def _answers(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True
