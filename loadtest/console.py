"""`console`: a console's day over the API of keys: thousands made, listed, rotated and revoked while two edges serve.

Clients at once, each with a part of the keys. An answer in ten is taken for lost and asked for again. Each key is shown
to both edges: one that works must, at once at the edge that was asked; one that has ended must not, at once there and
a second later at the other. In the end all that were made are listed, once each and as they were left. Exit 1 when one
is lost, works after its end, or when another caller's requests are disturbed meanwhile.
"""

import argparse
import asyncio
import contextlib
import itertools
import secrets
import statistics
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp

from edge.simulator.behaviour import Behaviour
from edge.simulator.server import Simulator
from loadtest.edges import create_key, run_apart, running_redis, serving
from loadtest.peers.peer import ROOT
from loadtest.target import positive

_USERS: Final = 100
_END_S: Final = 1.0  # after which no key may work that has ended
_PAGE: Final = 1000
_TRIES: Final = 10
_BODY: Final = {"model": "public/m", "messages": [], "max_tokens": 4}
_CONFIG: Final = """
[server]
listen = "127.0.0.1:0"
admin = "127.0.0.1:${{ADMIN_PORT}}"
admin_token = "{token}"
[keys]
store = "{store}"
[pools.p]
endpoints = ["{url}"]
[routes."public/m"]
pool = "p"
metered = true
"""


