"""pydantic-ai with its OpenAI model, chat/completions."""

import asyncio

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings
from seen import TIMEOUT_S, watch


def ask(base_url, key, model, stream, say):
    """Ask once."""
    asyncio.run(_ask(base_url, key, model, stream, say))


async def _ask(base_url, key, model, stream, say):
    provider = OpenAIProvider(base_url=f"{base_url}/v1", api_key=key)
    agent = Agent(OpenAIChatModel(model, provider=provider), model_settings=ModelSettings(timeout=TIMEOUT_S))
    if not stream:
        await agent.run("Hello")
        return
    async with agent.run_stream("Hello") as answer:
        async for text in answer.stream_text(delta=True, debounce_by=None):
            say(text)


watch(ask)
