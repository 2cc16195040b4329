"""An edge of its own in front of an engine: two modes of usage, a key, a journal."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loadtest.processes import free_port
from tests.engines.processes import running

MODES: Final = ("final", "continuous")
_READY_WITHIN_S: Final = 60.0
_POLL_S: Final = 0.1
_RECORDED_WITHIN_S: Final = 120.0
_HEAD: Final = """
[server]
listen = "127.0.0.1:{port}"
admin = "127.0.0.1:{admin}"
shutdown_delay = "0s"
drain_timeout = "1s"
[keys]
store = "sqlite:keys.db"
[usage]
journal = "usage"
"""
_ROUTE: Final = """
[pools.{name}]
endpoints = ["http://127.0.0.1:{port}"]
engine = "{engine}"
usage = "{mode}"
retry_within = "0s"
connect_timeout = "30s"
[routes."public/{name}"]
pool = "{name}"
model = "{model}"
metered = true
"""


@dataclass(frozen=True)
class Edge:
    """A running edge. Its models: `public/final` and `public/continuous`, with `-cut` behind a relay that breaks."""

    url: str
    key: str
    journal: Path

    async def records(self, prefix: str, count: int) -> list[dict[str, Any]]:
        """Return the records of the requests whose ids begin so, once all `count` have ended."""
        async with asyncio.timeout(_RECORDED_WITHIN_S):
            while len(found := self._records(prefix)) < count:
                await asyncio.sleep(_POLL_S)
        return found

    def _records(self, prefix: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for file in self.journal.glob("*.jsonl") for line in _whole_lines(file)]
        return [line for line in lines if "end" in line and line["request_id"].startswith(prefix)]


def _whole_lines(file: Path) -> list[bytes]:
    return file.read_bytes().split(b"\n")[:-1]


@asynccontextmanager
async def edge(directory: Path, engine: str, model: str, port: int, cut_port: int) -> AsyncIterator[Edge]:
    """Run an edge in front of the server at `port`."""
    routes = [
        _ROUTE.format(name=f"{mode}{behind}", port=to, engine=engine, mode=mode, model=model)
        for mode in MODES
        for behind, to in (("", port), ("-cut", cut_port))
    ]
    async with serving(directory, "".join(routes)) as running_edge:
        yield running_edge


@asynccontextmanager
async def serving(directory: Path, routes: str) -> AsyncIterator[Edge]:
    """Run an edge with these pools and routes."""
    listen, admin = free_port(), free_port()
    file = directory / "routes.toml"
    file.write_text(_HEAD.format(port=listen, admin=admin) + routes)
    command = [sys.executable, "-m", "edge"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    key = await _key([*command, "keys", "create", "--config", str(file), "--user", "u-1100a15812cc", "--json"])
    ready = f"http://127.0.0.1:{admin}/readyz"
    serve = [*command, "serve", "--config", file]
    async with running(serve, ready, directory, environment, _READY_WITHIN_S):
        yield Edge(f"http://127.0.0.1:{listen}", key, directory / "usage")


async def _key(command: list[str]) -> str:
    made = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    )
    printed, _ = await made.communicate()
    key: str = json.loads(printed)["key"]
    return key
