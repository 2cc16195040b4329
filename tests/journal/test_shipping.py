"""Records reach the sink at least once, whenever the process or the sink stops."""

import asyncio
import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.config.process_settings import UsageConfig
from edge.journal import shipping
from edge.journal.files import Position, load_position, position_path
from edge.journal.journal import Journal
from edge.journal.shipping import Shipper, pause_s
from edge.journal.sinks.protocol import SinkUnavailable
from tests.records import STARTED_AT, close, crash, ends_of, journal_files, opened

PATIENCE_S = 20


class MemorySink:
    """Keeps what it is given; `fault` is raised before, or with `after` after it is kept."""

    def __init__(self) -> None:
        self.batches: list[list[bytes]] = []
        self.fault: Exception | None = None
        self.after = False
        self.asked = 0
        self.changed = asyncio.Event()

    async def deliver(self, lines: Sequence[bytes]) -> None:
        self.asked += 1
        self.changed.set()
        if self.fault is not None and not self.after:
            raise self.fault
        self.batches.append(list(lines))
        if self.fault is not None:
            raise self.fault

    def reconfigure(self, config: UsageConfig) -> None: ...

    async def close(self) -> None: ...

    @property
    def ids(self) -> list[str]:
        return [json.loads(line)["id"] for batch in self.batches for line in batch]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()
                await asyncio.sleep(0)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = start(tmp_path)
    yield journal
    if journal._file._descriptor >= 0:
        journal.close()


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "_POLL_INTERVAL_S", 0.001)
    monkeypatch.setattr(shipping, "_LONGEST_PAUSE_S", 0.001)


def start(directory: Path, rotate_bytes: int = 2**20) -> Journal:
    return Journal(directory, rotate_bytes, "serve", ships=True)


def write(journal: Journal, count: int = 1, **facts: Any) -> list[str]:
    ids = []
    for _ in range(count):
        exchange = opened(journal, **facts)
        close(journal, exchange)
        journal.drain()
        ids.append(exchange.id)
    return ids


def shipper_of(journal: Journal, sink: MemorySink, **options: Any) -> Shipper:
    return Shipper(journal.directory, journal.token, journal.adopted.locks, sink, **options)


