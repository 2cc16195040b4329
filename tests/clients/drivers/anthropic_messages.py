"""anthropic, messages."""

import anthropic
from seen import TIMEOUT_S, watch


def ask(base_url, key, model, stream, say):
    """Ask once."""
    client = anthropic.Anthropic(base_url=base_url, api_key=key, timeout=TIMEOUT_S)
    asked = {"model": model, "max_tokens": 64, "messages": [{"role": "user", "content": "Hello"}]}
    if not stream:
        client.messages.create(**asked)
        return
    with client.messages.stream(**asked) as answer:
        for text in answer.text_stream:
            say(text)


watch(ask)
