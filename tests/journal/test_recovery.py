"""What a crash left is ended once, whatever it left."""

import asyncio
import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge.journal import recovery, rotating
from edge.journal.journal import Journal
from edge.journal.records import CRASHED
from edge.journal.recovery import Adopted
from edge.journal.shipping import Shipper
from tests.journal.conftest import MEGABYTE, FaultyDisk
from tests.journal.test_shipping import MemorySink
from tests.records import close, crash, ends_of, journal_files, lines_of, opened, write

WRITER = """
import os, random, sys
from pathlib import Path
from edge.journal.journal import Journal
from tests.records import close, opened
journal = Journal(Path(sys.argv[1]), 20_000, "serve")
chance = random.Random(int(sys.argv[2]))
running = []
while True:
    running.append(opened(journal))
    os.write(1, f"+{running[-1].id}\\n".encode())
    while running and chance.random() < 0.55:
        done = running.pop(chance.randrange(len(running)))
        close(journal, done)
        os.write(1, f"-{done.id}\\n".encode())
    if chance.random() < 0.02:
        journal.drain()
"""


@pytest.mark.parametrize("seed", range(6))
def test_killed_process_leaves_every_open_record_to_be_ended_once(
    tmp_path: Path, start: Callable[..., Journal], seed: int
) -> None:
    """What it had told was written stands; what it had open is ended as crashed; nothing is ended twice."""
    usage = tmp_path
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(usage), str(seed)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(random.Random(seed).randrange(1, 3000))]
        process.send_signal(signal.SIGKILL)
        told += process.stdout.readlines()
    told = [line for line in told if line.endswith(b"\n")]
    begun = {line[1:-1].decode() for line in told if line.startswith(b"+")}
    closed = {line[1:-1].decode() for line in told if line.startswith(b"-")}
    adopting = start()
    records = ends_of(usage)
    assert begun <= set(records)
    assert len(set(records) - begun) <= 1  # written, not told any more
    complete = {each for each, record in records.items() if record["end"] == "complete"}
    assert closed <= complete
    assert len(complete - closed) <= 1
    assert adopting.adopted.recovered == len(records) - len(complete)
    assert adopting.adopted.bad_lines == 0
    assert [path.stem for path in usage.glob("*.lock")] == [adopting.token]


def test_crashed_record_has_every_field(tmp_path: Path, start: Callable[..., Journal]) -> None:
    first = start()
    exchange = opened(first)
    crash(first)
    second = start()
    assert (second.adopted.recovered, second.adopted.bad_lines) == (1, 0)
    [record] = ends_of(tmp_path).values()
    assert record == {
        "v": 2, "id": exchange.id, "time": "2025-11-13T02:13:20.250Z", "request_id": "req_1", "key_id": "key_1",
        "user": "u-a", "route": "public/deepseek-r1", "path": "/v1/completions", "model": "public/deepseek-r1",
        "region": None, "upstream_model": None, "endpoint": None, "stream": True, "status": 0, "end": "crashed",
        "prompt_tokens": 0,
        "completion_tokens": 0, "cached_tokens": 0, "cache_creation_tokens": 0, "reasoning_tokens": 0, "units": 0,
        "unit": None, "usage_source": "none", "ttft_ms": None, "duration_ms": 0, "retries": 0,
    }  # fmt: skip


def test_adoption_is_done_once(tmp_path: Path, start: Callable[..., Journal]) -> None:
    first = start()
    opened(first)
    crash(first)
    crash(start())
    before = {path: path.read_bytes() for path in journal_files(tmp_path)}
    assert start().adopted.recovered == 0
    assert all(path.read_bytes() == content for path, content in before.items() if content)


def test_files_of_a_live_process_are_never_touched(tmp_path: Path, start: Callable[..., Journal]) -> None:
    living = start()
    opened(living)
    living.drain()
    [path] = journal_files(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])  # and it is just writing
    before = path.read_bytes()
    other = start()
    assert other.adopted == Adopted()
    assert path.read_bytes() == before
    assert (tmp_path / f"{living.token}.lock").exists()


