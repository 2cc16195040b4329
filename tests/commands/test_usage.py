"""`edge usage`: the sums agree with the journal to the token."""

import argparse
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.commands import usage as usage_report
from edge.commands.usage import Row, Wanted, parse_by, parse_time, render, totals
from edge.exchange import End, Principal, Unit, Usage, UsageSource
from edge.journal.journal import Journal
from tests.profiles import examples
from tests.records import STARTED_AT, close, ends_of, journal_files, opened

NOW = 1_763_000_000.25
DAY_S = 86_400
COUNTED = ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens")
UNITS = get_args(Unit)

counts = st.integers(0, 10**9)
usages = st.builds(Usage, counts, counts, counts, counts, counts, st.sampled_from(UsageSource), st.sampled_from(UNITS))
requests = st.fixed_dictionaries(
    {
        "principal": st.builds(Principal, st.sampled_from(["key_1", "key_2"]), st.sampled_from(["u-a", "u-b", "u-c"])),
        "model": st.sampled_from(["public/a", "public/b", "u-a/模型"]),
        "started_at": st.integers(0, 4 * DAY_S * 1000).map(lambda ms: NOW + (ms + 0.5) / 1000),
        "usage": usages,
        "end": st.sampled_from(End),
        "crashes": st.booleans(),
    }
)


def record(directory: Path, made: list[dict[str, Any]], rotate_bytes: int = 3000) -> None:
    """Write requests; those that crash have no usage."""
    journal = Journal(directory, rotate_bytes, "serve")
    for facts in made:
        exchange = opened(journal, principal=facts["principal"], model=facts["model"], started_at=facts["started_at"])
        if not facts["crashes"]:
            close(journal, exchange, usage=facts["usage"], end=facts["end"])
    journal.close()  # what is open is ended as crashed by the next start
    Journal(directory, rotate_bytes, "serve").close()


NAME: dict[usage_report.By, Callable[[dict[str, Any]], str]] = {
    "key": lambda facts: facts["principal"].id,
    "user": lambda facts: facts["principal"].user,
    "model": lambda facts: facts["model"],
    "region": lambda facts: "",
    "month": lambda facts: datetime.fromtimestamp(facts["started_at"], UTC).strftime("%Y-%m"),
    "day": lambda facts: datetime.fromtimestamp(facts["started_at"], UTC).strftime("%Y-%m-%d"),
    "hour": lambda facts: datetime.fromtimestamp(facts["started_at"], UTC).strftime("%Y-%m-%dT%H"),
}


@examples(50)
@given(st.lists(requests, max_size=30), st.sampled_from(list(NAME)))
def test_sums_agree_with_what_was_recorded(
    tmp_path_factory: pytest.TempPathFactory, made: list[dict[str, Any]], by: usage_report.By
) -> None:
    directory = tmp_path_factory.mktemp("usage")
    record(directory, made)
    found = totals(directory, (by,))
    assert found.unreadable == 0
    expected: dict[str, Counter[str]] = {}
    for facts in made:
        sums = expected.setdefault(NAME[by](facts), Counter())
        usage: Usage = Usage() if facts["crashes"] else facts["usage"]
        sums.update({name: getattr(usage, name) or 0 for name in COUNTED})
        sums[usage.unit or "images"] += usage.units
        sums["requests"] += 1
        sums["crashed"] += facts["crashes"]
        sums["estimated"] += usage.source is UsageSource.ESTIMATED
    names = [*COUNTED, *UNITS, "requests", "crashed", "estimated"]
    assert {row.names[0]: {name: getattr(row, name) for name in names} for row in found.rows} == {
        name: {each: sums[each] for each in names} for name, sums in expected.items()
    }
    records = ends_of(directory).values()
    for name in COUNTED:
        assert sum(getattr(row, name) for row in found.rows) == sum(each[name] for each in records)
    for unit in UNITS:
        of_kind = sum(each["units"] for each in records if each["unit"] == unit)
        assert sum(getattr(row, unit) for row in found.rows) == of_kind
    shutil.rmtree(directory)


@examples(50)
@given(st.lists(requests, max_size=30), st.integers(-1000, 5 * DAY_S * 1000))
def test_every_request_is_before_a_time_or_from_it_on(
    tmp_path_factory: pytest.TempPathFactory, made: list[dict[str, Any]], offset_ms: int
) -> None:
    directory = tmp_path_factory.mktemp("usage")
    record(directory, made)
    at = NOW + offset_ms / 1000
    before = totals(directory, ("user",), Wanted(until=at)).rows
    after = totals(directory, ("user",), Wanted(at)).rows
    assert sum(row.requests for row in before) == sum(facts["started_at"] < at for facts in made)
    assert sum(row.requests for row in after) == sum(facts["started_at"] >= at for facts in made)
    shutil.rmtree(directory)


