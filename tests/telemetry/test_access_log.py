"""The line of a finished request: every fact, written whole, and never at the price of a request."""

import asyncio
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from edge.exchange import End, Exchange, Principal, Tried
from edge.telemetry import access_log
from edge.telemetry.access_log import AccessLog, log_line
from tests.records import finished as exchange


def line_of(made: Exchange) -> dict[str, object]:
    line = msgspec.json.encode(log_line(made))
    assert b"\n" not in line
    found: dict[str, object] = json.loads(line)
    return found


def test_line_has_every_fact_and_never_a_key() -> None:
    """One JSON object; what is not known is null, never left out."""
    principal = Principal("key_1", "u-a", name="secret name", allow=("public/*",))
    made = exchange(
        principal=principal, model='m"\n', stream=True, route="u-*", endpoint="10.0.0.1:8000", upstream_model="x",
        first_byte=100.1234, request_bytes=10, response_bytes=20, client="10.1.2.3",
    )  # fmt: skip
    assert line_of(made) == {
        "time": "2025-11-13T02:13:20.250000Z", "level": "info", "event": "request", "request_id": "req_1",
        "client": "10.1.2.3", "method": "POST", "host": "chat.d.run", "path": "/v1/completions", "key_id": "key_1",
        "user": "u-a", "model": 'm"\n', "route": "u-*", "endpoint": "10.0.0.1:8000", "upstream_model": "x",
        "upstream_id": None, "upstream_status": None, "upstream_error": None,
        "attempts": None, "trace_id": None, "limit": None, "queue_ms": None,
        "stream": True, "status": 200, "end": "complete", "ended_by": "none", "phase": "done", "error": None,
        "request_bytes": 10, "response_bytes": 20, "retries": 0, "replays": 0, "resumes": 0, "resume": None,
        "hedge": None,
        "prompt_tokens": 0, "completion_tokens": 0, "usage_source": "none", "ttft_ms": 123.4, "duration_ms": 2500.0,
        "choice": None,
    }  # fmt: skip


def test_members_of_a_line_stand_in_one_order_whatever_of_it_was_encoded_before() -> None:
    """Who reads lines with a pattern counts on it; `client`, `upstream_status` and `stream` begin what is kept."""
    for _ in range(2):
        plain = exchange(model='m"', route="r", endpoint="h:1", client="10.1.2.3", upstream_id="id", first_byte=100.5)
        assert msgspec.json.encode(log_line(plain)) == (
            b'{"time":"2025-11-13T02:13:20.250000Z","level":"info","event":"request","request_id":"req_1",'
            b'"client":"10.1.2.3","method":"POST","host":"chat.d.run","path":"/v1/completions","key_id":null,"user":null,'
            b'"model":"m\\"","route":"r","endpoint":"h:1","choice":null,"upstream_model":null,"upstream_id":"id",'
            b'"upstream_status":null,"upstream_error":null,"attempts":null,"trace_id":null,"stream":false,"status":200,'
            b'"end":"complete","ended_by":"none","phase":"done","error":null,"limit":null,"request_bytes":0,'
            b'"response_bytes":0,"retries":0,"replays":0,"resumes":0,"resume":null,"hedge":null,"prompt_tokens":0,'
            b'"completion_tokens":0,"usage_source":"none","queue_ms":null,"ttft_ms":500.0,"duration_ms":2500.0}'
        )
        failed = exchange(
            status=502, end=End.UPSTREAM_ERROR, endpoint="h:1", error="e", upstream_status=503, upstream_error="busy",
            failures=[Tried("h:1", 503, "upstream_error", "busy", 1.5)], limit=("a", "requests per minute"),
        )  # fmt: skip
        line = msgspec.json.encode(log_line(failed))
        assert (
            b'"upstream_id":null,"upstream_status":503,"upstream_error":"busy","attempts":[{"endpoint":"h:1","status":503,'
            b'"outcome":"upstream_error","error":"busy","duration_ms":1.5}],"trace_id":null,"stream":false,"status":502,'
            b'"end":"upstream_error","ended_by":"upstream","phase":"done","error":"e","limit":"a: requests per minute",'
        ) in line


@pytest.mark.parametrize("end", End)
def test_every_end_says_who_ended_it(end: End) -> None:
    line = line_of(exchange(end=end))
    assert line["end"] == end.value
    assert line["ended_by"] in ("none", "edge", "client", "upstream")
    assert (line["ended_by"] == "none") == (end is End.COMPLETE)


def test_line_of_a_refused_request_has_nulls() -> None:
    line = line_of(exchange(status=401, end=End.REFUSED, error="invalid_api_key"))
    assert [line[name] for name in ("key_id", "user", "model", "route", "endpoint", "ttft_ms")] == [None] * 6


def test_time_of_a_line_is_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    time.tzset()
    try:
        assert str(line_of(exchange())["time"]).endswith("02:13:20.250000Z")
    finally:
        monkeypatch.undo()
        time.tzset()


# --- the access log


def ids(data: bytes) -> list[str]:
    return [json.loads(line)["request_id"] for line in data.splitlines()]


def named(number: int) -> Exchange:
    return exchange(request_id=f"req_{number}", model="m" * 500)


async def all_read(reader: int, writer: int) -> bytes:
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        return await asyncio.to_thread(stream.read)


