"""What servers say of a body that they cannot read, or of a number out of range.

vLLM and SGLang pass on what pydantic finds, llama.cpp what nlohmann's JSON does. SGLang adds the place in its own code
(seen with 0.5.23), which is none of a caller's business: a proxy must not pass that on.
"""

import json
import re
from typing import Any, Final

import orjson

from edge.simulator.behaviour import FASTAPI, Dialect, Refusal

_PLACE: Final = "/usr/local/lib/python3.12/dist-packages/sglang/srt/entrypoints/http_server.py"
_HANDLERS: Final = {  # of SGLang, with their lines
    "/v1/completions": (1860, "openai_v1_completions"),
    "/v1/chat/completions": (1870, "openai_v1_chat_completions"),
    "/v1/responses": (2066, "v1_responses_request"),
}
_FOUND: Final = re.compile(r"Expected `(\w+)[^`]*`, got `(\w+)`(?: - at `\$\.?([\w.]*)`)?")
_NUMBER: Final = "Input should be a valid number"
_INTEGER: Final = "Input should be a valid integer"
_BOOLEAN: Final = "Input should be a valid boolean"
_PYDANTIC: Final[dict[tuple[str, str], tuple[str, str]]] = {  # what is expected and what came: kind and words
    ("int", "str"): ("int_parsing", f"{_INTEGER}, unable to parse string as an integer"),
    ("int", "float"): ("int_from_float", f"{_INTEGER}, got a number with a fractional part"),
    ("int", ""): ("int_type", _INTEGER),
    ("float", "str"): ("float_parsing", f"{_NUMBER}, unable to parse string as a number"),
    ("float", ""): ("float_type", _NUMBER),
    ("bool", "str"): ("bool_parsing", f"{_BOOLEAN}, unable to interpret input"),
    ("bool", "int"): ("bool_parsing", f"{_BOOLEAN}, unable to interpret input"),
    ("bool", ""): ("bool_type", _BOOLEAN),
    ("str", ""): ("string_type", "Input should be a valid string"),
    ("array", ""): ("list_type", "Input should be a valid list"),
    ("object", ""): ("model_attributes_type", "Input should be a valid dictionary or object to extract fields from"),
}
_NLOHMANN: Final = {"int": "number", "float": "number", "bool": "boolean", "str": "string"}  # the rest are alike


def unreadable(dialect: Dialect, path: str, body: bytes, found: str) -> Refusal:
    """Return what to say of a body that is no JSON, or of which msgspec `found` a member to be wrong."""
    wrong = _FOUND.match(found)
    if wrong is None:
        return _no_json(dialect, path, body, found)
    expected, got, at = wrong.groups()
    names = tuple(filter(None, (at or "").split(".")))
    if names[:1] == ("simulate",):
        return Refusal(400, f"simulate: {found}", "simulate")
    value = json.loads(body)
    for name in names:
        value = value[name]
    return wrong_type(dialect, path, names, expected, got, value)


def wrong_member(dialect: Dialect, path: str, name: str, raw: bytes, found: str) -> Refusal:
    """Return what to say of a member by itself that msgspec `found` to be wrong."""
    wrong = _FOUND.match(found)
    expected, got = wrong.groups()[:2] if wrong else ("str", "")
    return wrong_type(dialect, path, (name,), expected, got, json.loads(raw))


def wrong_type(dialect: Dialect, path: str, names: tuple[str, ...], expected: str, got: str, value: object) -> Refusal:
    """Return what to say of a value that is not of the type that is `expected`; both types as msgspec calls them."""
    if dialect == "openai":
        where = ".".join(names)
        return Refusal(400, f"Invalid type for '{where}': expected {expected}, but got {got} instead.", where)
    if dialect == "llamacpp":
        if not names:
            return Refusal(400, "'messages' is required")
        types = f"type must be {_NLOHMANN.get(expected, expected)}, but is {_NLOHMANN.get(got, got)}"
        said = f"[json.exception.type_error.302] {types}"
        return Refusal(400, said if expected == "array" else f"Field '{names[-1]}': {said}")
    kind, words = _PYDANTIC.get((expected, got)) or _PYDANTIC.get((expected, ""), ("value_error", "Invalid value"))
    return invalid(dialect, path, kind, ("body", *names), words, value)


