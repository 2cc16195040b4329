"""What is said to be wrong, from a document alone."""

import copy
from typing import Any

import pytest

from edge.process.troubles import find_troubles

MEMBER: dict[str, Any] = {
    "endpoint": "h:1", "state": "healthy", "why": "", "errors": 0, "requests": 9, "ttft_p50_ms": 100.0,
}  # fmt: skip
WELL: dict[str, Any] = {
    "time": 1000.0,
    "stage": "running",
    "config": {"generation": 2, "last_reload_error": ""},
    "now": {"connections": 1, "max_connections": 9, "body_bytes": 0, "max_body_bytes": 100, "clock_step_s": 0.1},
    "parts": [{"name": "journal", "up": True, "why": ""}],
    "pools": [
        {"name": "p", "out": 0, "waiting": 0, "members_count": 2, "members": [MEMBER, {**MEMBER, "endpoint": "h:2"}]}
    ],
    "routes": [{"name": "r", "requests": 100, "failed": 1}],
    "limits": [
        {
            "share": 0.5,
            "limit": "l",
            "whom": "u",
            "used": 1,
            "allowed": 2,
            "what": "requests",
            "route": "r",
            "span": "minute",
        },
        {
            "share": 1.0,
            "limit": "l",
            "whom": "u",
            "used": 2,
            "allowed": 2,
            "what": "requests per day",
            "route": "r",
            "span": "day",
        },
    ],
    "certificates": [{"of": "server.tls", "ends_at": 1000.0 + 90 * 86400}],
}


def test_nothing_is_wrong_with_one_that_is_well() -> None:
    assert find_troubles(WELL) == []


@pytest.mark.parametrize(
    ("path", "value", "severity", "what"),
    [
        (("stage",), "draining", "warning", "the process is draining: it takes no new requests soon"),
        (("config", "last_reload_error"), "x", "error", "the last reload was refused, generation 2 goes on: x"),
        (("now", "connections"), 9, "error", "all 9 connections are taken"),
        (("now", "body_bytes"), 95, "error", "server.body_memory is nearly used up: large requests get a 503"),
        (
            ("now", "clock_step_s"),
            -3600.0,
            "warning",
            "the clock was set by -3600 s since the start: keys and tokens that end, and limits that are not shared,"
            " are judged by it",
        ),
        (("parts", 0), {"name": "journal", "up": False, "why": "disk full"}, "error", "journal: disk full"),
        (("pools", 0, "out"), 2, "error", "pool p: every member is out"),
        (("pools", 0, "waiting"), 3, "warning", "pool p: 3 requests wait, all members are full"),
        (("pools", 0, "members_count"), 0, "error", "pool p has no member: its name in dns is not resolved"),
        (
            ("pools", 0, "members", 1),
            {**MEMBER, "state": "ejected", "why": "answers 401 (3 times)", "errors": 3},
            "error",
            "pool p: h:1, ejected: answers 401 (3 times)",
        ),
        (
            ("pools", 0, "members", 1),
            {**MEMBER, "state": "fails its health check", "why": "health check: no answer"},
            "error",
            "pool p: h:1, fails its health check: no answer",
        ),
        (("pools", 0, "members", 1), {**MEMBER, "state": "busy"}, "warning", "pool p: h:1, busy: for a moment"),
        (
            ("pools", 0, "members", 1),
            {**MEMBER, "errors": 2, "why": "answers 500 (2 times)"},
            "warning",
            "pool p: h:1: 2 errors in the last minute: answers 500 (2 times)",
        ),
        (
            ("pools", 0, "members", 1, "ttft_p50_ms"),
            2000.0,
            "warning",
            "pool p: h:2 is slow: half of the first bytes take over 2000 ms, 100 ms elsewhere",
        ),
        (("routes", 0, "failed"), 10, "error", "r: 10 of 100 requests failed in the last minute"),
        (("limits", 0, "share"), 0.95, "warning", "limit l: u has used 1 of 2 requests at r"),
        (("certificates", 0, "ends_at"), 1000.0, "error", "the certificate of server.tls has ended: clients refuse it"),
        (
            ("certificates", 0, "ends_at"),
            1000.0 + 5.9 * 86400,
            "warning",
            "the certificate of server.tls ends in 5 days",
        ),
    ],
)
def test_each_trouble_is_a_sentence_that_names_the_culprit(
    path: tuple[Any, ...], value: object, severity: str, what: str
) -> None:
    status = copy.deepcopy(WELL)
    place: Any = status
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    assert find_troubles(status) == [{"severity": severity, "what": what}]


def test_errors_come_before_warnings() -> None:
    status = copy.deepcopy(WELL) | {"stage": "draining"}
    status["parts"][0] = {"name": "sink", "up": False, "why": "refused"}
    assert [each["severity"] for each in find_troubles(status)] == ["error", "warning"]
