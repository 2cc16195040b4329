"""The faults of `chaos`: each breaks one thing of the world, waits, and mends it."""

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from loadtest.chaos.servers import Redis, until
from loadtest.chaos.world import STOP_PATIENCE_S, World
from loadtest.edges import Edge
from loadtest.processes import ProcessError

Fault = Callable[[World, random.Random], Awaitable[None]]
_CLOCK_STEPS_S: Final = (3_600, -3_600, 0)


async def kill(world: World, chance: random.Random) -> None:
    """Kill an edge under load; another process takes over its socket and its records."""
    edge = world.edges["mortal"]
    world.journals["mortal"].kills += 1
    await asyncio.to_thread(edge.kill)
    await asyncio.to_thread(edge.start)


async def stop(world: World, chance: random.Random) -> None:
    """Stop an edge under load by SIGTERM; it must end with 0."""
    edge = world.edges["mortal"]
    code, took_s = await asyncio.to_thread(edge.stop, STOP_PATIENCE_S)
    if code != 0:
        raise ProcessError(f"a stop ended with {code} after {took_s:.1f} s: {edge.last_words()}")
    await asyncio.to_thread(edge.start)


async def freeze(world: World, chance: random.Random) -> None:
    """Halt an edge, and let it go on, mostly after its timeouts."""
    # The one that is not stopped: a halt within a stop may take the time of a part.
    await _halt(world.edges["steady"], chance.uniform(0.5, 2.5))


async def _halt(process: Edge | Redis, seconds: float) -> None:
    """Let a process do nothing for a while."""
    process.send_signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        process.send_signal(signal.SIGCONT)


async def engine_dies(world: World, chance: random.Random) -> None:
    """Break every connection of an engine, and listen there no more for a while."""
    name = chance.choice(("v", "s", "l"))
    engine = world.engines[name]
    port = engine.port
    await engine.close()
    await asyncio.sleep(chance.uniform(0.2, 1.5))
    await engine.start(port=port)


async def partition(world: World, chance: random.Random) -> None:
    """Pull the cable to an engine: no packet, no FIN, no RST."""
    assert world.island is not None
    world.island.plug(plugged=False)
    try:
        await asyncio.sleep(chance.uniform(1.0, 4.0))
    finally:
        world.island.plug(plugged=True)


async def full_disk(world: World, chance: random.Random) -> None:
    """Leave no byte on the disk of an edge's journal."""
    assert world.disk is not None
    world.disk.fill()
    try:
        await asyncio.sleep(chance.uniform(0.5, 3.0))
    finally:
        world.disk.empty()


async def clock_steps(world: World, chance: random.Random) -> None:
    """Set the wall clock an hour ahead, two back, and to where it was."""
    assert world.clock is not None
    for offset_s in _CLOCK_STEPS_S:
        world.clock.step(offset_s)
        await asyncio.sleep(chance.uniform(1.2, 2.0))


async def sink_down(world: World, chance: random.Random) -> None:
    """Let the sink over HTTP refuse everything."""
    world.sink.is_down = True
    await asyncio.sleep(chance.uniform(0.5, 3.0))
    world.sink.is_down = False


async def store_dies(world: World, chance: random.Random) -> None:
    """Kill the key store of one edge; it comes back with what it had on its disk."""
    node = world.cluster.nodes[0]
    node.kill()
    await asyncio.sleep(chance.uniform(0.5, 2.0))
    node.start()
    await until(node.is_up, "the key store")


async def store_silent(world: World, chance: random.Random) -> None:
    """Halt the key store of one edge: it takes connections and says nothing."""
    await _halt(world.cluster.nodes[0], chance.uniform(0.5, 2.0))


async def redis_silent(world: World, chance: random.Random) -> None:
    """Halt the Redis of keys, limits and records, for less time than Sentinel waits."""
    await _halt(world.pair.primary, chance.uniform(0.3, 0.7))
    await world.pair.settle()  # on a busy machine it may have been long enough for Sentinel


async def redis_dies(world: World, chance: random.Random) -> None:
    """Kill the primary: Sentinel makes the replica the primary, and the killed one comes back as replica."""
    await world.pair.fail_over(kill=True)


async def failover(world: World, chance: random.Random) -> None:
    """Have Sentinel fail over, with the primary's help."""
    await world.pair.fail_over(kill=False)


async def reshard(world: World, chance: random.Random) -> None:
    """Move every slot in use to another node of the cluster, which an edge does not ask, and back."""
    await world.cluster.move(there=True)
    await asyncio.sleep(chance.uniform(0.5, 2.0))
    await world.cluster.move(there=False)


MORTAL: Final[Mapping[str, Fault]] = {"kill": kill, "stop": stop}
WORLD: Final[Mapping[str, Fault]] = {
    "freeze": freeze,
    "engine dies": engine_dies,
    "partition": partition,
    "full disk": full_disk,
    "clock steps": clock_steps,
    "sink down": sink_down,
    "key store dies": store_dies,
    "key store silent": store_silent,
    "Redis silent": redis_silent,
    "Redis dies, Sentinel fails over": redis_dies,
    "Sentinel fails over by order": failover,
    "cluster reshards": reshard,
}
