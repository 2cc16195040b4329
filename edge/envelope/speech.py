"""What a body asks to be spoken."""

import msgspec


class _Spoken(msgspec.Struct):
    input: str = ""


_spoken = msgspec.json.Decoder(_Spoken)


def spoken_characters(body: bytes) -> int:
    """Return how many characters (code points of Unicode) the text `input` of a body has; 0 for what is no text."""
    try:
        return len(_spoken.decode(body).input)
    except (msgspec.DecodeError, RecursionError):
        return 0
