"""What may hold the edge's loop: requests and answers that are long, each of another kind; all of it is harmless.

A request has `{size}` bytes of body, or nearly so; an answer is what the model's server sends after it has read one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

MIB: Final = 1 << 20
_PIECE_BYTES: Final = 1 << 20
_HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n"
_JSON: Final = b"application/json"
_EVENTS: Final = b"text/event-stream"
_BOUNDARY: Final = b"8c1f0b7e"
_FORM: Final = "multipart/form-data; boundary=8c1f0b7e"

Pieces = Iterator[bytes]


def _document(content: bytes) -> bytes:
    return _HEAD % _JSON + b"content-length: %d\r\n\r\n%b" % (len(content), content)


SHORT_ANSWER: Final = _document(
    b'{"id":"a","object":"chat.completion","model":"m","choices":[{"index":0,"message":{"role":"assistant",'
    b'"content":"Hello"},"finish_reason":"stop"}],"usage":{"prompt_tokens":9,"completion_tokens":1,"total_tokens":10}}'
)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind: `body` makes the request's body of a size, `answer` what the model's server says.

    `chunk_bytes` is the size of chunks, 0 for a body with its length; `extension` stands in each. `status` is what the
    client is to get, 0 when it leaves before the last byte. `reads`: the model's server reads the request first.
    `ends`: it closes the connection behind the answer. `share` of the size is sent, of what takes long by its count.
    """

    name: str
    body: Callable[[bytes, int], Pieces]
    model: str = "plain"
    path: str = "chat/completions"
    status: int = 200
    content_type: str = "application/json"
    chunk_bytes: int = 0
    extension: bytes = b""
    answer: Callable[[], bytes] = lambda: SHORT_ANSWER
    reads: bool = True
    share: float = 1.0
    tls: bool = False


