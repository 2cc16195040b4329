"""What every test can ask for: a running edge, a scripted upstream, raw clients. All on loopback, all in one loop."""

import asyncio
import json
import logging
import os
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import pytest
import trustme
import uvloop

from edge.config.settings import Config
from edge.keys.stores.registry import KeyRegistry
from edge.process.server import Server
from edge.simulator.dialects import Behaviour
from edge.simulator.server import Simulator
from tests import profiles
from tests.keybackends import ValkeyServer

T = TypeVar("T")
USER = "u-1100a15812cc"

# The suite starts some hundred processes, and each would compile the edge anew where the machine keeps no bytecode.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

hypothesis.settings.load_profile(profiles.SUITE)  # `--hypothesis-profile=deep` comes later and wins


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Three workers for two cores: a third of the suite's time goes into waiting."""
    cores = len(os.sched_getaffinity(0))
    return cores + cores // 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take the longest, so that no worker is left with one at the end."""
    items.sort(key=lambda item: not item.path.name.startswith("test_loadtest_"))


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests run on the loop that the edge runs on."""
    return {"uvloop": uvloop.new_event_loop}


@dataclass
class RawClient:
    """A client that sends and reads bytes."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def head(self) -> bytes:
        """The next response head, with its empty line."""
        return await self.reader.readuntil(b"\r\n\r\n")

    async def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        return await self.reader.read()

    async def response(self) -> tuple[int, dict[str, str], bytes]:
        """One whole response: status, headers in lower case, body without framing."""
        head = (await self.head()).decode("latin-1")
        lines = head.split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)
        }
        status = int(lines[0].split()[1])
        if status == 204 or status < 200:
            return status, headers, b""
        if "content-length" in headers:
            return status, headers, await self.reader.readexactly(int(headers["content-length"]))
        if headers.get("transfer-encoding") != "chunked":
            return status, headers, await self.reader.read()
        body = b""
        while size := int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16):
            body += await self.reader.readexactly(size)
            assert await self.reader.readexactly(2) == b"\r\n"
        await self.reader.readuntil(b"\r\n")
        return status, headers, body

    def close(self) -> None:
        self.writer.close()

    def abort(self) -> None:
        self.writer.transport.abort()


def tls_setting(directory: Path, authority: trustme.CA) -> str:
    """The line of `[server]` for a listener with a new certificate of an authority, in `tls.crt` and `tls.key`."""
    issued = authority.issue_cert("127.0.0.1")
    certificate, key = directory / "tls.crt", directory / "tls.key"
    certificate.write_bytes(issued.cert_chain_pems[0].bytes())
    key.write_bytes(issued.private_key_pem.bytes())
    return f'tls = {{ certificate = "{certificate}", private_key = "{key}" }}\n'


@dataclass
class Edge:
    """An edge that serves in this loop."""

    server: Server
    port: int
    admin_port: int
    keys_path: Path
    config_path: Path
    key: str
    _log_path: Path
    _task: "asyncio.Task[None]"
    _clients: list[RawClient] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def admin_url(self) -> str:
        return f"http://127.0.0.1:{self.admin_port}"

    async def connect(self) -> RawClient:
        client = RawClient(*await asyncio.open_connection("127.0.0.1", self.port, limit=2**24))
        self._clients.append(client)
        return client

    def request(
        self,
        body: bytes | dict[str, Any] = b"",
        *,
        path: str = "/v1/chat/completions",
        method: str = "POST",
        host: str = "127.0.0.1",
        key: str | None = None,
        version: str = "1.1",
        headers: tuple[str, ...] = (),
    ) -> bytes:
        """The bytes of a request; `headers` are whole lines."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/{version}", f"Host: {host}", f"Authorization: Bearer {key or self.key}"]
        if data or method == "POST":
            lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        return "\r\n".join([*lines, *headers, "", ""]).encode("latin-1") + data

    async def ask(self, *args: Any, **kwargs: Any) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own; status, headers, body."""
        client = await self.connect()
        client.send(self.request(*args, **kwargs))
        try:
            return await client.response()
        finally:
            client.close()

    async def log(self) -> list[dict[str, Any]]:
        """The access log so far."""
        await self.server._access_log.flush()
        return [json.loads(line) for line in self._log_path.read_bytes().splitlines()]

    def records(self, ended: bool = True) -> list[dict[str, Any]]:
        """The journal so far: the lines that end a record, or those that begin one."""
        self.server.journal.drain()
        files = sorted((self.config_path.parent / "usage").glob("*.jsonl"))
        lines = [json.loads(line) for file in files for line in file.read_bytes().splitlines()]
        return [line for line in lines if ("end" in line) == ended]

    async def idle(self) -> None:
        """Wait until no request is in flight."""
        await self.server.proxy.wait_idle()

    async def consistent(self) -> None:
        """Assert that nothing is left over: no request, no lease, no body."""
        await self.idle()
        assert self.server.proxy.in_flight == 0
        assert [repr(each) for each in self.server.endpoints.states() if each.in_flight] == []
        assert self.server.memory.used_bytes == 0
        caches = [pool.caches for pool in self.server.generation.pools.values() if pool.caches is not None]
        seats = [seat for each in caches for seat in each.seats.values()]
        assert {(seat.pending, seat.prefilling, len(seat.line)) for seat in seats} <= {(0, 0, 0)}
        assert [repr(each) for each in self.server.admission._counters.values() if each.running] == []
        assert self.server.journal.records_open == self.server.journal.records_closed

    async def stop(self) -> None:
        self.server.stop()
        await self._task


