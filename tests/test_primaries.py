"""Who is asked for the primary, and what comes of it; `behaviour/test_failover.py` has servers that do fail over."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trustme
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from edge import primaries
from edge.valkey import connect, connect_blocking, disconnect
from tests.keybackends import PATIENCE_S

SILENT = b""
OTHERS = {"hello": b"%1\r\n$5\r\nproto\r\n:3\r\n"}


@dataclass
class Server:
    """What speaks the protocol of a Redis: `answers` by the first word of a command, in lower case."""

    answers: dict[str, Callable[[], bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    port: int = 0
    tls: ssl.SSLContext | None = None
    nothing: bytes = b"$-1\r\n"  # in the version of the protocol that is spoken
    _listener: asyncio.Server | None = None

    async def start(self) -> None:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self.tls)
        self.port = self._listener.sockets[0].getsockname()[1]

    def stop(self) -> None:
        assert self._listener is not None
        self._listener.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError, ValueError):
            while count := int((await reader.readline()).lstrip(b"*") or 0):
                words = []
                for _ in range(count):
                    size = int((await reader.readline()).lstrip(b"$"))
                    words.append((await reader.readexactly(size + 2))[:-2].decode())
                self.asked.append(" ".join(words))
                if words[:2] == ["HELLO", "3"]:
                    self.nothing = b"_\r\n"
                said = self.answers.get(words[0].lower())
                writer.write(said() if said else OTHERS.get(words[0].lower(), b"+OK\r\n"))
        writer.close()


def address(port: int) -> bytes:
    return b"*2\r\n$9\r\n127.0.0.1\r\n$%d\r\n%d\r\n" % (len(str(port)), port)


def slots(port: int) -> bytes:
    """All slots at one node; it leaves out its own host, as a node may."""
    return b"*1\r\n*3\r\n:0\r\n:16383\r\n*3\r\n$0\r\n\r\n:%d\r\n$2\r\nid\r\n" % port


def text(value: str) -> Callable[[], bytes]:
    return lambda: b"$%d\r\n%s\r\n" % (len(value), value.encode())


@asynccontextmanager
async def running(*servers: Server) -> AsyncIterator[None]:
    for each in servers:
        await each.start()
    try:
        yield
    finally:
        for each in servers:
            each.stop()


@asynccontextmanager
async def client_at(url: str, blocks: bool, ca_file: Path | None = None) -> AsyncIterator[Callable[[], Any]]:
    """What gets a value, by the one client or the other."""
    if blocks:
        with connect_blocking(url, PATIENCE_S, ca_file) as blocking:
            yield lambda: asyncio.to_thread(blocking.get, "{edge}:a")
    else:
        client = connect(url, PATIENCE_S, ca_file)
        yield lambda: client.get("{edge}:a")
        await disconnect(client)


EITHER = pytest.mark.parametrize("blocks", [False, True], ids=["serving", "blocking"])


def sentinel_of(primary: Server) -> Server:
    return Server({"sentinel": lambda: address(primary.port)})


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine too; a test of one that says nothing has no patience."""
    monkeypatch.setattr(primaries, "_ASK_TIMEOUT_S", PATIENCE_S)


@EITHER
async def test_name_that_moves_in_a_cluster_is_followed(blocks: bool) -> None:
    """The kept connection leads to a node that has it no more."""
    first, second = Server(), Server()
    owner = [first]

    def value_of(node: Server) -> Callable[[], bytes]:
        return lambda: b"$1\r\nx\r\n" if owner[0] is node else b"-MOVED 3202 127.0.0.1:%d\r\n" % owner[0].port

    for node in (first, second):
        node.answers = {"cluster": lambda: slots(owner[0].port), "get": value_of(node)}
    async with running(first, second), client_at(f"redis+cluster://127.0.0.1:{first.port}", blocks) as get:
        assert await get() == b"x"
        owner[0] = second
        with pytest.raises(RedisConnectionError, match="another primary"):
            await get()
        assert await get() == b"x"
        first.stop()
        owner[0] = first
        await first.start()
        with pytest.raises(RedisConnectionError, match="another primary"):
            await get()
        assert await get() == b"x"


