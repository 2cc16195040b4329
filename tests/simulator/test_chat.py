"""Chat and text completions: what each engine was seen to send, frame by frame.

vLLM 0.32.0, SGLang 0.5.23 and llama.cpp's server of October 2026, each with a model of two layers. A row has what an
event holds beside its id, kind, time and model.
"""

from typing import Any

import pytest

from edge.simulator.behaviour import Behaviour
from edge.simulator.scripts import answer_text
from tests.simulator.asking import CHAT, COMPLETIONS, DIALECTS, Answer, ask, asked, compact, simulating

HEAD = ("id", "object", "created", "model")
ASKED = {"include_usage": True}
RUNNING = {"include_usage": True, "continuous_usage_stats": True}
RUNNING_ONLY = {"include_usage": False, "continuous_usage_stats": True}


def beside_head(event: dict[str, Any]) -> str:
    return compact({name: value for name, value in event.items() if name not in HEAD})


VLLM = '"system_fingerprint":"vllm-0.32.0-51a00a7e"'
LLAMACPP = '"system_fingerprint":"b10549-51a00a7e"'
TIMINGS = (
    '"timings":{"cache_n":0,"prompt_n":12,"prompt_ms":12.0,"prompt_per_token_ms":1.0,"prompt_per_second":1000.0,'
    '"predicted_n":2,"predicted_ms":2.0,"predicted_per_token_ms":1.0,"predicted_per_second":1000.0}'
)
LLAMACPP_USED = (
    '"usage":{"completion_tokens":2,"prompt_tokens":12,"total_tokens":14,"prompt_tokens_details":{"cached_tokens":0}}'
)
SGLANG_USED = (
    '"usage":{"prompt_tokens":12,"total_tokens":14,"completion_tokens":2,"prompt_tokens_details":null,'
    '"reasoning_tokens":0,"completion_tokens_details":null}'
)
OPENAI_USED = (
    '"usage":{"prompt_tokens":12,"total_tokens":14,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":0},'
    '"completion_tokens_details":{"reasoning_tokens":0}}'
)

