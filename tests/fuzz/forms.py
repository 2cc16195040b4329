"""What a form asks for: Starlette, and so vLLM, sees the same fields, also in the form that goes upstream."""

import asyncio
from collections.abc import AsyncIterator

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from edge.envelope.form import read_multipart, rewrite_multipart
from edge.errors import EdgeError
from tests.fuzz.requests import cut_by_itself

TYPE = "multipart/form-data; boundary=xx"
_OTHER_MODEL = "another-name"
_TRUE = ("true", "1")

Field = tuple[str, str | None, str | bytes]


async def _parts_of(body: bytes) -> AsyncIterator[bytes]:
    for part in (*cut_by_itself(body), b""):
        yield part


async def fields_by_starlette(body: bytes) -> list[Field] | None:
    """Return name, file name and content of each part, None for a form that it refuses."""
    try:
        form = await MultiPartParser(Headers({"content-type": TYPE}), _parts_of(body)).parse()
    except (MultiPartException, UnicodeDecodeError):
        return None
    try:
        return [
            (name, value.filename, await value.read()) if isinstance(value, UploadFile) else (name, None, value)
            for name, value in form.multi_items()
        ]
    finally:
        await form.close()


def check(body: bytes) -> None:
    """Others refuse the form, or find one model and one stream in it, as the edge did, and all else as it was."""
    try:
        envelope = read_multipart(body, TYPE)
    except EdgeError:
        return
    fields = asyncio.run(fields_by_starlette(body))
    rewritten = asyncio.run(fields_by_starlette(b"".join(rewrite_multipart(body, envelope, _OTHER_MODEL))))
    if fields is None or rewritten is None:
        assert fields is rewritten
        return
    assert [field for field in fields if field[0] == "model"] == [("model", None, envelope.model)]
    streams = [content for name, _, content in fields if name == "stream"]
    assert len(streams) <= 1
    assert any(str(content).lower() in _TRUE for content in streams) == envelope.stream
    expected = [("model", None, _OTHER_MODEL) if field[0] == "model" else field for field in fields]
    assert rewritten == expected
