"""The Responses API as each engine serves it: events, ends, failures, and responses that are asked for again."""

from typing import Any

import pytest

from edge.simulator.behaviour import Behaviour
from tests.simulator.asking import DIALECTS, RESPONSES, ask, asked, compact, simulating

LIFE = ["created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta"]
DONE = ["output_text.done", "content_part.done", "output_item.done"]


def names(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


ENDS = [
    ("vllm", 2, "completed", "incomplete", {"reason": "max_output_tokens"}),
    ("vllm", None, "completed", "completed", None),
    ("sglang", 4, "incomplete", "incomplete", {"reason": "max_output_tokens"}),
    ("sglang", None, "completed", "completed", None),
    ("openai", 2, "incomplete", "incomplete", {"reason": "max_output_tokens"}),
    ("openai", None, "completed", "completed", None),
    ("llamacpp", 2, "completed", "completed", None),
]


@pytest.mark.parametrize(("dialect", "limit", "last", "status", "details"), ENDS)
async def test_limit_of_tokens_ends_a_response_as_its_engine_does(
    dialect: Any, limit: int | None, last: str, status: str, details: Any
) -> None:
    """vLLM names its last event the same whatever ended it; SGLang 0.5.23 makes two tokens fewer than allowed."""
    body = {"stream": True} | ({"max_output_tokens": limit} if limit else {})
    answer = await asked(dialect, body, RESPONSES, tokens=2 if limit is None else 16)
    assert names(answer.events) == [*LIFE, *DONE, last]
    response = answer.events[-1]["response"]
    assert (response["status"], response.get("incomplete_details")) == (status, details)
    assert response["usage"]["output_tokens"] == 2
    assert b"[DONE]" not in answer.chunks[-1]


EVENTS = [
    ("vllm", 3, '{"content_index":0,"item_id":ITEM,"output_index":0,"part":{"annotations":[],"text":"",'
                '"type":"output_text","logprobs":[]},"sequence_number":3,"type":"response.content_part.added"}'),
    ("vllm", 4, '{"content_index":0,"delta":" token0","item_id":ITEM,"logprobs":[],"output_index":0,'
                '"sequence_number":4,"type":"response.output_text.delta"}'),
    ("vllm", 6, '{"content_index":0,"item_id":ITEM,"logprobs":[],"output_index":0,"sequence_number":6,'
                '"text":" token0 token1","type":"response.output_text.done"}'),
    ("sglang", 2, '{"item":{"id":ITEM,"content":[],"role":"assistant","status":"in_progress","type":"message",'
                  '"phase":"final_answer"},"output_index":0,"sequence_number":2,"type":"response.output_item.added"}'),
    ("sglang", 3, '{"content_index":0,"item_id":ITEM,"output_index":0,"part":{"annotations":[],"text":"",'
                  '"type":"output_text","logprobs":null},"sequence_number":3,"type":"response.content_part.added"}'),
    ("llamacpp", 0, '{"type":"response.created","response":{"id":RESPONSE,"object":"response",'
                    '"status":"in_progress"}}'),
    ("llamacpp", 4, '{"type":"response.output_text.delta","item_id":ITEM,"delta":" token0"}'),
    ("llamacpp", 7, '{"type":"response.content_part.done","item_id":ITEM,"part":{"type":"output_text",'
                    '"annotations":[],"logprobs":[],"text":" token0 token1"}}'),
    ("openai", 4, '{"type":"response.output_text.delta","content_index":0,"item_id":ITEM,"output_index":0,'
                  '"delta":" token0","logprobs":[],"sequence_number":4}'),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "number", "expected"), EVENTS)
async def test_event_of_a_response_has_the_members_of_its_engine(dialect: Any, number: int, expected: str) -> None:
    """llama.cpp numbers neither events nor items."""
    answer = await asked(dialect, {"stream": True}, RESPONSES, tokens=2)
    item = compact(answer.events[2]["item"]["id"])
    response = compact(answer.events[0]["response"]["id"])
    assert compact(answer.events[number]) == expected.replace("ITEM", item).replace("RESPONSE", response)


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_events_are_named_and_numbered(dialect: Any) -> None:
    answer = await asked(dialect, {"stream": True}, RESPONSES, tokens=3)
    named = [line.removeprefix("event: ") for line in answer.text.splitlines() if line.startswith("event: ")]
    assert named == [event["type"] for event in answer.events]
    numbers = [event.get("sequence_number") for event in answer.events]
    assert numbers == ([None] * 11 if dialect == "llamacpp" else list(range(11)))
    joined = [chunk.count(b"event: ") for chunk in answer.chunks]
    assert joined == ([5, 1, 1, 4] if dialect == "llamacpp" else [1] * 11)


