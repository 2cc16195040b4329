"""A stop always ends: what loses its cancellation, what hangs, and a further signal at every stage."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from edge.journal.shipping import Shipper
from edge.keys.stores.sqlite import SqliteKeyStore
from edge.process import drain
from edge.process.deadline import Deadline
from edge.process.server import Server
from edge.simulator.server import Simulator
from edge.stage import Stage
from edge.tasks import Hung
from tests.conftest import ROUTES, Edge, Heard, StartEdge, soon

BODY: dict[str, Any] = {"model": "public/deepseek-r1", "messages": []}


class Deaf:
    """What no cancellation ends, until the test is over."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.over = asyncio.Event()

    async def __call__(self, *_: object) -> None:
        self.begun.set()
        while not self.over.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.over.wait()


@pytest.fixture
async def deaf() -> AsyncIterator[Deaf]:
    made = Deaf()
    yield made
    made.over.set()
    await asyncio.sleep(0)


async def started(start_edge: StartEdge, simulator: Simulator, **settings: str) -> Edge:
    server = "".join(f'{name} = "{value}"\n' for name, value in settings.items())
    return await start_edge(ROUTES.replace("{upstream}", simulator.url), server=server)


async def hung(edge: Edge) -> tuple[str, ...]:
    """Wait for the end of the process and return what it left behind."""
    with pytest.raises(Hung) as caught:
        await soon(edge._task)
    return caught.value.names


# --- parts


