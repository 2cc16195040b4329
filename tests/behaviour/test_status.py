"""The status of a running edge: its document, its events, its page."""

import asyncio
import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import trustme

from edge.process.snapshot import Snapshots
from edge.simulator.behaviour import Behaviour
from edge.simulator.server import Simulator
from tests.behaviour.test_admin import admin
from tests.conftest import ROUTES, USER, Edge, RawClient, StartEdge, soon, tls_setting

PAGE = Path(__file__).parents[2] / "edge/process/page"


async def status_of(edge: Edge) -> dict[str, Any]:
    """The document of now, without its second of rest."""
    code, headers, body = await admin(edge, "/status.json")
    assert (code, headers["content-type"]) == (200, "application/json")
    document: dict[str, Any] = json.loads(body)
    return document


async def test_document_says_which_file_is_in_force_and_that_all_is_well(edge: Edge) -> None:
    status = await status_of(edge)
    assert (status["ready"], status["stage"], status["troubles"]) == (True, "running", [])
    assert status["config"]["generation"] == 1
    assert status["config"]["sha256"] == hashlib.sha256(edge.config_path.read_bytes()).hexdigest()
    assert [route["name"] for route in status["routes"]] == ["public/deepseek-r1", "u-*"]
    assert {part["name"]: part["up"] for part in status["parts"]} == {
        "key store": True, "key cache": True, "responses": True, "journal": True, "access log": True,
    }  # fmt: skip


async def test_last_minute_is_that_of_routes_and_members(edge: Edge) -> None:
    asked = {"model": "public/deepseek-r1", "stream": True, "simulate": {"tokens": 3}}
    for _ in range(3):
        await edge.ask(asked)
    await edge.ask({"model": "public/unknown"})
    await edge.idle()
    status = await Snapshots(edge.server._parts, lambda: time.monotonic() + 1).take()  # the second that runs has ended
    by_name = {route["name"]: route for route in status["routes"]}
    route, none = by_name["public/deepseek-r1"], by_name["(no route)"]
    assert (route["requests"], route["failed"], route["refused"]) == (3, 0, 0)
    assert (none["requests"], none["refused"]) == (1, 1)
    assert sum(route["series"]["requests"]) == 3
    assert len(route["series"]["tokens"]) == 60
    assert route["ttft_p50_ms"] > 0
    [member] = status["pools"][0]["members"]
    assert (member["requests"], member["errors"], member["state"]) == (3, 0, "healthy")
    assert member["ttft_p50_ms"] == route["ttft_p50_ms"]


async def test_member_that_fails_is_named_with_its_reason_and_the_request(
    start_edge: StartEdge, simulator: Simulator, unused_tcp_port: int
) -> None:
    refusing = Simulator(Behaviour(fault="error", status=401))
    await refusing.start()
    try:
        routes = ROUTES.replace('["{upstream}"]', f'["{refusing.url}", "http://127.0.0.1:{unused_tcp_port}"]')
        edge = await start_edge(routes.replace("{upstream}", simulator.url))
        for _ in range(6):
            await edge.ask({"model": "public/deepseek-r1"})
        status = await status_of(edge)
    finally:
        await refusing.close()
    refuses, unreachable = status["pools"][0]["members"]
    assert re.match(r"answers 401( \(\d times\))?", refuses["why"])
    assert re.match(r"refused( \(\d times\))?", unreachable["why"])
    assert refuses["errors"] >= 1
    assert refuses["last_request_id"].startswith("req_")
    assert unreachable["state"] == "ejected"
    assert unreachable["since"] <= status["time"]
    assert unreachable["back_in_s"] > 0
    [failure, *_] = status["failures"]
    log = {line["request_id"]: line for line in await edge.log()}[failure["request_id"]]
    assert {failure["route"], log["route"]} == {"public/deepseek-r1"}
    assert (failure["status"], failure["upstream_status"]) == (log["status"], log["upstream_status"] or 0)


