"""What the process says on standard error: every line, in order, and never at the price of a request."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from edge.telemetry import process_log
from edge.telemetry.process_log import JsonFormatter, ThreadedHandler

LONG_S = 20  # a patience that no test uses up


@pytest.mark.parametrize("message", ['a "quoted"\nline', "模型"])
def test_record_of_the_log_is_one_json_object(message: str) -> None:
    record = logging.makeLogRecord({"name": "edge.server", "levelname": "ERROR", "msg": message, "created": 0.0})
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:00Z", "level": "error", "event": "edge.server", "message": message,
    }  # fmt: skip


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """A logger that nobody else hears."""
    made = logging.Logger("edge.test", logging.INFO)
    yield made
    made.handlers.clear()


def messages(data: bytes) -> list[str]:
    return [json.loads(line)["message"] for line in data.splitlines()]


def run(code: str, stderr: int) -> subprocess.CompletedProcess[bytes]:
    """Run a process that must end by itself."""
    return subprocess.run([sys.executable, "-c", code], stderr=stderr, check=False, timeout=LONG_S)


def test_lines_are_written_whole_and_in_order(logger: logging.Logger) -> None:
    """More of them than a pipe holds."""
    reader, writer = os.pipe()
    handler = ThreadedHandler(writer)
    logger.addHandler(handler)
    with ThreadPoolExecutor() as threads, os.fdopen(reader, "rb") as stream:
        reading = threads.submit(stream.read)
        for number in range(1000):
            logger.info("%d %s", number, "x" * 500)
        assert handler.wait_written(LONG_S)
        os.close(writer)
        assert [line.split()[0] for line in messages(reading.result())] == [str(number) for number in range(1000)]


def test_stuck_reader_stops_nobody_and_what_is_lost_is_told(
    logger: logging.Logger, full_pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the bound of what is kept, lines are dropped; the first line after them comes behind their count."""
    monkeypatch.setattr(process_log, "MAX_BACKLOG", 10)
    reader, writer = full_pipe
    handler = ThreadedHandler(writer)
    logger.addHandler(handler)
    for number in range(100):
        logger.info("%d", number)
    assert not handler.wait_written(0)
    read = b""
    while b"lost" not in read:
        read += os.read(reader, 65536)
    assert handler.wait_written(LONG_S)
    logger.info("after")
    while b"after" not in read:
        read += os.read(reader, 65536)
    told = messages(read.lstrip(b"x"))
    kept = len(told) - 2
    assert told[:kept] == [str(number) for number in range(kept)]
    assert told[kept:] == [f"{100 - kept} lines of this log are lost, its reader was stuck", "after"]
    assert kept <= 11  # the bound, and the one that the thread holds


def test_record_that_is_no_text_is_told_of_and_costs_no_other_its_place(logger: logging.Logger) -> None:
    reader, writer = os.pipe()
    handler = ThreadedHandler(writer)
    logger.addHandler(handler)
    logger.info("before")
    logger.info("half a \udcff path")
    logger.info("%d", "no number")
    logger.info("after")
    assert handler.wait_written(LONG_S)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        assert messages(stream.read()) == [
            "before",
            "a line of edge.test cannot be written: 'half a \\udcff path'",
            "a line of edge.test cannot be written: '%d'",
            "after",
        ]


def test_log_that_nobody_reads_any_more_stops_nobody(logger: logging.Logger) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    handler = ThreadedHandler(writer)
    logger.addHandler(handler)
    for _ in range(100):
        logger.info("said")
    assert handler.wait_written(LONG_S)
    os.close(writer)


_LINES = """
import logging, sys
from edge.telemetry.process_log import log_to_stderr
with log_to_stderr():
    for number in range(1000):
        logging.info("%d", number)
"""


@pytest.mark.parametrize("last", ['print("last", file=sys.stderr)', 'sys.exit("last")'])
def test_what_is_printed_at_the_end_comes_after_every_line(last: str) -> None:
    """A start that fails says so as the last thing."""
    done = run(_LINES + last, subprocess.PIPE)
    *lines, printed = done.stderr.splitlines(keepends=True)
    assert messages(b"".join(lines)) == [str(number) for number in range(1000)]
    assert printed == b"last\n"


def test_line_after_the_end_of_the_log_is_written_before_the_interpreter_ends() -> None:
    done = run(_LINES + 'logging.info("late")', subprocess.PIPE)
    assert messages(done.stderr)[-2:] == ["999", "late"]


@pytest.mark.parametrize("lines", [0, 1000])
def test_process_ends_although_nobody_reads_what_it_says(full_pipe: tuple[int, int], lines: int) -> None:
    """Neither its log nor what it prints last may hold a restart up."""
    code = _LINES.replace("1000", str(lines)) + 'print("last", file=sys.stderr)\nsys.exit(3)'
    assert run(code, full_pipe[1]).returncode == 3
