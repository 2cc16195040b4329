#!/usr/bin/env bash
# openai and groq (PyPI), httpx-sse: a block with nothing but `retry:` is taken for an event.
#
# Servers set the time of reconnection so before their first event. The HTML standard dispatches no event at a blank line
# where there was no `data` (https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation).
# openai and groq parse its data as JSON, which is empty, and the answer behind it is lost; httpx-sse yields an event whose
# data is "". anthropic goes on, and so does openai's SDK for Node.js.
# Seen with openai 3.57.0, groq 1.7.0, anthropic 2.14.0 and httpx-sse 0.4.3 on CPython 3.11.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check openai==3.57.0 groq==1.7.0 anthropic==2.14.0 httpx-sse==0.4.3 httpx
"$folder/venv/bin/python" - <<'PYTHON'
import json
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anthropic
import groq
import httpx
import openai
from httpx_sse import connect_sse

CHUNK = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
CHUNK["choices"] = [{"index": 0, "delta": {"content": "Hello"}, "finish_reason": None}]
DELTA = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello"}}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        kind, event = ("event: content_block_delta\n", DELTA) if self.path.endswith("messages") else ("", CHUNK)
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write(f"retry: 3000\n\n{kind}data: {json.dumps(event)}\n\n".encode())

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_address[1]}"
asked = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "stream": True}


def events(stream: Iterable[object]) -> str:
    try:
        return f"{len(list(stream))} event"
    except ValueError as error:
        return type(error).__name__


def by_httpx() -> list[str]:
    with httpx.Client() as client, connect_sse(client, "POST", url, json=asked) as source:
        return [event.data[:10] for event in source.iter_sse()]


seen = {
    "openai": events(openai.OpenAI(base_url=url, api_key="k").chat.completions.create(**asked)),
    "groq": events(groq.Groq(base_url=url, api_key="k").chat.completions.create(**asked)),
    "anthropic": events(anthropic.Anthropic(base_url=url, api_key="k").messages.create(max_tokens=9, **asked)),
    "httpx-sse": by_httpx(),
}
print(seen)
expected = {"openai": "JSONDecodeError", "groq": "JSONDecodeError", "anthropic": "1 event", "httpx-sse": ["", '{"id": "c"']}
assert seen == expected, "the behaviour has changed"
PYTHON
