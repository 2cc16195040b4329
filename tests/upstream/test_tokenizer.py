"""What a member's own tokenizer is asked, and how much of an answer is read."""

import warnings
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edge.config.values import parse_url
from edge.upstream.endpoints import Member
from edge.upstream.tokenizer import NoTokens, Tokenizer
from tests.conftest import ScriptedConnection, StartUpstream

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n"


def member_at(url: str) -> Member:
    parsed = parse_url(url)
    endpoint = SimpleNamespace(url=parsed, connections=SimpleNamespace(tls=None))
    config = SimpleNamespace(url=parsed, api_key=None)
    return cast(Member, SimpleNamespace(endpoint=endpoint, config=config, engine="vllm"))


async def test_long_texts_are_asked_on_connections_that_the_server_may_close(start_upstream: StartUpstream) -> None:
    async def answers(connection: ScriptedConnection) -> None:
        await connection.send(HEAD % 2 + b"{}")
        connection.writer.close()

    upstream = await start_upstream(answers)
    question: Any = b'"' + b"a" * (1 << 20) + b'"'
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        async with Tokenizer(member_at(upstream.url)) as tokenizer:
            for _ in range(2):
                assert await tokenizer.ask("tokenize", question) == b"{}"
    assert [each.endswith(question) for each in upstream.requests] == [True, True]


@pytest.mark.parametrize(("answered", "read"), [(60_000, True), (100_000, False)])
async def test_an_answer_is_no_longer_than_its_question_makes_it(
    start_upstream: StartUpstream, answered: int, read: bool
) -> None:
    async def answers(connection: ScriptedConnection) -> None:
        await connection.send(HEAD % answered + b" " * answered)

    upstream = await start_upstream(answers)
    async with Tokenizer(member_at(upstream.url)) as tokenizer:
        if read:
            assert len(await tokenizer.ask("tokenize", b"a")) == answered
            return
        with pytest.raises(NoTokens):
            await tokenizer.ask("tokenize", b"a")
