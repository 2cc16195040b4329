#!/usr/bin/env bash
# requests-sse: a POST whose stream has ended in order is sent anew, with its body, also with `max_connect_retry=0`.
#
# The library offers `method` and `data`, and its loop over an `EventSource` ends when the connection does by no means: it
# asks again after the reconnection time, without end, as the HTML standard has it for the GETs of a browser
# (https://html.spec.whatwg.org/multipage/server-sent-events.html#processing-model). Of a POST the same is a second answer,
# made and billed: RFC 9110 section 9.2.2 has no automatic retry of a method that is not idempotent, unless the client knows
# that it may. Who does not leave the loop at `[DONE]` pays until the program ends. `max_connect_retry` bounds the attempts
# of one connection only. Seen with requests-sse 0.5.3, three answers taken.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check requests-sse==0.5.3
"$folder/venv/bin/python" - <<'PYTHON'
import itertools
import threading
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from requests_sse import EventSource

STREAM = b'data: {"token": 1}\n\ndata: [DONE]\n\n'
bodies = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(len(STREAM)))
        self.end_headers()
        self.wfile.write(STREAM)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_address[1]}"
soon = timedelta(milliseconds=50)
with EventSource(url, method="POST", data="{}", reconnection_time=soon, max_connect_retry=0) as source:
    events = [event.data for event in itertools.islice(source, 6)]
print("events:", events, "bodies posted:", bodies)
assert events == ['{"token": 1}', "[DONE]"] * 3, "the behaviour has changed"
assert bodies == [b"{}"] * 3, "the behaviour has changed"
PYTHON
