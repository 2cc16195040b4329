"""Heartbeats of a stream that broke, while it looks for another server: as if nothing had happened."""

from collections.abc import Awaitable, Callable
from contextlib import closing
from typing import Any, cast

import pytest

from edge.exchange import End, Exchange
from edge.operations import OPERATIONS
from edge.relay.delivered import Interrupted
from edge.wire.http1 import chunk
from tests.clock import Clock

BEAT = b": keep-alive\n\n"
HEARTBEAT_S = 15.0
SILENT_S = 12.0  # as the stream breaks


class Client:
    """The client's side of a connection."""

    def __init__(self, loop: Clock, *, bare: bool, full: bool) -> None:
        self.loop, self.bare, self._full = loop, bare, full
        self.answering: Any = None
        self.got: list[bytes] = []

    def attach(self, answering: Any) -> None:
        self.answering = answering
        if answering is not None and self._full:
            answering.client_paused()

    def send(self, data: bytes) -> None:
        self.got.append(data)


Act = Callable[[Interrupted, Client, Clock], Awaitable[None]]


def played(act: Act, *, bare: bool = False, full: bool = False) -> tuple[Client, Exchange]:
    """Return the client of a stream that broke, whose client had got its last byte `SILENT_S` before, after `act`."""

    async def run(clock: Clock) -> tuple[Client, Exchange]:
        exchange = Exchange("req_1", "POST", 0.0, 0.0, stream=True, operation=OPERATIONS["chat/completions"])
        exchange.response_bytes, exchange.silent_since = 1000, clock.time() - SILENT_S
        client, interrupted = Client(clock, bare=bare, full=full), Interrupted(End.UPSTREAM_CUT)
        interrupted.hold(exchange, cast(Any, client), HEARTBEAT_S)
        await act(interrupted, client, clock)
        interrupted.rest()
        return client, exchange

    with closing(Clock()) as clock:
        return clock.run_until_complete(run(clock))


@pytest.mark.parametrize("bare", [False, True])
def test_a_gap_gets_a_heartbeat_each_interval_from_the_last_byte_that_the_client_got(bare: bool) -> None:
    async def act(interrupted: Interrupted, client: Client, clock: Clock) -> None:
        await clock.pass_time(HEARTBEAT_S - SILENT_S - 0.5)
        assert client.got == []
        await clock.pass_time(0.75)
        assert len(client.got) == 1
        interrupted.hold(interrupted.exchange, cast(Any, client), HEARTBEAT_S)  # another sibling is asked
        await clock.pass_time(HEARTBEAT_S - 0.5)
        assert len(client.got) == 1
        await clock.pass_time(0.75)

    client, exchange = played(act, bare=bare)
    assert client.got == [BEAT if bare else chunk(BEAT)] * 2
    assert exchange.response_bytes == 1000 + len(b"".join(client.got))


def test_a_client_that_does_not_read_gets_no_heartbeat() -> None:
    async def act(interrupted: Interrupted, client: Client, clock: Clock) -> None:
        await clock.pass_time(HEARTBEAT_S * 3)
        assert client.got == []
        interrupted.client_resumed()
        await clock.pass_time(HEARTBEAT_S * 1.25 + 0.5)

    assert played(act, full=True)[0].got == [chunk(BEAT)]


def test_a_gap_is_over_when_another_answer_is_the_clients() -> None:
    async def act(_: Interrupted, client: Client, clock: Clock) -> None:
        client.attach(None)
        await clock.pass_time(HEARTBEAT_S * 3)

    assert played(act)[0].got == []
