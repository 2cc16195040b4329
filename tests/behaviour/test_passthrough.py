"""What the upstream sends is what the client gets."""

import json

from edge.simulator import Simulator
from tests.conftest import Edge


async def test_stream_arrives_as_the_upstream_sent_it(edge: Edge, simulator: Simulator) -> None:
    status, headers, body = await edge.ask({"model": "public/deepseek-r1", "stream": True, "messages": []})
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")
    await edge.consistent()
    [line] = await edge.log()
    assert (line["status"], line["end"], line["model"]) == (200, "complete", "public/deepseek-r1")


async def test_json_answer_arrives_whole(edge: Edge) -> None:
    status, headers, body = await edge.ask({"model": "u-1100a15812cc/qwen2", "messages": []})
    assert status == 200
    assert headers["x-request-id"].startswith("req_")
    assert json.loads(body)["model"] == "u-1100a15812cc/qwen2"
    await edge.consistent()
