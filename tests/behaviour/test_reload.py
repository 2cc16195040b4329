"""routes.toml changes while the edge runs: the good takes effect, the bad changes nothing, nobody is interrupted."""

import asyncio
import gc
import logging
import os
import signal
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trustme
from prometheus_client.parser import text_string_to_metric_families

import edge.process.reloading
from edge.config import reading as reading_of
from edge.config.settings import Config
from edge.config.values import Url
from edge.generation import Generation
from edge.process.reloading import Reloader, retire, state_of
from edge.simulator.dialects import Behaviour
from edge.simulator.server import Simulator
from edge.upstream.discovery import Discovery
from tests.conftest import ROUTES, Edge, ScriptedConnection, StartEdge, StartUpstream, tls_setting

PATIENCE_S = 20
NEW = '\n[routes."public/new"]\npool = "r1"\n'


@dataclass
class Reloads:
    """What the running process does with its file."""

    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def reach(self, condition: Callable[[], object]) -> None:
        """Wait for the reload after which something holds."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self.news.clear()
                await self.news.wait()


@pytest.fixture(autouse=True)
async def reloads(monkeypatch: pytest.MonkeyPatch) -> Reloads:
    """Notice every time that what the file says was built, taken over or refused."""
    reloads = Reloads()

    def noticed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            try:
                return method(*arguments)
            finally:
                reloads.news.set()

        return call

    monkeypatch.setattr(Reloader, "accept", noticed(Reloader.accept))
    monkeypatch.setattr(Reloader, "refuse", noticed(Reloader.refuse))
    monkeypatch.setattr(Discovery, "learn", noticed(Discovery.learn))  # of a generation that is built
    monkeypatch.setattr("edge.process.reloading._POLL_INTERVAL_S", 0.05)  # so that nobody waits for a second
    return reloads


async def reload(edge: Edge, reloads: Reloads, text: str | None = None) -> None:
    """Write the file if there is a text, let the edge read it, and wait until it has."""
    if text is not None:
        edge.config_path.write_text(text)
    before = (edge.server.generation.number, edge.server.readiness.reload_failures)
    edge.server.reload()
    await reloads.reach(lambda: (edge.server.generation.number, edge.server.readiness.reload_failures) != before)


async def status_of(edge: Edge, model: str, **kwargs: str) -> int:
    return (await edge.ask({"model": model, "messages": []}, **kwargs))[0]


async def metric(edge: Edge, name: str) -> float:
    families = text_string_to_metric_families((await edge.server.metrics.render()).decode())
    [value] = [sample.value for family in families for sample in family.samples if sample.name == name]
    return value


@pytest.fixture
async def other() -> AsyncIterator[Simulator]:
    """A second model server."""
    running = Simulator(Behaviour())
    await running.start()
    yield running
    await running.close()


def replaced(path: Path, text: str) -> None:
    """Replace as most editors do: another file takes the name."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


def in_place(path: Path, text: str) -> None:
    path.write_text(text)


def swapped(path: Path, text: str) -> None:
    """Replace as a ConfigMap does: the name is a link into `..data`, itself a link, and that one is swapped."""
    directory = path.parent / f"..{len(os.listdir(path.parent))}"
    directory.mkdir()
    (directory / path.name).write_text(text)
    link = path.parent / "..new"
    link.symlink_to(directory.name)
    link.rename(path.parent / "..data")
    if not path.is_symlink():
        path.unlink()
        path.symlink_to(f"..data/{path.name}")


@pytest.mark.parametrize("write", [replaced, in_place, swapped])
async def test_changed_file_applies_by_itself(edge: Edge, write: Callable[[Path, str], None], reloads: Reloads) -> None:
    """However it is changed, twice in a row: looked at through every link."""
    text = edge.config_path.read_text()
    assert await status_of(edge, "public/new") == 404
    write(edge.config_path, text + NEW)
    await reloads.reach(lambda: edge.server.generation.number == 2)
    assert await status_of(edge, "public/new") == 200
    write(edge.config_path, text)
    await reloads.reach(lambda: edge.server.generation.number == 3)
    assert await status_of(edge, "public/new") == 404


