"""Health, metrics and the purge of keys, on a listener of their own: whoever reaches it is an operator."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import orjson
from aiohttp import web

from edge.keys.stores.protocol import Invalidation
from edge.stage import Lifecycle, Stage
from edge.telemetry.metrics import Metrics

_METRICS_TYPE: Final = "text/plain; version=1.0.0; charset=utf-8; escaping=underscores"


@dataclass(slots=True)
class Health:
    """What the process says of itself."""

    lifecycle: Lifecycle
    generation: int = 0
    loaded_at: float = 0.0
    reload_failed: str = ""  # why the file is not in force, "" when it is
    reload_failures: int = 0  # since the start
    details: Callable[[], list[tuple[str, str]]] = field(default=list)

    @property
    def ready(self) -> bool:
        """Whether a balancer should send requests here."""
        return bool(self.generation) and self.lifecycle.stage is Stage.RUNNING

    def describe(self) -> str:
        """Return what `/readyz?verbose` shows, a fact a line."""
        lines = [
            f"ready: {'yes' if self.ready else 'no, draining' if self.lifecycle.stage is not Stage.RUNNING else 'no'}",
            f"generation: {self.generation}",
            *(f"{name}: {value}" for name, value in self.details()),
            f"last reload: {'failed, the generation above goes on' if self.reload_failed else 'ok'}",
        ]
        if self.reload_failed:
            lines.append(self.reload_failed)
        return "\n".join(lines) + "\n"


Purge = Callable[[Invalidation], Awaitable[dict[str, object]]]


def admin_handler(
    health: Health, metrics: Metrics, purge: Purge
) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
    """Return the handler of the admin listener; `purge` makes the process forget keys, and tells what it did."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/keys/purge":
            return await _purge(request, purge)
        if request.method not in ("GET", "HEAD"):
            return web.Response(status=405, text="use GET\n", headers={"Allow": "GET, HEAD"})
        match request.path:
            case "/livez":
                return web.Response(text="ok\n")
            case "/readyz" | "/healthz":
                text = health.describe() if "verbose" in request.query else "ok\n" if health.ready else "not ready\n"
                return web.Response(status=200 if health.ready else 503, text=text)
            case "/metrics":
                return web.Response(body=await metrics.render(), headers={"Content-Type": _METRICS_TYPE})
        return web.Response(status=404, text="try /livez, /readyz, /readyz?verbose, /metrics or POST /keys/purge\n")

    return handle


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
