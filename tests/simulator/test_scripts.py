"""Texts with what breaks naive readers, frames that are counted, and the bytes of events and chunks."""

from edge.simulator.questions import Question
from edge.simulator.scripts import Script, answer_text, data, event, events, http_chunk, pieces, spaced_data


def question(tokens: int, **members: object) -> Question:
    return Question("vllm", "m", tokens, "stop", 12, **members)


def test_text_has_chinese_quotes_and_newlines_that_json_must_escape() -> None:
    """What breaks naive readers of streams is in the text by default."""
    text = answer_text(16)
    assert "你好" in text
    assert '"' in text
    assert "\n\n" in text


def test_events_are_written_compactly_but_for_errors_of_python() -> None:
    value = {"type": "a", "b": "你"}
    assert data(value) == 'data: {"type":"a","b":"你"}\n\n'.encode()
    assert event(value) == 'event: a\ndata: {"type":"a","b":"你"}\n\n'.encode()
    assert spaced_data(value) == b'data: {"type": "a", "b": "\\u4f60"}\n\n'


def test_chunk_tells_its_length_in_hexadecimal() -> None:
    assert http_chunk(b"x" * 26) == b"1a\r\n" + b"x" * 26 + b"\r\n"


def test_frames_with_content_count_one_token_each_behind_the_lead() -> None:
    script = events([b""] * 7, question(3), lead=2)
    assert [script.tokens_in(sent) for sent in range(8)] == [0, 0, 0, 1, 2, 3, 3, 3]


def test_document_has_all_of_its_tokens_once_it_is_sent() -> None:
    script = Script("application/json", (b"{}",), tokens=3)
    assert [script.tokens_in(sent) for sent in (0, 1)] == [0, 3]


def test_uneven_pieces_hold_the_same_text_and_are_counted() -> None:
    asked = question(10, uneven=True)
    said = pieces(asked, empty=True)
    assert "".join(text for text, _ in said) == answer_text(10)
    assert [behind for _, behind in said] == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    script = events([b""] * 20, asked, lead=1, said=said)
    assert [script.tokens_in(1 + sent) for sent in range(10)] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]


def test_pieces_of_several_choices_are_counted_in_turns() -> None:
    asked = question(6, uneven=True, n=2)
    script = events([b""] * 20, asked, lead=0, said=pieces(asked))
    assert script.counts == (2, 4, 5, 6, 7, 8, 10, 12)
