"""The channel of revocations, over a real server."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import pytest

from edge.errors import Unusable
from edge.keys.revocations import CHANNEL, RevocationChannel, invalidation_of, messages_of
from edge.keys.stores.protocol import Invalidation
from edge.valkey import connect
from tests.keybackends import NO_REDIS, PATIENCE_S, ValkeyServer, saying


class Heard(NamedTuple):
    """A channel, and what it told its owner."""

    channel: RevocationChannel
    changes: "asyncio.Queue[Invalidation]"
    outages: "asyncio.Queue[str]"


@pytest.mark.parametrize(
    "changes",
    [
        Invalidation(frozenset({bytes(range(32))})),
        Invalidation(ids=frozenset({"key_abc"})),
        Invalidation(users=frozenset({"u-1100a15812cc"})),
        Invalidation(everything=True),
    ],
)
def test_what_is_told_is_understood(changes: Invalidation) -> None:
    [message] = messages_of(changes)
    assert invalidation_of(message.encode()) == changes


@pytest.mark.parametrize("message", [b"", b"digest:", b"digest:xyz", b"key:", b"user:", b"\xff", b"hello", b"keys"])
def test_a_message_that_is_not_understood_may_mean_anything(message: bytes) -> None:
    changes = invalidation_of(message)
    assert changes.everything or changes == Invalidation(frozenset({b""}))


async def test_every_process_hears_and_one_that_was_away_doubts_everything(valkey: ValkeyServer) -> None:
    heard: list[asyncio.Queue[Invalidation]] = [asyncio.Queue(), asyncio.Queue()]
    outages: asyncio.Queue[str] = asyncio.Queue()
    clients = [connect(valkey.url, 1.0) for _ in heard]
    channels = [RevocationChannel(client) for client in clients]
    try:
        async with asyncio.timeout(PATIENCE_S):
            for channel, queue in zip(channels, heard, strict=True):
                channel.on_change = queue.put_nowait
                channel.on_outage = outages.put_nowait
                channel.open()
            for queue in heard:
                assert (await queue.get()).everything
            told = Invalidation(ids=frozenset({"key_1"}))
            assert await channels[0].publish(told) == 2
            assert [await queue.get() for queue in heard] == [told, told]
            assert [await outages.get(), await outages.get()] == ["", ""]
            valkey.stop()
            for queue in heard:
                assert (await queue.get()).everything, "the loss itself is a reason to doubt"
            valkey.start()
            for queue in heard:
                while outages.empty() or await outages.get():  # until it is back
                    await asyncio.sleep(0)
                assert (await queue.get()).everything
    finally:
        for channel, client in zip(channels, clients, strict=True):
            await channel.close()
            await client.aclose()


@asynccontextmanager
async def listening(url: str, timeout_s: float = 1.0) -> AsyncIterator[Heard]:
    """A channel that is open, and what it says."""
    client = connect(url, timeout_s)
    heard = Heard(RevocationChannel(client), asyncio.Queue(), asyncio.Queue())
    heard.channel.on_change, heard.channel.on_outage = heard.changes.put_nowait, heard.outages.put_nowait
    heard.channel.open()
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield heard
    finally:
        await heard.channel.close()
        await client.aclose()


async def test_subscription_that_is_silently_dead_is_noticed(valkey: ValkeyServer) -> None:
    """A stopped server keeps its connections open and says nothing; a revocation would be missed for good."""
    async with listening(valkey.url, 0.5) as heard:
        assert await heard.outages.get() == ""
        valkey.signal(signal.SIGSTOP)
        assert await heard.outages.get() != ""
        valkey.signal(signal.SIGCONT)
        while await heard.outages.get():
            pass
        with valkey.client() as other:
            assert other.pubsub_numsub(CHANNEL)[0][1] == 1


async def test_what_comes_in_a_burst_is_told_as_one(valkey: ValkeyServer) -> None:
    """A thousand users who are suspended must not be a thousand walks through the look-ups under way."""
    users = {f"u-{number}" for number in range(1000)}
    async with listening(valkey.url) as heard:
        assert (await heard.changes.get()).everything
        with valkey.client() as other:
            for user in users:
                await asyncio.to_thread(other.publish, CHANNEL, f"user:{user}")
        told = [await heard.changes.get()]
        while users - told[-1].users:
            told.append(Invalidation.all_of((await heard.changes.get(), told[-1])))
        assert told[-1] == Invalidation(users=frozenset(users))
        assert len(told) < 200


async def test_channel_that_stays_away_is_one_reason_to_doubt_and_no_more(valkey: ValkeyServer) -> None:
    """While shared.redis is down every key would else be asked for again and again, of a store that is well."""
    async with listening(valkey.url) as heard:
        assert heard.channel.outage.reason == "not connected yet"
        assert (await heard.changes.get()).everything
        assert not await heard.outages.get()
        assert not heard.channel.outage
        valkey.stop()
        for _ in range(4):
            assert await heard.outages.get() == heard.channel.outage.reason
        assert heard.channel.outage
        assert heard.changes.qsize() == 1


async def test_message_of_a_newer_edge_is_a_change_of_everything_and_told_once(
    valkey: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(valkey.url) as heard:
        assert (await heard.changes.get()).everything
        with valkey.client() as other:
            for message in ("all", "v2:digest:secret", "team:7"):
                other.publish(CHANNEL, message)
                assert (await heard.changes.get()).everything
    [line] = [each.getMessage() for each in caplog.records if "not understood" in each.getMessage()]
    assert "secret" not in line


@pytest.mark.parametrize("answer", NO_REDIS)
async def test_what_speaks_another_protocol_does_not_end_the_listening(answer: bytes) -> None:
    """A listener that ended would miss every revocation from then on, and say nothing."""
    async with saying(answer) as url, listening(url, 0.2) as heard:
        for _ in range(2):
            assert await heard.outages.get()


@pytest.mark.parametrize("url", ["redis://host:notaport/0", "http://127.0.0.1"])
def test_bad_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(Unusable) as caught:
        connect(url.replace("host", ":hunter2@host"), 1.0)
    assert "hunter2" not in str(caught.value)