async def stop(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# --- what is delivered


async def test_ends_are_delivered_in_order_as_they_stand(journal: Journal) -> None:
    running = opened(journal)
    ids = write(journal, 3)
    close(journal, running)
    journal.drain()
    sink = MemorySink()
    shipper = shipper_of(journal, sink)
    await shipper.flush(PATIENCE_S)
    assert sink.ids == [*ids, running.id]
    lines = journal_files(journal.directory)[0].read_bytes().splitlines()
    assert sink.batches == [[line for line in lines if b'"end"' in line]]
    assert (shipper.shipped, shipper.lag_bytes, shipper.lag_s, shipper.outage.reason) == (4, 0, 0.0, "")


async def test_new_records_are_noticed(journal: Journal) -> None:
    sink = MemorySink()
    shipper = shipper_of(journal, sink)
    task = asyncio.get_running_loop().create_task(shipper.run())
    for count in range(1, 4):
        write(journal)
        await sink.until(lambda count=count: len(sink.ids) == count)  # type: ignore[misc]
    await stop(task)


async def test_batches_are_bounded_and_files_followed(tmp_path: Path) -> None:
    journal = start(tmp_path, rotate_bytes=600_000)
    ids = write(journal, 2000) + write(journal, 200, model="m" * 4000)
    assert len(journal_files(tmp_path)) > 3
    sink = MemorySink()
    await shipper_of(journal, sink).flush(PATIENCE_S)
    assert sink.ids == ids
    assert max(map(len, sink.batches)) == 500
    assert max(sum(map(len, batch)) for batch in sink.batches) <= 2**20
    journal.close()


async def test_line_that_is_not_whole_is_waited_for(journal: Journal) -> None:
    sink = MemorySink()
    shipper = shipper_of(journal, sink)
    [first] = write(journal)
    line = b'{"id":"x","time":"2025-11-13T02:13:20.250Z","end":"complete"}\n'
    os.write(journal._file._descriptor, line[:-5])
    await shipper.flush(PATIENCE_S)
    assert sink.ids == [first]
    os.write(journal._file._descriptor, line[-5:])
    await shipper.flush(PATIENCE_S)
    assert sink.ids == [first, "x"]


@pytest.mark.parametrize(
    "rubbish", [b"\0" * 2_000_000, b"[" * 100_000, b'{"end":"complete"}', b"", b"\xff"], ids=range(5)
)
async def test_rubbish_is_told_and_passed_over(
    journal: Journal, rubbish: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    ids = write(journal)
    os.write(journal._file._descriptor, rubbish + b"\n")
    ids += write(journal)
    sink = MemorySink()
    shipper = shipper_of(journal, sink)
    await shipper.flush(PATIENCE_S)
    assert sink.ids == ids
    assert shipper.lag_bytes == 0
    assert "cannot be read" in caplog.text


async def test_torn_end_of_a_file_that_has_a_successor_is_passed_over(tmp_path: Path) -> None:
    """The crash of a machine may leave one."""
    journal = start(tmp_path)
    ids = write(journal)
    os.write(journal._file._descriptor, b'{"id":"x')
    journal._file._rotate()
    ids += write(journal)
    sink = MemorySink()
    shipper = shipper_of(journal, sink)
    await shipper.flush(PATIENCE_S)
    assert (sink.ids, shipper.lag_bytes) == (ids, 0)
    journal.close()


async def test_file_that_was_taken_away_is_passed_over(tmp_path: Path) -> None:
    journal = start(tmp_path, rotate_bytes=1)
    ids = write(journal, 5)
    for path in journal_files(tmp_path)[:2]:
        path.unlink()
    sink = MemorySink()
    shipper = shipper_of(journal, sink)
    await shipper.flush(PATIENCE_S)
    assert sink.ids == ids[-len(sink.ids) :]
    assert len(sink.ids) >= 3
    assert shipper.lag_bytes == 0
    journal.close()


# --- at least once


async def test_next_start_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    first = start(tmp_path)
    ids = write(first, 3)
    sink = MemorySink()
    await shipper_of(first, sink).flush(PATIENCE_S)
    ids += write(first, 3)
    crash(first)
    second = start(tmp_path)
    await shipper_of(second, sink).flush(PATIENCE_S)
    assert sink.ids == ids
    second.close()


@pytest.mark.parametrize("step", ["read", "ask", "acknowledge", "draft", "rename", "saved"])
@pytest.mark.parametrize("turn", range(4))
async def test_process_that_is_killed_at_any_step_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, turn: int
) -> None:
    """What it had delivered and not yet noted is delivered twice, with the same ids."""

    class Killed(Exception):
        pass

    monkeypatch.setattr(shipping, "_MAX_RECORDS", 2)
    left = turn

    def at(name: str) -> None:
        nonlocal left
        if name == step:
            left -= 1
            if left < 0:
                raise Killed

    class FaultySink(MemorySink):
        async def deliver(self, lines: Sequence[bytes]) -> None:
            at("ask")
            await super().deliver(lines)
            at("acknowledge")

    def with_steps(real: Callable[..., Any], before: str, after: str = "") -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            at(before)
            result = real(*arguments)
            at(after)
            return result

        return call

    first = start(tmp_path, rotate_bytes=2000)
    ids = write(first, 9)
    sink = FaultySink()
    with monkeypatch.context() as faults:
        faults.setattr(shipping._Spool, "read", with_steps(shipping._Spool.read, "read"))
        faults.setattr(Path, "rename", with_steps(Path.rename, "rename", "saved"))
        faults.setattr(Path, "write_bytes", with_steps(Path.write_bytes, "draft"))
        with pytest.raises(Killed):
            await shipper_of(first, sink).flush(PATIENCE_S)
    crash(first)
    step = ""
    second = start(tmp_path)
    await shipper_of(second, sink).flush(PATIENCE_S)
    assert list(dict.fromkeys(sink.ids)) == ids
    assert len(sink.ids) <= len(ids) + 2
    assert (
        len(set(map(tuple, (sorted(json.loads(line).items(), key=str) for batch in sink.batches for line in batch))))
        == 9
    )
    second.close()


async def test_acknowledgement_that_is_lost_repeats_the_batch(journal: Journal) -> None:
    ids = write(journal, 3)
    sink = MemorySink()
    sink.fault, sink.after = SinkUnavailable("lost"), True
    task = asyncio.get_running_loop().create_task(shipper_of(journal, sink).run())
    await sink.until(lambda: len(sink.batches) == 3)
    sink.fault = None
    await sink.until(lambda: sink.asked > 3)
    await stop(task)
    assert sink.batches[0] == sink.batches[1] == sink.batches[-1]
    assert list(dict.fromkeys(sink.ids)) == ids


@pytest.mark.parametrize("turns", range(12))
async def test_run_that_is_cancelled_anywhere_is_finished_by_flush(journal: Journal, turns: int) -> None:
    ids = write(journal, 3)
    sink = MemorySink()
    shipper = shipper_of(journal, sink)
    task = asyncio.get_running_loop().create_task(shipper.run())
    for _ in range(turns):
        await asyncio.sleep(0)
    await stop(task)
    write(journal)
    await shipper.flush(PATIENCE_S)
    assert list(dict.fromkeys(sink.ids))[:3] == ids
    assert load_position(journal.directory, journal.token) == Position(1, journal._file._size)


PROCESS = """
import asyncio, os, sys
from pathlib import Path
from edge.journal import shipping
from edge.journal.journal import Journal
from tests.records import close, opened
shipping._MAX_RECORDS = 7
shipping._POLL_INTERVAL_S = 0.001
class FileSink:
    def __init__(self): self.file = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    async def deliver(self, lines):
        await asyncio.sleep(0)
        os.write(self.file, b"".join(line + b"\\n" for line in lines))
        await asyncio.sleep(0)
    async def close(self): ...
async def main():
    journal = Journal(Path(sys.argv[1]), 5000, "serve", ships=True)
    shipper = shipping.Shipper(journal.directory, journal.token, journal.adopted.locks, FileSink())
    task = asyncio.get_running_loop().create_task(shipper.run())
    running = []
    for turn in range(int(sys.argv[3])):
        exchange = opened(journal)
        running.append(exchange)
        if turn % 3:
            close(journal, running.pop(0))
        if turn % 5 == 0:
            journal.drain()
        os.write(1, b".")
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait((task,))
    for exchange in running:
        close(journal, exchange)
    journal.drain()
    await shipper.flush(20)
    journal.close()
asyncio.run(main())
"""


def test_processes_that_are_killed_again_and_again_lose_no_record(tmp_path: Path) -> None:
    usage, sunk = tmp_path / "usage", tmp_path / "sink"

    def run(turns: int, patience: int | None) -> None:
        command = [sys.executable, "-c", PROCESS, str(usage), str(sunk), str(turns)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
            assert process.stdout is not None
            process.stdout.read(patience or -1)
            if patience is not None:
                process.send_signal(signal.SIGKILL)

    chance = random.Random(7)
    for _ in range(5):
        run(1_000_000, chance.randrange(1, 700))
    run(10, None)
    records = ends_of(usage)
    delivered = [json.loads(line) for line in sunk.read_bytes().splitlines()]
    assert {each["id"] for each in delivered} == set(records)
    assert all(records[each["id"]] == each for each in delivered)
    assert {path.suffix for path in usage.iterdir()} == {".jsonl"}


# --- tokens of others


async def test_adopted_token_is_done_with_when_it_is_delivered(tmp_path: Path) -> None:
    first = start(tmp_path)
    ids = write(first, 2)
    running = opened(first)
    crash(first)
    second = start(tmp_path)
    sink = MemorySink()
    sink.fault = SinkUnavailable("down")
    shipper = shipper_of(second, sink)
    await shipper.flush(0.01)
    assert (tmp_path / f"{first.token}.lock").exists()
    sink.fault = None
    await shipper.flush(PATIENCE_S)
    assert sink.ids == [*ids, running.id]
    second.close()
    assert [path.name for path in tmp_path.iterdir()] == [f"{first.token}.0001.jsonl"]


async def test_token_that_cannot_be_read_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = start(tmp_path)
    write(first)
    crash(first)
    second = start(tmp_path)
    ids = write(second)
    real = shipping._Spool.read

    def read(spool: Any) -> Any:
        if spool._token == first.token:
            raise OSError(errno.EIO, "Input/output error")
        return real(spool)

    monkeypatch.setattr(shipping._Spool, "read", read)
    sink = MemorySink()
    task = asyncio.get_running_loop().create_task(shipper_of(second, sink).run())
    await sink.until(lambda: sink.ids == ids)
    ids += write(second)
    await sink.until(lambda: sink.ids == ids)
    await stop(task)
    second.close()
    assert "Input/output error" in caplog.text


class PickySink(MemorySink):
    """Refuses every batch with one of the records `refused`."""

    def __init__(self, refused: Sequence[str]) -> None:
        super().__init__()
        self.refused = refused
        self.refusals = 0

    async def deliver(self, lines: Sequence[bytes]) -> None:
        refuses = any(json.loads(line)["id"] in self.refused for line in lines)
        self.refusals += refuses
        self.fault = SinkUnavailable("status 400") if refuses else None
        await super().deliver(lines)


async def test_records_that_the_sink_refuses_hold_up_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One adopted token that was refused let this process's own records through a batch for each pause."""
    monkeypatch.setattr(shipping, "_MAX_RECORDS", 2)
    monkeypatch.setattr(shipping, "pause_s", lambda failures, chance: 3600.0)
    first = start(tmp_path)
    refused = write(first)
    crash(first)
    second = start(tmp_path)
    ids = write(second, 9)
    sink = PickySink(refused)
    shipper = shipper_of(second, sink, clock=lambda: STARTED_AT + 2.5 + 60)
    task = asyncio.get_running_loop().create_task(shipper.run())
    await sink.until(lambda: sink.ids == ids and bool(sink.refusals))
    ids += write(second, 9)
    await sink.until(lambda: sink.ids == ids)
    await stop(task)
    assert sink.refusals == 1
    assert shipper.outage.reason == f"status 400, those of {first.token}"
    assert shipper.lag_s == pytest.approx(60)
    assert shipper.lag_bytes > 0
    ids += write(second, 9)
    await shipper.flush(0.2)
    assert sink.ids == ids
    second.close()
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]


async def test_refused_records_are_told_once_beside_those_that_are_delivered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = start(tmp_path)
    refused = write(first)
    crash(first)
    second = start(tmp_path)
    sink = PickySink(refused)
    shipper = shipper_of(second, sink)
    task = asyncio.get_running_loop().create_task(shipper.run())
    for at in range(1, 4):
        ids = write(second)
        await sink.until(lambda ids=ids, at=at: sink.ids[-1:] == ids and sink.refusals > at)  # type: ignore[misc]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    sink.refused = ()
    await sink.until(lambda: refused[0] in sink.ids)
    await stop(task)
    await shipper.flush(PATIENCE_S)
    second.close()
    assert (shipper.outage.reason, shipper.lag_s, shipper.lag_bytes) == ("", 0.0, 0)
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]


