"""What a form asks for: the one part that every parser reads as its model."""

import asyncio
import contextlib
import email
import email.policy
import re
import warnings
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from aiohttp.base_protocol import BaseProtocol
from hypothesis import given
from hypothesis import strategies as st

from edge.envelope import form as forms
from edge.envelope.form import read_long_multipart, rewrite_multipart
from edge.envelope.json import STEP_BYTES, Envelope
from edge.errors import EdgeError, InvalidRequest, ModelNotFound
from tests.envelope.reading import MIB, memory_below

TYPE = "multipart/form-data; boundary=xx"
DISPOSITION = b"Content-Disposition: form-data; "


def in_steps(body: bytes, content_type: str) -> tuple[Envelope, int]:
    """Read a form in steps; return also how many there were."""

    async def read() -> Envelope:
        return await read_long_multipart(body, content_type)

    reading, steps = read(), 0
    while True:
        try:
            reading.send(None)
        except StopIteration as done:
            return done.value, steps
        steps += 1


def read_multipart(body: bytes, content_type: str = TYPE) -> Envelope:
    """Read a form at once, and in steps: both must say the same."""
    try:
        at_once = forms.read_multipart(body, content_type)
    except EdgeError as error:
        with pytest.raises(type(error), match=f"^{re.escape(str(error))}$"):
            in_steps(body, content_type)
        raise
    assert in_steps(body, content_type)[0] == at_once
    return at_once


def rewritten(body: bytes, envelope: Envelope, model: str) -> bytes:
    return b"".join(rewrite_multipart(body, envelope, model))


def part(name: str, content: bytes, more: str = "") -> bytes:
    return b'--xx\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (
        name.encode(),
        more.encode(),
        content,
    )


END = b"--xx--\r\n"
MODEL = part("model", b"whisper")
FILE = part("file", b"RIFF\r\n\r\n--x\r\n--\r\n\x00\xff-x--", '; filename="a.wav"\r\nContent-Type: audio/wav')


def judge(body: bytes, words: str | None, content_type: str = TYPE) -> None:
    """Assert that a form asks for `whisper`, or that it is refused in these words."""
    if words is None:
        assert read_multipart(body, content_type).model == "whisper"
        return
    with pytest.raises(InvalidRequest, match=re.escape(words)):
        read_multipart(body, content_type)


# --- the content type

ONE_BOUNDARY = "the content type must name one boundary"
OTHER_PARAMETER = "can only have charset=utf-8"
LETTERS = "the boundary must have 1 to 70 letters"


@pytest.mark.parametrize(
    ("content_type", "delimiter"),
    [
        ("multipart/form-data; boundary=xx", b"xx"),
        ('multipart/form-data; boundary="xx"', b"xx"),
        ("multipart/form-data;boundary=xx; charset=utf-8", b"xx"),
        ('multipart/form-data; charset="UTF-8"; boundary=xx', b"xx"),
        ("Multipart/Form-Data; charset=utf-8; BOUNDARY=xx", b"xx"),
        ("multipart/form-data; boundary=a+b_c.d-", b"a+b_c.d-"),
        ("multipart/form-data; boundary=--", b"--"),
        ('multipart/form-data; boundary="a\'(b)+_,-./:?"', b"a'(b)+_,-./:?"),
        (
            "multipart/form-data; boundary=----WebKitFormBoundary7MA4YWxkTrZu0gW",
            b"----WebKitFormBoundary7MA4YWxkTrZu0gW",
        ),
        ("multipart/form-data; boundary=" + "b" * 70, b"b" * 70),
    ],
)
def test_boundary_is_understood_quoted_or_not(content_type: str, delimiter: bytes) -> None:
    """RFC 2046 section 5.1.1: up to 70 characters, quoted when one of them needs it."""
    body = part("file", b"RIFF", '; filename="a"') + MODEL + END
    judge(body.replace(b"--xx", b"--" + delimiter), None, content_type)


