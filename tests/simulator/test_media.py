"""Sounds and pictures: bytes that look like frames, forms, and forms without what they are for."""

from typing import Any

import aiohttp
import pytest

from edge.simulator.behaviour import Behaviour
from edge.simulator.scripts import answer_text
from edge.simulator.server import Simulator
from tests.simulator.asking import asked, simulating

TRANSCRIPTIONS = "/v1/audio/transcriptions"
TRANSLATIONS = "/v1/audio/translations"


async def posted(simulator: Simulator, path: str, form: aiohttp.FormData) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession() as client, client.post(simulator.url + path, data=form) as response:
        return response.status, await response.json()


def sound(**fields: str) -> aiohttp.FormData:
    form = aiohttp.FormData(fields)
    form.add_field("file", b"\x00\xff--\r\n\r\nRIFF", filename="a.wav", content_type="audio/wav")
    return form


async def test_speech_is_bytes_in_chunks() -> None:
    """One chunk per token, holding what would end an event or a chunk if anybody looked inside."""
    answer = await asked("vllm", {"model": "m", "input": "x"}, "/v1/audio/speech", tokens=4)
    assert (answer.headers["content-type"], answer.headers["transfer-encoding"]) == ("audio/mpeg", "chunked")
    assert [chunk.count(b"\n\n0\r\n\r\n") for chunk in answer.chunks] == [1] * 4


@pytest.mark.parametrize("path", [TRANSCRIPTIONS, TRANSLATIONS, "/v1/images/edits"])
async def test_forms_are_read_part_by_part(path: str) -> None:
    """The file is kept in the record as it came; the `simulate` part steers."""
    async with simulating() as simulator:
        form = sound(model="whisper", simulate='{"served": ["whisper"], "tokens": 3}')
        status, answer = await posted(simulator, path, form)
        assert b"\x00\xff--\r\n\r\nRIFF" in simulator.requests[0].body
    assert status == 200
    assert answer.get("text") == answer_text(3) or "data" in answer


async def test_length_of_a_sound_is_told_of_a_transcription_only() -> None:
    async with simulating(Behaviour(tokens=1)) as simulator:
        used = {"type": "duration", "seconds": 1}
        assert await posted(simulator, TRANSCRIPTIONS, sound()) == (200, {"text": " token0", "usage": used})
        assert await posted(simulator, TRANSLATIONS, sound()) == (200, {"text": " token0"})


async def test_form_for_an_unserved_model_is_404() -> None:
    """The model's name is read from its part."""
    async with simulating(Behaviour(served=("whisper",))) as simulator:
        assert (await posted(simulator, TRANSCRIPTIONS, sound(model="other")))[0] == 404


@pytest.mark.parametrize("path", [TRANSCRIPTIONS, TRANSLATIONS])
async def test_form_without_a_file_says_what_is_missing(path: str) -> None:
    async with simulating() as simulator:
        status, answer = await posted(simulator, path, aiohttp.FormData({"model": "m"}, default_to_multipart=True))
    assert status == 400
    assert answer["error"] == {
        "message": "1 validation error:\n  "
        "{'type': 'missing', 'loc': 'body.file', 'msg': 'Field required', 'input': 'None'}",
        "type": "Bad Request",
        "param": "body.file",
        "code": 400,
    }
    assert (await asked("sglang", {"model": "m"}, TRANSCRIPTIONS)).json["type"] == "Bad Request"


@pytest.mark.parametrize(("fault", "path"), [("error", TRANSCRIPTIONS), ("error_mid", TRANSLATIONS)])
async def test_fault_is_a_status_in_place_of_a_text(fault: Any, path: str) -> None:
    async with simulating(Behaviour(fault=fault, status=503)) as simulator:
        status, answer = await posted(simulator, path, sound())
    assert (status, answer["error"]["code"]) == (503, 503)


@pytest.mark.parametrize("fault", ["error", "error_first", "error_mid"])
async def test_speech_fails_before_its_first_byte(fault: str) -> None:
    answer = await asked("vllm", {}, "/v1/audio/speech", fault=fault)
    assert (answer.status, answer.error["code"]) == (500, 500)


async def test_pictures_are_as_many_as_were_asked_for() -> None:
    answer = await asked("openai", {"prompt": "p", "n": 2}, "/v1/images/generations")
    assert [each["b64_json"][:5] for each in answer.json["data"]] == ["iVBOR"] * 2


@pytest.mark.parametrize(
    "fields", [{"simulate": "{"}, {"simulate": "3"}, {"simulate": '{"fault": "fire"}'}, {"n": "two"}]
)
async def test_forms_that_make_no_sense_are_400(fields: dict[str, str]) -> None:
    """A misspelt `simulate` part must not pass either."""
    async with simulating() as simulator:
        assert (await posted(simulator, "/v1/images/edits", sound(**fields)))[0] == 400


async def test_json_where_a_form_belongs_is_400() -> None:
    """The paths with files take multipart only."""
    answer = await asked("vllm", {"model": "m"}, "/v1/images/edits")
    assert answer.status == 400
    assert "multipart/form-data" in answer.error["message"]
