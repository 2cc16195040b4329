"""A usage record is kept whatever ends the process, and whatever the disk does."""

import errno
import json
import logging
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.config.process_settings import WhenFull
from edge.errors import Unusable
from edge.exchange import End, Usage, UsageSource
from edge.journal import journal as module
from edge.journal import rotating
from edge.journal.files import Position, load_position, save_position
from edge.journal.journal import Journal, JournalFull
from tests.journal.conftest import MEGABYTE, FaultyDisk
from tests.profiles import examples
from tests.records import close, crash, ends_of, journal_files, lines_of, opened, write

OPEN_FIELDS = ["v", "id", "time", "request_id", "key_id", "user", "route", "path", "model", "region", "stream"]


# --- records


def test_record_is_a_line_when_it_opens_and_a_whole_one_when_it_ends(
    tmp_path: Path, start: Callable[..., Journal]
) -> None:
    journal = start()
    exchange = opened(journal)
    journal.drain()
    [begun] = lines_of(tmp_path)
    assert list(begun) == OPEN_FIELDS
    close(journal, exchange, retries=1)
    journal.drain()
    _, closed = lines_of(tmp_path)
    assert closed == {
        "v": 2, "id": exchange.id, "time": "2025-11-13T02:13:20.250Z", "request_id": "req_1", "key_id": "key_1",
        "user": "u-a", "route": "public/deepseek-r1", "path": "/v1/completions", "model": "public/deepseek-r1",
        "region": None, "upstream_model": "r1", "endpoint": "10.0.0.1:8000", "stream": True, "status": 200,
        "end": "complete",
        "prompt_tokens": 11, "completion_tokens": 7, "cached_tokens": 3, "cache_creation_tokens": 0,
        "reasoning_tokens": 2, "units": 0, "unit": None, "usage_source": "final",
        "ttft_ms": 123.4, "duration_ms": 2500.0, "retries": 1,
    }  # fmt: skip
    assert begun == {name: closed[name] for name in OPEN_FIELDS}
    assert (journal.records_open, journal.records_closed, journal.lines_waiting) == (1, 1, 0)


def test_what_is_not_known_is_null(tmp_path: Path, start: Callable[..., Journal]) -> None:
    journal = start()
    exchange = opened(journal, principal=None, model="", route="")
    close(journal, exchange, endpoint="", upstream_model="", first_byte=0.0)
    journal.drain()
    [record] = ends_of(tmp_path).values()
    nulls = ["key_id", "user", "route", "model", "region", "upstream_model", "endpoint", "unit", "ttft_ms"]
    assert [name for name, value in record.items() if value is None] == nulls


@pytest.mark.parametrize(
    ("end", "source"), [*((end, UsageSource.FINAL) for end in End), *((End.COMPLETE, source) for source in UsageSource)]
)
def test_every_end_and_source_has_its_word(
    tmp_path: Path, start: Callable[..., Journal], end: End, source: UsageSource
) -> None:
    journal = start()
    close(journal, opened(journal), end=end, usage=Usage(11, source=source))
    journal.drain()
    [record] = ends_of(tmp_path).values()
    assert (record["end"], record["usage_source"]) == (end.value, source.value)


@examples(50)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(0, 4e9))
def test_any_text_is_one_line(tmp_path_factory: pytest.TempPathFactory, text: str, at: float) -> None:
    directory = tmp_path_factory.mktemp("usage")
    journal = Journal(directory, MEGABYTE, "serve")
    exchange = write(journal, model=text, path=text, started_at=at)
    journal.close()
    record = ends_of(directory)[exchange.id]
    assert (record["model"], record["path"], len(record["time"])) == (text or None, text, 24)
    assert len(lines_of(directory)) == 2
    shutil.rmtree(directory)


def test_ids_are_unique_over_processes_and_name_their_file(tmp_path: Path, start: Callable[..., Journal]) -> None:
    journals = [start() for _ in range(3)]
    ids = [write(journal).id for journal in journals for _ in range(10)]
    assert len(set(ids)) == 30
    assert set(ends_of(tmp_path)) == set(ids)
    for path in journal_files(tmp_path):
        token = path.name.split(".")[0]
        assert all(json.loads(line)["id"].startswith(token) for line in path.read_bytes().splitlines())


