"""`/status.json`, its page, and its events: what an operator sees of a process, read only.

The page is three files of this package; it asks nobody else for anything, as its policy says.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from typing import Final

import orjson
from aiohttp import web

from edge.process.admin import Route
from edge.process.snapshot import Snapshots

_INTERVAL_S: Final = 1.0  # between two documents
_NO_CACHE: Final = {"Cache-Control": "no-store"}
_POLICY: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_FILES: Final = {
    "/status": ("status.html", "text/html"),
    "/status/page.css": ("page.css", "text/css"),
    "/status/page.js": ("page.js", "text/javascript"),
}


def status_routes(snapshots: Snapshots) -> dict[str, Route]:
    """Return the document of the process, the page that shows it, and the events that keep the page up to date."""
    live = _Live(snapshots)
    routes = {path: Route("GET", partial(_show_file, name, kind)) for path, (name, kind) in _FILES.items()}
    routes["/status.json"] = Route("GET", partial(_show, live))
    routes["/status/events"] = Route("GET", partial(_follow, live))
    return routes


class _Live:
    """The latest document as JSON: made once a second, however many watch it."""

    def __init__(self, snapshots: Snapshots, clock: Callable[[], float] = time.monotonic) -> None:
        self._snapshots = snapshots
        self._clock = clock
        self._making = asyncio.Lock()
        self._latest = b""
        self._made_at = -_INTERVAL_S

    async def latest(self) -> bytes:
        """Return a document that is younger than the interval; whoever asks first makes it for the others."""
        async with self._making:
            if self._clock() - self._made_at >= _INTERVAL_S:
                self._latest = orjson.dumps(await self._snapshots.take())
                self._made_at = self._clock()
        return self._latest


async def _show(live: _Live, request: web.BaseRequest) -> web.Response:
    return web.Response(body=await live.latest(), content_type="application/json", headers=_NO_CACHE)


async def _follow(live: _Live, request: web.BaseRequest) -> web.StreamResponse:
    """Send the document each second, until who watches leaves; a slow one gets fewer."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no", **_NO_CACHE})
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        while request.method != "HEAD":
            await response.write(b"data: " + await live.latest() + b"\n\n")
            await asyncio.sleep(_INTERVAL_S)
    return response


async def _show_file(name: str, kind: str, request: web.BaseRequest) -> web.Response:
    content = files(__package__).joinpath("page", name).read_bytes()
    return web.Response(body=content, content_type=kind, charset="utf-8", headers={**_POLICY, **_NO_CACHE})
