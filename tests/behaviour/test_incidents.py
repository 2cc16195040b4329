"""Twelve incidents, each acted out, and found by somebody who has metrics, log and `/status.json` alone."""

import datetime
import errno
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme
from prometheus_client.parser import text_string_to_metric_families

from edge.config.values import Url
from edge.journal import rotating
from edge.process.snapshot import Snapshots
from edge.simulator.dialects import Behaviour
from edge.simulator.server import Simulator
from edge.upstream import discovery
from tests.behaviour.test_admin import admin
from tests.behaviour.test_status import status_of
from tests.conftest import ROUTES, Edge, Heard, StartEdge
from tests.keybackends import ValkeyServer

PUBLIC = "public/deepseek-r1"
BODY: dict[str, Any] = {"model": PUBLIC, "messages": []}


class Seen(NamedTuple):
    """What an operator has: samples by name and labels, the log, and what the status page says is wrong."""

    metrics: dict[tuple[str, ...], float]
    log: list[dict[str, Any]]
    troubles: list[str]

    def says(self, *words: str) -> bool:
        return any(all(word in trouble for word in words) for trouble in self.troubles)


async def look(edge: Edge) -> Seen:
    _, _, text = await admin(edge, "/metrics")
    metrics = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }
    status = await status_of(edge)
    return Seen(metrics, await edge.log(), [each["what"] for each in status["troubles"]])


def pool(*urls: str, more: str = "") -> str:
    named = ", ".join(f'"{url}"' for url in urls)
    return ROUTES.replace('endpoints = ["{upstream}"]', f"endpoints = [{named}]\n{more}").replace("{upstream}", urls[0])


def at(url: str) -> str:
    return url.partition("://")[2]


StartMember = Callable[..., Awaitable[Simulator]]


@pytest.fixture
async def start_member() -> AsyncIterator[StartMember]:
    """Start a second member that behaves so."""
    async with AsyncExitStack() as stack:

        async def start(**behaviour: Any) -> Simulator:
            running = Simulator(Behaviour(**behaviour))
            await running.start()
            stack.push_async_callback(running.close)
            return running

        yield start


async def ask(edge: Edge, times: int = 1, **more: Any) -> None:
    for _ in range(times):
        await edge.ask({**BODY, **more})
    await edge.idle()


async def test_slow_member(start_edge: StartEdge, simulator: Simulator, start_member: StartMember) -> None:
    other = await start_member(ttft_ms=60)
    edge = await start_edge(pool(simulator.url, other.url, more='balance = "round-robin"'))
    await ask(edge, 14)
    seen = await look(edge)
    a_second_later = await Snapshots(edge.server._parts, lambda: time.monotonic() + 1).take()  # it shows whole ones
    seen = seen._replace(troubles=[each["what"] for each in a_second_later["troubles"]])
    by_member = {
        url: seen.metrics["gen_ai_server_time_to_first_token_seconds_sum", "r1", at(url)]
        for url in (simulator.url, other.url)
    }
    assert by_member[other.url] > 3 * by_member[simulator.url]
    assert seen.says(at(other.url), "is slow")
    assert {line["endpoint"] for line in seen.log if line["ttft_ms"] > 50} >= {at(other.url)}


async def test_member_that_answers_500(start_edge: StartEdge, simulator: Simulator, start_member: StartMember) -> None:
    other = await start_member(fault="error", status=500)
    edge = await start_edge(pool(simulator.url, other.url, more='balance = "round-robin"'))
    await ask(edge, 2)
    seen = await look(edge)
    assert seen.metrics["edge_upstream_requests_total", "r1", at(other.url), "500", "upstream_error"] == 1
    assert seen.says(at(other.url), "answers 500")
    (failed,) = (line for line in seen.log if line["status"] == 502)
    assert (failed["endpoint"], failed["upstream_status"], failed["attempts"][0]["status"]) == (at(other.url), 500, 500)