async def handed_over(log: AccessLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait until the lines that are queued are the thread's."""
    handed, put = asyncio.Event(), log._writer.put
    monkeypatch.setattr(log._writer, "put", lambda data, lines: (put(data, lines), handed.set()))
    await handed.wait()


async def test_lines_are_written_whole_and_in_order() -> None:
    """More than one batch of them, and more than a pipe holds."""
    reader, writer = os.pipe()
    copy = os.dup(writer)
    log = AccessLog(copy)
    for number in range(1000):
        log.write(named(number))
    reading = asyncio.get_running_loop().create_task(all_read(reader, writer))
    await log.close(patience_s=20)
    os.close(copy)
    assert ids(await reading) == [f"req_{number}" for number in range(1000)]
    assert log.dropped == 0


async def test_who_waits_for_lines_after_the_end_waits_for_nothing_more(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        log = AccessLog(file.fileno())
        log.write(named(1))
        await log.close()
        await log.flush()
    assert ids((tmp_path / "log").read_bytes()) == ["req_1"]


async def test_line_that_is_no_text_costs_no_other_its_place(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        log = AccessLog(file.fileno())
        for client in ("10.0.0.1", "\udcff", "10.0.0.2"):
            log.write(exchange(client=client))
        await log.close()
    lines = (tmp_path / "log").read_text().splitlines()
    assert [json.loads(line)["client"] for line in lines] == ["10.0.0.1", "10.0.0.2"]
    assert log.dropped == 1


@pytest.mark.parametrize("turns", range(5))
async def test_end_of_the_process_loses_no_line_that_is_being_encoded(turns: int, tmp_path: Path) -> None:
    """The task that flushes is cancelled at the end, wherever it is; what it holds is not lost."""
    with open(tmp_path / "log", "ab", buffering=0) as file:
        log = AccessLog(file.fileno())
        for number in range(1000):
            log.write(named(number))
        task = asyncio.get_running_loop().create_task(log.flush())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await log.close(patience_s=20)
    assert ids((tmp_path / "log").read_bytes()) == [f"req_{number}" for number in range(1000)]


async def test_lines_that_a_defect_left_queued_are_written_when_the_log_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody woke it for them, and the log stayed silent until its backlog was full."""
    monkeypatch.setattr(access_log, "_BATCH", 1)
    with open(tmp_path / "log", "ab", buffering=0) as file:
        log = AccessLog(file.fileno())
        with monkeypatch.context() as defect:
            defect.setattr(log, "_encode", lambda batch: 1 / 0)
            for number in range(3):
                log.write(named(number))
            with pytest.raises(ZeroDivisionError):
                await log.run()
        task = asyncio.get_running_loop().create_task(log.run())
        await handed_over(log, monkeypatch)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await log.close()
    assert ids((tmp_path / "log").read_bytes()) == ["req_1", "req_2"]


async def test_stuck_reader_never_stops_a_request_and_what_is_lost_is_counted(
    full_pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the bound of what is kept, lines are dropped; when the reader goes on, so does the log."""
    monkeypatch.setattr(access_log, "MAX_BACKLOG", 10)
    reader, writer = full_pipe
    log = AccessLog(writer)
    log.write(named(0))
    task = asyncio.get_running_loop().create_task(log.run())
    await handed_over(log, monkeypatch)  # the thread has it, and is stuck
    for number in range(1, 101):
        log.write(named(number))
    assert log.dropped == 90
    read = b""
    while read.count(b"\n") < 11:
        read += await asyncio.to_thread(os.read, reader, 65536)
    assert ids(read.lstrip(b"x")) == [f"req_{number}" for number in range(11)]
    log.write(named(1000))
    assert ids(await asyncio.to_thread(os.read, reader, 65536)) == ["req_1000"]
    assert log.dropped == 90
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await log.close()


async def test_lines_that_could_not_be_written_before_the_end_are_counted(full_pipe: tuple[int, int]) -> None:
    log = AccessLog(full_pipe[1])
    for number in range(7):
        log.write(named(number))
    await log.close(patience_s=0.05)
    assert log.dropped == 7


async def test_lines_that_nobody_reads_any_more_are_counted() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    log = AccessLog(writer)
    for number in range(100):
        log.write(named(number))
    await log.flush()
    await log.close()
    os.close(writer)
    assert log.dropped == 100


async def test_full_pipe_that_does_not_block_is_waited_for() -> None:
    """Whoever shares the descriptor may have set it so."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    log = AccessLog(writer)
    for number in range(100):
        log.write(named(number))
    async with asyncio.timeout(20):
        flush = asyncio.get_running_loop().create_task(log.flush())
        read = b""
        while read.count(b"\n") < 100:
            read += await asyncio.to_thread(os.read, reader, 65536)
        await flush
    await log.close()
    os.close(reader)
    os.close(writer)
    assert (ids(read), log.dropped) == ([f"req_{number}" for number in range(100)], 0)


def test_process_ends_although_nobody_reads_its_log(full_pipe: tuple[int, int]) -> None:
    """The interpreter waits for the threads of executors at its end; a stuck log must not hold a restart up."""
    code = """
import asyncio, sys
from edge.exchange import End, Exchange
from edge.telemetry.access_log import AccessLog
async def main():
    log = AccessLog(int(sys.argv[1]))
    log.write(Exchange("r", "POST", 0.0, 0.0, end=End.COMPLETE))
    await log.close(patience_s=0.05)
asyncio.run(main())
print("done", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(full_pipe[1])], pass_fds=(full_pipe[1],), stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail("the process hangs at its end")
    assert process.returncode == 0