def missing(dialect: Dialect, path: str, name: str) -> Refusal:
    """Return what to say of a member that is not there."""
    return invalid(dialect, path, "missing", ("body", name), "Field required", None)


def _no_json(dialect: Dialect, path: str, body: bytes, found: str) -> Refusal:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        text = ""
        if dialect == "vllm":
            return Refusal(400, "There was an error parsing the body", kind="detail")
    try:
        (orjson.loads if dialect == "sglang" else json.loads)(text)
    except json.JSONDecodeError as error:  # orjson's is one too
        if dialect in FASTAPI:
            return invalid(
                dialect, path, "json_invalid", ("body", error.pos), "JSON decode error", {}, {"error": error.msg}
            )
        if dialect == "llamacpp":
            where = f"parse error at line {error.lineno}, column {error.colno}"
            return Refusal(400, f"[json.exception.parse_error.101] {where}: syntax error while parsing value")
    return Refusal(400, f"The body cannot be read: {found}")


def invalid(
    dialect: Dialect,
    path: str,
    kind: str,
    at: tuple[str | int, ...],
    words: str,
    value: object,
    context: dict[str, Any] | None = None,
) -> Refusal:
    """Return what vLLM or SGLang says when its model of a request does not take a body."""
    where = ".".join(map(str, at))
    if dialect == "vllm":
        error = {"type": kind, "loc": where, "msg": words, "input": _summary(value)}
        said = f"1 validation error:\n  {error | ({'ctx': context} if context else {})}"
        return Refusal(400, said, where, kind="Bad Request")
    if path.startswith("/v1/messages"):
        return Refusal(400, f"{where.removeprefix('body.')}: {words}", kind="invalid_request_error")
    found = {"type": kind, "loc": at, "msg": words, "input": value} | ({"ctx": context} if context else {})
    line, handler = _HANDLERS.get(path, (1906, "openai_v1_tokenize"))
    place = f'  File "{_PLACE}", line {line}, in {handler}\n    POST {path}'
    return Refusal(400, f"1 validation error:\n  {found}\n\n{place} [{found}]", kind="Bad Request")


def _summary(value: object) -> str:
    """Return a value as vLLM shows it in an error, which is never as long as the request."""
    if isinstance(value, list | dict):
        return f"<{type(value).__name__} of {len(value)} items>"
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}...[truncated]"


def require_positive(dialect: Dialect, path: str, max_tokens: int) -> None:
    """Raise `Refusal` for a `max_tokens` below 1 where the model of the request itself refuses it."""
    if max_tokens < 1:
        words, context = "max_tokens must be positive", {"error": ValueError("max_tokens must be positive")}
        raise invalid(
            dialect, path, "value_error", ("body", "max_tokens"), f"Value error, {words}", max_tokens, context
        )


def require_sampling(dialect: Dialect, temperature: float | None, top_p: float | None) -> None:
    """Raise `Refusal` for numbers that vLLM and SGLang do not sample by; llama.cpp takes any."""
    if temperature is not None and (temperature < 0 or (temperature > 2 and dialect == "vllm")):
        rule = "non-negative" if dialect == "vllm" else "a non-negative finite number"
        rule = "in [0, 2]" if temperature > 2 else rule
        raise _out_of_range(dialect, "temperature", rule, temperature)
    if top_p is not None and not 0 < top_p <= 1:
        raise _out_of_range(dialect, "top_p", "in (0, 1]", top_p)


def _out_of_range(dialect: Dialect, name: str, rule: str, value: float) -> Refusal:
    said = f"{name} must be {rule}, got {value}."
    if dialect == "vllm":
        return Refusal(400, f"{said} (parameter={name}, value={value})", name)
    return Refusal(400, said)


def media_type(dialect: Dialect) -> Refusal:
    """Return what vLLM and SGLang say of a body that is not announced as JSON."""
    words = "Unsupported Media Type: Only 'application/json' is allowed"
    if dialect == "vllm":
        return Refusal(400, f"1 validation error:\n  {words}", kind="Bad Request")
    found = {"loc": ["header", "content-type"], "msg": words, "type": "value_error"}
    return Refusal(400, f"1 validation error:\n  {found} [{found}]", kind="Bad Request")