STREAMS = [
    ("vllm", CHAT, None, [
        '{"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],'
        '"prompt_token_ids":null,"prompt_text":null}',
        '{"choices":[{"index":0,"delta":{"content":" token0"},"logprobs":null,"finish_reason":null,"token_ids":null}]}',
        '{"choices":[{"index":0,"delta":{"content":" token1"},"logprobs":null,"finish_reason":"length",'
        '"stop_reason":null,"token_ids":null}],' + VLLM + "}",
    ]),
    ("vllm", CHAT, ASKED, [
        '{"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],'
        '"prompt_token_ids":null,"prompt_text":null}',
        '{"choices":[{"index":0,"delta":{"content":" token0"},"logprobs":null,"finish_reason":null,"token_ids":null}]}',
        '{"choices":[{"index":0,"delta":{"content":" token1"},"logprobs":null,"finish_reason":"length",'
        '"stop_reason":null,"token_ids":null}]}',
        '{"choices":[],"usage":{"prompt_tokens":12,"total_tokens":14,"completion_tokens":2},' + VLLM + "}",
    ]),
    ("vllm", CHAT, RUNNING, [
        '{"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],'
        '"usage":{"prompt_tokens":12,"total_tokens":12,"completion_tokens":0,"completion_tokens_details":null},'
        '"prompt_token_ids":null,"prompt_text":null}',
        '{"choices":[{"index":0,"delta":{"content":" token0"},"logprobs":null,"finish_reason":null,"token_ids":null}],'
        '"usage":{"prompt_tokens":12,"total_tokens":13,"completion_tokens":1,"completion_tokens_details":null}}',
        '{"choices":[{"index":0,"delta":{"content":" token1"},"logprobs":null,"finish_reason":"length",'
        '"stop_reason":null,"token_ids":null}],'
        '"usage":{"prompt_tokens":12,"total_tokens":14,"completion_tokens":2,"completion_tokens_details":null}}',
        '{"choices":[],"usage":{"prompt_tokens":12,"total_tokens":14,"completion_tokens":2},' + VLLM + "}",
    ]),
    ("vllm", COMPLETIONS, RUNNING, [
        '{"choices":[{"index":0,"text":" token0","logprobs":null,"finish_reason":null,"stop_reason":null,'
        '"prompt_token_ids":null,"token_ids":null}],'
        '"usage":{"prompt_tokens":12,"total_tokens":13,"completion_tokens":1}}',
        '{"choices":[{"index":0,"text":" token1","logprobs":null,"finish_reason":"length","stop_reason":null,'
        '"prompt_token_ids":null,"token_ids":null}],'
        '"usage":{"prompt_tokens":12,"total_tokens":14,"completion_tokens":2}}',
        '{"choices":[],"usage":{"prompt_tokens":12,"total_tokens":14,"completion_tokens":2},' + VLLM + "}",
    ]),
    ("sglang", CHAT, None, [
        '{"choices":[{"index":0,"delta":{"reasoning_content":null,"role":"assistant","content":""},"logprobs":null,'
        '"finish_reason":null,"matched_stop":null}]}',
        '{"choices":[{"index":0,"delta":{"reasoning_content":null,"content":" token0"},"logprobs":null,'
        '"finish_reason":null,"matched_stop":null}]}',
        '{"choices":[{"index":0,"delta":{"reasoning_content":null,"content":" token1"},"logprobs":null,'
        '"finish_reason":null,"matched_stop":null}]}',
        '{"choices":[{"index":0,"delta":{"reasoning_content":null},"logprobs":null,"finish_reason":"length",'
        '"matched_stop":null}]}',
    ]),
    ("sglang", CHAT, RUNNING_ONLY, [
        '{"choices":[{"index":0,"delta":{"reasoning_content":null,"role":"assistant","content":""},"logprobs":null,'
        '"finish_reason":null,"matched_stop":null}]}',
        '{"choices":[{"index":0,"delta":{"reasoning_content":null,"content":" token0"},"logprobs":null,'
        '"finish_reason":null,"matched_stop":null}],'
        + SGLANG_USED.replace('14,"completion_tokens":2', '13,"completion_tokens":1') + "}",
        '{"choices":[{"index":0,"delta":{"reasoning_content":null,"content":" token1"},"logprobs":null,'
        '"finish_reason":null,"matched_stop":null}],' + SGLANG_USED + "}",
        '{"choices":[{"index":0,"delta":{"reasoning_content":null},"logprobs":null,"finish_reason":"length",'
        '"matched_stop":null}]}',
    ]),
    ("sglang", COMPLETIONS, ASKED, [
        '{"choices":[{"index":0,"text":" token0","logprobs":null,"finish_reason":null,"matched_stop":null}],'
        '"usage":null}',
        '{"choices":[{"index":0,"text":" token1","logprobs":null,"finish_reason":"length","matched_stop":null}],'
        '"usage":null}',
        '{"choices":[],"usage":{"prompt_tokens":12,"total_tokens":14,"completion_tokens":2,"reasoning_tokens":0}}',
    ]),
    ("llamacpp", CHAT, None, [
        '{"choices":[{"finish_reason":null,"index":0,"delta":{"role":"assistant","content":null}}],' + LLAMACPP + "}",
        '{"choices":[{"finish_reason":null,"index":0,"delta":{"content":" token0"}}],' + LLAMACPP + "}",
        '{"choices":[{"finish_reason":null,"index":0,"delta":{"content":" token1"}}],' + LLAMACPP + "}",
        '{"choices":[{"finish_reason":"length","index":0,"delta":{}}],' + LLAMACPP + "," + TIMINGS + "}",
    ]),
    ("llamacpp", CHAT, RUNNING, [
        '{"choices":[{"finish_reason":null,"index":0,"delta":{"role":"assistant","content":null}}],' + LLAMACPP + "}",
        '{"choices":[{"finish_reason":null,"index":0,"delta":{"content":" token0"}}],' + LLAMACPP + "}",
        '{"choices":[{"finish_reason":null,"index":0,"delta":{"content":" token1"}}],' + LLAMACPP + "}",
        '{"choices":[{"finish_reason":"length","index":0,"delta":{}}],' + LLAMACPP + "}",
        '{"choices":[],' + LLAMACPP + "," + LLAMACPP_USED + "," + TIMINGS + "}",
    ]),
    ("llamacpp", COMPLETIONS, None, [
        '{"choices":[{"text":" token0","index":0,"logprobs":null,"finish_reason":null}],' + LLAMACPP + "}",
        '{"choices":[{"text":" token1","index":0,"logprobs":null,"finish_reason":null}],' + LLAMACPP + "}",
        '{"choices":[{"text":"","index":0,"logprobs":null,"finish_reason":"length"}],' + LLAMACPP + ","
        + LLAMACPP_USED + "," + TIMINGS + "}",
    ]),
    ("openai", CHAT, ASKED, [
        '{"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],'
        '"usage":null}',
        '{"choices":[{"index":0,"delta":{"content":" token0"},"logprobs":null,"finish_reason":null}],"usage":null}',
        '{"choices":[{"index":0,"delta":{"content":" token1"},"logprobs":null,"finish_reason":null}],"usage":null}',
        '{"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}],"usage":null}',
        '{"choices":[],' + OPENAI_USED + "}",
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "path", "options", "expected"), STREAMS)
async def test_stream_has_the_events_of_its_engine(
    dialect: Any, path: str, options: dict[str, bool] | None, expected: list[str]
) -> None:
    body = {"model": "m", "stream": True, "max_tokens": 2} | ({"stream_options": options} if options else {})
    answer = await asked(dialect, body, path)
    assert [beside_head(event) for event in answer.events] == expected
    assert answer.chunks[-1] == b"data: [DONE]\n\n"
    if dialect != "llamacpp":
        assert all(chunk.count(b"\n\n") == 1 for chunk in answer.chunks)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, RUNNING_ONLY])
