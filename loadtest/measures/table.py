"""Every measure by name: of which process it is asked, and whether the rig alone is asked too."""

import enum
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Final

from loadtest.measures import delays, memory, requests, streams
from loadtest.measures.load import Numbers, Scale, Target
from loadtest.meter import Meter

Call = Callable[[Target, Scale, Meter, Random], Awaitable[Numbers]]


class Instance(enum.Enum):
    """Which process of a proxy is asked."""

    RUNNING = "the one that runs all the time"
    TLS = "another one, that serves TLS"
    FRESH = "one that was started for this and has served nothing else"


@dataclass(frozen=True, slots=True)
class Measure:
    """One load; `direct`: also of the rig without a proxy; `keys`: only of a proxy that checks them."""

    call: Call
    instance: Instance = Instance.RUNNING
    direct: bool = False
    keys: bool = False


MEASURES: Final[Mapping[str, Measure]] = {
    "small": Measure(requests.small, direct=True),
    "slope": Measure(streams.slope),
    "arrivals": Measure(delays.arrivals, direct=True),
    "loaded": Measure(delays.loaded),
    "together": Measure(delays.together, direct=True),
    "messages": Measure(streams.messages),
    "responses": Measure(streams.responses),
    "published": Measure(streams.published),
    "prompts": Measure(requests.prompts),
    "megabyte": Measure(requests.megabyte),
    "beside_big": Measure(delays.beside_big, direct=True),
    "aborts": Measure(delays.aborts, direct=True),
    "unkept": Measure(requests.unkept),
    "tls": Measure(requests.tls, Instance.TLS),
    "handshakes": Measure(requests.handshakes, Instance.TLS),
    "refused": Measure(requests.refused, keys=True),
    "memory": Measure(memory.memory, Instance.FRESH),
}
