"""What keys used, asked of an index that follows the journal."""

import asyncio
import sqlite3
from pathlib import Path

import pytest

from edge.errors import Unusable
from edge.exchange import Principal, Usage, UsageSource
from edge.journal.index import NAME, SUMS, DaySums, UsageIndex
from edge.journal.journal import Journal
from tests.records import STARTED_AT, close, ends_of, journal_files, opened

DAY = "2025-11-13"
DAYS = "2025-01-01", "2026-01-01"
USED = Usage(100, 20, 5, 3, 2, UsageSource.ESTIMATED, "seconds")


def record(journal: Journal, count: int = 1, key_id: str = "key_1", **facts: object) -> None:
    for _ in range(count):
        close(journal, opened(journal, principal=Principal(key_id, "u-a"), **facts), usage=USED)
    journal.drain()


def sums(**given: int) -> tuple[int, ...]:
    return tuple(given.get(name, 0) for name in SUMS)


def of(count: int) -> tuple[int, ...]:
    return sums(
        requests=count, prompt_tokens=100 * count, completion_tokens=20 * count, cached_tokens=5 * count,
        reasoning_tokens=3 * count, seconds=2 * count, estimated=count,
    )  # fmt: skip


def test_sums_follow_what_is_written_and_count_nothing_twice(tmp_path: Path) -> None:
    """Also over a new file, by another process's index, and with a line that is half written."""
    journal = Journal(tmp_path, 2000, "serve")
    index, other = UsageIndex(tmp_path), UsageIndex(tmp_path)
    for number in range(1, 5):
        record(journal, 3)
        (index if number % 2 else other).catch_up()
        assert index.read("key_1", *DAYS) == [DaySums(DAY, "public/deepseek-r1", of(3 * number))]
    assert len(journal_files(tmp_path)) > 1
    assert len(ends_of(tmp_path)) == 12
    last = journal_files(tmp_path)[-1]
    with last.open("ab") as file:
        file.write(b'{"v":1,"id":"half","ti')
    index.catch_up()
    index.catch_up()
    assert index.read("key_1", *DAYS)[0].sums == of(12)
    assert index.as_of > 0
    journal.close()


def test_each_key_day_and_model_has_sums_of_its_own(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 2**20, "serve")
    record(journal)
    record(journal, key_id="key_2")
    record(journal, model="public/b")
    record(journal, started_at=STARTED_AT + 86_400)
    index = UsageIndex(tmp_path)
    index.catch_up()
    found = [(each.day, each.model, each.sums[0]) for each in index.read("key_1", *DAYS)]
    assert found == [(DAY, "public/b", 1), (DAY, "public/deepseek-r1", 1), ("2025-11-14", "public/deepseek-r1", 1)]
    assert len(index.read("key_1", "2025-11-14", "2025-11-14")) == 1
    assert index.read("key_3", *DAYS) == []
    journal.close()


def test_sums_outlive_files_that_are_taken_away_and_an_index_that_is_gone_is_made_anew(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 2000, "serve")
    for _ in range(4):
        record(journal, 3)
    index = UsageIndex(tmp_path)
    index.catch_up()
    journal_files(tmp_path)[0].unlink()
    index.catch_up()
    assert index.read("key_1", *DAYS)[0].sums == of(12)
    for path in tmp_path.glob(f"{NAME}*"):
        path.unlink()
    index.catch_up()
    assert 0 < index.read("key_1", *DAYS)[0].sums[0] < 12
    journal.close()


async def test_who_asks_gets_what_is_known_by_then(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 2**20, "serve")
    index = UsageIndex(tmp_path)
    record(journal, 2)
    answers = await asyncio.gather(*(index.sums_of("key_1", *DAYS) for _ in range(3)))
    assert [each[0].sums for each in answers] == [of(2)] * 3
    await index.close()
    journal.close()


@pytest.mark.parametrize("content", [b"no database" * 100, None])
def test_index_that_cannot_be_used_says_to_remove_it(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / NAME
    if content is not None:
        path.write_bytes(content)
    else:
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA user_version = 9")
        connection.close()
    with pytest.raises(Unusable, match="remove it"):
        UsageIndex(tmp_path).catch_up()