async def test_vllm_tells_usage_only_where_the_last_of_it_was_asked_for(path: str, options: dict[str, bool]) -> None:
    body = {"stream": True, "stream_options": options}
    assert not any("usage" in event for event in (await asked("vllm", body, path)).events)


async def test_llamacpp_joins_events_to_one_chunk() -> None:
    """The role and the first token; the reason to finish and usage."""
    answer = await asked("llamacpp", {"stream": True, "max_tokens": 3, "stream_options": ASKED})
    assert [chunk.count(b"data: ") for chunk in answer.chunks] == [2, 1, 1, 2, 1]


HEADS = [
    ("vllm", CHAT, True, ["id", "object", "created", "model"], "chatcmpl-", 16, "chat.completion.chunk"),
    ("vllm", COMPLETIONS, True, ["id", "object", "created", "model"], "cmpl-", 16, "text_completion"),
    ("vllm", CHAT, False, ["id", "object", "created", "model"], "chatcmpl-", 16, "chat.completion"),
    ("sglang", CHAT, True, ["id", "object", "created", "model"], "", 32, "chat.completion.chunk"),
    ("sglang", COMPLETIONS, False, ["id", "object", "created", "model"], "", 32, "text_completion"),
    ("llamacpp", CHAT, True, ["created", "id", "model", "object"], "chatcmpl-", 32, "chat.completion.chunk"),
    ("llamacpp", COMPLETIONS, True, ["created", "model", "object", "id"], "chatcmpl-", 32, "text_completion"),
    ("llamacpp", CHAT, False, ["created", "model", "object", "id"], "chatcmpl-", 32, "chat.completion"),
    ("openai", COMPLETIONS, True, ["id", "object", "created", "model"], "cmpl-", 32, "text_completion"),
]


@pytest.mark.parametrize(("dialect", "path", "stream", "names", "prefix", "length", "kind"), HEADS)
async def test_id_and_kind_are_written_and_placed_as_the_engine_does(
    dialect: Any, path: str, stream: bool, names: list[str], prefix: str, length: int, kind: str
) -> None:
    answer = await asked(dialect, {"model": "m", "stream": stream}, path)
    event = answer.events[0] if stream else answer.json
    assert [name for name in event if name in HEAD] == names
    assert event["object"] == kind
    assert event["id"].startswith(prefix)
    assert len(event["id"].removeprefix(prefix)) == length