async def test_part_that_loses_its_cancellation_holds_nothing_up(
    start_edge: StartEdge, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As redis-py loses them: the part goes on as if nothing had happened."""
    lost = 0

    async def lose(self: Server) -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                lost += 1
                if lost == 3:
                    raise

    monkeypatch.setattr(Server, "_keep_journal", lose)
    edge = await started(start_edge, simulator)
    await soon(edge.stop())
    assert lost == 3


async def test_part_that_fails_when_it_is_cancelled_does_not_begin_again(
    start_edge: StartEdge, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = 0

    async def fail(self: Server) -> None:
        nonlocal begun
        begun += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ConnectionError("as a library words it") from None

    monkeypatch.setattr(Server, "_keep_journal", fail)
    edge = await started(start_edge, simulator)
    await soon(edge.stop())
    assert begun == 1


async def test_part_that_hangs_is_named_and_costs_the_others_nothing(
    start_edge: StartEdge, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, deaf: Deaf, heard: Heard
) -> None:
    monkeypatch.setattr(Server, "_watch_file", lambda self: deaf())
    edge = await started(start_edge, simulator)
    assert (await edge.ask(BODY))[0] == 200
    await deaf.begun.wait()
    edge.server.stop()
    await heard.until("these do not end and are left behind: reload")
    assert await hung(edge) == ("reload",)
    assert [json.loads(line)["status"] for line in edge._log_path.read_bytes().splitlines()] == [200]
    assert [record["end"] for record in edge.records()] == ["complete"]


async def test_part_that_cannot_be_closed_is_named_and_the_journal_is_closed(
    start_edge: StartEdge, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, deaf: Deaf
) -> None:
    close = SqliteKeyStore.close
    monkeypatch.setattr(SqliteKeyStore, "close", deaf)
    edge = await started(start_edge, simulator)
    edge.server.stop()
    assert await hung(edge) == ("key store",)
    await close(edge.server._store)  # type: ignore[arg-type]


async def test_part_whose_closing_fails_is_told_and_the_rest_is_closed(
    start_edge: StartEdge, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, heard: Heard
) -> None:
    close = SqliteKeyStore.close

    async def fail(self: SqliteKeyStore) -> None:
        await close(self)
        raise RuntimeError("a defect")

    monkeypatch.setattr(SqliteKeyStore, "close", fail)
    edge = await started(start_edge, simulator)
    await soon(edge.stop())
    await heard.until("stop: closing key store failed")


@pytest.mark.parametrize("how", ["denies", "is silent"])
async def test_sink_that_takes_nothing_makes_no_stop_fail(
    start_edge: StartEdge, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, heard: Heard, how: str
) -> None:
    """Nor where the other parts have spent the time: what was not delivered is in the journal."""

    async def take(request: web.BaseRequest) -> web.StreamResponse:
        if how == "is silent":
            await asyncio.Event().wait()
        return web.Response(status=503)

    sink = web.ServerRunner(web.Server(take), shutdown_timeout=0.1)
    await sink.setup()
    await web.TCPSite(sink, "127.0.0.1", 0).start()
    monkeypatch.setattr("edge.process.ending._BUDGET_S", 0)
    url = f"http://127.0.0.1:{sink.addresses[0][1]}/"
    try:
        edge = await start_edge(ROUTES.replace("{upstream}", simulator.url) + f'[usage]\nsink = "{url}"\n')
        assert (await edge.ask(BODY))[0] == 200
        edge.server.stop()
        await soon(edge._task)
    finally:
        await sink.cleanup()
    await heard.until("bytes of the journal are left to the next start")
    assert [record["end"] for record in edge.records()] == ["complete"]


# --- a further signal


async def test_stop_ends_a_start_that_hangs(
    start_edge: StartEdge, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = await started(start_edge, simulator)
    await first.stop()
    opening = asyncio.Event()

    async def hang(self: SqliteKeyStore) -> None:
        opening.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(SqliteKeyStore, "open", hang)
    server = Server(first.config_path, log_to=os.open(os.devnull, os.O_WRONLY))
    task = asyncio.get_running_loop().create_task(server.run())
    await opening.wait()
    server.stop()
    await soon(task)
    assert server.addresses == []


async def test_further_signal_ends_the_wait_for_last_bytes(
    start_edge: StartEdge, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, heard: Heard
) -> None:
    """An answer that began after the cut runs on; only the next stage ends it."""
    monkeypatch.setattr(drain, "_CUT_GRACE_S", 3600)
    edge = await started(start_edge, simulator, drain_timeout="100ms")
    client = await edge.connect()
    data = json.dumps({**BODY, "simulate": {"ttft_ms": 86_400_000}}).encode()
    client.send(edge.request(data, headers=("Expect: 100-continue",)).removesuffix(data))
    await client.head()
    edge.server.stop()
    await heard.until("are cut")
    client.send(data)
    await simulator.wait_for(lambda: simulator.requests)
    edge.server.stop()
    await soon(edge._task)
    assert edge.server.lifecycle.stage is Stage.CUTTING


@pytest.mark.parametrize(("owner", "name"), [(SqliteKeyStore, "close"), (Shipper, "flush")], ids=["parts", "records"])
async def test_further_signal_ends_the_wait_for_parts_and_records(
    start_edge: StartEdge,
    simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
) -> None:
    """What is waited for is not hung: a signal ended it."""
    closing = asyncio.Event()
    original: Callable[..., Any] = getattr(owner, name)

    async def hang(self: Any, *args: Any) -> None:
        closing.set()
        try:
            await asyncio.Event().wait()
        finally:
            await original(self, *args)

    monkeypatch.setattr(owner, name, hang)
    monkeypatch.setattr("edge.process.server._PART_PATIENCE_S", 3600)
    monkeypatch.setattr("edge.process.ending._BUDGET_S", 3600)
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url) + '[usage]\nsink = "http://127.0.0.1:1/"\n')
    edge.server.stop()
    await closing.wait()
    edge.server.stop()
    await soon(edge._task)


async def test_parts_have_their_time_behind_a_drain_that_a_signal_ended(
    start_edge: StartEdge, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, heard: Heard
) -> None:
    closed = False
    close = SqliteKeyStore.close

    async def close_slowly(self: SqliteKeyStore) -> None:
        nonlocal closed
        await asyncio.sleep(0.05)
        await close(self)
        closed = True

    monkeypatch.setattr(SqliteKeyStore, "close", close_slowly)
    edge = await started(start_edge, simulator, shutdown_delay="1h")
    edge.server.stop()
    await heard.until("draining")
    edge.server.stop()
    await soon(edge._task)
    assert closed


# --- the last moment


class Exits:
    """Takes the exit code in place of the system."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.code: asyncio.Future[int] = self._loop.create_future()

    def __call__(self, code: int) -> None:
        self._loop.call_soon_threadsafe(self.code.set_result, code)


async def test_deadline_ends_the_process_and_says_what_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("logging.shutdown", lambda: None)
    left = asyncio.get_running_loop().create_task(asyncio.Event().wait(), name="a part")
    exits = Exits()
    deadline = Deadline(exits)
    deadline.within(3600)
    deadline.within(0.0)
    deadline.within(3600)
    assert await soon(exits.code) == 1
    left.cancel()
    assert "stop: it takes too long and ends here, left are: " in caplog.text
    assert "a part" in caplog.text


async def test_deadline_is_that_of_the_drain_and_comes_nearer(start_edge: StartEdge, simulator: Simulator) -> None:
    """Ten seconds beyond what the file allows; from a second signal on, and for the parts, ten seconds."""
    first = await started(start_edge, simulator, shutdown_delay="20s", drain_timeout="100s")
    await asyncio.sleep(0)
    said: list[float] = []
    draining = asyncio.Event()

    def within(patience_s: float) -> None:
        said.append(patience_s)
        draining.set()

    server = Server(first.config_path, log_to=os.open(os.devnull, os.O_WRONLY), within=within)
    ready = asyncio.Event()
    task = asyncio.get_running_loop().create_task(server.run(lambda _: ready.set()))
    await ready.wait()
    server.stop()
    await draining.wait()
    server.stop()
    await soon(task)
    assert said == [130, 10, 10]
    first.server.stop()
    first.server.stop()


_BREAKS = {
    "a part that hangs": """
async def deaf(self):
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass
Server._keep_journal = deaf
""",
    "a loop that is blocked": """
Journal.close = lambda self: time.sleep(3600)
""",
    "a thread that hangs": """
run = Server._keep_journal
async def block(self):
    asyncio.get_running_loop().run_in_executor(None, time.sleep, 3600)
    await run(self)
Server._keep_journal = block
""",
}
_RUN = """
import asyncio, sys, time
from edge.__main__ import main
from edge.journal.journal import Journal
from edge.process import drain, server
from edge.process.server import Server
server.GRACE_S = drain.GRACE_S = {grace}
{break_it}
sys.exit(main(sys.argv[1:]))
"""


@asynccontextmanager
async def broken(directory: Path, how: str, grace_s: float) -> AsyncIterator[asyncio.subprocess.Process]:
    """`edge serve` with a defect, which serves."""
    config = directory / "routes.toml"
    config.write_text(
        '[server]\nlisten = "127.0.0.1:0"\nadmin = "127.0.0.1:0"\nshutdown_delay = "0s"\ndrain_timeout = "0s"\n'
        '[keys]\nstore = "sqlite:keys.db"\n' + ROUTES.replace("{upstream}", "http://127.0.0.1:1")
    )
    script = _RUN.format(grace=grace_s, break_it=_BREAKS[how])
    running = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, "serve", "--config", str(config), stderr=asyncio.subprocess.PIPE
    )
    try:
        yield running
    finally:
        if running.returncode is None:
            running.kill()
        await running.wait()


@pytest.mark.parametrize(
    ("how", "grace_s", "told"),
    [
        ("a part that hangs", 60.0, "these do not end and are left behind: journal"),
        ("a loop that is blocked", 0.5, "the code of edge.process.server.Server._end"),
        ("a thread that hangs", 0.5, "the thread uvloop_0"),
    ],
)
async def test_process_that_cannot_end_says_what_hangs_and_fails(
    tmp_path: Path, how: str, grace_s: float, told: str
) -> None:
    async with broken(tmp_path, how, grace_s) as running:
        assert running.stderr is not None
        async with asyncio.timeout(90):  # an interpreter that imports, beside all other tests
            while "listening on" not in (line := (await running.stderr.readline()).decode()):
                assert line
            running.send_signal(signal.SIGTERM)
            rest = (await running.stderr.read()).decode()
            assert await running.wait() == 1
        assert told in rest
