#!/usr/bin/env bash
# @langchain/core (npm): a 429 is not retried at all unless `Retry-After`, or the words of its message, say when.
#
# The package documents `maxRetries` of its AsyncCaller as the retries that each call has, six by default, ever later. A 503
# is retried so; a 429 without the header ends the call at once, also with `retry-after-ms`, the header that OpenAI's SDK
# beneath it reads first, and so does one that says more than 60 s. Where the text holds "try again in 1s" it is retried,
# and where the text holds "billing" it is not, whatever the header says.
# Seen with @langchain/core 1.4.0 and @langchain/openai 1.5.8 on Node.js 20.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm install --silent --no-audit --no-fund @langchain/core@1.4.0 @langchain/openai@1.5.8
cat > try.mjs <<'JS'
import assert from "node:assert";
import http from "node:http";
import { ChatOpenAI } from "@langchain/openai";

async function requests(status, headers, message) {
  let count = 0;
  const server = http.createServer((request, response) => {
    count += 1;
    request.resume().on("end", () => {
      response.writeHead(status, { "content-type": "application/json", ...headers });
      response.end(JSON.stringify({ error: { message, type: "t", param: null, code: "c" } }));
    });
  });
  await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
  const configuration = { baseURL: `http://127.0.0.1:${server.address().port}/v1` };
  await new ChatOpenAI({ model: "m", apiKey: "k", maxRetries: 1, configuration }).invoke("Hello").catch(() => {});
  server.closeAllConnections();
  server.close();
  return count;
}

const seen = {
  "503": await requests(503, {}, "Busy."),
  "429": await requests(429, {}, "Too many."),
  "429, Retry-After: 1": await requests(429, { "retry-after": "1" }, "Too many."),
  "429, Retry-After: 61": await requests(429, { "retry-after": "61" }, "Too many."),
  "429, retry-after-ms: 900": await requests(429, { "retry-after-ms": "900" }, "Too many."),
  "429, in words": await requests(429, {}, "Too many, try again in 1s."),
  "429, Retry-After: 1, billing": await requests(429, { "retry-after": "1" }, "Too many of the billing department."),
};
console.log("requests with maxRetries: 1:", seen);
const retried = ["503", "429, Retry-After: 1", "429, in words"];
for (const [name, count] of Object.entries(seen)) assert.equal(count, retried.includes(name) ? 2 : 1, `${name} has changed`);
process.exit(0);
JS
node try.mjs
