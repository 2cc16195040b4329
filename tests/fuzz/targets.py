"""The targets: a property of any bytes each, harmless bytes to begin with, and the words of their grammar."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.fuzz import answers, envelopes, events, forms, requests, routes

CORPUS = Path(__file__).parent / "corpus"
_JSON_WORDS = (b'"model":', b'"', b"\\", b"\\u006d", b"{", b"}", b"[", b"]", b",", b":", b"null", b"1e3", b"true")


class Target(NamedTuple):
    """`check` raises for bytes of which the property does not hold."""

    check: Callable[[bytes], None]
    words: tuple[bytes, ...]


TARGETS = {
    "requests": Target(requests.check, (
        b"\r\n", b"\n", b"\r", b":", b" ", b"\t", b",", b";", b"0", b"0\r\n\r\n", b"Content-Length: 5\r\n",
        b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"HTTP/1.0",
        b"Transfer-Encoding: gzip, chunked\r\n", b"Content-Length: 0\r\n", b"Expect: x\r\n",
        b"GET", b"http://x/v1/completions", b"\xff", b"\0",
    )),
    "answers": Target(answers.check, (
        b"\r\n", b"\n", b"\r", b":", b" ", b";a=b", b"0", b"0\r\n\r\n", b"content-length: 5\r\n",
        b"transfer-encoding: chunked\r\n", b"connection: close\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"204",
        b"transfer-encoding: gzip, chunked\r\n", b"content-length: 0\r\n", b"HTTP/1.0",
        b"x: y\r\n",
    )),
    "forms": Target(forms.check, (
        b"--xx\r\n", b"--xx--", b"\r\n", b"\n", b'name="model"', b'; filename="a"', b"; ", b'"', b"\\", b"%22",
        b"Content-Type: text/plain\r\n", b"Content-Disposition: form-data; ", b"\r\n\r\n", b"\xff", b"model[]",
    )),
    "envelopes": Target(envelopes.check, (*_JSON_WORDS, b'"stream":', b'"max_tokens":', b'"stream_options":', b"\xff")),
    "events": Target(events.check, (
        *_JSON_WORDS, b"\n\n", b"\r\n\r\n", b"\r", b"data: ", b"data: [DONE]\n\n", b": x\n\n", b"event: a\n",
        b'"usage":', b'"type":', b'"choices":', b'"message_delta"', b'"response.completed"', b'"error":', b"\xff",
    )),
    "routes": Target(routes.check, (
        b"[", b"]", b"{", b"}", b'"', b"'", b'"""', b"=", b".", b",", b"\n", b"#", b"$", b"${", b"*", b"/", b"\\",
        b"[routes.", b"[pools.", b"http://", b"30s", b"\xc3\xa9",
    )),
}  # fmt: skip


def seeds(name: str) -> list[bytes]:
    """Return what the mutations of a target begin with."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