@pytest.mark.parametrize(
    ("content_type", "words"),
    [
        ("multipart/form-data", ONE_BOUNDARY),
        ("multipart/form-data; charset=utf-8", ONE_BOUNDARY),
        ("multipart/form-data; boundary=", ONE_BOUNDARY),
        ("multipart/form-data; boundary=xx; boundary=xx", ONE_BOUNDARY),
        ("multipart/form-data; boundary=xx; BOUNDARY=yy", ONE_BOUNDARY),
        ("multipart/form-data; boundary*=utf-8''xx", ONE_BOUNDARY),
        ("multipart/form-data; boundary*0=x; boundary*1=x", ONE_BOUNDARY),
        ("multipart/form-data; boundary = xx", ONE_BOUNDARY),
        ("multipart/form-data; boundary=xx;", ONE_BOUNDARY),
        ("multipart/form-data; boundary=xx, text/plain", ONE_BOUNDARY),
        ("multipart/form-data; boundary=x/x", ONE_BOUNDARY),
        ("multipart/form-data; boundary=x=x", ONE_BOUNDARY),
        ('multipart/form-data; boundary="x\\x"', ONE_BOUNDARY),
        ("multipart/mixed; boundary=xx", ONE_BOUNDARY),
        ("multipart/form-data; boundary=xx; x=y", OTHER_PARAMETER),
        ("multipart/form-data; boundary=xx; boundary*=yy", OTHER_PARAMETER),
        ("multipart/form-data; boundary=xx; charset=utf-16", OTHER_PARAMETER),
        ("multipart/form-data; boundary=xx; charset=us-ascii", OTHER_PARAMETER),
        ('multipart/form-data; boundary=xx; charset=""', OTHER_PARAMETER),
        ('multipart/form-data; boundary=""', LETTERS),
        ('multipart/form-data; boundary="x x"', LETTERS),
        ('multipart/form-data; boundary="xx "', LETTERS),
        ('multipart/form-data; boundary="x=x"', LETTERS),
        ('multipart/form-data; boundary="x;x"', LETTERS),
        ("multipart/form-data; boundary=x'x", LETTERS),
        ("multipart/form-data; boundary=" + "b" * 71, LETTERS),
    ],
)
def test_content_type_that_could_be_read_in_two_ways_is_refused(content_type: str, words: str) -> None:
    """A charset of the whole form decodes every name and value; a boundary is cut at what needs quotes, or a `=`."""
    judge(MODEL + END, words, content_type)


# --- the frame

NO_PART = "the body has no part"
WITHIN = "the boundary stands within a line"
OWN_LINES = "the form must have its boundary on lines of its own"
HEADERS = "each part of the form must have headers"
AFTER_LAST = "after the last boundary and its -- the form must end"
STRAY = "a part stands "


def framed(content: bytes) -> bytes:
    """A form whose file has this content."""
    return part("file", content, '; filename="a"') + MODEL + END


