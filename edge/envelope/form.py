"""What a form asks for: multipart/form-data (RFC 7578), for audio and image edits.

The `model` part decides what a caller may use, and the client's own bytes go upstream. So a form is taken only where
parsers cannot differ about it, and refused in words otherwise. The grammar (RFC 5234) is a part of RFC 2046 section
5.1.1 and RFC 7578 section 4:

    type        = "multipart/form-data" 1*( ";" *SP ( "boundary=" boundary / "charset=" utf-8 ) )   ; each once
    boundary    = 1*70 letters, digits and "+" "_" "." "-", and within quotes "'" "(" ")" "," "/" ":" "?" too
    form        = [ [preamble] CRLF ] 1*( delimiter CRLF part CRLF ) delimiter "--" [ CRLF epilogue ]
    delimiter   = "--" boundary                 ; which stands nowhere else in the body
    part        = 1*( header CRLF ) CRLF *OCTET
    header      = name ":" *SP value            ; on one line, no control character; each name once
    disposition = "form-data;" *SP "name=" field [ ";" *SP "filename=" file ] [ ";" *SP "filename*=" token ]
    field       = letters, digits and "_" "-" "." "[" "]", within quotes or not
    file        = token / quoted-string         ; which holds no "name="

- Preamble and epilogue mean nothing, but some parsers look for a part in them: they hold no `Content-Disposition`.
- Of a part's headers only four mean something: `Content-Disposition`, which it must have; `Content-Type`, not one with
  parts within; `Content-Transfer-Encoding`, an identity; `Content-Length`, if exact. No other `Content-` header may
  stand there, and all others are ignored (RFC 7578 section 4.8).
- `model` and `stream` are fields, each once: without a file's name, `text/plain` or of no type, in UTF-8. What some
  parsers take for one of them is refused: another case, `model[]`, `model.x`. So is `_charset_` (section 4.6), which
  some obey.
- `name*`, `name*0` and encoded words would be another parser's name (RFC 8187, RFC 2231, RFC 2047). `filename*` is what
  some clients send beside `filename` (RFC 6266 section 4.3), and no one's model.
"""

import itertools
import re
import types
from collections.abc import Generator, Iterator
from typing import Final, NamedTuple

from edge.envelope.json import STEP_BYTES, Envelope, model_name
from edge.envelope.steering import folded
from edge.errors import InvalidRequest, ModelNotFound
from edge.names import MAX_MODEL_LENGTH

_TOKEN: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_TYPE_PARAMETER = re.compile(rf'; *+({_TOKEN})=(?:"([^"\\]*+)"|({_TOKEN}))')
_FORM_TYPE = re.compile(rf"multipart/form-data((?:{_TYPE_PARAMETER.pattern})*+)", re.IGNORECASE)
# RFC 2046 section 5.1.1 without space and "=", where some parsers cut, and without "'" where it is not quoted.
_BARE_BOUNDARY = re.compile(r"[0-9A-Za-z+_.-]{1,70}")
_QUOTED_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:?-]{1,70}")
_CRLF: Final = b"\r\n"
_BLANK_LINE: Final = b"\r\n\r\n"
_MAX_PARTS: Final = 128  # OpenAI takes 16 images, and no other part in such numbers
_MAX_HEAD_BYTES: Final = 8192  # of a part; a file's name has 255 bytes, or thrice as many where it is escaped
_MAX_HEADS_BYTES: Final = 1 << 15  # of all parts together: a byte takes up to 50 ns
_MAX_HEADERS: Final = 16  # of a part; python-multipart takes 8
_MAX_REMARK_BYTES: Final = 8192  # of the preamble, and of the epilogue

