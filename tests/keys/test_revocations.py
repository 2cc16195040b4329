"""The channel of revocations, over a real server."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.errors import Unusable
from edge.keys.revocations import CHANNEL, RevocationChannel, invalidation_of, messages_of
from edge.keys.stores.protocol import Invalidation
from edge.valkey import connect
from tests.keybackends import NO_REDIS, PATIENCE_S, ValkeyServer, saying


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    running = ValkeyServer(tmp_path)
    running.start()
    yield running
    running.stop()


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


async def test_every_process_hears_and_one_that_was_away_doubts_everything(server: ValkeyServer) -> None:
    heard: list[asyncio.Queue[Invalidation]] = [asyncio.Queue(), asyncio.Queue()]
    outages: asyncio.Queue[str] = asyncio.Queue()
    clients = [connect(server.url, 1.0) for _ in heard]
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
            server.stop()
            for queue in heard:
                assert (await queue.get()).everything, "the loss itself is a reason to doubt"
            server.start()
            for queue in heard:
                while outages.empty() or await outages.get():  # until it is back
                    await asyncio.sleep(0)
                assert (await queue.get()).everything
    finally:
        for channel, client in zip(channels, clients, strict=True):
            await channel.close()
            await client.aclose()


async def test_subscription_that_is_silently_dead_is_noticed(server: ValkeyServer) -> None:
    """A stopped server keeps its connections open and says nothing; a revocation would be missed for good."""
    outages: asyncio.Queue[str] = asyncio.Queue()
    client = connect(server.url, 0.5)
    channel = RevocationChannel(client)
    channel.on_outage = outages.put_nowait
    channel.open()
    try:
        async with asyncio.timeout(PATIENCE_S):
            assert await outages.get() == ""
            server.signal(signal.SIGSTOP)
            assert await outages.get() != ""
            server.signal(signal.SIGCONT)
            while await outages.get():
                pass
        with server.client() as other:
            assert other.pubsub_numsub(CHANNEL)[0][1] == 1
    finally:
        await channel.close()
        await client.aclose()


async def test_what_comes_in_a_burst_is_told_as_one(server: ValkeyServer) -> None:
    """A thousand users who are suspended must not be a thousand walks through the cache."""
    heard: asyncio.Queue[Invalidation] = asyncio.Queue()
    client = connect(server.url, 1.0)
    channel = RevocationChannel(client)
    channel.on_change = heard.put_nowait
    channel.open()
    users = {f"u-{number}" for number in range(1000)}
    try:
        async with asyncio.timeout(PATIENCE_S):
            assert (await heard.get()).everything
            with server.client() as other:
                for user in users:
                    await asyncio.to_thread(other.publish, CHANNEL, f"user:{user}")
            told = [await heard.get()]
            while users - told[-1].users:
                told.append(await heard.get() | told[-1])
        assert told[-1] == Invalidation(users=frozenset(users))
        assert len(told) < 200
    finally:
        await channel.close()
        await client.aclose()


async def test_channel_that_stays_away_is_one_reason_to_doubt_and_no_more(server: ValkeyServer) -> None:
    """While shared.redis is down every key would else be asked for again and again, of a store that is well."""
    heard: asyncio.Queue[Invalidation] = asyncio.Queue()
    outages: asyncio.Queue[str] = asyncio.Queue()
    client = connect(server.url, 1.0)
    channel = RevocationChannel(client)
    channel.on_change, channel.on_outage = heard.put_nowait, outages.put_nowait
    assert channel.outage.reason == "not connected yet"
    channel.open()
    try:
        async with asyncio.timeout(PATIENCE_S):
            assert (await heard.get()).everything
            assert not await outages.get()
            assert not channel.outage
            server.stop()
            for _ in range(4):
                assert await outages.get() == channel.outage.reason
            assert channel.outage
            assert heard.qsize() == 1
    finally:
        await channel.close()
        await client.aclose()


@pytest.mark.parametrize("answer", NO_REDIS)
async def test_what_speaks_another_protocol_does_not_end_the_listening(answer: bytes) -> None:
    """A listener that ended would miss every revocation from then on, and say nothing."""
    outages: asyncio.Queue[str] = asyncio.Queue()
    async with saying(answer) as url:
        client = connect(url, 0.2)
        channel = RevocationChannel(client)
        channel.on_outage = outages.put_nowait
        channel.open()
        try:
            async with asyncio.timeout(PATIENCE_S):
                for _ in range(2):
                    assert await outages.get()
        finally:
            await channel.close()
            await client.aclose()


@pytest.mark.parametrize("url", ["redis://host:notaport/0", "http://127.0.0.1"])
def test_bad_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(Unusable) as caught:
        connect(url.replace("host", ":hunter2@host"), 1.0)
    assert "hunter2" not in str(caught.value)