async def test_key_that_a_member_refuses(
    start_edge: StartEdge, simulator: Simulator, start_member: StartMember, caplog: pytest.LogCaptureFixture
) -> None:
    other = await start_member(fault="error", status=401)
    edge = await start_edge(pool(simulator.url, other.url, more='balance = "round-robin"'))
    await ask(edge, 2)
    seen = await look(edge)
    assert seen.metrics["edge_upstream_requests_total", "r1", at(other.url), "401", "upstream_error"] == 1
    assert seen.says(at(other.url), "answers 401")
    assert f"endpoint {at(other.url)} answers 401 to the edge: check its `api_key`" in caplog.messages
    (moved,) = (line for line in seen.log if line["retries"])
    assert [each["status"] for each in moved["attempts"]] == [401, 200]


async def test_limit_that_is_used_up(start_edge: StartEdge, simulator: Simulator) -> None:
    routes = pool(simulator.url).replace(f'[routes."{PUBLIC}"]\n', f'[routes."{PUBLIC}"]\nlimit = "free"\n')
    edge = await start_edge(routes + "[limits.free]\ntokens_per_minute = 1\n")
    await ask(edge, 2)
    seen = await look(edge)
    assert seen.metrics["edge_errors_total", "rate_limit_exceeded", "free", "tokens per minute"] == 1
    assert seen.log[-1]["limit"] == "free: tokens per minute"
    assert seen.says("limit free", "u-1100a15812cc", "tokens")


