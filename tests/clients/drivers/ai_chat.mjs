// The AI SDK with @ai-sdk/openai-compatible, chat/completions.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible"
import { watchModels } from "./ai_sdk.mjs"

await watchModels((baseURL, apiKey, model) => createOpenAICompatible({ name: "edge", baseURL, apiKey })(model))
