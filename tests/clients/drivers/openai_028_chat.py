"""openai 0.28.1, chat/completions."""

import openai
from seen import TIMEOUT_S, watch


def ask(base_url, key, model, stream, say):
    """Ask once."""
    openai.api_key, openai.api_base = key, f"{base_url}/v1"
    messages = [{"role": "user", "content": "Hello"}]
    answer = openai.ChatCompletion.create(model=model, messages=messages, stream=stream, request_timeout=TIMEOUT_S)
    for chunk in answer if stream else ():
        say(chunk.choices[0].delta.get("content", ""))


watch(ask)