def test_permissions_that_are_mended_are_a_change(tmp_path: Path) -> None:
    """A file that could not be read is read again when it can be."""
    path = tmp_path / "key"
    path.write_text("sk-1")
    path.chmod(0o200)
    before = state_of(path)
    while state_of(path) == before:  # the file system's clock ticks in milliseconds
        path.chmod(0o600)


async def test_sighup_applies_at_once(edge: Edge, reloads: Reloads) -> None:
    edge.config_path.write_text(edge.config_path.read_text() + NEW)
    os.kill(os.getpid(), signal.SIGHUP)
    await reloads.reach(lambda: edge.server.generation.number >= 2)
    assert await status_of(edge, "public/new") == 200


async def test_file_that_a_secret_names_applies_by_itself(
    start_edge: StartEdge, simulator: Simulator, tmp_path: Path, reloads: Reloads
) -> None:
    """A secret is replaced without a change of routes.toml."""
    secret = tmp_path / "key"
    secret.write_text("one")
    edge = await start_edge(
        f'[pools.r1]\nendpoints = [{{ url = "{simulator.url}", api_key_file = "{secret}" }}]\n'
        '[routes."public/a"]\npool = "r1"\n'
    )
    assert await status_of(edge, "public/a") == 200
    replaced(secret, "two")
    await reloads.reach(lambda: edge.server.generation.number == 2)
    assert await status_of(edge, "public/a") == 200
    assert [dict(request.headers)["Authorization"] for request in simulator.requests] == ["Bearer one", "Bearer two"]


async def test_log_names_what_changed(edge: Edge, caplog: pytest.LogCaptureFixture, reloads: Reloads) -> None:
    caplog.set_level(logging.INFO)
    text = edge.config_path.read_text()
    await reload(edge, reloads, text.replace('[routes."u-*"]', '[routes."u-1*"]') + NEW)
    assert [record.getMessage() for record in caplog.records if "generation" in record.getMessage()] == [
        "generation 2: +route u-1*, +route public/new, -route u-*"
    ]


BAD = {
    "no TOML": lambda text: text + "\n[routes",
    "unknown key": lambda text: text + '\n[routes."public/new"]\npool = "r1"\nhots = ["x"]\n',
    "unknown pool": lambda text: text + '\n[routes."public/new"]\npool = "none"\n',
    "no UTF-8": lambda text: text + "\n# \udcff\n",
    "emptied": lambda text: "",
    "blank": lambda text: "\n\n# nothing\n",
    "no routes": lambda text: text[: text.index("[routes")],
    "every route dropped": lambda text: text[: text.index("[routes")] + '[routes."public/other"]\npool = "r1"\n',
    "listen": lambda text: text.replace('listen = "127.0.0.1:0"', 'listen = "127.0.0.1:1"') + NEW,
    "admin": lambda text: text.replace('admin = "127.0.0.1:0"', 'admin = "127.0.0.1:1"') + NEW,
    "store": lambda text: text.replace("sqlite:keys.db", "sqlite:other.db") + NEW,
    "ca_file": lambda text: text + '\n[pools.x]\nendpoints = ["https://127.0.0.1:1"]\nca_file = "routes.toml"\n' + NEW,
}  # fmt: skip
NAMED = {"listen": "server.listen", "admin": "server.admin", "store": "keys.store", "ca_file": "ca_file"}


