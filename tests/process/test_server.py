"""The process's own decisions: what a reload changes, what it refuses to start with."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from edge.commands.arguments import listening_on
from edge.config.changes import describe_change
from edge.config.problems import ConfigError
from edge.config.process_settings import ServerConfig
from edge.config.reading import parse
from edge.config.settings import Config
from edge.config.values import Address, KeyStoreAddress
from edge.keys.stores.keyfile import KeyFileError
from edge.process.listeners import raise_descriptor_limit
from edge.process.server import Server
from edge.simulator.server import Simulator
from tests.conftest import ROUTES, StartEdge

TEXT = """
[pools.a]
endpoints = ["http://10.0.0.1:8000"]
[pools.b]
endpoints = ["http://10.0.0.2:8000"]
[routes."public/a"]
pool = "a"
[routes."public/b"]
pool = "b"
"""


def config(text: str = TEXT) -> Config:
    return parse(text, Path("routes.toml"), {})


@pytest.mark.parametrize(
    ("new", "told"),
    [
        (TEXT, "nothing changed"),
        (TEXT + '[routes."public/c"]\npool = "a"\n', "+route public/c"),
        (TEXT.replace("public/b", "public/c"), "+route public/c, -route public/b"),
        (TEXT.replace('"a"\n', '"a"\nhosts = ["x.y"]\n', 1), "~route public/a"),
        (TEXT.replace("10.0.0.2", "10.0.0.3"), "~pool b"),
        ("[server]\nmax_body = '1MiB'\n[keys]\ncache_ttl = '1s'\n" + TEXT, "~server, ~keys"),
    ],
)
def test_change_is_told_by_name(new: str, told: str) -> None:
    assert describe_change(config(), config(new)) == told


def test_change_tells_no_secret() -> None:
    secret = TEXT.replace('"http://10.0.0.1:8000"', '{ url = "http://10.0.0.1:8000", api_key = "s3cret" }')
    assert describe_change(config(), config(secret)) == "~pool a"
    assert "s3cret" not in repr(config(secret))


def test_command_line_replaces_the_files_addresses() -> None:
    listen, admin = Address("127.0.0.1", 1), Address("127.0.0.1", 2)
    assert listening_on(None, None)(config()) == config()
    changed = listening_on(listen, admin)(config())
    assert (changed.server.listen, changed.server.admin) == ((listen,), admin)
    assert replace(changed, server=config().server) == config()


async def test_file_that_is_bad_at_the_start_ends_it(start_edge: StartEdge) -> None:
    with pytest.raises(ConfigError, match="pool"):
        await start_edge('[routes."public/a"]\npool = "none"\n')


async def test_store_in_a_missing_directory_ends_the_start(start_edge: StartEdge) -> None:
    def elsewhere(given: Config) -> Config:
        return replace(given, keys=replace(given.keys, store=KeyStoreAddress(Path("/nonexistent/keys.db"))))

    with pytest.raises(KeyFileError, match="/nonexistent"):
        await start_edge(ROUTES.replace("{upstream}", "http://127.0.0.1:1"), adapt=elsewhere)


async def test_descriptor_limit_is_raised_and_bounds_connections(start_edge: StartEdge) -> None:
    """Every stream holds two descriptors, so just under half of the limit; the last are for operators."""
    import resource

    edge = await start_edge(ROUTES.replace("{upstream}", "http://127.0.0.1:1"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == hard - 32
    assert hard / 2 - 100 < edge.server.clients.max_connections < hard / 2


@pytest.mark.parametrize(("hard", "left", "clients"), [(256, 240, 87), (1024, 992, 463), (4096, 4064, 1999)])
async def test_small_descriptor_limit_goes_to_clients_mostly(
    start_edge: StartEdge, monkeypatch: pytest.MonkeyPatch, hard: int, left: int, clients: int
) -> None:
    """At 256 their streams, 32 that are being refused and the 23 that a process has by itself fit into the 240."""
    edge = await start_edge(ROUTES.replace("{upstream}", "http://127.0.0.1:1"))
    with monkeypatch.context() as limited:
        limited.setattr("resource.getrlimit", lambda _: (hard, hard))
        limited.setattr("resource.setrlimit", lambda _, limits: None)
        edge.server._descriptors = raise_descriptor_limit()
    assert edge.server._descriptors == left
    assert edge.server._most_connections(ServerConfig()) == clients


async def test_part_that_fails_begins_again_and_ends_nothing_else(
    start_edge: StartEdge, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("edge.tasks._RESTART_PAUSE_S", 0.0)
    failed = asyncio.Event()

    async def drain_once(self: Server) -> None:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("a defect")
        await asyncio.Event().wait()

    monkeypatch.setattr(Server, "_keep_journal", drain_once)
    edge = await start_edge(ROUTES.replace("{upstream}", simulator.url))
    await failed.wait()
    assert (await edge.ask({"model": "public/deepseek-r1", "messages": []}))[0] == 200
    assert "journal failed, and begins again" in caplog.text