async def test_disk_that_is_full(
    start_edge: StartEdge, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    edge = await start_edge(pool(simulator.url))

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    await ask(edge)
    with monkeypatch.context() as patched:
        patched.setattr(rotating.os, "write", full)
        edge.server.journal.drain()
        seen = await look(edge)
    assert (seen.metrics["edge_usage_journal_up",], seen.metrics["edge_part_up", "journal"]) == (0, 0)
    assert seen.metrics["edge_usage_disk_free_bytes",] > 0
    assert seen.says("journal", "No space left on device")
    assert any("cannot be written" in each and "No space left" in each for each in caplog.messages)


async def test_key_store_that_is_dead(
    start_edge: StartEdge, simulator: Simulator, unused_tcp_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    keys = f'store = "redis://127.0.0.1:{unused_tcp_port}/0"\nstore_timeout = "100ms"\n'
    edge = await start_edge(pool(simulator.url), keys=keys)
    await ask(edge, 4)
    seen = await look(edge)
    assert seen.metrics["edge_part_up", "key store"] == 0
    assert seen.metrics["edge_errors_total", "key_store_unavailable", "", ""] == 4
    assert seen.says("key store", "refused")
    assert {line["error"] for line in seen.log} == {"key_store_unavailable"}
    assert any("key store" in each for each in caplog.messages)


async def test_name_that_is_not_resolved(start_edge: StartEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    async def unknown(name: Url) -> tuple[str, ...]:
        raise OSError("Name or service not known")

    monkeypatch.setattr(discovery, "look_up", unknown)
    routes = f'[pools.r1]\ndns = "engines.example:8000"\n[routes."{PUBLIC}"]\npool = "r1"\n'
    edge = await start_edge(routes)
    await ask(edge)
    seen = await look(edge)
    assert seen.metrics["edge_part_up", "dns engines.example:8000"] == 0
    assert seen.metrics["edge_pool_members", "r1", "healthy"] == 0
    assert seen.says("dns engines.example:8000", "Name or service not known")
    assert seen.log[-1]["error"] == "upstream_unavailable"


async def test_member_that_hangs_up(start_edge: StartEdge, simulator: Simulator) -> None:
    edge = await start_edge(pool(simulator.url))
    await ask(edge, stream=True, simulate={"fault": "cut", "after": 2})
    seen = await look(edge)
    assert seen.metrics["edge_upstream_requests_total", "r1", at(simulator.url), "200", "upstream_cut"] == 1
    assert seen.says(at(simulator.url), "upstream_cut")
    assert seen.log[-1]["upstream_error"] == "cut within the answer"
    assert seen.log[-1]["ended_by"] == "upstream"


async def test_clients_that_hang_up(start_edge: StartEdge, simulator: Simulator) -> None:
    edge = await start_edge(pool(simulator.url))
    client = await edge.connect()
    client.send(edge.request({**BODY, "simulate": {"ttft_ms": 86_400_000}}))
    await simulator.wait_for(lambda: len(simulator.requests) == 1)
    client.abort()
    await edge.idle()
    seen = await look(edge)
    assert seen.metrics["edge_upstream_requests_total", "r1", at(simulator.url), "0", "client_gone"] == 1
    assert (seen.log[-1]["end"], seen.log[-1]["ended_by"], seen.log[-1]["attempts"]) == ("client_gone", "client", None)
    assert seen.troubles == []  # nobody's failure but theirs


async def test_certificate_that_ends(start_edge: StartEdge, simulator: Simulator, tmp_path: Path) -> None:
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=3)
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", not_after=soon)
    certificate, key, ca_file = tmp_path / "tls.crt", tmp_path / "tls.key", tmp_path / "ca.pem"
    certificate.write_bytes(issued.cert_chain_pems[0].bytes())
    key.write_bytes(issued.private_key_pem.bytes())
    authority.cert_pem.write_to_path(ca_file)
    server = f'tls = {{ certificate = "{certificate}", private_key = "{key}" }}\n'
    edge = await start_edge(pool(simulator.url, more=f'ca_file = "{ca_file}"'), server=server)
    seen = await look(edge)
    assert abs(seen.metrics["edge_certificate_expiry_timestamp_seconds", "server.tls"] - soon.timestamp()) < 2
    assert seen.metrics["edge_certificate_expiry_timestamp_seconds", "pools.r1.ca_file"] > soon.timestamp()
    assert seen.says("certificate of server.tls ends in 2 days")


async def test_clock_that_is_set(start_edge: StartEdge, simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    edge = await start_edge(pool(simulator.url))
    edge.server.loop_lag._begun_s += 3600  # as if the machine's clock were an hour behind what it was
    seen = await look(edge)
    assert seen.metrics["edge_clock_step_seconds",] == pytest.approx(-3600, abs=1)
    assert seen.says("the clock was set by -3600 s")


async def test_member_that_is_dead(
    start_edge: StartEdge, simulator: Simulator, unused_tcp_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    dead = f"http://127.0.0.1:{unused_tcp_port}"
    edge = await start_edge(pool(simulator.url, dead, more='balance = "round-robin"'))
    await ask(edge, 6)
    seen = await look(edge)
    assert seen.metrics["edge_pool_members", "r1", "ejected"] == 1
    assert seen.metrics["edge_upstream_requests_total", "r1", at(dead), "0", "connect_refused"] == 3
    assert seen.says(at(dead), "ejected", "refused")
    moved = [line for line in seen.log if line["retries"]]
    assert {line["attempts"][0]["outcome"] for line in moved} == {"connect_refused"}
    assert any("failed several times in a row: ejected" in each for each in caplog.messages)


async def test_reload_that_is_refused(start_edge: StartEdge, simulator: Simulator, heard: Heard) -> None:
    edge = await start_edge(pool(simulator.url))
    text = edge.config_path.read_text()
    edge.config_path.write_text(text.replace('pool = "r1"', 'pool = "r2"'))
    edge.server.reload()
    await heard.until("reload refused")
    seen = await look(edge)
    assert (seen.metrics["edge_config_last_reload_successful",], seen.metrics["edge_config_generation",]) == (0, 1)
    assert seen.says("the last reload was refused, generation 1 goes on", "r2")


async def test_shared_redis_that_goes_away(
    start_edge: StartEdge, simulator: Simulator, valkey: ValkeyServer, heard: Heard
) -> None:
    edge = await start_edge(pool(simulator.url) + f'[shared]\nredis = "{valkey.url}"\n')
    valkey.stop()
    await heard.until("limits count what this process serves")
    seen = await look(edge)
    assert seen.metrics["edge_part_up", "shared limits"] == 0
    assert seen.says("shared limits")
