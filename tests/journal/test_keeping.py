"""What the journal keeps: what is not delivered for ever, what is as long as it should."""

import asyncio
import os
from pathlib import Path

import pytest

from edge.journal.files import position_path
from edge.journal.index import UsageIndex
from edge.journal.journal import Journal
from edge.journal.keeping import delete_shipped
from edge.journal.shipping import Shipper
from edge.journal.spent import SpentIndex
from tests.journal.test_shipping import PATIENCE_S, MemorySink
from tests.records import STARTED_AT, close, journal_files, opened

DAYS = "2025-01-01", "2026-01-01"


async def written(directory: Path, *, ships: bool = True, delivers: bool = True) -> Journal:
    """A process that wrote three files or more, and has ended."""
    journal = Journal(directory, 2000, "serve", ships=ships, leaves_notes=True)
    for _ in range(4):
        for _ in range(3):
            close(journal, opened(journal))
        journal.drain()
    if delivers:
        await Shipper(directory, journal.token, journal.adopted.locks, MemorySink(), keep_s=60).flush(PATIENCE_S)
    return journal


def age(directory: Path) -> None:
    for path in journal_files(directory):
        os.utime(path, (STARTED_AT, STARTED_AT))


async def test_only_what_is_old_and_delivered_is_deleted(tmp_path: Path) -> None:
    """Of a process that runs, all but its last file; of one that has ended, all."""
    usage = UsageIndex(tmp_path)
    usage.catch_up()
    running = await written(tmp_path)
    before = len(journal_files(tmp_path))
    assert before > 2
    assert delete_shipped(tmp_path, 60, STARTED_AT) == 0, "they are not old yet"
    age(tmp_path)
    assert delete_shipped(tmp_path, 60, STARTED_AT + 61) == before - 1
    [left] = journal_files(tmp_path)
    running.close()
    assert position_path(tmp_path, running.token).exists()
    os.utime(left, (STARTED_AT, STARTED_AT))
    assert delete_shipped(tmp_path, 60, STARTED_AT + 61) == 1
    assert journal_files(tmp_path) == []
    assert not position_path(tmp_path, running.token).exists()
    [sums] = usage.read("key_1", *DAYS)
    assert sums.sums[0] == 12, "the index has what was in them"


async def test_what_no_sink_ever_had_stays(tmp_path: Path) -> None:
    for number, (ships, delivers) in enumerate(((False, False), (True, False))):
        directory = tmp_path / str(number)
        journal = await written(directory, ships=ships, delivers=delivers)
        journal.close()
        age(directory)
        before = journal_files(directory)
        assert delete_shipped(directory, 0, STARTED_AT + 1e9) == 0
        assert journal_files(directory) == before


async def test_records_are_delivered_while_nothing_can_be_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file of another's, or a directory in its place, is no reason to keep records from the sink."""
    done = await written(tmp_path)
    done.close()
    age(tmp_path)
    old = journal_files(tmp_path)
    old[0].unlink()
    old[0].mkdir()
    os.utime(old[0], (STARTED_AT, STARTED_AT))
    journal = await written(tmp_path, delivers=False)
    sink = MemorySink()
    shipper = Shipper(tmp_path, journal.token, [], sink, clock=lambda: STARTED_AT + 61, keep_s=60)
    running = asyncio.get_running_loop().create_task(shipper.run())
    try:
        await sink.until(lambda: len(sink.ids) == 12)
        assert not running.done()
    finally:
        running.cancel()
    assert "cannot be deleted" in caplog.text


async def test_days_and_months_have_what_was_in_files_before_they_go(tmp_path: Path) -> None:
    spent = SpentIndex(tmp_path, lambda: STARTED_AT)
    spent.catch_up()
    journal = await written(tmp_path)
    journal.close()
    age(tmp_path)
    assert delete_shipped(tmp_path, 60, STARTED_AT + 61) > 2
    assert journal_files(tmp_path) == []
    spent.catch_up()
    assert sum(requests for *_, requests, _ in spent.read(0, STARTED_AT + 1e6, "")) == 12


async def test_nothing_is_deleted_while_another_process_builds_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may not have come to the oldest files yet."""
    journal = await written(tmp_path)
    journal.close()
    age(tmp_path)
    before = journal_files(tmp_path)
    usage = UsageIndex(tmp_path)
    assert usage.read("key_1", *DAYS) == []
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(UsageIndex, "_commit", lambda *args: False)
        assert delete_shipped(tmp_path, 60, STARTED_AT + 61) == 0
    assert journal_files(tmp_path) == before
    assert delete_shipped(tmp_path, 60, STARTED_AT + 61) == len(before)
    [sums] = usage.read("key_1", *DAYS)
    assert sums.sums[0] == 12