# No control character and nothing else that some parser takes for the end of a line. A name without underscore.
_HEADER = re.compile(r"([A-Za-z][A-Za-z0-9-]*+): *+([^\x00-\x1f\x7f-\x9f\u2028\u2029]*+)")
_MEANINGFUL: Final = ("content-disposition", "content-type", "content-transfer-encoding", "content-length")
_QUOTED: Final = r'"(?:[^"\\]++|\\.)*+"'
# The name stands first, so that nothing which a parser makes of a file's name changes it.
_DISPOSITION = re.compile(
    rf"(?i:form-data); *+(?i:name)=({_QUOTED}|{_TOKEN})"
    rf"(?:; *+(?i:filename)=({_QUOTED}|{_TOKEN}))?(?:; *+(?i:filename)\*=({_TOKEN}))?"
)
_FIELD_NAME = re.compile(r"[0-9A-Za-z_.\[\]-]++")
_BRACKETS = re.compile(r"[\[\].]++")
_LIKE_A_NAME = re.compile(r"name *+\*?=")
_MEDIA_TYPE = re.compile(rf"(?!multipart/|message/){_TOKEN}/{_TOKEN} *+(?:;.*)?", re.IGNORECASE)
_TEXT_TYPE = re.compile(r'text/plain(?: *+; *+charset=("?)(utf-8|us-ascii|iso-8859-1)\1)?', re.IGNORECASE)
_IDENTITY: Final = ("", "7bit", "8bit", "binary")
_FIELDS: Final = ("model", "stream")
_MAX_NAME_BYTES: Final = 4 * MAX_MODEL_LENGTH  # in UTF-8
_MODEL_HEAD: Final = b'Content-Disposition: form-data; name="model"\r\n\r\n'
_STREAM: Final = {b"true": True, b"1": True, b"false": False, b"0": False, b"": False}


class _Field(NamedTuple):
    """A part of the form: its name, and where its content begins and ends."""

    name: str
    start: int
    end: int


def boundary_of(content_type: str) -> str:
    """Return the boundary of a form's content type; raises `InvalidRequest` where two parsers could find two."""
    form = _FORM_TYPE.fullmatch(content_type.strip(" "))
    parameters = _TYPE_PARAMETER.findall(form[1]) if form is not None else []
    found = {name.lower(): (quoted, bare) for name, quoted, bare in parameters}
    quoted, bare = found.pop("boundary", ("", ""))
    if form is None or len(found) + 1 != len(parameters):
        raise InvalidRequest("the content type must name one boundary: send multipart/form-data; boundary=...")
    if [name for name in found if name != "charset"] or "".join(found.get("charset", ("utf-8",))).lower() != "utf-8":
        raise InvalidRequest("beside the boundary the content type of a form can only have charset=utf-8")
    if not (_BARE_BOUNDARY.fullmatch(bare) or _QUOTED_BOUNDARY.fullmatch(quoted)):
        raise InvalidRequest(
            "the boundary must have 1 to 70 letters, digits, hyphens and underscores, such as boundary=8c1f0b7e"
        )
    boundary: str = quoted or bare
    return boundary


def read_multipart(body: bytes, content_type: str, path_model: str = "") -> Envelope:
    """Return the envelope of a multipart body; `model` and `stream` are parts of their own.

    `path_model` is the model that the path names, which counts before that of the body.
    Raises: `InvalidRequest`, naming what to change; `ModelNotFound`.
    """
    fields = [field for field in _fields(body, content_type) if field is not None]
    return _envelope(body, content_type, fields, path_model)


@types.coroutine
def read_long_multipart(body: bytes, content_type: str, path_model: str = "") -> Generator[None, None, Envelope]:
    """Return what `read_multipart` does, and let others run between its steps."""
    fields = []
    for field in _fields(body, content_type):
        if field is None:
            yield
        else:
            fields.append(field)
    return _envelope(body, content_type, fields, path_model)


def rewrite_multipart(body: bytes, envelope: Envelope, model: str) -> tuple[memoryview, bytes, memoryview]:
    """Return `body`, in pieces, with its `model` part written anew: the headers it had spoke of another name.

    The pieces are not joined: to copy 64 MiB would take 50 ms.
    """
    assert envelope.span is not None  # of `read_multipart`
    start, end = envelope.span
    if not envelope.written:  # a part more, before the first
        line = body[start : body.find(_CRLF, start) + len(_CRLF)]
        return memoryview(body)[:start], line + _MODEL_HEAD + model.encode() + _CRLF, memoryview(body)[start:]
    delimiter = max(0, body.rfind(b"\r\n--", 0, start))  # no header begins so
    head = body.find(_CRLF, delimiter + len(_CRLF)) + len(_CRLF)
    return memoryview(body)[:head], _MODEL_HEAD + model.encode(), memoryview(body)[end:]


