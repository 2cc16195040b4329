"""Lines of every version: the previous one is read, and a newer one kept, delivered and reported."""

import json
from pathlib import Path
from typing import Any

import pytest

from edge.commands.usage import totals
from edge.exchange import Usage, UsageSource
from edge.journal.files import file_path, lock_new_token
from edge.journal.journal import Journal
from edge.journal.records import VERSION
from edge.journal.shipping import Shipper
from tests.journal.test_shipping import PATIENCE_S, MemorySink
from tests.records import STARTED_AT, close, crash, ends_of, journal_files, lines_of, opened


def left_by_a_crash(directory: Path, tmp_path: Path, **changes: Any) -> tuple[str, str]:
    """The lines of a whole record and of an open one, each with `changes`; a member that is None is taken away.

    Returns the ids of their records.
    """
    writer = Journal(tmp_path / "writer", 2**20, "serve")
    whole, running = opened(writer), opened(writer)
    close(writer, whole)
    writer.drain()
    lines = [line | changes for line in lines_of(tmp_path / "writer")]
    crash(writer)
    directory.mkdir()
    lock = lock_new_token(directory, STARTED_AT)
    content = [{name: value for name, value in line.items() if name != "v" or value is not None} for line in lines]
    file_path(directory, lock.token, 1).write_text("".join(json.dumps(line) + "\n" for line in content))
    lock.release()
    return whole.id, running.id


async def shipped_from(directory: Path) -> tuple[Journal, MemorySink]:
    journal, sink = Journal(directory, 2**20, "serve", ships=True), MemorySink()
    await Shipper(directory, journal.token, journal.adopted.locks, sink).flush(PATIENCE_S)
    journal.close()
    return journal, sink


async def test_lines_of_the_previous_version_are_ended_shipped_and_counted(tmp_path: Path) -> None:
    """They have no version. What is written of them today has one."""
    usage = tmp_path / "usage"
    whole, running = left_by_a_crash(usage, tmp_path, v=None)
    journal, sink = await shipped_from(usage)
    assert (journal.adopted.recovered, journal.adopted.bad_lines) == (1, 0)
    assert [(each["id"], each["end"], each.get("v")) for each in ends_of(usage).values()] == [
        (whole, "complete", None),
        (running, "crashed", VERSION),
    ]
    assert sink.ids == [whole, running]
    found = totals(usage, ("user",))
    assert ([(row.requests, row.prompt_tokens, row.crashed) for row in found.rows], found.unreadable) == (
        [(2, 11, 1)],
        0,
    )


async def test_lines_of_a_newer_version_are_kept_and_shipped_as_they_stand_and_not_counted(tmp_path: Path) -> None:
    """Whatever their other members are. An open one is of a request that only its own version can end."""
    usage = tmp_path / "usage"
    whole, _ = left_by_a_crash(usage, tmp_path, v=VERSION + 1, model=[7], stream="yes", prompt_tokens="many")
    [path] = journal_files(usage)
    before = path.read_bytes()
    journal, sink = await shipped_from(usage)
    assert (journal.adopted.recovered, journal.adopted.bad_lines) == (0, 1)
    assert path.read_bytes() == before
    assert sink.batches == [[line for line in before.splitlines() if b'"end"' in line]]
    assert sink.ids == [whole]
    found = totals(usage, ("user",))
    assert (found.rows, found.unreadable) == ([], 3)


@pytest.mark.parametrize("version", [VERSION + 1, 10**6])
def test_newer_version_is_not_counted_though_its_members_look_the_same(tmp_path: Path, version: int) -> None:
    """The words may, and mean something else."""
    usage = tmp_path / "usage"
    left_by_a_crash(usage, tmp_path, v=version)
    found = totals(usage, ("user",))
    assert (found.rows, found.unreadable) == ([], 3)


def test_version_is_the_first_member_of_each_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 2**20, "serve")
    close(journal, opened(journal))
    journal.close()
    [path] = journal_files(tmp_path)
    assert [line.startswith(b'{"v":2,"id":') for line in path.read_bytes().splitlines()] == [True, True]


@pytest.mark.parametrize("unit", ["images", "seconds", "characters", None])
def test_units_have_a_kind_and_cache_creation_is_told_apart(tmp_path: Path, unit: Any) -> None:
    journal = Journal(tmp_path, 2**20, "serve")
    units = 0 if unit is None else 3
    close(journal, opened(journal), usage=Usage(11, 7, 3, 2, units, UsageSource.FINAL, unit, cache_creation_tokens=4))
    journal.close()
    [record] = ends_of(tmp_path).values()
    assert (record["units"], record["unit"]) == (units, unit)
    assert (record["prompt_tokens"], record["cached_tokens"], record["cache_creation_tokens"]) == (11, 3, 4)
