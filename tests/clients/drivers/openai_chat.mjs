// openai, chat/completions.
import OpenAI, { OpenAIError } from "openai"
import { TIMEOUT_MS, watch } from "./seen.mjs"

await watch("openai", OpenAIError, async ({ baseUrl, key, model, stream, say }) => {
  const client = new OpenAI({ baseURL: `${baseUrl}/v1`, apiKey: key, timeout: TIMEOUT_MS })
  const answer = await client.chat.completions.create({ model, stream, messages: [{ role: "user", content: "Hello" }] })
  if (!stream) return
  for await (const chunk of answer) say(chunk.choices[0].delta.content)
})