@pytest.mark.parametrize("how", BAD)
async def test_bad_file_changes_nothing_and_says_so_everywhere(
    edge: Edge, how: str, caplog: pytest.LogCaptureFixture, reloads: Reloads
) -> None:
    """In the log, on /readyz?verbose and in the gauge; the edge stays ready, and a good file ends it."""
    text = edge.config_path.read_text()
    edge.config_path.write_bytes(BAD[how](text).encode("utf-8", "surrogateescape"))
    before = edge.server.generation
    await reload(edge, reloads)
    assert edge.server.generation is before
    assert await status_of(edge, "public/deepseek-r1") == 200
    assert await status_of(edge, "public/new") == 404
    health = edge.server.readiness
    assert health.ready
    assert "last reload: failed" in health.describe()
    assert await metric(edge, "edge_config_last_reload_successful") == 0
    [message] = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    for shown in (health.describe(), message):
        assert NAMED.get(how, "routes") in shown
    await reload(edge, reloads, text + NEW)
    assert await status_of(edge, "public/new") == 200
    assert "last reload: ok" in health.describe()
    assert await metric(edge, "edge_config_last_reload_successful") == 1


@pytest.mark.parametrize("where", ["edge.process.reloading.load", "edge.process.server.retire"])
async def test_fault_of_the_edge_in_a_reload_says_so_everywhere(
    edge: Edge, where: str, caplog: pytest.LogCaptureFixture, reloads: Reloads
) -> None:
    """As a bad file does, wherever it fails; the edge goes on, and SIGHUP has the file read again."""

    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of 5")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, fails)
        edge.config_path.write_text(edge.config_path.read_text() + NEW)
        await reloads.reach(lambda: edge.server.readiness.reload_failed)
    assert await status_of(edge, "public/deepseek-r1") == 200
    shown = edge.server.readiness.describe()
    assert "last reload: failed" in shown
    assert "ZeroDivisionError" in shown
    assert "of 5" not in shown
    assert await metric(edge, "edge_config_last_reload_successful") == 0
    assert any(record.exc_info for record in caplog.records)
    edge.server.reload()
    await reloads.reach(lambda: edge.server.readiness.generation == 2)
    assert await status_of(edge, "public/new") == 200
    assert await metric(edge, "edge_config_last_reload_successful") == 1


async def test_file_that_vanishes_changes_nothing_and_may_come_back(edge: Edge, reloads: Reloads) -> None:
    text = edge.config_path.read_text()
    edge.config_path.unlink()
    await reloads.reach(lambda: edge.server.readiness.reload_failed)
    assert await status_of(edge, "public/deepseek-r1") == 200
    edge.config_path.write_text(text + NEW)
    await reloads.reach(lambda: not edge.server.readiness.reload_failed)
    assert await status_of(edge, "public/new") == 200


async def test_bad_file_is_reported_once_not_at_every_poll(edge: Edge, reloads: Reloads) -> None:
    edge.config_path.write_text("[routes")
    await reloads.reach(lambda: edge.server.readiness.reload_failures)
    polls: asyncio.Queue[None] = asyncio.Queue()
    loop, poll = asyncio.get_running_loop(), edge.server._reloader._poll

    def noticed(watched: object) -> object:
        loop.call_soon_threadsafe(polls.put_nowait, None)
        return poll(watched)  # type: ignore[arg-type]

    edge.server._reloader._poll = noticed  # type: ignore[assignment,method-assign]
    for _ in range(3):
        await polls.get()
    assert edge.server.readiness.reload_failures == 1


async def test_certificate_that_cannot_be_used_is_refused_whole(
    start_edge: StartEdge, tmp_path: Path, reloads: Reloads
) -> None:
    """A new certificate without its key changes neither the listener nor the routes."""
    authority = trustme.CA()
    routes = ROUTES.replace("{upstream}", "http://127.0.0.1:1")
    edge = await start_edge(routes, server=tls_setting(tmp_path, authority))
    (tmp_path / "tls.crt").write_bytes(authority.issue_cert("127.0.0.1").cert_chain_pems[0].bytes())
    text = edge.config_path.read_text()
    edge.config_path.write_text(text + NEW)
    edge.server.reload()
    await reloads.reach(lambda: edge.server.readiness.reload_failed)
    assert edge.server.generation.number == 1
    assert "server.tls" in edge.server.readiness.describe()


