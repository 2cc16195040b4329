"""Journals, and a disk with faults."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge.config.process_settings import WhenFull
from edge.journal.journal import Journal

MEGABYTE = 2**20


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Journal]]:
    """Start journals in one directory; what a test leaves open is closed."""
    started: list[Journal] = []

    def make(rotate_bytes: int = MEGABYTE, when_full: WhenFull = "serve", **options: Any) -> Journal:
        journal = Journal(tmp_path, rotate_bytes, when_full, **options)
        started.append(journal)
        return journal

    yield make
    for journal in started:
        if journal._file is None or journal._file._descriptor >= 0:
            journal._waiting.clear()
            journal.close()


class FaultyDisk:
    """`os.write`, `os.ftruncate` and `os.fsync` with faults: an errno, or room for so many bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fault: int | None = None
        self.room: int | None = None
        self.truncate_fault: int | None = None
        self.sync_fault: int | None = None
        self.writes = 0
        real_write, real_truncate, real_sync = os.write, os.ftruncate, os.fsync

        def write(descriptor: int, data: bytes) -> int:
            self.writes += 1
            _raise(self.fault)
            if self.room is None:
                return real_write(descriptor, data)
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = real_write(descriptor, data[: self.room])
            self.room -= written
            return written

        def truncate(descriptor: int, size: int) -> None:
            _raise(self.truncate_fault)
            before = os.fstat(descriptor).st_size
            real_truncate(descriptor, size)
            if self.room is not None:
                self.room += before - size

        def sync(descriptor: int) -> None:
            _raise(self.sync_fault)
            real_sync(descriptor)

        monkeypatch.setattr(os, "write", write)
        monkeypatch.setattr(os, "ftruncate", truncate)
        monkeypatch.setattr(os, "fsync", sync)


def _raise(number: int | None) -> None:
    if number is not None:
        raise OSError(number, os.strerror(number))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FaultyDisk:
    return FaultyDisk(monkeypatch)
