"""Readiness, metrics and the purge of keys, on a listener of their own: whoever reaches it is an operator."""

from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import orjson
from aiohttp import web
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from edge.keys.stores.protocol import Invalidation
from edge.stage import Lifecycle, Stage
from edge.telemetry.metrics import Metrics

_METRICS_TYPE: Final = "text/plain; version=1.0.0; charset=utf-8; escaping=underscores"

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


Purge = Callable[[Invalidation], Awaitable[dict[str, object]]]


def admin_handler(
    readiness: Readiness, metrics: Metrics, purge: Purge
) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
    """Return the handler of the admin listener; `purge` makes the process forget keys, and returns what it did."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/keys/purge":
            return await _purge(request, purge)
        if request.method not in ("GET", "HEAD"):
            return web.Response(status=405, text="use GET\n", headers={"Allow": "GET, HEAD"})
        match request.path:
            case "/livez":
                return web.Response(text="ok\n")
            case "/readyz" | "/healthz":
                text = "ok\n" if readiness.ready else "not ready\n"
                if "verbose" in request.query:
                    text = readiness.describe()
                return web.Response(status=200 if readiness.ready else 503, text=text)
            case "/metrics":
                return await _scrape(request, metrics)
        return web.Response(status=404, text="try /livez, /readyz, /readyz?verbose, /metrics or POST /keys/purge\n")

    return handle


async def _scrape(request: web.BaseRequest, metrics: Metrics) -> web.StreamResponse:
    """Send the metrics as they are made: megabytes at once would hold the loop up."""
    response = web.StreamResponse(headers={"Content-Type": _METRICS_TYPE})
    await response.prepare(request)
    if request.method != "HEAD":
        async for part in metrics.parts():
            await response.write(part)
    await response.write_eof()
    return response


async def _purge(request: web.BaseRequest, purge: Purge) -> web.Response:
    """Forget keys by `id` and `user` in the query, each as often as wanted; everything when there is neither."""
    if request.method != "POST":
        return web.Response(status=405, text="use POST\n", headers={"Allow": "POST"})
    unknown = [name for name in request.query if name not in ("id", "user")]
    ids, users = (frozenset(request.query.getall(name, ())) for name in ("id", "user"))
    if unknown or "" in ids | users:
        return web.Response(status=400, text="write ?id=KEY_ID, ?user=USER, both, or nothing for every key\n")
    done = await purge(Invalidation(ids=ids, users=users, everything=not ids | users))
    return web.Response(body=orjson.dumps(done), content_type="application/json")
