"""What the edge answers by itself: its models, a caller's limits and usage, and paths or methods that there are not."""

import asyncio
import functools
import logging
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Final
from urllib.parse import parse_qsl, unquote_to_bytes

import orjson
from aiohttp import hdrs

from edge import errors
from edge.client.answers import response
from edge.client.connection import Request
from edge.client.head import Head
from edge.config.settings import Config, LimitConfig
from edge.errors import EdgeError
from edge.exchange import End, Exchange
from edge.generation import Generation
from edge.journal.index import SUMS, UsageIndex
from edge.keys.caller import Caller
from edge.limits.admission import Admission, Standing
from edge.limits.quotas import NO_LIMIT
from edge.names import is_model_name
from edge.operations import LIMITS, NOT_SERVED, OPERATIONS, USAGE, Asked
from edge.protocols import MESSAGES
from edge.routing import HostTable, Match, is_loopback
from edge.upstream.catalogue import Catalogue

_log = logging.getLogger(__name__)

_USUAL_DAYS: Final = 31
_DAY: Final = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_A_STEP: Final = 200  # models of a list: ten thousand at once would hold the others up
_UPGRADES: Final = (("Upgrade", "HTTP/1.1"), ("Connection", "upgrade"))  # RFC 9110 sections 15.5.22 and 7.8


def wrong_path(head: Head, asked: Asked, host: str, *, is_secure: bool) -> EdgeError:
    """Return the error for a path that does not exist, or not with this method; `is_secure`: it was asked over TLS."""
    headers, method, path = head.headers, head.method, head.path
    if method == "GET" and headers.get(hdrs.UPGRADE, "").lower() == "websocket":
        return errors.UpgradeRequired(
            "WebSocket is not served here: send a POST over HTTP, and read its server-sent events.", headers=_UPGRADES
        )
    if asked.methods:
        allowed = ", ".join((*asked.methods, "OPTIONS"))
        return errors.MethodNotAllowed(f"{method} is not possible here, use {allowed}", headers=(("Allow", allowed),))
    if is_loopback(host):
        base = f"{'https' if is_secure else 'http'}://{headers.get(hdrs.HOST, host)}"
    else:
        base = f"https://{host or 'chat.d.run'}"
    name = path.removeprefix("/openai").removeprefix("/v1").strip("/").partition("/")[0]
    is_right = path.startswith("/v1/") and not path.startswith(("/v1/v1/", "/v1//"))  # the base URL
    if is_right or name in NOT_SERVED:
        what = f"`{name}` is" if name in NOT_SERVED else "This operation is"
        return errors.PathNotFound(
            f"{what} not served here. Under {base}/v1 there are: {', '.join(OPERATIONS)}, models, limits, usage."
        )
    if asked.operation.protocol is MESSAGES:
        return errors.PathNotFound(f"There is nothing at this path. The base URL is {base}, without /v1.")
    return errors.PathNotFound(f"There is nothing at this path. The base URL is {base}/v1 (or {base} for openai<1).")


def model_in_path(encoded: str) -> str:
    """Return the model of a path, percent-decoded once; ids contain `/`, which SDKs send as `%2F`."""
    try:
        name = unquote_to_bytes(encoded).decode()
    except UnicodeDecodeError:
        name = ""
    if not is_model_name(name):
        raise errors.ModelNotFound.named("of that name")
    return name


def send(
    request: Request,
    exchange: Exchange,
    status: int,
    body: bytes,
    headers: tuple[tuple[str, str], ...] = (),
    more: Sequence[bytes] = (),
) -> None:
    """Send an answer of the edge's own; of a long one the body goes on with `more`."""
    connection = request.connection
    if not request.payload.is_eof():
        connection.last = True
    exchange.status = status
    exchange.ended(End.COMPLETE)
    with_body = exchange.method != "HEAD"
    answer = response(
        status,
        body,
        request_id=exchange.request_id,
        last=connection.last,
        headers=headers,
        with_body=with_body,
        more_bytes=sum(map(len, more)),
    )
    pieces = (answer, *more) if with_body else (answer,)
    exchange.response_bytes = sum(map(len, pieces))
    for piece in pieces:
        connection.send(piece)


