#!/usr/bin/env bash
# openai and groq-sdk (npm): a `Retry-After` of more than 24.8 days is followed by the next try at once.
#
# Both sleep as long as the header says, with one `setTimeout`. That takes 2^31 - 1 ms at most, and what is more becomes
# 1 ms: https://nodejs.org/api/timers.html#settimeoutcallback-delay-args. So who tells a caller that its month is used up,
# until the first of the next, is asked again within the same second, as often as `maxRetries` allows; told 20 days, the
# call sleeps. RFC 9110 section 10.2.3 sets `delay-seconds` no bound. @anthropic-ai/sdk, made the same way, has one and
# waits its own half second. `x-should-retry: false` beside the header keeps all three from asking again.
# Seen with openai 6.49.0, groq-sdk 1.6.0 and @anthropic-ai/sdk 1.14.0 on Node.js 20.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm install --silent --no-audit --no-fund openai@6.49.0 groq-sdk@1.6.0 @anthropic-ai/sdk@1.14.0
cat > try.mjs <<'JS'
import assert from "node:assert";
import http from "node:http";
import Anthropic from "@anthropic-ai/sdk";
import Groq from "groq-sdk";
import OpenAI from "openai";

const DAY_S = 86_400;
const asked = { model: "m", messages: [{ role: "user", content: "Hello" }] };
const clients = {
  openai: (options) => new OpenAI({ ...options, baseURL: `${options.baseURL}/v1` }).chat.completions.create(asked),
  groq: (options) => new Groq(options).chat.completions.create(asked),
  anthropic: (options) => new Anthropic(options).messages.create({ ...asked, max_tokens: 9 }),
};

// Returns which timers of days a client set, in days, and the ms from its first to its second request.
async function seen(call, headers) {
  const times = [];
  const server = http.createServer((request, response) => {
    times.push(performance.now());
    request.resume().on("end", () => response.writeHead(429, headers).end('{"error":{"message":"Used up."}}'));
  });
  await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
  const timers = [];
  const sleeping = new Promise((asleep) => {
    globalThis.setTimeout = (run, ms, ...rest) => {
      if (ms > DAY_S * 1000) timers.push(ms / DAY_S / 1000);
      if (ms > DAY_S * 1000 && ms < 2 ** 31) asleep();
      return real(run, ms, ...rest);
    };
  });
  const ended = call({ baseURL: `http://127.0.0.1:${server.address().port}`, apiKey: "k", maxRetries: 1 }).catch(() => {});
  await Promise.race([ended, sleeping]);
  globalThis.setTimeout = real;
  server.closeAllConnections();
  server.close();
  return { requests: times.length, days: timers, pause: times[1] === undefined ? "none" : Math.round(times[1] - times[0]) };
}

const real = globalThis.setTimeout;
const requests = {};
for (const [name, call] of Object.entries(clients)) {
  for (const days of [20, 30]) {
    const told = await seen(call, { "content-type": "application/json", "retry-after": String(days * DAY_S) });
    console.log(`${name}, told ${days} days: ${told.requests} requests, timers of days: ${told.days}, ms between: ${told.pause}`);
    requests[`${name} ${days}`] = [told.requests, told.days.length];
  }
  const kept = await seen(call, { "content-type": "application/json", "retry-after": String(30 * DAY_S), "x-should-retry": "false" });
  requests[`${name} x-should-retry`] = [kept.requests, kept.days.length];
}
assert.deepStrictEqual(requests, {
  "openai 20": [1, 1], "openai 30": [2, 1], "openai x-should-retry": [1, 0],
  "groq 20": [1, 1], "groq 30": [2, 1], "groq x-should-retry": [1, 0],
  "anthropic 20": [1, 1], "anthropic 30": [2, 0], "anthropic x-should-retry": [1, 0],
}, "the behaviour has changed");
process.exit(0);
JS
node try.mjs 2> warnings || { cat warnings; exit 1; }
grep "does not fit into a 32-bit signed integer" warnings
