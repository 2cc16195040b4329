"""What speech and transcripts used, however their answers come."""

import json
from typing import Any

import pytest

from edge.exchange import NO_USAGE, Usage, UsageSource
from edge.metering.documents import MAX_DOCUMENT_BYTES
from edge.metering.meters import Metering
from edge.operations import OPERATIONS

FINAL, RUNNING, _, NONE = UsageSource
SPEECH, TRANSCRIPTS = "audio/speech", ("audio/transcriptions", "audio/translations")
CHARACTERS = 7
MP3 = b"\xff\xfb\x90\x00" * 99
SOUNDS = [MP3, b"RIFF$\0\0\0WAVE", b"{\0" * 999, b"{", b"\0", MP3 * (MAX_DOCUMENT_BYTES // len(MP3) + 2)]


def used(operation: str, content: bytes, *, whole: bool = True, stream: bool = False, step: int = 0) -> Usage:
    """What an answer used that came in pieces of `step` bytes, 0 for one piece."""
    metering = Metering(OPERATIONS[operation], prompt_estimate=CHARACTERS)
    meter = metering.events() if stream else metering.document()
    for at in range(0, len(content), step or max(1, len(content))):
        piece = content[at : at + step] if step else content
        assert meter.feed(piece) is piece
    return meter.usage(whole)


def test_speech_used_the_characters_of_its_text() -> None:
    for sound in SOUNDS:
        for step in (0, 1, 5) if len(sound) < MAX_DOCUMENT_BYTES else (0, 65536):
            if sound == b"{":
                continue  # not certain to be sound
            assert used(SPEECH, sound, step=step) == Usage(units=CHARACTERS, unit="characters", source=FINAL)


def test_speech_that_is_cut_used_all_its_characters_once_there_was_sound() -> None:
    assert used(SPEECH, MP3[:1], whole=False) == Usage(units=CHARACTERS, unit="characters", source=RUNNING)
    for nothing in (b"", b"{"):
        assert used(SPEECH, nothing, whole=False) == NO_USAGE


@pytest.mark.parametrize(
    ("value", "usage"),
    [
        ({"error": {"message": "no voice"}}, NO_USAGE),
        ({"audio": "AAAA"}, NO_USAGE),
        ({"audio": "AAAA", "usage": {"characters": 9}}, Usage(units=9, unit="characters", source=FINAL)),
        ({"usage": {"input_tokens": 3, "output_tokens": 50}}, Usage(3, 50, source=FINAL)),
    ],
)
def test_json_instead_of_sound_used_what_it_tells(value: dict[str, Any], usage: Usage) -> None:
    for content in (json.dumps(value).encode(), json.dumps(value, indent=1).encode()):
        for step in (0, 1):
            assert used(SPEECH, content, step=step) == usage


def test_speech_in_events_used_what_they_tell_else_its_characters() -> None:
    sound = b'data: {"type":"speech.audio.delta","audio":"AAAA"}\n\n'
    done = b'data: {"type":"speech.audio.done"%b}\n\n'
    told = done % b',"usage":{"input_tokens":3,"output_tokens":50,"total_tokens":53}'
    for step in (0, 1):
        assert used(SPEECH, sound + told, stream=True, step=step) == Usage(3, 50, source=FINAL)
        counted = Usage(units=CHARACTERS, unit="characters", source=FINAL)
        assert used(SPEECH, sound + done % b"", stream=True, step=step) == counted
    cut = used(SPEECH, sound, stream=True, whole=False)
    assert cut == Usage(units=CHARACTERS, unit="characters", source=RUNNING)
    for nothing in (b"", b": ping\n\n", b'data: {"error":{"message":"m"}}\n\n'):
        assert used(SPEECH, nothing, stream=True) == NO_USAGE


@pytest.mark.parametrize("operation", TRANSCRIPTS)
@pytest.mark.parametrize(
    ("members", "usage"),
    [
        ({"duration": 8.47}, Usage(units=9, unit="seconds", source=FINAL)),
        ({"duration": "8.47"}, Usage(units=9, unit="seconds", source=FINAL)),
        (
            {"duration": 8.47, "usage": {"type": "duration", "seconds": 10}},
            Usage(units=10, unit="seconds", source=FINAL),
        ),
        ({"duration": 8.47, "usage": {"input_tokens": 12, "output_tokens": 5}}, Usage(12, 5, source=FINAL)),
        ({"duration": 8.47, "usage": None}, Usage(units=9, unit="seconds", source=FINAL)),
        ({"duration": 0}, NO_USAGE),
        ({"duration": -1}, NO_USAGE),
        ({"duration": "long"}, NO_USAGE),
        ({"duration": {"seconds": 3}}, NO_USAGE),
        ({"segments": [{"duration": 3}]}, NO_USAGE),
        ({}, NO_USAGE),
    ],
)
def test_transcript_used_the_seconds_that_it_tells(operation: str, members: dict[str, Any], usage: Usage) -> None:
    for padding in ("", "a" * MAX_DOCUMENT_BYTES):
        content = json.dumps({"task": "transcribe", **members, "text": f"so {padding}"}).encode()
        for step in (0, 7) if not padding else (65536,):
            assert used(operation, content, step=step) == usage


def test_transcript_that_is_cut_used_the_seconds_that_it_told_before() -> None:
    for padding in (b"", b"a" * MAX_DOCUMENT_BYTES):
        content = b'{"task":"transcribe","duration":"8.47","text":"so ' + padding
        assert used(TRANSCRIPTS[0], content, whole=False) == Usage(units=9, unit="seconds", source=RUNNING)
    assert used(TRANSCRIPTS[0], b"1\n00:00:00,000 --> 00:00:01,000\nso\n") == NO_USAGE
