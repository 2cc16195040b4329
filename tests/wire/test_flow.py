"""A long read is taken, and a long request goes, in pieces."""

import asyncio

from edge.wire.flow import Flow
from edge.wire.http1 import READ_STEP_BYTES


async def test_what_was_held_of_a_long_read_may_be_given_again_and_nothing_is_lost() -> None:
    """As by an answer whose first event is longer than a step."""
    content = bytes(range(256)) * 400
    taken: list[bytes] = []

    class Transport:
        def pause_reading(self) -> None: ...

        def resume_reading(self) -> None: ...

    class Holding(Flow):
        held = b""

        def data_received(self, data: bytes) -> None:
            self.held += data
            if len(self.held) > 3 * READ_STEP_BYTES:
                again, self.held = self.held, b""
                taken.append(self.first_step(again))
            elif taken:
                taken.append(self.held)
                self.held = b""

    flow = Holding(asyncio.get_running_loop())
    flow.transport = Transport()  # type: ignore[assignment]
    flow.data_received(flow.first_step(content))
    for turn in range(40):
        await asyncio.sleep(0)
        if turn == 5:
            flow.pause_reading()
            flow.resume_reading()
    assert b"".join(taken) == content


async def test_long_request_is_written_as_it_is_taken_and_in_order() -> None:
    written: list[bytes] = []

    class Transport:
        def writelines(self, pieces: list[memoryview]) -> None:
            written.append(b"".join(pieces))
            if len(written) == 2:
                flow.pause_writing()

    flow = Flow(asyncio.get_running_loop())
    flow.transport = Transport()  # type: ignore[assignment]
    content = bytes(range(256)) * 8192
    flow.send_long((b"head", memoryview(content)[:1000], content[1000:]))
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(written) == 2
    assert written[0].startswith(b"head" + content[:2000])
    assert flow.is_sending
    flow.resume_writing()
    for _ in range(20):
        await asyncio.sleep(0)
    assert b"".join(written) == b"head" + content
    assert not flow.is_sending