DOCUMENTS = [
    ("vllm", CHAT,
     '{"choices":[{"index":0,"message":{"role":"assistant","content":" token0 token1","refusal":null,'
     '"annotations":null,"audio":null,"function_call":null,"reasoning":null},"logprobs":null,"finish_reason":"length",'
     '"stop_reason":null,"token_ids":null,"routed_experts":null}],"service_tier":null,' + VLLM + ","
     '"usage":{"prompt_tokens":12,"total_tokens":14,"completion_tokens":2,"prompt_tokens_details":null,'
     '"completion_tokens_details":null},"prompt_logprobs":null,"prompt_token_ids":null,"prompt_text":null,'
     '"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}'),
    ("vllm", COMPLETIONS,
     '{"choices":[{"index":0,"text":" token0 token1","logprobs":null,"finish_reason":"length","stop_reason":null,'
     '"token_ids":null,"prompt_logprobs":null,"prompt_token_ids":null,"routed_experts":null}],"service_tier":null,'
     + VLLM + ',"usage":{"prompt_tokens":12,"total_tokens":14,"completion_tokens":2,"prompt_tokens_details":null,'
     '"completion_tokens_details":null},"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}'),
    ("sglang", CHAT,
     '{"choices":[{"index":0,"message":{"role":"assistant","content":" token0 token1","reasoning_content":null},'
     '"logprobs":null,"finish_reason":"length","matched_stop":null}],' + SGLANG_USED + ',"metadata":{"weight_version":'
     '"default","weight_versions":[{"version":"default","start":0,"end":2}]}}'),
    ("llamacpp", CHAT,
     '{"choices":[{"finish_reason":"length","index":0,"message":{"role":"assistant","content":" token0 token1"}}],'
     + LLAMACPP + "," + LLAMACPP_USED + "," + TIMINGS + "}"),
    ("llamacpp", COMPLETIONS,
     '{"choices":[{"text":" token0 token1","index":0,"logprobs":null,"finish_reason":"length"}],'
     + LLAMACPP + "," + LLAMACPP_USED + "," + TIMINGS + "}"),
    ("openai", CHAT,
     '{"choices":[{"index":0,"message":{"role":"assistant","content":" token0 token1"},"logprobs":null,'
     '"finish_reason":"length"}],' + OPENAI_USED + "}"),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "path", "expected"), DOCUMENTS)
async def test_document_has_the_members_of_its_engine(dialect: Any, path: str, expected: str) -> None:
    assert beside_head((await asked(dialect, {"max_tokens": 2}, path)).json) == expected


# --- Several choices, several prompts


def usages(answer: Answer) -> list[tuple[int, int]]:
    """Prompt and completion tokens of each usage in a stream."""
    told = [event["usage"] for event in answer.events if event.get("usage")]
    return [(used["prompt_tokens"], used["completion_tokens"]) for used in told]


SEVERAL: list[tuple[str, str, dict[str, Any], list[int], list[tuple[int, int]]]] = [
    ("vllm", CHAT, {"n": 2}, [0, 1, 0, 1, 0, 1], [(12, 4)]),
    ("vllm", COMPLETIONS, {"prompt": ["a", "b"]}, [0, 1, 0, 1], [(24, 4)]),
    ("vllm", COMPLETIONS, {"prompt": [[1, 2], [3]], "n": 2}, [0, 1, 2, 3] * 2, [(24, 8)]),
    ("sglang", CHAT, {"n": 2}, [0, 1, 0, 1, 0, 1, 0, 1], [(12, 4)]),
    ("sglang", COMPLETIONS, {"prompt": ["a", "b"]}, [0, 1, 0, 1], [(24, 4)]),
    ("llamacpp", CHAT, {"n": 2}, [0, 0, 1, 1, 0, 1, 0, 1], [(12, 2), (12, 2)]),
    ("llamacpp", COMPLETIONS, {"prompt": ["a", "b"]}, [0, 1, 0, 1, 0, 1], [(12, 2), (12, 2)]),
    ("openai", CHAT, {"n": 2}, [0, 1, 0, 1, 0, 1, 0, 1], [(12, 4)]),
]


@pytest.mark.parametrize(("dialect", "path", "several", "indices", "used"), SEVERAL)
async def test_choices_of_a_stream_take_turns_and_usage_is_summed_where_the_engine_sums(
    dialect: Any, path: str, several: dict[str, Any], indices: list[int], used: list[tuple[int, int]]
) -> None:
    """llama.cpp tells usage behind each choice, of that choice alone."""
    async with simulating(Behaviour(dialect=dialect)) as simulator:
        body = {"stream": True, "max_tokens": 2, "stream_options": ASKED}
        answer = await ask(simulator, body | several, path)
        assert simulator.requests[0].tokens == 2 * (max(indices) + 1)
    assert [event["choices"][0]["index"] for event in answer.events if event["choices"]] == indices
    assert usages(answer) == used


@pytest.mark.parametrize(
    ("dialect", "path", "several", "texts", "used"),
    [
        ("vllm", CHAT, {"n": 2}, 2, (12, 4)),
        ("sglang", COMPLETIONS, {"prompt": ["a", "b"], "n": 2}, 4, (24, 8)),
        ("llamacpp", CHAT, {"n": 2}, 2, (12, 2)),
        ("llamacpp", COMPLETIONS, {"prompt": ["a", "b"]}, 2, (12, 2)),
        ("vllm", COMPLETIONS, {"prompt": [1, 2, 3]}, 1, (12, 2)),
    ],
)
async def test_document_of_several_choices_tells_one_of_them_in_llamacpp(
    dialect: Any, path: str, several: dict[str, Any], texts: int, used: tuple[int, int]
) -> None:
    answer = (await asked(dialect, {"max_tokens": 2} | several, path)).json
    assert [choice["index"] for choice in answer["choices"]] == list(range(texts))
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == used


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
async def test_running_usage_is_of_one_choice_and_of_its_own_prompt(dialect: Any) -> None:
    body = {"stream": True, "max_tokens": 2, "prompt": ["a", "b"], "stream_options": RUNNING}
    assert usages(await asked(dialect, body, COMPLETIONS)) == [(12, 1), (12, 1), (12, 2), (12, 2), (24, 4)]