DOCUMENTS = [
    ("vllm", '{"created_at":1763000000,"incomplete_details":null,"instructions":null,"metadata":null,"model":"m",'
             '"object":"response","output":[{"content":[{"annotations":[],"text":" token0","type":"output_text",'
             '"logprobs":null}],"role":"assistant","status":"completed","type":"message","phase":null}],'
             '"parallel_tool_calls":true,"temperature":1.0,"tool_choice":"none","tools":[],"top_p":1.0,'
             '"background":false,"max_output_tokens":9,"max_tool_calls":null,"previous_response_id":null,'
             '"prompt":null,"reasoning":null,"service_tier":"auto","status":"completed","text":null,'
             '"top_logprobs":null,"truncation":"disabled","usage":{"input_tokens":12,"input_tokens_details":'
             '{"cached_tokens":0,"cache_write_tokens":0,"input_tokens_per_turn":[],"cached_tokens_per_turn":[]},'
             '"output_tokens":1,"output_tokens_details":{"reasoning_tokens":0,"tool_output_tokens":0,'
             '"output_tokens_per_turn":[],"tool_output_tokens_per_turn":[]},"total_tokens":13},"user":null,'
             '"presence_penalty":0.0,"frequency_penalty":0.0,"kv_transfer_params":null,"ec_transfer_params":null,'
             '"input_messages":null,"output_messages":null}'),
    ("sglang", '{"object":"response","created_at":1763000000,"model":"m","output":[{"content":[{"annotations":[],'
               '"text":" token0","type":"output_text","logprobs":null}],"role":"assistant","status":"completed",'
               '"type":"message","phase":"final_answer"}],"status":"completed","usage":{"input_tokens":12,'
               '"input_tokens_details":{"cached_tokens":0,"cache_write_tokens":0},"output_tokens":1,'
               '"output_tokens_details":{"reasoning_tokens":0},"total_tokens":13},"parallel_tool_calls":true,'
               '"tool_choice":"auto","tools":[],"error":null,"incomplete_details":null,"instructions":null,'
               '"max_output_tokens":9,"previous_response_id":null,"reasoning":{"effort":null,"summary":null},'
               '"store":true,"temperature":null,"text":{"format":{"type":"text"}},"top_p":null,'
               '"truncation":"disabled","user":null,"metadata":{}}'),
    ("llamacpp", '{"completed_at":1763000000,"created_at":1763000000,"model":"/models/simulated.gguf",'
                 '"object":"response","output":[{"content":[{"type":"output_text","annotations":[],"logprobs":[],'
                 '"text":" token0"}],"role":"assistant","status":"completed","type":"message"}],"status":"completed",'
                 '"usage":{"input_tokens":12,"output_tokens":1,"total_tokens":13,"input_tokens_details":'
                 '{"cached_tokens":0}}}'),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "expected"), DOCUMENTS)
async def test_response_has_the_members_of_its_engine(dialect: Any, expected: str) -> None:
    answer = await asked(dialect, {"model": "m", "max_output_tokens": 9}, RESPONSES, tokens=1)
    response = answer.json
    response.pop("id")
    response["output"][0].pop("id")
    assert compact(response) == expected


# --- Failures


async def test_sglang_ends_a_failed_response_part_by_part_and_tells_what_was_used() -> None:
    answer = await asked("sglang", {"stream": True}, RESPONSES, fault="error_mid", after=6, status=503)
    assert names(answer.events) == [*LIFE, *DONE, "failed"]
    assert [event["sequence_number"] for event in answer.events] == list(range(10))
    failed = answer.events[-1]["response"]
    assert failed["error"] == {"code": "server_error", "message": "The simulated engine failed with status 503."}
    assert failed["usage"]["output_tokens"] == 2
    assert failed["output"][0]["content"][0]["text"] == answer.events[6]["text"] == " token0 token1"


async def test_sglang_has_begun_a_response_before_it_can_fail() -> None:
    answer = await asked("sglang", {"stream": True}, RESPONSES, fault="error_first")
    assert names(answer.events) == ["created", "in_progress", "failed"]
    assert answer.events[-1]["response"]["usage"]["output_tokens"] == 0


@pytest.mark.parametrize(
    ("dialect", "after", "tail"),
    [
        ("llamacpp", 2, 'data: {"error":{"code":500,"message":"FAILED","type":"server_error"}}\n\n'),
        ("openai", 6, 'event: error\ndata: {"type":"error","sequence_number":6,"code":"server_error",'
                      '"message":"FAILED","param":null}\n\n'),
        ("vllm", 6, 'event: error\ndata: {"type":"error","sequence_number":6,"code":"server_error",'
                    '"message":"FAILED","param":null}\n\n'),
    ],
)  # fmt: skip
async def test_response_that_fails_ends_with_the_error_of_its_engine(dialect: Any, after: int, tail: str) -> None:
    """llama.cpp's has no name, as in its streams of chat."""
    answer = await asked(dialect, {"stream": True}, RESPONSES, fault="error_mid", after=after)
    said = tail.replace("FAILED", "The simulated engine failed with status 500.")
    assert b"".join(answer.chunks[after:]).decode() == said


