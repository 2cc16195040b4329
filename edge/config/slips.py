"""What a value that is wrong was probably meant to be, for the hint of its problem.

Only numbers, units and truth values are guessed: a value that may hold a secret is never repeated.
"""

import re
from typing import Final

_TRUE: Final = frozenset({"true", "yes", "on", "1", "y"})
_FALSE: Final = frozenset({"false", "no", "off", "0", "n"})
_NUMBER_AND_UNIT: Final = re.compile(r"([0-9][0-9_,]{0,15}(?:\.[0-9]{1,9})?) ?([A-Za-z]*)(?:/[A-Za-z]+)?")
_TIMES: Final = {
    "ms": ("ms", "msec", "msecs", "millis", "millisecond", "milliseconds"),
    "s": ("", "s", "sec", "secs", "second", "seconds"),
    "m": ("m", "min", "mins", "minute", "minutes"),
    "h": ("h", "hr", "hrs", "hour", "hours"),
    "d": ("d", "day", "days"),
    "w": ("w", "week", "weeks"),
}
_UNIT_OF_TIME: Final = {word: unit for unit, words in _TIMES.items() for word in words}
_PARTS_OF_TIME: Final = re.compile(r"(?:([0-9]{1,4})d)? ?(?:([0-9]{1,4})h)? ?(?:([0-9]{1,4})m)? ?(?:([0-9]{1,4})s)?")
_PARTS_S: Final = (86400, 3600, 60, 1)
_SIZES: Final = {"": "B", "b": "B", "byte": "B", "bytes": "B"} | {
    f"{letter.lower()}{end}": f"{letter}{unit}"
    for letter in "KMG"
    for end, unit in (("", "iB"), ("ib", "iB"), ("b", "B"))
}
_THOUSANDS: Final = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def meant_flag(value: object) -> str | None:
    """Return `"true"` or `"false"`, None when the value says neither."""
    word = str(value).strip().lower()
    return "true" if word in _TRUE else "false" if word in _FALSE else None


def meant_count(value: object) -> int | None:
    """Return the whole number of `"64"`, `"128k"`, `"60/min"` or `1e4`, None when there is none."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    match = _NUMBER_AND_UNIT.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or match[2].lower() not in _THOUSANDS:
        return None
    number = float(re.sub("[_,]", "", match[1])) * _THOUSANDS[match[2].lower()]
    return int(number) if number.is_integer() else None


def meant_duration(text: str) -> str | None:
    """Return `"30s"` for `"30"` and `"30 sec"`, `"90s"` for `"1m30s"`, None when nothing is near."""
    text = text.strip().lower()
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if match is not None and match[2] in _UNIT_OF_TIME and "," not in match[1]:
        return match[1].replace("_", "") + _UNIT_OF_TIME[match[2]]
    parts = _PARTS_OF_TIME.fullmatch(text)
    if parts is None or not text:
        return None
    return f"{sum(int(part or 0) * in_s for part, in_s in zip(parts.groups(), _PARTS_S, strict=True))}s"


def meant_size(text: str) -> str | None:
    """Return `"64MiB"` for `"64M"` and `"64 mib"`, `"64MB"` for `"64mb"`, None when nothing is near."""
    match = _NUMBER_AND_UNIT.fullmatch(text.strip())
    if match is None or match[2].lower() not in _SIZES or "," in match[1]:
        return None
    return match[1].replace("_", "") + _SIZES[match[2].lower()]
