#!/usr/bin/env bash
# @microsoft/fetch-event-source: a comment between two events is delivered to `onmessage`, as a message without data.
#
# Comments are what servers of streams send to keep a silent connection, `: keep-alive` of vLLM, `:` of llama.cpp, and the
# HTML standard has them ignored: where the data buffer is empty at a blank line, no event is dispatched
# (https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation). Here each gives an empty
# `data`, which is no JSON. An error thrown in `onmessage` then is no end of it: without an `onerror` that throws, the
# library waits a second and sends the POST anew. eventsource-parser delivers the events alone.
# Seen with @microsoft/fetch-event-source 2.0.1 and eventsource-parser 3.1.1 on Node.js 20.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm install --silent --no-audit --no-fund @microsoft/fetch-event-source@2.0.1 eventsource-parser@3.1.1
cat > try.mjs <<'JS'
import assert from "node:assert";
import http from "node:http";
import { fetchEventSource } from "@microsoft/fetch-event-source";
import { createParser } from "eventsource-parser";

globalThis.window = globalThis; // all that the library wants of a browser
globalThis.document = { hidden: false, addEventListener() {}, removeEventListener() {} };
const stream = ': keep-alive\n\ndata: {"token":1}\n\n:\n\n: keep-alive\n\ndata: {"token":2}\n\ndata: [DONE]\n\n';
const server = http.createServer((request, response) => {
  response.writeHead(200, { "content-type": "text/event-stream" }).end(stream);
});
await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
const delivered = [];
await fetchEventSource(`http://127.0.0.1:${server.address().port}/`, {
  method: "POST", openWhenHidden: true, onmessage: ({ data }) => delivered.push(data),
});
const parsed = [];
createParser({ onEvent: ({ data }) => parsed.push(data) }).feed(stream);
console.log("fetch-event-source:", delivered, "eventsource-parser:", parsed);
const events = ['{"token":1}', '{"token":2}', "[DONE]"];
assert.deepStrictEqual(parsed, events);
assert.deepStrictEqual(delivered, ["", events[0], "", "", events[1], events[2]], "the behaviour has changed");
process.exit(0);
JS
node try.mjs
