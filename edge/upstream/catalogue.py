"""What the servers of pools say of their models, asked when somebody lists models.

A UI wants to know how many tokens a model can take, and only its server knows. Each kind names the number otherwise:
`max_model_len` (vLLM, SGLang), `context_length` (OpenRouter), `context_window` (Groq), `meta.n_ctx` or
`meta.n_ctx_train` (llama.cpp). OpenAI itself has no such member.

Source: https://platform.openai.com/docs/api-reference/models/list, and the named servers' own answers
"""

import asyncio
import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import orjson
from aiohttp import ClientSession, ClientTimeout, DummyCookieJar, TCPConnector

from edge.outage import Outage
from edge.routing import Match
from edge.tasks import end_tasks
from edge.upstream.endpoints import Endpoint, Member
from edge.upstream.engines import ENGINES
from edge.upstream.pools import Pool

_log = logging.getLogger(__name__)

_INTERVAL_S: Final = 300.0  # a server has the same models from its start to its end
_FIRST_PAUSE_S: Final = 5.0  # after a failure; doubled by each one that follows, up to the interval
_PATIENCE_S: Final = 1.0  # of who lists models, for a server that was not asked before
_TIMEOUT_S: Final = 5.0  # an engine answers late while it prefills a long prompt
_MOST_AT_ONCE: Final = 100  # pools: a list of models sets no thousand connections off
_A_STEP: Final = 100  # pools of a reload
_MAX_BYTES: Final = 2**20  # a router's list of hundreds of models, each described
_LENGTHS: Final = ("max_model_len", "context_length", "context_window")
_META_LENGTHS: Final = ("n_ctx", "n_ctx_train")  # of the server, and what the model was trained for
_LARGEST: Final = 2**53 - 1  # that every JSON reader keeps (RFC 8259 section 6)


class Lengths(NamedTuple):
    """The tokens that models can take: by their ids, and of whatever is asked where there is only one."""

    by_id: Mapping[str, int]
    only: int | None


class NotListed(Exception):
    """A server does not list its models; the message says why, and is empty when that is no reason to worry."""