def test_units_of_before_they_had_a_kind_are_images_and_those_of_no_known_kind_are_said(tmp_path: Path) -> None:
    record(tmp_path, [REQUEST])
    [path] = journal_files(tmp_path)
    line = path.read_bytes().splitlines(keepends=True)[-1]
    assert b'"units":1,"unit":"images"' in line
    path.write_bytes(line.replace(b',"unit":"images"', b"") + line.replace(b'"images"', b'"bananas"'))
    found = totals(tmp_path, ("user",))
    assert ([(row.images, row.requests) for row in found.rows], found.unreadable) == ([(1, 1)], 1)


def test_file_that_ended_long_before_is_not_read(tmp_path: Path) -> None:
    """What `--since 24h` costs does not grow with the years."""
    record(tmp_path, [{**REQUEST, "started_at": NOW}])
    [path] = journal_files(tmp_path)
    os.utime(path, (NOW, NOW))
    path.chmod(0)
    read: list[Path] = []
    real = Path.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *mode: (read.append(path), real(path, *mode))[1])
        assert totals(tmp_path, ("user",), Wanted(NOW + 2 * DAY_S)).rows == []
        assert read == []
        assert len(totals(tmp_path, ("user",), Wanted(NOW - 1)).rows) == 1


REQUEST: dict[str, Any] = {
    "principal": Principal("key_1", "u-a"), "model": "public/a", "started_at": STARTED_AT,
    "usage": Usage(100, 20, 5, 3, 1, UsageSource.ESTIMATED, "images"), "end": End.COMPLETE, "crashes": False,
}  # fmt: skip


def test_request_that_runs_does_not_count_and_a_line_that_is_being_written_is_no_fault(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 2**20, "serve")
    opened(journal)
    os.write(journal._file._descriptor, b'{"id":"x","tim')
    found = totals(tmp_path, ("user",))
    assert (found.rows, found.unreadable) == ([], 0)
    journal.close()


@pytest.mark.parametrize("rubbish", [b"\0" * 99, b"[" * 100_000, b"[]", b"\xff", b'{"time":7,"end":"complete"}'])
def test_lines_that_cannot_be_read_are_counted_and_said(
    tmp_path: Path, rubbish: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, [REQUEST])
    [path] = journal_files(tmp_path)
    path.write_bytes(rubbish + b"\n" + path.read_bytes() + rubbish + b"\n")
    found = totals(tmp_path, ("user",))
    assert ([row.requests for row in found.rows], found.unreadable) == ([1], 2)
    assert usage_report.main(tmp_path, parse()) == 0
    printed = capsys.readouterr()
    assert "2 lines cannot be read" in printed.err
    assert "u-a" in printed.out


def test_what_is_no_file_is_passed_over_and_said(tmp_path: Path) -> None:
    """To open a FIFO would wait for its other end."""
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").mkdir()
    (tmp_path / "c.jsonl").symlink_to("nowhere")
    found = totals(tmp_path, ("user",), Wanted(0.0))
    assert (found.rows, found.unreadable) == ([], 3)


def test_largest_comes_first_but_days_come_in_order(tmp_path: Path) -> None:
    made = [
        {**REQUEST, "principal": Principal("k", user), "usage": Usage(tokens), "started_at": NOW - number * DAY_S}
        for number, (user, tokens) in enumerate([("u-b", 5), ("u-a", 5), ("u-c", 9)])
    ]
    record(tmp_path, made)
    assert [row.names[0] for row in totals(tmp_path, ("user",)).rows] == ["u-c", "u-a", "u-b"]
    days = [row.names[0] for row in totals(tmp_path, ("day",)).rows]
    assert days == ["2025-11-11", "2025-11-12", "2025-11-13"]


def test_table_is_aligned_and_ends_in_a_total() -> None:
    rows = [Row(("u-1100",), 3, 1_000_000, 20, 7, 0, 0, 9, 40, 1, 0), Row(("",), 1, 5, 5, 0, 0, 2, 1, 0, 0, 1)]
    assert render(rows, ("user",)).splitlines() == [
        "USER    REQUESTS   PROMPT  COMPLETION  CACHED  REASONING  IMAGES  SECONDS  CHARACTERS  ESTIMATED  CRASHED",
        "u-1100         3  1000000          20       7          0       0        9          40          1        0",
        "-              1        5           5       0          0       2        1           0          0        1",
        "TOTAL          4  1000005          25       7          0       2       10          40          1        1",
    ]


def test_name_that_a_client_made_up_writes_nothing_on_the_terminal() -> None:
    assert "\x1b" not in render([Row(("\x1b[2J",))], ("model",))
    assert "模型" in render([Row(("模型",))], ("model",))


