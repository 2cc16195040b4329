"""Connections to upstreams: kept while they are fresh, the newest first, and what the edge itself may lack.

And which address of a name they go to.
"""

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, cast

import pytest

from edge.config.values import parse_url
from edge.errors import ConnectFailed, EdgeError, OutOfPorts, Overloaded
from edge.wire.connections import _MANY_USES, ConnectionPool, Shortage, UpstreamConnection


class Clock:
    """The running loop, with a time that a test moves."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.ahead_s = 0.0

    def time(self) -> float:
        return self.loop.time() + self.ahead_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loop, name)


@pytest.fixture
async def listening() -> Any:
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for writer in writers:
            writer.close()


def new_pool(url: str, clock: Clock) -> ConnectionPool:
    return ConnectionPool(parse_url(url), None, cast(asyncio.AbstractEventLoop, clock))


@pytest.mark.parametrize(("waited_s", "kept"), [(1.5, True), (1.7, False)])
async def test_connection_is_reused_only_while_it_is_fresh(listening: str, waited_s: float, kept: bool) -> None:
    clock = Clock()
    pool = new_pool(listening, clock)
    connection = await pool.connect(5)
    connection.free(1.6)
    clock.ahead_s += waited_s
    assert (pool.take() is connection, len(pool)) == (kept, 0)
    assert connection.transport is not None
    assert connection.transport.is_closing() != kept
    connection.abort()
    pool.close()


@pytest.mark.parametrize(("age_s", "kept"), [(47.0, True), (61.0, False)])
async def test_connection_is_reused_only_until_it_is_old_however_busy_it_is(
    listening: str, age_s: float, kept: bool
) -> None:
    """A balancer behind a name chooses for connections, and so a server that was added there gets its share."""
    clock = Clock()
    pool = new_pool(listening, clock)
    connection = await pool.connect(5, 60)
    for _ in range(3):
        connection.free(4.0)
        assert pool.take() is connection
        clock.ahead_s += (age_s - 1) / 3
    connection.free(4.0)
    clock.ahead_s += 1
    assert (pool.take() is connection) is kept
    connection.abort()
    pool.close()


@pytest.mark.parametrize(
    ("uses", "age_s", "kept"), [(_MANY_USES - 1, 47.0, True), (_MANY_USES, 3.9, True), (_MANY_USES, 5.1, False)]
)
async def test_connection_that_was_used_often_is_made_anew_after_a_part_of_its_age(
    listening: str, uses: int, age_s: float, kept: bool
) -> None:
    """Where requests are short the handshake is a small share, and a new server gets its own within seconds."""
    clock = Clock()
    pool = new_pool(listening, clock)
    connection = await pool.connect(5, 60)
    connection.uses = uses
    clock.ahead_s = age_s
    connection.free(4.0)
    assert (pool.take() is connection) is kept
    connection.abort()
    pool.close()


@pytest.mark.parametrize("request_s", [0.05, 0.7, 5.0, 20.0])
async def test_server_that_is_added_behind_a_name_gets_its_share_within_90_s_of_steady_traffic(
    listening: str, request_s: float
) -> None:
    """Each new connection goes to the next server, as balancers of connections do; six requests run at all times."""
    clock = Clock()
    pool = new_pool(listening, clock)
    servers, made = ["old"], 0
    server_of: dict[UpstreamConnection, str] = {}
    lent: list[UpstreamConnection] = []
    asked: list[str] = []

    async def turn() -> None:
        nonlocal made
        if len(lent) == 6:
            lent.pop(0).free(4.0)
        connection = pool.take()
        if connection is None:
            connection = await pool.connect(5, 60)
            server_of[connection] = servers[made % len(servers)]
            made += 1
        connection.uses += 1
        lent.append(connection)
        asked.append(server_of[connection])
        clock.ahead_s += request_s / 6

    while clock.ahead_s < 100:
        await turn()
    before = made
    servers.append("new")
    begun = len(asked)
    while clock.ahead_s < 160:
        await turn()
    seen = len(asked)
    while clock.ahead_s < 190:
        await turn()
    assert asked[seen:].count("new") >= 0.8 * len(asked[seen:]) / 2
    assert made - before <= 2 * 6 + (len(asked) - begun) / _MANY_USES
    for connection in lent:
        connection.abort()
    pool.close()


async def test_connections_that_were_made_together_do_not_become_old_together(listening: str) -> None:
    """Else all of them would be made anew at once, again and again."""
    clock = Clock()
    pool = new_pool(listening, clock)
    made = [await pool.connect(5, 60) for _ in range(40)]
    clock.ahead_s = 54.0
    for connection in made:
        connection.free(4.0)
    kept = 0
    while pool.take() is not None:
        kept += 1
    assert 0 < kept < len(made)
    for connection in made:
        connection.abort()
    pool.close()


async def test_newest_idle_connection_is_taken_first(listening: str) -> None:
    """It is the least likely to have been closed by the upstream."""
    pool = new_pool(listening, Clock())
    made: list[UpstreamConnection] = [await pool.connect(5) for _ in range(3)]
    for connection in made:
        connection.free(4.0)
    assert [pool.take() for _ in range(4)] == [*reversed(made), None]
    for connection in made:
        connection.abort()
    pool.close()


async def test_closed_pool_keeps_nothing(listening: str) -> None:
    pool = new_pool(listening, Clock())
    idle, lent = await pool.connect(5), await pool.connect(5)
    idle.free(4.0)
    pool.close()
    lent.free(4.0)
    assert len(pool) == 0
    assert all(each.transport is not None and each.transport.is_closing() for each in (idle, lent))


class Refusing(Clock):
    """A loop whose next connections fail."""

    def __init__(self, *failures: OSError) -> None:
        super().__init__()
        self.failures = list(failures)
        self.tries = 0

    async def create_connection(self, *args: Any, **kwargs: Any) -> Any:
        self.tries += 1
        if self.failures:
            raise self.failures.pop(0)
        return await self.loop.create_connection(*args, **kwargs)

    async def getaddrinfo(self, *args: Any, **kwargs: Any) -> Any:
        raise self.failures.pop(0)


def failing(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
async def test_without_a_descriptor_idle_connections_of_all_pools_make_room(listening: str, number: int) -> None:
    clock = Refusing()
    pools: list[ConnectionPool] = []
    shortage = Shortage(lambda: pools)
    pools += [
        ConnectionPool(parse_url(listening), None, cast(asyncio.AbstractEventLoop, clock), shortage) for _ in range(2)
    ]
    idle, lent = await pools[0].connect(5), await pools[0].connect(5)
    idle.free(4.0)
    clock.failures = [failing(number)]
    made = await pools[1].connect(5)
    assert (idle.closed, lent.closed, made.closed, len(pools[0])) == (True, False, False, 0)  # closed before the try
    lent.free(4.0)
    assert pools[0].take() is lent  # the pool goes on
    for connection in (lent, made):
        connection.abort()
    for pool in pools:
        pool.close()


@pytest.mark.parametrize(
    ("number", "kind", "tries"),
    [
        (errno.EMFILE, Overloaded, 2),
        (errno.ENFILE, Overloaded, 2),
        (errno.EADDRNOTAVAIL, OutOfPorts, 1),
        (errno.ECONNREFUSED, ConnectFailed, 1),
        (errno.ENETUNREACH, ConnectFailed, 1),
    ],
)
async def test_what_the_edge_lacks_is_no_fault_of_the_endpoint(number: int, kind: type[EdgeError], tries: int) -> None:
    clock = Refusing(*[failing(number)] * 2)
    with pytest.raises(EdgeError) as raised:
        await new_pool("http://10.0.0.1:8000", clock).connect(5)
    assert (type(raised.value), clock.tries) == (kind, tries)
    assert raised.value.retry_after_s


@pytest.mark.parametrize(("lacking", "kind"), [(True, Overloaded), (False, ConnectFailed)])
async def test_a_name_that_is_unknown_for_want_of_a_descriptor_is_told_from_one_that_is(
    monkeypatch: pytest.MonkeyPatch, lacking: bool, kind: type[EdgeError]
) -> None:
    """The resolver cannot open its files then, and says the same."""

    def no_socket() -> None:
        raise failing(errno.EMFILE)

    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    pool = new_pool("http://model.test:8000", Refusing(unknown, unknown))
    with monkeypatch.context() as patch:  # the loop needs sockets of its own afterwards
        patch.setattr(socket, "socket", no_socket if lacking else socket.socket)
        with pytest.raises(EdgeError) as raised:
            await pool.connect(5)
    assert type(raised.value) is kind


async def test_a_lack_is_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = Refusing(*[failing(errno.EADDRNOTAVAIL)] * 3)
    pool = new_pool("http://10.0.0.1:8000", clock)
    for ahead_s, lines in ((0.0, 1), (59.0, 1), (61.0, 2)):
        clock.ahead_s = ahead_s
        with pytest.raises(OutOfPorts):
            await pool.connect(5)
        logged = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert len(logged) == lines
    assert "EADDRNOTAVAIL" in logged[0]
    assert "10.0.0.1" not in logged[0]


# --- the addresses of a name

Address = tuple[str, int]


class Resolving(Clock):
    """A loop that knows one name; `tried` are the addresses that connections were begun to."""

    def __init__(self, *addresses: Address) -> None:
        super().__init__()
        self.addresses = list(addresses)
        self.tried: list[Address] = []

    async def getaddrinfo(self, host: str, port: int, **options: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", address) for address in self.addresses]

    async def sock_connect(self, sock: socket.socket, address: Address) -> None:
        self.tried.append(address)
        await self.loop.sock_connect(sock, address)

    async def connect(self, pool: ConnectionPool) -> Address:
        """Make a connection, and return where it went."""
        connection = await pool.connect(5)
        assert connection.transport is not None
        address: Address = connection.transport.get_extra_info("peername")
        connection.abort()
        return address


@pytest.fixture
def silent() -> Iterator[Address]:
    """A listener whose queue is full: it answers nobody, like a machine that is gone."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(8):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()