@pytest.mark.parametrize("named", ["ca_file", "tls"])
async def test_file_that_a_refused_reload_named_is_looked_at_until_it_is_repaired(
    start_edge: StartEdge, tmp_path: Path, named: str, reloads: Reloads
) -> None:
    """One that cannot be used is no error of routes.toml, and its repair went unseen."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    for name in ("old.crt", "old.key", "new.key"):
        (tmp_path / name).write_bytes(
            issued.private_key_pem.bytes() if name.endswith("key") else issued.cert_chain_pems[0].bytes()
        )
    tls = f'tls = {{ certificate = "{tmp_path}/old.crt", private_key = "{tmp_path}/old.key" }}\n'
    edge = await start_edge(ROUTES.replace("{upstream}", "https://localhost:1"), server=tls)
    repaired = tmp_path / "new.crt"
    repaired.write_text("not yet\n")
    text = edge.config_path.read_text()
    if named == "tls":
        await reload(edge, reloads, text.replace("/old.", "/new."))
    else:
        await reload(edge, reloads, text.replace("[pools.r1]\n", f'[pools.r1]\nca_file = "{repaired}"\n'))
    assert edge.server.readiness.reload_failures == 1
    issued.cert_chain_pems[0].write_to_path(str(repaired))
    await reloads.reach(lambda: edge.server.generation.number == 2)
    assert edge.server.readiness.reload_failures == 1


@pytest.mark.parametrize("changed", ["routes.toml", "secret"])
async def test_change_while_the_file_is_read_at_the_start_is_seen(
    start_edge: StartEdge,
    simulator: Simulator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: str,
    reloads: Reloads,
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("one")
    real = edge.process.reloading.load
    read: list[Path] = []

    def load(path: Path, before_file: Callable[[Path], object]) -> Config:
        config = real(path, before_file=before_file)
        read.append(path)
        if read == [path]:
            target = secret if changed == "secret" else path
            target.write_text(target.read_text() + "\n\n")
        return config

    monkeypatch.setattr("edge.process.reloading.load", load)
    running = await start_edge(
        f'[pools.r1]\nendpoints = [{{ url = "{simulator.url}", api_key_file = "{secret}" }}]\n'
        '[routes."public/a"]\npool = "r1"\n'
    )
    await reloads.reach(lambda: running.server.generation.number == 2)


# --- what runs while the file changes


async def test_stream_that_began_before_many_reloads_is_byte_complete(
    edge: Edge, simulator: Simulator, other: Simulator, reloads: Reloads
) -> None:
    """A request keeps the generation it began with, even when its pool and its route are gone."""
    body = {"model": "public/deepseek-r1", "stream": True, "seed": 7, "simulate": {"tokens": 60, "interval_ms": 10}}
    _, _, expected = await edge.ask(body)
    client = await edge.connect()
    client.send(edge.request(body))
    await simulator.wait_for(lambda: len(simulator.requests) == 2)
    text = edge.config_path.read_text()
    gone = text.replace("pools.r1]", "pools.r2]").replace('pool = "r1"', 'pool = "r2"')
    for number in range(10):
        await reload(edge, reloads, gone.replace(simulator.url, other.url) if number % 2 == 0 else text + NEW)
    status, _, received = await client.response()
    assert (status, received) == (200, expected)
    assert edge.server.generation.number == 11
    await edge.consistent()
    assert [line["end"] for line in await edge.log()] == ["complete", "complete"]


async def test_a_thousand_reloads_while_200_streams_run_cut_none_and_leave_nothing_behind(
    start_edge: StartEdge,
    start_upstream: StartUpstream,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By rename, by symlink swap and in place, some bad; each stream has its bytes, and old generations are gone."""
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr("edge.process.reloading._POLL_INTERVAL_S", 3600)  # else it reads some of them as well
    frames = [b'data: {"choices":[{"delta":{"content":"%d"}}]}\n\n' % number for number in range(12)]
    beats = [asyncio.Event() for _ in frames]

    async def script(connection: ScriptedConnection) -> None:
        await connection.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        for frame, beat in zip(frames, beats, strict=True):
            await beat.wait()
            await connection.send(b"%x\r\n%b\r\n" % (len(frame), frame))
        await connection.send(b"0\r\n\r\n")

    upstream = await start_upstream(script)
    pool = f'[pools.r1]\nendpoints = ["{upstream.url}"]\nhealth = {{ interval = "1h", path = "/" }}\n'
    route = '[routes."public/deepseek-r1"]\npool = "r1"\n'
    edge = await start_edge(pool + route)
    server, path = edge.server, edge.config_path
    text = path.read_text()
    texts = [
        text,
        text.replace("pools.r1]", "pools.r2]").replace('pool = "r1"', 'pool = "r2"') + NEW.replace("r1", "r2"),
        text.replace("1h", "2h"),
        text.replace(upstream.url, f"{upstream.url}/v1"),
        text + "nonsense = 1\n",
        "",
    ]
    clients = []
    for _ in range(200):
        clients.append(await edge.connect())
        clients[-1].send(edge.request({"model": "public/deepseek-r1", "stream": True}))
    beats[0].set()
    for client in clients:
        await client.head()
    assert sum(each.startswith(b"POST") for each in upstream.requests) == 200  # the others are probes
    ways = (replaced, in_place, swapped)
    tasks, refused = 0, 0
    for number in range(1000):
        ways[number % len(ways)](path, texts[number % len(texts)])
        before = server.generation.number
        await server._apply(await server._reloader.reload(server.generation))
        refused += server.generation.number == before
        if number % 100 == 99:
            beats[number // 100 + 1].set()
            await asyncio.sleep(0)  # to what the beat woke
        if number == 9:
            tasks = len(asyncio.all_tasks())
    assert (refused, server.readiness.reload_failures) == (332, 332)  # a file with an error, and an emptied one
    assert server.generation.number == 669
    assert len(server.probes) == 1
    assert len(list(server.endpoints.states())) == 1
    beats[-1].set()
    expected = b"".join(b"%x\r\n%b\r\n" % (len(frame), frame) for frame in frames) + b"0\r\n\r\n"
    for client in clients:
        assert await client.reader.readexactly(len(expected)) == expected
    await edge.consistent()
    assert {line["end"] for line in await edge.log()} == {"complete"}
    assert len(asyncio.all_tasks()) <= tasks
    gc.collect()
    assert sum(isinstance(each, Generation) for each in gc.get_objects()) <= 2  # this one and the one before


async def test_request_whose_body_comes_after_a_reload_keeps_its_generation(
    edge: Edge, simulator: Simulator, reloads: Reloads
) -> None:
    client = await edge.connect()
    request = edge.request({"model": "public/deepseek-r1", "messages": []}, headers=("Expect: 100-continue",))
    head, separator, body = request.partition(b"\r\n\r\n")
    client.send(head + separator)
    assert await client.head() == b"HTTP/1.1 100 Continue\r\n\r\n"  # so its body is waited for
    text = edge.config_path.read_text()
    await reload(edge, reloads, text[: text.index("[pools")] + f'[routes."u-*"]\ninstance = "{simulator.url}"\n')
    client.send(body)
    assert (await client.response())[0] == 200
    assert await status_of(edge, "public/deepseek-r1") == 404
    await edge.consistent()


async def test_idle_connections_survive_a_reload(edge: Edge, simulator: Simulator, reloads: Reloads) -> None:
    """The next request after a change pays no new connection."""
    assert await status_of(edge, "public/deepseek-r1") == 200
    opened = simulator.connections
    await reload(edge, reloads, edge.config_path.read_text() + NEW)
    [endpoint] = [each for each in edge.server.endpoints.states() if each.is_used]
    assert len(endpoint.connections) == 1
    assert await status_of(edge, "public/new") == 200
    assert simulator.connections == opened == 1
    assert len(endpoint.connections) == 1


async def test_connections_of_a_removed_pool_close_and_a_lent_one_when_it_is_done(
    edge: Edge, simulator: Simulator, other: Simulator, reloads: Reloads
) -> None:
    assert await status_of(edge, "public/deepseek-r1") == 200
    client = await edge.connect()
    client.send(edge.request({"model": "public/deepseek-r1", "simulate": {"ttft_ms": 300}}))
    await simulator.wait_for(lambda: len(simulator.requests) == 2)
    text = edge.config_path.read_text()
    head, _, tail = text.partition("[pools.r1]")
    await reload(edge, reloads, head + "[pools.r1]" + tail.replace(simulator.url, other.url, 1))
    assert (await client.response())[0] == 200
    await simulator.wait_for(lambda: simulator.connections == 0)
    assert await status_of(edge, "public/deepseek-r1") == 200
    assert len(other.requests) == 1
    await edge.consistent()


async def test_cached_keys_survive_a_reload(edge: Edge, reloads: Reloads) -> None:
    assert await status_of(edge, "public/deepseek-r1") == 200
    for _ in range(3):
        await reload(edge, reloads, edge.config_path.read_text().replace("[keys]", '[keys]\ncache_ttl = "9s"', 1)
                     if "cache_ttl" not in edge.config_path.read_text() else None)  # fmt: skip
        assert await status_of(edge, "public/deepseek-r1") == 200
    assert await metric(edge, "edge_key_lookups_total") == 1


async def test_in_flight_counts_carry_over(edge: Edge, start_upstream: StartUpstream, reloads: Reloads) -> None:
    """Least-loaded must not begin at zero after every change of the file."""
    asked, release = asyncio.Event(), asyncio.Event()

    async def wait(connection: ScriptedConnection) -> None:
        asked.set()
        await release.wait()
        await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    upstream = await start_upstream(wait)
    text = edge.config_path.read_text()
    text += f'\n[pools.slow]\nendpoints = ["{upstream.url}"]\n[routes."public/slow"]\npool = "slow"\n'
    await reload(edge, reloads, text)
    client = await edge.connect()
    client.send(edge.request({"model": "public/slow"}))
    await asked.wait()
    await reload(edge, reloads, text + NEW)
    [member] = edge.server.generation.pools["slow"].members
    assert member.endpoint.in_flight == 1
    release.set()
    assert (await client.response())[0] == 200
    await edge.consistent()
    assert member.endpoint.in_flight == 0


async def test_authority_of_upstreams_that_changes_applies_by_itself(
    start_edge: StartEdge, tmp_path: Path, reloads: Reloads
) -> None:
    """`ca_file` keeps its name when an authority is followed by the next one."""
    old, new = trustme.CA(), trustme.CA()
    ca_file = tmp_path / "ca.pem"
    old.cert_pem.write_to_path(str(ca_file))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    new.issue_cert("127.0.0.1").configure_cert(context)
    upstream = Simulator(Behaviour())
    await upstream.start(ssl=context)
    pool = f'[pools.p]\nendpoints = ["{upstream.url}"]\nca_file = "{ca_file}"\n'
    try:  # uvloop waits for ever at its end for a listener of TLS that a failure leaves
        edge = await start_edge(pool.replace("http:", "https:") + '[routes."public/deepseek-r1"]\npool = "p"\n')
        assert await status_of(edge, "public/deepseek-r1") == 503
        new.cert_pem.write_to_path(str(tmp_path / "next.pem"))
        (tmp_path / "next.pem").replace(ca_file)
        await reloads.reach(lambda: edge.server.generation.number == 2)
        assert await status_of(edge, "public/deepseek-r1") == 200
        async with asyncio.timeout(PATIENCE_S):
            while len(list(edge.server.endpoints.states())) > 1:  # the one of before goes in a step of its own
                await asyncio.sleep(0)
    finally:
        await upstream.close()


async def test_cap_that_is_taken_out_of_the_file_holds_no_more(
    start_edge: StartEdge, simulator: Simulator, reloads: Reloads
) -> None:
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server="max_connections = 3\n")
    assert edge.server.clients.max_connections == 3
    await reload(edge, reloads, edge.config_path.read_text().replace("max_connections = 3\n", ""))
    assert edge.server.clients.max_connections > 3


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, asyncio.Event]:
    """A resolver that answers 127.0.0.1, for each name after its event."""
    asked: dict[str, asyncio.Event] = {}

    async def look_up(name: Url) -> tuple[str, ...]:
        if name.host in asked:
            await asked[name.host].wait()
        return ("127.0.0.1",)

    monkeypatch.setattr("edge.upstream.discovery.look_up", look_up)
    return asked


