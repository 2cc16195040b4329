"""What the edge lets through of a client's bytes: others read the same requests in them, and in what goes upstream."""

import asyncio
import atexit
import random
import re
import zlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from edge.attempt import Work, metering_of
from edge.client.answers import response
from edge.client.body import Body, BodyMemory, read_body, whole_body
from edge.client.connection import Request
from edge.client.server import ClientServer
from edge.config.process_settings import ServerConfig
from edge.config.settings import EndpointConfig, RouteConfig
from edge.config.values import parse_url
from edge.envelope.form import read_multipart
from edge.envelope.json import read_json
from edge.errors import EdgeError
from edge.exchange import Exchange, Principal
from edge.keys.caller import Caller
from edge.operations import STORED_RESPONSE, UNKNOWN, paths_of
from edge.plan import Plan
from edge.relay.terms import Timeouts
from edge.routing import Match
from edge.stage import Lifecycle
from edge.upstream.endpoints import Endpoint, Member
from tests.client.test_repeats import Wire
from tests.fuzz.peers import Message, Reading, requests_by_h11, requests_by_llhttp
from tests.fuzz.rules import requests_by_rules
from tests.streams import cut

_UPSTREAM = EndpointConfig(parse_url("http://10.0.0.1:8000"))
_MEMBER = Member(cast(Endpoint, SimpleNamespace(authority="10.0.0.1:8000")), _UPSTREAM)
_ROUTE = RouteConfig("r", "*", "p", model="another-name")
_CALLER = Caller(Principal("key_1", "u-a"))
_PATHS = paths_of()
_REQUESTS = re.compile(rb"(?=[A-Z]{3,} )")
_BEGINS = re.compile(rb"(?=[A-Z]{3,} )|(?<=\n)")  # a request, a line
_LOOP = asyncio.new_event_loop()  # for all inputs: a new one costs more than most of them
atexit.register(_LOOP.close)
_TURNS = 6  # of the loop, which wait for nothing


@dataclass
class Served:
    """What a client's bytes asked: each request as it was read, None for one that was refused; and what went on."""

    asked: list[Message | None] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    upstream: bytes = b""

    async def answer(self, request: Request) -> None:
        """Take the place of the proxy: what it would send upstream is noted."""
        head, memory = request.head, BodyMemory(10**9)
        try:
            asked = head.ask(_PATHS)
            head.check()
            body = whole_body(request, 10**6, memory) or await read_body(request, ServerConfig(), memory)
            self.asked.append(
                Message(head.method.encode(), head.message.path.encode("utf-8", "surrogateescape"), body.data)
            )
            if asked.operation not in (UNKNOWN, STORED_RESPONSE) and head.method in asked.methods == ("POST",):
                self._forward(request, asked, body)
        except EdgeError:
            if not request.payload.is_eof():
                self.asked.append(None)
        request.connection.send(response(200, b"", request_id="r", last=request.connection.last))

    def _forward(self, request: Request, asked: Any, body: Body) -> None:
        head, operation = request.head, asked.operation
        content_type = head.read_content_type()
        envelope = (
            read_multipart(body.data, content_type) if operation.form else read_json(body.data, "", operation.limits)
        )
        plan = Plan(0, _CALLER, envelope.model, Match(_ROUTE), _ROUTE, None, Timeouts(1, 1, 1, 0))
        work = Work(head, plan, envelope, body, metering_of(plan, operation, envelope, body, None))
        attempt = work.attempt(Exchange("r", head.method, 0.0, 0.0, stream=envelope.stream), _MEMBER, None)
        sent = b"".join(attempt.body)
        self.bodies.append(sent)
        self.upstream += attempt.head + sent


async def serve(reads: list[bytes]) -> Served:
    """Give reads to a connection of the edge, as its sockets would."""
    served, wire = Served(), Wire()
    connection = ClientServer(served.answer, Lifecycle(), ServerConfig(), 10).connection()
    connection.connection_made(wire)
    await _settled()
    for read in reads:
        if wire.closed:
            break
        connection.data_received(read)
        await _settled()
    connection.connection_lost(None)
    await _settled()
    return served


async def _settled() -> None:
    for _ in range(_TURNS):
        await asyncio.sleep(0)


async def _both(data: bytes) -> tuple[Served, Served]:
    return await serve(cut_by_itself(data)), await serve([data])


def cut_by_itself(data: bytes) -> list[bytes]:
    """Cut bytes into up to five reads, anywhere and where something begins, at places that only depend on them."""
    chance = random.Random(zlib.crc32(data))
    if chance.random() < 0.3:  # as clients write: a request in each read
        return [part for part in cut(data, [found.start() for found in _REQUESTS.finditer(data)]) if part]
    begins = [found.start() for found in _BEGINS.finditer(data)] or [0]
    places = [
        chance.choice((chance.randrange(len(data) + 1), chance.choice(begins))) for _ in range(chance.randrange(5))
    ]
    return [part for part in cut(data, places) if part]


def check(data: bytes) -> None:
    """No request is framed differently by other parsers: they refuse it, or read the same one; the rules never do.

    Nor at other cuts: where a read holds what is malformed, all of it is refused, so that fewer may be served.
    """
    served, at_once = _LOOP.run_until_complete(_both(data))
    assert all(one == other for one, other in zip(served.bodies, at_once.bodies, strict=False))
    for reading in (requests_by_h11(data), requests_by_llhttp(data)):
        _check_same(served.asked, reading)
    by_rules = requests_by_rules(data)
    for asked in (served.asked, at_once.asked):
        _check_same(asked, by_rules._replace(rest="end"))
    expected = [(b"POST", body) for body in served.bodies]
    for reading in (requests_by_h11(served.upstream), requests_by_llhttp(served.upstream)):
        assert [(message.method, message.body) for message in reading.messages] == expected
        assert reading.rest == "end"


def _check_same(asked: list[Message | None], reading: Reading) -> None:
    for ours, theirs in zip(asked, reading.messages, strict=False):
        assert ours is None or ours == theirs
    whole = len(asked) - asked[-1:].count(None)
    assert whole <= len(reading.messages) or reading.rest == "refused"
