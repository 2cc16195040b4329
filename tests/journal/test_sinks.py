"""One suite over all sinks of the table, each with a real server."""

import asyncio
import json
import signal
import ssl
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import trustme
from aiohttp import web

from edge.config import process_settings
from edge.config.process_settings import UsageConfig
from edge.errors import Unusable
from edge.journal.journal import Journal
from edge.journal.shipping import Shipper
from edge.journal.sinks import http as sink_http
from edge.journal.sinks import redis as sink_redis
from edge.journal.sinks.protocol import Sink, SinkUnavailable
from edge.journal.sinks.redis import STREAM
from edge.journal.sinks.table import SINKS, sink_of
from edge.tasks import end_tasks
from tests.keybackends import PATIENCE_S, ValkeyServer
from tests.records import close, opened

LINES = [b'{"id":"a-1","time":"2025-11-13T02:13:20.250Z","model":"\xe6\xa8\xa1","end":"complete"}', b'{"id":"a-2"}']


def sink_at(url: str, **options: Any) -> Sink:
    """The sink of a file with this `usage.sink`."""
    sink = sink_of(UsageConfig(Path("usage"), sink=url, **options))
    assert sink is not None
    return sink


class Receiver(ABC):
    """A server that takes records and can be harmed."""

    reasons: ClassVar[dict[str, str]]  # why nothing arrives, by the harm that is done

    @abstractmethod
    def __init__(self, directory: Path) -> None: ...

    @abstractmethod
    async def start(self) -> None: ...

    @property
    @abstractmethod
    def place(self) -> str: ...

    @abstractmethod
    def sink(self) -> Sink: ...

    @abstractmethod
    def received(self) -> list[bytes]: ...

    @abstractmethod
    async def harm(self, how: str) -> None: ...

    @abstractmethod
    async def mend(self) -> None: ...

    @abstractmethod
    async def close(self) -> None: ...


class RedisReceiver(Receiver):
    reasons: ClassVar[dict[str, str]] = {
        "dead": "Connection ",
        "silent": "no answer within 0.2 s",
        "wrong type": "ResponseError",
        "full": "OutOfMemoryError",
    }

    def __init__(self, directory: Path) -> None:
        self.server = ValkeyServer(directory)
        self._harm = ""

    async def start(self) -> None:
        self.server.start()

    @property
    def place(self) -> str:
        return self.server.url.split("/")[2].rpartition("@")[2]

    def sink(self) -> Sink:
        return sink_at(self.server.url)

    def received(self) -> list[bytes]:
        with self.server.client() as client:
            entries: Any = client.xrange(STREAM)
        for _, fields in entries:
            assert set(fields) == {b"id", b"record"}
            assert json.loads(fields[b"record"])["id"] == fields[b"id"].decode()
        return [fields[b"record"] for _, fields in entries]

    async def harm(self, how: str) -> None:
        self._harm = how
        with self.server.client() as client:
            match how:
                case "dead":
                    self.server.stop()
                case "silent":
                    self.server.signal(signal.SIGSTOP)
                case "wrong type":
                    client.set(STREAM, "text")
                case "full":
                    client.config_set("maxmemory", "1")

    async def mend(self) -> None:
        if self._harm == "dead":
            self.server.start()
        elif self._harm == "silent":
            self.server.signal(signal.SIGCONT)
        with self.server.client() as client:
            if self._harm == "wrong type":
                client.delete(STREAM)
            elif self._harm == "full":
                client.config_set("maxmemory", "0")

    async def close(self) -> None:
        self.server.stop()


class HttpReceiver(Receiver):
    reasons: ClassVar[dict[str, str]] = {
        "dead": "Connection refused",
        "silent": "no answer within 0.2 s",
        "500": "status 500",
        "429": "status 429",
        "redirect": "status 307",
        "cut": "ServerDisconnectedError",
    }
    token = "take-my-records"

    def __init__(self, directory: Path) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self._harm = ""
        self._port = 0
        self._mended = asyncio.Event()
        self._runner: web.ServerRunner | None = None

    async def start(self) -> None:
        self._runner = web.ServerRunner(web.Server(self._answer))
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True).start()
        self._port = self._runner.addresses[0][1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/records?a=b"

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self._port}"

    def sink(self) -> Sink:
        return sink_at(self.url, sink_token=self.token)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        if request.path == "/elsewhere":
            return web.Response(status=200)
        match self._harm:
            case "silent":
                await self._mended.wait()
            case "500" | "429":
                return web.Response(status=int(self._harm))
            case "redirect":
                return web.Response(status=307, headers={"Location": "/elsewhere"})
            case "cut":
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
        assert (request.method, request.path_qs, request.content_type) == ("POST", "/records?a=b", "application/json")
        self.bodies.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        return web.Response(status=202, text="x" * 100_000)

    def received(self) -> list[bytes]:
        found = []
        for body in self.bodies:
            json.loads(body)
            assert body.startswith(b'{"records":[')
            assert body.endswith(b"]}")
            found += [b"{" + line for line in body[len(b'{"records":[{') : -2].split(b",{")]
        return found

    async def harm(self, how: str) -> None:
        self._harm = how
        self._mended.clear()
        if how == "dead":
            await self.close()

    async def mend(self) -> None:
        dead, self._harm = self._harm == "dead", ""
        self._mended.set()
        if dead:
            await self.start()

    async def close(self) -> None:
        self._mended.set()
        if self._runner is not None:
            await self._runner.shutdown()
            await self._runner.cleanup()


