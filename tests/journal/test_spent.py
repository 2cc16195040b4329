"""What users and keys used, asked of an index by quarters of an hour."""

from datetime import UTC, datetime
from pathlib import Path

from edge.exchange import NO_USAGE, Principal, Usage
from edge.journal.journal import Journal
from edge.journal.spent import SpentIndex
from tests.records import STARTED_AT, close, opened

DAY_S = 86_400
MIDNIGHT = datetime(2025, 11, 13, tzinfo=UTC).timestamp()


def record(journal: Journal, at: float = STARTED_AT, key_id: str = "key_1", user: str = "u-a", count: int = 1) -> None:
    for _ in range(count):
        recorded = opened(journal, principal=Principal(key_id, user), route="r", started_at=at)
        close(journal, recorded, usage=Usage(100, 20))
    journal.drain()


def test_a_period_has_what_was_used_in_it_by_each_key_but_for_who_counts_itself(tmp_path: Path) -> None:
    mine, other = Journal(tmp_path, 2**20, "serve"), Journal(tmp_path, 2**20, "serve")
    record(mine, count=3)
    record(mine, at=MIDNIGHT - 1)
    record(mine, key_id="key_2")
    record(other, at=MIDNIGHT + DAY_S - 1, user="u-b")
    record(other, at=MIDNIGHT + DAY_S)
    index = SpentIndex(tmp_path, lambda: STARTED_AT)
    index.catch_up()
    record(mine)
    index.catch_up()
    day = MIDNIGHT, MIDNIGHT + DAY_S
    assert sorted(index.read(*day, "")) == [
        ("r", "u-a", "key_1", 4, 480), ("r", "u-a", "key_2", 1, 120), ("r", "u-b", "key_1", 1, 120),
    ]  # fmt: skip
    assert list(index.read(*day, mine.token)) == [("r", "u-b", "key_1", 1, 120)]
    half_past = 1800.0  # of India
    assert sum(each[3] for each in index.read(MIDNIGHT - half_past, MIDNIGHT + half_past, "")) == 1
    for journal in (mine, other):
        journal.close()


def test_what_is_older_than_a_month_is_neither_read_nor_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 2**20, "serve")
    now = STARTED_AT
    record(journal, at=STARTED_AT - 40 * DAY_S)
    record(journal)
    index = SpentIndex(tmp_path, lambda: now)
    index.catch_up()
    assert len(list(index.read(0, 2 * STARTED_AT, ""))) == 1
    now += 40 * DAY_S
    index.forget()
    assert list(index.read(0, 2 * STARTED_AT, "")) == []
    journal.close()


def test_request_that_asked_nobody_is_none_of_a_limit_and_one_that_a_crash_ended_is(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 2**20, "serve")
    for facts in ({"endpoint": "", "usage": NO_USAGE, "status": 503}, {}):
        close(journal, opened(journal, principal=Principal("key_1", "u-a"), route="r"), **facts)
    journal.drain()
    (file,) = tmp_path.glob("*.jsonl")
    line = file.read_bytes().splitlines()[-1]
    crashed = line.replace(b'"end":"complete"', b'"end":"crashed"').replace(b'"10.0.0.1:8000"', b"null")
    with file.open("ab") as written:
        written.write(crashed + b"\n")
    index = SpentIndex(tmp_path, lambda: STARTED_AT)
    index.catch_up()
    assert [requests for *_, requests, _ in index.read(0, 2 * STARTED_AT, "")] == [2]
    journal.close()
