"""Recordings of what engines send, asked as the edge asks them: the golden frames of meters and simulator."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import aiohttp

from tests.engines.cases import CASES, CHAT, COMPLETIONS, MOST_TOKENS, Case
from tests.engines.edge_process import MODES
from tests.engines.engine import Counts, Engine, Server
from tests.engines.runs import running_server

_NUMBER: Final = 4  # of a case: its answers have five tokens, or six
_ASKED: Final = {
    "final": {"include_usage": True},
    "continuous": {"include_usage": True, "continuous_usage_stats": True},
}
_SETTLED_S: Final = 1.0
_CACHED: Final = re.compile(rb'"(?:cached_tokens|cache_read_input_tokens)":(\d+)')


async def record(engine: Engine, home: Path, file: Path) -> None:
    """Write what an engine answers to each case, and what it counted for that."""
    found = [each for server in engine.servers(home) async for each in _of_server(engine, server, home)]
    file.write_text(json.dumps({"engine": engine.pins, "recordings": found}, indent=1) + "\n")


async def _of_server(engine: Engine, server: Server, home: Path) -> AsyncIterator[dict[str, Any]]:
    async with running_server(server, home) as port, aiohttp.ClientSession() as session:
        for case in CASES:
            if case.path in server.paths and case.goes in ("whole", "fails"):
                for mode in MODES if case.stream and case.path in (CHAT, COMPLETIONS) else MODES[:1]:
                    yield await _ask(session, engine, server, f"http://127.0.0.1:{port}", case, mode)


async def _ask(
    session: aiohttp.ClientSession, engine: Engine, server: Server, url: str, case: Case, mode: str
) -> dict[str, Any]:
    # No two have a prompt of their cases in common, so that the engine has nothing cached but the template's beginning.
    number = _NUMBER + 2 * MOST_TOKENS * (len(MODES) * CASES.index(case) + MODES.index(mode))
    body: dict[str, Any] = {"model": server.model} | case.body(number)
    if case.goes == "fails":
        body |= engine.fails
    if case.stream and case.path in (CHAT, COMPLETIONS):
        body["stream_options"] = _ASKED[mode]
    before = await _counted(session, server, url)
    async with session.post(url + case.path, json=body) as answer:
        status, kind, content = answer.status, answer.headers.get("content-type", ""), await answer.read()
    counted = await _counted(session, server, url) - before
    if server.counters is not None and server.counters.leaves_out_cached:
        counted += Counts(prompt=max(map(int, _CACHED.findall(content)), default=0))
    if case.goes == "fails":  # its request may be long, and says nothing
        body = {}
    told = {"case": case.name, "mode": mode, "path": case.path, "request": body, "status": status}
    sums = [counted.prompt, counted.completion] if server.counters is not None else None
    return told | {"content_type": kind, "answer": content.decode(), "counted": sums}


async def _counted(session: aiohttp.ClientSession, server: Server, url: str) -> Counts:
    if server.counters is None:
        return Counts()
    await asyncio.sleep(_SETTLED_S)
    return (await server.counters.read(session, url))[0]
