// @anthropic-ai/sdk, messages.
import Anthropic, { AnthropicError } from "@anthropic-ai/sdk"
import { TIMEOUT_MS, watch } from "./seen.mjs"

await watch("anthropic", AnthropicError, async ({ baseUrl, key, model, stream, say }) => {
  const client = new Anthropic({ baseURL: baseUrl, apiKey: key, timeout: TIMEOUT_MS })
  const asked = { model, max_tokens: 64, messages: [{ role: "user", content: "Hello" }] }
  if (!stream) {
    await client.messages.create(asked)
    return
  }
  const answer = client.messages.stream(asked).on("text", say)
  await answer.finalMessage()
})