@pytest.fixture
def refusing() -> Iterator[Address]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()


@pytest.mark.parametrize("address", ["169.254.169.254", "169.254.1.1", "fe80::1", "fd00:ec2::254", "100.100.100.200"])
async def test_name_that_leads_to_a_metadata_service_is_not_connected_to(
    listening: str, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever answers for the name chooses that; another address of it is asked, and the operator is told, once."""
    live = ("127.0.0.1", parse_url(listening).port)
    loop = Resolving((address, 80))
    pool = new_pool("http://model.test", loop)
    for _ in range(2):
        with pytest.raises(ConnectFailed) as failure:
            await pool.connect(5)
        assert address not in str(failure.value)
    assert loop.tried == []
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "model.test leads to an address" in record.getMessage()
    loop.addresses.append(live)
    for _ in range(4):
        assert await loop.connect(pool) == live
    assert loop.tried == [live] * 4


@pytest.mark.parametrize("dead", ["silent", "refusing"])
async def test_dead_address_of_a_name_is_passed_over_and_tried_last_for_some_minutes(
    listening: str, dead: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it costs its delay once, and not the whole time to connect (RFC 8305 section 5, RFC 6555 section 4.2)."""
    monkeypatch.setattr("edge.wire.connections.random.shuffle", lambda found: None)
    gone: Address = request.getfixturevalue(dead)
    live = ("127.0.0.1", parse_url(listening).port)
    loop = Resolving(gone, live)
    pool = new_pool("http://model.test", loop)
    for ahead_s, tried in ((0.0, [gone, live]), (1.0, [live]), (599.0, [live]), (601.0, [gone, live])):
        loop.ahead_s = ahead_s
        loop.tried.clear()
        assert await loop.connect(pool) == live
        assert loop.tried == tried


async def test_while_all_addresses_of_a_name_answer_each_gets_connections(listening: str) -> None:
    """Also where the name service gives them in the same order every time."""
    async with await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0) as other:
        addresses: list[Address] = [("127.0.0.1", parse_url(listening).port), other.sockets[0].getsockname()]
        loop = Resolving(*addresses)
        pool = new_pool("http://model.test", loop)
        went = [await loop.connect(pool) for _ in range(60)]
        assert min(went.count(address) for address in addresses) >= 10


async def test_family_that_the_resolver_prefers_is_tried_first(listening: str) -> None:
    """RFC 6724: it knows which one this machine can use."""
    port = parse_url(listening).port

    class OfTwoFamilies(Resolving):
        async def getaddrinfo(self, host: str, port: int, **options: Any) -> Any:
            families = {"127.0.0.1": socket.AF_INET, "::1": socket.AF_INET6}
            return [(families[each[0]], socket.SOCK_STREAM, 0, "", each) for each in self.addresses]

    loop = OfTwoFamilies(("127.0.0.1", port), ("::1", port))
    pool = new_pool("http://model.test", loop)
    for _ in range(12):
        assert await loop.connect(pool) == ("127.0.0.1", port)
    assert {address[0] for address in loop.tried} == {"127.0.0.1"}


async def test_name_of_which_no_address_answers_in_time_cannot_be_connected_to(silent: Address) -> None:
    loop = Resolving(silent, silent)
    with pytest.raises(ConnectFailed):
        await new_pool("http://model.test", loop).connect(0.6)
    assert loop.tried == [silent, silent]