async def test_every_choice_of_sglang_has_an_id_of_its_own() -> None:
    events = (await asked("sglang", {"stream": True, "n": 2, "stream_options": ASKED})).events
    ids = {event["choices"][0]["index"]: event["id"] for event in events if event["choices"]}
    assert ids[0] != ids[1]
    assert events[-1]["id"] == ids[0]


async def test_two_prompts_of_llamacpp_begin_with_an_event_of_null() -> None:
    """The openai SDK hands it out as None."""
    answer = await asked("llamacpp", {"stream": True, "prompt": ["a", "b"]}, COMPLETIONS)
    assert answer.chunks[0] == b"data: null\n\n"
    assert (await asked("llamacpp", {"stream": True, "prompt": ["a"]}, COMPLETIONS)).chunks[0] != b"data: null\n\n"


@pytest.mark.parametrize(
    ("dialect", "body", "said"),
    [
        ("vllm", {"n": 0}, "n must be at least 1, got 0."),
        ("vllm", {"n": 2, "temperature": 0}, "n must be 1 when using greedy sampling, got 2."),
        ("vllm", {"n": 5000}, "n must be at most 1024, got 5000."),
        ("llamacpp", {"n": 0}, "Field 'n': Value must be between 1 <= value <= 4, but got 0"),
        ("llamacpp", {"n": 5}, "Field 'n': Value must be between 1 <= value <= 4, but got 5"),
    ],
)
async def test_numbers_of_choices_that_an_engine_does_not_make_are_refused(
    dialect: Any, body: dict[str, Any], said: str
) -> None:
    answer = await asked(dialect, body)
    assert (answer.status, answer.error["message"]) == (400, said)


# --- Tokens that do not come one by one

UNEVEN: list[tuple[str, list[str], list[int]]] = [
    ("vllm", ["", "", " token0 token1", " token2", "你好3", ' token4 "token5"', " token6"], [0, 1, 2, 3, 4, 6, 7]),
    ("sglang", ["", " token0 token1", " token2", "你好3", " token4", ' "token5"', " token6"], [2, 3, 4, 5, 6, 7]),
    ("llamacpp", [" token0 token1", " token2", "你好3", " token4", ' "token5"', " token6"], []),
]


@pytest.mark.parametrize(("dialect", "texts", "counts"), UNEVEN)
async def test_half_a_character_is_an_empty_frame_of_vllm_and_none_of_others(
    dialect: Any, texts: list[str], counts: list[int]
) -> None:
    """vLLM also puts two tokens into one frame when it lags; llama.cpp then sends no frame with the role."""
    async with simulating(Behaviour(dialect=dialect, uneven=True)) as simulator:
        answer = await ask(simulator, {"stream": True, "max_tokens": 7, "stream_options": RUNNING})
        assert simulator.requests[0].tokens == 7
    deltas = [event["choices"][0]["delta"] for event in answer.events if event["choices"]]
    assert [delta["content"] for delta in deltas if "content" in delta] == texts
    assert ("role" in deltas[0]) == (dialect != "llamacpp")
    told = [event["usage"]["completion_tokens"] for event in answer.events if event["choices"] and "usage" in event]
    assert told == counts
    assert answer.events[-1]["usage"]["completion_tokens"] == 7


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_answer_without_a_token_ends_at_once(dialect: Any, path: str) -> None:
    answer = await asked(dialect, {"stream": True}, path, tokens=0)
    ends = [event["choices"][0]["finish_reason"] for event in answer.events]
    assert [end for end in ends if end] == ["stop"]
    assert answer.chunks[-1] == b"data: [DONE]\n\n"


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_texts_of_a_stream_are_the_text_of_the_document(dialect: Any) -> None:
    async with simulating(Behaviour(dialect=dialect)) as simulator:
        events = (await ask(simulator, {"stream": True})).events
        document = (await ask(simulator, {})).json
    said = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    assert said == document["choices"][0]["message"]["content"] == answer_text(16)
