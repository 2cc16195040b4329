"""How each API is asked, and what whole answers say. Its streams are read in test_answer.py."""

import pytest

from loadtest.dialects import DIALECTS

SYSTEM = {"role": "system", "content": "be brief"}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
USER = {"role": "user", "content": [{"type": "text", "text": "what is it?"}, PICTURE]}


def test_a_conversation_is_written_as_each_api_has_it() -> None:
    def asked(kind: str) -> dict[str, object]:
        return DIALECTS[kind].ask("m", [SYSTEM, USER], 9, True)

    assert asked("chat")["messages"] == [SYSTEM, USER]
    assert asked("completions")["prompt"] == "be brief\nwhat is it?"
    messages = asked("messages")
    assert messages["system"] == "be brief"
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    assert messages["messages"] == [
        {"role": "user", "content": [USER["content"][0], {"type": "image", "source": source}]}
    ]
    assert messages["max_tokens"] == 9
    responses = asked("responses")
    assert responses["max_output_tokens"] == 9
    text = {"type": "input_text", "text": "what is it?"}
    picture = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
    assert responses["input"] == [SYSTEM, {"role": "user", "content": [text, picture]}]
    assert DIALECTS["embeddings"].ask("m", [SYSTEM], 0, False)["input"] == "be brief"


def test_messages_always_say_how_long_an_answer_may_be() -> None:
    assert DIALECTS["messages"].ask("m", [SYSTEM, USER], 0, False)["max_tokens"] > 0
    assert "max_tokens" not in DIALECTS["chat"].ask("m", [USER], 0, False)


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("chat", {"choices": [{"message": {"content": "Hi"}}], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}),
        ("completions", {"choices": [{"text": "Hi"}], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}),
        ("messages", {"content": [{"type": "text", "text": "Hi"}], "usage": {"input_tokens": 3, "output_tokens": 1}}),
        (
            "responses",
            {"output": [{"content": [{"text": "Hi"}]}], "usage": {"input_tokens": 3, "output_tokens": 1}},
        ),
    ],
)
def test_a_whole_answer_says_its_text_and_its_usage_under_the_same_names(kind: str, answer: dict[str, object]) -> None:
    said = DIALECTS[kind].answer(answer)
    assert (said.is_choice, said.text, said.is_error) == (True, "Hi", False)
    assert said.usage == {"prompt_tokens": 3, "completion_tokens": 1}


def test_an_anthropic_key_goes_where_its_sdk_puts_it() -> None:
    assert DIALECTS["messages"].headers("sk")["x-api-key"] == "sk"
    assert DIALECTS["responses"].headers("sk") == {"Authorization": "Bearer sk"}