@pytest.mark.parametrize(
    ("what", "body", "words"),
    [
        ("no line after the end", FILE + MODEL + b"--xx--", None),
        ("preamble", b"A form.\r\n" + FILE + MODEL + END, None),
        ("empty line before", b"\r\n" + MODEL + END, None),
        ("preamble of lines", b"A form.\n\r\n--yy\r\n\r\n" + MODEL + END, None),
        ("epilogue", MODEL + END + b"\r\nThe end.\r\n--yy--", None),
        ("empty file", framed(b""), None),
        ("file of line ends", framed(b"\r\n\r\n\r\n"), None),
        ("file of hyphens", framed(b"--\r\n--"), None),
        ("model alone", MODEL + END, None),
        ("nothing", b"", NO_PART),
        ("another boundary", MODEL.replace(b"--xx", b"--yy"), NO_PART),
        ("longer boundary", MODEL.replace(b"--xx", b"--xxx") + b"--xxx--", OWN_LINES),
        ("bare LF", (MODEL + END).replace(b"\r\n", b"\n"), OWN_LINES),
        ("bare CR", (MODEL + END).replace(b"\r\n", b"\r"), OWN_LINES),
        ("preamble without line end", b"A form." + MODEL + END, WITHIN),
        ("preamble with LF", b"A form.\n" + MODEL + END, WITHIN),
        ("long preamble", b"." * 8191 + b"\r\n" + MODEL + END, "the text before the first boundary"),
        ("part before the form", DISPOSITION + b'name="x"\r\n\r\ny\r\n' + MODEL + END, STRAY + "before the first"),
        ("part after the form", MODEL + END + DISPOSITION.upper() + b'name="x"\r\n\r\ny', STRAY + "after the last"),
        ("long epilogue", MODEL + END + b"." * 8191, "the text after the last boundary"),
        ("two forms", MODEL + END + MODEL + END, OWN_LINES),
        ("end at once", END + MODEL + END, OWN_LINES),
        ("no end", MODEL, OWN_LINES),
        ("no boundary at the end", MODEL[:-4], OWN_LINES),
        ("no hyphens at the end", MODEL + b"--xx", OWN_LINES),
        ("a line, no end", MODEL + b"--xx\r\n", OWN_LINES),
        ("one hyphen", MODEL + b"--xx-\r\n", OWN_LINES),
        ("text after the end", MODEL + b"--xx--.", AFTER_LAST),
        ("space after the end", MODEL + b"--xx-- \r\n", AFTER_LAST),
        ("LF after the end", MODEL + b"--xx--\n", AFTER_LAST),
        ("padding", FILE + MODEL.replace(b"--xx", b"--xx ") + END, OWN_LINES),
        ("tab as padding", FILE + MODEL.replace(b"--xx", b"--xx\t") + END, OWN_LINES),
        ("boundary in a line", framed(b"RIFF--xx\r\n"), WITHIN),
        ("end in a line", framed(b"RIFF--xx--"), WITHIN),
        ("boundary after LF", framed(b"RIFF\n--xx\r\n"), WITHIN),
        ("boundary after CR", framed(b"RIFF\r--xx\r\n"), WITHIN),
        ("boundary before LF", framed(b"RIFF\r\n--xx\n"), OWN_LINES),
        ("boundary begins a line", framed(b"RIFF\r\n--xxx\r\n"), OWN_LINES),
        ("boundary begins the file", framed(b"--xx\r\n" + DISPOSITION + b'name="x"\r\n\r\ny'), HEADERS),
        ("boundary in a head", part("x", b"", '; filename="--xx"') + MODEL + END, WITHIN),
        ("no empty line", b"--xx\r\n" + DISPOSITION + b'name="x"\r\n' + MODEL + END, HEADERS),
        ("nothing between", b"--xx\r\n" + MODEL + END, HEADERS),
        ("one line end for two", framed(b"").replace(b"\r\n\r\n\r\n", b"\r\n\r\n"), HEADERS),
        ("no headers", b"--xx\r\n\r\nRIFF\r\n" + MODEL + END, "needs the header Content-Disposition"),
        ("129 parts", part("a", b"") * 128 + MODEL + END, "the form has more than 128 parts"),
        ("no model", FILE + END, "you must provide a model part"),
        ("no part", END, "you must provide a model part"),
        ("two models", MODEL + MODEL + END, "the form has two model parts"),
        ("other models", MODEL + part("model", b"other") + END, "the form has two model parts"),
        ("two streams", MODEL + part("stream", b"true") * 2 + END, "the form has two stream parts"),
        ("model of nothing", part("model", b"") + END, "you must provide a model parameter"),
        ("model in Latin-1", part("model", b"\xff") + END, "the model part is not valid UTF-8"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_frame_of_a_form(what: str, body: bytes, words: str | None) -> None:
    """A boundary has a line of its own, and stands nowhere else: some parsers look for it anywhere."""
    judge(body, words)


def test_128_parts_are_a_form() -> None:
    assert read_multipart(part("a", b"") * 127 + MODEL + END).model == "whisper"


# --- the head of a part

MALFORMED = "a part of the form has a malformed header"
NEEDED = "each part of the form needs the header Content-Disposition"
NAME = "the name of a part can only have letters"
ALMOST = "a part is almost named model"
CONTENT = "of the Content- headers a part can only have"
A_TYPE = "the Content-Type of a part must be"
AS_IT_IS = "send each part as it is, without Content-Transfer-Encoding"
LIKE_A_NAME = "the name of a file holds `name=`"


@pytest.mark.parametrize(
    ("head", "words"),
    [
        # names
        ('name="prompt"', None),
        ("name=prompt", None),
        ('name="timestamp_granularities[]"', None),
        ('name="chunking_strategy[model]"', None),
        ('name="x.model"', None),
        ('name="models"', None),
        ('name="model_name"', None),
        ('NAME="prompt"', None),
        ('name="model"', "the form has two model parts"),
        ("name=model", "the form has two model parts"),
        ('name="Model"', ALMOST),
        ('name="MODEL"', ALMOST),
        ('name="model[]"', ALMOST),
        ('name="model[0]"', ALMOST),
        ('name="[model]"', ALMOST),
        ('name="model.x"', ALMOST),
        ('name=".model"', ALMOST),
        ('name="Stream[]"', "a part is almost named stream"),
        ('name="_charset_"', "leave out the part _charset_"),
        ('name="_CHARSET_"', "leave out the part _charset_"),
        ('name="model "', NAME),
        ('name=" model"', NAME),
        ('name="/model"', NAME),
        ('name="\\\\model"', NAME),
        ('name="mod\\el"', NAME),
        ('name="%6dodel"', NAME),
        ('name="model%22"', NAME),
        ('name="=?utf-8?q?model?="', NAME),
        ('name="x;name=model"', NAME),
        ('name="x=model"', NAME),
        ('name="mödel"', NAME),
        ('name=""', NAME),
        ("name='model'", NAME),
        # parameters
        ("", NEEDED),
        ('filename="a"', NEEDED),
        ("name*=utf-8''model", NEEDED),
        ("name*0=mod; name*1=el", NEEDED),
        ("name=\"x\"; name*=utf-8''model", NEEDED),
        ('name="x"; name="model"', NEEDED),
        ('name="x"; Name="model"', NEEDED),
        ('name="x"; x=y', NEEDED),
        ('x="name=model"; name="x"', NEEDED),
        ('filename="a"; name="x"', NEEDED),
        ('name="x"; filename="a"; filename="b"', NEEDED),
        ('name="x"; filename="a"; name="model"', NEEDED),
        ('name="x";', NEEDED),
        ('name="x" ; filename="a"', NEEDED),
        ('name = "x"', NEEDED),
        ('name="x"y', NEEDED),
        ('name="x', NEEDED),
        ('name=""model""', NEEDED),
        ('name="x", name="model"', NEEDED),
        ('name="x" name="model"', NEEDED),
        # files
        ('name="file"; filename="a.wav"', None),
        ("name=file; filename=a.wav; filename*=utf-8''a.wav", None),
        ("name=\"file\"; filename*=utf-8''%E4%BC%9A.wav", None),
        ('name="file"; filename=""', None),
        ('name="file"; filename="会议\u3000a\'b;c,d=e.wav"', None),
        ('name="file"; filename="a\\"b\\\\c.wav"', None),
        ('name="file"; filename="a%22b.wav"', None),
        ('name="file"; filename="C:\\a\\b.wav"', None),
        ('name="file"; filename="=?utf-8?b?YQ==?="', None),
        ('name="file"; filename="model"', None),
        ('name="file"; filename="a;name=model;b"', LIKE_A_NAME),
        ('name="file"; filename="a\\"; NAME =\\"model"', LIKE_A_NAME),
        ('name="file"; filename="a;filename*=utf-8\'\'b"', LIKE_A_NAME),
        ('name="file"; filename="a\\"', NEEDED),
        ('name="file"; filename="a"b"', NEEDED),
        ('name="file"; filename*="utf-8\'\'a"', NEEDED),
        ('name="file"; filename*0="a"; filename*1="b"', NEEDED),
        # other headers
        ('name="x"\r\nX-Remark: name="model"', None),
        ('name="x"\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-16', None),
        ('name="x"\r\nContent-Length: 4\r\nContent-Transfer-Encoding: 8BIT', None),
        ('name="x"\r\ncontent-type: image/png; name="a.png"\r\ncontent-transfer-encoding: binary', None),
        ('name="x"\r\nContent-Disposition: form-data; name="model"', "two headers of one name"),
        ('name="x"\r\nx-a: 1\r\nX-A: 1', "two headers of one name"),
        ('name="x"\r\nContent-Encoding: gzip', CONTENT),
        ('name="x"\r\nContent-Transfer-Encoding: base64', AS_IT_IS),
        ('name="x"\r\nContent-Transfer-Encoding: quoted-printable', AS_IT_IS),
        ('name="x"\r\nContent-Length: 3', "the Content-Length of a part is not that of its content"),
        ('name="x"\r\nContent-Length: +4', "the Content-Length of a part is not that of its content"),
        ('name="x"\r\nContent-Type: multipart/mixed; boundary=yy', A_TYPE),
        ('name="x"\r\nContent-Type: Message/rfc822', A_TYPE),
        ('name="x"\r\nContent-Type:', A_TYPE),
        ('name="x"\r\nContent-Type: text', A_TYPE),
        # lines
        ('name="x"\nX: y', MALFORMED),
        ('name="x"\rX: y', MALFORMED),
        ('name="x"\x0bX: y', MALFORMED),
        ('name="x\x00"', MALFORMED),
        ('name="x"\x85X: y', MALFORMED),
        ('name="x"\u2028X: y', MALFORMED),
        ('\tname="x"', MALFORMED),
        ('name="x"\r\n ; filename="a"', MALFORMED),
        ('name="x"\r\nX', MALFORMED),
        ('name="x"\r\n: y', MALFORMED),
        ('name="x"\r\nX : y', MALFORMED),
        ('name="x"\r\nContent_Type: text/plain', MALFORMED),
        ('name="x"\r\n--X: y', MALFORMED),
        ('name="x"' + "".join(f"\r\nX-{number}: y" for number in range(15)), None),
        ('name="x"' + "".join(f"\r\nX-{number}: y" for number in range(16)), "more than 16 headers"),
        ('name="x"\r\nX: ' + "y" * 8000, None),
        ('name="x"\r\nX: ' + "y" * 8192, HEADERS),
    ],
)
def test_head_of_another_part(head: str, words: str | None) -> None:
    """A part that some parser would take for a second model is refused, wherever it stands."""
    other = b"--xx\r\n" + DISPOSITION + head.encode() + b"\r\n\r\nRIFF\r\n"
    for body in (MODEL + other + END, other + MODEL + END):
        judge(body, words)


@pytest.mark.parametrize(
    ("disposition", "words"),
    [
        ('content-disposition:form-data;name="x"', None),
        ('CONTENT-DISPOSITION:  Form-Data;  Name="x"  ', None),
        ('Content-Disposition: attachment; name="x"', NEEDED),
        ('Content-Disposition: "form-data"; name="x"', NEEDED),
        ('Content-Disposition: form-data, name="x"', NEEDED),
        ('Content-Disposition: form-data name="x"', NEEDED),
        ('Content-Disposition: form-data ; name="x"', NEEDED),
        ('Content-Disposition: name="x"', NEEDED),
        ("Content-Disposition: form-data", NEEDED),
        ("Content-Type: text/plain", NEEDED),
        ('Content-Disposition : form-data; name="x"', MALFORMED),
        (' Content-Disposition: form-data; name="x"', MALFORMED),
    ],
)
def test_each_part_has_the_disposition_of_a_form(disposition: str, words: str | None) -> None:
    """RFC 7578 section 4.2."""
    judge(b"--xx\r\n" + disposition.encode() + b"\r\n\r\ny\r\n" + MODEL + END, words)


NO_FILE = "model must be a field of the form, not a file"
TEXT = "model must be text in UTF-8"


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ('Content-Disposition: form-data; name="model"', None),
        ("content-disposition:form-data;name=model", None),
        ('CONTENT-DISPOSITION: Form-Data; NAME="model"', None),
        ('Content-Type: text/plain\r\nContent-Disposition: form-data; name="model"', None),
        ('Content-Disposition: form-data; name="model"\r\nContent-Type: Text/Plain; charset=UTF-8', None),
        ('Content-Disposition: form-data; name="model"\r\nContent-Type: text/plain;charset="us-ascii"', None),
        ('Content-Disposition: form-data; name="model"\r\nContent-Type: text/plain; charset=ISO-8859-1', None),
        ('Content-Disposition: form-data; name="model"\r\nContent-Length: 7', None),
        ('Content-Disposition: form-data; name="model"\r\nContent-Transfer-Encoding: binary', None),
        ('Content-Disposition: form-data; name="model"; filename="m"', NO_FILE),
        ('Content-Disposition: form-data; name="model"; filename=""', NO_FILE),
        ("Content-Disposition: form-data; name=\"model\"; filename*=utf-8''m", NO_FILE),
        ('Content-Disposition: form-data; name="model"\r\nContent-Type: application/octet-stream', TEXT),
        ('Content-Disposition: form-data; name="model"\r\nContent-Type: application/json', TEXT),
        ('Content-Disposition: form-data; name="model"\r\nContent-Type: text/plain; charset=utf-16', TEXT),
        ('Content-Disposition: form-data; name="model"\r\nContent-Type: text/plain; charset=utf-7', TEXT),
        ('Content-Disposition: form-data; name="model"\r\nContent-Type: text/plain; format=flowed', TEXT),
        ('Content-Disposition: form-data; name="model"\r\nContent-Transfer-Encoding: base64', AS_IT_IS),
        ('Content-Disposition: form-data; name="model"\r\nContent-Length: 6', "the Content-Length of a part"),
        ('Content-Disposition: form-data; name="models"', "you must provide a model part"),
        ('Content-Disposition: attachment; name="model"', NEEDED),
        ("X-Name: model", NEEDED),
        ("", NEEDED),
    ],
)
def test_only_a_text_field_named_model_is_the_model(head: str, words: str | None) -> None:
    separator = "\r\n" if head else ""
    judge(b"--xx\r\n%b%b\r\nwhisper\r\n" % (head.encode(), separator.encode()) + END, words)


def test_model_beyond_ascii_is_in_utf_8() -> None:
    for kind, found in (("utf-8", True), ("us-ascii", False), ("iso-8859-1", False)):
        body = part("model", "模型".encode(), f"\r\nContent-Type: text/plain; charset={kind}") + END
        if found:
            assert read_multipart(body).model == "模型"
        else:
            judge(body, TEXT)


@pytest.mark.parametrize("model", [b"whisper\r\n", b"\r\nwhisper", b"whi\x00sper", b"\xef\xbb\xbfwhisper", b"w" * 513])
def test_what_no_model_is_called_is_not_found(model: bytes) -> None:
    with pytest.raises(ModelNotFound):
        read_multipart(part("model", model) + END)


def test_error_names_the_part_that_it_concerns() -> None:
    for body, param in (
        (FILE + END, "model"),
        (part("Model", b"m") + END, "model"),
        (MODEL + part("stream", b"maybe") + END, "stream"),
        (MODEL + part("file", b"", '; filename="a"\r\nContent-Transfer-Encoding: base64') + END, "file"),
        (MODEL + part("file", b"", '; filename="name=a"') + END, "file"),
        (MODEL, None),
    ):
        with pytest.raises(InvalidRequest) as caught:
            read_multipart(body)
        assert caught.value.param == param


@pytest.mark.parametrize(
    ("value", "stream"),
    [
        (b"true", True), (b"True", True), (b"TRUE", True), (b"1", True),
        (b"false", False), (b"False", False), (b"0", False), (b"", False),
        (b"yes", None), (b"on", None), (b"2", None), (b"null", None), (b" true", None), (b"true\r\n", None),
    ],
)  # fmt: skip
def test_stream_is_a_field_of_the_form(value: bytes, stream: bool | None) -> None:
    body = FILE + part("stream", value) + MODEL + END
    if stream is None:
        judge(body, "stream must be true or false")
    else:
        assert read_multipart(body).stream is stream


# --- the model is replaced


@pytest.mark.parametrize("order", [lambda a, b: a + b, lambda a, b: b + a])
def test_rewritten_form_differs_in_the_models_name_only(order: Callable[[bytes, bytes], bytes]) -> None:
    """Files hold CRLF and what looks like a boundary; they go upstream as they came."""
    for preamble in [b"", b"\r\n", b"a preamble\r\n"]:
        for epilogue in [b"", b"\r\n", b"\r\nan epilogue"]:
            body = preamble + order(FILE, MODEL) + b"--xx--" + epilogue
            envelope = read_multipart(body)
            assert rewritten(body, envelope, "模型") == body.replace(b"\r\nwhisper\r\n", "\r\n模型\r\n".encode())


def test_rewritten_model_has_no_header_that_spoke_of_the_old_one() -> None:
    more = "\r\nContent-Type: text/plain; charset=ISO-8859-1\r\nContent-Length: 7\r\nX-A: b"
    body = FILE + part("model", b"whisper", more) + part("stream", b"1") + END
    new = rewritten(body, read_multipart(body), "模型")
    assert new == FILE + part("model", "模型".encode()) + part("stream", b"1") + END
    assert read_multipart(new).model == "模型"


@given(st.binary(max_size=40).filter(lambda data: b"--xx" not in data))
def test_content_of_a_file_never_matters(content: bytes) -> None:
    file = part("file", content, '; filename="model"')
    body = file + MODEL + END
    assert rewritten(body, read_multipart(body), "new") == file + part("model", b"new") + END


# --- what real clients send, as it came over a socket


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        pytest.param(
            "multipart/form-data; boundary=f9c530b9fa3067eeb5c49f920403e851452c66e2f112f23a3dba150bb0cf",
            b"--f9c530b9fa3067eeb5c49f920403e851452c66e2f112f23a3dba150bb0cf\r\n"
            b'Content-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n'
            b"--f9c530b9fa3067eeb5c49f920403e851452c66e2f112f23a3dba150bb0cf\r\n"
            b'Content-Disposition: form-data; name="file"; '
            b'filename="we\\"ird; na\\\\me \xe4\xbc\x9a\xe8\xae\xae.wav"\r\n'
            b"Content-Type: application/octet-stream\r\n\r\nRIFF\r\n\r\n"
            b"--f9c530b9fa3067eeb5c49f920403e851452c66e2f112f23a3dba150bb0cf\r\n"
            b'Content-Disposition: form-data; name="stream"\r\n\r\ntrue\r\n'
            b"--f9c530b9fa3067eeb5c49f920403e851452c66e2f112f23a3dba150bb0cf--\r\n",
            id="Go 1.27, mime/multipart",
        ),
        pytest.param(
            "multipart/form-data; boundary=----formdata-undici-042572832159",
            b'------formdata-undici-042572832159\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n'
            b'------formdata-undici-042572832159\r\nContent-Disposition: form-data; name="file"; '
            b'filename="we%22ird; na\\me \xe4\xbc\x9a\xe8\xae\xae.wav"\r\nContent-Type: audio/wav\r\n\r\n'
            b"\x01\x02\r\n\r\n"
            b'------formdata-undici-042572832159\r\nContent-Disposition: form-data; name="stream"\r\n\r\ntrue\r\n'
            b"------formdata-undici-042572832159--\r\n",
            id="Node 20, fetch and FormData",
        ),
        pytest.param(
            "multipart/form-data; boundary=openai-jate8otjooh",
            b'--openai-jate8otjooh\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n'
            b'--openai-jate8otjooh\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
            b"Content-Type: application/octet-stream\r\n\r\nRIFF\r\n\r\n--x\xff\x00\r\n"
            b'--openai-jate8otjooh\r\nContent-Disposition: form-data; name="timestamp_granularities[]"\r\n\r\nword\r\n'
            b'--openai-jate8otjooh\r\nContent-Disposition: form-data; name="stream"\r\n\r\ntrue\r\n'
            b"--openai-jate8otjooh--\r\n",
            id="openai 6.49 for JavaScript",
        ),
        pytest.param(
            "multipart/form-data; boundary=e6fcdc99aa003e28034daa07b2261529",
            b'--e6fcdc99aa003e28034daa07b2261529\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n'
            b'--e6fcdc99aa003e28034daa07b2261529\r\nContent-Disposition: form-data; name="stream"\r\n\r\ntrue\r\n'
            b"--e6fcdc99aa003e28034daa07b2261529\r\n"
            b'Content-Disposition: form-data; name="timestamp_granularities[]"\r\n\r\nword\r\n'
            b"--e6fcdc99aa003e28034daa07b2261529\r\n"
            b'Content-Disposition: form-data; name="timestamp_granularities[]"\r\n\r\nsegment\r\n'
            b'--e6fcdc99aa003e28034daa07b2261529\r\nContent-Disposition: form-data; name="file"; '
            b'filename="we%22ird; na\\me \xe4\xbc\x9a\xe8\xae\xae.wav"\r\n'
            b"Content-Type: audio/wav\r\n\r\nRIFF\r\n\r\n--x\xff\x00\r\n--e6fcdc99aa003e28034daa07b2261529--\r\n",
            id="requests 2.34",
        ),
        pytest.param(
            "multipart/form-data; boundary=e53a90e58e1fb70391b53cc1722ab61c",
            b'--e53a90e58e1fb70391b53cc1722ab61c\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n'
            b'--e53a90e58e1fb70391b53cc1722ab61c\r\nContent-Disposition: form-data; name="stream"\r\n\r\ntrue\r\n'
            b'--e53a90e58e1fb70391b53cc1722ab61c\r\nContent-Disposition: form-data; name="file"; '
            b'filename="we%22ird; na\\\\me \xe4\xbc\x9a\xe8\xae\xae.wav"\r\nContent-Type: audio/wav\r\n\r\n'
            b"RIFF\r\n\r\n--x\xff\x00\r\n--e53a90e58e1fb70391b53cc1722ab61c--\r\n",
            id="httpx 0.28",
        ),
        pytest.param(
            "multipart/form-data; boundary=------------------------d2775b254ab250c0",
            b'--------------------------d2775b254ab250c0\r\nContent-Disposition: form-data; name="model"\r\n\r\n'
            b"whisper\r\n--------------------------d2775b254ab250c0\r\n"
            b'Content-Disposition: form-data; name="file"; filename="\xbb\xe1\xd2\xe9\xd3\x9b\xe5h.wav"\r\n'
            b"Content-Type: application/octet-stream\r\n\r\nRIFF\r\n\r\n--x\xff\x00\r\n"
            b'--------------------------d2775b254ab250c0\r\nContent-Disposition: form-data; name="stream"\r\n\r\n'
            b"true\r\n--------------------------d2775b254ab250c0--\r\n",
            id="curl 7.88, a file's name in GBK",
        ),
    ],
)
def test_form_of_a_real_client_is_understood(content_type: str, body: bytes) -> None:
    """Each has a file's name that needs escapes; Go writes a backslash, browsers percent signs (RFC 7578 section 2)."""
    envelope = read_multipart(body, content_type)
    assert (envelope.model, envelope.stream) == ("whisper", True)