# --- times


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("24h", NOW - DAY_S),
        ("30d", NOW - 30 * DAY_S),
        ("90s", NOW - 90),
        ("2025-11-13", 1_762_992_000.0),
        ("2025-11-13T02:13:20.25Z", NOW),
        ("2025-11-13T10:13:20.25+08:00", NOW),
        ("2025-11-13T02:13:20.25", NOW),
    ],
)
def test_time_is_a_duration_a_day_or_a_moment(text: str, at: float) -> None:
    assert parse_time(text, NOW) == at


@pytest.mark.parametrize("text", ["", "yesterday", "24", "-1h", "2025-13-01", "2025-11-13T25:00:00Z", "now"])
def test_anything_else_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(ValueError, match="write 24h, 2026-11-25 or 2026-11-25T03:10:00Z"):
        parse_time(text, NOW)


# --- the command


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    usage_report.add_arguments(parser)
    return parser.parse_args(arguments)


def test_json_is_an_array_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, [REQUEST, REQUEST])
    assert usage_report.main(tmp_path, parse("--json", "--by", "key", "--since", "2025-11-13")) == 0
    assert json.loads(capsys.readouterr().out) == [
        {
            "key": "key_1", "requests": 2, "prompt_tokens": 200, "completion_tokens": 40, "cached_tokens": 10,
            "reasoning_tokens": 6, "images": 2, "seconds": 0, "characters": 0, "estimated": 2, "crashed": 0,
        }
    ]  # fmt: skip
    assert usage_report.main(tmp_path, parse("--json", "--until", "2025-11-13")) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_wrong_time_is_wrong_usage_and_says_what_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--since", "soon")
    assert caught.value.code == 2
    assert "'soon' is no time: write 24h" in capsys.readouterr().err


def test_journal_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no journal in .*nowhere"):
        usage_report.main(tmp_path / "nowhere", parse())


def test_rows_of_several_names_are_of_each_combination_and_add_up_to_those_of_one(tmp_path: Path) -> None:
    made = [
        {**REQUEST, "principal": Principal(key, user), "model": model, "started_at": NOW + hour * 3600}
        for key, user in (("key_1", "u-a"), ("key_2", "u-a"), ("key_3", "u-b"))
        for model in ("public/a", "public/b")
        for hour in range(30)
    ]
    record(tmp_path, made, 2**20)
    rows = totals(tmp_path, ("key", "model", "day")).rows
    assert [row.names for row in rows] == sorted(row.names for row in rows)
    assert len(rows) == 3 * 2 * 2
    assert sum(row.requests for row in rows) == len(made)
    assert len(totals(tmp_path, ("hour",)).rows) == 30
    assert [row.names for row in totals(tmp_path, ("month", "user")).rows] == [("2025-11", "u-a"), ("2025-11", "u-b")]
    assert [row.names for row in totals(tmp_path, ("key",), Wanted(user="u-a")).rows] == [("key_1",), ("key_2",)]
    [row] = totals(tmp_path, ("user",), Wanted(key="key_3", since=NOW + 29 * 3600 - 1)).rows
    assert (row.names, row.requests) == (("u-b",), 2)


def test_csv_has_a_head_and_a_line_for_each_row_and_no_formula(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sheet runs what begins with an equals sign, and a model's name is what a client wrote."""
    record(tmp_path, [REQUEST, {**REQUEST, "model": "=1+1", "usage": Usage()}])
    assert usage_report.main(tmp_path, parse("--csv", "--by", "model,day")) == 0
    assert capsys.readouterr().out.splitlines() == [
        "model,day,requests,prompt_tokens,completion_tokens,cached_tokens,reasoning_tokens,images,seconds,characters,"
        "estimated,crashed",
        "'=1+1,2025-11-13,1,0,0,0,0,0,0,0,0,0",
        "public/a,2025-11-13,1,100,20,5,3,1,0,0,1,0",
    ]


@pytest.mark.parametrize("text", ["", "keys", "key,key", "key, day", "key,"])
def test_what_no_row_can_be_of_is_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(ValueError, match="one or more of key, user, model, region, month, day, hour"):
        parse_by(text)


def test_region_stands_in_each_record_and_lines_of_before_have_none(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 2**20, "serve", region="cn-sh")
    close(journal, opened(journal))
    opened(journal)
    journal.close()
    Journal(tmp_path, 2**20, "serve").close()  # which ends the other one as crashed
    assert {each["region"] for each in ends_of(tmp_path).values()} == {"cn-sh"}
    [path] = journal_files(tmp_path)
    before = path.read_bytes().replace(b',"region":"cn-sh"', b"").replace(b'{"v":2,', b'{"v":1,')
    path.with_name("20251112T000000Z-0123456789abcdef.0001.jsonl").write_bytes(before)
    found = totals(tmp_path, ("region",))
    assert [(row.names, row.requests) for row in found.rows] == [(("",), 2), (("cn-sh",), 2)]
    assert found.unreadable == 0
