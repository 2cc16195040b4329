"""Requests as the proxy hands them to the journal and the logs, and what stands in the journal afterwards."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from edge.exchange import End, Exchange, Phase, Principal, Usage, UsageSource
from edge.journal.buffer import LineBuffer
from edge.journal.journal import Journal

STARTED_AT = 1_763_000_000.25  # 2025-11-13T02:13:20.250Z
TOKEN = "20251113T000000Z-0123456789abcdef"


def accepted(**facts: Any) -> Exchange:
    """A request that passed admission."""
    exchange = Exchange("req_1", "POST", STARTED_AT, 100.0, path="/v1/completions", stream=True)
    exchange.principal = Principal("key_1", "u-a", name="secret name")
    exchange.model = exchange.route = "public/deepseek-r1"
    for name, value in facts.items():
        setattr(exchange, name, value)
    return exchange


def ended(exchange: Exchange, **facts: Any) -> Exchange:
    """The same request at its end."""
    exchange.end, exchange.status, exchange.finished, exchange.first_byte = End.COMPLETE, 200, 102.5, 100.1234
    exchange.endpoint, exchange.upstream_model = "10.0.0.1:8000", "r1"
    exchange.usage = Usage(11, 7, 3, 2, 0, UsageSource.FINAL)
    for name, value in facts.items():
        setattr(exchange, name, value)
    return exchange


def finished(**facts: Any) -> Exchange:
    """A request as the log and the metrics get it, of which little is known."""
    exchange = Exchange("req_1", "POST", STARTED_AT, 100.0, path="/v1/completions", host="chat.d.run")
    exchange.end, exchange.status, exchange.phase, exchange.finished = End.COMPLETE, 200, Phase.DONE, 102.5
    for name, value in facts.items():
        setattr(exchange, name, value)
    return exchange


class Recorded(NamedTuple):
    """A request, and the id of its record."""

    exchange: Exchange
    id: str


def opened(journal: Journal, **facts: Any) -> Recorded:
    """A request that passed admission, recorded as the proxy does it."""
    exchange = accepted(**facts)
    return Recorded(exchange, journal.open_record(exchange))


def close(journal: Journal, recorded: Recorded, **facts: Any) -> None:
    """The same at the end of the request."""
    journal.close_record(ended(recorded.exchange, **facts), recorded.id)


def write(journal: Journal, **facts: Any) -> Recorded:
    exchange = opened(journal, **facts)
    close(journal, exchange)
    journal.drain()
    return exchange


def crash(journal: Journal) -> None:
    """What the kernel does to the journal of a process that is killed."""
    assert journal._file is not None
    os.close(journal._file._descriptor)
    journal._file._descriptor = -1
    crash_buffer(journal._file.buffer)
    assert journal.lock is not None
    for lock in (journal.lock, *journal.adopted.locks):
        lock.release()


def crash_buffer(buffer: LineBuffer) -> None:
    """The same to a buffer."""
    buffer._words.release()
    buffer._map.close()


def journal_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.jsonl"))


def lines_of(directory: Path) -> list[dict[str, Any]]:
    """Every line of every file that is whole and can be read, in order."""
    found = []
    for path in journal_files(directory):
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                found.append(json.loads(line))
            except (ValueError, RecursionError):
                continue
    return found


def ends_of(directory: Path) -> dict[str, dict[str, Any]]:
    """The record of each id; fails where one has ended twice, or an opened one not at all."""
    lines = lines_of(directory)
    times = Counter(line["id"] for line in lines if "end" in line)
    assert set(times.values()) <= {1}, times.most_common(3)
    assert {line["id"] for line in lines} == set(times)
    return {line["id"]: line for line in lines if "end" in line}
