"""langchain-openai, chat/completions."""

from langchain_openai import ChatOpenAI
from seen import TIMEOUT_S, watch


def ask(base_url, key, model, stream, say):
    """Ask once."""
    chat = ChatOpenAI(base_url=f"{base_url}/v1", api_key=key, model=model, timeout=TIMEOUT_S)
    if not stream:
        chat.invoke("Hello")
        return
    for chunk in chat.stream("Hello"):
        say(chunk.text)


watch(ask)