@pytest.mark.parametrize("content", [b"", b"\0\0", b'{"file":"x","offset":1}'])
async def test_position_that_was_lost_means_that_all_is_delivered_again(tmp_path: Path, content: bytes) -> None:
    first = start(tmp_path)
    ids = write(first, 3)
    sink = MemorySink()
    await shipper_of(first, sink).flush(PATIENCE_S)
    crash(first)
    position_path(tmp_path, first.token).write_bytes(content)
    second = start(tmp_path)
    await shipper_of(second, sink).flush(PATIENCE_S)
    assert sink.ids == ids * 2
    second.close()


# --- a sink that is down


async def test_outage_is_told_once_and_measured(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    now = STARTED_AT + 2.5 + 60  # a minute after the first record ended
    sink = MemorySink()
    sink.fault = SinkUnavailable("status 500")
    shipper = shipper_of(journal, sink, clock=lambda: now)
    ids = write(journal)
    task = asyncio.get_running_loop().create_task(shipper.run())
    await sink.until(lambda: sink.asked == 3)
    ids += write(journal, started_at=STARTED_AT + 30)
    await sink.until(lambda: sink.asked == 6)
    assert shipper.outage.reason == "status 500"
    assert shipper.lag_s == pytest.approx(60)
    assert shipper.lag_bytes == journal._file._size
    sink.fault = None
    await sink.until(lambda: sink.ids == ids)
    await stop(task)
    assert (shipper.outage.reason, shipper.lag_s, shipper.shipped) == ("", 0.0, 2)
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]