# --- files


def test_full_file_is_followed_by_another(tmp_path: Path, start: Callable[..., Journal]) -> None:
    journal = start(rotate_bytes=2000)
    ids = {write(journal).id for _ in range(20)}
    files = journal_files(tmp_path)
    assert len(files) > 3
    assert [path.name for path in files] == [f"{journal.token}.{n:04d}.jsonl" for n in range(1, len(files) + 1)]
    assert all(2000 <= path.stat().st_size < 3000 for path in files[:-1])
    assert set(ends_of(tmp_path)) == ids


def test_new_utc_day_begins_a_new_file(tmp_path: Path, start: Callable[..., Journal]) -> None:
    now = 1_763_078_399.0  # 2025-11-13T23:59:59Z
    journal = start(clock=lambda: now)
    assert journal.token.startswith("20251113T235959Z-")
    write(journal)
    now += 0.999
    write(journal)
    assert len(journal_files(tmp_path)) == 1
    for _ in range(2):  # in two days, the second of which has two records
        now += 86_399
        write(journal)
        now += 1
        write(journal)
    assert [len(path.read_bytes().splitlines()) for path in journal_files(tmp_path)] == [4, 4, 4]


def test_each_file_begins_with_the_requests_that_run(tmp_path: Path, start: Callable[..., Journal]) -> None:
    """So the last file alone says what a crash left, and older ones may be taken away."""
    journal = start(rotate_bytes=1000)
    running = [opened(journal, request_id=f"req_{number}") for number in range(5)]
    journal.drain()
    finished = {write(journal).id for _ in range(20)}
    *older, last = journal_files(tmp_path)
    assert len(older) > 3
    left = {json.loads(line)["id"] for line in last.read_bytes().splitlines()} - finished
    assert left == {exchange.id for exchange in running}
    close(journal, running[0])
    crash(journal)
    for path in older:
        path.unlink()
    start()
    ends = {each: record["end"] for each, record in ends_of(tmp_path).items() if each not in finished}
    assert ends == {running[0].id: "complete"} | {each.id: "crashed" for each in running[1:]}


def test_size_of_running_requests_alone_does_not_rotate(tmp_path: Path, start: Callable[..., Journal]) -> None:
    journal = start(rotate_bytes=1000)
    for _ in range(50):
        opened(journal)
    journal.drain()
    before = len(journal_files(tmp_path))
    write(journal)
    assert len(journal_files(tmp_path)) <= before + 1


def test_file_that_cannot_begin_leaves_no_draft(
    tmp_path: Path, start: Callable[..., Journal], disk: FaultyDisk
) -> None:
    journal = start()
    running = opened(journal)
    journal._file._rotate_at = 0
    disk.room = 100  # less than the lines it begins with
    exchange = write(journal)
    assert journal.write_errors == 1
    assert {path.suffix for path in tmp_path.iterdir()} == {".jsonl", ".lock", ".buffer"}
    assert len(journal_files(tmp_path)) == 1
    disk.room = None
    journal.retry()
    close(journal, running)
    journal.drain()
    assert exchange.id in ends_of(tmp_path)
    assert len(journal_files(tmp_path)) == 2


