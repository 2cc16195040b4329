"""openai, responses. A stream is read as its documentation shows: the text out of the deltas."""

import openai
from seen import TIMEOUT_S, watch


def ask(base_url, key, model, stream, say):
    """Ask once."""
    client = openai.OpenAI(base_url=f"{base_url}/v1", api_key=key, timeout=TIMEOUT_S)
    answer = client.responses.create(model=model, input="Hello", stream=stream)
    for event in answer if stream else ():
        if event.type == "response.output_text.delta":
            say(event.delta)
        elif event.type in ("error", "response.failed"):
            raise ErrorEvent(event)


class ErrorEvent(Exception):
    """An event that says that the answer failed, which the SDK gives its user as an event."""

    def __init__(self, event):
        error = event if event.type == "error" else event.response.error
        super().__init__(f"{event.type}: {error.message if error is not None else None}")


watch(ask)