@EITHER
async def test_sentinel_that_is_cut_off_is_not_asked_twice_in_a_row(blocks: bool) -> None:
    """It names a primary of before, which is gone."""
    gone, primary = Server(), Server({"get": text("x")})
    await gone.start()
    gone.stop()
    behind, informed = sentinel_of(gone), sentinel_of(primary)
    async with running(primary, behind, informed):
        url = f"redis+sentinel://127.0.0.1:{behind.port},127.0.0.1:{informed.port}/service"
        async with client_at(url, blocks) as get:
            with pytest.raises(RedisConnectionError):
                await get()
            assert await get() == b"x"
    assert "SENTINEL GET-MASTER-ADDR-BY-NAME service" in informed.asked


@EITHER
async def test_sentinel_that_says_nothing_is_asked_last(blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primaries, "_ASK_TIMEOUT_S", 0.1)
    primary = Server({"get": text("x")})
    silent, informed = Server({"sentinel": lambda: SILENT}), sentinel_of(primary)
    async with running(primary, silent, informed):
        url = f"redis+sentinel://127.0.0.1:{silent.port},127.0.0.1:{informed.port}/service"
        async with client_at(url, blocks) as get:
            assert await get() == b"x"
            primary.stop()
            await primary.start()
            with suppress(RedisError):
                await get()
            assert await get() == b"x"
    assert sum(each.startswith("SENTINEL") for each in silent.asked) == 1


@EITHER
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "it knows none"),
        (b"-NOAUTH Authentication required.\r\n", "Authentication required."),
        (b"-NOPERM User asker has no permissions\r\n", "User asker has no permissions"),
        (b":1\r\n", "TypeError|object is not"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "Protocol|Invalid"),
    ],
)
async def test_sentinels_that_name_nobody_are_an_outage_with_the_reason(
    blocks: bool, answer: bytes | None, reason: str
) -> None:
    sentinel = Server()
    sentinel.answers["sentinel"] = lambda: sentinel.nothing if answer is None else answer
    async with running(sentinel):
        url = f"redis+sentinel://edge:hunter2@127.0.0.1:{sentinel.port}/service?sentinel_password=hunter2"
        async with client_at(url, blocks) as get:
            with pytest.raises(RedisConnectionError, match=rf"^no Sentinel .* 'service': .*({reason})") as raised:
                await get()
    assert "hunter2" not in str(raised.value)
    assert any(each in ("AUTH hunter2", "HELLO 3 AUTH default hunter2") for each in sentinel.asked)


@pytest.mark.parametrize("kind", ["sentinel", "cluster"])
async def test_everybody_is_proved_by_tls(kind: str, tmp_path: Path) -> None:
    """Sentinels and nodes too; nobody who is not proved is told a password."""
    authority, stranger = trustme.CA(), trustme.CA()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    for name, each in (("ca.pem", authority), ("stranger.pem", stranger)):
        each.cert_pem.write_to_path(str(tmp_path / name))
    primary = Server({"get": text("x")}, tls=tls)
    told = Server({"sentinel": lambda: address(primary.port), "cluster": lambda: slots(primary.port)}, tls=tls)
    path, query = ("/service", "?sentinel_username=s&sentinel_password=t") if kind == "sentinel" else ("", "")
    async with running(primary, told):
        url = f"rediss+{kind}://edge:secret@127.0.0.1:{told.port}{path}{query}"
        async with client_at(url, False, tmp_path / "stranger.pem") as get:
            with pytest.raises(RedisConnectionError, match="certificate verify failed"):
                await get()
        assert (primary.asked, told.asked) == ([], [])
        for blocks in (False, True):
            async with client_at(url, blocks, tmp_path / "ca.pem") as get:
                assert await get() == b"x"
    assert any(each.endswith("edge secret") for each in primary.asked)
    assert any(each.endswith("s t" if kind == "sentinel" else "edge secret") for each in told.asked)