@dataclass(slots=True, eq=False)
class OwnAnswers:
    """What is told to who has a key: models, `created` at Unix seconds that are the same for all, limits and usage."""

    catalogue: Catalogue
    admission: Admission
    usage: UsageIndex
    created: int = field(default_factory=lambda: int(time.time()))

    async def pieces(self, head: Head, generation: Generation, table: HostTable, caller: Caller) -> list[bytes]:
        """Return the answer to an operation of the edge's own, in pieces, made in steps. Raises: `InvalidRequest`."""
        operation = head.asked.operation
        if operation is USAGE:
            query = dict(parse_qsl(head.query()[1:], keep_blank_values=True))
            return [orjson.dumps(await used_by(self.usage, caller.principal.id, query))]
        if operation is LIMITS:
            limits = [each async for each in self._limits(generation.config, table, caller)]
            return [orjson.dumps({"object": "list", "data": limits})]
        return await self._models(table, caller)

    async def _limits(self, config: Config, table: HostTable, caller: Caller) -> AsyncIterator[dict[str, object]]:
        """Yield how far the caller's limits are used, at each model that it may call and that has one; in steps."""
        principal = caller.principal
        for at, name in enumerate(table.names()):
            match = table.find(name) if caller.judge(name) else None
            names = (match.route.limit, principal.limit) if match is not None and match.route.pool else ()
            for each in self.admission.standing(match.route.name if match else "", names, principal.user, principal.id):
                if (limit := config.limits.get(each.limit)) is not None:  # else a reload took it meanwhile
                    yield _limit_document(name, each, limit)
            if at % _A_STEP == _A_STEP - 1:
                await asyncio.sleep(0)

    async def _models(self, table: HostTable, caller: Caller) -> list[bytes]:
        """Return the models that a caller may call at a host, as OpenAI and Anthropic list them, in pieces; in steps.

        Their servers get some time to describe them. To join the pieces of ten thousand would take milliseconds.
        """
        matches: list[tuple[str, Match]] = []
        pools: dict[str, None] = {}
        for at, name in enumerate(table.names()):
            match = table.find(name) if caller.judge(name) else None
            if match is not None:
                matches.append((name, match))
                if match.route.pool and match.route.context_length is None:
                    pools[match.route.pool] = None
            if at % _A_STEP == _A_STEP - 1:
                await asyncio.sleep(0)
        await self.catalogue.learn(pools)
        pieces = [b'{"object":"list","data":[']
        for at in range(0, len(matches), _A_STEP):
            documents = [self.document(name, match) for name, match in matches[at : at + _A_STEP]]
            pieces.append((b"," if at else b"") + orjson.dumps(documents)[1:-1])
            await asyncio.sleep(0)
        first, last = (matches[0][0], matches[-1][0]) if matches else (None, None)
        pieces.append(b"]," + orjson.dumps({"has_more": False, "first_id": first, "last_id": last})[1:])
        return pieces

    def document(self, name: str, match: Match) -> dict[str, object]:
        """Return a model as OpenAI, Anthropic and vLLM describe one, all in one: UIs read this or that of it."""
        document: dict[str, object] = {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": name.partition("/")[0],
            "type": "model",
            "display_name": name,
            "created_at": _rfc_3339(self.created),
        }
        context_length = self.catalogue.context_length_of(name, match)
        if context_length is not None:
            document |= {"context_length": context_length, "max_model_len": context_length}
        return document


@functools.lru_cache(maxsize=1)
def _rfc_3339(unix_s: int) -> str:
    return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _limit_document(model: str, standing: Standing, limit: LimitConfig) -> dict[str, object]:
    """Return how far a limit is used, None for what it does not limit."""
    return {
        "object": "limit",
        "model": model,
        "limit": standing.limit,
        "per": standing.per,
        "requests_per_minute": _left(limit.requests_per_minute, standing.requests),
        "tokens_per_minute": _left(limit.tokens_per_minute, standing.tokens),
        "concurrent_requests": _left(limit.concurrent_requests, standing.running),
        **{name: None for name in ("requests_per_day", "tokens_per_day", "tokens_per_month")},
        **dict(_quotas(standing)),
    }


def _quotas(standing: Standing) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield how far days and months are used, and when the next ones begin."""
    for quota, allowance in standing.quotas:
        resets_at = {"resets_at": allowance.begins_anew(quota)}
        for what, allowed, used in (
            ("requests", allowance.requests, quota.requests),
            ("tokens", allowance.tokens, quota.tokens),
        ):
            if (left := _left(allowed if allowed != NO_LIMIT else None, used)) is not None:
                yield f"{what}_per_{allowance.span}", {**left, **resets_at}


def _left(limit: int | None, used: int) -> dict[str, int] | None:
    return None if limit is None else {"limit": limit, "used": used, "remaining": max(limit - used, 0)}


# --- usage, which operators may ask for too


async def used_by(index: UsageIndex, key_id: str, query: Mapping[str, str]) -> dict[str, object]:
    """Return what a key used from the day `since` to the day `until` (UTC) of a query, by default the last 31.

    Raises: `InvalidRequest`, `Overloaded`.
    """
    today = datetime.now(UTC).date()
    first = _day(query, "since", today - timedelta(days=_USUAL_DAYS - 1))
    last = _day(query, "until", today)
    if unknown := sorted(set(query) - {"since", "until"}):
        raise errors.InvalidRequest("the query may have since and until alone", param=unknown[0])
    try:
        days = await index.sums_of(key_id, first, last)
    except errors.Unusable as error:
        _log.error("usage index: %s", error)
        raise errors.Overloaded("Usage cannot be read right now.", retry_after_s=5) from None
    rows = [{"day": each.day, "model": each.model, **dict(zip(SUMS, each.sums, strict=True))} for each in days]
    return {"object": "usage", "key_id": key_id, "as_of": _rfc_3339(int(index.as_of)), "data": rows}


def _day(query: Mapping[str, str], name: str, usual: date) -> str:
    given = query.get(name)
    if given is None:
        return usual.isoformat()
    if not _DAY.fullmatch(given):
        raise errors.InvalidRequest(f"{name} is a day, such as 2026-11-30", param=name)
    return given
