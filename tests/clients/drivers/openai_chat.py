"""openai 1.0 and later, chat/completions."""

import openai
from seen import TIMEOUT_S, watch


def ask(base_url, key, model, stream, say):
    """Ask once."""
    client = openai.OpenAI(base_url=f"{base_url}/v1", api_key=key, timeout=TIMEOUT_S)
    messages = [{"role": "user", "content": "Hello"}]
    answer = client.chat.completions.create(model=model, messages=messages, stream=stream)
    for chunk in answer if stream else ():
        say(chunk.choices[0].delta.content or "")


watch(ask)
