"""Members by DNS: every address of a name, followed as it changes; the resolver's answers are the test's."""

import asyncio
import logging
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from edge.config.values import Url
from edge.operations import OPERATIONS
from edge.simulator.dialects import Behaviour
from edge.simulator.server import Simulator
from edge.upstream import discovery
from edge.upstream.pools import Pool
from edge.wire import connections as wire
from tests.conftest import Edge, StartEdge

BODY = {"model": "public/deepseek-r1", "messages": []}
PATIENCE_S = 20


class Changes:
    """Wakes a test when a name was asked, a pool got its members, or a generation came into force."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        for owner, name in ((Pool, "replace"), (discovery.Discovery, "apply")):
            monkeypatch.setattr(owner, name, self._noting(getattr(owner, name)))

    def _noting(self, act: Callable[..., None]) -> Callable[..., None]:
        def noting(*args: object) -> None:
            act(*args)
            self.note()

        return noting

    def note(self) -> None:
        """Note a change, on any thread."""
        self._loop.call_soon_threadsafe(self._changed.set)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture
async def changes(monkeypatch: pytest.MonkeyPatch) -> Changes:
    return Changes(monkeypatch)


class Resolver:
    """Answers as the test wants for each name."""

    def __init__(self, changes: Changes) -> None:
        self.answers: dict[str, tuple[str, ...]] = {}
        self.asked = 0
        self._changes = changes

    async def look_up(self, name: Url) -> tuple[str, ...]:
        self.asked += 1
        self._changes.note()
        if name.host not in self.answers:
            raise OSError("Name or service not known")
        return self.answers[name.host]

    async def turn(self) -> None:
        """Wait until it was asked twice more: its earlier answer has taken effect."""
        before = self.asked
        await self._changes.until(lambda: self.asked >= before + 2)


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch, changes: Changes) -> Resolver:
    made = Resolver(changes)
    monkeypatch.setattr(discovery, "look_up", made.look_up)
    monkeypatch.setattr(discovery, "_INTERVAL_S", 0.02)
    return made


@pytest.fixture
async def members() -> object:
    """Two simulators on one port of two loopback addresses."""
    first = Simulator(Behaviour())
    await first.start()
    port = int(first.url.rpartition(":")[2])
    second = Simulator(Behaviour())
    await second.start("127.0.0.2", port)
    yield [first, second]
    await first.close()
    await second.close()


def routes(port: int, more: str = "") -> str:
    return f'[pools.p]\ndns = "vllm.pool.svc:{port}"\n{more}\n[routes."public/deepseek-r1"]\npool = "p"\n'


def port_of(simulator: Simulator) -> int:
    return int(simulator.url.rpartition(":")[2])


def addresses(edge: Edge) -> list[str]:
    return sorted(member.endpoint.url.host for member in edge.server.generation.pools["p"].members)


async def test_every_address_of_a_name_is_a_member_and_changes_are_followed(
    start_edge: StartEdge, members: list[Simulator], resolver: Resolver
) -> None:
    first, second = members
    resolver.answers["vllm.pool.svc"] = ("127.0.0.1", "127.0.0.2")
    edge = await start_edge(routes(port_of(first), 'balance = "round-robin"'))
    for _ in range(4):
        assert (await edge.ask(BODY))[0] == 200
    assert (len(first.requests), len(second.requests)) == (2, 2)
    resolver.answers["vllm.pool.svc"] = ("127.0.0.2",)
    await resolver.turn()
    assert addresses(edge) == ["127.0.0.2"]
    for _ in range(4):
        assert (await edge.ask(BODY))[0] == 200
    assert (len(first.requests), len(second.requests)) == (2, 6)
    assert [each.url.host for each in edge.server.endpoints.states()] == ["127.0.0.2"]
    await edge.consistent()


async def test_the_last_good_answer_goes_on_while_the_name_cannot_be_resolved(
    start_edge: StartEdge, members: list[Simulator], resolver: Resolver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    resolver.answers["vllm.pool.svc"] = ("127.0.0.1",)
    edge = await start_edge(routes(port_of(members[0])))
    del resolver.answers["vllm.pool.svc"]
    await resolver.turn()
    await resolver.turn()
    assert (await edge.ask(BODY))[0] == 200
    logged = [record.message for record in caplog.records if "cannot be resolved" in record.message]
    assert len(logged) == 1  # once, not at every look-up
    assert "the last answer goes on" in logged[0]
    resolver.answers["vllm.pool.svc"] = ("127.0.0.1",)
    await resolver.turn()
    assert [record.message.rpartition(" is ")[2] for record in caplog.records if "again" in record.message] == [
        "resolved again"
    ]


async def test_a_name_that_was_never_resolved_is_a_503_and_heals_by_itself(
    start_edge: StartEdge, members: list[Simulator], resolver: Resolver
) -> None:
    edge = await start_edge(routes(port_of(members[0])))
    status, headers, body = await edge.ask(BODY)
    assert (status, "retry-after" in headers) == (503, True)
    assert b"vllm.pool.svc" not in body
    resolver.answers["vllm.pool.svc"] = ("127.0.0.1",)
    await resolver.turn()
    assert (await edge.ask(BODY))[0] == 200


async def test_a_reload_keeps_the_members_and_their_connections(
    start_edge: StartEdge, members: list[Simulator], resolver: Resolver, changes: Changes
) -> None:
    resolver.answers["vllm.pool.svc"] = ("127.0.0.1",)
    edge = await start_edge(routes(port_of(members[0])))
    assert (await edge.ask(BODY))[0] == 200
    await edge.consistent()
    [before] = edge.server.endpoints.states()
    edge.config_path.write_text(edge.config_path.read_text().replace("[pools.p]\n", "[pools.p]\nidle_timeout = '9s'\n"))
    edge.server.reload()
    await changes.until(lambda: edge.server.generation.number == 2)
    [after] = edge.server.endpoints.states()
    assert (after, len(after.connections)) == (before, 1)
    assert (await edge.ask(BODY))[0] == 200
    assert len(edge.server.discovery) == 1


async def test_the_name_is_the_host_that_members_are_asked_for(
    start_edge: StartEdge, members: list[Simulator], resolver: Resolver
) -> None:
    resolver.answers["vllm.pool.svc"] = ("127.0.0.1",)
    edge = await start_edge(routes(port_of(members[0])))
    member = edge.server.generation.pools["p"].members[0]
    assert f"Host: vllm.pool.svc:{port_of(members[0])}\r\n".encode() in member.head(OPERATIONS["chat/completions"])


async def test_addresses_are_all_that_the_machine_knows() -> None:
    assert "127.0.0.1" in await discovery.look_up(Url("http", "localhost", 8000))


async def test_address_of_a_metadata_service_is_no_member(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever answers for the name chooses it; a name that leads nowhere else is as good as unknown."""
    known = ["169.254.169.254", "127.0.0.1", "fd00:ec2::254"]
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (it, 80)) for it in known]
    )
    assert await discovery.look_up(Url("http", "model.test", 80)) == ("127.0.0.1",)
    known.remove("127.0.0.1")
    with pytest.raises(OSError, match="credentials of a machine"):
        await discovery.look_up(Url("http", "model.test", 80))