@pytest.mark.parametrize("step", ["open", "write", "rename"])
def test_file_that_cannot_begin_keeps_the_lines_of_the_one_before(
    tmp_path: Path, start: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Whichever step fails, what was on its way is written where it belongs, once; also by the next start."""
    ids = []
    for crashes in (False, True):
        journal = start()
        ids.append(write(journal).id)
        exchange = opened(journal)
        close(journal, exchange)
        ids.append(exchange.id)
        journal._file._rotate_at = 0

        def fail(*arguments: object, **options: object) -> int:
            raise OSError(errno.EMFILE, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(Path if step == "rename" else os, step, fail)
            journal.drain()
        assert journal.outage.reason == "Too many open files"
        if crashes:
            crash(journal)
            start()
        else:
            journal.retry()
            assert len(journal_files(tmp_path)) == 2
    assert set(ends_of(tmp_path)) == set(ids)


# --- a disk that is full, or broken


def small_disk(directory: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    return shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, for whoever may mount one."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if not small_disk(directory):
        pytest.skip("only root may mount a tmpfs; the same is tested with faults put in")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


def test_start_on_a_real_full_disk_serves_and_writes_when_there_is_room(
    full_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    usage, ballast = full_disk / "usage", full_disk / "ballast"
    ballast.write_bytes(bytes(MEGABYTE - 3 * 4096))
    with pytest.raises(Unusable, match="No space left"):
        Journal(usage, MEGABYTE, "refuse")
    journal = Journal(usage, MEGABYTE, "serve")
    done, running = opened(journal), opened(journal)
    close(journal, done)
    journal.drain()
    journal.sync()
    journal.retry()
    assert (journal.outage.reason, journal.lines_waiting) == ("No space left on device", 3)
    assert (
        {each.name: each.value for metric in journal.metrics() for each in metric.samples}[
            "edge_usage_write_errors_total"
        ]
        == journal.write_errors
        > 1
    )
    assert list(usage.iterdir()) == []
    ballast.unlink()
    journal.retry()
    journal.retry()
    assert (journal.outage.reason, journal.lines_waiting) == ("", 0)
    assert len([each for each in caplog.records if each.name == "edge.journal.journal"]) == 2
    crash(journal)
    Journal(usage, MEGABYTE, "serve").close()
    assert {each: record["end"] for each, record in ends_of(usage).items()} == {
        done.id: "complete",
        running.id: "crashed",
    }


@pytest.mark.parametrize("fault", [errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_start_without_the_right_to_write_serves_and_what_is_lost_at_the_end_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: int
) -> None:
    """As it is where another user made the directory, or the disk was mounted to be read only."""

    def refuse(*arguments: object, **options: object) -> int:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(os, "open", refuse)
    journal = Journal(tmp_path / "usage", MEGABYTE, "serve", ships=True)
    close(journal, opened(journal))
    journal.sync()
    journal.retry()
    assert journal.outage.reason == os.strerror(fault)
    journal.close()
    assert "2 lines could not be written and are lost" in caplog.text
    assert list((tmp_path / "usage").iterdir()) == []


@pytest.mark.parametrize("when_full", ["serve", "refuse"])
def test_real_full_disk_loses_no_record_and_tears_no_line(full_disk: Path, when_full: WhenFull) -> None:
    usage = full_disk / "usage"
    journal = Journal(usage, 64 * MEGABYTE, when_full)
    ballast = full_disk / "ballast"
    ballast.write_bytes(b"x" * 700_000)
    done, running, refused = [], [], 0
    for number in range(1000):
        try:
            running.append(opened(journal, request_id=f"req_{number}"))
        except JournalFull:
            refused += 1
            continue
        if number % 3:
            done.append(running.pop(0))
            close(journal, done[-1])
    assert journal.write_errors > 0
    assert (refused > 0) == (when_full == "refuse")
    [path] = journal_files(usage)
    assert path.read_bytes().endswith(b"}\n")
    waited = journal.lines_waiting
    journal.retry()
    assert journal.lines_waiting == waited
    ballast.unlink()
    journal.retry()
    assert journal.lines_waiting == 0
    for exchange in running:
        close(journal, exchange)
    journal.close()
    records = ends_of(usage)
    assert set(records) == {each.id for each in (*done, *running)}
    assert len(records) == 1000 - refused
    opens = [line["id"] for line in lines_of(usage) if "end" not in line]
    assert len(opens) == len(set(opens)) == len(records)
    assert [each for each in usage.iterdir() if each.suffix != ".jsonl"] == []


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_lines_wait_in_order_while_the_disk_is_bad(
    tmp_path: Path,
    start: Callable[..., Journal],
    disk: FaultyDisk,
    fault: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One log line when it begins and one when it ends, however many requests there are."""
    monkeypatch.setattr(rotating, "BUFFER_BYTES", 1000)
    journal = start()
    written = write(journal)
    disk.fault = fault
    tried = disk.writes
    waiting = [write(journal) for _ in range(50)]
    journal.retry()
    assert disk.writes == tried + 2  # the first that failed, and the retry
    assert (journal.lines_waiting, journal.write_errors) == (98, 2)  # two are in the buffer
    assert journal.outage.reason == os.strerror(fault)
    disk.fault = None
    more = write(journal)  # behind those that wait
    assert journal.lines_waiting == 100
    journal.retry()
    journal.retry()
    journal.retry()
    assert (journal.lines_waiting, journal.outage.reason) == (0, "")
    ids = [line["id"] for line in lines_of(tmp_path)]
    assert ids == [each.id for each in (written, *waiting, more) for _ in range(2)]
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]


