"""Embeddings, ranks, scores, tokens and decisions, as each engine answers them."""

from typing import Any

import pytest

from edge.simulator.behaviour import Behaviour
from tests.simulator.asking import ask, asked, compact, simulating

VECTOR = "[0.125,-0.25,0.5,-1.0]"
VLLM_USED = (
    '"usage":{"prompt_tokens":12,"total_tokens":12,"completion_tokens":0,"prompt_tokens_details":null,'
    '"completion_tokens_details":null}'
)
SGLANG_USED = (
    '"usage":{"prompt_tokens":12,"total_tokens":12,"completion_tokens":0,"prompt_tokens_details":null,'
    '"reasoning_tokens":0,"completion_tokens_details":null}'
)
USED = '"usage":{"prompt_tokens":12,"total_tokens":12}'
RANKED = {"query": "q", "documents": ["a", "b", "c"], "top_n": 2}

ANSWERS: list[tuple[str, str, dict[str, Any], str]] = [
    ("vllm", "/v1/embeddings", {"input": "a"},
     '{"object":"list","created":1763000000,"model":"m","data":[{"index":0,"object":"embedding",'
     f'"embedding":{VECTOR}}}],{VLLM_USED}}}'),
    ("sglang", "/v1/embeddings", {"input": "a"},
     f'{{"data":[{{"embedding":{VECTOR},"index":0,"object":"embedding"}}],"model":"m","object":"list",{SGLANG_USED}}}'),
    ("llamacpp", "/v1/embeddings", {"input": "a"},
     f'{{"model":"m","object":"list",{USED},"data":[{{"embedding":{VECTOR},"index":0,"object":"embedding"}}]}}'),
    ("llamacpp", "/v1/embeddings", {"input": "a", "encoding_format": "base64"},
     f'{{"model":"m","object":"list",{USED},"data":[{{"embedding":"AAAAPgAAgL4AAAA/AACAvw==","index":0,'
     '"object":"embedding","encoding_format":"base64"}]}'),
    ("openai", "/v1/embeddings", {"input": "a"},
     f'{{"object":"list","data":[{{"object":"embedding","index":0,"embedding":{VECTOR}}}],"model":"m",{USED}}}'),
    *(("vllm", path, RANKED,
       f'{{"model":"m",{USED},"results":[{{"index":0,"document":{{"text":"a","multi_modal":null}},'
       '"relevance_score":1.0},{"index":1,"document":{"text":"b","multi_modal":null},"relevance_score":0.5}]}')
      for path in ("/rerank", "/v1/rerank", "/v2/rerank")),
    ("sglang", "/v1/rerank", RANKED,
     '[{"score":1.0,"document":"a","index":0},{"score":0.5,"document":"b","index":1}]'),
    ("sglang", "/v1/rerank", RANKED | {"return_documents": False}, '[{"score":1.0,"index":0},{"score":0.5,"index":1}]'),
    *(("llamacpp", path, RANKED,
       f'{{"model":"m","object":"list",{USED},"results":[{{"index":0,"relevance_score":1.0}},'
       '{"index":1,"relevance_score":0.5}]}')
      for path in ("/rerank", "/reranking", "/v1/rerank", "/v1/reranking")),
    ("vllm", "/v1/score", {"text_1": "a", "text_2": ["b", "c"]},
     '{"object":"list","created":1763000000,"model":"m","data":[{"index":0,"object":"score","score":1.0},'
     f'{{"index":1,"object":"score","score":0.5}}],{VLLM_USED}}}'),
    ("vllm", "/score", {"text_1": "a", "text_2": "b"},
     '{"object":"list","created":1763000000,"model":"m","data":[{"index":0,"object":"score","score":1.0}],'
     f'{VLLM_USED}}}'),
    ("sglang", "/v1/score", {"query": "q", "items": ["a", "b"]},
     f'{{"scores":[[1.0],[0.5]],"model":"m",{SGLANG_USED},"object":"scoring"}}'),
    ("vllm", "/tokenize", {"prompt": "hé"},
     '{"count":3,"max_model_len":32768,"tokens":[104,195,169],"token_strs":null}'),
    ("vllm", "/tokenize", {"messages": [{"role": "user", "content": "ab"}]},
     '{"count":2,"max_model_len":32768,"tokens":[97,98],"token_strs":null}'),
    ("sglang", "/tokenize", {"prompt": "hé"}, '{"tokens":[104,195,169],"count":3,"max_model_len":32768}'),
    ("sglang", "/v1/tokenize", {"prompt": ["a", "bc"]},
     '{"tokens":[[97],[98,99]],"count":[1,2],"max_model_len":32768}'),
    ("llamacpp", "/tokenize", {"content": "hé"}, '{"tokens":[104,195,169]}'),
    ("llamacpp", "/tokenize", {"prompt": "hé"}, '{"tokens":[]}'),
    ("vllm", "/detokenize", {"tokens": [104, 195, 169]}, '{"prompt":"hé"}'),
    ("sglang", "/detokenize", {"tokens": [104, 195, 169]}, '{"text":"hé"}'),
    ("sglang", "/v1/detokenize", {"tokens": [[104], [105]]}, '{"text":["h","i"]}'),
    ("llamacpp", "/detokenize", {"tokens": [104, 195, 169]}, '{"content":"hé"}'),
    ("llamacpp", "/detokenize", {}, '{"content":""}'),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "path", "body", "expected"), ANSWERS)
