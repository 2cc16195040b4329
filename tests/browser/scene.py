"""A running edge in whose pools something is wrong, with users who ask it."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import trustme

from edge.keys.stores.registry import KeyRegistry
from edge.process.server import Server
from edge.simulator.behaviour import Behaviour
from edge.simulator.server import Simulator
from edge.tasks import end_tasks

ROUTES = """
[server]
listen = "127.0.0.1:0"
admin = "127.0.0.1:0"
shutdown_delay = "0s"
drain_timeout = "0s"
tls = { certificate = "tls.crt", private_key = "tls.key" }
[limits.standard]
requests_per_minute = 60
tokens_per_minute = 400000
[pools.deepseek]
endpoints = ["{well}", "{slow}", "http://127.0.0.1:9"]
max_inflight = 32
[pools.qwen]
endpoints = ["{refusing}", "{failing}", "{well}"]
[pools.glm]
endpoints = ["{unwell}"]
health = { path = "/nothing", interval = "1s" }
[routes."public/deepseek-r1"]
pool = "deepseek"
limit = "standard"
metered = true
[routes."public/qwen2.5-72b"]
pool = "qwen"
[routes."public/glm-4-9b-chat"]
pool = "glm"
[routes."u-*"]
instance = "{well}"
"""
MODELS = ["public/deepseek-r1"] * 3 + ["public/qwen2.5-72b"] * 3 + ["public/glm-4-9b-chat", "public/unknown", "u-1/x"]
SERVERS = {
    "well": Behaviour(ttft_ms=60, interval_ms=10, tokens=40),
    "slow": Behaviour(ttft_ms=900, interval_ms=20, tokens=40),
    "refusing": Behaviour(fault="error", status=401),
    "failing": Behaviour(fault="error", status=500),
    "unwell": Behaviour(ttft_ms=30),
}


@contextlib.asynccontextmanager
async def played(directory: Path) -> AsyncIterator[Server]:
    """Let the scene be played, and its file be spoiled, until the end."""
    async with contextlib.AsyncExitStack() as stack:
        text = ROUTES
        for name, behaviour in SERVERS.items():
            simulator = Simulator(behaviour, keep_requests=0)
            await simulator.start()
            stack.push_async_callback(simulator.close)
            text = text.replace(f"{{{name}}}", simulator.url)
        made = trustme.CA().issue_cert("chat.d.run", not_after=datetime.now(UTC) + timedelta(days=6))
        (directory / "tls.crt").write_bytes(b"".join(each.bytes() for each in made.cert_chain_pems))
        (directory / "tls.key").write_bytes(made.private_key_pem.bytes())
        path = directory / "routes.toml"
        path.write_text(text)
        with KeyRegistry(directory / "edge.db") as registry:
            keys = [registry.create(f"u-{number:012x}", name="laptop")[0] for number in range(6)]
        server, ready = Server(path, log_to=-1), asyncio.Event()
        running = asyncio.create_task(server.run(lambda _: ready.set()))  # noqa: TID251
        await asyncio.wait({running, asyncio.create_task(ready.wait())}, return_when=asyncio.FIRST_COMPLETED)  # noqa: TID251
        asking = asyncio.create_task(ask(f"https://{server.addresses[0]}", keys))  # noqa: TID251
        path.write_text(text.replace('pool = "glm"', 'pool = "glmm"'))
        try:
            yield server
        finally:
            await end_tasks((asking,))
            server.stop()
            await running


async def ask(url: str, keys: list[str]) -> None:
    """Ask as users do, some more than others, until cancelled."""
    connector = aiohttp.TCPConnector(ssl=False, limit=0)
    async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as group:
        while True:
            for _ in range(random.randint(1, 4)):
                group.create_task(ask_once(session, url, random.choices(keys, range(6))[0]))
            await asyncio.sleep(0.2)


async def ask_once(session: aiohttp.ClientSession, url: str, key: str) -> None:
    body: dict[str, Any] = {"model": random.choice(MODELS), "stream": True, "max_tokens": 40}
    body["messages"] = [{"role": "user", "content": "Hello"}]
    headers = {"Authorization": f"Bearer {key}"}
    with contextlib.suppress(aiohttp.ClientError):
        async with session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as answer:
            await answer.read()
