"""Members of a body that steer an engine: which are refused or dropped on a pool, and how they are found.

A pool is shared, and what it did is recorded for the model that was asked. So no caller decides what else an engine
loads, whom it talks to, or who comes first. Users' own instances take everything. Where a list is of is said beside it;
none of these members is one that an SDK sends by itself.

- Refused is what would change the answer, what was asked, or its bill: without it the caller would get another answer.
- Dropped is what only places a request. The answer is the same without it.

What stands within another member is left: no engine reads `extra_body` or `sampling_params` at these paths (SDKs put
the members of `extra_body` at the top level, where they are found), and `chat_template_kwargs` reaches only the
template. `vllm_xargs` is refused as a whole. Of headers none goes upstream that steers an engine (`client/head.py`):
vLLM reads X-Request-Id, X-Session-ID, X-Vllm-Priority and X-data-parallel-rank, SGLang eight of X-Override-*.
"""

from collections.abc import Iterable, Mapping
from typing import Final, Literal, cast

import msgspec

from edge.config.settings import Engine, PoolConfig
from edge.errors import InvalidRequest

_MAX_MEMBERS: Final = 1000  # of the top level; the largest API has 50
_MAX_NAME: Final = 64  # characters of a name that anyone looks for

REFUSE: Final = "refuse"
DROP: Final = "drop"
_INSTEAD: Final = {"n_predict": "max_tokens", "n_cmpl": "n"}


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

# What the edge reads of a body: engines must read the same, so no other spelling of these may stand there.
READ: Final = frozenset({
    "model", "stream", "stream_options", "n", "best_of", "max_tokens", "max_completion_tokens", "max_output_tokens",
    "prompt", "messages", "input", "previous_response_id", "background", "store",
})  # fmt: skip
# What a body has most often besides, which steers nothing anywhere. One that is missing here costs a look more.
_USUAL: Final = READ | frozenset({
    "audio", "bad_words", "cache_control", "chat_template_kwargs", "context_management", "conversation", "dimensions",
    "documents", "echo", "encoding_format", "frequency_penalty", "function_call", "functions", "ignore_eos", "include",
    "instructions", "length_penalty", "logit_bias", "logprobs", "max_tool_calls", "mcp_servers", "metadata", "min_p",
    "min_tokens", "modalities", "moderation", "output_config", "parallel_tool_calls", "prediction", "presence_penalty",
    "prompt_cache_key", "prompt_cache_retention", "quality", "query", "reasoning", "reasoning_effort",
    "repetition_penalty", "response_format", "safety_identifier", "seed", "size", "skip_special_tokens", "speed",
    "stop", "stop_sequences", "stop_token_ids", "structured_outputs", "suffix", "system", "temperature", "text",
    "thinking", "tool_choice", "tools", "top_k", "top_logprobs", "top_n", "top_p", "truncation", "user", "verbosity",
    "voice", "web_search_options",
})  # fmt: skip


class _Name(str):
    """A name of a member, told apart from other texts so that msgspec shows it."""

    __slots__ = ()


_OTHER: Final = _Name()  # all names that nobody reads: what a thousand of them hold is not kept
_KNOWN: Final = {name: _Name(name) for name in READ}


class Members:
    """Reads the top level of bodies; `watched` are names that a pool's own settings look for."""

    __slots__ = ("_all", "_count", "_found", "_usual")

    def __init__(self, watched: Iterable[str] = ()) -> None:
        usual = tuple(sorted(_USUAL - set(watched)))
        self._usual = msgspec.json.Decoder(dict[Literal[usual], msgspec.Raw])  # type: ignore[valid-type]
        self._all = msgspec.json.Decoder(dict[_Name, msgspec.Raw], dec_hook=self._name)
        self._found: dict[str, None] = {}
        self._count = 0

    def read(self, body: bytes) -> tuple[dict[str, msgspec.Raw], tuple[str, ...]]:
        """Return the members that the edge reads, and the names of those that may steer an engine, as written.

        Of a name that comes twice the last value counts, as for engines. A body of usual names is read once and in C;
        at another name the reading stops, and begins anew with a look at each.
        Raises: `InvalidRequest` for a name that is almost one that the edge reads, and for very many; those of msgspec.
        """
        try:
            return self._usual.decode(body), ()
        except msgspec.ValidationError:  # another name, or no object
            self._found, self._count = {}, 0
            return cast(dict[str, msgspec.Raw], self._all.decode(body)), tuple(self._found)

    def _name(self, _: type, name: str) -> _Name:
        self._count += 1
        if self._count > _MAX_MEMBERS:
            raise InvalidRequest(f"the body has more than {_MAX_MEMBERS} members")
        if len(name) <= _MAX_NAME:
            may_steer(name, self._found)
        return _KNOWN.get(name, _OTHER)


MEMBERS: Final = Members()


def may_steer(name: str, found: dict[str, None]) -> None:
    """Add a name to those that are judged by the rules of a pool.

    Raises: `InvalidRequest` for one that differs from what the edge reads only in case: Go's parsers take it for the
    same (encoding/json, `Unmarshal`), with the two letters of Unicode that fold to k and s.
    """
    folded = name.casefold()
    if folded in READ and name != folded:
        raise InvalidRequest(f"a member is almost named {folded}: write its name in lower case", param=folded)
    found[name] = None


class Rules:
    """What a pool does with members that steer its engine."""

    __slots__ = ("_of",)

    def __init__(self, pool: PoolConfig) -> None:
        of = {name: kind for name, kind in STEERING[pool.engine].items() if name not in pool.allow_members}
        self._of = of | {name.casefold(): REFUSE for name in pool.refuse_members}

    def dropped(self, names: tuple[str, ...], *, form: bool) -> tuple[str, ...]:
        """Return which members of a body do not go upstream; from a form none is dropped.

        Raises: `InvalidRequest`, naming one that is refused.
        """
        dropped = []
        for name in names:
            kind = self._of.get(name.casefold())
            if kind == REFUSE or (kind and form):
                raise _refusal(name.casefold())
            if kind:
                dropped.append(name)
        return tuple(dropped)


def _refusal(name: str) -> InvalidRequest:
    what = f"write {_INSTEAD[name]} instead" if name in _INSTEAD else "leave it out"
    return InvalidRequest(f"{name} is not taken with this model: {what}", param=name)
