"""A model server whose truth is known, by the model's name: `python -m tests.agreement.server PORT`.

A stream's first content comes 200 ms after its request, and 20 tokens 20 ms apart. What differs is the scenario's.
"""

import asyncio
import itertools
import sys
from typing import Any, Final

import orjson
import uvloop
from aiohttp import web

SCENARIOS: Final = ("steady", "stalls", "failures", "role", "four", "no-usage")
TTFT_S: Final = 0.2
GAP_S: Final = 0.02
TOKENS: Final = 20
STALL_S: Final = 2.0
_STALLED: Final = 10  # every so many streams stand still in their middle
_FAILED: Final = 20  # every so many requests fail

_numbers: Final = {name: itertools.count(1) for name in SCENARIOS}


def schedule(scenario: str, number: int) -> list[tuple[float, str, int]]:
    """Return when each event comes, its text, and how many tokens it has; the first may have none."""
    at_once = 4 if scenario == "four" else 1
    events = [(TTFT_S + GAP_S * first, " word" * at_once, at_once) for first in range(0, TOKENS, at_once)]
    if scenario == "stalls" and number % _STALLED == 0:
        events = [
            (at + STALL_S * (place >= TOKENS // 2), text, count) for place, (at, text, count) in enumerate(events)
        ]
    if scenario == "role":
        events.insert(0, (0.0, "", 0))
    return events


async def chat(request: web.Request) -> web.StreamResponse:
    """Answer as the scenario says."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    scenario = (await request.json())["model"]
    number = next(_numbers[scenario])
    if scenario == "failures" and number % _FAILED == 0:
        return web.json_response({"error": {"message": "broken", "type": "server_error"}}, status=500)
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    for at, text, _ in schedule(scenario, number):
        await asyncio.sleep(max(0.0, begun + at - loop.time()))
        delta = {"content": text} if text else {"role": "assistant", "content": ""}
        await answer.write(_event(scenario, choices=[{"index": 0, "delta": delta, "finish_reason": None}]))
    if scenario != "no-usage":
        usage = {"prompt_tokens": 5, "completion_tokens": TOKENS, "total_tokens": 5 + TOKENS}
        await answer.write(_event(scenario, choices=[], usage=usage))
    await answer.write(b"data: [DONE]\n\n")
    return answer


def _event(scenario: str, **members: Any) -> bytes:
    document = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": scenario, **members}
    return b"data: %b\n\n" % orjson.dumps(document)


async def models(request: web.Request) -> web.Response:
    """Name the scenarios."""
    return web.json_response({"object": "list", "data": [{"id": name, "object": "model"} for name in SCENARIOS]})


async def main(port: int) -> None:
    """Serve until the end of the process."""
    application = web.Application()
    application.router.add_post("/v1/chat/completions", chat)
    application.router.add_get("/v1/models", models)
    application.router.add_get("/health", models)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
