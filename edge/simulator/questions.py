"""What a request asks of a model server: its body, and everything that the text of the answer depends on.

Rules and texts are those of vLLM 0.32.0, SGLang 0.5.23 and llama.cpp of October 2026, as they answered in a run. A
member that is absent is never missed: a test asks with the least.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import msgspec

from edge.simulator import validation
from edge.simulator.behaviour import FASTAPI, Behaviour, Dialect, Refusal
from edge.simulator.memory import BLOCK_BYTES, MAX_BYTES, Memory

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
RESPONSES: Final = "/v1/responses"
MESSAGES: Final = "/v1/messages"
TEXTS: Final = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)

LLAMACPP_MODEL: Final = "/models/simulated.gguf"  # it answers under the path of its file
MAX_CHOICES: Final = 1_024
_LLAMACPP_SLOTS: Final = 4  # and so the most choices
_LLAMACPP_BATCH: Final = 512  # tokens of one text for embeddings
_SGLANG_RESERVE: Final = 2  # tokens of the context that it leaves free
_VLLM_BLOCK: Final = 16  # tokens
_OPENAI_CACHE_FROM, _OPENAI_CACHE_STEP = 1_024, 128  # tokens; platform.openai.com/docs/guides/prompt-caching


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _TransferParams(msgspec.Struct):
    prompt_token_ids: list[int] | None = None


class Ask(msgspec.Struct):
    """The members of a request's body that change the answer; members of a single path stay undecoded."""

    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    n: int | None = None
    top_n: int | None = None
    encoding_format: str | None = None
    return_documents: bool | None = None
    store: bool | None = None
    timings_per_token: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    previous_response_id: str | None = None
    return_token_ids: bool | None = None
    kv_transfer_params: _TransferParams | None = None
    simulate: dict[str, Any] | None = None
    system: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    content: msgspec.Raw = msgspec.Raw()
    tokens: msgspec.Raw = msgspec.Raw()
    documents: msgspec.Raw = msgspec.Raw()
    text_2: msgspec.Raw = msgspec.Raw()
    items: msgspec.Raw = msgspec.Raw()
    questions: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(Ask).decode
_decode_leniently = msgspec.json.Decoder(Ask, strict=False).decode