def _envelope(body: bytes, content_type: str, fields: list[_Field], path_model: str) -> Envelope:
    found: dict[str, _Field] = {}
    others: dict[str, None] = {}
    for field in fields:
        if field.name not in _FIELDS:
            others[folded(field.name)] = None
            continue
        if field.name in found:
            raise InvalidRequest(f"the form has two {field.name} parts: send one", param=field.name)
        found[field.name] = field
    stream, steering = _is_stream(body, found.get("stream")), tuple(others)
    if "model" not in found and path_model:
        first = body.find(b"--" + boundary_of(content_type).encode())
        return Envelope(path_model, stream, (first, first), steering=steering)
    if "model" not in found:
        raise InvalidRequest("you must provide a model part in the form", param="model")
    _, start, end = found["model"]
    if end - start > _MAX_NAME_BYTES:
        raise ModelNotFound.named("of that name")
    try:
        model = model_name(body[start:end].decode())
    except UnicodeDecodeError:
        raise InvalidRequest("the model part is not valid UTF-8", param="model") from None
    return Envelope(path_model or model, stream, (start, end), written=model, steering=steering)


def _is_stream(body: bytes, field: _Field | None) -> bool:
    if field is None:
        return False
    stream = _STREAM.get(body[field.start : min(field.end, field.start + _MAX_NAME_BYTES)].lower())
    if stream is None:
        raise InvalidRequest("stream must be true or false", param="stream")
    return stream


def _fields(body: bytes, content_type: str) -> Iterator[_Field | None]:
    """Yield the fields, and None in between, where others may run."""
    delimiter = b"--" + boundary_of(content_type).encode()
    places: list[int] = []
    for start in range(0, len(body), STEP_BYTES):
        yield None
        _find_all(body, delimiter, start, places)
    _check_frame(body, delimiter, places)
    heads_bytes = 0
    for place, following in itertools.pairwise(places):
        start, end = place + len(delimiter), following - len(_CRLF)
        head_end = body.find(_BLANK_LINE, start, min(end, start + _MAX_HEAD_BYTES))
        if head_end < 0:
            raise InvalidRequest(
                f"each part of the form must have headers, of at most {_MAX_HEAD_BYTES} bytes, and then a blank line"
            )
        heads_bytes += head_end - start
        if heads_bytes > _MAX_HEADS_BYTES:
            raise InvalidRequest(f"the headers of all parts of the form are over {_MAX_HEADS_BYTES} bytes")
        yield _read_part(body, start, head_end, end)


def _find_all(body: bytes, delimiter: bytes, start: int, places: list[int]) -> None:
    """Append to `places` where delimiters begin, of one step from `start` on."""
    stop = start + STEP_BYTES + len(delimiter) - 1
    at = body.find(delimiter, max(start, places[-1] + len(delimiter)) if places else start, stop)
    while at >= 0:
        if len(places) > _MAX_PARTS:
            raise InvalidRequest(f"the form has more than {_MAX_PARTS} parts")
        places.append(at)
        at = body.find(delimiter, at + len(delimiter), stop)


def _check_frame(body: bytes, delimiter: bytes, places: list[int]) -> None:
    """Raise `InvalidRequest` unless each delimiter stands on a line of its own and the last one closes the form."""
    if not places:
        raise InvalidRequest("the body has no part: each begins with -- and the boundary of the content type")
    for place in places:
        end = place + len(delimiter)
        if place and not body.startswith(_CRLF, place - len(_CRLF)):
            raise InvalidRequest(
                "the boundary stands within a line of the form: choose a random one, and end lines with CRLF"
            )
        if not body.startswith(_CRLF if place != places[-1] else b"--", end):
            raise InvalidRequest(
                "the form must have its boundary on lines of its own that end with CRLF, and -- after the last one only"
            )
    closed = places[-1] + len(delimiter) + len(b"--")
    if not (closed == len(body) or body.startswith(_CRLF, closed)):
        raise InvalidRequest("after the last boundary and its -- the form must end, or go on with CRLF")
    for what, start, end in (("before the first", 0, places[0]), ("after the last", closed, len(body))):
        if end - start > _MAX_REMARK_BYTES:
            raise InvalidRequest(f"the text {what} boundary of the form is over {_MAX_REMARK_BYTES} bytes")
        if b"content-disposition" in body[start:end].lower():
            raise InvalidRequest(f"a part stands {what} boundary of the form")


