"""Members of a body that steer an engine: the list of each engine, and what a pool does with them.

- Refused is what would change the answer, what was asked, or its bill: without it the caller would get another answer.
- Dropped is what only places a request. The answer is the same without it.

Where a list is of is said beside it; none of these members is one that an SDK sends by itself.
"""

from collections.abc import Mapping
from typing import Final

from edge.config.settings import Engine

REFUSE: Final = "refuse"
DROP: Final = "drop"


def _table(refused: str, dropped: str) -> Mapping[str, str]:
    return dict.fromkeys(refused.split(), REFUSE) | dict.fromkeys(dropped.split(), DROP)


STEERING: Final[Mapping[Engine, Mapping[str, str]]] = {
    # vLLM 0.32.0, vllm/entrypoints: the protocol.py of chat_completion, completion, responses, anthropic, pooling and
    # structured_decisions. `logits_processors`, `lora_request` and `guided_decoding_backend` are of releases before.
    # A larger `stream_interval` puts several tokens in an event, and events are counted where a client leaves early.
    # `generation_config` is of transformers serve 5.24.0 (cli/serving/utils.py), for which there is no name: all
    # settings as text, among them how many tokens and answers.
    "vllm": _table(
        "kv_transfer_params ec_transfer_params vllm_xargs logits_processors lora_request generation_config",
        "request_id session_id priority cache_salt stream_interval guided_decoding_backend",
    ),
    # SGLang 0.5.23, sglang/srt/entrypoints/openai/protocol.py. `session_params` goes on with what a session of the
    # engine holds, whoever's it is; `custom_params` are those of a custom logit processor.
    "sglang": _table(
        "lora_path custom_logit_processor custom_params session_params bootstrap_host bootstrap_port bootstrap_room "
        "return_hidden_states return_pooled_hidden_states return_routed_experts",
        "rid request_id session_id priority cache_salt extra_key custom_labels ngram_corpus_id routed_dp_rank "
        "data_parallel_rank disagg_prefill_dp_rank",
    ),
    # llama.cpp of 2026-10 (xllamacpp 2026.10.11549), tools/server/server-schema.cpp and server-context.cpp.
    # `n_predict` and `n_cmpl` count before `max_tokens` and `n`, and `response_fields` can leave out the usage.
    # `chat_format`, `chat_parser` and `grammar_type` the server writes for itself.
    "llamacpp": _table(
        "lora n_predict n_cmpl response_fields chat_format chat_parser grammar_type",
        "id_slot cache_prompt n_cache_reuse backend_sampling verbose sse_ping_interval speculative.type "
        "speculative.n_max speculative.n_min speculative.p_min speculative.ngram_size_n speculative.ngram_size_m "
        "speculative.ngram_min_hits",
    ),
    # Hosted APIs, and what others put in front of them: another model or place than was asked, at another price.
    # platform.openai.com, "Create chat completion"; anthropic 2.14.0, `BetaMessageCreateParams`; openrouter.ai,
    # "Model Fallbacks", "Provider Routing"; docs.litellm.ai, "Client-Side Fallbacks", "Clientside LLM Credentials".
    "openai": _table(
        "models fallbacks fallback_credit_token provider route billing_policy inference_geo api_base base_url api_key "
        "user_config mock_response mock_testing_fallbacks generation_config",
        "service_tier",
    ),
}  # fmt: skip
