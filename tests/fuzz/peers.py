"""How other parsers read what the edge lets through: h11, and llhttp as httptools has it.

aiohttp's own parser is llhttp too, of another release and with other settings; h11 shares nothing with it.
"""

from typing import NamedTuple

import h11
import httptools

_MAX_EVENT_BYTES = 2**20


class Message(NamedTuple):
    """A whole message: a request's method and target, or b"" and a status, and the body."""

    method: bytes
    target: bytes
    body: bytes


class Reading(NamedTuple):
    """The whole messages of some bytes, and what became of the rest: "end", "open" or "refused"."""

    messages: list[Message]
    rest: str


def requests_by_h11(data: bytes) -> Reading:
    messages: list[Message] = []
    while data:
        connection = h11.Connection(h11.SERVER, _MAX_EVENT_BYTES)
        message = _next_by_h11(connection, data)
        if isinstance(message, str):
            return Reading(messages, message)
        messages.append(message)
        data = connection.trailing_data[0]
    return Reading(messages, "end")


def answer_by_h11(data: bytes, method: bytes = b"POST") -> Reading:
    """Read one answer, whose connection ends behind the data."""
    connection = h11.Connection(h11.CLIENT, _MAX_EVENT_BYTES)
    connection.send(h11.Request(method=method, target="/", headers=[("Host", "x"), ("Content-Length", "0")]))
    connection.send(h11.EndOfMessage())
    message = _next_by_h11(connection, data, closes=True)
    return Reading([], message) if isinstance(message, str) else Reading([message], "end")


def _next_by_h11(connection: h11.Connection, data: bytes, *, closes: bool = False) -> Message | str:
    method = target = body = b""
    rest = "refused"
    try:
        connection.receive_data(data)
        while True:
            event = connection.next_event()
            if event is h11.PAUSED or (event is h11.NEED_DATA and not closes):
                return "open"
            if event is h11.NEED_DATA:
                closes, rest = False, "open"
                connection.receive_data(b"")
            if isinstance(event, h11.Request):
                method, target = event.method, event.target
            elif isinstance(event, h11.Response):
                target = b"%d" % event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return Message(method, target, body)
    except h11.RemoteProtocolError:
        return rest


class _Collector:
    """The callbacks of httptools."""

    def __init__(self) -> None:
        self.parser: httptools.HttpRequestParser | httptools.HttpResponseParser
        self.messages: list[Message] = []
        self.begun = False
        self._target = self._body = b""

    def on_message_begin(self) -> None:
        self.begun = True
        self._target = self._body = b""

    def on_url(self, part: bytes) -> None:
        self._target += part

    def on_body(self, part: bytes) -> None:
        self._body += part

    def on_message_complete(self) -> None:
        self.begun = False
        if isinstance(self.parser, httptools.HttpRequestParser):
            self.messages.append(Message(self.parser.get_method(), self._target, self._body))
        elif (status := self.parser.get_status_code()) >= 200:
            self.messages.append(Message(b"", b"%d" % status, self._body))


def requests_by_llhttp(data: bytes) -> Reading:
    collector = _Collector()
    collector.parser = httptools.HttpRequestParser(collector)
    return _by_llhttp(collector, data)


def answer_by_llhttp(data: bytes) -> Reading:
    """Read one answer; what ends with its connection is "open" to this parser, which is not told of the end."""
    collector = _Collector()
    collector.parser = httptools.HttpResponseParser(collector)
    return _by_llhttp(collector, data)


def _by_llhttp(collector: _Collector, data: bytes) -> Reading:
    try:
        collector.parser.feed_data(data)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return Reading(collector.messages, "refused")
    return Reading(collector.messages, "open" if collector.begun else "end")
