"""Who may write a token's files, and how far they are delivered."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.journal.files import (
    Position,
    TokenLock,
    file_numbers,
    file_path,
    load_position,
    lock_new_token,
    position_path,
    save_position,
    tokens_left,
)
from tests.profiles import examples
from tests.records import TOKEN

NOW = 1_763_000_000.25


def test_tokens_sort_by_the_time_of_their_starts_and_are_never_the_same(tmp_path: Path) -> None:
    locks = [lock_new_token(tmp_path, NOW + second) for second in (0, 0, 1, 60, 86_400)]
    tokens = [lock.token for lock in locks]
    assert len(set(tokens)) == 5
    assert tokens[1:] == sorted(tokens[1:])
    assert tokens_left(tmp_path) == sorted(tokens)
    assert tokens[0].startswith("20251113T021320Z-")
    for lock in locks:
        lock.finish()
    assert list(tmp_path.iterdir()) == []


def test_lock_has_one_owner(tmp_path: Path) -> None:
    lock = lock_new_token(tmp_path, NOW)
    assert TokenLock.take(tmp_path, lock.token) is None
    lock.release()
    lock.release()
    second = TokenLock.take(tmp_path, lock.token)
    assert second is not None
    second.finish()
    assert TokenLock.take(tmp_path, lock.token) is None


def test_lock_that_was_given_up_is_not_removed_by_who_had_it(tmp_path: Path) -> None:
    first = lock_new_token(tmp_path, NOW)
    first.release()
    second = TokenLock.take(tmp_path, first.token)
    assert second is not None
    first.finish()
    assert tokens_left(tmp_path) == [first.token]
    second.release()


def test_lock_that_was_removed_while_it_was_taken_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between `open` and `flock` its owner may have finished the token."""
    owner = lock_new_token(tmp_path, NOW)
    real = os.open

    def open_late(path: Path, flags: int, mode: int) -> int:
        descriptor = real(path, flags, mode)
        owner.finish()
        return descriptor

    monkeypatch.setattr(os, "open", open_late)
    assert TokenLock.take(tmp_path, owner.token) is None


def test_own_lock_that_another_takes_for_a_dead_one_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that starts at the same moment may see the file before it is locked."""
    real = os.open
    thieves: list[TokenLock | None] = []

    def open_early(path: Path, flags: int, mode: int) -> int:
        descriptor = real(path, flags, mode)
        monkeypatch.setattr(os, "open", real)
        thieves.append(TokenLock.take(tmp_path, path.stem))
        return descriptor

    monkeypatch.setattr(os, "open", open_early)
    lock = lock_new_token(tmp_path, NOW)
    [thief] = thieves
    assert thief is not None
    assert thief.token != lock.token
    thief.finish()
    assert tokens_left(tmp_path) == [lock.token]
    lock.finish()


@examples(50)
@given(st.integers(1, 10**6), st.integers(0, 2**50))
def test_position_is_read_as_it_was_saved(tmp_path_factory: pytest.TempPathFactory, number: int, offset: int) -> None:
    directory = tmp_path_factory.getbasetemp()
    save_position(directory, TOKEN, Position(number, offset))
    assert load_position(directory, TOKEN) == (number, offset)
    position_path(directory, TOKEN).unlink()


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 60, b"{}", b'{"file":"x","offset":3}', b'{"file":"' + TOKEN.encode() + b'.0001.jsonl","offset":-1}'],
)
def test_position_that_cannot_be_read_is_not_known(tmp_path: Path, content: bytes) -> None:
    position_path(tmp_path, TOKEN).write_bytes(content)
    assert load_position(tmp_path, TOKEN) is None


def test_files_are_counted_beyond_four_digits_and_others_are_not_seen(tmp_path: Path) -> None:
    for number in (2, 10_000, 9_999, 1):
        file_path(tmp_path, TOKEN, number).touch()
    for name in ("notes.jsonl", f"{TOKEN}.x.jsonl", f"{TOKEN}.0003.jsonl.gz", "x.lock"):
        (tmp_path / name).touch()
    assert file_numbers(tmp_path, TOKEN) == [1, 2, 9_999, 10_000]
    assert tokens_left(tmp_path) == []
