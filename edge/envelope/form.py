"""What a form asks for: multipart/form-data (RFC 7578), for audio and image edits."""

import re
from typing import Final

from edge.envelope.json import Envelope, model_name
from edge.errors import InvalidRequest

_PARAMETER = r"[ \t]*;[ \t]*([!#$%&'+^_`|~0-9A-Za-z.*-]+)=(?:\"([^\"\\\\]*)\"|([^\s;\",]*))"
_FORM_TYPE = re.compile(rf"multipart/form-data((?:{_PARAMETER})+)[ \t]*", re.IGNORECASE)
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")  # RFC 2046 section 5.1.1
_DISPOSITION = re.compile(
    rb'form-data(?:[ \t]*;[ \t]*[!#$%&\'+^_`|~0-9A-Za-z.-]+\*?=(?:"[^"]*"|[^\s;"]*))*[ \t]*', re.IGNORECASE
)
_NAME = re.compile(rb';[ \t]*name=(?:"([^"]*)"|([^\s;"]*))', re.IGNORECASE)
_AMBIGUOUS_NAME = re.compile(rb";[ \t]*name\*", re.IGNORECASE)
_FILENAME = re.compile(rb";[ \t]*filename\*?=", re.IGNORECASE)
_MAX_PARTS: Final = 1000


def boundary_of(content_type: str) -> str:
    """Return the boundary of a form's content type; raises `InvalidRequest` where two parsers could find two."""
    form = _FORM_TYPE.fullmatch(content_type.strip())
    parameters = re.findall(_PARAMETER, form[1]) if form is not None else []
    boundaries: list[str] = [quoted or bare for name, quoted, bare in parameters if name.lower() == "boundary"]
    starred = any(name.endswith("*") for name, _, _ in parameters)
    if len(boundaries) != 1 or starred or not _BOUNDARY.fullmatch(boundaries[0]):
        raise InvalidRequest("the content type must name one boundary: send multipart/form-data; boundary=...")
    return boundaries[0]


def read_multipart(body: bytes, content_type: str) -> Envelope:
    """Return the envelope of a multipart body; `model` and `stream` are parts of their own.

    Raises: `InvalidRequest`.
    """
    found: dict[bytes, tuple[int, int]] = {}
    for name, start, end in _fields(body, content_type):
        if name in found and body[slice(*found[name])] != body[start:end]:
            raise InvalidRequest(f"the form has two different {name.decode()} parts", param=name.decode())
        if name in found and name == b"model":
            raise InvalidRequest("the form has two model parts", param="model")
        found[name] = (start, end)
    if b"model" not in found:
        raise InvalidRequest("you must provide a model part in the form", param="model")
    start, end = found[b"model"]
    try:
        model = model_name(body[start:end].decode())
    except UnicodeDecodeError:
        raise InvalidRequest("the model part is not valid UTF-8", param="model") from None
    stream = body[slice(*found[b"stream"])].lower() in (b"true", b"1") if b"stream" in found else False
    return Envelope(model, stream, (start, end))


def _fields(body: bytes, content_type: str) -> list[tuple[bytes, int, int]]:
    """Return the `model` and `stream` fields: their name and where their content begins and ends."""
    delimiter = b"--" + boundary_of(content_type).encode()
    malformed = InvalidRequest("the body is not valid multipart/form-data")
    if not body.startswith(delimiter):
        raise malformed
    fields: list[tuple[bytes, int, int]] = []
    at = len(delimiter)
    for _ in range(_MAX_PARTS):
        if body.startswith(b"--", at):
            return fields
        head_end = body.find(b"\r\n\r\n", at)
        part_end = body.find(b"\r\n" + delimiter, at)
        if not body.startswith(b"\r\n", at) or head_end < 0 or not head_end <= part_end:
            raise malformed
        name = _field_name(body[at + 2 : head_end])
        if name in (b"model", b"stream"):
            fields.append((name, min(head_end + 4, part_end), part_end))
        at = part_end + 2 + len(delimiter)
    raise InvalidRequest(f"the form has more than {_MAX_PARTS} parts")


def _field_name(head: bytes) -> bytes | None:
    """Return the name of a part, None for a file; refuse what two parsers could read as different names."""
    dispositions = []
    for line in head.split(b"\r\n"):
        name, colon, value = line.partition(b":")
        if not colon or name != name.strip() or not name:
            raise InvalidRequest("a part of the form has a malformed header")
        if name.lower() == b"content-disposition":
            dispositions.append(value.strip())
    if len(dispositions) != 1 or not _DISPOSITION.fullmatch(dispositions[0]):
        raise InvalidRequest("each part of the form needs one header: Content-Disposition: form-data; name=...")
    names = _NAME.findall(dispositions[0])
    if len(names) != 1 or _AMBIGUOUS_NAME.search(dispositions[0]) or b"\\" in names[0][0]:
        raise InvalidRequest("a part of the form has an ambiguous name")
    return None if _FILENAME.search(dispositions[0]) else names[0][0] or names[0][1]
