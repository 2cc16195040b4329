"""What was put is there after the process is gone, whole and in order, or is not believed."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.journal.buffer import LeftLines, LineBuffer, left_lines
from edge.journal.files import LeftAlone
from tests.profiles import examples
from tests.records import crash_buffer

LINES = st.lists(st.binary(max_size=40).map(lambda content: content + b"\n"), max_size=12)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lines.buffer"


@examples(100)
@given(rounds=st.lists(LINES, max_size=4), offset=st.integers(0, 2**40))
def test_what_was_put_since_the_last_clear_is_left(
    tmp_path_factory: pytest.TempPathFactory, rounds: list[list[bytes]], offset: int
) -> None:
    path = tmp_path_factory.mktemp("buffer") / "lines"
    buffer = LineBuffer(path, 4096)
    buffer.move(7, offset)
    lines: list[bytes] = []
    for lines in rounds:
        offset += buffer.length
        buffer.clear(offset)
        for line in lines:
            assert buffer.put(line)
    content = b"".join(lines)
    assert (buffer.lines(), buffer.length, buffer.offset) == (content, len(content), offset)
    assert buffer.lines(len(content) // 2) == content[len(content) // 2 :]
    crash_buffer(buffer)
    assert left_lines(path) == LeftLines(content, 7, offset)


def test_line_without_room_is_not_put_and_harms_nothing(path: Path) -> None:
    buffer = LineBuffer(path, 10)
    assert buffer.put(b"12345\n")
    assert not buffer.put(b"1234\n")
    assert buffer.put(b"123\n")
    assert not buffer.put(b"\n")
    crash_buffer(buffer)
    assert left_lines(path) == LeftLines(b"12345\n123\n", 0, 0)


def test_lines_that_are_about_to_move_have_no_file_or_the_right_one(path: Path) -> None:
    """A kill between two stores finds a number no file has: the offset of one is never used for another."""
    buffer = LineBuffer(path, 100)
    buffer.move(1, 50)
    buffer.put(b"line\n")
    stores: list[tuple[int, int]] = []

    class Words:
        def __setitem__(self, word: int, value: int) -> None:
            real[word] = value
            stores.append((real[2], real[3]))

    real = buffer._words
    buffer._words = Words()  # type: ignore[assignment]  # to see the words after each store
    buffer.move(2, 9)
    buffer._words = real
    assert stores == [(0, 50), (0, 9), (2, 9)]
    crash_buffer(buffer)


def test_closed_buffer_keeps_its_file_only_for_lines(path: Path) -> None:
    buffer = LineBuffer(path, 100)
    buffer.put(b"line\n")
    buffer.clear(5)
    buffer.close()
    assert not path.exists()
    buffer = LineBuffer(path, 100)
    buffer.put(b"line\n")
    buffer.close()
    left = left_lines(path)
    assert left is not None
    assert left.lines == b"line\n"


def test_content_of_two_moments_is_not_believed(path: Path) -> None:
    """What a crash of the machine can leave: any byte that is another than it was with this header, or is not there."""
    buffer = LineBuffer(path, 100)
    buffer.move(3, 1000)
    buffer.put(b"a line\n")
    buffer.put(b"another\n")
    crash_buffer(buffer)
    content = path.read_bytes()
    used = 32 + len(b"a line\nanother\n")
    for at in (*range(1, 16), *range(32, used)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert left_lines(path) is None, at
    for length in range(used):
        path.write_bytes(content[:length])
        assert left_lines(path) is None, length


def test_format_of_another_version_is_left_alone(path: Path) -> None:
    buffer = LineBuffer(path, 100)
    buffer.put(b"a line\n")
    crash_buffer(buffer)
    content = path.read_bytes()
    changed = content[:8].replace(b"1", b"2") + content[8:]
    path.write_bytes(changed)
    with pytest.raises(LeftAlone):
        left_lines(path)
    assert path.read_bytes() == changed


def test_disk_without_room_for_the_buffer_is_told_at_once_and_nothing_is_left(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:100]))
    with pytest.raises(OSError, match="No space left") as caught:
        LineBuffer(path, 4096)
    assert caught.value.errno == errno.ENOSPC
    assert not path.exists()


WRITER = """
import os, sys
from pathlib import Path
from edge.journal.buffer import LineBuffer
buffer = LineBuffer(Path(sys.argv[1]), 2**16)
number = 0
while True:
    line = b"%d %s\\n" % (number, b"x" * (number % 700))
    if not buffer.put(line):
        buffer.clear(number)
        buffer.put(line)
    number += 1
    os.write(1, b"%d\\n" % number)
"""


@pytest.mark.parametrize("count", [1, 100, 3000])
def test_killed_process_leaves_all_that_it_had_put(path: Path, count: int) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(count)]
        process.send_signal(signal.SIGKILL)
        told += process.stdout.readlines()
    number = len([line for line in told if line.endswith(b"\n")])  # lines that were told to be put
    left = left_lines(path)
    assert left is not None
    numbers = [int(line.split(b" ")[0]) for line in left.lines.splitlines()]
    assert numbers == list(range(left.offset, left.offset + len(numbers)))
    assert left.offset + len(numbers) in (number, number + 1)
