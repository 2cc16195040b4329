"""What is sent."""

from typing import Any

import orjson

from loadtest.dialects import DIALECTS, text_of
from loadtest.pictures import Picture
from loadtest.workload import SCENARIOS, Made, Same, numbered, raw_request


def test_every_scenario_is_a_request_of_its_size_that_says_what_it_wants() -> None:
    for scenario in SCENARIOS.values():
        asked = orjson.loads(scenario.body("m", {"seed": 7}))
        if isinstance(said := asked.get("prompt") or asked.get("input") or asked["messages"], list):
            said = said[0]["content"]
        assert len(said) == scenario.input_len
        assert asked["model"] == "m"
        assert asked["seed"] == 7
        assert asked.get("stream", False) is scenario.stream
        assert asked.get("max_tokens", asked.get("max_output_tokens", 0)) == scenario.output_len
        has_usage_anyway = scenario.kind in ("messages", "responses")
        assert (asked.get("stream_options") == {"include_usage": True}) is (scenario.stream and not has_usage_anyway)


def test_a_request_carries_its_length_its_key_and_its_host_under_the_base_path() -> None:
    raw = raw_request("embeddings", b"{}", host="h:1", key="sk-1", base_path="/api/v1")
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /api/v1/embeddings HTTP/1.1"
    assert {b"Host: h:1", b"Authorization: Bearer sk-1", b"Content-Length: 2"} <= set(lines)
    assert body == b"{}"


def test_numbered_requests_differ_at_the_start_of_the_prompt_and_keep_their_length() -> None:
    raw = SCENARIOS["chat"].body("m", {})
    first, second = numbered(raw, 1), numbered(raw, 2)
    assert first != second
    assert len(first) == len(second) == len(raw)
    assert orjson.loads(first)["messages"][0]["content"].startswith("00000001 word")


def first_texts(made: Made, number: int) -> list[str]:
    return [text_of(each) for each in made.conversation(number)[0].messages]


def test_conversations_have_texts_of_their_own_and_share_a_prefix_where_asked() -> None:
    made = Made(SCENARIOS["chat"], seed=1, prefix_len=100, prefixes=2)
    texts = [first_texts(made, number) for number in range(4)]
    assert [len(each) for each in texts[0]] == [100, 200]
    assert texts[0][0] == texts[2][0] != texts[1][0] == texts[3][0]
    assert len({own for _, own in texts}) == 4
    assert first_texts(made, 3) == texts[3]


def test_turns_follow_after_a_time_to_think_and_the_prefix_is_said_once() -> None:
    turns = Made(SCENARIOS["chat"], prefix_len=100, turns=3, think_time_s=2.0).conversation(5)
    assert [len(turn.messages) for turn in turns] == [2, 1, 1]
    assert [turn.delay_s for turn in turns] == [0.0, 2.0, 2.0]
    assert {turn.output_len for turn in turns} == {64}


def test_a_request_of_embeddings_may_have_several_texts() -> None:
    texts = [text for number in range(2) for text in first_texts(Made(SCENARIOS["embeddings"], inputs=3), number)]
    assert len(set(texts)) == 6
    turn = Made(SCENARIOS["embeddings"], inputs=3).conversation(0)[0]
    assert len(DIALECTS["embeddings"].ask("m", turn.messages, 0, False)["input"]) == 3


def test_pictures_are_parts_of_the_message() -> None:
    content: Any = Made(SCENARIOS["chat"], picture=Picture(2, 2), pictures=2).conversation(0)[0].messages[0]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "image_url"]
    assert content[1] != content[2]


def test_the_same_conversation_comes_again_and_again() -> None:
    same = Same(Made(SCENARIOS["chat"]))
    assert same.conversation(0) == same.conversation(7)