def test_line_cut_anywhere_is_mended_and_ends_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The crash of a machine can cut the last line at any byte (here every seventh); what was before stays."""
    origin = tmp_path_factory.mktemp("origin")
    journal = Journal(origin, MEGABYTE, "serve")
    whole = write(journal)
    cut = opened(journal)
    journal.drain()
    keep = journal._file._size
    close(journal, cut)
    journal.drain()
    size = journal._file._size
    crash(journal)
    [original] = journal_files(origin)
    content = original.read_bytes()
    for length in (*range(keep, size - 2, 7), size - 2, size - 1, size):
        directory = tmp_path_factory.mktemp("cut")
        (directory / original.name).write_bytes(content[:length])
        (directory / f"{journal.token}.lock").touch()
        adopting = Journal(directory, MEGABYTE, "serve")
        records = ends_of(directory)
        complete = length >= size - 1  # all but the newline is a whole line
        assert records[cut.id]["end"] == ("complete" if complete else "crashed")
        assert records[whole.id]["end"] == "complete"
        assert adopting.adopted.recovered == (not complete)
        assert adopting.adopted.bad_lines == (keep < length < size - 1)
        adopting.close()
        shutil.rmtree(directory)


@pytest.mark.parametrize(
    "rubbish",
    [
        b"\0" * 5000,
        b"\0" * 2_000_000,
        b"[" * 100_000,
        b"\xff\xfe",
        b"[]",
        b"7",
        b'{"id":7}',
        b'{"end":"complete"}',
        b"",
    ],
    ids=range(9),
)
def test_rubbish_between_lines_is_counted_and_harms_no_record(
    tmp_path: Path, start: Callable[..., Journal], rubbish: bytes
) -> None:
    first = start(rotate_bytes=8 * MEGABYTE)
    ids = [write(first).id]
    first._file._size += os.write(first._file._descriptor, rubbish + b"\n")
    first._file.buffer.clear(first._file._size)
    ids += [write(first).id]
    exchange = opened(first)
    crash(first)
    second = start()
    assert second.adopted.recovered == 1
    assert second.adopted.bad_lines >= 1
    lines = {line["id"]: line.get("end") for line in lines_of(tmp_path) if isinstance(line, dict) and "time" in line}
    assert lines == {ids[0]: "complete", ids[1]: "complete", exchange.id: "crashed"}


def test_open_line_with_fields_that_are_no_record_is_counted(tmp_path: Path, start: Callable[..., Journal]) -> None:
    first = start()
    os.write(first._file._descriptor, b'{"id":"x-1"}\n')
    crash(first)
    second = start()
    assert (second.adopted.recovered, second.adopted.bad_lines) == (0, 1)
    assert list(tmp_path.glob("*.lock")) == [tmp_path / f"{second.token}.lock"]


def test_adoption_that_the_disk_refuses_is_left_to_the_next_start(
    tmp_path: Path, start: Callable[..., Journal], disk: FaultyDisk, caplog: pytest.LogCaptureFixture
) -> None:
    first = start()
    for _ in range(10):
        opened(first)
    first.drain()
    content = journal_files(tmp_path)[0].read_bytes()
    crash(first)
    disk.room = 32 + rotating.BUFFER_BYTES + 500  # for its own buffer, and half of what it would write
    second = start()
    assert second.adopted.recovered == 0
    assert "cannot be adopted" in caplog.text
    assert (tmp_path / f"{first.token}.0001.jsonl").read_bytes() == content
    disk.room = None
    third = start()
    assert third.adopted.recovered == 10
    assert len(ends_of(tmp_path)) == 10


def test_buffer_that_the_disk_refuses_is_left_to_the_next_start(
    tmp_path: Path, start: Callable[..., Journal], disk: FaultyDisk, caplog: pytest.LogCaptureFixture
) -> None:
    first = start()
    exchange = opened(first)
    close(first, exchange)
    crash(first)
    disk.room = 32 + rotating.BUFFER_BYTES + 300  # for its own buffer, and half of what it would write
    start()
    assert "cannot be adopted" in caplog.text
    assert lines_of(tmp_path) == []
    disk.room = None
    assert start().adopted.recovered == 0
    assert [record["end"] for record in ends_of(tmp_path).values()] == ["complete"]


STARTER = """
import sys
from pathlib import Path
from edge.journal.journal import Journal
print("ready", flush=True)
sys.stdin.readline()
journal = Journal(Path(sys.argv[1]), 2**20, "serve")
print(journal.adopted.recovered, journal.adopted.bad_lines, journal.token, flush=True)
sys.stdin.readline()
"""


def test_processes_that_start_at_once_adopt_each_token_once(tmp_path: Path, start: Callable[..., Journal]) -> None:
    journals = [start() for _ in range(30)]
    for journal in journals:
        for _ in range(20):
            opened(journal)
    for journal in journals:
        crash(journal)
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", STARTER, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        for _ in range(4)
    ]
    try:
        for process in starters:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        for process in starters:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.flush()
        told = [process.stdout.readline().split() for process in starters if process.stdout is not None]
    finally:
        for process in starters:
            process.communicate(b"end\n")
    assert sum(int(recovered) for recovered, _, _ in told) == 600
    assert sum(int(bad) for _, bad, _ in told) == 0
    assert len(ends_of(tmp_path)) == 600


def test_threads_that_start_at_once_never_meet(tmp_path: Path) -> None:
    """Also with tokens that begin and end meanwhile, whose locks come and go."""
    barrier = threading.Barrier(8)
    journals: list[Journal] = []

    def begin() -> None:
        for _ in range(20):
            barrier.wait()
            journal = Journal(tmp_path, MEGABYTE, "serve")
            journals.append(journal)
            write(journal)
            running = opened(journal)
            if len(journals) % 2:
                crash(journal)
            else:
                close(journal, running)
                journal.close()

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    Journal(tmp_path, MEGABYTE, "serve").close()
    assert len(journals) == 160
    assert len({journal.token for journal in journals}) == 160
    assert len(ends_of(tmp_path)) == 320
    assert list(tmp_path.glob("*.lock")) == []


def test_lock_lasts_as_long_as_the_process(tmp_path: Path, start: Callable[..., Journal]) -> None:
    journal = start()
    with (tmp_path / f"{journal.token}.lock").open() as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        crash(journal)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --- what is none of ours, or of a newer edge


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")  # which can be read without end


def _socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


@pytest.mark.parametrize(
    "make", [os.mkfifo, Path.mkdir, _device, _socket], ids=["fifo", "directory", "device", "socket"]
)
def test_what_is_no_file_neither_holds_nor_fails_a_start(
    tmp_path: Path, start: Callable[..., Journal], make: Callable[[Path], None]
) -> None:
    """To open a FIFO waits for its other end. The token beside is adopted."""
    for number, suffix in enumerate(("lock", "buffer", "0001.jsonl", "0002.jsonl", "shipped", "tmp")):
        odd = f"20250101T000000Z-{number:016x}"
        for name in (f"{odd}.lock", f"{odd}.0001.jsonl"):
            (tmp_path / name).touch()
        path = tmp_path / f"{odd}.{suffix}"
        path.unlink(missing_ok=True)
        make(path)
    first = start()
    running = opened(first)
    crash(first)
    second = start(ships=True)
    assert second.adopted.recovered == 1
    assert first.token in [lock.token for lock in second.adopted.locks]
    lines = lines_of_regular(tmp_path)
    assert [each["end"] for each in lines if each["id"] == running.id and "end" in each] == [CRASHED]


def lines_of_regular(directory: Path) -> list[dict[str, Any]]:
    """The lines of what are files."""
    found = [path for path in journal_files(directory) if path.is_file() and not path.is_symlink()]
    return [json.loads(line) for path in found for line in path.read_bytes().splitlines()]


@pytest.mark.parametrize("name", ["buffer", "shipped", "0001.jsonl"])
def test_format_of_a_newer_edge_is_left_to_it_and_told(
    tmp_path: Path, start: Callable[..., Journal], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Nothing of such a token is removed, and the older edge says so once at each start."""
    first = start()
    opened(first)
    first.drain()
    opened(first)
    crash(first)
    path = tmp_path / f"{first.token}.{name}"
    match name:
        case "buffer":
            path.write_bytes(path.read_bytes().replace(b"1fubegde", b"2fubegde"))
        case "shipped":
            path.write_text(f'{{"v":2,"file":"{first.token}.0001.jsonl","at":["a",1]}}')
        case _:
            path.write_bytes(path.read_bytes().replace(b'"v":2', b'"v":3'))
    before = {each: each.read_bytes() for each in tmp_path.iterdir() if name != "0001.jsonl" or each == path}
    for _ in range(2):
        caplog.clear()
        start().close()
        assert len(caplog.records) == 1
        assert f"cannot be adopted, and stays as it is: {first.token}" in caplog.text
    if name == "0001.jsonl":  # the line of our version that stood in the buffer was ended behind it
        assert path.read_bytes().startswith(before[path])
        assert (tmp_path / f"{first.token}.lock").exists()
    else:
        assert {each: each.read_bytes() for each in before} == before