async def test_reload_that_was_refused_and_limits_that_are_near_are_troubles(
    start_edge: StartEdge, simulator: Simulator
) -> None:
    limit = 'limit = "one"\n[limits.one]\nrequests_per_minute = 1\n'
    routes = ROUTES.replace('pool = "r1"\n', f'pool = "r1"\n{limit}').replace("{upstream}", simulator.url)
    edge = await start_edge(routes)
    await edge.ask({"model": "public/deepseek-r1"})
    await edge.ask({"model": "public/deepseek-r1"})
    edge.server._reloader.refuse(edge.server.generation, "routes.toml:3: nonsense")
    status = await status_of(edge)
    [near] = status["limits"]
    assert (near["whom"], near["used"], near["allowed"], near["what"]) == (USER, 1, 1, "requests")
    assert [each["what"] for each in status["troubles"]] == [
        "the last reload was refused, generation 1 goes on: routes.toml:3: nonsense",
        f"limit one: {USER} has used 1 of 1 requests at public/deepseek-r1",
    ]


async def test_certificate_is_shown_with_its_end(start_edge: StartEdge, simulator: Simulator, tmp_path: Path) -> None:
    tls = tls_setting(tmp_path, trustme.CA())
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server=tls)
    status = await status_of(edge)
    [certificate] = status["certificates"]
    assert (certificate["of"], certificate["names"]) == ("server.tls", ["127.0.0.1"])
    assert certificate["ends_at"] > status["time"]


async def test_no_secret_is_shown(start_edge: StartEdge, simulator: Simulator) -> None:
    """Neither the keys of callers nor those of upstreams, nor the password of a sink."""
    endpoint = f'{{ url = "{simulator.url}", api_key = "sk-upstream" }}'
    sink = '[usage]\nsink = "redis://:sk-sink@127.0.0.1:1/0"\n'
    edge = await start_edge(ROUTES.replace('"{upstream}"]', f"{endpoint}]").replace("{upstream}", "http://a") + sink)
    await edge.ask({"model": "public/deepseek-r1"})
    _, _, body = await admin(edge, "/status.json")
    text = body.decode()
    assert edge.key not in text
    assert "sk-" not in text


async def test_events_carry_the_document_again_and_again_and_end_with_the_process(edge: Edge) -> None:
    client = RawClient(*await asyncio.open_connection("127.0.0.1", edge.admin_port, limit=2**20))
    client.send(b"GET /status/events HTTP/1.1\r\nHost: x\r\n\r\n")
    head = (await client.head()).decode().lower()
    assert "content-type: text/event-stream" in head
    assert "cache-control: no-store" in head

    async def event() -> dict[str, Any]:
        line = await soon(client.reader.readuntil(b"\n\n"))
        document: dict[str, Any] = json.loads(line.partition(b"data: ")[2].split(b"\n")[0])
        return document

    first = later = await event()
    while later["time"] == first["time"]:  # on a busy machine the same one may come twice
        later = await event()
    assert later["pid"] == first["pid"]
    assert later["time"] > first["time"]
    await edge.stop()
    client.close()


async def test_many_who_watch_share_one_document(edge: Edge) -> None:
    bodies = {(await admin(edge, "/status.json"))[2] for _ in range(5)}
    assert len(bodies) == 1


async def test_status_is_read_only(edge: Edge) -> None:
    for path in ("/status", "/status.json", "/status/events", "/status/page.js", "/status/page.css"):
        status, headers, _ = await admin(edge, path, "POST")
        assert (path, status, headers["allow"]) == (path, 405, "GET, HEAD")


@pytest.mark.parametrize(
    ("path", "kind"), [("/status", "html"), ("/status/page.js", "javascript"), ("/status/page.css", "css")]
)
async def test_page_asks_nobody_else(edge: Edge, path: str, kind: str) -> None:
    status, headers, body = await admin(edge, path)
    assert (status, headers["content-type"]) == (200, f"text/{kind}; charset=utf-8")
    assert headers["content-security-policy"].startswith("default-src 'none'; ")
    assert "unsafe" not in headers["content-security-policy"]
    others = set(re.findall(rb"(?:https?:)?//[\w.]+", body)) - {b"http://www.w3.org"}  # a namespace, never fetched
    assert {each for each in others if b"." in each} == set()


def test_page_puts_text_in_as_text_only() -> None:
    """What an upstream says stands in it: markup there must stay text."""
    script = (PAGE / "page.js").read_text()
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "on" + "click ="):
        assert way not in script, way


def test_page_shows_only_what_the_document_has() -> None:
    html, script = (PAGE / "status.html").read_text(), (PAGE / "page.js").read_text()
    ids = set(re.findall(r'id="([a-z-]+)"', html))
    assert set(re.findall(r'(?:byId|show)\("([a-z-]+)"', script)) <= ids
    assert set(re.findall(r'href="#([a-z-]+)"', html)) <= ids
