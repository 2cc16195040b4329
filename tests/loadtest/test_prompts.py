"""Prompts from files: the formats that others write, and what is wrong with a line."""

from pathlib import Path

import pytest

from loadtest.dialects import text_of
from loadtest.prompts import Prompts, read
from loadtest.workload import Turn


def written(tmp_path: Path, *lines: str, name: str = "p.jsonl") -> Prompts:
    path = tmp_path / name
    path.write_text("\n".join(lines))
    return read(path, 64)


def text(turn: Turn) -> str:
    return text_of(turn.messages[0])


def test_texts_and_chats_say_what_is_asked_and_how_long_it_may_be(tmp_path: Path) -> None:
    told = written(
        tmp_path,
        '{"prompt": "one", "output_tokens": 5}',
        '{"text": "two", "model": "another"}',
        '{"messages": [{"role": "user", "content": "three"}], "max_tokens": 7, "temperature": 0, "stream": true}',
        '{"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": '
        '[{"role": "user", "content": "four"}], "max_completion_tokens": 8}}',
        "",
        '{"input": ["five", "six"]}',
    )
    turns = [told.conversation(number)[0] for number in range(5)]
    assert [text(turn) for turn in turns] == ["one", "two", "three", "four", "five"]
    assert [turn.output_len for turn in turns] == [5, 64, 7, 8, 64]
    assert turns[2].members == {"temperature": 0}
    assert len(turns[4].messages) == 2
    assert told.conversation(5) == told.conversation(0)
    assert told.times() is None


def test_conversations_come_as_turns_as_sharegpt_has_them_and_by_session(tmp_path: Path) -> None:
    told = written(
        tmp_path,
        '{"turns": ["a", {"text": "b", "delay": 250, "output_length": 3}]}',
        '{"id": "x", "conversations": [{"from": "human", "value": "c"}, {"from": "gpt", "value": "no"}, '
        '{"from": "human", "value": "d"}]}',
        '{"session_id": "s", "timestamp": 1000, "prompt": "e"}',
        '{"session_id": "s", "delay": 500, "prompt": "f"}',
    )
    assert len(told.conversations) == 3
    said = [[(text(turn), turn.delay_s, turn.output_len) for turn in told.conversation(at)] for at in range(3)]
    assert said == [
        [("a", 0, 64), ("b", 0.25, 3)],
        [("c", 0, 64), ("d", 0, 64)],
        [("e", 0, 64), ("f", 0.5, 64)],
    ]


def test_a_trace_of_mooncake_has_its_times_lengths_and_shared_blocks(tmp_path: Path) -> None:
    told = written(
        tmp_path,
        '{"timestamp": 27000, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 2353]}',
        '{"timestamp": 30500, "input_length": 700, "output_length": 26, "hash_ids": [46, 48]}',
    )
    first, second = [told.conversation(number)[0] for number in range(2)]
    assert (first.output_len, second.output_len) == (52, 26)
    words = [text(each).split() for each in (first, second)]
    assert [len(each) for each in words] == [1100, 700]
    assert words[0][:512] == words[1][:512]
    assert words[0][512:520] != words[1][512:520]
    assert told.times() == [0.0, 3.5]
    assert told.times(speed=2) == [0.0, 1.75]


def test_a_trace_of_azure_has_its_times_and_lengths_and_texts_that_share_nothing(tmp_path: Path) -> None:
    told = written(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens\r",
        "2023-11-16 18:17:03.9799600,4808,10\r",
        "2023-11-16 18:17:04.0319600,110,27\r",
        "2024-05-10 00:00:00.009930+00:00,3,1\r",
        name="code.csv",
    )
    turns = [told.conversation(number)[0] for number in range(3)]
    assert [(len(text(turn).split()), turn.output_len) for turn in turns] == [(4808, 10), (110, 27), (3, 1)]
    assert len({text(turn)[:12] for turn in turns}) > 1
    times = told.times()
    assert times is not None
    assert times[:2] == [0.0, pytest.approx(0.052)]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([], "there is no prompt"),
        (["{"], "line 1 is no JSON object"),
        (["[]"], "line 1 is no JSON object"),
        (['{"prompt": "a"}', '{"question": "b"}'], "line 2: write .prompt"),
        (['{"prompt": 7}'], "line 1: write"),
        (['{"messages": []}'], "line 1: .*role"),
        (['{"messages": ["a"]}'], "line 1: write"),
        (['{"turns": []}'], "line 1: .*nobody"),
        (['{"input_length": 100, "hash_ids": [1, 2]}'], "too short for 2 blocks"),
    ],
)
def test_a_line_that_means_nothing_is_named(tmp_path: Path, lines: list[str], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        written(tmp_path, *lines)


def test_a_row_that_means_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 2: write TIMESTAMP"):
        written(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens", "yesterday,1,2", name="a.csv")


def test_times_that_are_missing_or_go_back_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 lines have no timestamp"):
        written(tmp_path, '{"prompt": "a", "timestamp": 1}', '{"prompt": "b"}').times()
    with pytest.raises(ValueError, match="go back"):
        written(tmp_path, '{"prompt": "a", "timestamp": 2}', '{"prompt": "b", "timestamp": 1}').times()
