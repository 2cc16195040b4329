"""Sounds and pictures: speech, transcriptions, images."""

from typing import Any, Final

from edge.simulator.questions import Ask, Question
from edge.simulator.scripts import CREATED, Script, answer_text

MAX_IMAGES: Final = 10  # as OpenAI
_PIXEL: Final = (  # a PNG of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def speech(question: Question) -> Script:
    """Return sound that is none: a frame of bytes per token, with what looks like the end of events and chunks."""
    looks = b"\xff\xfb\x90\x00data: \n\n0\r\n\r\n"
    frames = tuple(looks + index.to_bytes(4, "big") * 64 for index in range(question.tokens))
    return Script("audio/mpeg", frames, question.tokens, stream=True)


def transcription(question: Question) -> dict[str, Any]:
    """Return the text of a sound, with its length."""
    return {"text": answer_text(question.tokens), "usage": {"type": "duration", "seconds": 1}}


def translation(question: Question) -> dict[str, Any]:
    """Return the English text of a sound; nobody tells its length."""
    return {"text": answer_text(question.tokens)}


def images(ask: Ask) -> dict[str, Any]:
    """Return pictures of one pixel."""
    return {"created": CREATED, "data": [{"b64_json": _PIXEL}] * min(ask.n or 1, MAX_IMAGES)}
