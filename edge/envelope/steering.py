"""Members of a body that steer an engine: how they are found, and which are refused or dropped on a pool.

A pool is shared, and what it did is recorded for the model that was asked. So no caller decides what else an engine
loads, whom it talks to, or who comes first. Users' own instances take everything. The lists are in
`config/steering.py`.

What stands within another member is left: no engine reads `extra_body` or `sampling_params` at these paths (SDKs put
the members of `extra_body` at the top level, where they are found), and `chat_template_kwargs` reaches only the
template. `vllm_xargs` is refused as a whole. Of headers none goes upstream that steers an engine (`client/head.py`):
vLLM reads X-Request-Id, X-Session-ID, X-Vllm-Priority and X-data-parallel-rank, SGLang eight of X-Override-*.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from edge.config.settings import PoolConfig
from edge.config.steering import REFUSE, STEERING
from edge.errors import InvalidRequest

_MAX_NAME: Final = 64  # characters of a name that anyone looks for

_INSTEAD: Final = {"n_predict": "max_tokens", "n_cmpl": "n"}


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


class Names:
    """Finds the names of members that may steer an engine; `watched` are those that a pool's own settings look for."""

    __slots__ = ("_steer", "_usual")

    def __init__(self, watched: Iterable[str] = ()) -> None:
        steer = {name.casefold() for name in watched}
        self._usual = _USUAL - steer
        self._steer = steer.union(*STEERING.values())

    def steering(self, names: Mapping[str, object]) -> tuple[str, ...]:
        """Return the names that may steer an engine, as they are written; a body has only usual ones most often.

        Raises: `InvalidRequest` for a name that is almost one that the edge reads.
        """
        usual = self._usual
        if usual.issuperset(names):
            return ()
        return tuple(
            [name for name in names if name not in usual and len(name) <= _MAX_NAME and folded(name) in self._steer]
        )


NAMES: Final = Names()


def folded(name: str) -> str:
    """Return a name as a parser reads it that folds case.

    Raises: `InvalidRequest` for one that differs from what the edge reads only in case: Go's parsers take it for the
    same (encoding/json, `Unmarshal`), with the two letters of Unicode that fold to k and s.
    """
    lower = name.casefold()
    if lower in READ and name != lower:
        raise InvalidRequest(f"a member is almost named {lower}: write its name in lower case", param=lower)
    return lower


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