async def test_answer_is_written_as_its_engine_writes_it(
    dialect: Any, path: str, body: dict[str, Any], expected: str
) -> None:
    """llama.cpp tells usage before the vectors, SGLang's ranks are a list, and a text has three names."""
    answer = await asked(dialect, {"model": "m"} | body, path)
    value = answer.json
    if isinstance(value, dict):
        value.pop("id", None)
    assert (answer.status, compact(value)) == (200, expected)


@pytest.mark.parametrize(("given", "texts"), [(["a", "b"], 2), ("a", 1), ([1, 2, 3], 1), ([[1], [2]], 2)])
async def test_every_text_has_a_vector(given: object, texts: int) -> None:
    answer = await asked("vllm", {"input": given}, "/v1/embeddings")
    assert [each["index"] for each in answer.json["data"]] == list(range(texts))


async def test_text_over_the_batch_of_llamacpp_is_a_failure_of_the_server() -> None:
    """A caller's mistake that looks like a broken endpoint."""
    answer = await asked("llamacpp", {"input": "a"}, "/v1/embeddings", prompt_tokens=3000)
    said = "input (3000 tokens) is too large to process. increase the physical batch size (current batch size: 512)"
    assert (answer.status, answer.json) == (500, {"error": {"code": 500, "message": said, "type": "server_error"}})


WRONG: list[tuple[str, str, dict[str, Any], str, str | None]] = [
    ("vllm", "/tokenize", {"content": "x"}, "body.prompt', 'msg': 'Field required'", "body.prompt"),
    ("vllm", "/tokenize", {"prompt": ["a"]}, "body.prompt', 'msg': 'Input should be a valid string'", "body.prompt"),
    ("vllm", "/detokenize", {"tokens": "abc"}, "body.tokens', 'msg': 'Input should be a valid list'", "body.tokens"),
    ("vllm", "/detokenize", {}, "body.tokens', 'msg': 'Field required'", "body.tokens"),
    ("sglang", "/v1/tokenize", {"content": "x"}, "Exactly one of 'prompt' or 'messages' must be provided.", None),
    ("sglang", "/detokenize", {}, "('body', 'tokens'), 'msg': 'Field required'", None),
    ("llamacpp", "/detokenize", {"tokens": "abc"}, "type must be array, but is string", None),
    ("vllm", "/v1/rerank", {"documents": 5}, "body.documents', 'msg': 'Input should be a valid list'",
     "body.documents"),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "path", "body", "said", "param"), WRONG)
async def test_members_that_are_wrong_or_missing_are_told_by_name(
    dialect: Any, path: str, body: dict[str, Any], said: str, param: str | None
) -> None:
    answer = await asked(dialect, body, path)
    assert answer.status == 400
    assert said in answer.error["message"]
    assert answer.error.get("param") == param


# --- Decisions

DECISIONS: list[tuple[dict[str, Any], Any]] = [
    ({"type": "choice", "instructions": "Which?", "criteria": {"a": "apple", "b": "pear"}},
     {"type": "choice", "choice": "a", "confidence": 0.0, "probabilities": {"a": 0.5, "b": 0.5}, "x_label_mass": 1.0}),
    ({"type": "noul", "instructions": "Does it rain?"}, {"type": "noul", "noul": 0.5, "x_label_mass": 1.0}),
    ({"type": "score", "criteria": ["bad", "good"]},
     {"type": "score", "score": 0.5, "confidence": 0.0, "legend": {"0": "bad", "1": "good"},
      "probabilities": {"0": 0.5, "1": 0.5}, "x_label_mass": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("question", "decision"), DECISIONS)
async def test_sglang_decides(question: dict[str, Any], decision: Any) -> None:
    body = {"model": "m", "state": "It rains", "questions": {"q": question}}
    answer = await asked("sglang", body, "/v1/systemone")
    used = {"input_tokens": 12, "output_tokens": 0}
    assert answer.json == {"model": "m", "answers": {"q": decision}, "usage": used}


@pytest.mark.parametrize("question", [{}, {"type": "choice"}, {"type": "score", "criteria": []}, {"type": "other"}])
async def test_question_that_nobody_knows_is_400(question: dict[str, Any]) -> None:
    async with simulating(Behaviour(dialect="sglang")) as simulator:
        answer = await ask(simulator, {"questions": {"q": question}}, "/v1/systemone")
    assert (answer.status, answer.json["type"]) == (400, "BadRequest")