def with_pool_by_name(edge: Edge, simulator: Simulator) -> str:
    port = simulator.url.rpartition(":")[2]
    named = f'\n[pools.b]\ndns = "b.test:{port}"\n[routes."public/b"]\npool = "b"\n'
    return edge.config_path.read_text() + named


async def test_members_that_change_during_a_reload_leave_the_coming_ones_alone(
    start_edge: StartEdge, simulator: Simulator, names: dict[str, asyncio.Event], reloads: Reloads
) -> None:
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url))
    names["b.test"] = asyncio.Event()
    other = simulator.url.replace("127.0.0.1", "localhost")
    fixed = f'\n[pools.fixed]\nendpoints = ["{other}"]\n[routes."public/fixed"]\npool = "fixed"\n'
    edge.config_path.write_text(with_pool_by_name(edge, simulator) + fixed)
    edge.server.reload()
    await reloads.reach(lambda: any(each.authority.startswith("localhost") for each in edge.server.endpoints.states()))
    await edge.server._follow()  # of a pool in force, as its name's addresses change
    names["b.test"].set()
    await reloads.reach(lambda: edge.server.generation.number == 2)
    assert await status_of(edge, "public/fixed") == 200
    await edge.consistent()
    [member] = edge.server.generation.pools["fixed"].members
    assert member.endpoint in list(edge.server.endpoints.states())
    assert len(member.endpoint.connections) == 1


