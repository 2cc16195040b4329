"""Records that are delivered again, and records that a sink refuses."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from aiohttp import web

from edge.__main__ import main
from edge.journal import shipping
from edge.journal.files import refused_path
from edge.journal.journal import Journal
from edge.journal.replaying import replay
from edge.journal.shipping import Shipper
from edge.journal.sinks.protocol import SinkRefused, SinkUnavailable
from tests.journal.test_shipping import PATIENCE_S, MemorySink
from tests.records import STARTED_AT, close, crash, opened


class Picky(MemorySink):
    """Refuses a batch with a record of `bad`."""

    def __init__(self, *bad: str) -> None:
        super().__init__()
        self.bad = bad

    async def deliver(self, lines: Sequence[bytes]) -> None:
        if any(json.loads(line)["model"] in self.bad for line in lines):
            raise SinkRefused("status 400")
        await super().deliver(lines)


def record(journal: Journal, *models: str) -> None:
    for number, model in enumerate(models):
        close(journal, opened(journal, model=model, started_at=STARTED_AT + number))
    journal.drain()


async def test_what_a_sink_refuses_is_set_aside_and_holds_up_no_other(tmp_path: Path) -> None:
    """It stays in the journal too, and the file of what is refused is not added up."""
    journal, sink = Journal(tmp_path, 2**20, "serve", ships=True), Picky("bad", "worse")
    record(journal, "a", "bad", "b", "c", "worse", "d")
    shipper = Shipper(tmp_path, journal.token, journal.adopted.locks, sink)
    await shipper.flush(PATIENCE_S)
    assert [json.loads(line)["model"] for batch in sink.batches for line in batch] == ["a", "b", "c", "d"]
    aside = refused_path(tmp_path, journal.token).read_bytes().splitlines()
    assert [json.loads(line)["model"] for line in aside] == ["bad", "worse"]
    assert (shipper.shipped, shipper.refused, shipper.lag_bytes, shipper.outage.reason) == (4, 2, 0, "")
    journal.close()


async def test_many_that_are_refused_first_hold_up_none_behind_them(tmp_path: Path) -> None:
    journal, sink = Journal(tmp_path, 2**20, "serve", ships=True), Picky("bad")
    record(journal, *["bad"] * 40, "a", "b")
    shipper = Shipper(tmp_path, journal.token, journal.adopted.locks, sink)
    await shipper.flush(PATIENCE_S)
    assert sorted(json.loads(line)["model"] for batch in sink.batches for line in batch) == ["a", "b"]
    assert (shipper.shipped, shipper.refused, shipper.lag_bytes, shipper.outage.reason) == (2, 40, 0, "")
    journal.close()


async def test_sink_that_refuses_everything_is_down_and_nothing_is_set_aside(tmp_path: Path) -> None:
    journal, sink = Journal(tmp_path, 2**20, "serve", ships=True), Picky("a", "b")
    record(journal, "a", "b")
    shipper = Shipper(tmp_path, journal.token, journal.adopted.locks, sink)
    await shipper.flush(0.1)
    assert (shipper.shipped, shipper.refused) == (0, 0)
    assert "refuses every record" in shipper.outage.reason
    assert not refused_path(tmp_path, journal.token).exists()
    sink.bad = ()
    await shipper.flush(PATIENCE_S)
    assert shipper.shipped == 2
    journal.close()


@pytest.mark.parametrize("count", [1, 40])
async def test_what_is_refused_whole_is_set_aside_once_the_sink_takes_others(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of a process that is gone: nothing follows that the sink would take, and it waited for ever."""
    monkeypatch.setattr(shipping, "pause_s", lambda failures, chance: 0.0)
    first = Journal(tmp_path, 2**20, "serve", ships=True)
    record(first, *["bad"] * count)
    crash(first)
    journal, sink = Journal(tmp_path, 2**20, "serve", ships=True), Picky("bad")
    shipper = Shipper(tmp_path, journal.token, journal.adopted.locks, sink)
    await shipper.flush(0.1)
    assert (shipper.shipped, shipper.refused) == (0, 0)
    record(journal, "a")
    await shipper.flush(PATIENCE_S)
    assert (shipper.shipped, shipper.refused, shipper.lag_bytes, shipper.outage.reason) == (1, count, 0, "")
    assert len(refused_path(tmp_path, first.token).read_bytes().splitlines()) == count
    journal.close()


async def test_what_began_from_a_time_on_is_delivered_again_as_it_stands(tmp_path: Path) -> None:
    journal, sink = Journal(tmp_path, 2**20, "serve"), Picky("c")
    record(journal, "a", "b", "c", "d")
    opened(journal)
    journal.drain()
    assert await replay(tmp_path, sink, "2025-11-13T02:13:21.250Z", "~") == (2, 1)
    assert [json.loads(line)["model"] for batch in sink.batches for line in batch] == ["b", "d"]
    sink.fault = SinkUnavailable("down")
    with pytest.raises(SinkUnavailable):
        await replay(tmp_path, sink, "", "~")
    journal.close()


async def test_command_delivers_again_and_says_how_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import asyncio

    got: list[str] = []

    async def take(request: web.BaseRequest) -> web.Response:
        got.extend(each["id"] for each in (await request.json())["records"])
        return web.Response(status=204)

    runner = web.ServerRunner(web.Server(take))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        journal = Journal(tmp_path / "usage", 2**20, "serve")
        record(journal, "a", "b")
        journal.close()
        config = tmp_path / "routes.toml"
        sink = f"http://127.0.0.1:{runner.addresses[0][1]}/"
        config.write_text(
            f'[usage]\nsink = "{sink}"\n[pools.p]\nendpoints = ["http://127.0.0.1:1"]\n[routes.a]\npool = "p"\n'
        )
        arguments = ["usage", "replay", "--since", "2025-11-13", "--config", str(config)]
        assert await asyncio.to_thread(main, arguments) == 0
        assert "2 records delivered, 0 refused" in capsys.readouterr().out
        assert len(got) == 2
    finally:
        await runner.cleanup()
