"""What a model server answers, as vLLM, SGLang, llama.cpp or OpenAI do: their paths, and the answer to each.

Nothing is sent in here: text, ids and times of creation are the same for the same question, so that answers can be
compared byte for byte. A further engine is a name in `behaviour.Dialect`; type-checking then shows each place that
needs its habits: `chat`, `messages`, `responses`, `usage`, `reading` and `errors`, and its paths here.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from edge.simulator import chat, errors, media, messages, reading, responses, speaking, validation
from edge.simulator.behaviour import FASTAPI, Behaviour, Dialect, Refusal
from edge.simulator.errors import error_document, error_frames
from edge.simulator.memory import Memory
from edge.simulator.questions import (
    CHAT,
    COMPLETIONS,
    LLAMACPP_MODEL,
    MESSAGES,
    RESPONSES,
    TEXTS,
    Ask,
    Question,
    WrongMember,
    question_of,
)
from edge.simulator.scripts import CREATED, DONE, Script, answer_text, document, http_chunk

__all__ = ["Ask", "Behaviour", "Dialect", "Question", "Refusal", "answer_text", "error_document", "error_frames"]

HEADERS: Final[dict[Dialect, tuple[str, ...]]] = {
    "vllm": ("vary: Origin",),
    "sglang": ("vary: Origin",),
    "openai": ("openai-processing-ms: 1", "x-request-id: req_simulated"),
}
_COUNT_TOKENS: Final = "/v1/messages/count_tokens"
_TEMPLATE: Final = "/apply-template"
_SYSTEM_ONE: Final = "/v1/systemone"
_TRANSCRIPTIONS: Final = "/v1/audio/transcriptions"

# Paths by the kind of model that they are for. vLLM's and SGLang's siblings for pictures and sounds are of the family.
_GENERATION: Final = frozenset({*TEXTS, _COUNT_TOKENS, _SYSTEM_ONE})
_PICTURES: Final = frozenset({"/v1/audio/speech", "/v1/images/generations", "/v1/images/edits"})
_CHAT_PATHS: Final[dict[Dialect, frozenset[str]]] = {
    "vllm": _GENERATION | {"/tokenize", "/detokenize"},
    "sglang": _GENERATION | {"/tokenize", "/detokenize", "/v1/tokenize", "/v1/detokenize"},
    "llamacpp": _GENERATION | {"/tokenize", "/detokenize", _TEMPLATE},
    "openai": frozenset({CHAT, COMPLETIONS, RESPONSES}),
}
_OTHER_PATHS: Final[dict[Dialect, frozenset[str]]] = {
    "vllm": _PICTURES
    | {"/v1/embeddings", "/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score"}
    | {_TRANSCRIPTIONS, "/v1/audio/translations"},
    "sglang": _PICTURES | {"/v1/embeddings", "/v1/rerank", "/v1/score", _TRANSCRIPTIONS},
    "llamacpp": frozenset({"/v1/embeddings", "/rerank", "/reranking", "/v1/rerank", "/v1/reranking", _TRANSCRIPTIONS}),
    "openai": _PICTURES | {"/v1/embeddings", _TRANSCRIPTIONS, "/v1/audio/translations"},
}
_GETS: Final[dict[Dialect, frozenset[str]]] = {
    "vllm": frozenset({"/health", "/ping", "/version", "/load", "/v1/models"}),
    "sglang": frozenset({"/health", "/health_generate", "/ready", "/ping", "/v1/models"}),
    "llamacpp": frozenset({"/health", "/v1/health", "/models", "/v1/models"}),
    "openai": frozenset({"/v1/models"}),
}
_HEALTH: Final = frozenset({"/health", "/health_generate", "/ready", "/ping", "/v1/health"})

STREAMS: Final[dict[str, Callable[[Question], Script]]] = {
    CHAT: chat.chat_stream,
    COMPLETIONS: chat.completion_stream,
    RESPONSES: responses.response_stream,
    MESSAGES: messages.message_stream,
    "/v1/audio/speech": media.speech,
}
DOCUMENTS: Final[dict[str, Callable[[Ask, Question], object]]] = {
    CHAT: lambda _, question: chat.chat_document(question),
    COMPLETIONS: lambda _, question: chat.completion_document(question),
    RESPONSES: lambda _, question: responses.response_document(question),
    MESSAGES: lambda _, question: messages.message_document(question),
    _COUNT_TOKENS: lambda _, question: messages.count_tokens(question),
    _SYSTEM_ONE: reading.decide,
    "/v1/embeddings": reading.embeddings,
    **dict.fromkeys(("/rerank", "/reranking", "/v1/rerank", "/v1/reranking", "/v2/rerank"), reading.rerank),
    **dict.fromkeys(("/score", "/v1/score"), reading.score),
    **dict.fromkeys(("/v1/images/generations", "/v1/images/edits"), lambda ask, _: media.images(ask)),
    _TRANSCRIPTIONS: lambda _, question: media.transcription(question),
    "/v1/audio/translations": lambda _, question: media.translation(question),
}
_TOKENIZE: Final = frozenset({"/tokenize", "/v1/tokenize"})
_DETOKENIZE: Final = frozenset({"/detokenize", "/v1/detokenize"})
GENERATING: Final = frozenset({*STREAMS, _TRANSCRIPTIONS, "/v1/audio/translations"})
FORMS: Final = frozenset({"/v1/images/edits", _TRANSCRIPTIONS, "/v1/audio/translations"})
POSTS: Final = frozenset(STREAMS) | frozenset(DOCUMENTS) | _TOKENIZE | _DETOKENIZE | {_TEMPLATE}


# A built stream is tens of kilobytes; 64 of them serve any load of few models and lengths.
@functools.lru_cache(maxsize=64)
def stream_script(path: str, question: Question, *, chunked: bool) -> Script:
    """Return the frames of a stream, as HTTP chunks (RFC 9112 section 7.1) if `chunked`."""
    script = STREAMS[path](question)
    return _chunked(script) if chunked else script


def _chunked(script: Script) -> Script:
    return replace(script, frames=tuple(map(http_chunk, script.frames)))


def has_path(behaviour: Behaviour, path: str) -> bool:
    """Return whether this kind of server has a path to post to, with whatever model."""
    return path in _CHAT_PATHS[behaviour.dialect] or path in _OTHER_PATHS[behaviour.dialect]


def script_of(
    path: str, ask: Ask, behaviour: Behaviour, memory: Memory, *, chunked: bool, request_id: str | None = None
) -> Script:
    """Return the answer to `ask`, with the faults in it that lie in the frames themselves.

    Raises: `Refusal` when the dialect would refuse it.
    """
    try:
        return absent(path, behaviour) or _answer(path, ask, behaviour, memory, request_id, chunked=chunked)
    except WrongMember as wrong:
        raise validation.wrong_member(behaviour.dialect, path, wrong.name, wrong.raw, wrong.found) from None


def _answer(
    path: str, ask: Ask, behaviour: Behaviour, memory: Memory, request_id: str | None, *, chunked: bool
) -> Script:
    if ask.previous_response_id is not None and path == RESPONSES:
        _require_response(ask.previous_response_id, behaviour, memory)
    streams = path in STREAMS and (bool(ask.stream) or path not in DOCUMENTS)
    try:
        said = speaking.said_to(path, ask, behaviour)
        question = question_of(path, ask, behaviour, memory, request_id, said)
        question = speaking.parsed(path, ask, behaviour, question)
    except Refusal as refused:
        if refused.late and streams and path == MESSAGES:
            return _refused_message(ask, behaviour, refused, chunked=chunked)
        raise
    events = streams and path in DOCUMENTS
    fault = behaviour.fault
    if fault == "error" or (fault in ("error_first", "error_mid") and not events):
        return errors.refusal(behaviour.dialect, path, Refusal(behaviour.status, errors.FAILURE % behaviour.status))
    if path == RESPONSES and question.store and fault not in ("error_first", "error_mid"):
        memory.responses.keep(question.id("response"), question)
    if not streams:
        tokens = question.tokens * question.choices if path in GENERATING else 0
        return _read(document(behaviour.dialect, _document(path, ask, question, behaviour), tokens=tokens), question)
    script = _read(stream_script(path, question, chunked=chunked), question)
    if fault in ("error_first", "error_mid"):
        return _failing(path, script, question, behaviour, chunked=chunked)
    if fault == "no_done" and script.frames[-1].endswith(DONE + b"\r\n" if chunked else DONE):
        return replace(script, frames=script.frames[:-1])
    return script


def _read(script: Script, question: Question) -> Script:
    """Return a script with what of the prompt has to be read before its first frame."""
    return replace(script, prompt_tokens=question.prompt_tokens, cached_tokens=question.cached_tokens or 0)


def _document(path: str, ask: Ask, question: Question, behaviour: Behaviour) -> object:
    if path in _TOKENIZE:
        return reading.tokenize(path, ask, question, behaviour)
    if path == _TEMPLATE:
        return speaking.rendered(ask, behaviour)
    if path in _DETOKENIZE:
        return reading.detokenize(path, ask, question, behaviour)
    return DOCUMENTS[path](ask, question)


def absent(path: str, behaviour: Behaviour) -> Script | None:
    """Return what the engine answers where it has not the path, or no model for it; None where it has both."""
    dialect = behaviour.dialect
    if not has_path(behaviour, path):
        return errors.no_path(dialect, "POST", path)
    if path in _CHAT_PATHS[dialect] and (path != _SYSTEM_ONE or dialect == "sglang"):
        return None
    if path in _OTHER_PATHS[dialect] and not behaviour.only_chat:
        return None
    match dialect, path:
        case "vllm", "/v1/systemone":
            status, said = 501, "The model does not support the structured decision API"
        case "llamacpp", "/v1/systemone":
            status, said = 501, "This model is not a decision model"
        case "llamacpp", "/v1/embeddings":
            status, said = 501, "This server does not support embeddings. Start it with `--embeddings`"
        case "llamacpp", "/v1/audio/transcriptions":
            status, said = 501, "The current model does not support audio input."
        case "llamacpp", _:
            status, said = 501, "This server does not support reranking. Start it with `--reranking`"
        case "sglang", "/v1/score":
            status, said = 400, "label_token_ids is required for generation (CausalLM) models."
        case "sglang", "/v1/embeddings" | "/v1/rerank":
            status, said = 400, "This model does not appear to be an embedding model by default. Please add"
            said += " `--is-embedding` when launching the server or try another model."
        case _:
            return errors.no_path(dialect, "POST", path)
    return errors.refusal(dialect, path, Refusal(status, said))


def _refused_message(ask: Ask, behaviour: Behaviour, refused: Refusal, *, chunked: bool) -> Script:
    nothing = Question(behaviour.dialect, ask.model or "default", 0, "stop", 0)
    script = messages.refused_stream(nothing, refused.message)
    return _chunked(script) if chunked else script


def _failing(path: str, script: Script, question: Question, behaviour: Behaviour, *, chunked: bool) -> Script:
    """Return a stream with an error in place of what follows the first frames."""
    after = min(max(behaviour.after, 0), script.lead + script.content_frames)
    if behaviour.fault == "error_first":
        # SGLang has begun these streams before it asks its engine.
        begun = {RESPONSES: 2, MESSAGES: 1} if behaviour.dialect == "sglang" else {}
        after = begun.get(path, 0)
    tokens = script.tokens_in(after)
    error = error_frames(path, behaviour.dialect, behaviour.status, question, after, tokens)
    end = tuple(map(http_chunk, error)) if chunked else error
    return replace(script, frames=script.frames[:after] + end, tokens=tokens)


# --- What is asked without a body


def get_script(method: str, path: str, behaviour: Behaviour, memory: Memory, *, healthy: bool) -> Script:
    """Return the answer to what is no question to a model: no pace, no faults.

    Raises: `Refusal` for a response that is unknown.
    """
    dialect = behaviour.dialect
    if path in _GETS[dialect]:
        if method not in ("GET", "HEAD") or (method == "HEAD" and dialect in FASTAPI):
            return errors.no_method(dialect, method, path, "GET")
        return _health(dialect, path, healthy=healthy) if path in _HEALTH else _get(path, behaviour)
    if path.startswith(f"{RESPONSES}/") and dialect != "llamacpp":
        return _response(method, path, behaviour, memory)
    if method == "GET" and path.startswith("/v1/models/") and dialect in ("sglang", "openai"):
        return _model(path.removeprefix("/v1/models/"), behaviour)
    if has_path(behaviour, path):
        return errors.no_method(dialect, method, path, "POST")
    return errors.no_path(dialect, method, path)


def _health(dialect: Dialect, path: str, *, healthy: bool) -> Script:
    """Return whether the server is well; vLLM and SGLang say it by the status alone."""
    if dialect == "llamacpp":
        loading = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
        return document(dialect, {"status": "ok"}) if healthy else document(dialect, loading, status=503)
    return Script("", (b"",), status=200 if healthy or (dialect == "sglang" and path == "/ping") else 503)


def _get(path: str, behaviour: Behaviour) -> Script:
    match path:
        case "/version":
            return document(behaviour.dialect, {"version": "0.32.0"})
        case "/load":
            return document(behaviour.dialect, {"server_load": 0})
        case _:
            return document(behaviour.dialect, models_document(behaviour))


def models_document(behaviour: Behaviour) -> dict[str, Any]:
    """Return the list of the models that are served."""
    own = LLAMACPP_MODEL if behaviour.dialect == "llamacpp" else "simulated"
    names = behaviour.served or (own,)
    listed = {"object": "list", "data": [_card(name, behaviour) for name in names]}
    if behaviour.dialect != "llamacpp":
        return listed
    nothing = {"modified_at": "", "size": "", "digest": "", "type": "model", "description": "", "tags": [""]}
    details = {"parent_model": "", "format": "gguf", "family": "", "families": [""]}
    details |= {"parameter_size": "", "quantization_level": ""}
    more = {"capabilities": ["completion"], "parameters": "", "details": details}
    return {"models": [{"name": name, "model": name} | nothing | more for name in names]} | listed


def _card(name: str, behaviour: Behaviour) -> dict[str, Any]:
    """Return one model, with the length of its context where the dialect tells it."""
    head: dict[str, Any] = {"id": name, "object": "model", "created": CREATED, "owned_by": behaviour.dialect}
    own = {"root": name, "parent": None, "max_model_len": behaviour.context_length}
    match behaviour.dialect:
        case "vllm":
            return head | own | {"permission": [_permission(name)]}
        case "sglang":
            return head | own
        case "llamacpp":
            kinds = {"input_modalities": ["text"], "output_modalities": ["text"]}
            meta = {"vocab_type": 2, "n_vocab": 151_936, "n_ctx": behaviour.context_length}
            meta |= {"n_ctx_train": behaviour.context_length, "n_embd": 896, "n_params": 494_032_768}
            aliases = {"id": name, "aliases": [name], "tags": [], "object": "model", "architecture": kinds}
            end = {"created": CREATED, "owned_by": "llamacpp", "meta": meta | {"size": 988_065_536, "ftype": "F16"}}
            return aliases | end
        case "openai":
            return head


def _permission(name: str) -> dict[str, Any]:
    allowed = {"allow_create_engine": False, "allow_sampling": True, "allow_logprobs": True}
    allowed |= {"allow_search_indices": False, "allow_view": True, "allow_fine_tuning": False}
    head = {"id": f"modelperm-{name}", "object": "model_permission", "created": CREATED}
    return head | allowed | {"organization": "*", "group": None, "is_blocking": False}


def _model(name: str, behaviour: Behaviour) -> Script:
    if name in (behaviour.served or ("simulated",)):
        return document(behaviour.dialect, _card(name, behaviour))
    said = f"The model '{name}' does not exist"
    missing = {"message": said, "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    return document(behaviour.dialect, {"error": missing}, status=404)


# --- Responses that were made before


def _require_response(response_id: str, behaviour: Behaviour, memory: Memory) -> Question:
    """Return what a response answered.

    Raises: `Refusal` when it is unknown, or the dialect keeps none.
    """
    if behaviour.dialect == "llamacpp":
        raise Refusal(400, "llama.cpp does not support 'previous_response_id'.")
    if behaviour.dialect == "sglang" and not response_id.startswith("resp"):
        said = f"Invalid 'response_id': '{response_id}'. Expected an ID that begins with 'resp'."
        raise Refusal(400, said, "response_id")
    found = memory.responses.get(response_id)
    if not isinstance(found, Question):
        said = f"Response with id '{response_id}' not found."
        raise Refusal(404, said, "response_id", kind="invalid_request_error", code="not_found")
    return found


def _response(method: str, path: str, behaviour: Behaviour, memory: Memory) -> Script:
    """Return what is answered below `/v1/responses/`; only OpenAI forgets a response when asked to."""
    dialect = behaviour.dialect
    response_id, _, action = path.removeprefix(f"{RESPONSES}/").partition("/")
    match method, action:
        case "GET", "":
            question = _require_response(response_id, behaviour, memory)
            return document(dialect, responses.response_document(question))
        case "POST", "cancel":
            question = _require_response(response_id, behaviour, memory)
            if dialect != "sglang":  # which answers with the response as it is
                said = "Cannot cancel a synchronous response."
                raise Refusal(400, said, "response_id", kind="invalid_request_error")
            return document(dialect, responses.response_document(question))
        case "DELETE", "" if dialect == "openai":
            _require_response(response_id, behaviour, memory)
            memory.responses.drop(response_id)
            return document(dialect, {"id": response_id, "object": "response", "deleted": True})
        case _ if action in ("", "cancel"):
            return errors.no_method(dialect, method, path, "POST" if action else "GET")
        case _:
            return errors.no_path(dialect, method, path)
