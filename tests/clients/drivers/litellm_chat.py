"""litellm as a library, chat/completions."""

import litellm
from seen import TIMEOUT_S, watch

litellm.suppress_debug_info = True


def ask(base_url, key, model, stream, say):
    """Ask once."""
    answer = litellm.completion(
        model=f"openai/{model}", api_base=f"{base_url}/v1", api_key=key, stream=stream, timeout=TIMEOUT_S,
        messages=[{"role": "user", "content": "Hello"}],
    )  # fmt: skip
    for chunk in answer if stream else ():
        say(chunk.choices[0].delta.content or "")


watch(ask)