def _read_part(body: bytes, start: int, head_end: int, end: int) -> _Field:
    """Return the field that stands between two delimiters; of one that the edge does not read only the name counts.

    `start` is where the first delimiter ends, and `end` where the content does. Raises: `InvalidRequest`.
    """
    headers = _headers(body[start + len(_CRLF) : head_end])
    content = head_end + len(_BLANK_LINE)
    name, is_file = _named(headers.get("content-disposition", ""))
    base = name if name in _FIELDS else _base_of(name)
    _check_headers(headers, name, end - content)
    if name not in _FIELDS:
        return _Field(base, 0, 0)
    if is_file:
        raise InvalidRequest(f"{name} must be a field of the form, not a file: send it without filename", param=name)
    _check_text(headers, name, body[content : min(end, content + _MAX_NAME_BYTES)])
    return _Field(name, content, end)


def _headers(head: bytes) -> dict[str, str]:
    """Return the headers of a part by their names in lower case."""
    if head.count(_CRLF) >= _MAX_HEADERS:
        raise InvalidRequest(f"a part of the form has more than {_MAX_HEADERS} headers")
    lines = head.decode(errors="surrogateescape").split("\r\n")  # a file's name may be in the client's own charset
    headers: dict[str, str] = {}
    for line in lines if head else ():
        header = _HEADER.fullmatch(line)
        if header is None:
            raise InvalidRequest(
                "a part of the form has a malformed header: write `Name: value` on one line, ended with CRLF"
            )
        name = header[1].lower()
        if name in headers:
            raise InvalidRequest("a part of the form has two headers of one name")
        headers[name] = header[2].rstrip(" ")
    return headers


def _named(disposition: str) -> tuple[str, bool]:
    """Return the name of a part, and whether it is a file (RFC 7578 section 4.2)."""
    form_data = _DISPOSITION.fullmatch(disposition)
    if form_data is None:
        raise InvalidRequest(
            'each part of the form needs the header Content-Disposition: form-data; name="...", '
            'and for a file ; filename="..." after it, and nothing else there'
        )
    name, file, extended = form_data[1].removeprefix('"').removesuffix('"'), form_data[2], form_data[3]
    if not _FIELD_NAME.fullmatch(name):
        raise InvalidRequest(
            "the name of a part can only have letters, digits, hyphens, underscores, dots and brackets"
        )
    if file is not None and _LIKE_A_NAME.search(file.lower()):
        raise InvalidRequest("the name of a file holds `name=`: send it by another name", param=name)
    return name, file is not None or extended is not None


def _base_of(name: str) -> str:
    """Return what some parsers take the name of a part for; raises `InvalidRequest` where that is one of the fields."""
    if name.lower() == "_charset_":
        raise InvalidRequest("a form is in UTF-8: leave out the part _charset_", param=name)
    base = next(filter(None, _BRACKETS.split(name)), "").lower()
    if base in _FIELDS:
        raise InvalidRequest(f"a part is almost named {base}: write its name as {base}, or another one", param=base)
    return base


def _check_headers(headers: dict[str, str], name: str, length: int) -> None:
    if any(header.startswith("content-") and header not in _MEANINGFUL for header in headers):
        raise InvalidRequest(
            "of the Content- headers a part can only have Content-Disposition, Content-Type, Content-Length and "
            "Content-Transfer-Encoding",
            param=name,
        )
    if headers.get("content-transfer-encoding", "").lower() not in _IDENTITY:
        raise InvalidRequest("send each part as it is, without Content-Transfer-Encoding", param=name)
    if headers.get("content-length", str(length)) != str(length):
        raise InvalidRequest("the Content-Length of a part is not that of its content: leave it out", param=name)
    if "content-type" in headers and not _MEDIA_TYPE.fullmatch(headers["content-type"]):
        raise InvalidRequest(
            "the Content-Type of a part must be that of a file or a field, such as audio/wav", param=name
        )


def _check_text(headers: dict[str, str], name: str, content: bytes) -> None:
    """Raise `InvalidRequest` unless parsers decode the content of a field alike."""
    text = _TEXT_TYPE.fullmatch(headers.get("content-type", "text/plain"))
    # HttpClient 4 of Apache names ISO-8859-1 unless it is told not to. In ASCII the three are one.
    if text is None or not (content.isascii() or (text[2] or "utf-8").lower() == "utf-8"):
        raise InvalidRequest(f"{name} must be text in UTF-8: send it without Content-Type", param=name)
