// openai, responses. A stream is read as its documentation shows: the text out of the deltas.
import OpenAI, { OpenAIError } from "openai"
import { TIMEOUT_MS, watch } from "./seen.mjs"

class ErrorEvent extends Error {} // which the SDK gives its user as an event

await watch("openai", OpenAIError, async ({ baseUrl, key, model, stream, say }) => {
  const client = new OpenAI({ baseURL: `${baseUrl}/v1`, apiKey: key, timeout: TIMEOUT_MS })
  const answer = await client.responses.create({ model, stream, input: "Hello" })
  if (!stream) return
  for await (const event of answer) {
    if (event.type === "response.output_text.delta") say(event.delta)
    if (event.type === "error") throw new ErrorEvent(`error: ${event.message}`)
    if (event.type === "response.failed") throw new ErrorEvent(`response.failed: ${event.response.error?.message}`)
  }
})