async def test_pauses_grow_while_the_sink_is_down_and_begin_anew_after(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[int] = []

    def pause(count: int, chance: float) -> float:
        assert 0 <= chance <= 1
        failures.append(count)
        return 0.0

    monkeypatch.setattr(shipping, "pause_s", pause)
    sink = MemorySink()
    sink.fault = SinkUnavailable("down")
    write(journal)
    task = asyncio.get_running_loop().create_task(shipper_of(journal, sink).run())
    await sink.until(lambda: len(failures) >= 4)
    assert failures[:4] == [0, 1, 2, 3]
    sink.fault = None
    await sink.until(lambda: len(sink.ids) == 1)
    failures.clear()
    sink.fault = SinkUnavailable("down again")
    write(journal)
    await sink.until(lambda: len(failures) >= 2)
    await stop(task)
    assert failures[:2] == [0, 1]


@given(st.integers(0, 10**6), st.floats(0, 1))
def test_pause_is_from_half_a_second_to_half_a_minute(failures: int, chance: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipping, "_LONGEST_PAUSE_S", 30.0)
        assert 0.5 <= pause_s(failures, chance) <= 30
        assert pause_s(failures, 0) <= pause_s(failures + 1, 0)
        assert pause_s(20, 1) == 30


async def test_full_disk_stops_no_delivery(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only what a crash would repeat grows."""
    real = Path.write_bytes
    full = True

    def write_bytes(path: Path, data: bytes) -> int:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    sink = MemorySink()
    shipper = shipper_of(journal, sink)
    ids = write(journal)
    await shipper.flush(PATIENCE_S)
    ids += write(journal)
    await shipper.flush(PATIENCE_S)
    assert (sink.ids, shipper.outage.reason) == (ids, "")
    assert len(caplog.records) == 1
    assert load_position(journal.directory, journal.token) is None
    full = False
    write(journal)
    await shipper.flush(PATIENCE_S)
    assert load_position(journal.directory, journal.token) == Position(1, journal._file._size)


async def test_files_are_read_and_positions_saved_in_threads(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    for name in ("read", "save"):
        real = getattr(shipping._Spool, name)
        monkeypatch.setattr(
            shipping._Spool, name, lambda spool, real=real: (threads.append(threading.get_ident()), real(spool))[1]
        )
    write(journal)
    await shipper_of(journal, MemorySink()).flush(PATIENCE_S)
    assert len(threads) >= 2
    assert threading.get_ident() not in threads


# --- the end of the process


async def test_flushed_journal_is_done_with_at_its_end(journal: Journal) -> None:
    write(journal)
    await shipper_of(journal, MemorySink()).flush(PATIENCE_S)
    journal.close()
    assert [path.suffix for path in journal.directory.iterdir()] == [".jsonl"]


@pytest.mark.parametrize("how", ["silent", "down"])
async def test_flush_waits_no_longer_than_it_is_told(
    journal: Journal, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What is left stays for the next start."""

    class SilentSink(MemorySink):
        async def deliver(self, lines: Sequence[bytes]) -> None:
            await asyncio.Event().wait()

    sink = SilentSink() if how == "silent" else MemorySink()
    sink.fault = SinkUnavailable("down")
    write(journal)
    shipper = shipper_of(journal, sink)
    async with asyncio.timeout(PATIENCE_S):
        await shipper.flush(0.05)
    assert f"{journal._file._size} bytes of the journal are left" in caplog.text
    journal.close()
    second = start(journal.directory)
    assert [lock.token for lock in second.adopted.locks] == [journal.token]
    second.close()


@pytest.mark.parametrize("left_bytes", [0, 100, None])
async def test_lines_that_a_crash_of_the_machine_left_in_the_buffer_are_delivered(
    tmp_path: Path, left_bytes: int | None
) -> None:
    """They come to stand where others stood that were delivered, and that the crash took; None: with their file."""
    journal, sink = Journal(tmp_path, 2**20, "serve", ships=True), MemorySink()
    close(journal, opened(journal))
    close(journal, opened(journal))
    journal.drain()
    await Shipper(tmp_path, journal.token, [], sink).flush(PATIENCE_S)
    left = [opened(journal) for _ in range(6)]
    for each in left:
        close(journal, each)
    crash(journal)
    [path] = journal_files(tmp_path)
    if left_bytes is None:
        path.unlink()
    else:
        os.truncate(path, left_bytes)
    heir = Journal(tmp_path, 2**20, "serve", ships=True)
    await Shipper(tmp_path, heir.token, heir.adopted.locks, sink).flush(PATIENCE_S)
    heir.close()
    assert {each.id for each in left} <= set(sink.ids)
