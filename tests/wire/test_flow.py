"""A long request goes in pieces, as its peer takes them."""

import asyncio

from edge.wire.flow import Flow


async def test_long_request_is_written_as_it_is_taken_and_in_order() -> None:
    written: list[bytes] = []

    class Transport:
        def write(self, data: memoryview) -> None:
            written.append(bytes(data))
            if len(written) == 2:
                flow.pause_writing()

    flow = Flow(asyncio.get_running_loop())
    flow.transport = Transport()  # type: ignore[assignment]
    content = bytes(range(256)) * 4096
    flow.send_long((b"head", memoryview(content)[:1000], content[1000:]))
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(written) == 2
    assert flow.is_sending
    flow.resume_writing()
    for _ in range(20):
        await asyncio.sleep(0)
    assert b"".join(written) == b"head" + content
    assert not flow.is_sending