StartEdge = Callable[..., Awaitable[Edge]]


@pytest.fixture(scope="session")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A key store with a key of `USER`, and the key: each edge gets a copy, for making one costs half of a start."""
    path = tmp_path_factory.mktemp("keys") / "keys.db"
    with KeyRegistry(path) as registry:
        key, _ = registry.create(USER)
    return path, key


@pytest.fixture
async def start_edge(tmp_path: Path, key_file: tuple[Path, str]) -> AsyncIterator[StartEdge]:
    """Start edges from the text of a routes.toml; `{upstream}` in it stands for an upstream's URL."""
    async with AsyncExitStack() as stack:
        count = 0

        async def start(
            routes: str,
            *,
            server: str = "",
            keys: str = "",
            adapt: Callable[[Config], Config] = lambda config: config,
        ) -> Edge:
            nonlocal count
            count += 1
            directory = tmp_path / f"edge{count}"
            directory.mkdir()
            config_path = directory / "routes.toml"
            defaults = 'listen = "127.0.0.1:0"\nadmin = "127.0.0.1:0"\nshutdown_delay = "0s"\ndrain_timeout = "5s"\n'
            # A default is left out when the test says otherwise.
            given = {line.partition("=")[0].strip() for line in server.splitlines()}
            kept = "".join(line + "\n" for line in defaults.splitlines() if line.partition("=")[0].strip() not in given)
            store = "" if keys.startswith("store =") else 'store = "sqlite:keys.db"'
            config_path.write_text(f"[server]\n{kept}{server}\n[keys]\n{store}\n{keys}\n{routes}\n")
            made, key = key_file
            shutil.copy(made, directory / "keys.db")
            log_path = directory / "access.log"
            descriptor = os.open(log_path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            stack.callback(os.close, descriptor)
            running = Server(config_path, adapt, log_to=descriptor)
            ready = asyncio.Event()
            task = asyncio.get_running_loop().create_task(running.run(lambda _: ready.set()))
            waiting = asyncio.get_running_loop().create_task(ready.wait())
            await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                waiting.cancel()
                await task
            edge = Edge(
                running,
                int(running.addresses[0].rpartition(":")[2]) if not running.addresses[0].startswith("unix") else 0,
                int(running.admin_address.rpartition(":")[2]),
                directory / "keys.db",
                config_path,
                key,
                log_path,
                task,
            )

            async def end() -> None:
                for client in edge._clients:
                    client.abort()
                if not task.done():
                    running.stop()
                    await task

            stack.push_async_callback(end)
            return edge

        yield start


ROUTES = """
[pools.r1]
endpoints = ["{upstream}"]
[routes."public/deepseek-r1"]
pool = "r1"
[routes."u-*"]
instance = "{upstream}"
"""


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    """A simulated model server that answers at once."""
    running = Simulator(Behaviour())
    await running.start()
    yield running
    await running.close()


@pytest.fixture
async def edge(start_edge: StartEdge, simulator: Simulator) -> Edge:
    """An edge in front of the simulator: `public/deepseek-r1` and every instance."""
    return await start_edge(ROUTES.replace("{upstream}", simulator.url))


async def soon(waiting: Awaitable[T]) -> T:
    """What has to come, and soon enough for any machine."""
    async with asyncio.timeout(20):
        return await waiting


Script = Callable[["ScriptedConnection"], Awaitable[None]]


@dataclass
class ScriptedConnection:
    """One connection of a scripted upstream, after it read a whole request."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    request: bytes
    closed: asyncio.Event

    async def send(self, *parts: bytes) -> None:
        """Send each part in a write of its own, so that the edge reads them apart."""
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()
            await asyncio.sleep(0)

    def reset(self) -> None:
        """Close with a reset."""
        import socket
        import struct

        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


class ScriptedUpstream:
    """Says exactly these bytes: each request on each connection is answered by `script`."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[bytes] = []
        self.connections = 0
        self.asked = asyncio.Event()  # set whenever a request came
        self.gone = asyncio.Event()  # set whenever a connection ended
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**24)
        return self.url

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        closed = asyncio.Event()
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = head.lower().split(b"\r\n")
                lengths = [int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")]
                length = lengths[0] if lengths else 0
                request = head + await reader.readexactly(length)
                self.requests.append(request)
                self.asked.set()
                await self.script(ScriptedConnection(reader, writer, request, closed))
                if writer.is_closing():
                    return
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            closed.set()
            self.gone.set()
            writer.close()
            self._tasks.discard(task)

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Watch:
    """Waits for what calls of a method change: after each call the condition is asked again."""

    def __init__(self) -> None:
        self.calls: list[Any] = []  # on what the method was called
        self._called = asyncio.Event()

    def note(self, owner: Any) -> None:
        self.calls.append(owner)
        self._called.set()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until the condition holds, and soon enough for any machine."""
        async with asyncio.timeout(25):
            while not condition():
                self._called.clear()
                await self._called.wait()

    async def called(self) -> None:
        await self.until(lambda: self.calls)


WatchMethod = Callable[[type, str], Watch]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> WatchMethod:
    """Watch a method of a class, of whichever object; it does what it does."""

    def method_of(owner: type, name: str) -> Watch:
        watched = Watch()
        original = getattr(owner, name)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return original(self, *args, **kwargs)
            finally:
                watched.note(self)

        monkeypatch.setattr(owner, name, method)
        return watched

    return method_of


class Heard(logging.Handler):
    """Waits for what the process logs."""

    def __init__(self) -> None:
        super().__init__()
        self._said: list[str] = []
        self._more = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record.getMessage())
        self._more.set()

    async def until(self, words: str) -> None:
        """Wait until a message with these words was logged."""
        async with asyncio.timeout(25):
            while not any(words in each for each in self._said):
                self._more.clear()
                await self._more.wait()


@pytest.fixture
async def heard(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Heard]:
    """What the process logs from now on."""
    caplog.set_level(logging.INFO, "edge")
    heard = Heard()
    logging.getLogger("edge").addHandler(heard)
    yield heard
    logging.getLogger("edge").removeHandler(heard)


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A Valkey server of the test's own."""
    server = ValkeyServer(tmp_path)
    server.start()
    yield server
    server.stop()


StartUpstream = Callable[[Script], Awaitable[ScriptedUpstream]]


@pytest.fixture
async def start_upstream() -> AsyncIterator[StartUpstream]:
    """Start scripted upstreams."""
    running: list[ScriptedUpstream] = []

    async def start(script: Script) -> ScriptedUpstream:
        upstream = ScriptedUpstream(script)
        await upstream.start()
        running.append(upstream)
        return upstream

    yield start
    for upstream in running:
        await upstream.close()


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the machine's proxies and keys away from the SDKs."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("OPENAI_"):
            monkeypatch.delenv(name)


@pytest.fixture
def full_pipe() -> Iterator[tuple[int, int]]:
    """A pipe that nobody reads and that has no room."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writer, True)
    yield reader, writer
    os.set_blocking(reader, False)
    try:
        while os.read(reader, 2**20):
            pass
    except BlockingIOError:
        pass
    os.close(reader)
    os.close(writer)
