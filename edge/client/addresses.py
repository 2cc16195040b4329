"""Who has connected, and how much one client address holds: connections, and behind trusted proxies requests."""

import asyncio
import socket
from collections.abc import Sequence
from typing import Any, Final

from edge.client.head import is_trusted
from edge.config.values import Network
from edge.errors import EdgeError, RateLimited

_NETWORK_BYTES: Final = 8  # of an IPv6 address: a client has a /64 at least (RFC 6177 section 2)


class Visit:
    """One accepted connection, from its first moment to its end.

    `peer` is the client's address, "unix" on a unix socket, "" when it has left already; `address` what is counted as
    one client, "" where nobody counts; `since` when it came, by the loop's clock; `refusal` what it is answered instead
    of being served; `is_ready` whether its requests can be read.
    """

    __slots__ = ("address", "is_ready", "peer", "refusal", "since", "wire")

    def __init__(self, wire: asyncio.BaseTransport, now: float) -> None:
        self.wire: Any = wire  # without the TLS on it
        self.since = now
        self.refusal: EdgeError | None = None
        self.is_ready = False
        name = wire.get_extra_info("peername")
        if isinstance(name, tuple):
            # An IPv4 client of a listener for both is that client, not an IPv6 one (RFC 4291 section 2.5.5.2).
            self.peer = name[0].removeprefix("::ffff:")
        else:
            self.peer = "" if name is None else "unix"
        self.address: str | bytes = ""


class Addresses:
    """Counts for each client address, which may hold `most`, None for any number; a trusted proxy may always.

    A connection counts from its acceptance to its end. That of a proxy is many clients': who they are is known with
    the head of a request, and so the client behind it holds one more while that request is answered.
    """

    def __init__(self) -> None:
        self.most: int | None = None
        self.trusted: Sequence[Network] = ()
        self.refused = 0
        self._held: dict[str | bytes, int] = {}

    def hold(self, peer: str) -> str | bytes:
        """Count one more and return what to give back, "" where there is no bound. Raises: `RateLimited`."""
        if self.most is None:
            return ""
        address = one_client(peer)
        held = self._held.get(address, 0)
        if held >= self.most and not is_trusted(peer, self.trusted):
            self.refused += 1
            raise RateLimited(
                "Your address has too many connections: close some, or use one for many requests.", retry_after_s=1
            )
        self._held[address] = held + 1
        return address

    def give_back(self, address: str | bytes) -> None:
        """Count one less."""
        remaining = self._held[address] - 1
        if remaining:
            self._held[address] = remaining
        else:
            del self._held[address]


def one_client(peer: str) -> str | bytes:
    """Return what counts as one client: an IPv4 address, the network of an IPv6 one."""
    if ":" not in peer:
        return peer
    return socket.inet_pton(socket.AF_INET6, peer.partition("%")[0])[:_NETWORK_BYTES]