@pytest.mark.parametrize("room", [1, 100, 249, 400])
def test_line_without_room_is_undone(
    tmp_path: Path, start: Callable[..., Journal], disk: FaultyDisk, room: int
) -> None:
    journal = start()
    first = write(journal)
    size = journal_files(tmp_path)[0].stat().st_size
    disk.room = room
    second = write(journal)
    content = journal_files(tmp_path)[0].read_bytes()
    assert content.endswith(b"}\n")
    assert len(content) >= size
    disk.room = None
    journal.retry()
    assert list(ends_of(tmp_path)) == [first.id, second.id]


def test_lines_that_wait_are_written_as_far_as_there_is_room(
    tmp_path: Path, start: Callable[..., Journal], disk: FaultyDisk
) -> None:
    """A line that stands is never taken back: it may have been read and delivered."""
    journal = start()
    disk.room = 0
    exchanges = [write(journal) for _ in range(100)]
    stood = b""
    for room in (1000, 1, 5000, 20_000, 100_000):
        disk.room = room
        journal.retry()
        content = journal_files(tmp_path)[0].read_bytes()
        assert content.startswith(stood)
        assert content.endswith(b"}\n")
        stood = content
    assert list(ends_of(tmp_path)) == [exchange.id for exchange in exchanges]


def test_torn_line_that_cannot_be_undone_is_undone_before_the_next(
    tmp_path: Path, start: Callable[..., Journal], disk: FaultyDisk
) -> None:
    journal = start()
    disk.room, disk.truncate_fault = 300, errno.EIO
    first = write(journal)
    assert not journal_files(tmp_path)[0].read_bytes().endswith(b"\n")
    disk.room = None
    journal.retry()
    assert not journal_files(tmp_path)[0].read_bytes().endswith(b"\n")
    disk.truncate_fault = None
    journal.retry()
    assert list(ends_of(tmp_path)) == [first.id]
    assert len(lines_of(tmp_path)) == 2


def test_request_that_cannot_be_recorded_is_refused_where_that_is_wanted(
    tmp_path: Path, start: Callable[..., Journal], disk: FaultyDisk, caplog: pytest.LogCaptureFixture
) -> None:
    journal = start(when_full="refuse")
    running = opened(journal)
    disk.fault = errno.ENOSPC
    journal.drain()
    for _ in range(3):
        with pytest.raises(JournalFull, match="No space left"):
            opened(journal)
    close(journal, running)  # it was served: its end waits
    assert (journal.records_open, journal.records_closed) == (1, 1)
    disk.fault = None
    with pytest.raises(JournalFull):  # behind the end that waits there may still be no room
        opened(journal)
    journal.retry()
    later = opened(journal)
    close(journal, later)
    journal.drain()
    assert list(ends_of(tmp_path)) == [running.id, later.id]
    journal.retry()
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]
    assert "new requests are refused" in caplog.text