def _filled(before: bytes, unit: bytes, after: bytes, size: int, last: bytes = b"") -> Pieces:
    """Yield `before`, then `unit` again and again, then `after`; `last` is what follows the last unit in its place."""
    count = max(0, size - len(before) - len(after)) // len(unit)
    per_piece = max(1, _PIECE_BYTES // len(unit))
    whole = unit * per_piece
    yield before
    for _ in range(count // per_piece):
        yield whole
    yield unit * (count % per_piece) + last
    yield after


def _json(prefix: bytes, unit: bytes, suffix: bytes, last: bytes = b"") -> Callable[[bytes, int], Pieces]:
    """Return what makes a JSON body of repeated units; `last` ends the list without a comma."""

    def body(model: bytes, size: int) -> Pieces:
        return _filled(b'{"model":"%b",%b' % (model, prefix), unit, suffix + b"}", size, last)

    return body


def _form(head: bytes, unit: bytes, tail: bytes = b"") -> Callable[[bytes, int], Pieces]:
    def body(model: bytes, size: int) -> Pieces:
        named = b'--%b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n' % (_BOUNDARY, model)
        return _filled(named + head, unit, tail + b"\r\n--%b--\r\n" % _BOUNDARY, size)

    return body


def _small(model: bytes, size: int) -> Pieces:
    yield b'{"model":"%b","messages":[{"role":"user","content":"Hi"}]}' % model


def _small_stream(model: bytes, size: int) -> Pieces:
    yield b'{"model":"%b","stream":true,"messages":[{"role":"user","content":"Hi"}]}' % model


def _response_stream(model: bytes, size: int) -> Pieces:
    yield b'{"model":"%b","stream":true,"input":"Hi"}' % model


_MESSAGE: Final = b'{"role":"user","content":"Hello there"},'
_LAST_MESSAGE: Final = b'{"role":"user","content":"Hi"}'
_ONE_TEXT: Final = b'"messages":[{"role":"user","content":"'
_TEXT_END: Final = b'"}]'
_TEXT: Final = _json(_ONE_TEXT, b"Hello there, ", _TEXT_END)
_MESSAGES: Final = _json(b'"messages":[', _MESSAGE, b"]", _LAST_MESSAGE)
_FILE: Final = (
    b'--%b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
    % _BOUNDARY
)
_TRANSCRIPTIONS: Final = "audio/transcriptions"
_EVENT: Final = (
    b'data: {"id":"c","object":"chat.completion.chunk","model":"m","choices":[{"index":0,"delta":{"content":"Hi"}}]}'
    b"\n\n"
)
_DONE: Final = b"data: [DONE]\n\n"
_TOOL: Final = (
    b'data: {"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"1"}}]},'
    b'"finish_reason":null}]}\n\n'
)
_TOOL_OF_CLIENT: Final = b'{"type":"function","function":{"name":"f","parameters":{"type":"object"}}},'
_USAGE: Final = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n'
_USAGES: Final = (b'data: {"choices":[{"a":{', b'"usage":null,', b'"b":1}}],"usage":{"prompt_tokens":1}}\n\n')
_RESPONSE: Final = (
    b'event: response.completed\ndata: {"type":"response.completed","response":{"id":"a","output":[',
    b'{"type":"message","content":[{"type":"output_text","text":"Hello there"}]},',
    b'{}],"usage":{"input_tokens":1,"output_tokens":1}}}\n\n',
)


def _chunked(*contents: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(content), content) for content in contents) + b"0\r\n\r\n"


def _long_document(size: int, unit: bytes = b"Hello there, ", *, chunked: bool = False) -> bytes:
    text = unit * (size // len(unit))
    content = (
        b'{"id":"a","choices":[{"index":0,"message":{"role":"assistant","content":"%b"},"finish_reason":"stop"}],'
        b'"model":"m","usage":{"prompt_tokens":9,"completion_tokens":1,"total_tokens":10}}' % text
    )
    if not chunked:
        return _document(content)
    pieces = (content[at : at + 65_536] for at in range(0, len(content), 65_536))
    return _HEAD % _JSON + b"transfer-encoding: chunked\r\n\r\n" + _chunked(*pieces)


def _logprobs(size: int) -> bytes:
    unit = b'{"token":"a","logprob":-0.1,"bytes":[97],"top_logprobs":[]},'
    probabilities = unit * (size // len(unit)) + unit[:-1]
    return _document(
        b'{"id":"a","choices":[{"index":0,"logprobs":{"content":[%b]},"message":{"content":"Hi"}}],"model":"m",'
        b'"usage":{"prompt_tokens":9,"completion_tokens":1,"total_tokens":10}}' % probabilities
    )


def _vectors(size: int) -> bytes:
    unit = b"-0.0123456,"
    numbers = unit * (size // len(unit)) + unit[:-1]
    return _document(b'{"data":[{"embedding":[%b]}],"model":"m","usage":{"prompt_tokens":9}}' % numbers)


def _stream(count: int, *, per_chunk: int = 1) -> bytes:
    whole = (_EVENT * per_chunk for _ in range(count // per_chunk))
    return _HEAD % _EVENTS + b"transfer-encoding: chunked\r\n\r\n" + _chunked(*whole, _DONE)


def _long_event(size: int) -> bytes:
    event = _EVENT.replace(b"Hi", b"x" * size)
    return _HEAD % _EVENTS + b"transfer-encoding: chunked\r\n\r\n" + _chunked(event, _DONE)


def _bytewise_stream() -> bytes:
    content = _EVENT * 500 + _DONE
    each = (content[at : at + 1] for at in range(len(content)))
    return _HEAD % _EVENTS + b"transfer-encoding: chunked\r\n\r\n" + _chunked(*each)


def _error(content: bytes) -> bytes:
    return b"HTTP/1.1 400 Bad Request\r\ncontent-length: %d\r\n\r\n%b" % (len(content), content)


def _bytewise_error() -> bytes:
    chunks = _chunked(*(b"x" for _ in range(60_000)))
    return b"HTTP/1.1 400 Bad Request\r\ntransfer-encoding: chunked\r\n\r\n" + chunks


def _many_lines() -> bytes:
    return b"HTTP/1.1 200 OK\r\n" + b"".join(b"a%d: b\r\n" % each for each in range(6000)) + b"\r\n"


def _interim() -> bytes:
    """Sixteen answers of 1xx, each with as many lines as a head may have, and then one."""
    return (
        b"".join(
            b"HTTP/1.1 103 Early Hints\r\n" + b"".join(b"a%d: %d\r\n" % (each, count) for each in range(127)) + b"\r\n"
            for count in range(16)
        )
        + SHORT_ANSWER
    )


def _units(before: bytes, unit: bytes, after: bytes, size: int) -> bytes:
    return before + unit * (size // len(unit)) + after


def _answered(before: bytes, unit: bytes, after: bytes, size: int) -> Callable[[], bytes]:
    """Return what makes a JSON answer of repeated units."""
    return lambda: _document(_units(before, unit, after, size))


def _streamed(before: bytes, unit: bytes, after: bytes, size: int) -> Callable[[], bytes]:
    """Return what makes a stream whose content is repeated units, in chunks of 64 KiB."""

    def answer() -> bytes:
        content = _units(before, unit, after, size) + _DONE
        pieces = (content[at : at + 65_536] for at in range(0, len(content), 65_536))
        return _HEAD % _EVENTS + b"transfer-encoding: chunked\r\n\r\n" + _chunked(*pieces)

    return answer


KINDS: Final = (
    # JSON that is served
    Kind("one text", _TEXT),
    Kind("one text, rewritten", _TEXT, model="renamed"),
    Kind("escapes", _json(_ONE_TEXT, rb"\"\u00e4\\", _TEXT_END), model="renamed"),
    Kind("not ASCII", _json(_ONE_TEXT, "ä日".encode(), _TEXT_END), model="renamed"),
    Kind("messages", _MESSAGES, model="affine"),
    Kind("nested models", _json(b'"messages":[', b'{"model":{"model":"a"}},', b"]", _LAST_MESSAGE), model="renamed"),
    Kind(
        "stream_options of the client, rewritten",
        _json(b'"stream":true,"messages":[', _MESSAGE, b'],"stream_options":{"include_usage":false}', _LAST_MESSAGE),
        model="renamed",
        answer=lambda: _stream(20),
    ),
    Kind("token ids", _json(b'"prompt":[', b"1,", b"1]"), path="completions", model="renamed"),
    Kind("prompts", _json(b'"prompt":[', b'"a",', b'"a"]'), path="completions"),
    Kind("brackets", _json(b'"input":[', b"[],", b"[]]"), path="embeddings"),
    Kind("spaces", _json(b'"messages":[%b],' % _LAST_MESSAGE, b" \n", b'"n":1'), model="renamed"),
    Kind("spoken text", _json(b'"input":"', b"Hello there, ", b'"'), path="audio/speech"),
    # that is refused
    Kind("members of the top level", _json(b'"messages":[],', b'"a":1,', b'"b":1'), status=400),
    Kind("no end", _json(b'"messages":[', _MESSAGE, b"]]"), status=400),
    Kind("an unknown model", _MESSAGES, model="unknown", status=404),
    Kind("over the limit", lambda model, size: _TEXT(model, 65 * MIB), chunk_bytes=65_536, status=413),
    # forms
    Kind("a file", _form(_FILE, b"sound and "), path=_TRANSCRIPTIONS, content_type=_FORM),
    Kind("a file, renamed", _form(_FILE, b"\r\n--8c1f"), path=_TRANSCRIPTIONS, content_type=_FORM, model="renamed"),
    Kind(
        "files",
        lambda model, size: _form(b"", _FILE + b"x" * (size // 100) + b"\r\n", _FILE)(model, size),
        path=_TRANSCRIPTIONS,
        content_type=_FORM,
    ),
    Kind("parts", _form(b"", _FILE + b"\r\n", _FILE), path=_TRANSCRIPTIONS, content_type=_FORM, status=400),
    Kind(
        "lines in a part's head",
        _form(_FILE[:-2], b"X-A: b\r\n", b"\r\n"),
        path=_TRANSCRIPTIONS,
        content_type=_FORM,
        status=400,
    ),
    Kind(
        "parameters in a part's head",
        _form(_FILE[:-4], b"; a=b", b"\r\n\r\n"),
        path=_TRANSCRIPTIONS,
        content_type=_FORM,
        status=400,
    ),
    # framing
    Kind("chunks of 64 KiB", _TEXT, chunk_bytes=65_536),
    Kind("chunks of 16 bytes", _TEXT, chunk_bytes=16, share=0.1),
    Kind("chunks of a byte", _TEXT, chunk_bytes=1, share=0.1, status=400),
    Kind("an extension", _TEXT, chunk_bytes=65_536, extension=b";a=" + b"b" * (16 * MIB), share=0.1, status=400),
    # ends
    Kind("a client that leaves", _TEXT, status=0),
    Kind("a server that reads nothing", _TEXT, reads=False),
    Kind("over TLS", _TEXT, model="secure"),
    Kind("over TLS, a server that reads nothing", _TEXT, model="secure", reads=False),
    # answers
    Kind("an answer", _small, answer=lambda: _long_document(10 * MIB)),
    Kind("an answer in chunks", _small, answer=lambda: _long_document(10 * MIB, chunked=True)),
    Kind("a named answer", _small, model="echoed", answer=lambda: _long_document(10 * MIB)),
    Kind("a named answer of 1 MiB", _small, model="echoed", answer=lambda: _long_document(MIB - 4096, b'\\"')),
    Kind("log probabilities", _small, model="echoed", answer=lambda: _logprobs(MIB - 4096)),
    Kind("log probabilities, long", _small, answer=lambda: _logprobs(10 * MIB)),
    Kind("vectors", _small, path="embeddings", answer=lambda: _vectors(10 * MIB)),
    Kind("an answer over TLS", _small, model="secure", answer=lambda: _long_document(10 * MIB)),
    Kind("events", _small_stream, answer=lambda: _stream(10_000)),
    Kind("events, many in a chunk", _small_stream, answer=lambda: _stream(10_000, per_chunk=1000)),
    Kind("named events", _small_stream, model="echoed", answer=lambda: _stream(10_000)),
    Kind("named events, chunks of many", _small_stream, model="echoed", answer=lambda: _stream(10_000, per_chunk=1000)),
    Kind("a long event", _small_stream, answer=lambda: _long_event(10 * MIB)),
    Kind("a long named event", _small_stream, model="echoed", answer=lambda: _long_event(10 * MIB)),
    Kind("events in chunks of a byte", _small_stream, answer=_bytewise_stream),
    Kind("an error", _small, answer=lambda: _error(b"x" * (10 * MIB)), status=400),
    # answers that no server gives
    Kind("an error in chunks of a byte", _small, answer=_bytewise_error, status=400),
    Kind("a deep error", _small, answer=lambda: _error(b'{"error":' + b"[" * 60_000), status=400),
    Kind("a head of many lines", _small, answer=_many_lines, status=502),
    Kind("interim answers", _small, answer=_interim),
    Kind("a deep answer", _small, answer=_answered(b'{"a":[', b"[[[[[[[[1]]]]]]]],", b"1]}", MIB)),
    Kind("a deep named answer", _small, model="echoed", answer=_answered(b'{"a":', b"[", b"", MIB // 2)),
    Kind("small objects", _small, answer=_answered(b'{"a":[', b"{},", b"{}]}", MIB)),
    Kind("an answer that has no end", _small, answer=_answered(b'{"a":[', b'{"a":[1,"b"]},', b"{}", 120_000)),
    Kind("usage again and again", _small, answer=_answered(b"{", b'"usage":{},', b'"b":1}', MIB)),
    Kind("a tool's calls", _small_stream, answer=_streamed(b"", _TOOL, b"", MIB)),
    Kind("usage events", _small_stream, answer=_streamed(b"", _USAGE, b"", MIB)),
    Kind("an event of choices", _small_stream, answer=_streamed(b'data: {"choices":[', b"{},", b"{}]}\n\n", 60_000)),
    Kind("an event with usages", _small_stream, answer=_streamed(*_USAGES, 60_000)),
    Kind("an event that has no end", _small_stream, answer=_streamed(b'data: {"a":"', b"x", b"", 10 * MIB)),
    Kind("a deep event, named", _small_stream, model="echoed", answer=_streamed(b'data: {"a":', b"[", b"\n\n", 60_000)),
    Kind("many lines of data", _small_stream, answer=_streamed(b"", b'data: {"a":1}\n', b"\n", MIB)),
    Kind("comments", _small_stream, answer=_streamed(b"", b":\n\n", b"", MIB)),
    Kind("comments, named", _small_stream, model="echoed", answer=_streamed(b"", b":\n\n", b"", MIB)),
    Kind("empty lines", _small_stream, answer=_streamed(b"data: {}\n\n", b"\n", b"", MIB)),
    Kind("data that is no JSON", _small_stream, answer=_streamed(b"", b'data: {"aaa\n\n', b"", MIB)),
    Kind("small named events", _small_stream, model="echoed", answer=_streamed(b"", b"data: {}\n\n", b"", MIB)),
    Kind("a response", _response_stream, path="responses", answer=_streamed(*_RESPONSE, 10 * MIB)),
    Kind("images", _small, path="images/generations", answer=_answered(b'{"data":[', b'{"url":""},', b"{}]}", MIB)),
    # bodies of many small members
    Kind("stop words", _json(b'"stop":[', b'"a",', b'"a"],"messages":[%b]' % _LAST_MESSAGE), model="renamed"),
    Kind("tools", _json(b'"messages":[%b],"tools":[' % _LAST_MESSAGE, _TOOL_OF_CLIENT, b"]", _LAST_MESSAGE)),
)  # fmt: skip