def ask_of(path: str, body: bytes, dialect: Dialect) -> Ask:
    """Return what a JSON body asks for; servers on FastAPI take numbers and truths that are written as texts.

    Raises: `Refusal` when it is no JSON, or a member has a wrong type.
    """
    try:
        return _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        found: Exception = error
    if dialect in FASTAPI:
        try:
            return _decode_leniently(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            found = error
    raise validation.unreadable(dialect, path, body, str(found))


@dataclass(eq=False)
class WrongMember(Exception):
    """A member that only one path reads, of a wrong type; `found` is what msgspec says of it."""

    name: str
    raw: bytes
    found: str


def member(ask: Ask, name: str, kind: Any, absent: object) -> Any:
    """Return a member of the body that only this path reads, decoded as `kind`.

    Raises: `WrongMember` when it is something else.
    """
    raw = getattr(ask, name)
    try:
        return msgspec.json.decode(raw, type=kind) if raw else absent
    except msgspec.ValidationError as error:
        raise WrongMember(name, bytes(raw), str(error)) from None


def count(ask: Ask, name: str) -> int:
    """Return how many texts a `prompt` or an `input` holds: one text or one list of token ids is one."""
    value = member(ask, name, Any, None)
    return len(value) if isinstance(value, list) and value and not isinstance(value[0], int) else 1


@dataclass(frozen=True, slots=True)
class Question:
    """Everything the text of an answer depends on; the key under which its frames are kept.

    `tokens` and `prompt_tokens` are of one choice and of one prompt. `cache` None: nothing is told of cached tokens.
    `said` are the tokens of a text that depends on the prompt, all of them, also beyond `tokens`. `timed`: llama.cpp
    tells its timings with each token. `thinks`: the answer begins with a thought; None: nobody tells thoughts apart.
    `prompt_ids`: vLLM tells those of the prompt, and of each token.
    """

    dialect: Dialect
    model: str
    tokens: int
    finish: Literal["stop", "length"]
    prompt_tokens: int
    seed: int | None = None
    usage: bool = False
    running_usage: bool = False
    n: int = 1
    prompts: int = 1
    uneven: bool = False
    cached_tokens: int | None = None
    limit: int | None = None
    store: bool = True
    previous_response_id: str | None = None
    request_id: str | None = None
    said: tuple[str, ...] | None = None
    timed: bool = False
    thinks: bool | None = None
    prompt_ids: tuple[int, ...] | None = None

    @property
    def choices(self) -> int:
        """How many texts the answer has."""
        return self.n * self.prompts

    @property
    def created_cache_tokens(self) -> int:
        """What vLLM puts into its cache: whole blocks that it did not have."""
        return self.prompt_tokens // _VLLM_BLOCK * _VLLM_BLOCK - (self.cached_tokens or 0)

    def id(self, kind: Literal["chat", "text", "message", "response", "item"], choice: int = 0) -> str:
        """Return an id as the dialect writes it; SGLang's choices have one each, and vLLM's may be the request's."""
        if self.request_id is not None and kind in ("chat", "text", "message"):
            return _PREFIXES["vllm"][kind] + self.request_id
        number = choice if self.dialect == "sglang" else 0
        key = hashlib.blake2b(f"{self.model} {self.seed} {number}".encode(), digest_size=16).hexdigest()
        return _PREFIXES[self.dialect][kind] + (key[:16] if self.dialect == "vllm" else key)


_PREFIXES: Final[dict[Dialect, dict[str, str]]] = {
    "vllm": {"chat": "chatcmpl-", "text": "cmpl-", "message": "chatcmpl-", "response": "resp_", "item": "msg_"},
    "sglang": {"chat": "", "text": "", "message": "msg_", "response": "resp_", "item": "msg_"},
    "llamacpp": {"chat": "chatcmpl-", "text": "chatcmpl-", "message": "chatcmpl-", "response": "resp_", "item": "msg_"},
    "openai": {"chat": "chatcmpl-", "text": "cmpl-", "message": "msg_", "response": "resp_", "item": "msg_"},
}


def question_of(
    path: str,
    ask: Ask,
    behaviour: Behaviour,
    memory: Memory,
    request_id: str | None = None,
    tokens_said: tuple[str, ...] | None = None,
) -> Question:
    """Return what to answer to `ask`, with `tokens_said` if that is known; `memory` learns how its prompt begins.

    Raises: `Refusal` when the dialect refuses the model, a limit or a number.
    """
    dialect = behaviour.dialect
    options = ask.stream_options or _StreamOptions()
    if dialect == "vllm" and path in (CHAT, COMPLETIONS) and ask.stream_options and not ask.stream:
        said = "Stream options can only be defined when `stream=True`. (parameter=stream_options)"
        raise Refusal(400, said, "stream_options")
    model = _model(path, ask, behaviour)
    whole = tokens = behaviour.tokens if tokens_said is None else len(tokens_said)
    limit = None
    if path in TEXTS:
        limit = _limit(path, ask, behaviour)
        tokens = min(tokens, _room(behaviour), tokens if limit is None else limit)
    elif dialect == "llamacpp" and path == "/v1/embeddings" and behaviour.prompt_tokens > _LLAMACPP_BATCH:
        said = f"input ({behaviour.prompt_tokens} tokens) is too large to process. increase the physical batch size"
        raise Refusal(500, f"{said} (current batch size: {_LLAMACPP_BATCH})")
    n, prompts = _choices(path, ask, dialect)
    if dialect == "vllm" and n > 1 and ask.temperature == 0:
        raise Refusal(400, f"n must be 1 when using greedy sampling, got {n}.")
    asked = bool(options.include_usage)
    running = bool(options.continuous_usage_stats) and (dialect == "sglang" or (dialect == "vllm" and asked))
    return Question(
        dialect=dialect,
        model=model,
        tokens=tokens,
        finish="length" if tokens < whole else "stop",
        prompt_tokens=behaviour.prompt_tokens,
        seed=ask.seed,
        usage=asked,
        running_usage=running,
        n=n,
        prompts=prompts,
        uneven=behaviour.uneven,
        cached_tokens=_cached(path, ask, behaviour, model, memory) if behaviour.prefix_cache else None,
        limit=ask.max_output_tokens if path == RESPONSES else None,
        store=ask.store is not False,
        previous_response_id=ask.previous_response_id if path == RESPONSES else None,
        request_id=request_id if behaviour.request_ids == "answered" and dialect == "vllm" else None,
        said=tokens_said,
        timed=bool(ask.timings_per_token),
    )


def _model(path: str, ask: Ask, behaviour: Behaviour) -> str:
    """Return the name to answer under.

    vLLM answers under the first name that it is served by, llama.cpp under its file's, and SGLang, which looks at names
    in the Responses API only, under the one that was asked for.
    """
    served, asked = behaviour.served, ask.model
    known = served is None or asked is None or asked in served
    match behaviour.dialect:
        case "vllm":
            if not known:
                aliases = ", ".join(served or ())
                raise Refusal(404, f"The model `{asked}` does not exist. Valid aliases: {aliases}.", "model")
            return served[0] if served else asked or "simulated"
        case "sglang":
            if not known and path == RESPONSES:
                raise Refusal(404, f"The model '{asked}' does not exist", "model")
            return asked or "default"
        case "llamacpp":
            own = served[0] if served else LLAMACPP_MODEL
            return own if path in TEXTS else asked or own
        case "openai":
            if not known:
                raise Refusal(404, f"The model `{asked}` does not exist.", "model")
            return asked or (served or ("simulated",))[0]


def _limit(path: str, ask: Ask, behaviour: Behaviour) -> int | None:
    """Return how many tokens the request allows, after what the dialect says of it, of the context and of numbers."""
    name, limit = "max_tokens", ask.max_tokens
    if path == CHAT and ask.max_completion_tokens is not None:
        name, limit = "max_completion_tokens", ask.max_completion_tokens
    elif path == RESPONSES:
        name, limit = "max_output_tokens", ask.max_output_tokens
    match behaviour.dialect:
        case "vllm":
            if path == MESSAGES and limit is not None:
                validation.require_positive(behaviour.dialect, path, limit)
                name = "max_completion_tokens"
            _fit_vllm(name, limit, behaviour)
            validation.require_sampling(behaviour.dialect, ask.temperature, ask.top_p)
            if limit is not None and limit < 1:
                said = f"max_tokens must be at least 1, got {limit}. (parameter=max_tokens, value={limit})"
                raise Refusal(400, said, "max_tokens")
        case "sglang":
            if path in (COMPLETIONS, MESSAGES) and limit is not None:
                validation.require_positive(behaviour.dialect, path, limit)
            if path == RESPONSES and limit is not None:
                limit -= _SGLANG_RESERVE  # so does 0.5.23
            _fit_sglang(path, limit, behaviour)
            validation.require_sampling(behaviour.dialect, ask.temperature, ask.top_p)
            if limit is not None and limit < 0:
                raise Refusal(400, f"max_new_tokens must be at least 0, got {limit}.")
        case "llamacpp":
            _fit_llamacpp(behaviour)
            return None if limit is None or limit < 0 else max(limit, 1)
        case "openai":
            if limit is not None and limit < 1:
                raise Refusal(400, f"{name} must be at least 1, got {limit}.", name)
            _fit_openai(limit, behaviour)
    return limit


def _fit_vllm(name: str, limit: int | None, behaviour: Behaviour) -> None:
    """Let prompt and limit fit into the context, each by itself; 0.32 lowers the limit to what is left."""
    context = behaviour.context_length
    if limit is not None and limit > context:
        said = f"{name}={limit} cannot be greater than max_model_len={context}. Please request fewer output tokens."
        raise Refusal(400, f"{said} (parameter={name}, value={limit})", name)
    if behaviour.prompt_tokens > context:
        said = (
            f"This model's maximum context length is {context} tokens. However, your prompt contains at least "
            f"{context + 1} input tokens, which exceeds this limit even without any output tokens. Please reduce the "
            f"length of the input prompt. (parameter=input_tokens, value={context + 1})"
        )
        raise Refusal(400, said, "input_tokens")


def _fit_sglang(path: str, limit: int | None, behaviour: Behaviour) -> None:
    """Let prompt and limit fit into the context together."""
    context, prompt = behaviour.context_length, behaviour.prompt_tokens
    if path in (CHAT, MESSAGES) and limit is not None and limit > context:
        said = f"max_completion_tokens is too large: {limit}.This model supports at most {context} completion tokens."
        raise Refusal(400, said, kind="invalid_request_error" if path == MESSAGES else None)
    if prompt >= context:
        said = f"The input ({prompt} tokens) is longer than the model's context length ({context} tokens)."
    elif limit is not None and prompt + limit > context:
        said = (
            f"Requested token count exceeds the model's maximum context length of {context} tokens. You requested a "
            f"total of {prompt + limit} tokens: {prompt} tokens from the input messages and {limit} tokens for the "
            "completion. Please reduce the number of tokens in the input messages or the completion to fit within the "
            "limit."
        )
    else:
        return
    raise Refusal(400, said, kind="BadRequestError" if path == MESSAGES else None, late=True)


def _fit_llamacpp(behaviour: Behaviour) -> None:
    """Let the prompt alone decide; the answer ends with the context."""
    context, prompt = behaviour.context_length, behaviour.prompt_tokens
    if prompt >= context:
        said = f"request ({prompt} tokens) exceeds the available context size ({context} tokens), try increasing it"
        more = {"n_prompt_tokens": prompt, "n_ctx": context}
        raise Refusal(400, said, kind="exceed_context_size_error", members=more)


def _fit_openai(limit: int | None, behaviour: Behaviour) -> None:
    context, prompt = behaviour.context_length, behaviour.prompt_tokens
    if prompt + (limit or 0) > context:
        said = f"This model's maximum context length is {context} tokens. However, you requested "
        said += f"{prompt + (limit or 0)} tokens ({prompt} in the messages, {limit or 0} in the completion)."
        said += " Please reduce the length of the messages or completion."
        raise Refusal(400, said, "messages", code="context_length_exceeded")


def _room(behaviour: Behaviour) -> int:
    """Return how many tokens the context leaves for an answer."""
    kept = _SGLANG_RESERVE if behaviour.dialect == "sglang" else 0
    return max(0, behaviour.context_length - behaviour.prompt_tokens - kept)


def _choices(path: str, ask: Ask, dialect: Dialect) -> tuple[int, int]:
    """Return how many choices each prompt has, and how many prompts."""
    n = 1 if ask.n is None or path not in (CHAT, COMPLETIONS) else ask.n
    prompts = count(ask, "prompt") if path == COMPLETIONS and bytes(memoryview(ask.prompt)[:1]) == b"[" else 1
    if dialect == "llamacpp" and not 1 <= n <= _LLAMACPP_SLOTS:
        raise Refusal(400, f"Field 'n': Value must be between 1 <= value <= {_LLAMACPP_SLOTS}, but got {n}")
    if n < 1:
        raise Refusal(400, f"n must be at least 1, got {n}.")
    if n * prompts > MAX_CHOICES:
        raise Refusal(400, f"n must be at most {MAX_CHOICES // prompts}, got {n}.")
    return n, prompts


def counted(path: str, ask: Ask, behaviour: Behaviour) -> Behaviour:
    """Return the behaviour with as many tokens of the prompt as its bytes are."""
    if not behaviour.bytes_per_token or path not in TEXTS:
        return behaviour
    return replace(behaviour, prompt_tokens=max(1, int(len(_prompt(ask)) / behaviour.bytes_per_token)))


def _prompt(ask: Ask) -> bytes:
    return bytes(ask.system) + bytes(ask.messages or ask.prompt or ask.input)


def _cached(path: str, ask: Ask, behaviour: Behaviour, model: str, memory: Memory) -> int:
    """Return how many tokens of the prompt the dialect had kept of earlier ones."""
    prompt = _prompt(ask)
    if path not in TEXTS or not prompt:
        return 0
    tokens, per_token = behaviour.prompt_tokens, behaviour.bytes_per_token or 4
    most = int(behaviour.cache_tokens * per_token) or MAX_BYTES
    block = int(_VLLM_BLOCK * per_token) if behaviour.bytes_per_token else BLOCK_BYTES
    known = min(tokens * memory.prefixes.known_bytes(model, prompt, most, block) // len(prompt), tokens - 1)
    match behaviour.dialect:
        case "vllm":
            return known // _VLLM_BLOCK * _VLLM_BLOCK
        case "openai":
            return known // _OPENAI_CACHE_STEP * _OPENAI_CACHE_STEP if tokens >= _OPENAI_CACHE_FROM else 0
        case _:
            return max(known, 0)
