"""A model server that fails as it is asked to: the case is in the model's name. Standard library only."""

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from cases import CASES
from words import FIRST_TEXT, error_document, error_events, opening, piece

_PAUSE_S: Final = 0.15  # between what a stream sends and how it breaks, so that the text is at the client by then
_LONGEST_STREAM_S: Final = 15.0
_BY_MODEL: Final = {case.model: case for case in CASES}
_APIS: Final = {"/v1/chat/completions": "chat", "/v1/responses": "responses", "/v1/messages": "messages"}


class ModelServer:
    """Listens on loopback until it is closed.

    `asked` counts requests by model. `streams_on`: a stream of the case `drain` goes on, for what is in front to stop;
    else the server itself closes it. `streaming` is set once such a stream has begun.
    """

    def __init__(self, *, streams_on: bool) -> None:
        self.asked: Counter[str] = Counter()
        self.streams_on = streams_on
        self.streaming = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler_of(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: clients reset connections that they gave up."""


def _handler_of(server: ModelServer) -> type[BaseHTTPRequestHandler]:
    class Bound(_Handler):
        model_server = server

    return Bound


class _Handler(BaseHTTPRequestHandler):
    model_server: ModelServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer a health probe."""
        self._document(200, {})

    def do_POST(self) -> None:
        """Play the case that the model's name asks for."""
        asked: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        api, case = _APIS.get(self.path), _BY_MODEL.get(asked["model"])
        if api is None or case is None:
            self._document(404, {"detail": "Not Found"})
            return
        self.model_server.asked[case.model] += 1
        with contextlib.suppress(OSError):  # the client left
            if case.status:
                self._document(case.status, error_document(api, case.status), api)
            else:
                self._stream(api, case.name, case.model)

    def _document(self, status: int, value: object, api: str = "") -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", "1")
        self._end_head(api)
        self.wfile.write(body)

    def _end_head(self, api: str) -> None:
        if api == "messages":
            self.send_header("request-id", "req_direct")
        self.end_headers()

    def _stream(self, api: str, name: str, model: str) -> None:
        chunked = name != "cut-unframed"
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Connection", "close")))
        self._end_head(api)
        self._send(opening(api, model), chunked)
        for text in FIRST_TEXT:
            self._send([piece(api, model, text)], chunked)
            time.sleep(_PAUSE_S)
        if name == "drain":
            self._drain(api, model)
        elif name == "error-event":
            self._send(error_events(api), chunked)
        elif name != "cut-between" and name != "clean-end":
            self._send([piece(api, model, "answer.")[:40]], chunked)
            time.sleep(_PAUSE_S)
        if name in ("error-event", "clean-end"):
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.close_connection = True

    def _drain(self, api: str, model: str) -> None:
        self.model_server.streaming.set()
        until = time.monotonic() + _LONGEST_STREAM_S
        while self.model_server.streams_on and time.monotonic() < until:
            self._send([piece(api, model, "… ")], True)
            time.sleep(_PAUSE_S)

    def _send(self, events: Iterable[bytes], chunked: bool) -> None:
        for event in events:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event) if chunked else event)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""
