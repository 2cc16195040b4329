"""The proxy that a tutorial of aiohttp would write: `Application`, `ClientSession`, and a loop over chunks."""

import argparse
from collections.abc import AsyncIterator

import uvloop
from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

_SESSION = web.AppKey("session", ClientSession)
_UPSTREAM = web.AppKey("upstream", str)
_MAX_BODY_BYTES = 64 * 1024 * 1024


async def _proxy(request: web.Request) -> web.StreamResponse:
    session, url = request.app[_SESSION], request.app[_UPSTREAM] + request.path
    headers = {"Content-Type": request.headers.get("Content-Type", ""), "Authorization": "Bearer up"}
    async with session.post(url, data=await request.read(), headers=headers) as answer:
        response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.headers["Content-Type"]})
        await response.prepare(request)
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
        return response


async def _session(app: web.Application) -> AsyncIterator[None]:
    async with ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(total=None)) as session:
        app[_SESSION] = session
        yield


def main() -> None:
    """Run the proxy."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.tutorial", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream-port", type=int, required=True)
    parsed = parser.parse_args()
    app = web.Application(client_max_size=_MAX_BODY_BYTES)
    app[_UPSTREAM] = f"http://127.0.0.1:{parsed.upstream_port}"
    app.cleanup_ctx.append(_session)
    app.router.add_post("/{path:.*}", _proxy)
    web.run_app(app, host="127.0.0.1", port=parsed.port, loop=uvloop.new_event_loop(), print=None, access_log=None)


if __name__ == "__main__":
    main()