@pytest.mark.parametrize("half", ["certificate", "key"])
async def test_certificate_that_is_half_replaced_during_a_reload_refuses_it(
    start_edge: StartEdge,
    simulator: Simulator,
    names: dict[str, asyncio.Event],
    tmp_path: Path,
    half: str,
    reloads: Reloads,
) -> None:
    """The old one stays in force: clients connect as before."""
    authority = trustme.CA()
    ours, other = authority.issue_cert("127.0.0.1"), authority.issue_cert("127.0.0.1")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    certificate.write_bytes(ours.cert_chain_pems[0].bytes())
    key.write_bytes(ours.private_key_pem.bytes())
    tls = f'tls = {{ certificate = "{certificate}", private_key = "{key}" }}\n'
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url), server=tls)
    names["b.test"] = asyncio.Event()
    edge.config_path.write_text(with_pool_by_name(edge, simulator))
    edge.server.reload()
    # Built, and not in force before the name is known.
    await reloads.reach(lambda: edge.server._reloader.coming.number == 2)  # type: ignore[union-attr]
    chain, secret = other.cert_chain_pems[0].bytes(), other.private_key_pem.bytes()
    first, then = ((certificate, chain), (key, secret))[:: 1 if half == "certificate" else -1]
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    before = await certificate_of(edge, trusting)
    first[0].write_bytes(first[1])
    names["b.test"].set()
    await reloads.reach(lambda: edge.server.readiness.reload_failures)
    assert "certificate and key" in edge.server.readiness.reload_failed
    assert edge.server.generation.number == edge.server.readiness.generation == 1
    assert await certificate_of(edge, trusting) == before
    then[0].write_bytes(then[1])
    await reloads.reach(lambda: edge.server.generation.number == 2)
    assert await certificate_of(edge, trusting) != before


