"""Serves the API of keys: reads a request, has its endpoint act in a thread, and answers.

No key is logged: a line names the ids of what was changed, after it was.
"""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import msgspec
from aiohttp import web
from multidict import CIMultiDict

from edge import errors
from edge.config.settings import Config
from edge.errors import EdgeError, InvalidRequest, KeyStoreUnavailable, Unusable
from edge.ids import new_request_id
from edge.journal.index import UsageIndex
from edge.keys.stores import administration as admin
from edge.keys.stores.protocol import Invalidation
from edge.keys.stores.table import Registries
from edge.own_answers import used_by
from edge.process.api.endpoints import (
    Call,
    Conflict,
    Done,
    Endpoint,
    KeyNotFound,
    ReadOnly,
    endpoint_of,
)
from edge.process.api.openapi import document
from edge.protocols import OPENAI

_log = logging.getLogger(__name__)

_MAX_BODY_BYTES: Final = 2**16
_BODY_TIMEOUT_S: Final = 10.0
_PATIENCE_S: Final = 10.0  # of who waits for the changes of others
_LONGEST_ACTOR: Final = 128
_LONGEST_IDEMPOTENCY_KEY: Final = 255
_encoder: Final = msgspec.json.Encoder()


class KeyApi:
    """Answers requests for keys and users; `config` yields the configuration in force.

    `forget` has every process forget what was changed. One change is made at a time, by one thread: a store takes no
    more, and the thread keeps it open.
    """

    def __init__(
        self,
        config: Callable[[], Config],
        forget: Callable[[Invalidation], Awaitable[object]],
        usage: UsageIndex,
    ) -> None:
        self._config = config
        self._forget = forget
        self._usage = usage
        self._acting = asyncio.Lock()
        self._registries = Registries()
        self._thread = ThreadPoolExecutor(1, "edge-key-api")

    @property
    def token(self) -> str | None:
        """The token of the file in force, None for none."""
        return self._config().server.admin_token

    async def close(self) -> None:
        """Let go of the store, once the change that is being made is made."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._registries.close)
        self._thread.shutdown(wait=False)

    async def handle(self, request: web.BaseRequest) -> web.Response:
        """Answer a request whose token is proved."""
        try:
            return await self._answer(request)
        except EdgeError as error:
            return refusal(error)
        except Exception:  # a defect: the caller gets a clean 500, the log the place
            _log.exception("a request for keys failed")
            return refusal(errors.InternalError("The edge failed to handle this request."))

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        if request.path == "/openapi.json" and request.method in ("GET", "HEAD"):
            return web.Response(body=document(), content_type="application/json")
        endpoint, path_id = endpoint_of(request.method, request.path)
        query = _query(request, endpoint)
        data = await _read(request)
        body = _decode(data, endpoint) if endpoint.takes is not None else None
        config, actor = self._config(), _actor(request)
        usage = None
        if endpoint.needs_usage:
            usage = await used_by(self._usage, path_id, query)
        idempotency = _idempotency(request, data, self.token or "") if endpoint.is_idempotent else None
        call = Call(path_id, query, body, config.limits, idempotency, usage)
        done = await self._act(endpoint, call, actor)
        if done.forget is not None:
            await self._forget(done.forget)
        if done.key_id or done.user:
            _log.info(
                "%s by %s from %s: %s of %s", endpoint.name, actor.name, actor.address, done.key_id or "-", done.user
            )
        if done.document is None:
            return web.Response(status=endpoint.status)
        headers = {"Cache-Control": "no-store"}
        return web.Response(
            status=endpoint.status,
            body=_encoder.encode(done.document),
            content_type="application/json",
            headers=headers,
        )

    async def _act(self, endpoint: Endpoint, call: Call, actor: admin.Actor) -> Done:
        """Have an endpoint act; what it raises becomes an error of this API."""
        keys = self._config().keys

        def act() -> Done:
            with self._registries.registry(keys, actor) as registry:
                return endpoint.act(registry, call)

        try:
            async with asyncio.timeout(_PATIENCE_S):
                await self._acting.acquire()
        except TimeoutError:
            raise _unavailable() from None
        try:
            return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, act))
        except admin.UnknownKey:
            raise KeyNotFound("There is no such key.") from None
        except admin.Unchangeable as error:
            raise Conflict(str(error)) from None
        except admin.IdempotencyReused as error:
            raise Conflict(str(error), code="idempotency_key_reused") from None
        except admin.ReadOnlyStore:
            raise ReadOnly("Keys are kept by another server: they are made and changed there.") from None
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        except Unusable as error:
            _log.error("keys cannot be administered: %s", error)
            raise _unavailable() from None
        finally:
            self._acting.release()


def refusal(error: EdgeError) -> web.Response:
    """Return an error as every answer of this API has it."""
    headers = CIMultiDict(error.headers)
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    body = OPENAI.error_body(error, new_request_id())
    return web.Response(status=error.status, body=body, content_type="application/json", headers=headers)


def _unavailable() -> KeyStoreUnavailable:
    return KeyStoreUnavailable("The key store cannot be used right now, try again in a moment.", retry_after_s=1)


def _query(request: web.BaseRequest, endpoint: Endpoint) -> dict[str, str]:
    known = [each.name for each in endpoint.query]
    if not set(request.query) <= set(known) or len(request.query) > len(set(request.query)):
        what = f"only {', '.join(known)}, each once" if known else "none"
        raise InvalidRequest(f"the query has what is not known: there is {what}")
    return dict(request.query)


async def _read(request: web.BaseRequest) -> bytes:
    """Return the body; raises `RequestTooLarge`, `RequestTimeout`."""
    data = bytearray()
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for part in request.content.iter_any():
                data += part
                if len(data) > _MAX_BODY_BYTES:
                    raise errors.RequestTooLarge(f"the body is over the limit of {_MAX_BODY_BYTES} bytes")
    except TimeoutError:
        raise errors.RequestTimeout("The body of the request took too long.") from None
    return bytes(data)


def _decode(data: bytes, endpoint: Endpoint) -> Any:
    assert endpoint.takes is not None
    try:
        return msgspec.json.decode(data or b"{}", type=endpoint.takes)
    except (ValueError, RecursionError) as error:  # its words name places and types, and no value
        raise InvalidRequest(f"the body is not what is expected here: {error}") from None


def _idempotency(request: web.BaseRequest, data: bytes, secret: str) -> admin.Idempotency | None:
    """Return what names a request that may come again; what it asks for is its path and its body."""
    name = _only(request, "Idempotency-Key", _LONGEST_IDEMPOTENCY_KEY)
    if not name:
        return None
    asked = hashlib.sha256(request.path.encode() + b"\n" + data).digest()
    return admin.Idempotency(hashlib.sha256(name.encode()).digest(), asked, secret.encode())


def _actor(request: web.BaseRequest) -> admin.Actor:
    return admin.Actor(_only(request, "X-Actor", _LONGEST_ACTOR) or "admin token", "api", request.remote or "unix")


def _only(request: web.BaseRequest, name: str, longest: int) -> str:
    """Return the one value of a header, "" for none; raises `InvalidRequest`."""
    values = request.headers.getall(name, [])
    if len(values) > 1 or any(not each.isprintable() or len(each) > longest for each in values):
        raise InvalidRequest(f"{name} is one header of at most {longest} printable characters")
    return values[0].strip() if values else ""