class System:
    """The machine's resolver: 127.0.0.1 for each name, and nothing for the dead one while its server is silent."""

    def __init__(self, changes: Changes) -> None:
        self.asked: list[str] = []
        self.answers = threading.Event()
        self._changes = changes

    def getaddrinfo(self, host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        self.asked.append(host)
        self._changes.note()
        if host == "dead.test":
            self.answers.wait()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    async def turns(self, count: int) -> None:
        """Wait until the name that is well was asked so often again."""
        before = self.asked.count("well.test")
        await self._changes.until(lambda: self.asked.count("well.test") >= before + count)


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch, changes: Changes) -> Iterator[System]:
    made = System(changes)
    monkeypatch.setattr(socket, "getaddrinfo", made.getaddrinfo)
    monkeypatch.setattr(discovery, "_INTERVAL_S", 0.02)
    monkeypatch.setattr(discovery, "_TIMEOUT_S", 0.02)
    yield made
    made.answers.set()
    for thread in threads("dead.test"):
        thread.join()


def two_names(port: int) -> str:
    return "".join(
        f'[pools.{name}]\ndns = "{name}.test:{port}"\n[routes."public/{name}"]\npool = "{name}"\n'
        for name in ("dead", "well")
    )


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(f"dns {name}")]


async def test_a_name_whose_server_is_dead_holds_one_thread_and_no_other_name(
    start_edge: StartEdge, members: list[Simulator], system: System, changes: Changes
) -> None:
    """Round after round; its late answer is taken over when it comes, and the name is followed again."""
    edge = await start_edge(two_names(port_of(members[0])))
    await system.turns(10)
    assert (await edge.ask({"model": "public/well", "messages": []}))[0] == 200
    assert (await edge.ask({"model": "public/dead", "messages": []}))[0] == 503
    assert (system.asked.count("dead.test"), len(threads("dead.test"))) == (1, 1)
    system.answers.set()
    await changes.until(lambda: edge.server.generation.pools["dead"].members)
    assert (await edge.ask({"model": "public/dead", "messages": []}))[0] == 200
    await changes.until(lambda: system.asked.count("dead.test") > 1)


async def test_a_pool_that_goes_and_comes_back_waits_for_the_look_up_that_is_under_way(
    start_edge: StartEdge, members: list[Simulator], system: System, changes: Changes
) -> None:
    edge = await start_edge(two_names(port_of(members[0])))
    text = edge.config_path.read_text()
    for number, changed in enumerate((text.replace("dead", "other"), text), start=2):
        edge.config_path.write_text(changed)
        edge.server.reload()
        await changes.until(lambda number=number: edge.server.generation.number == number)
    await system.turns(2)
    assert system.asked.count("dead.test") == 1
    system.answers.set()
    await changes.until(lambda: edge.server.generation.pools["dead"].members)


async def test_a_look_up_without_an_answer_does_not_hold_the_stop(
    start_edge: StartEdge, members: list[Simulator], system: System
) -> None:
    edge = await start_edge(two_names(port_of(members[0])))
    async with asyncio.timeout(PATIENCE_S):
        await edge.stop()
    [left] = threads("dead.test")
    assert left.daemon  # nor the process's end
    system.answers.set()  # comes to nobody


async def test_upstream_connections_notice_a_machine_that_vanished(edge: Edge, simulator: Simulator) -> None:
    """Its packets are lost, so only the kernel's own timers can find it."""
    await edge.ask(BODY)
    await edge.consistent()
    endpoint = next(each for each in edge.server.endpoints.states() if len(each.connections))
    connection = endpoint.connections.take()
    assert connection is not None
    assert connection.transport is not None
    sock = connection.transport.get_extra_info("socket")
    for level, option, value in wire._NOTICE_DEATH:
        assert sock.getsockopt(level, option) == value
    connection.abort()
