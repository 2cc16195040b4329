"""What a form asks for: the one part that every parser reads as its model."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.envelope.form import read_multipart
from edge.envelope.splices import rewrite_multipart
from edge.errors import InvalidRequest
from tests.envelope.reading import memory_below

TYPE = "multipart/form-data; boundary=xx"


def part(name: str, content: bytes, more: str = "") -> bytes:
    return b'--xx\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (
        name.encode(),
        more.encode(),
        content,
    )


END = b"--xx--\r\n"
MODEL = part("model", b"whisper")
FILE = part("file", b"RIFF\r\n\r\n--x\r\n--\r\n\x00\xff--xx", '; filename="a.wav"\r\nContent-Type: audio/wav')


@pytest.mark.parametrize(
    ("content_type", "delimiter"),
    [
        ("multipart/form-data; boundary=xx", b"xx"),
        ('multipart/form-data; boundary="xx"', b"xx"),
        ("multipart/form-data;boundary=xx; charset=utf-8", b"xx"),
        ("Multipart/Form-Data; charset=utf-8; BOUNDARY=xx", b"xx"),
        ('multipart/form-data; boundary="a b?=/:()"', b"a b?=/:()"),
        (
            "multipart/form-data; boundary=----WebKitFormBoundary7MA4YWxkTrZu0gW",
            b"----WebKitFormBoundary7MA4YWxkTrZu0gW",
        ),
        ("multipart/form-data; boundary=" + "b" * 70, b"b" * 70),
    ],
)
def test_boundary_is_understood_quoted_or_not(content_type: str, delimiter: bytes) -> None:
    """RFC 2046 section 5.1.1: up to 70 characters, quoted when one of them needs it."""
    body = (
        (FILE + MODEL + END).replace(b"--xx\r\n", b"--" + delimiter + b"\r\n").replace(b"--xx--", b"--%b--" % delimiter)
    )
    assert read_multipart(body, content_type).model == "whisper"


@pytest.mark.parametrize(
    ("head", "found"),
    [
        ('Content-Disposition: form-data; name="model"', True),
        ("content-disposition:form-data;name=model", True),
        ('CONTENT-DISPOSITION: Form-Data; NAME="model"', True),
        ('Content-Type: text/plain\r\nContent-Disposition: form-data; name="model"', True),
        ('Content-Disposition: form-data; x="name=y"; name="model"', True),
        ('Content-Disposition: form-data; name="model"; filename="m"', False),
        ("Content-Disposition: form-data; filename*=utf-8''m; name=\"model\"", False),
        ('Content-Disposition: form-data; filename="m"; name="model"', False),
        ('Content-Disposition: form-data; name="models"', False),
        ('Content-Disposition: form-data; name="x"', False),
        ('Content-Disposition: attachment; name="model"', False),
        ("X-Name: model", False),
        ("", False),
    ],
)
def test_only_a_form_field_named_model_is_the_model(head: str, found: bool) -> None:
    """RFC 7578 section 4.2; a file of that name is a file."""
    separator = "\r\n" if head else ""
    body = b"--xx\r\n%b%b\r\nm\r\n" % (head.encode(), separator.encode()) + END
    if found:
        assert read_multipart(body, TYPE).model == "m"
    else:
        with pytest.raises(InvalidRequest):
            read_multipart(body, TYPE)


@pytest.mark.parametrize(
    "second",
    [
        b'--xx\r\nContent-Disposition: form-data; name="x"; name="model"\r\n\r\nm2\r\n',
        b'--xx\r\nContent-Disposition: form-data;\r\n name="model"\r\n\r\nm2\r\n',
        b'--xx\r\nContent-Disposition: form-data; name="x"\r\n'
        b'Content-Disposition: form-data; name="model"\r\n\r\nm2\r\n',
        b"--xx\r\nContent-Disposition: form-data; name*=utf-8''model\r\n\r\nm2\r\n",
        b'--xx\r\nContent-Disposition : form-data; name="model"\r\n\r\nm2\r\n',
        b'--xx\r\nContent-Disposition: form-data; name = "model"\r\n\r\nm2\r\n',
        b'--xx\r\nContent-Disposition: form-data; name="mod\\el"\r\n\r\nm2\r\n',
    ],
    ids=["two names", "folded", "two dispositions", "extended name", "space", "spaces", "escape"],
)
def test_part_that_others_could_read_as_a_second_model_is_refused(second: bytes) -> None:
    """One parser takes the last of two names, another the first; the model served must be the one authorised."""
    for body in (MODEL + second + END, second + MODEL + END):
        with pytest.raises(InvalidRequest):
            read_multipart(body, TYPE)


def changed(old: bytes, new: bytes) -> bytes:
    return (FILE + MODEL + END).replace(old, new, 1)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (FILE + END, TYPE),
        (MODEL + MODEL + END, TYPE),
        (MODEL + part("model", b"other") + END, TYPE),
        (MODEL + part("stream", b"true") + part("stream", b"false") + END, TYPE),
        (MODEL, TYPE),
        (MODEL + b"--xx", TYPE),
        (MODEL[:-4], TYPE),
        (b"", TYPE),
        (END, TYPE),
        (b"preamble\r\n" + MODEL + END, TYPE),
        (b"\r\n" + MODEL + END, TYPE),
        (MODEL.replace(b"\r\n", b"\n") + END, TYPE),
        (b'--xx\r\nContent-Disposition: form-data; name="model"\r\nwhisper\r\n' + END, TYPE),
        (MODEL + END, "multipart/form-data"),
        (MODEL + END, "multipart/form-data; boundary="),
        (MODEL + END, 'multipart/form-data; boundary=""'),
        (MODEL + END, "multipart/form-data; boundary=" + "b" * 71),
        (MODEL + END, "multipart/form-data; boundary=x"),
        (MODEL + END, "multipart/form-data; boundary=xxx"),
        (part("model", b"\xff") + END, TYPE),
        (part("model", b"") + END, TYPE),
        (part("a", b"") * 1100 + MODEL + END, TYPE),
    ],
)
def test_form_without_one_certain_model_is_refused(body: bytes, content_type: str) -> None:
    with pytest.raises(InvalidRequest):
        read_multipart(body, content_type)


@pytest.mark.parametrize(
    ("value", "stream"), [(b"true", True), (b"True", True), (b"1", True), (b"false", False), (b"", False)]
)
def test_stream_is_a_field_of_the_form(value: bytes, stream: bool) -> None:
    assert read_multipart(FILE + part("stream", value) + MODEL + END, TYPE).stream is stream


@pytest.mark.parametrize("order", [lambda a, b: a + b, lambda a, b: b + a])
def test_spliced_form_differs_in_the_models_name_only(order: Callable[[bytes, bytes], bytes]) -> None:
    """Files hold CRLF and what looks like a boundary; they go upstream as they came."""
    for epilogue in [b"", b"\r\n", b"an epilogue"]:
        body = order(FILE, MODEL) + b"--xx--" + epilogue
        envelope = read_multipart(body, TYPE)
        assert rewrite_multipart(body, envelope, "模型") == body.replace(b"\r\nwhisper\r\n", "\r\n模型\r\n".encode())


@given(st.binary(max_size=40).filter(lambda data: b"\r\n--xx" not in b"\r\n" + data))
def test_content_of_a_file_never_matters(content: bytes) -> None:
    body = part("file", content, '; filename="model"') + MODEL + END
    envelope = read_multipart(body, TYPE)
    assert (
        rewrite_multipart(body, envelope, "new")
        == part("file", content, '; filename="model"') + part("model", b"new") + END
    )


def test_form_of_a_million_boundaries_is_refused_without_reading_on() -> None:
    body = b"--xx\r\n\r\n\r\n" * 700_000
    with memory_below(4 * len(body)), pytest.raises(InvalidRequest):
        read_multipart(body, TYPE)