@dataclass
class Day:
    """What was done, and what went wrong; times are seconds."""

    faults: list[str] = field(default_factory=list)
    made: dict[str, str] = field(default_factory=dict)  # id by the state it was left in
    times_s: dict[str, list[float]] = field(default_factory=dict)
    unknown: int = 0  # look-ups that the store did not answer in time
    unavailable: int = 0  # requests of the API that the store did not answer in time
    bystander_s: list[float] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return what people read."""
        lines = [f"{'request':<10} {'count':>7} {'median ms':>10} {'99 % ms':>9} {'most ms':>9}"]
        for name, times in (*self.times_s.items(), ("bystander", self.bystander_s)):
            if times:
                ordered = sorted(times)
                late = ordered[min(len(ordered) * 99 // 100, len(ordered) - 1)]
                figures = statistics.median(ordered), late, ordered[-1]
                lines.append(f"{name:<10} {len(times):>7} " + " ".join(f"{each * 1e3:>9.1f}" for each in figures))
        lines.append(f"{self.unknown} look-ups were not answered in time, and asked again")
        lines.append(f"{self.unavailable} requests of the API were not answered in time, and sent again")
        return [*lines, *(f"FAULT: {each}" for each in self.faults[:20]), f"{len(self.faults)} faults"]


class Console:
    """Clients of the API at `admin`, and of the edges that serve at `edges`, the first of which is administered."""

    def __init__(self, session: aiohttp.ClientSession, admin: str, token: str, edges: Sequence[str]) -> None:
        self.day = Day()
        self._session = session
        self._admin = admin
        self._headers = {"Authorization": f"Bearer {token}", "X-Actor": "loadtest"}
        self._edges = edges
        self._checks: set[asyncio.Task[None]] = set()
        self._names = itertools.count()

    async def run(self, keys: int, clients: int) -> Day:
        """Have a day of so many keys, by so many clients at once."""
        await asyncio.gather(*(self._client(range(at, keys, clients)) for at in range(clients)))
        await asyncio.gather(*self._checks)
        await self._compare()
        return self.day

    async def _client(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            made = await self._make("POST", "/keys", {"user": f"u-{number % _USERS}", "name": f"key {number}"}, number)
            if made is None:
                continue
            await self._must_work(made["key"])
            match number % 4:
                case 0:  # goes on
                    self.day.made[made["id"]] = "live"
                case 1:  # is revoked
                    await self._revoke(made)
                case 2:  # is rotated at once, and the new one goes on
                    await self._rotate(made, "0s", number)
                case 3:  # is rotated with a grace, and the new one is revoked
                    new = await self._rotate(made, "1h", number)
                    if new is not None:
                        await self._must_work(made["key"])
                        await self._revoke(new)
            if number % 50 == 0:
                await self._ask("list", "GET", f"/keys?user=u-{number % _USERS}&limit=100")

    async def _make(self, method: str, path: str, body: Mapping[str, str], number: int) -> dict[str, Any] | None:
        """Make a key; one answer in ten is lost, and asked for again."""
        name = {"Idempotency-Key": str(uuid.uuid4())}
        what = "rotate" if path.endswith("/rotate") else "create"
        status, made = await self._ask(what, method, path, body, name)
        if status == 201 and number % 10 == 0:
            again = await self._ask(what, method, path, body, name)
            if again != (status, made):
                self.day.faults.append(f"{what}: asked again, {path} gave another answer: {again[0]}")
        if status != 201:
            self.day.faults.append(f"{what}: {status} {made}")
            return None
        found: dict[str, Any] = made
        return found

    async def _rotate(self, old: Mapping[str, Any], grace: str, number: int) -> dict[str, Any] | None:
        new = await self._make("POST", f"/keys/{old['id']}/rotate", {"grace": grace}, number)
        self.day.made[old["id"]] = "rotated"
        if grace == "0s":
            await self._must_end(old["key"])
        if new is not None:
            self.day.made[new["id"]] = "live"
            await self._must_work(new["key"])
        return new

    async def _revoke(self, made: Mapping[str, Any]) -> None:
        status, answer = await self._ask("revoke", "DELETE", f"/keys/{made['id']}")
        if status != 204:
            self.day.faults.append(f"revoke: {status} {answer}")
        self.day.made[made["id"]] = "revoked"
        await self._must_end(made["key"])

    async def _ask(
        self, what: str, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """Ask, and again after a 503, as `Retry-After` says; a change that was made all the same is not made twice."""
        begun = time.monotonic()
        for _ in range(_TRIES):
            async with self._session.request(
                method, f"{self._admin}{path}", json=body, headers={**self._headers, **(headers or {})}
            ) as answer:
                found = await answer.json() if answer.content_type == "application/json" else await answer.text()
            if answer.status != 503:
                break
            self.day.unavailable += 1
            await asyncio.sleep(1)
        self.day.times_s.setdefault(what, []).append(time.monotonic() - begun)
        return answer.status, found

    # --- what keys may do

    async def _status(self, edge: str, key: str) -> int:
        """Return what a key gets; a 503 says that nobody knows now, and is counted and asked again."""
        for _ in range(_TRIES):
            async with self._session.get(f"{edge}/v1/models", headers={"Authorization": f"Bearer {key}"}) as answer:
                if answer.status != 503:
                    break
            self.day.unknown += 1
            await asyncio.sleep(1)
        return answer.status

    async def _must_work(self, key: str) -> None:
        for edge in self._edges:
            if (status := await self._status(edge, key)) != 200:
                self.day.faults.append(f"a key that is live gets a {status} at {edge}")

    async def _must_end(self, key: str) -> None:
        if (status := await self._status(self._edges[0], key)) != 401:
            self.day.faults.append(f"a key gets a {status} at once after its end")
        if len(self._edges) > 1:
            check = asyncio.get_running_loop().create_task(self._must_have_ended(key))
            self._checks.add(check)
            check.add_done_callback(self._checks.discard)

    async def _must_have_ended(self, key: str) -> None:
        await asyncio.sleep(_END_S)
        for edge in self._edges[1:]:
            if (status := await self._status(edge, key)) != 401:
                self.day.faults.append(f"a key gets a {status} a second after its end at {edge}")

    async def _compare(self) -> None:
        """Compare what is listed with what was made."""
        listed: list[str] = []
        after = ""
        while True:
            _, page = await self._ask("list", "GET", f"/keys?all=true&limit={_PAGE}{after}")
            for each in page["data"]:
                state = "revoked" if each["revoked"] else "rotated" if each["replaced_by"] else "live"
                if each["id"] in self.day.made and self.day.made[each["id"]] != state:
                    self.day.faults.append(f"{each['id']} was {self.day.made[each['id']]} and is {state}")
                listed.append(each["id"])
            if not page["has_more"]:
                break
            after = f"&after={page['last_id']}"
        lost = set(self.day.made) - set(listed)
        if lost or len(listed) != len(set(listed)):
            self.day.faults.append(f"{len(lost)} keys are lost, {len(listed) - len(set(listed))} are listed twice")


async def bystander(session: aiohttp.ClientSession, edge: str, key: str, day: Day) -> None:
    """Ask for answers of a model all day; each must be whole."""
    headers = {"Authorization": f"Bearer {key}"}
    while True:
        begun = time.monotonic()
        async with session.post(f"{edge}/v1/chat/completions", json=_BODY, headers=headers) as answer:
            await answer.read()
        if answer.status != 200:
            day.faults.append(f"a bystander gets a {answer.status}")
        day.bystander_s.append(time.monotonic() - begun)
        await asyncio.sleep(0.01)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `console`."""
    parser.add_argument("--keys", type=positive, default=10_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--clients", type=positive, default=8, metavar="N", help="at once; default: %(default)s")
    parser.add_argument("--store", choices=("sqlite", "redis"), default="sqlite", help="default: %(default)s")


def main(arguments: argparse.Namespace) -> int:
    """Run; return 0, 1 when a key is lost or works after its end, 2 when a part cannot be started."""
    return run_apart("console", partial(_run, arguments=arguments))


async def _run(directory: Path, arguments: argparse.Namespace) -> int:
    models = Simulator(Behaviour(ttft_ms=1, interval_ms=0, tokens=4), keep_requests=1)
    await models.start()
    token = secrets.token_hex(16)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(models.close)
        store = "sqlite:keys.db" if arguments.store == "sqlite" else stack.enter_context(running_redis(directory))[1]
        config = _CONFIG.format(url=models.url, token=token, store=store)
        (directory / "routes.toml").write_text(config)
        key = await asyncio.to_thread(create_key, ROOT, directory)
        edges = [await stack.enter_async_context(serving(number, directory)) for number in (1, 2)]
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        urls = [url for _, url in edges]
        console = Console(session, f"http://127.0.0.1:{edges[0][0].admin_port}", token, urls)
        others = [asyncio.get_running_loop().create_task(bystander(session, url, key, console.day)) for url in urls]
        begun = time.monotonic()
        day = await console.run(arguments.keys, arguments.clients)
        took_s = time.monotonic() - begun
        for each in others:
            each.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    print(f"{len(day.made)} keys by {arguments.clients} clients at once in {took_s:.0f} s, kept in {arguments.store}")
    print("\n".join(day.lines()))
    return int(bool(day.faults))
