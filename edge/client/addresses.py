"""How much one client address holds: connections, and behind trusted proxies requests."""

import socket
from collections.abc import Sequence
from typing import Final

from edge.client.head import is_trusted
from edge.config.values import Network
from edge.errors import RateLimited

_NETWORK_BYTES: Final = 8  # of an IPv6 address: a client has a /64 at least (RFC 6177 section 2)


class Addresses:
    """Counts for each client address, of which one may be at `most`, None for any number.

    A connection counts from its acceptance to its end. That of a proxy is many clients': who they are is known with
    the head of a request, and so the client behind it holds one more while that request is answered.
    """

    def __init__(self) -> None:
        self.most: int | None = None
        self.trusted: Sequence[Network] = ()
        self.refused = 0
        self._held: dict[str | bytes, int] = {}

    def check(self, peer: str, address: str | bytes) -> None:
        """Raise `RateLimited` for one who holds all it may; a trusted proxy may hold any number."""
        if self.most is None or self._held.get(address, 0) < self.most or is_trusted(peer, self.trusted):
            return
        self.refused += 1
        raise RateLimited(
            "Your address has too many connections: close some, or use one for many requests.", retry_after_s=1
        )

    def take(self, address: str | bytes) -> None:
        """Count one more."""
        self._held[address] = self._held.get(address, 0) + 1

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