@pytest.fixture
async def receiver(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Receiver]:
    made = RECEIVERS[request.param](tmp_path)
    await made.start()
    yield made
    await made.close()


RECEIVERS: dict[str, type[Receiver]] = {"redis": RedisReceiver, "http": HttpReceiver}
EACH = pytest.mark.parametrize("receiver", RECEIVERS, indirect=True)
HARMS = [(kind, how) for kind, receiver in RECEIVERS.items() for how in receiver.reasons]


async def test_every_sink_that_the_file_can_name_is_in_the_table_and_in_this_suite(tmp_path: Path) -> None:
    assert {scheme for place in process_settings.SINKS for scheme in place.schemes} == set(SINKS)
    sinks = []
    for kind in RECEIVERS.values():
        receiver = kind(tmp_path)
        await receiver.start()
        sinks.append(receiver.sink())
        await receiver.close()
    assert {type(each) for each in sinks} == set(SINKS.values())
    for sink in sinks:
        await sink.close()


@EACH
async def test_records_arrive_byte_for_byte_and_in_order(receiver: Receiver) -> None:
    sink = receiver.sink()
    await sink.deliver(LINES)
    await sink.deliver(LINES[1:])
    await sink.close()
    assert receiver.received() == [*LINES, LINES[1]]


@pytest.mark.parametrize(("receiver", "how"), HARMS, indirect=["receiver"])
async def test_whatever_is_no_acknowledgement_is_an_outage_and_passes(
    receiver: Receiver, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "silent":
        monkeypatch.setattr(sink_redis, "_TIMEOUT_S", 0.2)
        monkeypatch.setattr(sink_http, "_TIMEOUT_S", 0.2)
    sink = receiver.sink()
    await sink.deliver(LINES[:1])
    await receiver.harm(how)
    with pytest.raises(SinkUnavailable) as caught:
        await sink.deliver(LINES)
    told = str(caught.value)
    assert receiver.place in told
    assert receiver.reasons[how] in told
    assert not any(each in told for each in ("a-1", "?a=b", "/records", HttpReceiver.token))
    await receiver.mend()
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await sink.deliver(LINES)
                break
            except SinkUnavailable:
                await asyncio.sleep(0)
    await sink.close()
    assert receiver.received()[-2:] == LINES


@EACH
async def test_journal_reaches_the_sink_through_an_outage(receiver: Receiver, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "usage", 20_000, "serve", ships=True)
    ids = []

    def write(count: int) -> None:
        for _ in range(count):
            exchange = opened(journal)
            close(journal, exchange)
            ids.append(exchange.id)
        journal.drain()

    sink = receiver.sink()
    shipper = Shipper(journal.directory, journal.token, journal.adopted.locks, sink)
    write(600)
    await shipper.flush(PATIENCE_S)
    await receiver.harm("dead")
    write(600)
    async with asyncio.timeout(PATIENCE_S):
        while not shipper.outage:
            await shipper.flush(0.1)
    assert shipper.shipped >= 600
    await receiver.mend()
    await shipper.flush(PATIENCE_S)
    await sink.close()
    journal.close()
    arrived = [json.loads(line)["id"] for line in receiver.received()]
    # The Valkey of these tests keeps nothing on disk: what it acknowledged before it died is gone with it.
    assert list(dict.fromkeys(arrived))[-600:] == ids[-600:]
    assert [path.suffix for path in journal.directory.iterdir() if path.suffix != ".jsonl"] == []


@pytest.mark.parametrize("receiver", ["redis"], indirect=True)
async def test_redis_takes_a_batch_whole_or_not_at_all(receiver: RedisReceiver) -> None:
    sink = receiver.sink()
    await sink.deliver(LINES)
    await sink.close()
    with receiver.server.client() as client:
        calls: Any = client.info("commandstats")
    assert calls["cmdstat_exec"]["calls"] == 1


@pytest.mark.parametrize("receiver", ["redis"], indirect=True)
async def test_record_is_shipped_once_as_many_replicas_have_it_as_are_asked_for(
    receiver: RedisReceiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A primary that was replaced and does not know it yet has no replica: what it takes is lost, and sent again."""
    replica = ValkeyServer(tmp_path)
    replica.start()
    careful, careless = sink_at(receiver.server.url, sink_replicas=1), receiver.sink()
    try:
        with replica.client() as client:
            client.replicaof("127.0.0.1", str(receiver.server.port))
            async with asyncio.timeout(PATIENCE_S):
                while client.info("replication")["master_link_status"] != "up":
                    await asyncio.sleep(0.01)
            await careful.deliver(LINES)
            assert [fields[b"record"] for _, fields in client.xrange(STREAM)] == LINES
            monkeypatch.setattr(sink_redis, "_WAIT_S", 0.2)
            client.replicaof("NO", "ONE")
            await careless.deliver(LINES)
            with pytest.raises(SinkUnavailable, match="0 of 1 replicas have the records"):
                await careful.deliver(LINES)
            assert len(client.xrange(STREAM)) == len(LINES)
    finally:
        await careful.close()
        await careless.close()
        replica.stop()


async def test_delivery_that_is_cancelled_while_redis_is_connected_to_ends() -> None:
    """redis-py takes a cancellation at some moments for a failure, and at others for nothing at all."""
    loop = asyncio.get_running_loop()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    sink = sink_at(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0")
    for turns in range(20):
        task = loop.create_task(sink.deliver(LINES))
        for _ in range(turns):
            await asyncio.sleep(0)
        await end_tasks((task,), PATIENCE_S)
        assert task.cancelled()
    await sink.close()
    server.close()


@pytest.mark.parametrize("receiver", ["http"], indirect=True)
async def test_token_is_shown_and_taken_over_from_a_reload(receiver: HttpReceiver) -> None:
    sink = sink_at(receiver.url, sink_token="first")
    await sink.deliver(LINES)
    for token in ("second", None):
        sink.reconfigure(UsageConfig(Path("usage"), sink=receiver.url, sink_token=token))
        await sink.deliver(LINES)
    await sink.close()
    assert [headers.get("authorization") for headers in receiver.headers] == ["Bearer first", "Bearer second", None]


async def test_certificate_of_a_receiver_is_proved_by_the_given_authority(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    bodies: list[bytes] = []

    async def take(request: web.BaseRequest) -> web.Response:
        bodies.append(await request.read())
        return web.Response(status=204)

    runner = web.ServerRunner(web.Server(take))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    url = f"https://127.0.0.1:{runner.addresses[0][1]}/"
    trusting, doubting = sink_at(url, sink_ca_file=tmp_path / "ca.pem"), sink_at(url)
    await trusting.deliver(LINES)
    with pytest.raises(SinkUnavailable, match=f"127.0.0.1:{runner.addresses[0][1]}: .*verify failed"):
        await doubting.deliver(LINES)
    await trusting.close()
    await doubting.close()
    await runner.cleanup()
    assert len(bodies) == 1


def test_file_without_a_sink_has_none() -> None:
    assert sink_of(UsageConfig(Path("usage"))) is None


async def test_authority_that_is_none_is_refused_by_the_name_of_its_setting(tmp_path: Path) -> None:
    """OpenSSL says neither which file it means nor what is wrong with it."""
    path = tmp_path / "ca.pem"
    for content, reason in ((None, "No such file"), ("no certificate", "no certificate in it")):
        if content is not None:
            path.write_text(content)
        with pytest.raises(Unusable, match=rf"^usage\.sink_ca_file: .*ca\.pem cannot be used \({reason}"):
            sink_at("https://sink.test/", sink_ca_file=path)


def test_bad_redis_url_is_refused_without_its_password() -> None:
    with pytest.raises(Unusable) as caught:
        sink_at("redis://:hunter2@host:notaport/0")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("https://sink.test/secret/path?token=x", "sink.test:443"),
        ("http://[::1]:8080/", "[::1]:8080"),
        ("redis://:hunter2@10.0.0.1/0", "10.0.0.1:6379"),
        ("rediss://user:hunter2@cache.test:6380/0", "cache.test:6380"),
        ("redis://localhost/0", "localhost:6379"),
        ("redis+sentinel://user:hunter2@a,[::1]:2/s/0?sentinel_password=hunter2", "a:26379,[::1]:2"),
        ("rediss+cluster://user:hunter2@a,b:7", "a:6379,b:7"),
    ],
)
async def test_log_says_where_a_sink_is_and_nothing_secret(url: str, place: str) -> None:
    sink: Any = sink_at(url)
    assert sink._place == place
    await sink.close()


async def test_name_of_a_sink_that_nobody_knows_is_told_with_the_reason() -> None:
    sink = sink_at("https://sink.invalid/secret")
    with pytest.raises(SinkUnavailable, match=r"^sink\.invalid:443: ") as caught:
        await sink.deliver(LINES)
    assert "Error" not in str(caught.value)
    assert "secret" not in str(caught.value)
    await sink.close()