# --- steps and memory


def test_long_form_is_read_in_steps() -> None:
    body = part("file", bytes(3 * MIB), '; filename="a"') + MODEL + END
    envelope, steps = in_steps(body, TYPE)
    assert envelope.model == "whisper"
    assert steps >= len(body) // STEP_BYTES


@pytest.mark.parametrize("boundary", [b"xx", b"-"])
def test_boundary_is_found_wherever_a_step_ends(boundary: bytes) -> None:
    """The last delimiter of `-` is five hyphens, in which it stands three times."""
    content_type = f"multipart/form-data; boundary={boundary.decode()}"
    head = part("file", b"", '; filename="a"')[:-2]
    for before, after in ((b"", MODEL + END), (MODEL, END)):
        for over in range(-4, 16):
            content = b"." * (STEP_BYTES - len(before + head) - over)
            body = before + head + content + b"\r\n" + after
            judge(body.replace(b"--xx", b"--" + boundary), None, content_type)


@pytest.mark.parametrize(
    "body",
    [
        b"--xx\r\n\r\n\r\n" * 700_000,
        b"--xx\r\n" + b"X: y\r\n" * 1_000_000 + b"\r\n\r\n" + END,
        b"--xx\r\n" + DISPOSITION + b"name=x" + b"; a=b" * 1_000_000 + b"\r\n\r\n\r\n" + END,
        (b"--xx\r\n" + DISPOSITION + b'name=x; filename="' + b"\\a" * 4000 + b'"\r\n\r\n\r\n') * 127 + MODEL + END,
    ],
    ids=["boundaries", "headers", "parameters", "heads"],
)
def test_form_built_to_be_slow_is_refused_without_reading_on(body: bytes) -> None:
    with memory_below(MIB // 2), pytest.raises(InvalidRequest):
        forms.read_multipart(body, TYPE)


# --- beside other parsers

INNER = b"\r\n" + DISPOSITION + b'name="model"\r\n\r\nB'
PLAIN_FILE_NAMES = [
    "a.wav",
    "",
    "a;b",
    'a\\"b',
    "a\\\\",
    "C:\\x",
    "会议",
    "a%22",
    'a\\"; b=\\"c',
    "model",
    "a;b;c",
    "=?a?=",
]


def mostly(usual: list[str] | list[bytes], odd: list[str] | list[bytes]) -> st.SearchStrategy[Any]:
    """What is usual nine times out of ten, so that many a form has one oddity or none."""
    return st.sampled_from([*usual * 9 * len(odd), *odd * len(usual)])


NAMES = mostly(
    ["file", "image[]", "x.y", "[x]", "name", "prompt"], ["model", "Model", "model[]", "/model", "x y", "stream"]
)
PARAMETERS = mostly(["; filename=", ";filename=", ";  Filename="], ["; x=", "; name=", " ; filename="])
HEADERS = mostly(
    [
        "Content-Type: text/plain; charset=utf-8", "Content-Type: audio/wav", "Content-Transfer-Encoding: 8bit",
        'X-A: form-data; name="model"',
    ],
    [
        "Content-Type: text/plain; charset=utf-16", "Content-Type: multipart/mixed; boundary=yy", "Content-Length: 1",
        "Content-Transfer-Encoding: base64", " folded", "X : y", 'X: a\nContent-Disposition: form-data; name="model"',
    ],
)  # fmt: skip
CONTENTS = mostly(
    [b"", b"A", b"\r\n", b"\n", b"-", b"--", b"\r\n--x", INNER, b"--yy" + INNER + b"\r\n--yy--", b"\xff\x00"],
    [b"\n--xx" + INNER, b"--xx" + INNER, b"\r\n--xxx" + INNER, b"A--xx"],
)


@st.composite
def any_part(draw: st.DrawFn) -> bytes:
    line = draw(st.sampled_from(["Content-Disposition: form-data; ", "content-disposition:form-data;"]))
    line += draw(mostly(['name="{}"', 'Name="{}"'], ["name={}", "name*=utf-8''{}", 'name="x"; name="{}"'])).format(
        draw(NAMES)
    )
    if draw(st.booleans()):
        line += draw(PARAMETERS) + '"{}"'.format(draw(mostly(PLAIN_FILE_NAMES, ["a;name=model", "a\\"])))
    lines = draw(st.permutations([line, *draw(st.lists(HEADERS, max_size=1))]))
    return b"--xx\r\n" + "\r\n".join(lines).encode() + b"\r\n\r\n" + draw(CONTENTS) + b"\r\n"


@st.composite
def any_form(draw: st.DrawFn) -> bytes:
    parts = draw(st.lists(any_part(), max_size=3))
    parts.insert(draw(st.integers(0, len(parts))), draw(mostly([MODEL], [b"", MODEL + MODEL])))
    preamble = draw(mostly([b"", b"a\r\n", b"\r\n", b"a\r\n\r\n"], [INNER + b"\r\n", b"a\n"]))
    end = draw(mostly([END, b"--xx--", END + b"b"], [b"--xx--b", b"--xx\r\n", END + INNER]))
    return preamble + b"".join(parts) + end


async def read_by_aiohttp(body: bytes) -> list[bytes]:
    loop = asyncio.get_running_loop()
    stream = aiohttp.StreamReader(BaseProtocol(loop), 2**16, loop=loop)
    stream.feed_data(body)
    stream.feed_eof()
    parts = aiohttp.MultipartReader({"Content-Type": TYPE}, stream)
    return [
        (await each.text()).encode()
        async for each in parts
        if isinstance(each, aiohttp.BodyPartReader) and each.name == "model"
    ]


def read_by_email(body: bytes) -> list[bytes]:
    message = email.message_from_bytes(f"Content-Type: {TYPE}\r\n\r\n".encode() + body, policy=email.policy.HTTP)
    return [
        each.get_payload(decode=True)
        for each in message.walk()
        if "content-disposition" in each and each["content-disposition"].params.get("name") == "model"
    ]


def assert_others_read_the_same(body: bytes) -> bool:
    """Assert it, and return whether the form was accepted. Another parser may refuse it."""
    try:
        model = read_multipart(body).model.encode()
    except EdgeError:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about dispositions that it does not understand
        with contextlib.suppress(ValueError, RuntimeError):
            assert asyncio.run(read_by_aiohttp(body)) == [model]
        assert read_by_email(body) == [model]
    return True


@given(any_form())
def test_what_is_accepted_is_read_alike_by_other_parsers(body: bytes) -> None:
    assert_others_read_the_same(body)


@given(
    st.lists(st.tuples(st.sampled_from(["file", "image[]", "prompt"]), st.sampled_from(PLAIN_FILE_NAMES)), max_size=3),
    st.sampled_from([b"", b"A", b"\r\n", INNER, b"\xff\x00"]),
)
def test_what_clients_send_is_accepted_and_read_alike(files: list[tuple[str, str]], content: bytes) -> None:
    parts = [part(name, content, f'; filename="{file}"\r\nContent-Type: audio/wav') for name, file in files]
    assert assert_others_read_the_same(b"".join(parts) + MODEL + END)
