"""Readiness, metrics and what administers keys, on a listener of their own: whoever reaches it is an operator."""

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Literal

import orjson
from aiohttp import web
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from edge.errors import Unauthenticated
from edge.keys.stores.protocol import Invalidation
from edge.process.api.guard import check_token
from edge.process.api.keys import KeyApi, refusal
from edge.stage import Lifecycle, Stage
from edge.telemetry.metrics import Metrics

_METRICS_TYPE: Final = "text/plain; version=1.0.0; charset=utf-8; escaping=underscores"

_OF_API: Final = ("keys", "users", "openapi.json")  # how its paths begin

Line = tuple[str, str]  # of `/readyz?verbose`: name and value


@dataclass(slots=True)
class Readiness:
    """Whether the process takes requests, and which file is in force; `parts` yield what they add to that."""

    lifecycle: Lifecycle
    generation: int = 0
    loaded_at: float = 0.0
    reload_failed: str = ""  # why the file is not in force, "" when it is
    reload_failures: int = 0  # since the start
    parts: list[Callable[[], Iterable[Line]]] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """Whether a balancer should send requests here."""
        return bool(self.generation) and self.lifecycle.stage is Stage.RUNNING

    def describe(self) -> str:
        """Return what `/readyz?verbose` shows, a fact a line."""
        lines = [
            f"ready: {'yes' if self.ready else 'no, draining' if self.lifecycle.stage is not Stage.RUNNING else 'no'}",
            f"generation: {self.generation}",
            *(f"{name}: {value}" for lines in self.parts for name, value in lines()),
            f"last reload: {'failed, the generation above goes on' if self.reload_failed else 'ok'}",
        ]
        if self.reload_failed:
            lines.append(self.reload_failed)
        return "\n".join(lines) + "\n"

    def metrics(self) -> Iterator[Metric]:
        """Yield which configuration is in force."""
        yield GaugeMetricFamily(
            "edge_config_last_reload_successful", "1, or 0 when the file is bad.", not self.reload_failed
        )
        yield CounterMetricFamily("edge_config_reload_failures", "Reloads refused.", self.reload_failures)
        yield GaugeMetricFamily("edge_config_last_reload_success_timestamp_seconds", "Unix time.", self.loaded_at)
        yield GaugeMetricFamily("edge_config_generation", "Configurations loaded since the start.", self.generation)
        yield GaugeMetricFamily("edge_ready", "1 while a balancer should send requests here.", self.ready)
        draining = self.lifecycle.stage is not Stage.RUNNING
        yield GaugeMetricFamily("edge_draining", "1 from the begin of a stop.", draining)


Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
Purge = Callable[[Invalidation], Awaitable[dict[str, object]]]


@dataclass(frozen=True, slots=True)
class Route:
    """What a path of the admin listener takes, and what answers it; GET takes HEAD as well."""

    method: Literal["GET", "POST"]
    answer: Handler


def admin_handler(routes: Mapping[str, Route], api: KeyApi) -> Handler:
    """Return the handler of the admin listener, by path.

    Without a token there is no API of keys.
    """
    known = ", ".join(path if route.method == "GET" else f"{route.method} {path}" for path, route in routes.items())

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        try:
            check_token(api.token, request.method, request.path, request.headers, request.remote or "unix")
        except Unauthenticated as error:
            return refusal(error)
        route = routes.get(request.path)
        if route is None and api.token is not None and request.path.partition("/")[2].partition("/")[0] in _OF_API:
            return await api.handle(request)
        if route is None:
            return web.Response(status=404, text=f"try {known}\n")
        allowed = ("GET", "HEAD") if route.method == "GET" else (route.method,)
        if request.method not in allowed:
            return web.Response(status=405, text=f"use {route.method}\n", headers={"Allow": ", ".join(allowed)})
        return await route.answer(request)

    return handle


def basic_routes(readiness: Readiness, metrics: Metrics, purge: Purge) -> dict[str, Route]:
    """Return health, metrics and the purge; `purge` makes the process forget keys, and returns what it did."""

    async def live(request: web.BaseRequest) -> web.Response:
        return web.Response(text="ok\n")

    async def ready(request: web.BaseRequest) -> web.Response:
        text = "ok\n" if readiness.ready else "not ready\n"
        if "verbose" in request.query:
            text = readiness.describe()
        return web.Response(status=200 if readiness.ready else 503, text=text)

    return {
        "/livez": Route("GET", live),
        "/readyz": Route("GET", ready),
        "/healthz": Route("GET", ready),
        "/metrics": Route("GET", partial(_scrape, metrics)),
        "/keys/purge": Route("POST", partial(_purge, purge)),
    }


async def _scrape(metrics: Metrics, request: web.BaseRequest) -> web.StreamResponse:
    """Send the metrics as they are made: megabytes at once would hold the loop up."""
    response = web.StreamResponse(headers={"Content-Type": _METRICS_TYPE})
    await response.prepare(request)
    if request.method != "HEAD":
        async for part in metrics.parts():
            await response.write(part)
    await response.write_eof()
    return response


async def _purge(purge: Purge, request: web.BaseRequest) -> web.Response:
    """Forget keys by `id` and `user` in the query, each as often as wanted; everything when there is neither."""
    unknown = [name for name in request.query if name not in ("id", "user")]
    ids, users = (frozenset(request.query.getall(name, ())) for name in ("id", "user"))
    if unknown or "" in ids | users:
        return web.Response(status=400, text="write ?id=KEY_ID, ?user=USER, both, or nothing for every key\n")
    done = await purge(Invalidation(ids=ids, users=users, everything=not ids | users))
    return web.Response(body=orjson.dumps(done), content_type="application/json")
