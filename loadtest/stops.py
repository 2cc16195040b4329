"""`stops`: what a rolling restart loses behind nginx and HAProxy, and whether every stop under load ends (Linux).

Restarts: two edges share one listening socket, as under systemd, a proxy with kept connections stands in front, and the
edges are restarted in turn under a closed loop of streams and short requests. An answer that is not whole is lost.
Drains: an edge with a Redis sink, limits and kept responses in Redis gets SIGTERM at a random moment under load; Redis
answers in one half of them, and is stopped in the other. A stop has ten seconds beyond its drain_timeout.
"""

import argparse
import asyncio
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvloop

from loadtest import processes
from loadtest.answer import Answer
from loadtest.client import Address, Connections
from loadtest.edges import Edge, create_key, running, running_redis
from loadtest.peers.peer import HOST, MODEL, ROOT, Scene
from loadtest.peers.table import PEERS
from loadtest.target import at_least, positive
from loadtest.upstream import Wish
from loadtest.workload import SCENARIOS, numbered, raw_request

_DRAIN_TIMEOUT_S: Final = 5  # of drains; in restarts nothing is to be cut, however busy the machine is
_RESTART_DRAIN_TIMEOUT_S: Final = 120
_GRACE_S: Final = 10.0  # what a stop may take beyond it
_ANSWER_PATIENCE_S: Final = 60.0
_LONGEST_PAUSE_S: Final = 0.5  # of a client between two requests: a pool in front has idle connections then
_CODE: Final = re.compile(rb'"code":"([a-z_]+)"')
_EDGE: Final = """
[server]
listen = "127.0.0.1:0"
admin = "127.0.0.1:${{ADMIN_PORT}}"
shutdown_delay = "{delay}"
drain_timeout = "{drain}s"
[keys]
store = "sqlite:keys.db"
[usage]
journal = "usage"
{sink}
[limits.standard]
requests_per_minute = 1_000_000_000
[pools.r1]
endpoints = ["http://127.0.0.1:{upstream}"]
connect_timeout = "30s"  # of a model server that shares the cores
[routes."public/deepseek-r1"]
pool = "r1"
metered = true
limit = "standard"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stops`."""
    add = parser.add_argument
    add("--restarts", type=at_least(0), default=20, metavar="N", help="behind each proxy; default: %(default)s")
    add("--drains", type=at_least(0), default=100, metavar="N", help="default: %(default)s")
    add("--streams", type=positive, default=200, metavar="N", help="clients at once; default: %(default)s")
    add("--fronts", default="nginx,haproxy", metavar="A,B", help="default: %(default)s")
    add("--edge", type=Path, default=ROOT, metavar="DIR", help="the checkout whose edge is stopped")
    add("--shutdown-delay", default="1s", metavar="TIME", help="of the restarts; default: %(default)s")
    add("--busy", type=at_least(0), default=2, metavar="N", help="loops that take CPU beside drains; default: 2")
    add("--seed", type=int, default=0)


def main(arguments: argparse.Namespace) -> int:
    """Run; return 0, 1 when an answer was lost or a stop did not end in order, 2 when something is missing."""
    random.seed(arguments.seed)
    failed = False
    with tempfile.TemporaryDirectory(prefix="loadtest-stops-", ignore_cleanup_errors=True) as directory:
        try:
            for name in arguments.fronts.split(",") if arguments.restarts else ():
                (place := Path(directory, name)).mkdir()
                failed |= uvloop.run(_restarts(name, place, arguments))
            if arguments.drains:
                (place := Path(directory, "drains")).mkdir()
                failed |= uvloop.run(_drains(place, arguments))
        except processes.ProcessError as error:
            print(f"loadtest stops: {error}", file=sys.stderr)
            return 2
    return int(failed)


@dataclass(slots=True)
class _Told(Answer):
    """An answer that keeps the code of an error."""

    code: str = ""

    def body(self, body: bytes) -> None:
        """Take the body of an answer that is no stream."""
        found = _CODE.search(body)
        self.code = found[1].decode() if found else ""
        Answer.body(self, body)


class _Load:
    """Clients in a closed loop, half of them streams; counts what became of their requests."""

    def __init__(self, port: int, key: str, clients: int) -> None:
        self.requests = 0
        self.lost: Counter[str] = Counter()
        self._over = asyncio.Event()
        self._connections = Connections(Address("127.0.0.1", port))
        self._tasks = [
            asyncio.get_running_loop().create_task(self._client(key, number), name=f"client {number}")
            for number in range(clients)
        ]

    async def _client(self, key: str, number: int) -> None:
        is_stream = number % 2 == 0
        scenario = SCENARIOS["chat-stream" if is_stream else "chat"]
        wish = Wish(32, 40.0) if is_stream else Wish(1, 0.0)
        members = {"max_tokens": 32, "user": wish.text()}
        raw = raw_request(scenario.kind, scenario.body(MODEL, members), host=HOST, key=key)
        while not self._over.is_set():
            answer = _Told(stream=is_stream, exact=32 if is_stream else None)
            self.requests += 1
            request = numbered(raw, self.requests)
            sample = await self._connections.request(request, answer, timeout_s=_ANSWER_PATIENCE_S)
            refusal = "" if sample.status == 200 else f"status {sample.status} {answer.code}"
            if problem := sample.error or refusal or answer.end():
                self.lost[problem] += 1
            await asyncio.sleep(random.uniform(0, _LONGEST_PAUSE_S))

    async def end(self) -> None:
        """Let each client have its answer, and stop."""
        self._over.set()
        await asyncio.gather(*self._tasks)
        self._connections.close()