class Catalogue:
    """What the servers of a generation's pools say of their models.

    They are asked when somebody lists models, and again for a list that is five minutes old: one of them interrupts
    what it generates to answer.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pools: dict[str, _Pool] = {}
        self._asking = 0
        self._session: ClientSession | None = None

    def apply(self, pools: Iterable[Pool]) -> Iterator[None]:
        """Know of these pools, and of no others any more; what is known of those that are as they were stays.

        It is made ready in steps, and in force at once, with the last of them.
        """
        before, coming, moved = self._pools, dict[str, _Pool](), list[tuple[_Pool, Pool]]()
        for number, pool in enumerate(list(pools)):
            known = before.get(pool.config.name)
            if known is None or (known.pool is not pool and known.pool.config != pool.config):
                known = _Pool(pool)
            elif known.pool is not pool:
                moved.append((known, pool))
            coming[pool.config.name] = known
            if number % _A_STEP == _A_STEP - 1:
                yield
        self._pools = coming
        for known, pool in moved:
            known.pool = pool
        for name, known in before.items():
            if known.asking is not None and coming.get(name) is not known:
                known.asking.cancel()

    async def learn(self, names: Iterable[str]) -> None:
        """Ask pools of which nothing recent is known; wait a second at most, for those of which nothing is.

        A hundred are asked at once; of thousands, the next ones when models are listed again.
        """
        new = []
        for name in names:
            pool = self._pools.get(name)
            if pool is None:  # of a generation that is over
                continue
            if pool.asking is None and self._asking < _MOST_AT_ONCE and self._loop.time() >= pool.due_at:
                self._asking += 1
                pool.asking = self._loop.create_task(self._refresh(pool), name=f"models of {name}")
                pool.asking.add_done_callback(self._asked)
            if pool.asking is not None and pool.lengths is None:
                new.append(pool.asking)
        if new:
            await asyncio.wait(new, timeout=_PATIENCE_S)

    def _asked(self, asking: asyncio.Task[None]) -> None:
        self._asking -= 1

    def context_length(self, pool: str, model: str) -> int | None:
        """Return how many tokens a model of a pool can take, by the name that is sent upstream; None: not known."""
        known = self._pools[pool].lengths if pool in self._pools else None
        return known.by_id.get(model, known.only) if known is not None else None

    def context_length_of(self, name: str, match: Match) -> int | None:
        """Return how many tokens a model takes by its own name: as its route says, else as the server of its pool."""
        route = match.route
        known = self._pools.get(route.pool or "")
        if route.context_length is not None or known is None or known.lengths is None:
            return route.context_length
        members = known.pool.members
        upstream_model = next((each.config.model for each in members if each.config.model is not None), None)
        upstream_model = upstream_model or (name if route.model is None else match.filled(route.model))
        return self.context_length(known.pool.config.name, upstream_model)

    async def _refresh(self, pool: "_Pool") -> None:
        member = _choose(pool.pool, pool.failed, self._loop.time())
        try:
            if member is None:
                raise NotListed
            pool.lengths = lengths_of(await self._ask(member))
        except Exception as error:  # whatever a server can make the client raise; what was known goes on
            reason = str(error) if isinstance(error, NotListed) else type(error).__name__
            if reason:
                pool.outage.down(reason, logging.INFO)
            pool.failed = member.endpoint if member is not None else None
            pool.due_at = self._loop.time() + pool.pause_s
            pool.pause_s = min(2 * pool.pause_s, _INTERVAL_S)
        else:
            pool.outage.up(logging.INFO)
            pool.failed, pool.pause_s = None, _FIRST_PAUSE_S
            pool.due_at = self._loop.time() + _INTERVAL_S
        finally:
            pool.asking = None

    async def _ask(self, member: Member) -> bytes:
        """Return what a member answers; raises `NotListed`, and what the client raises."""
        if self._session is None:
            self._session = ClientSession(
                connector=TCPConnector(force_close=True, limit=0),
                timeout=ClientTimeout(total=_TIMEOUT_S),
                cookie_jar=DummyCookieJar(),
                auto_decompress=False,  # a few bytes could become many
            )
        url, path = member.endpoint.url, f"{member.config.url.base}/models"
        headers = {"Host": member.config.url.authority, "Accept-Encoding": "identity"}
        if member.config.api_key is not None:
            headers["Authorization"] = f"Bearer {member.config.api_key}"
        tls = member.endpoint.connections.tls or True
        address = f"{url.scheme}://{url.authority}{path}"
        async with self._session.get(address, headers=headers, ssl=tls, allow_redirects=False) as answer:
            if answer.status != 200:
                raise NotListed("" if answer.status == 404 else f"{path} answers {answer.status}")
            body = bytearray()
            async for piece in answer.content.iter_any():
                body += piece
                if len(body) > _MAX_BYTES:
                    raise NotListed(f"{path} answers more than 1 MiB")
            return bytes(body)

    async def close(self) -> None:
        """End every question."""
        tasks = [pool.asking for pool in self._pools.values() if pool.asking is not None]
        await end_tasks(tasks)
        if self._session is not None:
            await self._session.close()


class _Pool:
    """What is known of the models of a pool, and when it is asked again."""

    __slots__ = ("asking", "due_at", "failed", "lengths", "outage", "pause_s", "pool")

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.lengths: Lengths | None = None
        self.asking: asyncio.Task[None] | None = None
        self.failed: Endpoint | None = None  # the last one that was asked
        self.pause_s = _FIRST_PAUSE_S
        self.due_at = 0.0
        name = f"pool {pool.config.name}"
        self.outage = Outage(_log, f"{name} does not list its models", f"{name} lists its models again")


def _choose(pool: Pool, failed: Endpoint | None, now: float) -> Member | None:
    """Return the least loaded member that may be asked, and not the one that failed unless there is no other.

    Some servers answer between two generations only, or interrupt one to answer; an idle one does neither.
    """
    may_wait = ENGINES[pool.config.engine].lists_while_busy
    members = [
        member for member in pool.members if member.endpoint.health.admits(now) and (may_wait or not member.load)
    ]
    others = [member for member in members if member.endpoint is not failed]
    return min(others or members, key=lambda member: (member.load, random.random()), default=None)


def lengths_of(document: bytes) -> Lengths:
    """Return what a list of models says; raises `NotListed` for what is no such list."""
    try:
        answer = orjson.loads(document)
    except orjson.JSONDecodeError:
        raise NotListed("what its server answers is no JSON") from None
    entries = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(entries, list):
        raise NotListed("what its server answers is no list of models")
    by_id = {}
    only = _length_of(entries[0]) if len(entries) == 1 else None
    for entry in entries:
        length = _length_of(entry)
        if length is not None and isinstance(entry.get("id"), str):
            by_id[entry["id"]] = length
    return Lengths(by_id, only)


def _length_of(entry: Any) -> int | None:
    """Return the first number of an entry that can be one of tokens."""
    if not isinstance(entry, dict):
        return None
    meta = entry.get("meta")
    values = [entry.get(name) for name in _LENGTHS]
    if isinstance(meta, dict):
        values += [meta.get(name) for name in _META_LENGTHS]
    return next((value for value in values if type(value) is int and 0 < value <= _LARGEST), None)