async def test_error_of_sglang_is_nested_on_this_path() -> None:
    answer = await asked("sglang", {"model": "other"}, RESPONSES, served=("mine",))
    error = {"message": "The model 'other' does not exist", "type": "invalid_request_error", "param": "model"}
    assert (answer.status, answer.json) == (404, {"error": error | {"code": 404}})


# --- Responses that were made before

MISSING = {
    "message": "Response with id 'resp_nope' not found.",
    "type": "invalid_request_error",
    "param": "response_id",
    "code": 404,
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("dialect", ["vllm", "sglang", "openai"])
async def test_response_can_be_asked_for_again(dialect: Any, stream: bool) -> None:
    async with simulating(Behaviour(dialect=dialect)) as simulator:
        made = await ask(simulator, {"model": "m", "stream": stream}, RESPONSES)
        response = made.events[-1]["response"] if stream else made.json
        again = await ask(simulator, b"", f"{RESPONSES}/{response['id']}", method="GET")
        assert (again.status, again.json) == (200, response)
        body = {"model": "m", "previous_response_id": response["id"]}
        assert (await ask(simulator, body, RESPONSES)).json["previous_response_id"] == response["id"]


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
async def test_response_that_is_unknown_is_404(dialect: Any) -> None:
    async with simulating(Behaviour(dialect=dialect)) as simulator:
        for method, path in (("GET", "resp_nope"), ("POST", "resp_nope/cancel")):
            answer = await ask(simulator, b"", f"{RESPONSES}/{path}", method=method)
            assert (answer.status, answer.error) == (404, MISSING)
        answer = await ask(simulator, {"previous_response_id": "resp_nope"}, RESPONSES)
        assert (answer.status, answer.error) == (404, MISSING)


@pytest.mark.parametrize(
    ("dialect", "method", "action", "status", "said"),
    [
        ("vllm", "POST", "/cancel", 400, "Cannot cancel a synchronous response."),
        ("vllm", "DELETE", "", 405, "Method Not Allowed"),
        ("vllm", "GET", "/cancel", 405, "Method Not Allowed"),
        ("vllm", "GET", "/other", 404, "Not Found"),
        ("sglang", "POST", "/cancel", 200, '"status":"completed"'),
        ("sglang", "DELETE", "", 405, "Method Not Allowed"),
        ("openai", "POST", "/cancel", 400, "Cannot cancel a synchronous response."),
        ("openai", "DELETE", "", 200, '"deleted":true'),
        ("llamacpp", "GET", "", 404, "File Not Found"),
        ("llamacpp", "POST", "/cancel", 404, "File Not Found"),
    ],
)
async def test_what_can_be_done_with_a_response_is_up_to_the_engine(
    dialect: Any, method: str, action: str, status: int, said: str
) -> None:
    """Only OpenAI deletes; llama.cpp keeps none."""
    async with simulating(Behaviour(dialect=dialect)) as simulator:
        response_id = (await ask(simulator, {}, RESPONSES)).json["id"]
        path = f"{RESPONSES}/{response_id}"
        answer = await ask(simulator, b"", path + action, method=method)
        assert answer.status == status
        assert said in answer.text
        if method == "DELETE" and status == 200:
            assert (await ask(simulator, b"", path, method="GET")).status == 404


async def test_response_that_is_not_to_be_stored_or_failed_is_not_kept() -> None:
    async with simulating() as simulator:
        for body in ({"store": False}, {"stream": True, "simulate": {"fault": "error_mid", "after": 3}}):
            made = await ask(simulator, {"seed": 3} | body, RESPONSES)
            response_id = made.events[0]["response"]["id"] if "stream" in body else made.json["id"]
            assert (await ask(simulator, b"", f"{RESPONSES}/{response_id}", method="GET")).status == 404


async def test_sglang_says_what_an_id_looks_like() -> None:
    answer = await asked("sglang", {"previous_response_id": "nope"}, RESPONSES)
    assert (answer.status, answer.error["message"]) == (
        400,
        "Invalid 'response_id': 'nope'. Expected an ID that begins with 'resp'.",
    )


async def test_llamacpp_takes_no_previous_response() -> None:
    answer = await asked("llamacpp", {"previous_response_id": "resp_x"}, RESPONSES)
    assert (answer.status, answer.error["message"]) == (400, "llama.cpp does not support 'previous_response_id'.")