@contextmanager
def _upstream(directory: Path) -> Iterator[int]:
    """Run the model server; yield its port."""
    port = processes.free_port()
    command = [sys.executable, "-m", "loadtest.upstream", "--port", str(port)]
    with running("upstream", command, directory, port, {"PYTHONPATH": str(ROOT)}):
        yield port


def _front(name: str, directory: Path, port: int, edge_port: int) -> list[str]:
    """Return how to start a proxy; raises `ProcessError` when it is not installed."""
    program = PEERS[name].find(())
    if program is None:
        raise processes.ProcessError(f"{name} is missing: {PEERS[name].install}")
    scene = Scene(directory, port, processes.free_port(), edge_port, keep_key=True)
    return PEERS[name].launch(program, scene).command


def _configure(root: Path, directory: Path, upstream: int, delay: str, drain_timeout_s: int, sink: str = "") -> str:
    """Write the file of the edges, and return a key."""
    text = _EDGE.format(delay=delay, drain=drain_timeout_s, upstream=upstream, sink=sink)
    (directory / "routes.toml").write_text(text)
    return create_key(root, directory)


async def _restarts(name: str, directory: Path, arguments: argparse.Namespace) -> bool:
    """Restart two edges in turn behind a proxy; print what was lost, and return whether anything was."""
    in_thread = asyncio.to_thread
    with ExitStack() as stack:
        upstream = stack.enter_context(_upstream(directory))
        delay, drain = arguments.shutdown_delay, _RESTART_DRAIN_TIMEOUT_S
        key = _configure(arguments.edge, directory, upstream, delay, drain)
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096))
        edges = [Edge(number, arguments.edge, directory, listening) for number in (1, 2)]
        for edge in edges:
            stack.callback(edge.kill)
            edge.start()
        port = processes.free_port()
        command = _front(name, directory, port, listening.getsockname()[1])
        stack.enter_context(running(name, command, directory, port))
        load, begun, codes, longest_s = _Load(port, key, arguments.streams), time.monotonic(), set[int | None](), 0.0
        await asyncio.sleep(1.0)
        for number in range(arguments.restarts):
            edge = edges[number % 2]
            code, stop_s = await in_thread(edge.stop, _RESTART_DRAIN_TIMEOUT_S + _GRACE_S + 60)
            codes.add(code)
            longest_s = max(longest_s, stop_s)
            await in_thread(edge.start)
        await load.end()
        took_s = time.monotonic() - begun
    lost = sum(load.lost.values())
    print(f"{name}: {arguments.restarts} restarts, {load.requests} requests in {took_s:.0f} s, lost: {lost}")
    print(f"  exit codes {sorted(map(str, codes))}, longest stop {longest_s:.1f} s", flush=True)
    for problem, count in load.lost.most_common():
        print(f"  {count} x {problem}")
    return bool(lost) or codes != {0}


async def _drains(directory: Path, arguments: argparse.Namespace) -> bool:
    """Stop an edge again and again under load; print how that went, and return whether any did not end in order."""
    outcomes: Counter[str] = Counter()
    longest_s = 0.0
    with ExitStack() as stack:
        upstream = stack.enter_context(_upstream(directory))
        redis, url = stack.enter_context(running_redis(directory))
        shared = f'sink = "{url}"\n[shared]\nredis = "{url}"'
        key = _configure(arguments.edge, directory, upstream, "0s", _DRAIN_TIMEOUT_S, shared)
        for _ in range(arguments.busy):
            stack.callback(_busy())
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096))
        edge = Edge(0, arguments.edge, directory, listening)
        for number in range(arguments.drains):
            stack.callback(edge.kill)
            await asyncio.to_thread(edge.start)
            load = _Load(listening.getsockname()[1], key, arguments.streams)
            await asyncio.sleep(random.uniform(0.0, 1.0))
            is_silent = number % 2 == 1
            if is_silent:
                os.kill(redis.pid, signal.SIGSTOP)
                await asyncio.sleep(random.uniform(0.0, 0.5))
            try:
                code, took_s = await asyncio.to_thread(edge.stop, _DRAIN_TIMEOUT_S + _GRACE_S + 10)
            finally:
                os.kill(redis.pid, signal.SIGCONT)
            longest_s = max(longest_s, took_s)
            what = "did not end" if code is None else f"exit code {code}"
            outcomes[f"{what}, Redis {'silent' if is_silent else 'well'}"] += 1
            if code != 0:
                print(f"  drain {number}: {what} after {took_s:.1f} s: {edge.last_words()}", flush=True)
            listening.close()
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096))
            edge = Edge(0, arguments.edge, directory, listening)
            await load.end()
    print(f"drains: {arguments.drains}, longest {longest_s:.1f} s", flush=True)
    for outcome, count in sorted(outcomes.items()):
        print(f"  {count} x {outcome}")
    return any(not outcome.startswith("exit code 0") for outcome in outcomes)


def _busy() -> Callable[[], None]:
    """Take CPU, until what is returned is called."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])

    def end() -> None:
        process.kill()
        process.wait()

    return end