async def test_thousands_of_tokens_are_adopted_a_batch_at_a_time(
    tmp_path: Path, start: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start waits for one batch, and holds no more locks; those that cannot be adopted hold up no others."""
    monkeypatch.setattr(recovery, "BATCH", 4)
    tokens = [f"20250101T000000Z-{number:016x}" for number in range(11)]
    for token in tokens:
        (tmp_path / f"{token}.lock").touch()
        (tmp_path / f"{token}.0001.jsonl").write_text(f'{{"v":1,"id":"{token}-1","time":"","end":"complete"}}\n')
    os.mkfifo(tmp_path / f"{tokens[1]}.buffer")
    journal, sink = start(ships=True), MemorySink()
    assert [lock.token for lock in journal.adopted.locks] == [tokens[0], *tokens[2:4]]
    adopted = tuple(journal.adopted.locks)
    shipper = Shipper(tmp_path, journal.token, adopted, sink, more=journal.adopt_more)
    delivering = asyncio.get_running_loop().create_task(shipper.run())
    async with asyncio.timeout(20):
        while len(sink.ids) < 10:
            await sink.changed.wait()
            sink.changed.clear()
    delivering.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await delivering
    assert sink.ids == [f"{token}-1" for token in tokens if token != tokens[1]]
    assert not journal.adopted.is_more
