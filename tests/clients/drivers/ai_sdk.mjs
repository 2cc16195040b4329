// The AI SDK. Its streams do not throw: an error is a part of `fullStream`, and is thrown here as it is.
import { AISDKError, generateText, streamText } from "ai"
import { TIMEOUT_MS, watch } from "./seen.mjs"

export async function watchModels(modelOf) {
  await watch("ai", AISDKError, async ({ baseUrl, key, model, stream, say }) => {
    const asked = { model: modelOf(`${baseUrl}/v1`, key, model), prompt: "Hello", abortSignal: AbortSignal.timeout(TIMEOUT_MS) }
    if (!stream) {
      await generateText(asked)
      return
    }
    for await (const part of streamText({ ...asked, onError: () => {} }).fullStream) {
      if (part.type === "text-delta") say(part.text)
      if (part.type === "error") throw part.error
    }
  })
}