def test_memory_for_lines_is_bounded_and_past_it_requests_are_refused(
    tmp_path: Path, start: Callable[..., Journal], disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An end has always room: there is one for each request that was let in."""
    monkeypatch.setattr(module, "_MAX_WAITING", 10)
    monkeypatch.setattr(rotating, "BUFFER_BYTES", 600)  # two first lines
    journal = start()
    disk.fault = errno.ENOSPC
    running = [opened(journal) for _ in range(12)]
    with pytest.raises(JournalFull):
        opened(journal)
    for exchange in running:
        close(journal, exchange)
    assert journal.lines_waiting == 22
    disk.fault = None
    journal.retry()
    assert len(ends_of(tmp_path)) == 12


def test_retry_writes_no_more_at_once_than_the_loop_can_bear(
    start: Callable[..., Journal], disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RETRY_WRITES", 2)
    monkeypatch.setattr(rotating, "BUFFER_BYTES", 800)  # two lines, one of each kind
    journal = start()
    disk.fault = errno.ENOSPC
    for _ in range(10):
        write(journal)
    disk.fault = None
    assert journal.lines_waiting == 18
    for left in (14, 10, 6):
        journal.retry()
        assert journal.lines_waiting == left
    journal.close()
    assert journal.lines_waiting == 0


def test_end_that_waits_in_memory_is_found_open_after_a_crash(
    tmp_path: Path, start: Callable[..., Journal], disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even when a new file was begun meanwhile: the first line is carried over until the last one stands."""
    monkeypatch.setattr(rotating, "BUFFER_BYTES", 600)
    journal = start(rotate_bytes=600)
    running = [opened(journal), opened(journal)]
    journal.drain()
    disk.room = 0
    for exchange in running:
        close(journal, exchange)  # the first into the buffer
    opened(journal)
    assert journal.lines_waiting == 2
    disk.room = 1000  # enough for the next file's beginning, not for what waits
    journal._file._rotate()
    crash(journal)
    disk.room = None
    assert start().adopted.recovered == 2
    assert [record["end"] for _, record in sorted(ends_of(tmp_path).items())] == ["complete", "crashed", "crashed"]


def test_lines_that_are_lost_at_the_end_are_told_and_their_requests_are_ended_later(
    tmp_path: Path,
    start: Callable[..., Journal],
    disk: FaultyDisk,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those in the buffer are not lost: the next start finds them."""
    monkeypatch.setattr(rotating, "BUFFER_BYTES", 600)
    journal = start()
    running = [opened(journal), opened(journal)]
    journal.drain()
    disk.fault = errno.EIO
    for exchange in running:
        close(journal, exchange)
    journal.close()
    assert "1 lines could not be written and are lost" in caplog.text
    disk.fault = None
    assert start().adopted.recovered == 1
    assert [record["end"] for _, record in sorted(ends_of(tmp_path).items())] == ["complete", "crashed"]


# --- sync


def test_sync_beside_writes_and_new_files_harms_nothing(tmp_path: Path, start: Callable[..., Journal]) -> None:
    journal = start(rotate_bytes=1000)
    descriptors = len(os.listdir("/proc/self/fd"))
    ended_writing = threading.Event()

    def sync() -> None:
        while not ended_writing.is_set():
            journal.sync()

    thread = threading.Thread(target=sync)
    thread.start()
    ids = {write(journal).id for _ in range(1000)}
    ended_writing.set()
    thread.join()
    journal.sync()
    assert not journal.sync_outage
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert set(ends_of(tmp_path)) == ids


def test_sync_reaches_every_file_that_was_written(
    tmp_path: Path, start: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And asks nothing of the disk when nothing was."""
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    journal = start(rotate_bytes=1000)
    while len(journal_files(tmp_path)) < 3:
        write(journal)
    synced.clear()
    journal.sync()
    assert sorted(synced) == sorted(map(str, (tmp_path, *journal_files(tmp_path))))
    journal.sync()
    assert len(synced) == 4


@pytest.mark.parametrize("when_full", ["serve", "refuse"])
def test_disk_that_keeps_nothing_is_told_and_stops_who_must_not_lose(
    start: Callable[..., Journal], disk: FaultyDisk, when_full: WhenFull, caplog: pytest.LogCaptureFixture
) -> None:
    journal = start(when_full=when_full)
    write(journal)
    disk.sync_fault = errno.EIO
    journal.sync()
    journal.sync()
    if when_full == "refuse":
        with pytest.raises(JournalFull):
            opened(journal)
    else:
        write(journal)
        assert journal.lines_waiting == 0
    disk.sync_fault = None
    journal.sync()
    write(journal)
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]


def test_file_that_was_removed_is_replaced(
    tmp_path: Path, start: Callable[..., Journal], caplog: pytest.LogCaptureFixture
) -> None:
    journal = start()
    running = opened(journal)
    journal_files(tmp_path)[0].unlink()
    journal.sync()
    assert "was removed" in caplog.text
    close(journal, running)
    journal.drain()
    assert list(ends_of(tmp_path)) == [running.id]


def test_file_that_was_removed_is_told_once_until_there_is_another(
    tmp_path: Path, start: Callable[..., Journal], caplog: pytest.LogCaptureFixture
) -> None:
    """Without traffic nothing begins the next file, and every second would have its line."""
    journal = start()
    for told in (1, 2):
        write(journal)
        journal.drain()
        for file in journal_files(tmp_path):
            file.unlink()
        journal.sync()
        journal.sync()
        assert caplog.text.count("was removed") == told


# --- start and end


def test_end_without_a_sink_leaves_only_records(tmp_path: Path, start: Callable[..., Journal]) -> None:
    journal, idle = start(), start()
    write(journal)
    journal.close()
    idle.close()
    assert [path.name for path in tmp_path.iterdir()] == [f"{journal.token}.0001.jsonl"]


def test_adopted_token_without_a_sink_is_done_with(tmp_path: Path, start: Callable[..., Journal]) -> None:
    first, idle = start(), start()
    write(first)
    crash(first)
    crash(idle)
    second = start()
    assert second.adopted.locks == []
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{first.token}.0001.jsonl",
        f"{second.token}.0001.jsonl", f"{second.token}.lock", f"{second.token}.buffer",
    }  # fmt: skip


