#!/usr/bin/env bash
# openai (PyPI): its stream helper joins the `id` and the `name` of a tool call when a later delta repeats them.
#
# Every delta of a call may carry them: the API's description makes both optional in each, with the same type in all
# (https://platform.openai.com/docs/api-reference/chat-streaming). Where a server repeats them with each piece of the
# arguments, `get_final_completion` has the call `t1t1` of the function `ff`, which no program has. A repeated `role` is
# left alone, and the helper of the SDK for Node.js has the id and the name once.
# Seen with openai 3.57.0 (PyPI), and openai 6.49.0 (npm) on Node.js 20.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check openai==3.57.0
cd "$folder"
npm install --silent --no-audit --no-fund openai@6.49.0
cat > try.mjs <<'JS'
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "k" });
const answer = await client.chat.completions.stream({ model: "m", messages: [{ role: "user", content: "Hello" }] }).finalChatCompletion();
const [{ id, function: called }] = answer.choices[0].message.tool_calls;
console.log(JSON.stringify([id, called.name, called.arguments]));
process.exit(0);
JS
"$folder/venv/bin/python" - <<'PYTHON'
import json
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai


def event(arguments: str, finish: str | None) -> str:
    call = {"index": 0, "id": "t1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    choice = {"index": 0, "delta": {"role": "assistant", "tool_calls": [call]}, "finish_reason": finish}
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return f"data: {json.dumps(chunk)}\n\n"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write((event('{"a":', None) + event("1}", "tool_calls") + "data: [DONE]\n\n").encode())

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_address[1]}/v1"
client = openai.OpenAI(base_url=url, api_key="k")
with client.chat.completions.stream(model="m", messages=[{"role": "user", "content": "Hello"}]) as stream:
    [call] = stream.get_final_completion().choices[0].message.tool_calls
python = [call.id, call.function.name, call.function.arguments]
node = json.loads(subprocess.run(["node", "try.mjs", url], capture_output=True, check=True).stdout)
print("PyPI:", python, "npm:", node)
assert python == ["t1t1", "ff", '{"a":1}'], "the behaviour has changed"
assert node == ["t1", "f", '{"a":1}'], "the behaviour of the other has changed"
PYTHON
