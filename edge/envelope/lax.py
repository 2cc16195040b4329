"""Numbers and truth as engines read them: more generously than JSON writes them.

vLLM and SGLang check a body with pydantic, which takes for a whole number `1e3`, `2.0`, `true` and the text "5" as well
(pydantic 2.14, "Conversion Table", lax mode; tried value by value). `transformers serve` calls `int()`, and llama.cpp
cuts a fraction off (nlohmann::json, `get<int32_t>`). What one engine refuses may be read here: it answers a 400 then.
"""

import re
from typing import Final

import msgspec

_MAX_DIGITS: Final = 15  # of a limit of tokens; no model writes that many
_MAX_BYTES: Final = 64
_TEXT: Final = re.compile(r"\s*\+?([0-9]+(?:_[0-9]+)*)(?:\.0+)?\s*")
_TRUE: Final = msgspec.Raw(b"true")
_TRUE_TEXTS: Final = frozenset({"1", "true", "t", "yes", "y", "on"})
_text = msgspec.json.Decoder(str)


def whole_number(raw: msgspec.Raw) -> int | None:
    """Return the whole number above 0 that a JSON value is to engines; None for what is no such number."""
    digits = bytes(raw)
    if digits.isdigit() and len(digits) <= _MAX_DIGITS:
        return int(digits) or None
    return _unusual(digits) if len(digits) <= _MAX_BYTES else None


def is_true(raw: msgspec.Raw) -> bool:
    """Whether a JSON value is true to engines."""
    if raw == _TRUE:
        return True
    value = bytes(raw)
    if len(value) > _MAX_BYTES:
        return False
    return _text_of(value).lower() in _TRUE_TEXTS if value[:1] == b'"' else _float(value) == 1


def _unusual(value: bytes) -> int | None:
    if value == b"true":
        return 1
    if value[:1] == b'"':
        text = _TEXT.fullmatch(_text_of(value))
        digits = text[1].replace("_", "") if text is not None else ""
        return int(digits or 0) or None
    number = _float(value)
    return int(number) or None if 0 < number < 10**_MAX_DIGITS else None


def _float(value: bytes) -> float:
    try:
        return float(value)
    except ValueError:  # null, false, a list or an object
        return 0


def _text_of(value: bytes) -> str:
    try:
        return _text.decode(value)
    except msgspec.DecodeError:
        return ""
