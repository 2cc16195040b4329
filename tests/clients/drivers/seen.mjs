// What the user of a JavaScript SDK sees of each case: one JSON line for each, on standard output.
import { createInterface } from "node:readline"

export const TIMEOUT_MS = 20_000 // SDKs wait ten minutes; no case here is about silence

// Play the cases of standard input. `ask({ baseUrl, key, model, stream, say })` calls `say` with each piece of text;
// `own` is the base class of the SDK's own errors, and `name` the package as users write it.
export async function watch(name, own, ask) {
  const baseUrl = process.argv[2]
  for await (const line of createInterface({ input: process.stdin })) {
    const { case: label, key, model, stream } = JSON.parse(line)
    let text = ""
    let error
    try {
      await ask({ baseUrl, key, model, stream, say: (piece) => (text += piece ?? "") })
    } catch (raised) {
      error = raised ?? new Error("nothing was thrown")
    }
    const seen = error === undefined ? { bases: [], message: "", facts: {} } : described(error, name, own)
    console.log(JSON.stringify({ case: label, ...seen, text }))
  }
}

function described(error, name, own) {
  if (!(error instanceof Error)) return { bases: [`${name}: no Error`], message: JSON.stringify(error), facts: {} }
  const bases = []
  for (let each = error; each !== null && each !== Object.prototype; each = Object.getPrototypeOf(each)) {
    const kind = each.constructor.name.replace(/^_?(AI_)?/, "")
    if (bases.at(-1)?.split(".").at(-1) !== kind) bases.push(each instanceof own || each === own.prototype ? `${name}.${kind}` : kind)
  }
  // What programs read of an exception, where it has that; `kind of body` is what a body's `type` says.
  const facts = { type: error.type, "request id": error.requestID, "kind of body": error.error?.type }
  return { bases, message: error.message, facts: Object.fromEntries(Object.entries(facts).filter(([, fact]) => typeof fact === "string")) }
}
