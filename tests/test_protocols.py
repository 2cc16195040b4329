"""How each protocol words an error, an error event and a heartbeat."""

import json
from typing import Any

import pytest

from edge.errors import BrokenStream, EdgeError, RateLimited
from edge.protocols import MESSAGES, NOTHING_BEGUN, OPENAI, RESPONSES, Begun, Protocol
from edge.sse import EVENT_ENDS
from tests.test_errors import ALL

PROTOCOLS = {"openai": OPENAI, "messages": MESSAGES, "responses": RESPONSES}


def data_of(event: bytes) -> Any:
    *_, data = event.strip().split(b"\n")
    return json.loads(data.removeprefix(b"data: "))


@pytest.mark.parametrize("kind", ALL)
def test_openais_error_has_the_shape_that_every_generation_of_its_sdks_parses(kind: type[EdgeError]) -> None:
    error = kind('a "message"\n模型', param="model")
    said = {"error": {"message": 'a "message"\n模型', "type": kind.kind, "param": "model", "code": kind.code}}
    for protocol in (OPENAI, RESPONSES):
        assert json.loads(protocol.error_body(error, "req_1")) == said
    assert data_of(OPENAI.error_event(error, "req_1", NOTHING_BEGUN)) == said


@pytest.mark.parametrize("kind", ALL)
def test_anthropics_error_has_its_type_by_status(kind: type[EdgeError]) -> None:
    """docs.anthropic.com, "Errors"."""
    expected = {
        400: "invalid_request_error", 401: "authentication_error", 402: "billing_error", 403: "permission_error",
        404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
        504: "timeout_error",
    }.get(kind.status, "invalid_request_error" if kind.status < 500 else "api_error")  # fmt: skip
    body = json.loads(MESSAGES.error_body(kind("words"), "req_1"))
    assert body.pop("request_id") == "req_1"
    assert body["type"] == "error"
    assert list(body) == ["type", "error"]
    assert list(body["error"]) == ["type", "message"]
    assert body["error"]["type"] == expected
    assert body["error"]["message"].startswith("words")
    assert ("529" in body["error"]["message"]) == (kind.status == 503)


def test_anthropics_event_is_named_error_since_its_sdks_skip_any_other() -> None:
    event = MESSAGES.error_event(BrokenStream("words"), "req_1", NOTHING_BEGUN)
    assert event.startswith(b"event: error\ndata: ")
    assert event.removeprefix(b"event: error\ndata: ").strip() == MESSAGES.error_body(BrokenStream("words"), "req_1")


@pytest.mark.parametrize(
    ("begun", "number"),
    [(Begun("resp_1", 5.0, "m", 7), 8), (Begun("resp_1", 5.0, "m", None), None), (NOTHING_BEGUN, 0)],
)
def test_failed_response_comes_in_sequence_with_the_errors_words(begun: Begun, number: int | None) -> None:
    event = RESPONSES.error_event(BrokenStream("words"), "req_1", begun)
    assert event.startswith(b"event: response.failed\ndata: ")
    data = data_of(event)
    assert data["type"] == "response.failed"
    assert data.get("sequence_number") == number
    response = data["response"]
    assert (response["status"], response["error"]) == ("failed", {"code": "server_error", "message": "words"})
    assert (response["id"], response["created_at"], response["model"]) == (
        begun.response_id or "resp_req_1", begun.created_at, begun.model
    )  # fmt: skip
    assert data["error"]["message"] == "words"  # without it OpenAI's SDKs raise nothing


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RateLimited("x"), "rate_limit_exceeded"),
        (RateLimited("x", code="context_length_exceeded"), "context_length_exceeded"),
        *(
            (kind("x"), "invalid_prompt" if kind.status in (400, 413, 422) else "server_error")
            for kind in ALL
            if kind.status not in (402, 429)
        ),
    ],
)
def test_failed_response_has_a_code_that_clients_of_the_api_act_on(error: EdgeError, code: str) -> None:
    data = data_of(RESPONSES.error_event(error, "req_1", NOTHING_BEGUN))
    assert data["response"]["error"]["code"] == code
    assert data["error"]["code"] == error.error_code


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_every_event_of_ours_ends_as_events_do(protocol: Protocol) -> None:
    for event in (protocol.heartbeat, protocol.error_event(BrokenStream("x"), "r", NOTHING_BEGUN)):
        assert event.endswith(EVENT_ENDS)
        assert b"\r" not in event
        assert event.find(b"\n\n") == len(event) - 2


def test_heartbeat_is_a_comment_but_for_anthropics_ping() -> None:
    assert OPENAI.heartbeat == RESPONSES.heartbeat == b": keep-alive\n\n"
    assert MESSAGES.heartbeat == b'event: ping\ndata: {"type": "ping"}\n\n'


def test_request_id_is_in_the_header_that_each_sdk_reads() -> None:
    assert OPENAI.id_lines("req_1") == b"x-request-id: req_1\r\n"
    assert MESSAGES.id_lines("req_1") == b"request-id: req_1\r\nx-request-id: req_1\r\n"
