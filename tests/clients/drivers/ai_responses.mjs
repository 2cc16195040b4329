// The AI SDK with @ai-sdk/openai, responses.
import { createOpenAI } from "@ai-sdk/openai"
import { watchModels } from "./ai_sdk.mjs"

await watchModels((baseURL, apiKey, model) => createOpenAI({ baseURL, apiKey }).responses(model))