def test_records_that_are_not_delivered_are_kept_for_the_next_start(
    tmp_path: Path, start: Callable[..., Journal]
) -> None:
    first, idle = start(ships=True), start(ships=True)
    write(first)
    first.close()
    idle.close()
    second = start(ships=True)
    assert [lock.token for lock in second.adopted.locks] == [first.token]
    assert [lock.token for lock in start(ships=True).adopted.locks] == []
    crash(second)
    third = start(ships=True)
    assert sorted(lock.token for lock in third.adopted.locks) == [first.token]


def test_records_that_are_delivered_are_done_with_at_the_end(tmp_path: Path, start: Callable[..., Journal]) -> None:
    journal = start(ships=True)
    write(journal)
    save_position(tmp_path, journal.token, Position(1, journal._file._size))
    journal.close()
    assert [path.suffix for path in tmp_path.iterdir()] == [".jsonl"]


def test_request_that_is_open_at_the_end_is_ended_by_the_next_start(
    tmp_path: Path, start: Callable[..., Journal]
) -> None:
    journal = start()
    opened(journal)
    journal.close()
    assert start().adopted.recovered == 1
    assert len(ends_of(tmp_path)) == 1


def test_delivery_begins_anew_where_a_crash_of_the_machine_took_what_was_delivered(
    tmp_path: Path, start: Callable[..., Journal]
) -> None:
    """Else the crashed ends, written where lost lines had been, would pass for delivered."""
    first = start(ships=True)
    exchange = opened(first)
    first.drain()
    size = first._file._size
    close(first, exchange)
    first.drain()
    save_position(tmp_path, first.token, Position(1, first._file._size))
    crash(first)
    os.truncate(journal_files(tmp_path)[0], size)
    start(ships=True)
    assert load_position(tmp_path, first.token) is None
    assert ends_of(tmp_path)[exchange.id]["end"] == "crashed"


def test_directory_is_made(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a" / "b", MEGABYTE, "serve")
    write(journal)
    journal.close()
    assert len(ends_of(tmp_path / "a" / "b")) == 1


def test_directory_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    path = tmp_path / "usage"
    path.write_text("a file")
    with pytest.raises(Unusable, match=r"usage\.journal: records cannot be kept in .*usage .*: make it"):
        Journal(path, MEGABYTE, "serve")


def test_start_on_a_disk_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    descriptors = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(Unusable, match="Read-only"):
        Journal(tmp_path, MEGABYTE, "refuse")
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
