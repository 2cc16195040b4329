#!/usr/bin/env bash
# ai (Vercel's AI SDK, npm): `Retry-After: 60` is ignored, and `x-should-retry: false` too; 59 is waited for.
#
# A limit of requests or tokens a minute is over within 60 seconds, and a server that counts in whole minutes says 60. Then,
# and for anything longer, the second request comes after the SDK's own two seconds, when the minute has hardly begun. RFC
# 9110 section 10.2.3: the header says how long the user agent ought to wait. `x-should-retry`, by which OpenAI's and
# Anthropic's SDKs are told that nothing helps, changes nothing.
# Seen with ai 6.0.326 and @ai-sdk/openai-compatible 2.0.92 on Node.js 20.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm install --silent --no-audit --no-fund ai@6.0.326 @ai-sdk/openai-compatible@2.0.92
cat > try.mjs <<'JS'
import assert from "node:assert";
import http from "node:http";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText } from "ai";

const real = globalThis.setTimeout;

// Returns the ms that the SDK waits between its first request and its second, which this does not wait for.
async function pause(headers) {
  let requests = 0;
  let waits = 0;
  const server = http.createServer((request, response) => {
    requests += 1;
    request.resume().on("end", () => {
      response.writeHead(429, { "content-type": "application/json", ...headers }).end('{"error":{"message":"Too many."}}');
    });
  });
  await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
  globalThis.setTimeout = (run, ms, ...rest) => {
    const pausing = [2000, 59_000, 60_000, 3_600_000].includes(ms);
    if (pausing) waits = ms;
    return real(run, pausing ? 0 : ms, ...rest);
  };
  const model = createOpenAICompatible({ name: "x", baseURL: `http://127.0.0.1:${server.address().port}/v1` })("m");
  await generateText({ model, prompt: "Hello", maxRetries: 1 }).catch(() => {});
  globalThis.setTimeout = real;
  server.closeAllConnections();
  server.close();
  return { requests, waits };
}

const seen = {
  "Retry-After: 59": await pause({ "retry-after": "59" }),
  "Retry-After: 60": await pause({ "retry-after": "60" }),
  "Retry-After: 3600": await pause({ "retry-after": "3600" }),
  "x-should-retry: false": await pause({ "x-should-retry": "false" }),
};
console.log(seen);
assert.deepStrictEqual(seen, {
  "Retry-After: 59": { requests: 2, waits: 59_000 },
  "Retry-After: 60": { requests: 2, waits: 2000 },
  "Retry-After: 3600": { requests: 2, waits: 2000 },
  "x-should-retry: false": { requests: 2, waits: 2000 },
}, "the behaviour has changed");
process.exit(0);
JS
node try.mjs
