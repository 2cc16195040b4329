"""What is wrong with a process now, worst first: sentences made of its document alone."""

from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

from edge.upstream.health import HEALTHY

_SOON_S: Final = 14 * 86400  # before the end of a certificate
_STEP_S: Final = 5.0  # of the clock: what is judged by it has leeways of seconds
_NEAR: Final = 0.9  # of a limit
_SLOW: Final = 3.0  # times as long as its pool's quickest member takes to the first byte
_FEW: Final = 5  # requests of which no quantile is made much of
_MOST_FAILED: Final = 0.05  # of a route's requests

_PASSING: Final = ("busy", "ejected for some users")
Severity = Literal["error", "warning"]
Document = Mapping[str, Any]


def find_troubles(status: Document) -> list[dict[str, str]]:
    """Return what an operator has to know, each with its `severity`, errors first."""
    found = [*_of_process(status), *_of_parts(status), *_of_pools(status), *_of_routes(status), *_of_limits(status)]
    found.sort(key=lambda trouble: trouble["severity"])
    return found


def _trouble(severity: Severity, what: str) -> dict[str, str]:
    return {"severity": severity, "what": what}


def _of_process(status: Document) -> Iterator[dict[str, str]]:
    if status["stage"] != "running":
        yield _trouble("warning", f"the process is {status['stage']}: it takes no new requests soon")
    if error := status["config"]["last_reload_error"]:
        generation = status["config"]["generation"]
        yield _trouble("error", f"the last reload was refused, generation {generation} goes on: {error}")
    now = status["now"]
    if now["connections"] >= now["max_connections"]:
        yield _trouble("error", f"all {now['max_connections']} connections are taken")
    if now["body_bytes"] >= _NEAR * now["max_body_bytes"]:
        yield _trouble("error", "server.body_memory is nearly used up: large requests get a 503")
    if abs(now["clock_step_s"]) >= _STEP_S:
        what = "keys and tokens that end, and limits that are not shared, are judged by it"
        yield _trouble("warning", f"the clock was set by {now['clock_step_s']:.0f} s since the start: {what}")
    for certificate in status["certificates"]:
        left_s = certificate["ends_at"] - status["time"]
        if left_s <= 0:
            who = "clients refuse it" if certificate["of"] == "server.tls" else "servers are not proved by it any more"
            yield _trouble("error", f"the certificate of {certificate['of']} has ended: {who}")
        elif left_s < _SOON_S:
            what = f"the certificate of {certificate['of']} ends in {left_s // 86400:.0f} days"
            yield _trouble("warning", what)


def _of_parts(status: Document) -> Iterator[dict[str, str]]:
    for part in status["parts"]:
        if not part["up"]:
            yield _trouble("error", f"{part['name']}: {part['why']}")


def _of_pools(status: Document) -> Iterator[dict[str, str]]:
    for pool in status["pools"]:
        name = pool["name"]
        if pool["out"] and pool["out"] == pool["members_count"]:
            yield _trouble("error", f"pool {name}: every member is out")
        if pool["waiting"]:
            yield _trouble("warning", f"pool {name}: {pool['waiting']} requests wait, all members are full")
        if not pool["members_count"]:
            yield _trouble("error", f"pool {name} has no member: its name in dns is not resolved")
        times = [each["ttft_p50_ms"] for each in pool["members"] if each["ttft_p50_ms"] and each["requests"] >= _FEW]
        for member in pool["members"]:
            yield from _of_member(name, member, min(times, default=None))


def _of_member(pool: str, member: Document, quickest_ms: float | None) -> Iterator[dict[str, str]]:
    at = f"pool {pool}: {member['endpoint']}"
    if member["state"] != HEALTHY:
        severity: Severity = "warning" if member["state"] in _PASSING else "error"
        why = member["why"].removeprefix("health check: ") or "for a moment"
        yield _trouble(severity, f"{at}, {member['state']}: {why}")
    elif member["errors"]:
        yield _trouble("warning", f"{at}: {member['errors']} errors in the last minute: {member['why']}")
    p50_ms = member["ttft_p50_ms"]
    if quickest_ms and p50_ms and member["requests"] >= _FEW and p50_ms > _SLOW * quickest_ms:
        what = f"{at} is slow: half of the first bytes take over {p50_ms:.0f} ms, {quickest_ms:.0f} ms elsewhere"
        yield _trouble("warning", what)


def _of_routes(status: Document) -> Iterator[dict[str, str]]:
    for route in status["routes"]:
        if route["requests"] >= _FEW and route["failed"] > _MOST_FAILED * route["requests"]:
            what = f"{route['name']}: {route['failed']} of {route['requests']} requests failed in the last minute"
            yield _trouble("error", what)


def _of_limits(status: Document) -> Iterator[dict[str, str]]:
    for near in status["limits"]:
        if near["share"] >= _NEAR and near["span"] == "minute":  # a day or a month that is used up is no news for long
            used = f"{near['used']} of {near['allowed']} {near['what']}"
            yield _trouble("warning", f"limit {near['limit']}: {near['whom']} has used {used} at {near['route']}")
