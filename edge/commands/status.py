"""`edge status`: what the status page shows, in a terminal."""

import argparse
import http.client
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import orjson

from edge.commands.arguments import add_config, add_json, address, checked
from edge.config.reading import load
from edge.config.values import Address
from edge.errors import Unusable

_TIMEOUT_S: Final = 5.0
_INTERVAL_S: Final = 1.0
_TOKEN_VARIABLE: Final = "EDGE_ADMIN_TOKEN"
_CLEAR: Final = "\x1b[H\x1b[2J\x1b[3J"  # home, the screen, what scrolled out of it (ECMA-48, xterm)
_BARS: Final = "▁▂▃▄▅▆▇█"
_SHOWN: Final = 40  # seconds of a plot
_MOST_ROWS: Final = 8  # of failures and limits, so that all fits a screen

Document = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `edge status`."""
    add_config(parser)
    parser.add_argument(
        "--admin",
        type=checked(address),
        metavar="ADDR",
        help=f"instead of server.admin; its token is in {_TOKEN_VARIABLE}",
    )
    parser.add_argument("--watch", action="store_true", help="show it anew each second, until Ctrl-C")
    add_json(parser)


def run(parsed: argparse.Namespace) -> int:
    """Print the state of a running edge; return 1 when it is not ready. Raises `Unusable` when it does not answer."""
    if parsed.admin is not None:
        admin, token = parsed.admin, os.environ.get(_TOKEN_VARIABLE)
    else:
        server = load(parsed.config).server
        admin, token = server.admin, server.admin_token
    if parsed.json:
        content = fetch(admin, token)
        print(content.decode())
        return int(not orjson.loads(content)["ready"])
    while True:
        status = orjson.loads(fetch(admin, token))
        lines = [_printable(line) for line in describe(status)]
        if not parsed.watch:
            print("\n".join(lines))
            return int(not status["ready"])
        width, height = os.get_terminal_size() if sys.stdout.isatty() else (200, 1000)
        print(_CLEAR + "\n".join(line[:width] for line in lines[: height - 1]), flush=True)
        time.sleep(_INTERVAL_S)


def fetch(admin: Address, token: str | None = None) -> bytes:
    """Return `/status.json` of the edge whose admin listener is there; raises `Unusable`."""
    connection = _Connection(admin)
    try:
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        connection.request("GET", "/status.json", headers=headers)
        answer = connection.getresponse()
        content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise Unusable(f"no edge answers at {admin} ({error}): start it, or write its --admin") from None
    finally:
        connection.close()
    if answer.status == 401:
        raise Unusable(
            f"{admin} asks for another admin token: --config names its file, or put the token into {_TOKEN_VARIABLE}"
        )
    if answer.status != 200:
        raise Unusable(f"{admin} answers {answer.status} to /status.json: write the --admin of an edge")
    return content


class _Connection(http.client.HTTPConnection):
    """A connection to an address, which may be a unix socket."""

    def __init__(self, admin: Address) -> None:
        host = "127.0.0.1" if admin.host in (None, "0.0.0.0", "::") else admin.host
        super().__init__(str(host), admin.port, timeout=_TIMEOUT_S)
        self._path = admin.path

    def connect(self) -> None:
        if self._path is None:
            super().connect()
            return
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(str(self._path))


def _printable(line: str) -> str:
    """Return a line without what a terminal would obey: some of it comes from upstreams."""
    return "".join(each if each.isprintable() else "?" for each in line)


# --- what is shown


def describe(status: Document) -> Iterator[str]:
    """Yield the lines of a document: troubles first, then what is asked, who answers, and the rest."""
    yield from _head(status)
    yield from _routes(status)
    for pool in status["pools"]:
        yield from _pool(pool, status["time"])
    if status["pools_more"]:
        yield f"  {status['pools_more']} more pools are quiet"
    yield from _rest(status)


def _head(status: Document) -> Iterator[str]:
    config, now, minute = status["config"], status["now"], status["minute"]
    state = "ready" if status["ready"] else "not ready"
    up, loaded = _span(status["time"] - status["started_at"]), _span(status["time"] - config["loaded_at"])
    yield (
        f"edge {status['version']}  {state} ({status['stage']})  up {up}  generation {config['generation']}, loaded "
        f"{loaded} ago, {config['sha256'][:12]}"
    )
    yield (
        f"{now['in_flight']} in flight  {now['connections']} of {now['max_connections']} connections  last minute: "
        f"{minute['requests']} requests, {minute['failed']} failed, {minute['refused']} refused, first byte "
        f"{_ms(minute['ttft_p50_ms'])} / {_ms(minute['ttft_p95_ms'])}, {minute['tokens_per_s']} tokens/s"
    )
    yield ""
    for trouble in status["troubles"]:
        yield f"{'!!' if trouble['severity'] == 'error' else ' !'} {trouble['what']}".replace("\n", "; ")
    if not status["troubles"]:
        yield "no troubles"


def _routes(status: Document) -> Iterator[str]:
    rows = [["ROUTE", "POOL", "REQUESTS", "FAILED", "REFUSED", "TTFT p50/p95", "TOKENS/s", "REQUESTS/s, LATEST LAST"]]
    for route in status["routes"]:
        series = route["series"]["requests"][-_SHOWN:] if "series" in route else []
        ttft = f"{_ms(route['ttft_p50_ms'])} / {_ms(route['ttft_p95_ms'])}"
        counts = [str(route[name]) for name in ("requests", "failed", "refused")]
        rows.append([route["name"], route["pool"], *counts, ttft, str(route["tokens_per_s"]), plot(series)])
    yield from _table(rows)
    if status["routes_more"]:
        yield f"  {status['routes_more']} more routes are quiet"


def _pool(pool: Document, now: float) -> Iterator[str]:
    waits = f", {pool['waiting']} of {pool['queue']} wait" if pool["queue"] else ""
    rows = [[f"POOL {pool['name']}{waits}", "STATE", "SINCE", "IN FLIGHT", "REQUESTS", "ERRORS", "TTFT p50/p95", "WHY"]]
    for member in pool["members"]:
        again = f", again in {_span(member['back_in_s'])}" if member["back_in_s"] is not None else ""
        since = "start" if member["since"] is None else _span(now - member["since"])
        most = "" if member["max_in_flight"] is None else f" of {member['max_in_flight']}"
        ttft = f"{_ms(member['ttft_p50_ms'])} / {_ms(member['ttft_p95_ms'])}"
        why = f"{member['why']} {member['last_request_id']}".strip()
        counts = [f"{member['in_flight']}{most}", str(member["requests"]), str(member["errors"])]
        rows.append([member["endpoint"], member["state"] + again, since, *counts, ttft, why])
    yield from _table(rows)
    if pool["members_more"]:
        yield f"  {pool['members_more']} more members are quiet"


def _rest(status: Document) -> Iterator[str]:
    if status["limits"]:
        rows = [["NEAREST TO A LIMIT", "LIMIT", "ROUTE", "USED", "SHARE"]]
        for near in status["limits"][:_MOST_ROWS]:
            used = f"{near['used']} of {near['allowed']} {near['what']}"
            rows.append([near["whom"], near["limit"], near["route"], used, f"{near['share']:.0%}"])
        yield from _table(rows)
    rows = [["PART", "STATE", "SINCE THE START"]]
    for part in status["parts"]:
        facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in part["facts"].items())
        rows.append([part["name"], "ok" if part["up"] else f"down: {part['why']}", facts])
    for certificate in status["certificates"]:
        left = f"ends in {_span(certificate['ends_at'] - status['time'])}"
        rows.append([f"certificate of {certificate['of']}", left, ", ".join(certificate["names"])])
    yield from _table(rows)
    if status["failures"]:
        rows = [["FAILED", "REQUEST", "ROUTE", "ENDPOINT", "STATUS", "END", "UPSTREAM"]]
        for each in status["failures"][:_MOST_ROWS]:
            upstream = f"{each['upstream_status'] or ''} {each['upstream_error']}".strip()
            ago = f"{_span(status['time'] - each['at'])} ago"
            rows.append(
                [ago, each["request_id"], each["route"], each["endpoint"], str(each["status"]), each["end"], upstream]
            )
        yield from _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield an empty line, and rows whose columns are as wide as their widest cell; the last one is not filled up."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield ""
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def plot(values: Sequence[int]) -> str:
    """Return a bar for each value, from the lowest for nothing to the highest for the most."""
    most = max(values, default=0) or 1
    return "".join(_BARS[round(value / most * (len(_BARS) - 1))] for value in values)


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1000:.1f} s" if value >= 1000 else f"{value:.0f} ms"


def _span(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