async def certificate_of(edge: Edge, trusting: ssl.SSLContext) -> bytes:
    """What the listener shows to a client that checks it."""
    _, writer = await asyncio.open_connection("127.0.0.1", edge.port, ssl=trusting)
    shown: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return shown


# --- files of thousands of routes


async def test_reload_is_read_off_the_loop_and_makes_only_what_it_changes(
    edge: Edge, reloads: Reloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten thousand routes took the loop 3.6 s; their pools and routes are the same objects afterwards."""
    more = "".join(f'[pools.p{number}]\nendpoints = ["http://10.0.0.1:{number}"]\n' for number in range(1, 200))
    more += "".join(f'[routes."public/{number}"]\npool = "p{number}"\n' for number in range(1, 200))
    text = edge.config_path.read_text()
    await reload(edge, reloads, text + more)
    before, threads = edge.server.generation, []
    real = reading_of.load

    def load(path: Path, **how: Any) -> Config:
        threads.append(threading.current_thread())
        return real(path, **how)

    monkeypatch.setattr("edge.process.reloading.load", load)
    await reload(edge, reloads, text + more.replace('public/7"]\npool = "p7"', 'public/7"]\npool = "p8"') + NEW)
    after = edge.server.generation
    assert threads != []
    assert threading.main_thread() not in threads
    assert after.pools == before.pools
    was, is_now = ({route.name: route for route in each.config.routes} for each in (before, after))
    assert {name for name in is_now if is_now[name] is not was.get(name)} == {"public/7", "public/new"}
    assert await status_of(edge, "public/deepseek-r1") == 200


async def test_of_thousands_of_problems_the_first_are_reported(edge: Edge, reloads: Reloads) -> None:
    bad = "".join(f'[routes."public/{number}"]\npool = "none"\n' for number in range(500))
    await reload(edge, reloads, edge.config_path.read_text() + bad)
    lines = edge.server.readiness.reload_failed.splitlines()
    assert (len(lines), lines[-1]) == (21, "480 more: `edge check` lists them")


async def test_all_that_a_request_sees_of_a_reload_changes_in_one_step_of_the_loop(edge: Edge) -> None:
    """It goes in steps, for thousands of pools, and nobody gets a route of the new file with the limits of the old."""
    more = "".join(f'[pools.p{number}]\nendpoints = ["http://10.0.0.1:{number}"]\n' for number in range(1, 251))
    more += '[limits.new]\nrequests_per_minute = 7\n[routes."public/new"]\npool = "p250"\nlimit = "new"\n'
    server = edge.server
    edge.config_path.write_text(edge.config_path.read_text() + more)
    new = await server._reloader.reload(server.generation)
    applied = asyncio.get_running_loop().create_task(server._apply(new))
    seen = []
    while not applied.done():
        seen.append(
            (server.proxy.generation is new, "p250" in server.catalogue._pools, "new" in server.admission._configs)
        )
        await asyncio.sleep(0)
    assert set(seen) == {(False,) * 3, (True,) * 3}
    assert seen == sorted(seen)
    assert len(seen) > 5


class Part:
    """Something that a generation is made of, whose end is noted."""

    def __init__(self, freed: list[int]) -> None:
        self._freed = freed

    def __del__(self) -> None:
        self._freed[-1] += 1


async def test_generation_is_freed_in_pieces_once_no_request_has_it() -> None:
    """A stream may be the last to have it, hours later; ten thousand routes at once would hold the others up."""

    class Made:
        def __init__(self) -> None:
            self.made = [Part(freed) for _ in range(1000)]

        def parts(self) -> list[Part]:
            return list(self.made)

    freed = [0]
    made = Made()
    retire(made)  # type: ignore[arg-type]
    await asyncio.sleep(0)
    assert freed == [0]
    del made
    while sum(freed) < 1000:
        freed.append(0)
        await asyncio.sleep(0)
    assert max(freed) == 200
